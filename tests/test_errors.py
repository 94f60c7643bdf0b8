"What cannot be is a ValueError before any training; what is interrupted, or only looked at, leaves nothing behind."
import contextlib
import re
import threading
import warnings
import weakref
from copy import deepcopy
from functools import partial

import fastai.callback.hook # Learner.summary
import fastai.optimizer
import numpy as np
import pytest
import torch
from fastai.callback.core import (Callback, CancelBatchException, CancelBackwardException, CancelEpochException, CancelFitException, CancelStepException,
                                  CancelTrainException, FetchPredsCallback)
from fastai.callback.schedule import fine_tune, fit_one_cycle, lr_find
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import Learner
from fastcore.foundation import L
from fastcore.imports import noop
from torch import nn

from helpers_fastai import (BATCH_SIZE, N_BATCHES, ConvNet, Everything, Items, Losses, RaiseAt, SkipSteps, Spy, Steps, TakeTurns, different, generators_kept,
                            n_zeros, new_turn, opt_stats, same, small_dls, small_learner, tensors_of)
from lth_nb.callback import SparsifyCallback
from lth_nb.cpu import FastCPU
from lth_nb.fitting import MaskCallback, Seeded, step_ends
from lth_nb.rewind import Position
from lth_nb.schedule import agp, cos, dsd, geometric, iterative, lin, one_cycle, one_shot
from lth_nb.sparsifier import Sparsifier


# 6. Refused before training

def refused(*says, n_epoch=8, learn=None, extra=(), **kwargs):
    "The callback, or the fit with it, raises `ValueError` with these words, and nothing was trained. Returns the message."
    learn, steps = learn or small_learner(), Losses()
    was = tensors_of(learn.model)
    with pytest.raises(ValueError) as error: learn.fit(n_epoch, 1e-2, cbs=[steps, SparsifyCallback(**{'end_sparsity': 50, **kwargs}), *extra])
    assert not steps.losses, f'{len(steps.losses)} batches were trained before this was refused: {error.value}'
    assert same(tensors_of(learn.model), was)
    for words in says: assert words in str(error.value), str(error.value)
    learn.fit(1, 1e-2, cbs=(after := Losses())) # the learner is as good as before
    assert len(after.losses) == N_BATCHES and not any((p == 0).any() for n, p in learn.model.named_parameters() if p.ndim > 1)
    return str(error.value)


@pytest.mark.parametrize('value', [101, -1, float('nan'), float('inf'), '50%', 'half', None, [50], -0.001, 100.0001])
def test_sparsity(value):
    refused('end_sparsity=', repr(value), '0 to 100', end_sparsity=value)
    refused('4.weight', repr(value), '0 to 100', end_sparsity={'0.weight': 50, '4.weight': value})


@pytest.mark.parametrize('schedule', [agp, one_cycle, cos, lin, dsd, agp(3)], ids=['agp', 'one_cycle', 'cos', 'lin', 'dsd', 'agp(3)'])
def test_rewinding_with_schedules_that_prune_all_the_time(schedule): refused('lth=True', 'iterative', schedule=schedule, lth=True)


@pytest.mark.parametrize('kwargs, says', [
    (dict(rewind_epoch=3), ['rewind_epoch=3', 'start_epoch=2']),
    (dict(rewind_epoch=2.2), ['rewind_epoch=2.2', 'start_epoch=2']),
    (dict(rewind_step=2*N_BATCHES + 1), ['rewind_step=9', 'start_epoch=2']),
    (dict(rewind_epoch=1, rewind_step=3), ['rewind_epoch=1', 'rewind_step=3']),
    (dict(rewind_epoch=-1), ['rewind_epoch=-1']), (dict(rewind_epoch=float('nan')), ['rewind_epoch=nan']), (dict(rewind_epoch='1'), ["rewind_epoch='1'"]),
    (dict(rewind_step=-1), ['rewind_step=-1']), (dict(rewind_step=1.5), ['rewind_step=1.5']), (dict(rewind_step=float('nan')), ['rewind_step=nan']),
    (dict(rewind_step=True), ['rewind_step=True']),
    (dict(start_epoch=-1), ['start_epoch=-1']), (dict(start_epoch=float('nan')), ['start_epoch=nan']), (dict(start_epoch=float('inf')), ['start_epoch=inf']),
    (dict(start_epoch=None), ['start_epoch=None']), (dict(start_epoch='2'), ["start_epoch='2'"]),
    (dict(start_epoch=8), ['start_epoch=8', '8 epochs']), (dict(start_epoch=9.5), ['start_epoch=9.5', '8 epochs']), (dict(start_epoch=7.99), ['start']),
    (dict(granularity='neuron'), ["granularity='neuron'", 'filter']), (dict(granularity=None), ['granularity=None']), (dict(granularity=['weight']), ['granularity=']),
    (dict(criteria='largest'), ["criteria='largest'", 'large_final']), (dict(criteria=None), ['criteria=None']), (dict(criteria=torch.abs), ['criteria=']),
    (dict(context='globl'), ["context='globl'", 'local']), (dict(method='both'), ["context='both'", 'local']), (dict(context=None), ['context=None']),
    (dict(optimizer='new'), ["optimizer='new'", 'fresh, restore, keep']), (dict(optimizer=None), ['optimizer=None']),
    (dict(schedule='iterative'), ["schedule='iterative'"]), (dict(schedule=None), ['schedule=None']), (dict(schedule=lambda p: p), ['schedule=']),
    (dict(granularity='layer', context='local'), ["granularity='layer'"]),
    (dict(layers='head'), ["layers='head'", '0.weight']), (dict(layers=nn.Conv2d), ['layers=']), (dict(layers=[]), ['layers=']), (dict(layers=[3]), ['layers=3']),
    (dict(ignore='head'), ["ignore='head'", '0.weight']), (dict(ignore=nn.Linear), ['ignore=']), (dict(ignore=['0', '4']), ['ignore=']),
    (dict(rates={'head': 50}), ["rates='head'", '0.weight']), (dict(rates={'0.weight': 50, '4.weight': 50}), ['rates']), (dict(rates={'*': 50}), ['rates']),
    (dict(rates={'4.weight': -1}), ['rates', '-1']), (dict(rates={'4.weight': float('nan')}), ['rates', 'nan']), (dict(rates={'4.weight': 'half'}), ['rates', 'half']),
    (dict(end_sparsity={'head': 50}), ["end_sparsity='head'", '0.weight']), (dict(end_sparsity={}), ['end_sparsity']),
    (dict(end_sparsity={'0.weight': 50}, rates={'4.weight': 50}), ['rates', 'end_sparsity']),
    (dict(end_sparsity={'0.weight': 50}, ignore='0'), ["end_sparsity='0.weight'"]),
    (dict(end_sparsity=100, schedule=geometric), ['100', 'geometric']),
    (dict(schedule=iterative(200), lth=False), ['200 prunings']),
], ids=lambda v: ','.join(f'{k}={x}' if isinstance(x, (str, int, float)) else k for k, x in v.items()) if isinstance(v, dict) else '')
def test_arguments(kwargs, says): refused(*says, **{'start_epoch': 2, 'lth': True, **kwargs})


