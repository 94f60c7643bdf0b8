"Small experiments, what they leave as one value that compares to the last bit, and processes that run them."
import json
import multiprocessing
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from helpers_fastai import ConvNet, same, small_dls, small_model
from torch import nn

from lth_nb.arms import dense, imp, shuffled
from lth_nb.fitting import set_generators
from lth_nb.experiment import Experiment
from lth_nb.recipe import Recipe, digits_learner
from lth_nb.results import Results
from lth_nb.schedule import iterative
from lth_nb.store import Store


# ------------------------------------------------------------------ learners, written where a user would write them

def points(n_batches=4, noise=True, dropout=.2, metrics=(accuracy,), cbs=()):
    "Batch norm, dropout, and items that are drawn anew from every generator."
    dls = small_dls(n_batches, noise=noise)
    return Learner(dls, small_model(dropout), loss_func=CrossEntropyLossFlat(), metrics=list(metrics), cbs=[cb() for cb in cbs])


def pictures(n_batches=3):
    "Convolutions, whose filters have followers."
    return Learner(small_dls(n_batches, shape=(1, 4, 4)), ConvNet(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


def lenet(n_batches=1):
    "LeNet-300-100 on 784 random numbers; one batch an epoch, so that many rounds take no time."
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    for layer in layers[::2]: nn.init.normal_(layer.weight, std=.1)  # of one size, or globally the first layer is cut to nothing
    return Learner(small_dls(n_batches, shape=(784,)), nn.Sequential(*layers), loss_func=CrossEntropyLossFlat())


def seed_inside(seed): # what `torch.initial_seed` says inside a learner's function
    set_generators(seed, 0)
    return torch.initial_seed()


def digits(epochs=2, **kwargs): return Recipe(digits_learner, epochs, **{'lr': 2e-3, 'options': dict(hidden=(20,)), **kwargs})
def of_points(epochs=2, options=None, **kwargs): return Recipe(points, epochs, **{'lr': 1e-2, 'options': options or {}, **kwargs})


# ------------------------------------------------------------------ what a run leaves

def _without_time(row): return {k: v for k, v in row.items() if k != 'seconds'}
def _lines(file): return [_without_time(json.loads(line)) for line in file.read_text().splitlines()]


def states(path): return {str(f.relative_to(path)): torch.load(f, weights_only=True) for f in sorted(Path(path).glob('segments/*/state-*.pt'))}
def masks(path): return {f.name: f.read_bytes() for f in sorted(Path(path).glob('masks/*.npz'))}


def left(path):
    "All that a run leaves and that must not depend on what happened to it."
    path, results = Path(path), Results.load(path)
    key = lambda row: (row['arm'], row['level'], row['seed'], row.get('epoch', 0))
    return dict(rows=sorted(results.rows, key=key), history=sorted(map(_without_time, results.history), key=key), failed=results.failed,
                epochs={str(f.relative_to(path)): _lines(f) for f in sorted(path.glob('segments/*/epochs.jsonl'))}, masks=masks(path), states=states(path))


def differences(a, b, path=''):
    "Where two nested things differ; empty if they are equal to the last bit."
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f'{path}/{k} is only in {"one" if k in a else "the other"}' for k in a.keys() ^ b.keys()]
        return missing + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f'{path}/{k}')]
    return [] if same(a, b) else [f'{path}: {a!r:.300} != {b!r:.300}']


def store_of(exp, path): return Store(Path(path).absolute(), exp._seen[1])
def state_of(exp, path, arm, level, seed): return store_of(exp, path).load(exp.networks[arm, level, seed])
def row_of(results, arm, level, seed): return next(r for r in results.rows if (r['arm'], r['level'], r['seed']) == (arm if isinstance(arm, str) else arm.name, level, seed))


# ------------------------------------------------------------------ what it trains

@contextmanager
def trained_batches():
    "Count the batches that any learner trains on, and the epochs it validates."
    counted, plain, plain_valid = dict(train=0, valid=0), Learner._do_one_batch, Learner._do_epoch_validate
    def _do_one_batch(self):
        counted['train'] += self.training
        return plain(self)
    def _do_epoch_validate(self, *args, **kwargs):
        counted['valid'] += 1
        return plain_valid(self, *args, **kwargs)
    Learner._do_one_batch, Learner._do_epoch_validate = _do_one_batch, _do_epoch_validate
    try: yield counted
    finally: Learner._do_one_batch, Learner._do_epoch_validate = plain, plain_valid


class Rounds(Callback):
    "Note the mask and the mean training loss and metrics of each epoch of a fit with `SparsifyCallback`."
    order, run_valid = 60, False
    def __init__(self, sp_cb): self.sp_cb, self.masks, self.values = sp_cb, [], []
    def before_train(self):
        self._losses = []
        if not self.masks or self.masks[-1] is not self.sp_cb.mask: self.masks.append(self.sp_cb.mask)
    def after_loss(self): self._losses.append((len(self.learn.yb[0]), self.learn.loss.item()))
    def after_epoch(self):
        mean = sum(n*loss for n, loss in self._losses)/sum(n for n, _ in self._losses)  # the recorder's is smoothed over the whole fit
        self.values.append([mean, *self.learn.recorder.values[-1][1:]])


# ------------------------------------------------------------------ runs in processes of their own

def on_digits(seeds=(0,)):
    "Arms that share segments, rewind between and inside epochs, and keep what they built on."
    ticket = imp(rewind_epoch=1)
    return Experiment(digits(), [dense(), ticket, imp(rewind_step=30, optimizer='restore'), shuffled(of=ticket)], iterative(2), 50, seeds)


PROCESSES = multiprocessing.get_context('forkserver') # its children have imported everything and computed nothing
PROCESSES.set_forkserver_preload(['lth_nb.experiment'])


def _run(make, path, pipe, kwargs):
    torch.set_num_threads(1)
    exp = make()
    pipe.send('ready')
    pipe.recv()
    with trained_batches() as counted: results = exp.run(path, progress=False, **kwargs)
    pipe.send((counted['train'], results.failed))


class Child:
    "A process that runs an experiment, once it is told to."
    def __init__(self, path, make=on_digits, **kwargs):
        self.pipe, other = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=_run, args=(make, str(path), other, kwargs))
        self.process.start()
        assert self.pipe.recv() == 'ready'

    def go(self):
        self.pipe.send('go')
        return self

    def end(self, timeout=300): # how many batches it has trained on, and what failed
        assert self.pipe.poll(timeout), 'the run does not end'
        found = self.pipe.recv()
        self.process.join(timeout)
        assert self.process.exitcode == 0
        return found

    def kill(self, after): # whether it was still running
        self.process.join(after)
        alive = self.process.exitcode is None
        try:
            if alive: os.kill(self.process.pid, 9)
        except ProcessLookupError: alive = False # it has just ended by itself
        self.process.join()
        return alive
