"What the tests of the core share: the device, small networks and data, and what it means that a mask holds."
from dataclasses import is_dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import nn

torch.set_num_threads(1)  # the tests run in as many processes as there are cores

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)


@pytest.fixture(autouse=True)
def seeded():
    "Begin every test of a module that imports this with the same random numbers."
    torch.manual_seed(0)


@pytest.fixture
def device():
    "Where the models are."
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def conv_net(device='cpu'):
    "Make a small convolutional network for images of 3 × 8 × 8 and five classes."
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
                         nn.Flatten(), nn.Linear(72, 5)).to(device)


def images(device='cpu', seed=0, n=8):
    "Draw a batch for `conv_net`."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g).to(device), torch.randint(5, (n,), generator=g).to(device)


def train_step(model, optimizer, seed=0):
    "Make one step on the batch of this seed."
    x, y = images(next(model.parameters()).device, seed)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def n_cut(mask):
    "Count what a mask cuts, followers left out."
    return mask.n_total - mask.n_kept


def assert_held(sp, model=None):
    "Check that what the mask cuts is exactly zero in the model, and that something is cut."
    from lth_nb.rewind import unwrap
    tensors = dict(unwrap(model or sp.model).named_parameters(remove_duplicate=False))
    assert n_cut(sp.mask) > 0
    for name, keep in sp.mask.items():
        assert (tensors[name][~keep] == 0).all(), f'{name} has values where it is cut'


def equal(a, b):
    "Compare nested containers bit for bit; NaN equals NaN."
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray): return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if is_dataclass(a): return type(a) is type(b) and equal(vars(a), vars(b))
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)): return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return a == b
