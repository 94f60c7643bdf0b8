"Experiments train what one fit, or a few lines by hand, would have trained; each stretch once; and say beforehand what."
import json
import math
import os
import random
import subprocess
import sys
from functools import partial

import joblib
import numpy as np
import pytest
import torch
from fastai.callback.schedule import ParamScheduler, SchedCos, fit_one_cycle  # noqa: F401, it gives learners `fit_one_cycle`
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy, error_rate
from fastai.optimizer import SGD, OptimWrapper
from helpers_experiment import (Rounds, differences, digits, left, lenet, of_points, pictures, points, row_of, seed_inside, state_of, states,
                                trained_batches)
from helpers_fastai import Items, different, generators_kept, opt_stats, same, small_dls, small_model, tensors_of
from torch.utils.data import TensorDataset

from lth_nb.arms import (Arm, Pruning, State, dense, dense_long, finetune, imp, lr_rewind, one_shot_ticket, random_mask, reinit, shuffled, supermask)
from lth_nb.callback import SparsifyCallback
from lth_nb.fitting import MaskCallback, Seeded, set_generators
from lth_nb.criteria import criterion
from lth_nb.experiment import Experiment
from lth_nb.recipe import Recipe
from lth_nb.results import Results
from lth_nb.schedule import agp, geometric, iterative
from lth_nb.sparsifier import Sparsifier
from lth_nb.store import Store
from lth_nb.training import make_learner


@pytest.fixture(autouse=True)
def quiet():
    "Experiments leave generators and threads alone; so do the fits here."
    with generators_kept(): yield


def experiment(arms, recipe=None, schedule=iterative(2), sparsity=50, seeds=(0,), **pruning):
    return Experiment(recipe or of_points(), arms, schedule, sparsity, seeds, Pruning(**pruning))


def run(exp, path, **kwargs): return exp.run(path, progress=False, **kwargs)


# ------------------------------------------------------------------ the same bits as one fit with the callback

def in_one_fit(recipe, seed, epochs, schedule=iterative(2), fit='fit', cbs=(), **kwargs):
    "What a single fit of a learner with `SparsifyCallback` gives."
    learn = recipe.make(seed)
    sp_cb = SparsifyCallback(50, schedule=schedule, start_epoch=recipe.epochs, lth=True, **kwargs)
    rounds = Rounds(sp_cb)
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(epochs, recipe.lr, cbs=[Seeded(seed), sp_cb, rounds, *cbs])
    return learn, sp_cb, rounds


def statistics(point): return [{k: v for k, v in s.items() if k not in ('force_train', 'do_wd')} for s in point.optimizer['state']]


def agrees(path, recipe, fit='fit', seed=3, cbs=(), full=False, n_levels=2, pruning=(), **kwargs):
    "Every level of an experiment against one fit: masks, metrics, and at the end weights, buffers, optimizer, position."
    arm, pruning = imp(full_epochs=full, **kwargs), dict(pruning)
    exp = experiment([arm], recipe, iterative(n_levels), seeds=[seed], **pruning)
    results = run(exp, path)
    assert not results.failed
    n = exp.grid.n_batches
    a_round = recipe.epochs if full else recipe.epochs - arm.rewind.batch(exp.grid)//n
    learn, sp_cb, rounds = in_one_fit(recipe, seed, recipe.epochs + n_levels*a_round, iterative(n_levels), fit, cbs, **kwargs, **pruning)
    assert len(rounds.masks) == 1 + n_levels
    for level in range(1, n_levels + 1):
        assert results.mask(arm.name, level, seed) == rounds.masks[level] != rounds.masks[level - 1], f'the mask of level {level}'
        row, values = row_of(results, arm, level, seed), rounds.values[recipe.epochs + level*a_round - 1]
        assert [row['valid_loss'], row['accuracy']] == values[1:3], f'the metrics of level {level}'
        assert math.isclose(row['train_loss'], values[0], rel_tol=1e-5)
    point = state_of(exp, path, arm, n_levels, seed)
    assert same(tensors_of(learn.model), point.tensors), different(tensors_of(learn.model), point.tensors)
    if isinstance(learn.opt.state_dict()['state'], list): assert same(opt_stats(learn.opt), statistics(point))
    assert point.position == sp_cb.position


POINTS = {'start': {}, 'epoch 1': dict(rewind_epoch=1), 'a quarter': dict(rewind_epoch=.25), 'step 6': dict(rewind_step=6)}


WAYS = [('start', False), ('epoch 1', True), ('epoch 1', False), ('a quarter', False), ('step 6', True), ('step 6', False)]
QUICK = {('start', 'keep'), ('epoch 1', 'restore'), ('epoch 1', 'keep'), ('step 6', 'restore')}


@pytest.mark.parametrize('point, full, optimizer', [pytest.param(*way, how, marks=[] if how == 'fresh' or (way[0], how) in QUICK else pytest.mark.slow) for way in WAYS for how in ('fresh', 'restore', 'keep')])
def test_segments_are_one_fit(point, full, optimizer, tmp_path):
    "Batch norm, dropout, and items with noise from all generators."
    agrees(tmp_path, of_points(), full=full, optimizer=optimizer, **POINTS[point])


@pytest.mark.parametrize('point', [pytest.param({}, marks=pytest.mark.slow), dict(rewind_epoch=1), pytest.param(dict(rewind_epoch=.25), marks=pytest.mark.slow), dict(rewind_step=30)],
                         ids=['start', 'epoch 1', 'a quarter', 'step 30'])
def test_segments_are_one_fit_on_the_digits(point, tmp_path):
    agrees(tmp_path, digits(), full=True, n_levels=3, **point)


@pytest.mark.parametrize('point', POINTS)
def test_segments_are_one_fit_with_one_cycle(point, tmp_path):
    "Each round runs the cycle over its own length, from its position."
    agrees(tmp_path, of_points(epochs=3, anneal='one_cycle'), 'fit_one_cycle', **POINTS[point])


