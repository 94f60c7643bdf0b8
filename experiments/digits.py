"""Do tickets beat their controls? LeNet-300-100 on the digits, as sparse as 3.6 %: the question of Frankle & Carbin 2019, figures 1 and 4.

    .venv/bin/python experiments/digits.py    # resumes; the numbers go to experiments/digits/, the states to runs/digits

The recipe was fixed before the first run: Adam at 1.2e-3 as in the paper's figure 2, batches of 64, ten epochs; 20 % of what is left is cut fifteen times,
half of that in the output layer; ten seeds.
"""
import sys
import warnings
from pathlib import Path

from lth_nb.all import Experiment, Pruning, Recipe, dense, digits_learner, geometric, imp, reinit, shuffled

FAR = list(range(10, 16))  # the levels below 12 % density
TICKET = imp(name='ticket')
EXPERIMENT = Experiment(Recipe(digits_learner, epochs=10, lr=1.2e-3),
                        [dense(), TICKET, reinit(of=TICKET, levels=FAR, name='reinitialised'), shuffled(of=TICKET, levels=FAR, name='shuffled')],
                        geometric(n_steps=15), sparsity=100*(1 - .8**15), seeds=range(10), pruning=Pruning(rates={'5.weight': 50}))

if __name__ == '__main__':
    warnings.filterwarnings('ignore', category=FutureWarning)
    EXPERIMENT.run('runs/digits', n_jobs=int(sys.argv[1]) if sys.argv[1:] else 2).save(Path(__file__).with_suffix(''))
