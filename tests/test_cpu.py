"`FastCPU` computes as asked, and leaves nothing behind, whatever happens."
import pickle
import random
import threading
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import cycle
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.schedule import lr_find # noqa: F401, a method of Learner
from fastai.data.load import DataLoader
from fastai.data.transforms import CategoryMap
from fastai.learner import Learner
from fastai.metrics import accuracy
from torch import nn

from lth_nb import cpu
from lth_nb.cpu import FastCPU, channels_last_weights, fast_bf16
from lth_nb.data import ImageArray, array_dls


def noise_dls(n=40):
    "Images of noise, of 16 by 16 pixels in three colours and 10 classes."
    rng, vocab = np.random.default_rng(0), CategoryMap([str(i) for i in range(10)], sort=False)
    images, labels = rng.integers(0, 256, (2*n, 3, 16, 16), dtype=np.uint8), rng.integers(0, 10, 2*n)
    train, valid = (ImageArray(images, labels, vocab, np.arange(i*n, (i + 1)*n), i) for i in (0, 1))
    return array_dls(train, valid, [.5]*3, [.3]*3, bs=8, device='cpu')


def net(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


@pytest.fixture
def dls(): return noise_dls()


@pytest.fixture
def learn(dls, tmp_path):
    torch.manual_seed(0)
    learn = Learner(dls, net(), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): yield learn


# --- what is switched on

@pytest.fixture
def ask():
    "`fast_bf16`, as if it had never been asked; it is asked anew after the test."
    fast_bf16.cache_clear()
    yield fast_bf16
    fast_bf16.cache_clear()


@pytest.mark.parametrize('float32, bf16, fast', [([2, 2], [1, 1], True), ([2, 2], [1.7, 1.7], False), ([2, 2], [3, 3], False), ([9, 2, 9], [9, 1.7, 9], False), ([2, 9, 9], [9, 9, 1], True)],
                         ids=['faster', 'hardly faster', 'slower', 'busy, hardly faster', 'busy, faster'])
def test_bfloat16_is_for_processors_that_it_makes_faster(float32, bf16, fast, ask, monkeypatch):
    "By the shortest times: what else a computer does only makes them longer."
    times = {False: cycle(float32), True: cycle(bf16)}
    monkeypatch.setattr('lth_nb.cpu._seconds', lambda bf16: next(times[bf16]))
    assert ask() is fast and (FastCPU().bf16, FastCPU().channels_last) == (fast, fast)
    monkeypatch.setattr('lth_nb.cpu._seconds', lambda bf16: 1/0)
    assert ask() is fast # asked once


@pytest.mark.parametrize('around', [torch.no_grad, torch.inference_mode, partial(torch.device, 'meta'), partial(torch.autocast, 'cpu', torch.bfloat16)])
def test_bfloat16_is_timed_wherever_it_is_asked(around, ask, monkeypatch):
    monkeypatch.setattr('lth_nb.cpu._seconds', spied := Mock(wraps=cpu._seconds))
    state = torch.get_rng_state()
    with around(): assert ask() in (True, False)
    assert torch.get_rng_state().equal(state) and {bool(c.args[0]) for c in spied.call_args_list} == {True, False}


def test_bfloat16_is_timed_against_float32(ask, monkeypatch):
    "Also where another type is the default, and in the layouts that the callback uses."
    seen, conv = [], nn.Conv2d.forward
    def forward(self, x):
        y = conv(self, x)
        seen.append((y.dtype, x.is_contiguous(memory_format=torch.channels_last), self.weight.is_contiguous(memory_format=torch.channels_last)))
        return y
    monkeypatch.setattr(nn.Conv2d, 'forward', forward)
    torch.set_default_dtype(torch.float64)
    try: ask()
    finally: torch.set_default_dtype(torch.float32)
    assert set(seen) == {(torch.float32, False, False), (torch.bfloat16, True, True)}


def test_channels_last_follows_bf16_unless_said_otherwise():
    found = {(a, b): (FastCPU(a, b).bf16, FastCPU(a, b).channels_last) for a in (True, False) for b in (None, True, False)}
    assert all(v == (a, a if b is None else b) for (a, b), v in found.items())
    assert repr(FastCPU(True, False)) == 'FastCPU(bf16=True, channels_last=False)'


@pytest.mark.parametrize('name', ['bf16', 'channels_last'])
@pytest.mark.parametrize('value', ['yes', 1, 0, torch.bfloat16])
def test_wrong_arguments(name, value):
    with pytest.raises(ValueError, match=f'{name}='): FastCPU(**{name: value})


# --- nothing is left behind

class At(Callback):
    "Call `do` at an event."
    def __init__(self, event, do, order=0):
        self.order = order
        setattr(self, event, do)


def raise_(e): raise e


def is_clean(learn):
    weights = [o for o in learn.model.parameters() if o.dim() == 4]
    return not torch.is_autocast_enabled('cpu') and all(o.is_contiguous() and (o.grad is None or o.grad.is_contiguous()) for o in weights)


def nothing_left(learn): return is_clean(learn) and not [o for o in vars(learn) if o.startswith('_do') or o == 'fast_cpu']


def spy(learn):
    "Record how each pass of the first layer computes."
    seen = []
    note = lambda m, i, o: seen.append((learn.training, o.dtype, i[0].is_contiguous(memory_format=torch.channels_last), # noqa: E731
                                        m.weight.is_contiguous(memory_format=torch.channels_last)))
    return seen, learn.model[0].register_forward_hook(note)


EVENTS = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'before_step', 'after_step',
          'after_batch', 'before_validate', 'after_epoch', 'after_fit']