@pytest.mark.parametrize('kwargs', [dict(end_sparsity=100), dict(end_sparsity=100, context='local'), dict(end_sparsity={'4.weight': 100}),
                                    dict(end_sparsity=99.5, context='local')], ids=['global', 'local', 'one layer', 'rounded up to all of a layer'])
def test_what_is_bound_to_empty_a_layer(kwargs):
    "Where the count of a layer is known beforehand, no epochs are spent before it is refused."
    refused('to nothing', 'weight', start_epoch=2, lth=True, schedule=one_shot, **kwargs)


def test_two_names_for_one_argument():
    with pytest.raises(ValueError, match="context='local' and method='global'"): SparsifyCallback(50, context='local', method='global')
    assert SparsifyCallback(50, method='local').context == SparsifyCallback(50, context='local', method='local').context == 'local'


def test_holding_what_is_no_sparsifier():
    learn = small_learner()
    for wrong in (Sparsifier(learn.model).mask, learn.model, None):
        with pytest.raises(ValueError, match='sparsifier is a'): MaskCallback(wrong)


def test_rewinding_without_lth():
    refused('lth=True', 'reset_end', rewind_epoch=1, start_epoch=2)
    refused('lth=True', 'reset_end', rewind_step=3, start_epoch=2)


@pytest.mark.parametrize('n_epoch, start, schedule', [(10, 3, iterative), (9, 2, iterative), (4, 3, iterative), (5, 3, iterative), (8, 1, iterative(5)),
                                                      (9, 2, geometric), (7, .5, iterative), (8, 2.5, iterative(2)), (9, 1.75, one_shot)],
                         ids=lambda v: '' if not isinstance(v, (int, float)) else str(v))
def test_epochs_that_do_not_divide(n_epoch, start, schedule):
    "The message names numbers of epochs, and a fit of each of them works."
    message = refused(n_epoch=n_epoch, start_epoch=start, schedule=schedule, lth=True)
    assert f'start_epoch={start}' in message
    if start == int(start):
        named = re.search(r'a fit of (.*) epochs', message).group(1).split(' or ')
        assert named and all(n.isdigit() for n in named), f'not a number of epochs: {message}'
        for n in map(int, named):
            plan = SparsifyCallback(50, start_epoch=start, schedule=schedule, lth=True).plan(small_learner(), n)
            assert all(step % N_BATCHES == 0 for step, _ in plan)
    else: assert 'a fit of' not in message, f'no number of epochs helps, another start does: {message}'


def test_granularities_on_bare_parameters():
    refused("granularity='kernel'", 'pos', learn=small_learner(Everything), layers='pos', granularity='kernel', start_epoch=2, lth=True)
    sp_cb = SparsifyCallback(50, layers='pos', start_epoch=2, lth=True)
    small_learner(Everything).fit(8, 1e-2, cbs=sp_cb)
    assert list(sp_cb.mask) == ['pos'] and sp_cb.mask.n_kept == 24


def test_filters_need_no_batch_from_the_user_and_disturb_no_generator():
    "Looking for what follows a filter draws a batch of data; the training's own numbers stay the same."
    inputs = []
    for granularity in ('filter', 'kernel'):
        for kind in ('fastai', 'torch'):
            learn, watch = small_learner(ConvNet, dls=partial(small_dls, shape=(1, 6, 6), noise=True, kind=kind)), Losses()
            buffers = dict(tensors_of(learn.model))
            class Look(Callback):
                order = 100
                def before_fit(self): assert same(tensors_of(self.learn.model), buffers) and self.learn.model.training == True
            learn.fit(2, 1e-2, cbs=[SparsifyCallback(30, granularity, start_epoch=1, schedule=one_shot), watch, Look()])
            inputs.append(watch.inputs)
    assert same(inputs[0], inputs[2]) and same(inputs[1], inputs[3])


@pytest.mark.parametrize('value', [.5, .999, 1e-3, {'0.weight': .5}])
def test_a_share_warns(value):
    with pytest.warns(UserWarning, match=r'0\.\d+ %|0.001 %'): sp_cb = SparsifyCallback(value)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for whole in (0, 1, 1.5, 50, 100): SparsifyCallback(whole)
    assert sp_cb.end_sparsity == value


