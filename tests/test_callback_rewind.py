"Going back inside fastai: what comes after a rewind with a full mask repeats, to the last bit, what came the first time."
import random
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.utils.data
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import OptimWrapper, SGD
from torch import nn

from helpers_fastai import (BATCH_SIZE, N_BATCHES, CpuMixedPrecision, Everything, Items, Losses, Spy, Steps, different, generators_kept,
                            opt_stats, same, small_dls, small_learner, tensors_of)
from lth_nb.callback import SparsifyCallback
from lth_nb.fitting import Seeded
from lth_nb.rewind import Position, RandomState, RewindPoint
from lth_nb.schedule import iterative, one_shot

POINTS = {'start': {}, 'epoch 1': dict(rewind_epoch=1), 'step 3': dict(rewind_step=3), 'a quarter': dict(rewind_epoch=.25), 'epoch 1.5': dict(rewind_epoch=1.5),
          'step 5': dict(rewind_step=5)}
WHERE = {'start': 0, 'epoch 1': 4, 'step 3': 3, 'a quarter': 1, 'epoch 1.5': 6, 'step 5': 5} # in steps

def there_and_back(point, cbs=(), fit='fit', start=2, **kwargs):
    "Train two epochs, go back to a point with nothing cut, train to the same position again; all must repeat."
    learn = small_learner(**{'model': Everything, **kwargs})
    sp_cb = SparsifyCallback(0, schedule=one_shot, start_epoch=start, lth=True, optimizer='restore', **POINTS[point])
    first, losses, steps, k = Spy(sp_cb, 54), Losses(), Steps(), WHERE[point]
    n, whole = len(learn.dls.train), WHERE[point]//N_BATCHES
    getattr(learn, fit)(2*start - whole, 1e-2, cbs=[sp_cb, first, losses, steps, *cbs])
    assert len(losses.losses) == steps.n == start*n + start*n - k, 'batches were computed that the point had seen, or some are missing'
    assert sp_cb.rewind_point.position == Position(k, k//n, k % n) and sp_cb.position == Position(start*n, start, 0)
    assert losses.losses[start*n:] == losses.losses[k:start*n]
    assert same(losses.inputs[start*n:], losses.inputs[k:start*n])
    if n > 1: assert len(set(losses.losses)) > 2 and not same(losses.inputs[0], losses.inputs[n]), 'nothing here is random'
    was, now = first.seen[start], first.end
    assert same(tensors_of(learn.model), was['tensors']), different(tensors_of(learn.model), was['tensors'])
    assert same(opt_stats(learn.opt), was['opt']) and now['lr'] == was['lr']
    return learn


@pytest.mark.parametrize('seeded', [False, True], ids=['unseeded', 'seeded'])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('point', POINTS)
def test_bit_for_bit(point, workers, seeded):
    there_and_back(point, [Seeded(7)] if seeded else [], dls=small_dls(workers=workers, noise=True))


@pytest.mark.parametrize('seeded', [False, True], ids=['unseeded', 'seeded'])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', ['torch', 'torch with a generator'])
@pytest.mark.parametrize('point', ['epoch 1', 'step 3'])
def test_bit_for_bit_with_torchs_loader(point, kind, workers, seeded):
    there_and_back(point, [Seeded(7)] if seeded else [], dls=small_dls(workers=workers, noise=True, kind=kind))


@pytest.mark.parametrize('seeded', [False, True], ids=['unseeded', 'seeded'])
def test_persistent_workers_are_refused(seeded):
    "Workers that outlive an epoch have generators of their own, in other processes: refused."
    with pytest.raises(ValueError, match='persistent_workers'):
        there_and_back('epoch 1', [Seeded(7)] if seeded else [], dls=small_dls(workers=2, noise=True, kind='torch', persistent_workers=True))


@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)],
                         ids=['SGD', 'AdamW', 'torch SGD'])
@pytest.mark.parametrize('point', ['epoch 1', 'step 3'])
def test_bit_for_bit_with_other_optimizers(point, opt_func):
    there_and_back(point, opt_func=opt_func, wd=.1, dls=small_dls(noise=True))


@pytest.mark.parametrize('point', ['start', 'epoch 1', 'step 3', 'step 5'])
def test_bit_for_bit_with_a_schedule_for_rate_and_momentum(point):
    "Rounds of the same length from position 0 on follow the same curve."
    there_and_back(point, fit='fit_one_cycle', dls=small_dls(noise=True))