@pytest.mark.parametrize('event', EVENTS)
def test_an_error_at_any_event_leaves_nothing(event):
    learn, calls = Learner(noise_dls(8), net()), []
    for order in (-100, 100):
        for error in (RuntimeError('x'), KeyboardInterrupt('x'), CancelFitException()):
            def fail():
                calls.append(event)
                raise error
            with learn.no_bar(), learn.no_logging(), suppress(RuntimeError, KeyboardInterrupt, CancelFitException):
                learn.fit(1, cbs=[FastCPU(bf16=True), At(event, fail, order)])
            assert nothing_left(learn)
    assert len(calls) >= 6


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelBatchException])
def test_an_error_inside_the_network(dls, error):
    class Broken(nn.Module):
        def forward(self, x):
            calls.append(torch.is_autocast_enabled('cpu'))
            raise error('x')
    calls = []
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 8, 3), Broken()), cbs=FastCPU(bf16=True))
    with learn.no_bar(), learn.no_logging():
        for call in (lambda: learn.fit(1), learn.validate, learn.get_preds):
            with suppress(Exception, KeyboardInterrupt): call()
            assert calls and is_clean(learn)
            calls.clear()


def test_an_error_in_the_loader(learn, monkeypatch):
    monkeypatch.setattr(learn.dls.train, 'create_batches', lambda samps: raise_(RuntimeError('no batch')))
    with pytest.raises(RuntimeError, match='no batch'): learn.fit(1, cbs=FastCPU(bf16=True))
    assert nothing_left(learn)


def test_training_and_validation_compute_in_bfloat16(learn):
    seen, hook = spy(learn)
    preds, losses = [], []
    learn.fit(1, cbs=[FastCPU(bf16=True), At('after_pred', lambda: preds.append(learn.pred.dtype), order=-9.5),
                      At('after_pred', lambda: preds.append(learn.pred.dtype)), At('after_loss', lambda: losses.append(
                          (learn.loss.dtype, torch.is_autocast_enabled('cpu'))))])
    assert {o[0] for o in seen} == {True, False} and {o[1:] for o in seen} == {(torch.bfloat16, True, True)}
    assert set(preds[1::2]) == {torch.float32} and set(losses) == {(torch.float32, False)}
    assert nothing_left(learn)
    seen.clear()
    learn.fit(1)
    assert {o[1:] for o in seen} == {(torch.float32, False, False)} # the next fit is as ever
    hook.remove()


def test_only_what_is_asked(learn):
    seen, hook = spy(learn)
    for cb, expected in ((FastCPU(bf16=False), (torch.float32, False, False)), (FastCPU(bf16=True), (torch.bfloat16, True, True)),
                         (FastCPU(bf16=False, channels_last=True), (torch.float32, True, True)),
                         (FastCPU(bf16=True, channels_last=False), (torch.bfloat16, False, False)),
                         (FastCPU(), (torch.bfloat16, True, True) if fast_bf16() else (torch.float32, False, False))):
        seen.clear()
        learn.fit(1, cbs=cb)
        assert {o[1:] for o in seen} == {expected}
    hook.remove()


def test_state_stays_plain(learn):
    keys = list(learn.model.state_dict())
    weights = [id(o) for o in learn.model.parameters()]
    inside = []
    learn.fit(1, cbs=[FastCPU(bf16=True), At('after_batch', lambda: inside.append({o.dtype for o in learn.model.state_dict().values()}))])
    assert all(o == {torch.float32, torch.int64} for o in inside) # int64: batch norm counts its batches
    assert list(learn.model.state_dict()) == keys and [id(o) for o in learn.model.parameters()] == weights
    assert {v.dtype for s in learn.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)} == {torch.float32}