def test_half_a_percent_is_half_a_percent():
    with pytest.warns(UserWarning): sp_cb = SparsifyCallback(.5, schedule=one_shot, start_epoch=1, lth=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        small_learner().fit(2, 1e-2, cbs=sp_cb)
    assert n_zeros(sp_cb) == 1 # of 176


def test_a_frozen_learner():
    "fine_tune begins frozen: a plan for the whole network is refused, one for the head is not."
    learn = small_learner(splitter=lambda m: [list(m[:1].parameters()), list(m[1:].parameters())])
    learn.freeze()
    was, watch = tensors_of(learn.model), Losses()
    with pytest.raises(ValueError, match='unfreeze'): learn.fit(8, 1e-2, cbs=[watch, SparsifyCallback(50, start_epoch=2, lth=True)])
    assert not watch.losses and same(tensors_of(learn.model), was)
    head = SparsifyCallback(50, start_epoch=2, lth=True, layers='4')
    learn.fit(8, 1e-2, cbs=head)
    assert n_zeros(head) == 24 and same(tensors_of(learn.model)['0.weight'], was['0.weight'])


def test_fine_tune():
    learn = small_learner(splitter=lambda m: [list(m[:1].parameters()), list(m[1:].parameters())])
    was, watch = tensors_of(learn.model), Losses()
    with pytest.raises(ValueError, match='fine_tune'): learn.fine_tune(8, cbs=[watch, SparsifyCallback(50, start_epoch=2, lth=True)])
    assert not watch.losses and same(tensors_of(learn.model), was)
    learn, watch, sp_cb = small_learner(), Losses(), SparsifyCallback(50, schedule=one_shot) # one group: nothing to freeze
    learn.fine_tune(2, cbs=[sp_cb, watch])
    assert n_zeros(sp_cb) == 88 and len(watch.losses) == 3*N_BATCHES
    with pytest.raises(ValueError, match='start_epoch=2'): small_learner().fine_tune(8, cbs=SparsifyCallback(50, start_epoch=2, lth=True))


@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle'])
def test_fits_that_start_later(fit):
    learn, watch = small_learner(), Losses()
    was = tensors_of(learn.model)
    with pytest.raises(ValueError, match='start_epoch'): getattr(learn, fit)(8, 1e-2, start_epoch=3, cbs=[watch, SparsifyCallback(50, start_epoch=2, lth=True)])
    assert not watch.losses and same(tensors_of(learn.model), was)
    sp_cb = SparsifyCallback(50, start_epoch=2, lth=True)
    learn.fit(8, 1e-2, cbs=sp_cb)
    getattr(learn, fit)(8, 1e-2, start_epoch=6, cbs=[sp_cb, watch]) # a finished callback only holds its mask
    assert len(watch.losses) == 2*N_BATCHES and n_zeros(sp_cb) == 88


def test_a_finished_callback_with_another_model():
    sp_cb = SparsifyCallback(50, start_epoch=2, lth=True)
    small_learner().fit(8, 1e-2, cbs=sp_cb)
    for cb in (sp_cb, MaskCallback(sp_cb.sparsifier)):
        other, watch = small_learner(seed=2), Losses()
        was, mask = tensors_of(other.model), sp_cb.mask
        with pytest.raises(ValueError, match='another model'): other.fit(2, 1e-2, cbs=[cb, watch])
        assert not watch.losses and same(tensors_of(other.model), was) and sp_cb.mask is mask
    sp_cb.reset()
    other.fit(8, 1e-2, cbs=sp_cb)
    assert n_zeros(sp_cb) == 88 and sp_cb.sparsifier.model is other.model


@pytest.mark.parametrize('kwargs', [dict(lth=True), dict(schedule=agp, reset_end=True), dict(lth=True, reset_end=True)])
@pytest.mark.parametrize('cb', [lambda: GradientAccumulation(4*BATCH_SIZE), SkipSteps], ids=['accumulated', 'skipped'])
def test_a_step_that_is_not_reached_before_pruning(kwargs, cb):
    "Two epochs are eight batches, and fewer steps; step 7 comes too late. The refusal names what was asked, and comes no later than pruning."
    learn, watch = small_learner(), Losses()
    with pytest.raises(ValueError, match='rewind_step=7'):
        learn.fit(8, 1e-2, cbs=[watch, cb(), SparsifyCallback(50, start_epoch=2, rewind_step=7, **kwargs)])
    assert len(watch.losses) <= 2*N_BATCHES


@pytest.mark.parametrize('kwargs', [dict(rewind_epoch=1), dict(rewind_step=1), dict(rewind_step=4)])
@pytest.mark.parametrize('n_acc', [3*BATCH_SIZE, 20*BATCH_SIZE], ids=['three batches', 'more than an epoch'])
def test_gradients_accumulated_over_the_end_of_an_epoch(n_acc, kwargs):
    "A rewind to a later point would drop those of the open group; the plan says so, and so does the fit before it trains."
    learn, watch, sp_cb = small_learner(cbs=GradientAccumulation(n_acc)), Losses(), SparsifyCallback(50, start_epoch=2, lth=True, **kwargs)
    with pytest.raises(ValueError, match='across the end of an epoch'): sp_cb.plan(learn, 8)
    with pytest.raises(ValueError, match='across the end of an epoch'): learn.fit(8, 1e-2, cbs=[watch, sp_cb])
    assert watch.losses == []


@pytest.mark.parametrize('kwargs', [dict(rewind_epoch=.25), dict(rewind_epoch=1.75)], ids=str)
def test_a_rewind_into_a_group_of_accumulated_gradients(kwargs):
    "Two batches make a step; the position after one of them is none to go back to."
    learn, watch, sp_cb = small_learner(cbs=GradientAccumulation(2*BATCH_SIZE)), Losses(), SparsifyCallback(50, start_epoch=2, lth=True, **kwargs)
    with pytest.raises(ValueError, match='inside a group'): learn.fit(8, 1e-2, cbs=[watch, sp_cb])
    assert watch.losses == []


TORCH_LOADERS = {
    'the last batch is short': lambda data: torch.utils.data.DataLoader(data, BATCH_SIZE),
    'a sampler of batches': lambda data: torch.utils.data.DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(range(len(data)), BATCH_SIZE, False)),
    'whole batches only': lambda data: torch.utils.data.DataLoader(data, BATCH_SIZE, drop_last=True)}

