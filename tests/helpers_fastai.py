"Small learners, data and spies for the tests of what runs inside fastai."
import random
import threading
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
import torch.utils.data
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastcore.foundation import L
from torch import nn
from torch.amp import GradScaler, autocast

N_BATCHES, BATCH_SIZE = 4, 8
torch.set_num_threads(1) # on layers this small several threads only wait for each other, on a busy machine fifty times as long


class Items:
    "Points with labels; with `noise`, drawn anew each time from Python's, NumPy's and torch's generators."
    def __init__(self, n, noise=False, seed=0, shape=(8,)):
        g = torch.Generator().manual_seed(seed)
        self.x, self.noise = torch.randn(n, *shape, generator=g), noise
        self.y = self.x.flatten(1)[:, :3].argmax(1)

    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        x = self.x[i]
        if self.noise: x = x + .1*torch.randn(x.shape) + .1*float(np.random.randn()) + .1*random.random()
        return x, self.y[i]


def small_dls(n_batches=N_BATCHES, workers=0, noise=False, shape=(8,), kind='fastai', shuffle=True, train=None, **kwargs):
    train, valid = train or Items(n_batches*BATCH_SIZE, noise, shape=shape), Items(16, seed=1, shape=shape)
    if kind == 'fastai': return DataLoaders(DataLoader(train, bs=BATCH_SIZE, shuffle=shuffle, num_workers=workers), DataLoader(valid, bs=16))
    load = torch.utils.data.DataLoader
    if kind == 'torch with a generator': kwargs['generator'] = torch.Generator().manual_seed(5)
    return DataLoaders(load(train, batch_size=BATCH_SIZE, shuffle=shuffle, num_workers=workers, **kwargs), load(valid, batch_size=16))


def small_model(dropout=.2): return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


class Everything(nn.Module):
    "What keeps state or draws at random: embedding, a bare parameter, LSTM, attention, RMSNorm, batch norm, dropout."
    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(2, 6), nn.Parameter(torch.randn(8, 6))
        self.lstm, self.attn = nn.LSTM(6, 6, batch_first=True), nn.MultiheadAttention(6, 2, dropout=.2, batch_first=True)
        self.norm, self.fc, self.bn, self.drop, self.out = nn.RMSNorm(6), nn.Linear(6 + 8, 12), nn.BatchNorm1d(12), nn.Dropout(.3), nn.Linear(12, 3)

    def forward(self, x):
        h, _ = self.lstm(self.emb((x > 0).long()) + self.pos)
        h = self.norm(h + self.attn(h, h, h)[0]).mean(1)
        return self.out(self.drop(self.bn(self.fc(torch.cat([h, x], 1))).relu()))


class ConvNet(nn.Module):
    "Two convolutions, each with batch norm, and a head."
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2, self.fc = nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10), nn.Linear(10, 3)

    def forward(self, x): return self.fc(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().mean((2, 3)))


def small_learner(model=None, seed=1, dls=None, dropout=.2, metrics=accuracy, **kwargs):
    "The same learner each time, without progress bar and printing; model and data loaders may be functions, called after seeding."
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
    dls = small_dls() if dls is None else dls if isinstance(dls, DataLoaders) else dls()
    learn = Learner(dls, small_model(dropout) if model is None else model if isinstance(model, nn.Module) else model(),
                    loss_func=CrossEntropyLossFlat(), metrics=metrics, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def tensors_of(model): return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
def weights_of(sp_cb): return sp_cb.sparsifier.weights
def n_zeros(sp_cb): return sum(int((w == 0).sum()) for w in weights_of(sp_cb).values())


def same(a, b):
    "Are two nested things equal, tensors to the last bit?"
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
                and a.detach().cpu().numpy().tobytes() == b.detach().cpu().numpy().tobytes())
    if isinstance(a, dict) and isinstance(b, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple, L)) and isinstance(b, (list, tuple, L)): return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def different(a, b): return [n for n in a if not same(a[n], b[n])]


def is_masked(now, origin, mask):
    "Are kept values those of `origin` to the last bit, cut ones zero, and all that has no mask as in `origin`?"
    wrong = [n for n in origin if n not in mask and not same(now[n], origin[n])]
    for n, keep in mask.items():
        if not same(now[n][keep], origin[n][keep]) or now[n][~keep].any(): wrong.append(n)
    return wrong == [] or wrong


def opt_stats(opt):
    "An optimizer's state without fastai's marks on parameters."
    state = deepcopy(opt.state_dict()['state'])
    if isinstance(state, dict): return state
    return [{k: v for k, v in s.items() if k not in ('force_train', 'do_wd')} for s in state]