def test_with_channels_last_alone_training_is_the_same_to_rounding(dls):
    ends = []
    for cb in (None, FastCPU(bf16=False, channels_last=True), FastCPU(bf16=True)):
        torch.manual_seed(0)
        learn = Learner(dls, net(), cbs=cb)
        dls.train.rng = random.Random(0)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
        ends.append(torch.cat([o.detach().flatten() for o in learn.model.parameters()]))
    assert torch.allclose(ends[0], ends[1], atol=1e-4)
    assert not torch.allclose(ends[0], ends[2], atol=1e-7) and torch.allclose(ends[0], ends[2], atol=3e-2)


def test_the_rest_of_the_learner(learn):
    learn.add_cb(FastCPU(bf16=True))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.lr_find(num_it=5, show_plot=False)
    assert is_clean(learn) and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    seen, hook = spy(learn)
    learn.validate()
    preds, _, losses = learn.get_preds(with_loss=True)
    learn.predict(learn.dls.valid_ds.images[3])
    hook.remove()
    assert {o[1:] for o in seen} == {(torch.bfloat16, True, True)} and preds.dtype == losses.dtype == torch.float32 and is_clean(learn)


def test_attached_twice_moved_and_removed(learn, dls):
    outer, inner = FastCPU(bf16=True), FastCPU(bf16=True)
    learn.add_cb(outer)
    learn.fit(1, cbs=inner)
    seen, hook = spy(learn)
    learn.fit(1)
    assert {o[1] for o in seen} == {torch.bfloat16} # the first is still there
    learn.remove_cb(outer)
    seen.clear()
    learn.fit(1)
    assert {o[1] for o in seen} == {torch.float32} and nothing_left(learn)
    hook.remove()
    other = Learner(dls, net(), cbs=outer)
    learn.add_cb(outer) # the same callback in another learner
    assert not [o for o in vars(other) if o.startswith('_do')]


def test_a_callback_that_does_not_run_does_nothing(learn):
    cb = FastCPU(bf16=True)
    seen, hook = spy(learn)
    learn.fit(1, cbs=[cb, At('before_fit', lambda: setattr(cb, 'run', False))])
    hook.remove()
    assert {o[1:3] for o in seen} == {(torch.float32, False)}


def test_copies_of_a_learner(learn):
    learn.add_cb(FastCPU(bf16=True))
    for other in (deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        seen, hook = spy(other)
        with other.no_bar(), other.no_logging(): other.fit(1)
        hook.remove()
        assert {o[1] for o in seen} == {torch.bfloat16} and is_clean(other)
        assert other._do_fit.args[1].__self__ is other and other.fast_cpu.learn is other


def test_no_gpu(learn):
    learn.dls.device = learn.model.to('meta') and torch.device('meta') # stands for any device that is not the CPU
    with pytest.raises(ValueError, match='learn.to_bf16'): learn.fit(1, cbs=FastCPU())
    assert not [o for o in vars(learn) if o.startswith('_do')]


def test_other_loaders_models_and_threads(learn):
    points = DataLoader([(torch.randn(4), torch.tensor(1)) for _ in range(8)], bs=4)
    dls = type(learn.dls)(points, points)
    lists = type('Two', (nn.Linear,), {'forward': lambda self, x: {'out': [nn.Linear.forward(self, x), x.long()]}})(4, 2)
    other = Learner(dls, lists, loss_func=lambda p, y: p['out'][0].square().mean(), cbs=FastCPU(bf16=True))
    kinds = []
    with other.no_bar(), other.no_logging(): other.fit(1, cbs=At('after_pred', lambda: kinds.append([o.dtype for o in other.pred['out']])))
    assert kinds and all(o == [torch.float32, torch.int64] for o in kinds)
    thread = threading.Thread(target=lambda: learn.fit(1, cbs=FastCPU(bf16=True)))
    thread.start(), thread.join()
    assert nothing_left(learn)


def test_weights_of_other_shapes_are_left_alone():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv1d(1, 2, 3), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Conv2d(3, 4, 3),
                          nn.Conv2d(3, 4, 3))
    model[4].weight.data = model[4].weight.data.transpose(2, 3) # an order of the user's own
    before = [o.stride() for o in model.parameters()]
    with pytest.raises(RuntimeError), channels_last_weights(model):
        assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
        raise RuntimeError
    assert [o.stride() for o in model.parameters()] == before