@pytest.mark.parametrize('point', ['epoch 1', 'step 3'])
def test_bit_for_bit_with_mixed_precision(point):
    there_and_back(point, [CpuMixedPrecision(init_scale=2.**10, growth_interval=3)], dls=small_dls(noise=True))


def test_bit_for_bit_with_accumulated_gradients():
    "Two batches a step: step 1 is two batches."
    learn = small_learner(Everything, dls=small_dls(noise=True))
    sp_cb, losses = SparsifyCallback(0, schedule=one_shot, start_epoch=2, lth=True, optimizer='restore', rewind_step=1), Losses()
    learn.fit(4, 1e-2, cbs=[sp_cb, GradientAccumulation(2*BATCH_SIZE), losses])
    assert sp_cb.rewind_point.position == Position(1, 0, 2)
    assert len(losses.losses) == 8 + 6 and losses.losses[8:] == losses.losses[2:8] and same(losses.inputs[8:], losses.inputs[2:8])


def test_bit_for_bit_over_three_rounds():
    learn = small_learner(Everything, dls=small_dls(noise=True))
    sp_cb, losses = SparsifyCallback(0, schedule=iterative, start_epoch=2, lth=True, optimizer='restore', rewind_step=3), Losses()
    spy = Spy(sp_cb, 54)
    learn.fit(8, 1e-2, cbs=[sp_cb, losses, spy])
    assert losses.losses == losses.losses[:8] + losses.losses[3:8]*3
    assert same(spy.seen[2]['tensors'], spy.seen[4]['tensors']) and same(spy.seen[2]['tensors'], tensors_of(learn.model))


class Draws(Callback):
    "A callback that draws random numbers at many events, in validation too."
    def __init__(self, order): self._order = order
    @property
    def order(self): return self._order
    def _draw(self): torch.rand(1); random.random(); np.random.rand()
    before_epoch = before_train = before_batch = after_pred = after_step = before_validate = after_epoch = _draw

class DrawsAfterTheBatch(Draws):
    after_batch = Draws._draw

@pytest.mark.parametrize('draws', [Draws(5), Draws(90), DrawsAfterTheBatch(5), DrawsAfterTheBatch(90)], ids=['early', 'late', 'early after the batch', 'late after the batch'])
@pytest.mark.parametrize('kind', ['fastai', 'torch'])
def test_other_callbacks_that_draw_do_not_disturb(draws, kind):
    for point in ('epoch 1', 'step 3'): there_and_back(point, [draws], dls=small_dls(noise=True, kind=kind))


class WithGenerator(Items):
    "A data set that draws from its own generator, under the name fastai's loaders look through to."
    def __init__(self, n):
        super().__init__(n)
        self.generator = torch.Generator().manual_seed(3)
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + .1*torch.randn(x.shape, generator=self.generator), y

@pytest.mark.parametrize('seeded', [False, True], ids=['unseeded', 'seeded'])
def test_the_loaders_generator_is_not_mistaken_for_the_data_sets(seeded):
    "A loader of fastai's passes unknown names on to its data set; the order of the batches comes back all the same."
    learn = small_learner(dls=small_dls(train=WithGenerator(4*BATCH_SIZE)))
    order, get_idxs, cbs = [], learn.dls.train.get_idxs, [Seeded(1)] if seeded else []
    learn.dls.train.get_idxs = lambda: (order.append(get_idxs()), order[-1])[1]
    learn.fit(4, 1e-2, cbs=[SparsifyCallback(0, schedule=one_shot, start_epoch=2, lth=True), *cbs])
    assert order[2:] == order[:2] and order[0] != order[1]


class HiddenBuffer(nn.Module):
    "Keeps a running value in a buffer that `state_dict()` leaves out."
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)
        self.register_buffer('seen', torch.zeros(8), persistent=False)
    def forward(self, x):
        if self.training: self.seen.lerp_(x.mean(0), .1)
        return self.fc(x - self.seen)

def test_bit_for_bit_with_buffers_that_are_not_saved():
    for point in ('epoch 1', 'step 3'): there_and_back(point, model=HiddenBuffer)


LEFT_OUT = [(what, point) for what in ('tensors', 'buffers', 'optimizer', 'random', 'loader') for point in ('epoch 1', 'step 3')] + [('epoch_start', 'step 3')]

