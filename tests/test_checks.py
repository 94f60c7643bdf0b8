"""Numbers and arrays of NumPy are as good as Python's wherever the library asks for one; booleans are none."""
import numpy as np
import pandas as pd
import pytest
from torch import nn

from lth_nb.all import Experiment, Recipe, Seeded, SparsifyCallback, check_sparsity, dense, digits_learner, finetune, geometric, imp, iterative, large_final, reinit
from lth_nb.arms import Grid

RECIPE = Recipe(digits_learner, epochs=2)
def callback(**options): return SparsifyCallback(50, 'weight', 'global', large_final, iterative, lth=True, **options)
def experiment(*arms, seeds=(0,)): return Experiment(RECIPE, [dense(), *arms], iterative, 50, seeds)

GRID = Grid(epochs=5, n_batches=300, sparsities=(25., 50.), lr=1e-3)
def ends(arm): return arm.name, [arm.make(GRID, 0, level) for level in (1, 2)]
def fields(callback): return callback.start_epoch, callback.rewind_epoch, callback.rewind_step

TAKEN = {  # name of the argument -> what follows from a number of some type
    'rewind_step': lambda number: ends(imp(rewind_step=number(37))), 'rewind_epoch': lambda number: ends(imp(rewind_epoch=number(1))), 'lr': lambda number: ends(finetune(lr=number(1))),
    'rate': lambda number: geometric(rate=number(20)).levels(60), 'start_epoch': lambda number: fields(callback(start_epoch=number(2))),
    'rewind_epoch=': lambda number: fields(callback(rewind_epoch=number(1))), 'sparsity': lambda number: Experiment(RECIPE, [dense()], sparsity=number(50)).sparsity,
    'lr=': lambda number: Recipe(digits_learner, epochs=2, lr=number(1)).name, 'sparsity=': lambda number: check_sparsity(number(50)),
}
WHOLE = {
    'seed': lambda number: Seeded(number(3)).seed, 'seeds': lambda number: experiment(seeds=[number(0)]).seeds, 'n_steps': lambda number: iterative(number(2)).levels(50),
    'epochs': lambda number: ends(finetune(epochs=number(1))), 'epochs=': lambda number: Recipe(digits_learner, epochs=number(2)).name,
    'levels': lambda number: reinit(of=imp(), levels=[number(1)]).levels_in(GRID), 'hidden': lambda number: [tuple(p.shape) for p in digits_learner(hidden=[number(9)]).model.parameters()],
}


@pytest.mark.parametrize('number', [np.int64, np.uint8, np.float32, np.float64])
@pytest.mark.parametrize('argument', TAKEN)
def test_numbers_of_numpy_are_taken(argument, number):
    "What is made of them is the same, in its names, too."
    made, plain = TAKEN[argument](number), TAKEN[argument](lambda n: number(n).item())
    assert made == plain and repr(made) == repr(plain)


@pytest.mark.parametrize('argument', WHOLE)
def test_whole_numbers_of_numpy_are_taken(argument):
    assert repr(WHOLE[argument](np.int64)) == repr(WHOLE[argument](int))
    with pytest.raises(ValueError, match=argument): WHOLE[argument](np.float32)


@pytest.mark.parametrize('yes', [True, False, np.True_, np.False_])
@pytest.mark.parametrize('argument', TAKEN | WHOLE)
def test_booleans_are_no_numbers(argument, yes):
    with pytest.raises(ValueError, match=argument): (TAKEN | WHOLE)[argument](lambda _: yes)


@pytest.mark.parametrize('array', [np.array, pd.Series])
def test_arrays_and_columns_are_lists(array):
    seeds = experiment(seeds=array([0, 1])).seeds
    assert seeds == (0, 1) and all(type(s) is int for s in seeds)
    assert reinit(of=imp(), levels=array([1, 2])).levels_in(GRID) == [1, 2]
    assert [m.out_features for m in digits_learner(hidden=array([30, 20])).model.modules() if isinstance(m, nn.Linear)] == [30, 20, 10]


def test_a_ticket_by_numbers_of_a_table(tmp_path):
    exp = experiment(imp())
    found = exp.run(tmp_path, 1, progress=False)
    assert found.only(seeds=found.frame.seed.unique(), levels=found.frame.level).rows == found.rows
    assert exp.ticket(tmp_path, exp.arms[1], np.int64(2), np.int64(0)).mask == exp.ticket(tmp_path, exp.arms[1], 2, 0).mask
    with pytest.raises(ValueError, match='level=True'): exp.ticket(tmp_path, exp.arms[1], True)
    with pytest.raises(ValueError, match='seed=False'): exp.ticket(tmp_path, exp.arms[1], 2, False)


def test_a_number_of_numpy_names_the_same_network(tmp_path):
    "What is written as JSON and hashed holds Python's numbers."
    def ends(rewind, lr): return [(r['arm'], r['level'], r['accuracy']) for r in experiment(imp(rewind_step=rewind), finetune(lr=lr)).run(tmp_path, 1, progress=False).rows]
    first = ends(3, .25)
    n_segments = len(list((tmp_path/'segments').iterdir()))
    assert ends(np.int64(3), np.float32(.25)) == first and len(list((tmp_path/'segments').iterdir())) == n_segments
