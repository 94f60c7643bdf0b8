"""The blog's comparison on the digits that ship with scikit-learn, with the controls a claim needs.

Seven networks for each seed: dense; the ticket rewound to step 0 and the one rewound to epoch 1; and for each of them two controls, its
mask on another initialisation, and its mask with the positions shuffled. The table, a figure and the log go to runs/demo.
"""
import logging
import time
import warnings
from pathlib import Path

import joblib
import matplotlib
import pandas as pd
import torch
from fastai.vision.all import Learner, accuracy
from scipy import stats
from torch import nn

from lth_nb.all import MaskCallback, Seeded, SparsifyCallback, Sparsifier, digits_dls, geometric, set_generators

SEEDS, T, REWIND_EPOCH = range(10), 5, 1  # every level trains to epoch T, the rewound ones from epoch REWIND_EPOCH on
SPARSITY, SCHEDULE = 87.5, geometric(n_steps=3)  # half of what is left in each round
MARGIN = 1.  # points of accuracy that do not matter, set beforehand
OUT = Path('runs/demo')
TICKETS = {'ticket, rewound to step 0': 0, f'ticket, rewound to epoch {REWIND_EPOCH}': REWIND_EPOCH}
REINIT, SHUFFLED = '{}: its mask, reinitialised', '{}: its mask, shuffled'
COMPARISONS = [(t, other) for t in TICKETS for other in ('dense', REINIT.format(t), SHUFFLED.format(t))]


def learner(seed):
    "A fresh network of the seed, on the digits."
    set_generators(seed, 0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return Learner(digits_dls(bs=64), model, metrics=accuracy, lr=2e-3)


def fit(learn, n_epoch, *cbs):
    "Train quietly; return the accuracy after the last epoch, in percent."
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, cbs=list(cbs))
    return 100 * learn.recorder.values[-1][2]


def ticket(seed, rewind_epoch):
    "Find a ticket; return its accuracy, its mask and its rewind point. Each round trains from the rewind point to epoch T."
    sp_cb = SparsifyCallback(SPARSITY, schedule=SCHEDULE, start_epoch=T, lth=True, rewind_epoch=rewind_epoch)
    result = fit(learner(seed), T + SCHEDULE.n_steps * (T - rewind_epoch), Seeded(seed), sp_cb)
    return result, sp_cb.mask, sp_cb.rewind_point


def with_mask(learn, seed, mask, point=None):
    "Train a network that has the mask from the start to epoch T, in the seed's data order; from a rewind point if one is given."
    seeded, n_epoch = Seeded(seed), T
    if point is not None:
        point.restore(learn.model, loaders=[learn.dls.train])
        seeded.epochs_done = point.position.epoch
        n_epoch -= point.position.epoch
    return fit(learn, n_epoch, seeded, MaskCallback(Sparsifier(learn.model, mask=mask)))


def replicate(seed):
    "All networks of one seed; accuracies in percent."
    warnings.filterwarnings('ignore', category=FutureWarning)
    torch.set_num_threads(1)
    row = {'dense': fit(learner(seed), T, Seeded(seed))}
    for name, rewind_epoch in TICKETS.items():
        row[name], mask, point = ticket(seed, rewind_epoch)
        row[REINIT.format(name)] = with_mask(learner(seed + 1000), seed, mask)
        row[SHUFFLED.format(name)] = with_mask(learner(seed), seed, mask.shuffled(seed), point)
    return row


def interval(values, level):
    "Mean and half-width of the t interval."
    return values.mean(), stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values)**.5


def verdict(arm, other, differences):
    "What a comparison allows to say: against dense with the margin, by one-sided 95 % bounds; against a control by its interval."
    if other == 'dense':
        mean, half = interval(differences, .90)
        name = 'winning' if TICKETS[arm] == 0 else 'matching'
        return name if mean - half > -MARGIN else 'worse' if mean + half < -MARGIN else 'undecided'
    mean, half = interval(differences, 1 - .05 / len(COMPARISONS))
    return 'better' if mean - half > 0 else 'worse' if mean + half < 0 else 'no difference shown'


def comparison_table(results):
    "Paired differences, with intervals that hold together (Bonferroni), and what they allow to say."
    rows = []
    for arm, other in COMPARISONS:
        differences = results[arm] - results[other]
        mean, half = interval(differences, 1 - .05 / len(COMPARISONS))
        rows.append((arm, other.removeprefix(f'{arm}: '), round(mean, 2), round(mean - half, 2), round(mean + half, 2), verdict(arm, other, differences)))
    return pd.DataFrame(rows, columns=['arm', 'compared with', 'difference', 'from', 'to', 'verdict'])


def figure(results, path):
    "Accuracy of each arm: every seed a dot, the mean with its 95 % interval."
    ax = matplotlib.figure.Figure(figsize=(8, 3.6), layout='constrained').subplots()
    for i, arm in enumerate(results):
        mean, half = interval(results[arm], .95)
        ax.plot(results[arm], [i] * len(results), 'o', color='#9aa7b5', ms=4)
        ax.errorbar(mean, i, xerr=half, fmt='D', color='#d95f0e', capsize=4)
    ax.set(yticks=range(results.shape[1]), yticklabels=results.columns, xlabel='validation accuracy (%)')
    ax.invert_yaxis()
    ax.figure.savefig(path, dpi=150)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format='%(message)s', handlers=[logging.FileHandler(OUT/'log.txt', 'w'), logging.StreamHandler()])
    say, start = logging.info, time.time()
    say(f'{len(SEEDS)} seeds, 64-300-100-10 network, every level trained to epoch {T}, {SCHEDULE.n_steps} rounds to {SPARSITY} % sparsity')
    done = joblib.Parallel(n_jobs=2, return_as='generator')(joblib.delayed(replicate)(s) for s in SEEDS)
    rows = []
    for seed, row in zip(SEEDS, done):
        rows.append(row)
        say(f'seed {seed}: ' + ', '.join(f'{arm} {acc:.1f}' for arm, acc in row.items()))
    results = pd.DataFrame(rows, index=pd.Index(SEEDS, name='seed'))
    summary = pd.DataFrame({arm: interval(results[arm], .95) for arm in results}, index=['accuracy (%)', '±']).T.round(2)
    compared = comparison_table(results)
    results.to_csv(OUT/'results.csv')
    compared.to_csv(OUT/'comparisons.csv', index=False)
    figure(results, OUT/'accuracy.png')
    say(f'\nValidation accuracy after the last step, mean of {len(SEEDS)} seeds and 95 % interval\n{summary.to_string()}')
    say(f'\nDifferences seed by seed, in points; the {len(COMPARISONS)} intervals hold together with 95 %\n{compared.to_string(index=False)}')
    say(f'\nAgainst dense: winning (step 0) or matching (later) if not worse by {MARGIN:g} point or more, by one-sided 95 % bounds. '
        'The intervals cover seeds, on one small validation set of 360 images.')
    say(f'{time.time() - start:.0f} s; table, figure and log are in {OUT}/')


if __name__ == '__main__': main()