@pytest.mark.parametrize('point', ['start', 'epoch 1'])
def test_segments_are_one_fit_with_a_cosine(point, tmp_path):
    recipe = of_points(epochs=3, anneal='cos')
    agrees(tmp_path, recipe, cbs=[ParamScheduler({'lr': SchedCos(recipe.lr, 0.)})], **POINTS[point])


def with_sgd(): return other_optimizer(partial(SGD, mom=.9, wd=.1))
def with_torch_adamw(): return other_optimizer(partial(OptimWrapper, opt=torch.optim.AdamW))
def other_optimizer(opt_func): return Learner(small_dls(noise=True), small_model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=opt_func)


@pytest.mark.parametrize('learner, how', [(with_sgd, 'keep'), (with_torch_adamw, 'restore'), *(pytest.param(l, h, marks=pytest.mark.slow) for l in (with_sgd, with_torch_adamw) for h in ('fresh', 'restore', 'keep'))])
def test_segments_are_one_fit_with_other_optimizers(learner, how, tmp_path):
    agrees(tmp_path, Recipe(learner, 2, lr=1e-2), rewind_epoch=1, optimizer=how)


def test_segments_are_one_fit_in_bf16(tmp_path): agrees(tmp_path, digits(precision='bf16'), rewind_epoch=1)


def with_workers(): return Learner(small_dls(workers=2, noise=True), small_model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


@pytest.mark.slow
@pytest.mark.parametrize('point', POINTS)
def test_segments_are_one_fit_with_workers(point, tmp_path): agrees(tmp_path, Recipe(with_workers, 2, lr=1e-2), full=True, **POINTS[point])


def accumulating(n_acc): return Learner(small_dls(noise=True), small_model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=GradientAccumulation(n_acc))


def test_segments_are_one_fit_with_accumulated_gradients(tmp_path):
    agrees(tmp_path, Recipe(accumulating, 2, options=dict(n_acc=16)), rewind_epoch=1)


# ------------------------------------------------------------------ masks as one fit makes them

@criterion
def drawn_and_moved(now, previous, uniform):
    "a criterion that wants everything"
    return uniform*(now - previous).abs()


PRUNINGS = {'movement': dict(criteria='movement'), 'updating movement': dict(criteria='updating_movement'), 'increase': dict(criteria='updating_magnitude_increase'),
            'initial': dict(criteria='large_init'), 'random': dict(criteria='random_score'), 'own': dict(criteria=drawn_and_moved),
            'local': dict(context='local'), 'row': dict(granularity='row', ignore='4.weight'), 'ignore': dict(ignore='4.weight'), 'layers': dict(layers=['0', '4']), 'rates': dict(rates={'4.weight': 50})}


@pytest.mark.parametrize('how', PRUNINGS)
def test_masks_are_those_of_one_fit(how, tmp_path): agrees(tmp_path, of_points(), n_levels=3, pruning=PRUNINGS[how], rewind_epoch=1)


@pytest.mark.parametrize('how', [dict(granularity='filter'), dict(granularity='kernel'), dict(granularity='filter', criteria='updating_movement', context='local')],
                         ids=['filter', 'kernel', 'filter, updating'])
def test_masks_of_filters_are_those_of_one_fit(how, tmp_path):
    agrees(tmp_path, Recipe(pictures, 2, lr=1e-2), n_levels=3, pruning=dict(how, ignore='fc.weight'), rewind_epoch=1)


# ------------------------------------------------------------------ arms against a few lines by hand

SEED = 3


def by_hand(recipe, epochs, mask=None, begin=0, learn=None, lr=None):
    "Train a learner from an epoch on, with a new optimizer and under a mask."
    learn = learn or recipe.make(SEED)
    seeded = Seeded(SEED)
    seeded.epochs_done = begin
    cbs = [seeded] if mask is None else [seeded, MaskCallback(Sparsifier(learn.model, mask=mask))]
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr or recipe.lr, cbs=cbs, reset_opt=True)
    return learn


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    "One run of all arms on the points."
    t0, t1 = imp(name='t0'), imp(rewind_epoch=1, name='t1')
    arms = [dense(), t0, t1, one_shot_ticket(rewind_epoch=1, name='at once'), lr_rewind(1, name='lr rewind'), finetune(of=t1, lr=3e-3, name='finetune'), reinit(of=t0, name='reinit'),
            shuffled(of=t0, name='shuffled'), shuffled(of=t1, levels=[1], name='shuffled 1'), random_mask(of=t0, name='random'), dense_long(of=t0, name='long'), supermask(of=t0, name='supermask', levels='all')]
    exp, path = experiment(arms, seeds=[SEED]), tmp_path_factory.mktemp('compared')
    with generators_kept(): results = run(exp, path)
    assert not results.failed
    return exp, path, results, {a.name: a for a in arms}


def is_network(compared, learn, name, level=2):
    exp, path, results, arms = compared
    found = state_of(exp, path, arms[name], level, SEED)
    assert same(tensors_of(learn.model), found.tensors), different(tensors_of(learn.model), found.tensors)
    row, values = row_of(results, name, level, SEED), learn.recorder.values[-1]
    assert [row['valid_loss'], row['accuracy']] == list(values)[1:3]


def test_dense_by_hand(compared):
    is_network(compared, by_hand(compared[0].recipe, 2), 'dense', 0)
    is_network(compared, by_hand(compared[0].recipe, 6), 'long')


def test_one_shot_by_hand(compared):
    recipe = compared[0].recipe
    for level, sparsity in ((1, 25), (2, 50)):
        mask = Sparsifier(by_hand(recipe, 2).model).prune(sparsity).mask
        assert mask == compared[2].mask('at once', level, SEED)
        is_network(compared, by_hand(recipe, 1, mask, 1, by_hand(recipe, 1)), 'at once', level)


@pytest.mark.parametrize('name, lr, begins', [('lr rewind', None, (1, 1)), ('finetune', 3e-3, (2, 3))])
def test_keeping_the_weights_by_hand(compared, name, lr, begins):
    "Fine-tuning goes on with the order of the data, too."
    learn = by_hand(compared[0].recipe, 2)
    sp = Sparsifier(learn.model)
    for level, sparsity in ((1, 25), (2, 50)):
        sp.prune(sparsity)
        assert sp.mask == compared[2].mask(name, level, SEED)
        is_network(compared, by_hand(compared[0].recipe, 1, sp.mask, begins[level - 1], learn, lr), name, level)