@pytest.mark.parametrize('left_out, point', LEFT_OUT)
def test_leaving_out_one_item_is_noticed(monkeypatch, left_out, point):
    "The comparison above has teeth: whatever is left out of the rewind point makes it fail."
    restore, restore_random = RewindPoint.restore, RandomState.restore
    def less(self, model, optimizer=None, how='fresh', copies=(), others=(), loaders=()):
        kept = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
        stats, generators, own = deepcopy(optimizer.state_dict()), RandomState.take(), loaders[0].rng.getstate() if hasattr(loaders[0], 'rng') else None
        position = restore(self, model, optimizer, how, copies, others, loaders)
        with torch.no_grad():
            if left_out == 'tensors': model.fc.weight.copy_(kept['fc.weight'])
            if left_out == 'buffers': model.bn.running_var.copy_(kept['bn.running_var'])
        if left_out == 'optimizer': optimizer.load_state_dict(stats)
        if left_out == 'random': restore_random(generators, ())
        if left_out == 'loader': loaders[0].rng.setstate(own)
        if left_out == 'epoch_start': restore_random(self.random, loaders) # the generators of that moment instead of those when its epoch began
        return position
    # torch's loader draws its order from the global generator, fastai's from its own
    dls = small_dls(noise=True, kind='torch' if left_out == 'random' else 'fastai')
    there_and_back(point, dls=dls)
    monkeypatch.setattr(RewindPoint, 'restore', less)
    with pytest.raises(AssertionError): there_and_back(point, dls=dls)


@pytest.mark.parametrize('workers', [0, 2])
def test_seen_batches_are_passed_over_without_computing(workers):
    "From inside an epoch only the batches not yet seen go through the model, in each round."
    learn = small_learner(dls=small_dls(workers=workers))
    sp_cb, losses, forwards = SparsifyCallback(50, start_epoch=1, lth=True, rewind_step=3), Losses(), []
    learn.model.register_forward_pre_hook(lambda m, x: forwards.append(1) if m.training else None)
    learn.fit(7, 1e-2, cbs=[sp_cb, losses])
    assert len(forwards) == len(losses.losses) == 4 + 3*(1 + 4)
    assert [b for b in losses.batches if b[0] == 1] == [(1, 0)]
    rest = losses.inputs[3]
    assert all(same(losses.inputs[i], rest) for i in (4, 9, 14))


# 11. Seeded

@pytest.mark.parametrize('kind', ['fastai', 'torch', 'torch with a generator'])
def test_same_seed_same_bits_with_and_without_workers(kind):
    ends, losses = [], []
    for workers in (0, 2, 0):
        watch = Losses()
        with generators_kept():
            learn = small_learner(Everything, dls=small_dls(workers=workers, kind=kind))
            torch.manual_seed(len(ends)); random.seed(len(ends))
            learn.fit(2, 1e-2, cbs=[Seeded(5), watch])
        ends.append(tensors_of(learn.model)); losses.append(watch.losses)
    assert losses[0] == losses[1] == losses[2] and same(ends[0], ends[1]) and same(ends[0], ends[2])


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', ['fastai', 'torch', 'torch with a generator'])
def test_same_seed_same_augmentation(kind, workers):
    inputs = {}
    for i, seed in enumerate((5, 5, 6)):
        watch = Losses()
        learn = small_learner(dls=small_dls(workers=workers, kind=kind, noise=True))
        torch.manual_seed(i); random.seed(i); np.random.seed(i)
        learn.fit(2, 1e-2, cbs=[Seeded(seed), watch])
        inputs[i] = watch.inputs
    assert same(inputs[0], inputs[1]) and not any(same(a, b) for a, b in zip(inputs[0], inputs[2]))


def test_a_seed_that_could_not_be_kept_is_refused():
    "The generators of workers that live on are out of reach: `Seeded` says so before anything is trained, and without them it works."
    persistent, watch = partial(small_dls, workers=2, noise=True, kind='torch', persistent_workers=True), Losses()
    with pytest.raises(ValueError, match='persistent_workers=True, whose generators cannot be put back: make it without'):
        small_learner(dls=persistent).fit(2, 1e-2, cbs=[Seeded(5), watch])
    assert not watch.losses
    small_learner(dls=persistent).fit(1, 1e-2, cbs=watch) # without a seed nothing is promised, and nothing refused
    assert len(watch.losses) == N_BATCHES