@pytest.mark.parametrize('make', TORCH_LOADERS.values(), ids=TORCH_LOADERS)
@pytest.mark.parametrize('n, n_acc', [(28, 16), (28, 12), (24, 16), (32, 8), (26, 24)])
def test_steps_of_accumulated_gradients_are_foreseen(make, n, n_acc):
    "For loaders of torch, whose last batch may be a short one: the batches after which the first epoch makes a step."
    class Seen(Callback):
        order, ends = GradientAccumulation.order + 1, ()
        def after_step(self): self.ends += (self.iter + 1,)
    loader = make(Items(n))
    learn, seen = small_learner(dls=DataLoaders(loader, loader), cbs=GradientAccumulation(n_acc)), Seen()
    learn.fit(1, cbs=seen)
    assert step_ends(learn) == [*seen.ends]


def test_batches_of_unknown_size_cannot_be_accumulated():
    class Groups(torch.utils.data.Sampler):
        def __len__(self): return 4
        def __iter__(self): return iter([[0], [1, 2], [3], [4, 5]])
    loader = torch.utils.data.DataLoader(Items(6), batch_sampler=Groups())
    assert step_ends(small_learner(dls=DataLoaders(loader, loader))) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match='size is not known'): step_ends(small_learner(dls=DataLoaders(loader, loader), cbs=GradientAccumulation(3)))


@pytest.mark.parametrize('n_epoch', ['8', None, 8.])
def test_a_plan_for_what_is_no_number_of_epochs(n_epoch):
    with pytest.raises(ValueError, match='n_epoch='): SparsifyCallback(50).plan(small_learner(), n_epoch)


def test_an_epoch_cut_short_before_the_rewind_point():
    "The message names the argument the user gave."
    with pytest.raises(ValueError, match='rewind_epoch=0.75'):
        small_learner().fit(8, 1e-2, cbs=[SparsifyCallback(50, start_epoch=2, lth=True, rewind_epoch=.75), ShortEpochCallback(.25, short_valid=False)])


# 7. Nothing left behind

def control(learn, sp_cb, n_epoch, twin=None, make=None):
    "What a new callback makes of the same model, optimizer and generators, on a learner of its own."
    with generators_kept(): twin = twin or small_learner()
    twin.model.load_state_dict(learn.model.state_dict())
    twin.create_opt()
    twin.opt.load_state_dict(deepcopy(learn.opt.state_dict()))
    twin.dls.train.rng.setstate(learn.dls.train.rng.getstate())
    with generators_kept(): twin.fit(n_epoch, 1e-2, cbs=sp_cb or make())
    return twin


def interrupt(learn, sp_cb, exception, epoch=5, batch=1, event='before_batch', on_learner=False):
    "Break a fit of 8 epochs, in the second of three rounds unless told otherwise."
    breaks = RaiseAt(exception, epoch, batch, event)
    if on_learner: learn.add_cb(sp_cb)
    expected = contextlib.nullcontext() if isinstance(exception, CancelFitException) else pytest.raises(type(exception))
    with expected: learn.fit(8, 1e-2, cbs=[breaks] if on_learner else [sp_cb, breaks])
    assert breaks.done


EXCEPTIONS = dict(keyboard=lambda: KeyboardInterrupt(), error=lambda: RuntimeError('no space left'), cancel=lambda: CancelFitException())
PLANS = dict(ticket=dict(lth=True), middle=dict(lth=True, rewind_step=3), agp=dict(schedule=agp), reset=dict(lth=True, reset_end=True))

@pytest.mark.parametrize('exception', EXCEPTIONS.values(), ids=EXCEPTIONS)
@pytest.mark.parametrize('plan', PLANS.values(), ids=PLANS)
def test_an_interrupted_plan_starts_anew(plan, exception):
    "The next fit with the same callback is the fit of a new callback on the model as it is, to the last bit."
    make = lambda: SparsifyCallback(50, start_epoch=2, **plan)
    learn, sp_cb = small_learner(), make()
    interrupt(learn, sp_cb, exception())
    assert 0 < n_zeros(sp_cb) < 88
    twin = control(learn, new := make(), 8)
    as_is, watch = tensors_of(learn.model), Losses()
    spy = Spy(sp_cb, 56)
    learn.fit(8, 1e-2, cbs=[sp_cb, watch, spy])
    assert same(tensors_of(learn.model), tensors_of(twin.model)) and sp_cb.mask == new.mask and sp_cb.position == new.position
    assert len(watch.losses) == 8*N_BATCHES - (9 if 'rewind_step' in plan else 0) and n_zeros(sp_cb) == 88
    if plan == PLANS['ticket']: assert same(sp_cb.rewind_point.tensors, as_is)
    assert all(m.all() for m in spy.seen[1]['mask'].values()) and not any((spy.seen[1]['tensors'][n] == 0).any() for n in sp_cb.mask)


