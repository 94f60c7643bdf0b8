"Every criterion, through a sparsifier and a training that it looks back on, cuts what its formula says."
import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from helpers_core import conv_net, device, n_cut, quick, seeded, train_step  # noqa: F401
from lth_nb import criteria
from lth_nb.criteria import Criterion, criterion, get_criterion, random_score
from lth_nb.mask import n_to_cut
from lth_nb.sparsifier import Sparsifier

# written out once more, over numpy arrays: weight now (w), at initialisation (i), at the previous pruning (p)
FORMULAS = {
    'large_final': lambda w, i, p: abs(w), 'squared_final': lambda w, i, p: w*w, 'small_final': lambda w, i, p: -abs(w),
    'large_init': lambda w, i, p: abs(i), 'small_init': lambda w, i, p: -abs(i),
    'large_init_large_final': lambda w, i, p: np.minimum(abs(w), abs(i)),
    'small_init_small_final': lambda w, i, p: -np.maximum(abs(w), abs(i)),
    'magnitude_increase': lambda w, i, p: abs(w) - abs(i), 'movement': lambda w, i, p: abs(w - i), 'movmag': lambda w, i, p: abs(w*(w - i)),
    'updating_magnitude_increase': lambda w, i, p: abs(w) - abs(p), 'updating_movement': lambda w, i, p: abs(w - p),
    'updating_movmag': lambda w, i, p: abs(w*(w - p))}


def values(sp): return {n: w.detach().cpu().numpy().copy() for n, w in sp.weights.items()}


def expected_mask(score, kept, n):
    "Keep all but the `n` lowest of all layers at once, by a stable sort; what is cut stays cut."
    flat, alive = np.concatenate([score[k].ravel() for k in score]), np.concatenate([kept[k].ravel() for k in score])
    order = np.lexsort((np.arange(len(flat)), np.where(alive, flat, -np.inf)))
    stays = np.ones(len(flat), bool)
    stays[order[:n]] = False
    parts = np.split(stays, np.cumsum([s.size for s in score.values()])[:-1])
    return {k: part.reshape(score[k].shape) for k, part in zip(score, parts)}


def test_every_criterion_is_tested_here():
    ours = {n for n, c in criteria._criteria.items() if c.score.__module__ == 'lth_nb.criteria'}
    assert ours == {*FORMULAS, 'random_score'}


@pytest.mark.parametrize('name', FORMULAS)
def test_two_rounds_with_a_rewind_cut_what_the_formula_says(name, device):
    "Across layers by the scores themselves, negative ones too; *initial* is position 0 though the rewind point is later."
    model = conv_net(device)
    adam = torch.optim.Adam(model.parameters(), .01)
    sp = Sparsifier(model, criteria=name, allow_empty=True).attach(adam)
    initial = values(sp)
    train_step(model, adam)
    point, previous, kept = sp.take(), initial, {n: np.ones(w.shape, bool) for n, w in initial.items()}
    for sparsity in (30, 55):
        for i in range(3): train_step(model, adam, i)
        now = values(sp)
        score = {n: FORMULAS[name](now[n], initial[n], previous[n]) for n in now}
        expected = expected_mask(score, kept, n_to_cut(sp.mask.n_total, sparsity))
        sp.prune(sparsity, point)
        for n in expected: np.testing.assert_array_equal(sp.mask[n].cpu().numpy(), expected[n], err_msg=n)
        previous, kept = now, expected


def test_negative_scores_are_not_shifted_layer_by_layer():
    "A layer of small weights and one of large: `small_final` takes all it cuts from the large one."
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.uniform_(.1, .2)
        model[1].weight.uniform_(10, 20)
    mask = Sparsifier(model, criteria='small_final').prune(40).mask
    assert mask['0.weight'].all() and int((~mask['1.weight']).sum()) == 80


@given(st.integers(0, 100), st.integers(0, 2**40), st.sampled_from(['global', 'local']))
@quick
def test_chance_cuts_the_exact_number_and_the_same_ones_for_a_seed(sparsity, seed, context):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 9))

    def chance(seed): return Sparsifier(model, context=context, criteria='random_score', seed=seed, allow_empty=True).next_mask(sparsity)
    mask = chance(seed)
    assert mask == chance(seed)
    if context == 'global': assert n_cut(mask) == n_to_cut(80, sparsity)
    else: assert all(int((~t).sum()) == n_to_cut(t.numel(), sparsity) for t in mask.values())