def is_empty(stats): return not any(stats) if isinstance(stats, list) else not stats


class Spy(Callback):
    "Write down the whole state at the beginning of each epoch, in the given order among the callbacks."
    def __init__(self, sp_cb, order): self.sp_cb, self._order, self.seen = sp_cb, order, {}

    @property
    def order(self): return self._order
    def look(self):
        return dict(tensors=tensors_of(self.learn.model), opt=opt_stats(self.learn.opt), lr=self.learn.opt.hypers[-1]['lr'],
                    mask={n: t.clone() for n, t in self.sp_cb.mask.items()}, position=self.sp_cb.position)

    def before_epoch(self): self.seen[self.learn.epoch] = self.look()
    def after_epoch(self): self.end = self.look()


class Losses(Callback):
    "Note the loss and the inputs of each training batch."
    order, run_valid, name = 200, False, 'watched' # as `learn.losses` it would be in the way of fastai's own
    def __init__(self): self.losses, self.inputs, self.batches = [], [], []
    def after_pred(self): self.inputs.append(self.learn.xb[0].clone())
    def after_loss(self):
        self.losses.append(self.learn.loss.item())
        self.batches.append((self.learn.epoch, self.learn.iter))


class Steps(Callback):
    "Count the optimizer's own steps, whoever makes them, and what is not zero after them though it is cut."
    order, run_valid = 56, False
    def __init__(self, sp_cb=None): self.sp_cb, self.n, self.n_leaks, self.checked = sp_cb, 0, 0, 0

    def before_fit(self):
        opt, step = self.learn.opt, self.learn.opt.step
        def counted(*args, **kwargs):
            self.n += 1
            return step(*args, **kwargs)
        opt.step = counted
        self._undo = lambda: delattr(opt, 'step')

    def after_fit(self): self._undo()

    def _check(self):
        if self.sp_cb is None or self.sp_cb.sparsifier is None: return
        params = dict(self.learn.model.named_parameters())
        for n, keep in self.sp_cb.mask.items():
            self.checked += int((~keep).sum())
            self.n_leaks += int((params[n].detach()[~keep] != 0).sum())

    def after_step(self): self._check()
    def after_batch(self): self._check()


class SkipSteps(Callback):
    "Skip the step of every second batch, as gradient scaling does after an overflow."
    order, run_valid = 10, False
    def before_fit(self): self.n_seen = 0
    def before_step(self):
        self.n_seen += 1
        if self.n_seen % 2: raise CancelStepException()


class CpuMixedPrecision(MixedPrecision):
    "fastai's mixed precision, with torch's scaler and autocast for the CPU; the gradients of some batches overflow."
    def __init__(self, overflow_at=(), **kwargs):
        super().__init__(**kwargs)
        self.overflow_at, self.n_seen, self.n_skipped = overflow_at, 0, 0
    def before_fit(self):
        self.autocast, self.scales = autocast('cpu', dtype=torch.bfloat16), L()
        self.learn.scaler = GradScaler('cpu', **self.kwargs)
    def before_step(self):
        self.n_seen += 1
        if self.n_seen - 1 in self.overflow_at: next(self.learn.model.parameters()).grad[0, 0] = float('inf')
        super().before_step()
    def after_cancel_step(self): self.n_skipped += 1


class RaiseAt(Callback):
    "Raise once, at a batch of an epoch."
    run_valid = False
    def __init__(self, exception, epoch, batch=1, event='before_batch'):
        self.exception, self.at, self.event, self.done = exception, (epoch, batch), event, False
        setattr(self, event, self._raise)

    def _raise(self):
        if self.done or (self.learn.epoch, self.learn.iter) != self.at: return
        self.done = True
        raise self.exception


class TakeTurns(Callback):
    "Let two fits in two threads make one batch each in turn."
    order, run_valid = 0, False
    def __init__(self, me, turn, log): self.me, self.turn, self.log = me, turn, log
    def before_batch(self):
        with self.turn['lock']:
            assert self.turn['lock'].wait_for(lambda: self.turn['next'] in (self.me, None), timeout=60)
            self.log.append(self.me)
    def after_batch(self): self._pass(1 - self.me)
    def _pass(self, to):
        with self.turn['lock']:
            if self.turn['next'] is not None: self.turn['next'] = to
            self.turn['lock'].notify_all()
    def leave(self):
        with self.turn['lock']:
            self.turn['next'] = None
            self.turn['lock'].notify_all()


def new_turn(): return dict(lock=threading.Condition(), next=0)


@contextmanager
def generators_kept():
    "Leave the global generators as they were."
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try: yield
    finally: random.setstate(python); np.random.set_state(numpy); torch.set_rng_state(cpu)