@pytest.mark.parametrize('exception', EXCEPTIONS.values(), ids=EXCEPTIONS)
@pytest.mark.parametrize('plan', PLANS.values(), ids=PLANS)
def test_an_interrupted_plan_lets_go(plan, exception):
    "The next fit without the callback trains every weight, as if the callback had never been."
    learn, sp_cb = small_learner(), SparsifyCallback(50, start_epoch=2, **plan)
    interrupt(learn, sp_cb, exception())
    twin = control(learn, Callback(), 2)
    learn.fit(2, 1e-2, cbs=(watch := Losses()))
    assert same(tensors_of(learn.model), tensors_of(twin.model)) and n_zeros(sp_cb) == 0 and len(watch.losses) == 2*N_BATCHES
    assert [len(learn.recorder.metric_names), len(learn.cbs)] == [len(twin.recorder.metric_names), len(twin.cbs)]


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_batch', 'after_step', 'after_cancel_step'])
def test_interrupted_anywhere(event):
    "Also between a skipped step and its end; then the first step of the next fit must count."
    learn, sp_cb = small_learner(), SparsifyCallback(50, start_epoch=2, lth=True, rewind_step=3)
    class Late(RaiseAt): order = 60
    skipping = event == 'after_cancel_step' # batch 2 of an epoch is skipped
    with pytest.raises(RuntimeError): learn.fit(8, 1e-2, cbs=[sp_cb, Late(RuntimeError('stop'), 1, batch=2, event=event), *([SkipSteps()] if skipping else [])])
    learn.opt.zero_grad() # what a broken backward pass left is fastai's
    positions = []
    class Look(Callback):
        order, run_valid = 200, False
        def after_batch(self): positions.append(sp_cb.position.steps)
    learn.fit(8, 1e-2, cbs=[sp_cb, Look()])
    assert positions[:4] == [1, 2, 3, 4] and sp_cb.rewind_point.position == Position(3, 0, 3)


@pytest.mark.parametrize('end', ['whole', 'cancelled'])
@pytest.mark.parametrize('plan', [dict(lth=True), dict(lth=True, rewind_step=3), dict(schedule=agp(3)), dict(lth=True, reset_end=True),
                                  dict(lth=True, rewind_step=3, reset_end=True)], ids=['ticket', 'middle', 'agp', 'reset', 'reset to the middle'])
def test_a_finished_callback_only_holds_the_mask(plan, end):
    "Fits after that go as with a MaskCallback, to the last bit: whole epochs, numbers of their own. Also where the fit was cut short after the last pruning."
    learn, sp_cb, watch = small_learner(), SparsifyCallback(50, start_epoch=2, **plan), Losses()
    if end == 'whole': learn.fit(8, 1e-2, cbs=sp_cb)
    else: interrupt(learn, sp_cb, CancelFitException(), epoch=7, batch=3)
    mask = sp_cb.mask
    with generators_kept(): twin = small_learner()
    expected = control(learn, None, 2, twin, lambda: MaskCallback(Sparsifier(twin.model, mask=mask)))
    learn.fit(2, 1e-2, cbs=[sp_cb, watch])
    assert sp_cb.mask is mask and n_zeros(sp_cb) == 88 and len(watch.losses) == 2*N_BATCHES
    assert same(tensors_of(learn.model), tensors_of(expected.model)) and list(learn.recorder.metric_names) == list(expected.recorder.metric_names)


@pytest.mark.parametrize('plan', [dict(lth=True), dict(lth=True, rewind_step=3), dict(schedule=agp(3))], ids=['ticket', 'middle', 'agp'])
@pytest.mark.parametrize('exception', [CancelEpochException, CancelTrainException, CancelBatchException, CancelBackwardException, CancelStepException])
@pytest.mark.parametrize('epoch', [0, 3])
def test_cancelled_parts_of_a_fit(epoch, exception, plan):
    "Whatever a callback cuts short in one epoch, the other epochs are whole and the plan is carried out."
    event = {CancelBackwardException: 'before_backward', CancelStepException: 'before_step'}.get(exception, 'before_batch')
    learn, sp_cb, watch = small_learner(), SparsifyCallback(50, start_epoch=2, **plan), Losses()
    if 'rewind_step' in plan and epoch == 0: sp_cb = SparsifyCallback(50, start_epoch=2, lth=True, rewind_step=5)
    spy = Spy(sp_cb, 56)
    learn.fit(8, 1e-2, cbs=[sp_cb, watch, spy, RaiseAt(exception(), epoch, event=event)])
    whole = {e: sum(b[0] == e for b in watch.batches) for e in range(8)}
    rewound = [] if 'rewind_step' not in plan else [2, 4, 6]
    assert all(whole[e] == N_BATCHES for e in range(8) if e != epoch and e not in rewound), whole
    inside = sp_cb.rewind_point.position if rewound else Position()
    assert [spy.seen[e]['position'].batch for e in range(8)] == [inside.batch if e in rewound else 0 for e in range(8)]
    came = list(range(9)) if 'schedule' in plan else [0, 1] + [inside.epoch, inside.epoch + 1]*3 + [inside.epoch + 2]
    assert [spy.seen[e]['position'].epoch for e in range(8)] + [sp_cb.position.epoch] == came
    assert n_zeros(sp_cb) == 88


@pytest.mark.parametrize('cut_short', [lambda: RaiseAt(CancelFitException(), 5), lambda: ShortEpochCallback(.25, short_valid=False)], ids=['cancelled', 'short epochs'])
def test_a_plan_that_was_not_carried_out_is_said(cut_short):
    "A fit that ends before its last pruning does not pass for a finished one."
    sp_cb = SparsifyCallback(50, start_epoch=2, schedule=lin)
    with pytest.warns(UserWarning, match='prunings to go'): small_learner().fit(8, 1e-2, cbs=[sp_cb, cut_short()])
    assert n_zeros(sp_cb) < 88
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small_learner().fit(8, 1e-2, cbs=SparsifyCallback(50, start_epoch=2, schedule=lin))