def test_chance_is_even_over_layers_and_differs_between_them_and_between_seeds():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    masks = [Sparsifier(model, criteria=random_score, seed=s).next_mask(50) for s in (0, 1)]
    assert all(abs(float(t.float().mean()) - .5) < .03 for m in masks for t in m.values())
    overlap = [(a == b).float().mean() for a, b in ((masks[0]['0.weight'], masks[0]['1.weight']), (masks[0]['0.weight'], masks[1]['0.weight']))]
    assert all(abs(float(o) - .5) < .03 for o in overlap)


def test_chance_without_a_seed_follows_torchs_generator_and_does_not_move_it():
    model, masks = nn.Linear(20, 20), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        masks.append(Sparsifier(model, criteria='random_score').next_mask(50))
        assert torch.equal(torch.get_rng_state(), before)
    assert masks[0] == masks[1] != masks[2]


IN_ANOTHER_PROCESS = '''
import pickle, sys, torch
from torch import nn
from lth_nb.sparsifier import Sparsifier
torch.manual_seed(99)
model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 9))
pickle.dump(Sparsifier(model, criteria='random_score', seed=3).next_mask(50), sys.stdout.buffer)
'''


def test_chance_is_the_same_in_another_process():
    out = subprocess.run([sys.executable, '-c', IN_ANOTHER_PROCESS], capture_output=True, check=True, timeout=120).stdout
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 9))
    assert pickle.loads(out) == Sparsifier(model, criteria='random_score', seed=3).next_mask(50)


# ---- criteria of one's own ----

@pytest.fixture
def registry():
    "Put the registry back after the test."
    before = dict(criteria._criteria)
    yield
    criteria._criteria.clear()
    criteria._criteria.update(before)


def test_a_criterion_that_is_not_elementwise_sees_whole_tensors(registry):
    seen = []

    @criterion
    def relative(now):
        seen.append(tuple(now.shape))
        return now.abs()/now.abs().max()
    model = nn.Sequential(nn.Linear(300, 1000), nn.Linear(1000, 2))
    Sparsifier(model, criteria='relative').next_mask(50)
    assert set(seen) == {(1000, 300), (2, 1000)}


def test_parts_of_an_elementwise_criterion_give_the_same_as_the_whole(registry):
    @criterion(elementwise=True)
    def in_parts(now): return now.abs()

    @criterion
    def whole(now): return now.abs()
    model = nn.Sequential(nn.Linear(500, 1500), nn.Linear(1500, 500))
    assert Sparsifier(model, criteria='in_parts').next_mask(37) == Sparsifier(model, criteria='whole').next_mask(37)


def test_scores_of_the_wrong_shape_or_that_are_no_numbers_are_refused_by_name(registry):
    @criterion
    def summed(now): return now.sum()

    @criterion
    def undefined(now): return now.log()
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match='criteria=summed.*shape'): Sparsifier(model, criteria='summed').prune(50)
    with pytest.raises(ValueError, match='0.weight are not numbers'): Sparsifier(model, criteria='undefined').prune(50)
    assert all((p != 0).all() for p in model.parameters())


@pytest.mark.parametrize('bad', ['biggest', None, 3, torch.abs])
def test_what_is_no_criterion_is_refused(bad):
    with pytest.raises(ValueError, match='criteria=.*large_final'): get_criterion(bad)


@pytest.mark.parametrize('name', [*FORMULAS, 'random_score'])
def test_criteria_are_values(name):
    c = get_criterion(name)
    assert pickle.loads(pickle.dumps(c)) is c and copy.deepcopy(c) is c and isinstance(c, Criterion)
    w = torch.randn(3, 4)
    inputs = dict(now=w.clone(), initial=w + 1, previous=w - 1, uniform=w.abs())
    before = {n: t.clone() for n, t in inputs.items()}
    assert torch.equal(c(**inputs), c(**inputs)) and all(torch.equal(inputs[n], before[n]) for n in inputs)
