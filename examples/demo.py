"""The blog's comparison on the digits that ship with scikit-learn, with the controls the blog lacks.

Five networks for each seed: dense; the ticket rewound to step 0; the ticket rewound later; the first ticket's mask on a new
initialisation; the second ticket's mask with its positions shuffled. The table, a figure and the log go to runs/demo.
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

SEEDS, ROUND_EPOCHS, REWIND_EPOCH = range(10), 5, 1
SPARSITY, SCHEDULE = 87.5, geometric(n_steps=3)  # half of what is left in each round
OUT = Path('runs/demo')
COMPARISONS = [('ticket, rewound to step 0', 'dense'), ('ticket, rewound to epoch 1', 'dense'),
               ('ticket, rewound to step 0', 'same mask, reinitialised'), ('ticket, rewound to epoch 1', 'same mask, shuffled')]


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
    "Find a ticket; return its accuracy, its mask and its rewind point."
    sp_cb = SparsifyCallback(SPARSITY, schedule=SCHEDULE, start_epoch=ROUND_EPOCHS, lth=True, rewind_epoch=rewind_epoch)
    result = fit(learner(seed), ROUND_EPOCHS * (1 + SCHEDULE.n_steps), Seeded(seed), sp_cb)
    return result, sp_cb.mask, sp_cb.rewind_point


def with_mask(seed, mask, point=None):
    "Train a network that has the mask from the start: a new initialisation, or the weights of a rewind point."
    learn = learner(seed)
    seeded = Seeded(seed)
    if point is not None:
        point.restore(learn.model, loaders=[learn.dls.train])
        seeded.epochs_done = point.position.epoch
    sparsifier = Sparsifier(learn.model, mask=mask)
    return fit(learn, ROUND_EPOCHS, seeded, MaskCallback(sparsifier))


def replicate(seed):
    "All five networks of one seed; accuracies in percent."
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    dense = fit(learner(seed), ROUND_EPOCHS, Seeded(seed))
    t0, mask0, _ = ticket(seed, 0)
    t1, mask1, point1 = ticket(seed, REWIND_EPOCH)
    reinit = with_mask(seed + 1000, mask0)
    shuffled = with_mask(seed, mask1.shuffled(seed), point1)
    return {'dense': dense, 'ticket, rewound to step 0': t0, 'ticket, rewound to epoch 1': t1,
            'same mask, reinitialised': reinit, 'same mask, shuffled': shuffled}


def interval(values, level):
    "Mean and half-width of the t interval."
    return values.mean(), stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values)**.5


def comparison_table(results):
    "Paired differences, with intervals that hold together (Bonferroni), and what they allow to say."
    rows = []
    for arm, other in COMPARISONS:
        mean, half = interval(results[arm] - results[other], 1 - .05 / len(COMPARISONS))
        says = 'better' if mean - half > 0 else 'worse' if mean + half < 0 else 'no difference shown'
        rows.append((arm, other, round(mean, 2), round(mean - half, 2), round(mean + half, 2), says))
    return pd.DataFrame(rows, columns=['arm', 'compared with', 'difference', 'from', 'to', 'it is'])


def figure(results, path):
    "Accuracy of each arm: every seed a dot, the mean with its 95 % interval."
    ax = matplotlib.figure.Figure(figsize=(7, 3), layout='constrained').subplots()
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
    say(f'{len(SEEDS)} seeds, 64-300-100-10 network, {ROUND_EPOCHS} epochs a round, {SCHEDULE.n_steps} rounds to {SPARSITY} % sparsity')
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
    say(f'\nOn one small data set. {time.time() - start:.0f} s; table, figure and log are in {OUT}/')


if __name__ == '__main__': main()