def test_reset_starts_anew():
    make = lambda: SparsifyCallback(50, start_epoch=2, lth=True)
    learn, sp_cb = small_learner(), make()
    learn.fit(8, 1e-2, cbs=sp_cb)
    first = sp_cb.mask
    sp_cb.reset()
    assert sp_cb.position == Position() and sp_cb.sparsifier is None and sp_cb.rewind_point is None
    with pytest.raises(ValueError, match='nothing has been pruned'): sp_cb.report()
    twin = control(learn, new := make(), 8)
    learn.fit(8, 1e-2, cbs=sp_cb)
    assert same(tensors_of(learn.model), tensors_of(twin.model)) and sp_cb.mask == new.mask and n_zeros(sp_cb) == 88


def test_reset_in_the_middle_of_nothing():
    "Reset before any fit, and after an interrupted one."
    learn, sp_cb = small_learner(), SparsifyCallback(50, start_epoch=2, lth=True)
    sp_cb.reset()
    interrupt(learn, sp_cb, RuntimeError('stop'))
    sp_cb.reset()
    learn.fit(8, 1e-2, cbs=sp_cb)
    assert n_zeros(sp_cb) == 88


# Learners with methods of their own around the loop

class Logged(Learner):
    "Counts events."
    n_events = 0
    def __call__(self, event_name):
        self.n_events += 1
        return super().__call__(event_name)

class Timed(Learner):
    def _with_events(self, *args, **kwargs): return timed(super()._with_events)(*args, **kwargs)

class Decorated(Learner): pass

class OwnLoop(Learner):
    "What extension packages do: fastai's loop with something around, and events without `Learner`'s help."
    def __call__(self, event_name):
        for name in L(event_name):
            for cb in self.cbs.sorted('order'): cb(name)
    def _with_events(self, f, event_type, ex, final=noop):
        try: self(f'before_{event_type}');  f()
        except ex: self(f'after_cancel_{event_type}')
        self(f'after_{event_type}');  final()

def timed(f):
    def wrapper(*args, **kwargs): return f(*args, **kwargs)
    return wrapper

Decorated.__call__, Decorated._with_events = timed(Learner.__call__), timed(Learner._with_events)

def of_class(cls, **kwargs):
    "A small learner of a subclass."
    learn = small_learner(**kwargs)
    learn.__class__ = cls
    return learn


@pytest.mark.parametrize('cls', [Logged, Timed, Decorated, OwnLoop])
@pytest.mark.parametrize('kwargs', [dict(start_epoch=2, lth=True), dict(schedule=one_shot)], ids=['ticket', 'at once'])
def test_learners_with_a_loop_of_their_own(cls, kwargs, tmp_path):
    "They prune, hold and are looked at as plain ones."
    sp_cb, plain_cb, seeded = SparsifyCallback(50, **kwargs), SparsifyCallback(50, **kwargs), Seeded(3)
    learn, plain = of_class(cls, path=tmp_path, cbs=[sp_cb, seeded]), small_learner()
    learn.fit(8, 1e-2)
    plain.fit(8, 1e-2, cbs=[plain_cb, Seeded(3)])
    assert n_zeros(sp_cb) == 88 and sp_cb.mask == plain_cb.mask and same(tensors_of(learn.model), tensors_of(plain.model))
    was = _state(learn, sp_cb, seeded)
    for look in LOOKS.values(): look(learn)
    assert different(was, _state(learn, sp_cb, seeded)) == []
    control = of_class(cls)
    control.fit(2, 1e-2, cbs=MaskCallback(sparsifier := Sparsifier(control.model, mask=sp_cb.mask)))
    assert sum(int((w == 0).sum()) for w in sparsifier.weights.values()) == 88


@pytest.mark.parametrize('callback', [lambda learn: MaskCallback(Sparsifier(learn.model).prune(50)), lambda learn: SparsifyCallback(50, schedule=one_shot)])
def test_a_fit_with_a_mask_for_other_tensors_is_refused(callback):
    learn = small_learner()
    cb = callback(learn)
    learn.fit(1, cbs=cb)
    learn.model[-1] = nn.Linear(16, 3)
    was = tensors_of(learn.model)
    with pytest.raises(ValueError, match='4.weight is another tensor'): learn.fit(1, cbs=cb)
    assert same(was, tensors_of(learn.model))


def test_training_one_learner_leaves_the_callback_of_another_alone():
    "A loss that uses a teacher sends it events while the student trains."
    teacher, sp_cb = small_learner(), SparsifyCallback(50, schedule=one_shot)
    teacher.add_cb(sp_cb)
    def loss(pred, y):
        with teacher: teacher.model.eval()
        return torch.nn.functional.cross_entropy(pred, y)
    student = small_learner()
    student.loss_func = loss
    student.fit(1, 1e-2)
    assert sp_cb.sparsifier is None


def test_making_a_learner_keeps_nothing_alive():
    "A look at the variables of those who call would, on Python 3.11."
    class Big: pass
    big = Big()
    gone = weakref.ref(big)
    small_learner(cbs=SparsifyCallback(50))
    del big
    assert gone() is None


class OwnStep(Learner):
    "A training step that sends its events itself, as with several optimizers."
    def _do_grad_opt(self):
        self._backward(); self('after_backward')
        self._step(); self('after_step')
        self.opt.zero_grad()