def test_reinit_by_hand(compared):
    "The same mask on another initialisation, trained for all T epochs; no kept weight is the ticket's."
    exp, _, results, arms = compared
    mask = results.mask('t0', 2, SEED)
    assert results.mask('reinit', 2, SEED) == mask
    segment = exp.networks[arms['reinit'], 2, SEED].segment
    learn, ticket = make_learner(exp.recipe, segment), exp.recipe.make(SEED)
    fresh, first = tensors_of(learn.model), tensors_of(ticket.model)
    assert all((fresh[n] != first[n])[keep].all() for n, keep in mask.items())
    other = exp.recipe.make(segment.init)
    assert same(fresh, tensors_of(other.model)) and segment.init not in exp.seeds
    is_network(compared, by_hand(exp.recipe, 2, mask, 0, learn), 'reinit')


def test_shuffled_by_hand(compared):
    exp, _, results, _ = compared
    for name, of, level in (('shuffled', 't0', 2), ('shuffled 1', 't1', 1)):
        mask, was = results.mask(name, level, SEED), results.mask(of, level, SEED)
        assert mask != was and {n: mask.kept_in(n) for n in mask} == {n: was.kept_in(n) for n in was}
        assert all((mask[n] != was[n]).any() for n in mask)
    is_network(compared, by_hand(exp.recipe, 2, results.mask('shuffled', 2, SEED)), 'shuffled')
    is_network(compared, by_hand(exp.recipe, 1, results.mask('shuffled 1', 1, SEED), 1, by_hand(exp.recipe, 1)), 'shuffled 1', 1)


def test_random_mask_by_hand(compared):
    exp, _, results, _ = compared
    mask, was = results.mask('random', 2, SEED), results.mask('t0', 2, SEED)
    assert mask.n_kept == was.n_kept and any(mask.kept_in(n) != was.kept_in(n) for n in was)
    is_network(compared, by_hand(exp.recipe, 2, mask), 'random')


@pytest.mark.parametrize('level', [1, 2])
def test_supermask_by_hand(compared, level):
    exp, _, results, _ = compared
    learn, row = exp.recipe.make(SEED), row_of(results, 'supermask', level, SEED)
    assert results.mask('supermask', level, SEED) == (mask := results.mask('t0', level, SEED)) and row['epochs'] == 0
    mask.hold(dict(learn.model.named_parameters()))
    norm = learn.model[1]
    learn.model.eval()
    norm.train()
    norm.momentum = None
    set_generators(SEED, 0, learn.dls.train)
    for x, _ in learn.dls.train: learn.model(x)
    with learn.no_bar(), learn.no_logging(): assert list(learn.validate()) == [row['valid_loss'], row['accuracy']]


def test_validating_an_untrained_network_leaves_its_training_alone(tmp_path):
    arms = [dense(), T0, supermask(of=T0)]
    without = run(experiment(arms[:2], seeds=[SEED]), tmp_path/'later')
    trained = states(tmp_path/'later')
    for folder in ('later', 'at once'):
        results = run(experiment(arms, seeds=[SEED]), tmp_path/folder)
        assert [r for r in results.rows if r['kind'] != 'control'] == list(without.rows) and not differences(states(tmp_path/folder), trained)


def test_controls_have_the_ticket_s_size(compared):
    _, _, results, _ = compared
    kept = {(r['arm'], r['level']): r['n_kept'] for r in results.rows}
    assert {kept[a, 2] for a in ('t0', 'reinit', 'shuffled', 'random', 'supermask')} == {kept['t0', 2]} and kept['shuffled 1', 1] == kept['t1', 1]
    assert kept['long', 2] == kept['dense', 0] == row_of(results, 't0', 1, SEED)['n_total']
    assert {r['arm']: r['of'] for r in results.rows if r['of']} == {'finetune': 't1', 'reinit': 't0', 'shuffled': 't0', 'shuffled 1': 't1', 'random': 't0', 'long': 't0', 'supermask': 't0'}


def test_seeds_draw_other_positions(tmp_path):
    t = imp()
    exp = experiment([shuffled(of=t), random_mask(of=t), reinit(of=t)], seeds=[0, 1])
    results = run(exp, tmp_path)
    for arm in exp.arms[:2]: assert results.mask(arm.name, 2, 0) != results.mask(arm.name, 2, 1)
    first, second = (tensors_of(make_learner(exp.recipe, exp.networks[exp.arms[2], 2, s].segment).model) for s in (0, 1))
    assert not (first['0.weight'] == second['0.weight']).any()


def test_an_arm_without_mask_is_whole(compared):
    exp, _, results, _ = compared
    with pytest.raises(ValueError, match='nothing of it is pruned'): results.mask('dense', 0, SEED)
    assert all(r['sparsity'] == 0 for r in results.rows if r['kind'] == 'dense')


# ------------------------------------------------------------------ the paper's LeNet

@pytest.mark.parametrize('context', ['global', 'local'])
def test_fifteen_rounds_of_a_lenet_leave_what_the_paper_prints(context, tmp_path):
    "20 % of what is left in each round, 10 % of the output layer. Source: Frankle & Carbin 2019, figures 3 and 4"
    exp = experiment([imp()], Recipe(lenet, 1), geometric, 96.48, context=context, rates={'4.weight': 50})
    results = run(exp, tmp_path, keep_states=False)
    density = {r['level']: 100 - r['sparsity'] for r in results.rows}
    assert len(density) == 15
    for level, printed in {3: 51.3, 7: 21.1, 9: 13.5, 15: 3.6}.items(): assert abs(density[level] - printed) < .05 + 1e-9, (level, density[level])
    mask = results.mask(imp().name, 15, 0)
    assert round(100*mask.kept_in('4.weight')/1000, 1) == round(100*.9**15, 1)


