"""Numbers of NumPy are as good as Python's wherever the library asks for one; booleans are none."""
import numpy as np
import pytest
from fastai.torch_core import set_seed
from torch import nn

from lth_nb.all import Experiment, Recipe, Seeded, Sparsifier, SparsifyCallback, dense, digits_learner, finetune, geometric, imp, iterative, large_final

RECIPE = Recipe(digits_learner, epochs=2)
def callback(**options): return SparsifyCallback(50, 'weight', 'global', large_final, iterative, lth=True, **options)
def experiment(*arms, seeds=(0,)): return Experiment(RECIPE, [dense(), *arms], iterative, 50, seeds)

TAKEN = {
    'rewind_step': lambda number: imp(rewind_step=number(37)), 'rewind_epoch': lambda number: imp(rewind_epoch=number(1)), 'lr': lambda number: finetune(lr=number(1)),
    'rate': lambda number: geometric(rate=number(20)), 'start_epoch': lambda number: callback(start_epoch=number(2)),
    'step of the callback': lambda number: callback(rewind_step=number(2)), 'epoch of the callback': lambda number: callback(rewind_epoch=number(1)),
    'sparsity': lambda number: Experiment(RECIPE, [dense()], sparsity=number(50)), 'lr of a recipe': lambda number: Recipe(digits_learner, epochs=2, lr=number(1)),
}
WHOLE = {
    'seed': lambda number: Seeded(number(3)), 'seeds': lambda number: experiment(seeds=[number(0)]), 'n_steps': lambda number: iterative(number(2)),
    'epochs': lambda number: finetune(epochs=number(1)), 'epochs of a recipe': lambda number: Recipe(digits_learner, epochs=number(2)),
}


@pytest.mark.parametrize('number', [np.int64, np.int32, np.float32, np.float64])
@pytest.mark.parametrize('make', TAKEN.values(), ids=TAKEN)
def test_numbers_of_numpy_are_taken(make, number): make(number)


@pytest.mark.parametrize('make', WHOLE.values(), ids=WHOLE)
def test_whole_numbers_of_numpy_are_taken(make):
    make(np.int64)
    with pytest.raises(ValueError): make(np.float32)


@pytest.mark.parametrize('yes', [True, np.True_])
@pytest.mark.parametrize('make', (TAKEN | WHOLE).values(), ids=TAKEN | WHOLE)
def test_booleans_are_no_numbers(make, yes):
    with pytest.raises(ValueError): make(lambda _: yes)


def test_an_array_of_seeds():
    seeds = experiment(seeds=np.arange(2)).seeds
    assert seeds == (0, 1) and all(type(s) is int for s in seeds)


def test_a_number_of_numpy_names_the_same_network(tmp_path):
    "What is written as JSON and hashed holds Python's numbers."
    def ends(rewind, lr): return [(r['arm'], r['level'], r['accuracy']) for r in experiment(imp(rewind_step=rewind), finetune(lr=lr)).run(tmp_path, 1, progress=False).rows]
    first = ends(3, .25)
    n_segments = len(list((tmp_path/'segments').iterdir()))
    assert ends(np.int64(3), np.float32(.25)) == first and len(list((tmp_path/'segments').iterdir())) == n_segments


def test_a_sparsity_of_numpy_cuts_the_same():
    def cut(sparsity):
        set_seed(0)
        sparsifier = Sparsifier(nn.Linear(20, 10))
        sparsifier.prune(sparsity)
        return sparsifier.mask
    assert cut(np.float32(50)) == cut(np.int64(50)) == cut(50)