@pytest.mark.parametrize('more', [(), (FastCPU(False),)], ids=['alone', 'with FastCPU'])
def test_masks_hold_after_steps_that_a_learner_sends_itself(more):
    class Zeros(Callback):
        order, found = 90, ()
        def after_batch(self):
            if self.training: self.found += (sum(int((w == 0).sum()) for w in sparsifier.weights.values()),)
    learn, zeros = of_class(OwnStep), Zeros()
    sparsifier = Sparsifier(learn.model)
    sparsifier.prune(50)
    learn.fit(2, 1e-2, cbs=[MaskCallback(sparsifier), zeros, *more])
    assert {*zeros.found} == {88} and len(zeros.found) == 2*N_BATCHES


class Lazy(Items):
    "A data set whose generator comes with its first item, as is common."
    rng = None
    def __getitem__(self, i):
        if self.rng is None: self.rng = np.random.default_rng(0)
        x, y = super().__getitem__(i)
        return x + .1*float(self.rng.normal()), y

def test_a_generator_made_with_the_first_item_ends_no_fit():
    sp_cb = SparsifyCallback(50, start_epoch=2, lth=True)
    with pytest.warns(UserWarning, match='keeps 1 generators of its own'): small_learner(dls=small_dls(train=Lazy(32))).fit(8, 1e-2, cbs=sp_cb)
    assert n_zeros(sp_cb) == 88


def test_one_cycle_adds_settings_to_an_optimizer_and_leaves_its_kind():
    def plain(params, lr, **kwargs): return fastai.optimizer.Optimizer(params, [fastai.optimizer.weight_decay, fastai.optimizer.sgd_step], lr=lr, wd=0.)
    sp_cb = SparsifyCallback(50, start_epoch=2, lth=True)
    small_learner(opt_func=plain).fit_one_cycle(8, 1e-2, cbs=sp_cb)
    assert n_zeros(sp_cb) == 88


# Looking changes nothing

def _tta(learn):
    "What Learner.tta does: it opens a fit and an epoch without the lock that validation takes."
    learn(['before_fit', 'before_epoch'])
    try: learn.get_preds(inner=True)
    finally: learn('after_fit')

LOOKS = dict(lr_find=lambda learn: learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None), validate=lambda learn: learn.validate(),
             get_preds=lambda learn: learn.get_preds(), get_train_preds=lambda learn: learn.get_preds(ds_idx=0, with_loss=True), summary=lambda learn: learn.summary(),
             tta=_tta, save=lambda learn: learn.save('now'))

def _state(learn, sp_cb, seeded):
    return dict(tensors=tensors_of(learn.model), mask=None if sp_cb.sparsifier is None else {n: m.clone() for n, m in sp_cb.mask.items()},
                position=sp_cb.position, finished=sp_cb._finished, epochs_done=seeded.epochs_done, opt=None if learn.opt is None else opt_stats(learn.opt),
                frozen=[p.requires_grad for p in learn.model.parameters()], point=None if sp_cb.rewind_point is None else sp_cb.rewind_point.tensors)

