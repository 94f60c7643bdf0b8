"""The blog's comparison on the digits that ship with scikit-learn, with the controls a claim needs.

Dense; the ticket rewound to step 0 and the one rewound to epoch 1; and for each of them two controls, its mask on another initialisation
and its mask with the positions shuffled. Ten seeds. The tables, a figure, a page with everything and the log go to runs/demo; run again, it
reads what is there.
"""
import logging
import time
import warnings
from pathlib import Path

import matplotlib
import pandas as pd

from lth_nb.all import Experiment, Recipe, dense, digits_learner, geometric, imp, reinit, shuffled

OUT = Path('runs/demo')
MARGIN = 1.  # points of accuracy that do not matter, set beforehand
TICKETS = [imp(name='ticket, rewound to step 0'), imp(rewind_epoch=1, name='ticket, rewound to epoch 1')]
CONTROLS = [control(of=t, name=f'{t.name}: {what}') for t in TICKETS for control, what in ((reinit, 'its mask, reinitialised'), (shuffled, 'its mask, shuffled'))]
EXPERIMENT = Experiment(Recipe(digits_learner, epochs=5, lr=2e-3), [dense(), *TICKETS, *CONTROLS],
                        geometric(n_steps=3), sparsity=87.5, seeds=range(10))  # half of what is left in each round


def main():
    warnings.filterwarnings('ignore', category=FutureWarning)
    OUT.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format='%(message)s', handlers=[logging.FileHandler(OUT/'log.txt', 'w'), logging.StreamHandler()])
    say, start = logging.info, time.time()
    say(f'{EXPERIMENT.recipe}\n64-300-100-10 network on 1,437 digits, validated on 360; {EXPERIMENT.plan().note}')
    results = EXPERIMENT.run(OUT, n_jobs=2)
    pd.set_option('display.width', 200, 'display.max_columns', 20)
    tables = dict(accuracy=results.table(), verdicts=results.verdict(MARGIN, level=3).frame)
    for name, table in tables.items(): table.to_csv(OUT/f'{name}.csv', index=False)
    figure = matplotlib.figure.Figure(figsize=(8, 3.6), layout='constrained')
    results.plot_arms(ax=figure.subplots())
    figure.savefig(OUT/'accuracy.png', dpi=150)
    results.report(OUT/'report.html', MARGIN, title='The lottery on digits')
    accuracy = tables['accuracy'].drop(columns=['missing', 'n_seeds'])
    say(f'\nValidation accuracy (%) after the last step: mean of 10 seeds, 95 % interval, lowest and highest seed; cost in epochs\n{accuracy.round(2).to_string(index=False)}')
    for heading, text in results.verdict(MARGIN, level=3).lines: say(f'\n{heading}\n{text}')
    say(f'\n{time.time() - start:.0f} s; the tables, the figure and report.html are in {OUT}/')


if __name__ == '__main__': main()