# ------------------------------------------------------------------ what it costs

T0, T1, STEP = imp(), imp(rewind_epoch=1), imp(rewind_step=6)
COMPARISONS = {
    'blog': [dense(), T0, T1, imp(rewind_epoch=1, full_epochs=True)],
    'inside an epoch': [dense(), STEP, shuffled(of=STEP), imp(rewind_step=6, full_epochs=True)],
    'no dense': [T1, supermask(of=T1)],
    'controls': [dense(), T0, reinit(of=T0, levels='all'), shuffled(of=T0), random_mask(of=T0, levels=[1]), dense_long(of=T0), dense_long(of=T1), supermask(of=T0)],
    'baselines': [dense(), T1, finetune(of=T1), lr_rewind(1), finetune(epochs=1, lr=1e-3), one_shot_ticket()],
    'carried': [imp(optimizer='keep', rewind_epoch=1), imp(optimizer='restore', rewind_epoch=1)],
}


@pytest.mark.parametrize('name, anneal', [*((name, None) for name in COMPARISONS), ('controls', 'cos'), ('baselines', 'cos')])
def test_the_plan_is_what_is_trained(name, anneal, tmp_path):
    arms = [a for a in COMPARISONS[name] if anneal is None or 'full epochs' not in a.name]
    exp = experiment(arms, of_points(anneal=anneal))
    n, plan = exp.grid.n_batches, exp.plan()
    assert plan.left == plan.epochs == exp.plan(tmp_path).left
    with trained_batches() as counted: results = run(exp, tmp_path)
    assert not results.failed and len(results.rows) == plan.n_networks
    assert counted['train'] == round(plan.epochs*n)
    assert exp.plan(tmp_path).left == 0 and exp.plan(tmp_path).epochs == plan.epochs


def test_the_blog_costs_35_epochs_or_32(tmp_path):
    def cost(*arms, **kwargs): return experiment([dense(), imp(), *arms], of_points(epochs=5), iterative(3), **kwargs).plan().epochs
    assert cost(imp(rewind_epoch=1, full_epochs=True)) == 35 and cost(imp(rewind_epoch=1)) == 32
    with trained_batches() as counted: results = run(experiment([dense(), imp(), imp(rewind_epoch=1)], of_points(epochs=5), iterative(3)), tmp_path)
    assert counted['train'] == 32*4
    assert {(r['arm'], r['level']): r['cost'] for r in results.rows}['imp → epoch 1', 3] == 5 + 3*4


def test_a_finished_experiment_costs_nothing(tmp_path, monkeypatch):
    exp = experiment([dense(), T0, supermask(of=T0)], seeds=[0, 1])
    first = run(exp, tmp_path)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.glob('segments/*/*') if f.name != 'lock'}
    made, make = [], Recipe.make
    monkeypatch.setattr(Recipe, 'make', lambda self, seed: made.append(seed) or make(self, seed))
    with trained_batches() as counted: again = run(experiment([dense(), T0, supermask(of=T0)], seeds=[0, 1]), tmp_path)
    assert counted == dict(train=0, valid=0) and made in ([0], [0, 1]), 'learners are made to look at the data, and for nothing else'
    assert again.rows == first.rows and again.history == first.history and again.failed == ()
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.glob('segments/*/*') if f.name != 'lock'}


ADDED = {'another ticket': ([T1], 1 + 2), 'inside an epoch': ([STEP], 6/4 + 2*2/4), 'controls': ([reinit(of=T0), shuffled(of=T0, levels='all')], 6), 'long': ([dense_long(of=T0)], 4),
         'supermask': ([supermask(of=T0)], 0), 'the same under another name': ([imp(name='again'), imp(optimizer='restore')], 0), 'carried': ([imp(optimizer='keep')], 4), 'fine-tuning': ([finetune(of=T0)], 4)}


@pytest.mark.parametrize('keep_states', [True, False], ids=['states kept', 'states not kept'])
@pytest.mark.parametrize('name', ADDED)
def test_an_arm_more_trains_only_what_is_new(name, keep_states, tmp_path):
    more, epochs = ADDED[name]
    exp = experiment([dense(), T0])
    run(exp, tmp_path/'run', keep_states=keep_states)
    assert keep_states or not list((tmp_path/'run').rglob('*.pt'))
    exp = experiment([dense(), T0, *more])
    plan = exp.plan(tmp_path/'run')
    with trained_batches() as counted: results = run(exp, tmp_path/'run')
    assert not results.failed
    assert counted['train'] == round(plan.left*exp.grid.n_batches)
    if keep_states: assert plan.left == epochs
    run(exp, tmp_path/'at once')
    found, expected = left(tmp_path/'run'), left(tmp_path/'at once')
    if not keep_states: found['states'], expected['states'] = {}, {}
    assert differences(found, expected) == []


def test_a_seed_more_trains_only_its_own(tmp_path):
    run(experiment([dense(), T1], seeds=[0, 1]), tmp_path/'run')
    exp = experiment([dense(), T1], seeds=[1, 2, 0])
    with trained_batches() as counted: results = run(exp, tmp_path/'run')
    assert counted['train'] == (2 + 2)*4 and {r['seed'] for r in results.rows} == {0, 1, 2}
    run(exp, tmp_path/'at once')
    assert differences(left(tmp_path/'run'), left(tmp_path/'at once')) == []


def test_a_longer_training_goes_on_where_the_shorter_one_ended(tmp_path):
    run(experiment([dense()]), tmp_path)
    with trained_batches() as counted: run(experiment([dense()], of_points(epochs=5)), tmp_path)
    assert counted['train'] == 3*4
    learn = by_hand_of_seed(of_points(), 5, 0)
    exp = experiment([dense()], of_points(epochs=5))
    assert same(tensors_of(learn.model), state_of(exp, tmp_path, exp.arms[0], 0, 0).tensors)


def by_hand_of_seed(recipe, epochs, seed):
    learn = recipe.make(seed)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, recipe.lr, cbs=Seeded(seed))
    return learn