@pytest.mark.parametrize('look', LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize('kwargs', [dict(start_epoch=2, lth=True), dict(schedule=one_shot), dict(start_epoch=2, lth=True, rewind_epoch=1, reset_end=True)],
                         ids=['ticket', 'at once', 'reset'])
def test_looking_changes_nothing(look, kwargs, tmp_path):
    "Before, between and after fits, with the callback on the learner; and the fits go as if nobody had looked."
    sp_cb, seeded = SparsifyCallback(50, **kwargs), Seeded(3)
    learn = small_learner(path=tmp_path, cbs=[sp_cb, seeded])
    other_cb, other_seeded = SparsifyCallback(50, **kwargs), Seeded(3)
    other = small_learner(cbs=[other_cb, other_seeded])
    def looked():
        was = _state(learn, sp_cb, seeded)
        look(learn)
        now = _state(learn, sp_cb, seeded)
        was['opt'] = was['opt'] or now['opt'] # lr_find makes the optimizer where there was none
        assert [k for k in was if not same(was[k], now[k])] == []
    looked()
    for n in (5, 1):
        learn.fit(n, 1e-2)
        other.fit(n, 1e-2)
        assert same(tensors_of(learn.model), tensors_of(other.model)) and sp_cb.mask == other_cb.mask and n_zeros(sp_cb) == 88
        looked()
    sp_cb.reset(); other_cb.reset()
    learn.fit(5, 1e-2); other.fit(5, 1e-2)
    assert same(tensors_of(learn.model), tensors_of(other.model)) and sp_cb.mask == other_cb.mask


@pytest.mark.parametrize('look, exception', [(look, 'keyboard') for look in LOOKS] + [('validate', 'cancel'), ('validate', 'error')])
def test_looking_after_an_interrupted_fit(look, exception, tmp_path):
    sp_cb, seeded = SparsifyCallback(50, start_epoch=2, lth=True), Seeded(3)
    learn = small_learner(path=tmp_path, cbs=seeded)
    interrupt(learn, sp_cb, EXCEPTIONS[exception](), on_learner=True)
    was, done = tensors_of(learn.model), seeded.epochs_done
    LOOKS[look](learn)
    assert same(tensors_of(learn.model), was) and seeded.epochs_done == done
    learn.fit(5, 1e-2)
    assert n_zeros(sp_cb) == 88


def test_tta(tmp_path):
    "fastai's own, on a data set of its own."
    items = Items(32)
    dsets = Datasets(range(32), [[lambda i: items.x[i]], [lambda i: int(items.y[i])]], splits=[range(24), range(24, 32)])
    sp_cb = SparsifyCallback(50, schedule=one_shot)
    learn = small_learner(dls=dsets.dataloaders(bs=8), cbs=sp_cb)
    was = tensors_of(learn.model)
    learn.tta(n=1)
    assert same(tensors_of(learn.model), was) and sp_cb.sparsifier is None
    learn.fit(2, 1e-2)
    learn.tta(n=1)
    assert n_zeros(sp_cb) == 88


class Peeks(Callback):
    "A user's callback that validates or predicts in the middle of a fit."
    order = 70
    def __init__(self, look, event):
        self.look, self.looking = look, False
        setattr(self, event, self._look)
    def _look(self):
        if self.looking: return # the event is that of the validation itself
        self.looking = True
        self.look(self.learn)
        self.looking = False

PEEKS = dict(validate=lambda learn: learn.validate(), get_preds=lambda learn: learn.get_preds(), inner=lambda learn: learn.get_preds(inner=True))

@pytest.mark.parametrize('look', PEEKS.values(), ids=PEEKS)
@pytest.mark.parametrize('event', ['after_epoch', 'after_train'])
@pytest.mark.parametrize('kwargs', [dict(lth=True), dict(schedule=agp)], ids=['ticket', 'agp'])
def test_looking_inside_a_fit(kwargs, event, look):
    "A fit in which somebody validates after each epoch prunes and holds as one in which nobody does."
    learn, other = small_learner(dropout=0., dls=small_dls(shuffle=False)), small_learner(dropout=0., dls=small_dls(shuffle=False))
    sp_cb, other_cb = SparsifyCallback(50, start_epoch=2, **kwargs), SparsifyCallback(50, start_epoch=2, **kwargs)
    steps = Steps(sp_cb)
    learn.fit(8, 1e-2, cbs=[sp_cb, Peeks(look, event)])
    other.fit(8, 1e-2, cbs=other_cb)
    assert n_zeros(sp_cb) == 88 and sp_cb.mask == other_cb.mask and same(tensors_of(learn.model), tensors_of(other.model))


def test_fetching_predictions_inside_a_fit():
    learn, sp_cb = small_learner(), SparsifyCallback(50, start_epoch=2, lth=True)
    learn.fit(8, 1e-2, cbs=[sp_cb, fetch := FetchPredsCallback(), steps := Steps(sp_cb)])
    assert n_zeros(sp_cb) == 88 and steps.n_leaks == 0 and [round(v[-1]) for v in learn.recorder.values] == [0, 0, 16, 16, 34, 34, 50, 50]


# Two at a time

def _two(schedule, start_b=2):
    "Two learners of different sizes and lengths, with callbacks that share the schedule."
    models = [lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)),
              lambda: nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))]
    learns = [small_learner(m, seed=i, dls=small_dls(4 + i, shuffle=False)) for i, m in enumerate(models)]
    return list(zip(learns, [SparsifyCallback(50, schedule=schedule, start_epoch=2, lth=True, rewind_epoch=1), SparsifyCallback(80, schedule=schedule, start_epoch=1, lth=True)], [8, 7]))

def _outcome(learn, sp_cb): return tensors_of(learn.model), dict(sp_cb.mask), sp_cb.position, [v[-1] for v in learn.recorder.values]

@pytest.mark.parametrize('schedule', [iterative, geometric(n_steps=3)], ids=['iterative', 'geometric'])
def test_two_fits_in_two_threads(schedule):
    def alone(learn, sp_cb, n): learn.fit(n, 1e-2, cbs=sp_cb); return _outcome(learn, sp_cb)
    expected = [alone(*each) for each in _two(schedule)]
    turn, log, together, failed = new_turn(), [], _two(schedule), []
    def run(me, learn, sp_cb, n):
        turns = TakeTurns(me, turn, log)
        try: learn.fit(n, 1e-2, cbs=[turns, sp_cb])
        except BaseException as e: failed.append(e)
        finally: turns.leave()
    threads = [threading.Thread(target=run, args=(i, *each)) for i, each in enumerate(together)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert not failed and log[:20] == [0, 1]*10, 'the fits did not take turns'
    for each, was in zip(together, expected): assert same(_outcome(*each[:2]), was)


@pytest.mark.parametrize('event', ['before_epoch', 'after_epoch'])
def test_a_fit_inside_a_fit(event):
    def alone(learn, sp_cb, n): learn.fit(n, 1e-2, cbs=sp_cb); return _outcome(learn, sp_cb)
    expected = [alone(*each) for each in _two(iterative)]
    (outer, outer_cb, n), (inner, inner_cb, m) = _two(iterative)
    class Inside(Callback):
        order = 54
        def _fit(self):
            if self.learn.epoch == 4: inner.fit(m, 1e-2, cbs=inner_cb)
        before_epoch = after_epoch = lambda self: None
    setattr(Inside, event, Inside._fit)
    outer.fit(n, 1e-2, cbs=[outer_cb, Inside()])
    assert same(_outcome(outer, outer_cb), expected[0]) and same(_outcome(inner, inner_cb), expected[1])


def test_schedules_and_criteria_are_frozen():
    for schedule in (iterative, one_shot, geometric, agp, dsd):
        was = (hash(schedule), repr(schedule))
        with pytest.raises(AttributeError): schedule.n_steps = 7
        small_learner().fit(8, 1e-2, cbs=SparsifyCallback(50, schedule=schedule, start_epoch=0))
        assert (hash(schedule), repr(schedule)) == was


def test_two_callbacks_do_not_share_anything():
    a, b = SparsifyCallback(50, start_epoch=2, lth=True), SparsifyCallback(50, start_epoch=2, lth=True)
    small_learner().fit(8, 1e-2, cbs=a)
    assert b.sparsifier is None and not b._finished and b.position == Position()