@pytest.mark.parametrize('between', ['nothing', 'numbers drawn', 'validation', 'an lr_find'])
def test_two_plus_two_epochs_are_four(between, tmp_path):
    "The generators follow from (seed, position), not from what happened in between."
    ends = []
    for parts in ((4,), (2, 2)):
        learn, seeded, watch = small_learner(Everything, dls=small_dls(noise=True), path=tmp_path), Seeded(9), Losses()
        for i, n in enumerate(parts):
            if i and between == 'numbers drawn': torch.rand(3); random.random(); np.random.rand(5)
            if i and between == 'validation': learn.validate(); learn.get_preds()
            if i and between == 'an lr_find': learn.lr_find(num_it=10, show_plot=False, suggest_funcs=None)
            learn.fit(n, 1e-2, cbs=[seeded, watch])
        ends.append((watch.losses, watch.inputs, tensors_of(learn.model), opt_stats(learn.opt)))
        assert seeded.epochs_done == 4 and len(watch.losses) == 4*N_BATCHES
    for a, b in zip(*ends): assert same(a, b)


@pytest.mark.parametrize('event', ['after_batch', 'after_train', 'after_epoch'])
def test_looking_inside_an_epoch_does_not_count_as_one(event):
    learn, seeded, seen = small_learner(), Seeded(4), []
    class Validates(Callback):
        busy = False
        def _look(self):
            if self.busy: return
            self.busy = True
            self.learn.validate()
            self.busy = False
            self.learn.model.train()
            self.learn.training = event == 'after_batch'
    setattr(Validates, event, Validates._look)
    class Look(Callback):
        order = 5
        def before_train(self): seen.append(seeded.epochs_done)
    learn.fit(3, 1e-2, cbs=[seeded, Validates(), Look()])
    assert seen == [0, 1, 2] and seeded.epochs_done == 3


@pytest.mark.parametrize('k', [0, 1])
@pytest.mark.parametrize('before', [0, 2], ids=['first fit', 'third fit'])
def test_epochs_repeat_their_order_after_a_rewind(k, before):
    "Also where the same `Seeded` has already seen epochs in fits before."
    learn, seeded, watch = small_learner(dls=small_dls(noise=True)), Seeded(4), Losses()
    if before: learn.fit(before, 1e-2, cbs=seeded)
    learn.fit(2 + 3*(2 - k), 1e-2, cbs=[SparsifyCallback(50, start_epoch=2, lth=True, rewind_epoch=k), seeded, watch])
    n = N_BATCHES
    assert same(watch.inputs[2*n:], watch.inputs[k*n:2*n]*3)


def test_unseeded_rounds_repeat_their_order():
    learn, watch = small_learner(dls=small_dls(noise=True)), Losses()
    learn.fit(8, 1e-2, cbs=[SparsifyCallback(50, start_epoch=2, lth=True), watch])
    assert same(watch.inputs[2*N_BATCHES:], watch.inputs[:2*N_BATCHES]*3) and not same(watch.inputs[:N_BATCHES], watch.inputs[N_BATCHES:2*N_BATCHES])


def test_seeded_covers_criteria_that_draw():
    "A random mask in a seeded fit is repeatable too."
    masks = []
    for other in (1, 2):
        learn = small_learner()
        torch.manual_seed(other)
        sp_cb = SparsifyCallback(50, criteria='random_score', start_epoch=1, lth=True)
        learn.fit(4, 1e-2, cbs=[Seeded(3), sp_cb])
        masks.append(sp_cb.mask)
    assert same(dict(masks[0]), dict(masks[1]))


@pytest.mark.parametrize('seed', [-1, 1.5, '3', None])
def test_wrong_seeds(seed):
    with pytest.raises(ValueError, match='seed'): Seeded(seed)


def test_a_shortened_epoch_is_an_epoch():
    "Training that is cut short by CancelTrainException goes on with the next epoch's numbers."
    from fastai.callback.training import ShortEpochCallback
    ends = []
    for short in (False, True):
        learn, seeded, watch = small_learner(dls=small_dls(noise=True)), Seeded(4), Losses()
        learn.fit(2, 1e-2, cbs=[seeded, watch, *([ShortEpochCallback(.25, short_valid=False)] if short else [])])
        ends.append(watch)
    firsts = [[i for i, b in enumerate(w.batches) if b[1] == 0] for w in ends]
    assert len(ends[1].batches) < len(ends[0].batches)
    assert all(same(ends[0].inputs[a], ends[1].inputs[b]) for a, b in zip(*firsts))