def from_file(file):
    train = TensorDataset(*torch.load(file))
    return Learner(small_dls(train=train), small_model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


def test_other_data_is_trained_on_anew(tmp_path):
    "Though the function that reads it is the same."
    def exp(): return experiment([dense()], Recipe(from_file, 2, options=dict(file=str(tmp_path/'data.pt'))))
    accuracies = []
    for i in (1, 2):
        data = small_dls().train.dataset
        torch.save((data.x*i, data.y), tmp_path/'data.pt')
        with trained_batches() as counted: accuracies.append(run(exp(), tmp_path/'run').rows[0]['valid_loss'])
        assert counted['train'] == 2*4
    assert accuracies[0] != accuracies[1]
    torch.save((small_dls().train.dataset.x, small_dls().train.dataset.y), tmp_path/'data.pt')
    with trained_batches() as counted: assert run(exp(), tmp_path/'run').rows[0]['valid_loss'] == accuracies[0]
    assert counted['train'] == 0


def test_without_states_only_numbers_and_masks_are_left(tmp_path):
    exp = experiment(COMPARISONS['controls'])
    kept, results = run(exp, tmp_path/'kept'), run(exp, tmp_path/'run', keep_states=False)
    assert not list((tmp_path/'run').rglob('*.pt')) and len(list((tmp_path/'kept').rglob('state-*.pt'))) > 5
    found, expected = left(tmp_path/'run'), left(tmp_path/'kept')
    del found['states'], expected['states']
    assert differences(found, expected) == [] and len(results.rows) == len(kept.rows)
    with trained_batches() as counted: run(exp, tmp_path/'run')
    assert counted == dict(train=0, valid=0)


def test_many_levels_are_looked_through_quickly(tmp_path, monkeypatch):
    "Each level builds on the one before twice, by its weights and by its mask."
    looks, has = [0], Store.has
    def counted(self, state):
        looks[0] += 1
        return has(self, state)
    monkeypatch.setattr(Store, 'has', counted)
    run(experiment([lr_rewind()], of_points(epochs=1, options=dict(n_batches=1)), geometric(20), 83, allow_empty=True), tmp_path) # 8 levels
    assert looks[0] < 2000


def test_the_plan_in_words(tmp_path):
    exp = experiment([dense(), T0, T1], seeds=[0, 1, 2])
    shown, table = repr(exp.plan()), exp.plan()._repr_markdown_()
    assert 'imp → epoch 1, level 2' in shown and '3 seeds' in shown and '15 networks from 15 segments, 24 epochs in all, 24 still to train' in shown
    assert table.count('\n|') >= 5 and 'still to train' in table
    run(exp, tmp_path)
    assert '0 still to train' in repr(exp.plan(tmp_path))


# ------------------------------------------------------------------ what it leaves

def test_results_are_written_as_they_are_returned(tmp_path):
    exp = experiment([dense(), T1, shuffled(of=T1)], seeds=[0, 1])
    results, loaded = run(exp, tmp_path), Results.load(tmp_path)
    assert [*results.rows] == [*loaded.rows] and [*results.history] == [*loaded.history] and loaded.failed == results.failed == ()
    about = json.loads((tmp_path/'experiment.json').read_text())
    assert about['seeds'] == [0, 1] and about['levels'] == [25, 50] and about['versions']['torch'] == torch.__version__ and 'points' in about['recipe'] and about['cores'] == os.cpu_count()
    assert len((tmp_path/'results.csv').read_text().splitlines()) == 1 + len(results.rows)


def test_results_tell_of_their_own_experiment_whatever_else_runs_in_the_folder(tmp_path, monkeypatch):
    mine, other = experiment([dense()]), experiment([T0], seeds=[7])
    def meanwhile(*wave):
        yield from train_wave(*wave)
        with monkeypatch.context() as m:
            m.setattr('lth_nb.experiment._train_wave', train_wave)
            run(other, tmp_path)
    train_wave = sys.modules['lth_nb.experiment']._train_wave
    monkeypatch.setattr('lth_nb.experiment._train_wave', meanwhile)
    results = run(mine, tmp_path)
    assert results.info['arms'] == ['dense'] and results.info['seeds'] == [0] and results.info == Results.load(tmp_path).info


def test_history_has_each_epoch_from_where_it_starts(tmp_path):
    results = run(experiment([dense(), T1, STEP, supermask(of=T0), T0]), tmp_path)
    def epochs(arm, level=2): return [h['epoch'] for h in results.history if (h['arm'], h['level']) == (arm.name, level)]
    assert epochs(dense(), 0) == [1, 2] and epochs(T1) == [2] and epochs(STEP) == [2] and epochs(T0) == [1, 2]
    last = {(h['arm'], h['level']): h for h in results.history}
    for r in results.rows:
        if r['kind'] != 'control': assert last[r['arm'], r['level']]['accuracy'] == r['accuracy']


def plain(): return Learner(small_dls(), small_model(), loss_func=CrossEntropyLossFlat())
def more_metrics(): return Learner(small_dls(), small_model(), loss_func=CrossEntropyLossFlat(), metrics=[accuracy, error_rate, mean_output])
def mean_output(pred, y): return pred.mean()


@pytest.mark.parametrize('learner, names', [(plain, set()), (more_metrics, {'accuracy', 'error_rate', 'mean_output'})])
def test_all_metrics_of_the_learner_are_columns(learner, names, tmp_path):
    results = run(experiment([dense(), T0, supermask(of=T0)], Recipe(learner, 2)), tmp_path)
    assert not results.failed
    known = {'arm', 'kind', 'of', 'rewind', 'level', 'sparsity', 'n_kept', 'n_total', 'seed', 'epochs', 'cost', 'segment', 'mask'}
    assert {k for r in results.rows for k in r} - known == {'train_loss', 'valid_loss'} | names
    if names: assert all(math.isclose(r['accuracy'] + r['error_rate'], 1, rel_tol=1e-6) for r in results.rows)


def test_diverged_training_is_a_result(tmp_path):
    results = run(experiment([dense(), T0], Recipe(with_sgd, 2, lr=1e30), allow_empty=True), tmp_path)
    loaded = Results.load(tmp_path)
    assert len(results.rows) + len(results.failed) == 3 and len(loaded.rows) == len(results.rows) and not math.isfinite(results.rows[0]['valid_loss'])


def test_the_caller_notices_nothing(tmp_path):
    "Neither generators nor the number of threads."
    torch.manual_seed(5); np.random.seed(5); random.seed(5)
    torch.set_num_threads(2)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    try:
        exp = experiment([dense(), T0])
        exp.plan()
        run(exp, tmp_path)
        assert same(before[0], torch.get_rng_state()) and before[1:] == (np.random.get_state()[1].tolist(), random.getstate()) and torch.get_num_threads() == 2
    finally: torch.set_num_threads(1)


def test_what_was_drawn_before_changes_nothing(tmp_path):
    exp = experiment([dense(), T1])
    for i in (1, 2):
        torch.manual_seed(i); np.random.seed(i); random.seed(i)
        run(exp, tmp_path/f'{i}')
    assert differences(left(tmp_path/'1'), left(tmp_path/'2')) == []


def test_a_ticket_that_is_not_there(tmp_path):
    exp = experiment([dense(), T1])
    with pytest.raises(ValueError, match='run the experiment'): exp.ticket(tmp_path, T1)
    run(exp, tmp_path, keep_states=False)
    with pytest.raises(ValueError, match='not pruned'): exp.ticket(tmp_path, 'dense')
    with pytest.raises(ValueError, match="arm='imp' is not in this experiment"): exp.ticket(tmp_path, 'imp')
    with pytest.raises(ValueError, match='level=9'): exp.ticket(tmp_path, T1, level=9)
    with pytest.raises(ValueError, match='seed'): exp.ticket(tmp_path, T1, seed=9)
    with pytest.raises(ValueError, match='state'): exp.ticket(tmp_path, T1)


@pytest.mark.parametrize('how', [dict(), dict(granularity='filter', ignore='fc.weight')], ids=['weights', 'filters'])
def test_a_ticket_of_a_run_trains_to_the_same_network(how, tmp_path):
    exp = experiment([T1], Recipe(pictures, 2, lr=1e-2), **how)
    results = run(exp, tmp_path)
    ticket = exp.ticket(tmp_path, T1.name)
    ticket.save(tmp_path/'t.safetensors')
    from lth_nb.ticket import Ticket
    learn = exp.recipe.make(0)
    sp = Ticket.load(tmp_path/'t.safetensors').apply(learn.model)
    assert sp.mask == results.mask(T1.name, 2, 0)
    seeded = Seeded(0)
    seeded.epochs_done = 1
    with learn.no_bar(), learn.no_logging(): learn.fit(1, exp.recipe.lr, cbs=[seeded, MaskCallback(sp)])
    assert same(tensors_of(learn.model), state_of(exp, tmp_path, T1, 2, 0).tensors)


def test_an_arm_of_ones_own(tmp_path):
    "From inside an epoch of another arm's training, under a mask of a mask."
    def make(grid, seed, level):
        ticket = T0.make(grid, seed, level)
        from lth_nb.arms import Shuffled
        from dataclasses import replace
        return State(replace(ticket.segment, start=State(ticket.segment, 6), mask=Shuffled(Shuffled(ticket.segment.mask, 1), 2), begin=6), grid.end)
    results = run(experiment([dense(), T0, Arm('own', make, 'control', of=T0, levels='last')]), tmp_path)
    assert not results.failed and row_of(results, 'own', 2, 0)['n_kept'] == row_of(results, T0, 2, 0)['n_kept']


# ------------------------------------------------------------------ what goes wrong

def fragile(fails=()):
    "Cannot be made for some seeds, unless it was repaired."
    if torch.initial_seed() in fails and not os.environ.get('LTH_NB_TEST_REPAIRED'): raise RuntimeError('the third seed is cursed')
    return points()


def test_a_seed_that_fails_takes_nothing_else_down(tmp_path, monkeypatch):
    monkeypatch.delenv('LTH_NB_TEST_REPAIRED', raising=False)
    recipe = Recipe(fragile, 2, lr=1e-2, options=dict(fails=(seed_inside(2),)))
    exp = experiment([dense(), T0, reinit(of=T0)], recipe, seeds=[0, 1, 2])
    results = run(exp, tmp_path/'run')
    assert {r['seed'] for r in results.rows} == {0, 1} and len(results.rows) == 8
    assert {(f['arm'], f['level'], f['seed']) for f in results.failed} == {('dense', 0, 2), (T0.name, 1, 2), (T0.name, 2, 2), (f'reinit of {T0.name}', 2, 2)}
    assert all('the third seed is cursed' in f['reason'] for f in results.failed) and 'RuntimeError' in results.failed[0]['reason']
    assert [f['reason'].startswith('what it builds on failed') for f in results.failed] == [False, True, True, True]
    assert Results.load(tmp_path/'run').failed == results.failed
    monkeypatch.setenv('LTH_NB_TEST_REPAIRED', '1')
    with trained_batches() as counted: assert not run(exp, tmp_path/'run').failed
    assert counted['train'] == (2 + 2*2 + 2)*4
    run(exp, tmp_path/'at once')
    assert differences(left(tmp_path/'run'), left(tmp_path/'at once')) == []


def test_a_layer_cut_to_nothing_ends_its_arm(tmp_path):
    arms = [dense(), T0, one_shot_ticket(), reinit(of=T0, levels=[1])]
    exp = experiment(arms, digits(), geometric(n_steps=2), 99.9)
    results = run(exp, tmp_path)
    reasons = {(f['arm'], f['level']): f['reason'] for f in results.failed}
    assert reasons.keys() == {(T0.name, 2), ('one shot → initialisation', 2)} and all('to nothing' in r for r in reasons.values())
    assert {(r['arm'], r['level']) for r in results.rows} == {('dense', 0), (T0.name, 1), ('one shot → initialisation', 1), (f'reinit of {T0.name}', 1)}
    assert not run(experiment(arms, digits(), geometric(n_steps=2), 99.9, allow_empty=True), tmp_path).failed


def test_what_builds_on_a_failure_says_so(tmp_path):
    results = run(experiment([T0], digits(), geometric(n_steps=4), 99.99), tmp_path)
    levels = {f['level']: f['reason'] for f in results.failed}
    first, *rest = sorted(levels)
    assert first < 4 and levels[first].startswith('ValueError') and all(levels[l] == f'what it builds on failed: {levels[first]}' for l in rest)


class Stop(KeyboardInterrupt): pass


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    exp, n = experiment([dense(), T0]), [0]
    plain = Learner._do_one_batch
    def interrupted(self):
        n[0] += self.training
        if n[0] == 14: raise Stop()
        return plain(self)
    monkeypatch.setattr(Learner, '_do_one_batch', interrupted)
    with pytest.raises(Stop): run(exp, tmp_path/'run')
    monkeypatch.undo()
    with trained_batches() as counted: assert not run(exp, tmp_path/'run').failed
    assert counted['train'] == 3*2*4 - 12 # the rest, from the end of the last whole epoch on
    run(exp, tmp_path/'at once')
    assert differences(left(tmp_path/'run'), left(tmp_path/'at once')) == []


def test_accumulated_gradients_over_the_end_of_an_epoch_are_refused(tmp_path):
    "They could not go on from there; nothing is trained before it is said."
    exp = experiment([dense()], Recipe(accumulating, 3, options=dict(n_acc=24)))
    with trained_batches() as counted, pytest.raises(ValueError, match='across the end of an epoch'): run(exp, tmp_path)
    assert counted['train'] == 0


def test_a_rewind_into_a_group_of_accumulated_gradients_is_refused(tmp_path):
    exp = experiment([dense(), imp(rewind_epoch=.25)], Recipe(accumulating, 3, options=dict(n_acc=16)))
    with trained_batches() as counted, pytest.raises(ValueError, match='imp → epoch 0.25 rewinds into a group'): run(exp, tmp_path)
    assert counted['train'] == 0


def test_threads_do_not_share_generators(tmp_path):
    "A cluster may give several segments to one process, and what they draw must not mix."
    exp = experiment([dense(), T0], of_points(options=dict(n_batches=8)), seeds=range(3))
    run(exp, tmp_path/'one')
    with joblib.parallel_config('threading'): results = run(exp, tmp_path/'two', n_jobs=2)
    assert not results.failed and differences(left(tmp_path/'two'), left(tmp_path/'one')) == []


# ------------------------------------------------------------------ wrong arguments

def of(arms=(dense(), T0), recipe=None, **kwargs): return Experiment(recipe or of_points(), **{'arms': arms, 'seeds': [0], **kwargs})


def split_anew(): return Learner(small_dls(train=Items(32, seed=random.randint(0, 9**9))), small_model(), loss_func=CrossEntropyLossFlat())


WRONG = {
    'recipe': (lambda: of(recipe=points), 'recipe is a function: give Recipe'),
    'a learner': (lambda: of(recipe=points()), 'recipe is a Learner'),
    'no arms': (lambda: of([]), 'arms='),
    'no arm': (lambda: of([dense(), 'imp']), "arms=.*'imp'.*give arms like"),
    'a function of arms': (lambda: of([dense]), 'give arms like'),
    'one arm': (lambda: of(dense()), 'arms='),
    'None for arms': (lambda: of(None), 'arms='),
    'twice': (lambda: of([T0, imp()]), "arms has 'imp → initialisation' twice"),
    'agp': (lambda: of(schedule=agp), 'schedule=.* does not prune in rounds'),
    'schedule by name': (lambda: of(schedule='iterative'), "schedule='iterative'"),
    'above 100': (lambda: of(sparsity=101), 'sparsity=101'),
    'below 0': (lambda: of(sparsity=-1), 'sparsity=-1'),
    'nan': (lambda: of(sparsity=math.nan), 'sparsity=nan'),
    'text': (lambda: of(sparsity='50'), "sparsity='50'"),
    'sparsity a layer': (lambda: of(sparsity={'0.weight': 50}), 'sparsity='),
    'everything': (lambda: of(sparsity=100), '100'),
    'geometric to 100': (lambda: of(schedule=geometric, sparsity=100), 'sparsity=100'),
    'no seeds': (lambda: of(seeds=[]), 'seeds='),
    'how many seeds': (lambda: of(seeds=5), 'seeds=5'),
    'seed below 0': (lambda: of(seeds=[-1]), r'seeds=\(-1,\): give whole numbers'),
    'seed too large': (lambda: of(seeds=[10**6]), 'seeds='),
    'seed no whole number': (lambda: of(seeds=[1.]), 'seeds='),
    'seed True': (lambda: of(seeds=[True]), 'seeds='),
    'seeds twice': (lambda: of(seeds=[1, 2, 1]), 'seeds has 1 twice'),
    'pruning': (lambda: of(pruning='weight'), "pruning='weight'"),
    'granularity': (lambda: of(pruning=Pruning('neuron')), "granularity='neuron'"),
    'criteria': (lambda: of(pruning=Pruning(criteria='biggest')), "criteria='biggest'"),
    'context': (lambda: of(pruning=Pruning(context='globl')), "context='globl'"),
    'layer, local': (lambda: of(pruning=Pruning('layer', 'local')), "granularity='layer' needs context='global'"),
    'layers': (lambda: of(pruning=Pruning(layers='conv1')), "layers='conv1' means no weight"),
    'ignore': (lambda: of(pruning=Pruning(ignore=['0', '7'])), "ignore='7' means no weight"),
    'nothing left': (lambda: of(pruning=Pruning(ignore=['*'])), 'leave no weight'),
    'rates of no layer': (lambda: of(pruning=Pruning(rates={'9.weight': 50})), "rates='9.weight' means no weight"),
    'rates below 0': (lambda: of(pruning=Pruning(rates={'0.weight': -50})), "rates=.*-50"),
    'rates of all': (lambda: of(pruning=Pruning(rates={'*': 50})), 'rates names every layer'),
    'rates a number': (lambda: of(pruning=Pruning(rates=50)), 'rates=50'),
    'rates a text': (lambda: of(pruning=Pruning(rates={'0.weight': 'half'})), "rates=.*'half'"),
    'rewind to T': (lambda: of([imp(rewind_epoch=2)]), 'rewinding to epoch 2 leaves nothing of 2 epochs'),
    'rewind beyond T': (lambda: of([imp(rewind_step=99)]), 'rewinding to step 99 leaves nothing'),
    'rewind in a control': (lambda: of([shuffled(of=imp(rewind_epoch=3))]), 'rewinding to epoch 3 leaves nothing'),
    'full epochs, annealed': (lambda: of([imp(rewind_epoch=1, full_epochs=True)], of_points(anneal='cos')), 'full_epochs=True'),
    'full epochs, annealed, in a control': (lambda: of([reinit(of=imp(full_epochs=True))], of_points(anneal='one_cycle')), 'full_epochs=True'),
    'level too high': (lambda: of([reinit(of=T0, levels=[4])]), r'levels=\[4\] of reinit of imp → initialisation: there are levels 1 to 3'),
    'level 0': (lambda: of([shuffled(of=T0, levels=[0])]), r'levels=\[0\]'),
    'level no list': (lambda: of([reinit(of=T0, levels=2)]), 'levels=2'),
    'level by name': (lambda: of([reinit(of=T0, levels='first')]), "levels='first'"),
    'level None': (lambda: of([reinit(of=T0, levels=None)]), 'levels=None'),
    'level True': (lambda: of([reinit(of=T0, levels=[True])]), r'levels=\[True\]'),
    'no levels': (lambda: of([reinit(of=T0, levels=[])]), r'levels=\[\]'),
    'lr_rewind inside an epoch': (lambda: of([lr_rewind(.5)]), 'inside an epoch'),
    'data split by the seed': (lambda: of(recipe=Recipe(split_anew, 2), seeds=[0, 1]), 'data differs from seed to seed'),
    'accumulated steps': (lambda: of([imp(rewind_step=6)], Recipe(accumulating, 4, options=dict(n_acc=16))), 'rewind_step'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_arguments_are_refused_before_any_training(case, tmp_path):
    make, said = WRONG[case]
    with trained_batches() as counted, pytest.raises(ValueError, match=said): run(make(), tmp_path)
    assert counted == dict(train=0, valid=0)
    with pytest.raises(ValueError, match=said): make().plan()


def test_filters_cannot_be_shuffled_and_that_is_said_before_training(tmp_path):
    exp = experiment([T0, shuffled(of=T0)], Recipe(pictures, 2), granularity='filter', ignore='fc.weight')
    with trained_batches() as counted, pytest.raises(ValueError, match="granularity='filter'"): run(exp, tmp_path)
    assert counted['train'] == 0


# ------------------------------------------------------------------ a notebook, and TensorBoard

NOTEBOOK = '''
import sys
import torch
from torch import nn
from fastai.vision.all import Learner, accuracy
from lth_nb.all import *
from lth_nb.arms import dense, imp, shuffled
from lth_nb.criteria import criterion
from lth_nb.data import digits_dls
from lth_nb.experiment import Experiment
from lth_nb.arms import Pruning
from lth_nb.recipe import Recipe

WIDTH = 12
class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(64, width), nn.Dropout(.1), nn.Linear(width, 10)
    def forward(self, x): return self.fc2(self.drop(self.fc1(x.flatten(1)).relu()))

def learner(): return Learner(digits_dls(), Net(WIDTH), metrics=accuracy)

@criterion
def my_own(now, initial): return now.abs() + (now - initial).abs()

if __name__ == '__main__':
    ticket = imp(rewind_epoch=.5)
    exp = Experiment(Recipe(learner, epochs=2, lr=2e-3), [dense(), ticket, shuffled(of=ticket)], one_shot, 50, seeds=[0, 1], pruning=Pruning(criteria=my_own))
    for n_jobs in (1, 2):
        results = exp.run(f'{sys.argv[1]}/{n_jobs}', n_jobs=n_jobs, progress=False)
        assert len(results.rows) == 6 and not results.failed, results.failed
'''


def test_a_notebook_s_functions_in_two_processes(tmp_path):
    "Learner, network and criterion are written in the script itself; two jobs give the bits of one."
    (tmp_path/'script.py').write_text(NOTEBOOK)
    done = subprocess.run([sys.executable, 'script.py', '.'], cwd=tmp_path, capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert differences(left(tmp_path/'1'), left(tmp_path/'2')) == []


@pytest.mark.slow
def test_two_jobs_change_no_bit(tmp_path):
    exp = experiment([*COMPARISONS['controls'], *COMPARISONS['inside an epoch'][1:]], seeds=[0, 1, 2])
    run(exp, tmp_path/'one')
    with trained_batches() as counted: results = run(exp, tmp_path/'two', n_jobs=2)
    assert not results.failed and counted['train'] == 0
    assert differences(left(tmp_path/'two'), left(tmp_path/'one')) == []


def with_tensorboard(folder):
    from fastai.callback.tensorboard import TensorBoardCallback
    return Learner(small_dls(), small_model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=TensorBoardCallback(folder, trace_model=False, log_preds=False))


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    results = run(experiment([dense(), T0, supermask(of=T0)], Recipe(with_tensorboard, 2, lr=1e-2, options=dict(folder=str(tmp_path/'board')))), tmp_path/'run')
    assert not results.failed and len(results.rows) == 4
    files = list((tmp_path/'board').rglob('events.out.*'))
    tags = {v.tag for f in files for e in EventFileLoader(str(f)).Load() for v in e.summary.value}
    assert {'train_loss', 'valid_loss', 'accuracy'} <= tags
    plain = run(experiment([dense(), T0, supermask(of=T0)], Recipe(without_tensorboard, 2, lr=1e-2)), tmp_path/'plain')
    assert [r['accuracy'] for r in plain.rows] == [r['accuracy'] for r in results.rows]


def without_tensorboard(): return Learner(small_dls(), small_model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
