"Models, loaders and optimizers that are not the usual ones: pruned and rewound like those, or refused before anything is lost."
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import ranger
from helpers_fastai import generators_kept, same, small_dls, small_model
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lth_nb.callback import SparsifyCallback
from lth_nb.fitting import MaskCallback, Seeded
from lth_nb.mask import Mask
from lth_nb.rewind import RewindPoint
from lth_nb.schedule import Schedule, dsd, iterative, one_shot
from lth_nb.selection import prunable
from lth_nb.sparsifier import Sparsifier
from lth_nb.ticket import Ticket


@pytest.fixture(autouse=True)
def quiet():
    with generators_kept(): yield


def learner(model=None, **kwargs): return Learner(small_dls(4), model or small_model(0.), loss_func=CrossEntropyLossFlat(), **kwargs)
def fit(learn, n_epoch, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, 1e-2, cbs=list(cbs))


def step(model, *optimizers):
    "One step of training by all optimizers."
    torch.manual_seed(0)
    first = next(p for p in model.parameters() if p.ndim > 1)
    nn.functional.cross_entropy(model(torch.randn(32, first.shape[1])), torch.randint(2, (32,))).backward()
    for o in optimizers: o.step(); o.zero_grad()


# ------------------------------------------------------------------ masks

@pytest.mark.parametrize('norm', [True, False])
def test_filters_that_come_back_train_again(norm):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), *[nn.BatchNorm1d(16)]*norm, nn.ReLU(), nn.Linear(16, 2))
    sparsifier, optimizer = Sparsifier(model, 'filter', 'local', layers='0.weight', batch=torch.randn(4, 8)), torch.optim.SGD(model.parameters(), .1)
    sparsifier.attach(optimizer)
    step(model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparsifier.prune(50)
    cut = ~sparsifier.mask['0.weight'].any(1)
    step(model, optimizer)
    sparsifier.prune(0)
    back = {n: p.detach().clone() for n, p in model.named_parameters() if n in sparsifier.tensors}
    assert cut.sum() == 8 and all(torch.equal(t[cut], before[n][cut]) for n, t in back.items()) and {'0.weight', '0.bias'} <= {*back}
    step(model, optimizer)
    assert (model[0].weight[cut] != back['0.weight'][cut]).any(1).sum() > 4 # a ReLU may be silent for all items of a batch


def test_dense_sparse_dense_leaves_no_filter_dead():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    learn = Learner(small_dls(4), model, loss_func=CrossEntropyLossFlat())
    fit(learn, 4, SparsifyCallback(50, 'filter', 'local', schedule=dsd, layers='0.weight'))
    assert (model[0].weight != 0).any(1).all()


@pytest.mark.parametrize('choice', ['a', 'b.weight', 'b'])
def test_what_is_ignored_is_not_cut_under_its_other_name(choice):
    model = nn.ModuleDict(dict(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4)))
    model.b.weight = model.a.weight
    found = prunable(model, ignore=choice)
    assert list(found.weights) == ['c.weight'] and 'which is ignored' in ' '.join(found.notes.values())


@pytest.mark.parametrize('granularity', ['row', 'column'])
def test_a_mask_that_tears_units_is_refused(granularity):
    model = nn.Sequential(nn.Linear(10, 10))
    torn, whole = Mask({'0.weight': torch.rand(10, 10) > .5}), Mask({'0.weight': (torch.arange(10) > 4).expand(10, 10) if granularity == 'column' else (torch.arange(10) > 4)[:, None].expand(10, 10)})
    with pytest.raises(ValueError, match='cuts parts of what granularity'): Sparsifier(model, granularity, 'local', mask=torn).prune(70)
    sparsifier = Sparsifier(model, granularity, 'local', mask=whole)
    sparsifier.prune(70)
    assert not (sparsifier.mask['0.weight'] & ~whole['0.weight']).any() and sparsifier.mask.n_kept == 30
    assert Sparsifier(model, granularity, 'local', mask=torn).mask == torn # to hold it is no harm
    Sparsifier(model, mask=torn).prune(70) # nor to go on weight by weight


def test_an_empty_weight_is_left_out():
    model = nn.ModuleDict(dict(none=nn.Linear(0, 4), some=nn.Linear(4, 4)))
    found = Sparsifier(model)
    found.prune(50)
    assert found.selection.notes == {'none.weight': 'empty'} and found.mask.sparsity == 50 and 'some' in repr(found.report())


def test_a_weight_that_is_cut_is_not_said_to_be_spared():
    class Scaled(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = torch.tensor(2.)
    assert prunable(nn.Sequential(Scaled(4, 4))).notes == {}
    computed = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert list(prunable(computed).notes) == ['0.weight']
    partly = nn.Sequential(nn.utils.weight_norm(nn.LSTM(4, 4), 'weight_hh_l0'))
    assert list(prunable(partly).weights) == ['0.weight_ih_l0'] and list(prunable(partly).notes) == ['0.weight_hh_l0']


def test_heads_that_share_their_filters_are_silent_together():
    one, two = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
    two.weight = one.weight
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = one, two
        def forward(self, x): return torch.cat([self.one(x), self.two(x)])
    model, x = Heads(), torch.randn(2, 3, 8, 8)
    Sparsifier(model, 'filter', batch=x).prune(50)
    silent = ~one.weight.flatten(1).any(1)
    assert silent.sum() == 4 and not model(x)[:, silent].any()


def test_a_decoder_that_shares_its_encoders_filters_keeps_its_bias():
    encoder, decoder = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3)
    decoder.weight = encoder.weight
    model, x = nn.Sequential(encoder, decoder), torch.randn(2, 3, 8, 8)
    sparsifier = Sparsifier(model, 'filter', layers=nn.Conv2d, batch=x)
    sparsifier.prune(50)
    assert sparsifier.followers == {'0.weight': ['0.bias']} and decoder.bias.all()


# ------------------------------------------------------------------ what is rewound

class Caching(nn.Module):
    "Fills buffers in the first forward pass, of which the second grows; the third lies in one number's memory."
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer('first', None, persistent=False)
        self.register_buffer('grows', torch.zeros(1))
        self.register_buffer('expanded', torch.ones(1).expand(4))
    def forward(self, x):
        if not hasattr(self, 'late'): self.register_buffer('late', torch.ones(2), persistent=False)
        self.first = torch.ones(3)
        self.grows = torch.zeros(len(self.grows) + 1)
        return self.linear(x)


def test_buffers_that_training_makes_are_gone_after_a_rewind():
    model = Caching()
    point = RewindPoint.take(model)
    weight = model.linear.weight.detach().clone()
    model(torch.randn(4, 2))
    filled = RewindPoint.take(model)
    with torch.no_grad(): model.linear.weight.zero_()
    point.restore(model)
    assert model.first is None and not hasattr(model, 'late') and model.grows.shape == (1,) and torch.equal(model.linear.weight, weight) and torch.equal(model.expanded, torch.ones(4))
    filled.restore(model)
    assert model.first.shape == (3,) and model.grows.shape == (2,)
    replace(filled, model=replace(filled.model, tensors={n: t for n, t in filled.model.tensors.items() if n != 'first'}, empty=None)).restore(model)
    assert model.first.shape == (3,) # what a file does not tell of is left alone
    model.register_buffer('more', torch.zeros(2))
    with pytest.raises(ValueError, match='more is not in the rewind point'): filled.restore(model)


def test_a_ticket_of_a_model_that_caches_is_found():
    learn = learner(nn.Sequential(nn.Linear(8, 2), Caching(), nn.Linear(2, 3)))
    fit(learn, 2, callback := SparsifyCallback(50, schedule=one_shot, start_epoch=1, lth=True, reset_end=True))
    assert callback.mask.sparsity == 50 and learn.model[1].first is None


def test_a_buffer_with_two_names_is_rewound_under_both():
    model = nn.ModuleDict(dict(a=nn.BatchNorm1d(2), b=nn.BatchNorm1d(2)))
    model.b.running_mean = model.a.running_mean
    point = RewindPoint.take(model)
    model.a.running_mean.fill_(5)
    point.restore(model)
    assert model.b.running_mean is model.a.running_mean and not model.a.running_mean.any()


def test_generators_that_cannot_be_rewound_are_left_alone():
    class Own(RandomSampler):
        def __init__(self, data): super().__init__(data); self.rng = np.random.RandomState(0)
    data, model = torch.arange(8.), nn.Linear(2, 2)
    RewindPoint.take(model, loaders=[loader := DataLoader(data, 4, sampler=Own(data))]).restore(model, loaders=[loader])


def test_the_sampler_orders_and_not_the_loader():
    data, model = torch.arange(32.), nn.Linear(2, 2)
    loader = DataLoader(data, 4, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(3)), generator=torch.Generator().manual_seed(4))
    point = RewindPoint.take(model, loaders=[loader])
    first = torch.cat(list(loader))
    point.restore(model, loaders=[loader])
    assert torch.equal(first, torch.cat(list(loader)))


@pytest.mark.parametrize('made', [dict(sampler=lambda d, g: RandomSampler(d, generator=g), batch_size=4),
                                  dict(batch_sampler=lambda d, g: BatchSampler(RandomSampler(d, generator=g), 4, False))], ids=['sampler', 'batch_sampler'])
def test_the_order_is_rewound_wherever_its_generator_lies(made):
    data, model = torch.arange(32.), nn.Linear(2, 2)
    loader = DataLoader(data, **{k: v(data, torch.Generator().manual_seed(3)) if callable(v) else v for k, v in made.items()})
    point = RewindPoint.take(model, loaders=[loader])
    first = torch.cat(list(loader))
    assert not torch.equal(first, torch.cat(list(loader)))
    point.restore(model, loaders=[loader])
    assert torch.equal(first, torch.cat(list(loader)))


def test_masks_hold_after_the_step_of_every_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    one, two = torch.optim.Adam(model[0].parameters(), .1), torch.optim.Adam(model[2].parameters(), .1)
    sparsifier = Sparsifier(model)
    with pytest.warns(UserWarning, match='does not hold 2.weight'): sparsifier.attach(one)
    sparsifier.attach(one, others=[two])
    step(model, one, two)
    point = sparsifier.take()
    for how, kept in (('keep', 2), ('restore', 1), ('fresh', 0)):
        step(model, one, two)
        sparsifier.prune(50, rewind_to=point, optimizer=how)
        for o in (one, two): assert [int(s['step']) for s in o.state.values()] == [kept]*2*(how != 'fresh')
        step(model, one, two)
        assert not any(model.get_parameter(n)[~m].any() for n, m in sparsifier.mask.items())
        point.restore(model, one, 'restore', others=[two])


def test_an_optimizer_that_has_grown_is_refused_before_anything_is_lost():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model[0].parameters(), .1)
    sparsifier = Sparsifier(model, layers='0.weight')
    sparsifier.attach(optimizer)
    point = sparsifier.take()
    optimizer.add_param_group(dict(params=list(model[2].parameters())))
    step(model, optimizer)
    trained = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match='other groups of parameters'): sparsifier.prune(50, rewind_to=point)
    assert same(trained, dict(model.named_parameters())) and not sparsifier.mask.sparsity


def test_what_an_optimizer_keeps_beside_its_state_is_fresh_too():
    learn = learner(opt_func=ranger)
    counts = {}
    class Look(Callback):
        order = 56
        def before_batch(self): counts.setdefault((self.epoch, self.iter), self.learn.opt.count)
    fit(learn, 4, Seeded(0), SparsifyCallback(50, schedule=one_shot, start_epoch=3, lth=True, rewind_epoch=1), Look())
    assert counts[1, 0] == 4 and counts[3, 0] == 0


class Counting(torch.optim.SGD):
    "Keeps a count of its steps beside its state."
    n = 0
    def step(self, closure=None):
        self.n += 1
        return super().step(closure)
    def state_dict(self): return {**super().state_dict(), 'n': self.n}
    def load_state_dict(self, state): self.n = state['n']; super().load_state_dict({k: v for k, v in state.items() if k != 'n'})


@pytest.mark.parametrize('how, n', [('fresh', 1), ('restore', 1), ('keep', 6)])
def test_what_a_torch_optimizer_keeps_is_no_more_trained_than_the_point(how, n):
    model = nn.Linear(4, 2)
    optimizer = Counting(model.parameters(), .1, momentum=.9)
    step(model, optimizer)
    point = RewindPoint.take(model, optimizer)
    for _ in range(5): step(model, optimizer)
    point.restore(model, optimizer, how)
    assert optimizer.n == n


# ------------------------------------------------------------------ refused, or ended, before training

def test_two_callbacks_do_not_undo_each_other():
    def one(layer, **kwargs): return SparsifyCallback(50, layers=layer, schedule=iterative, start_epoch=1, **kwargs)
    with pytest.raises(ValueError, match='two of this callback'): fit(learner(), 3, one('0.weight', lth=True), one('4.weight'))
    learn = learner()
    fit(learn, 4, a := one('0.weight'), b := one('4.weight')) # without rewinding they go together
    assert a.mask.sparsity == b.mask.sparsity == 50 and all(not learn.model.get_parameter(n)[~m].any() for c in (a, b) for n, m in c.mask.items())


def test_a_mask_that_is_held_stays_through_the_rewinds_of_another():
    learn = learner()
    held = Sparsifier(learn.model, layers='4.weight')
    held.prune(50)
    fit(learn, 3, MaskCallback(held), ticket := SparsifyCallback(50, layers='0.weight', start_epoch=1, schedule=one_shot, lth=True, reset_end=True))
    fit(learn, 2, ticket, other := SparsifyCallback(75, layers='4.weight', start_epoch=1, schedule=one_shot)) # finished, it only holds
    assert held.mask.sparsity == ticket.mask.sparsity == 50 and other.mask.sparsity == 75
    assert all(not learn.model.get_parameter(n)[~m].any() for mask in (held.mask, ticket.mask, other.mask) for n, m in mask.items())


def test_a_schedule_that_asks_for_too_much_is_refused_by_the_plan():
    with pytest.raises(ValueError, match='schedule=104'): SparsifyCallback(80, schedule=Schedule(lambda p: 1.3*p, n_steps=4)).plan(learner(), 8)


class Enough(Callback):
    order = -1
    def before_fit(self): raise CancelFitException


def test_a_fit_that_ends_before_it_begins_ends_quietly():
    learn, callback = learner(), SparsifyCallback(50, schedule=one_shot, start_epoch=1, lth=True, reset_end=True)
    fit(learn, 2, Enough(), callback)
    assert callback.order == 55 # before the progress bar writes its header
    fit(learn, 2, callback)
    trained = learn.model[0].weight.detach().clone()
    fit(learn, 2, Enough(), callback)
    assert callback.mask.sparsity == 50 and torch.equal(trained, learn.model[0].weight)


def test_units_that_cannot_be_cut_to_nothing_are_not_refused():
    "90 % of two rows is one row, and not two."
    learn = learner(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3)))
    fit(learn, 2, callback := SparsifyCallback(90, 'row', 'local', layers='1.weight', schedule=one_shot, start_epoch=1))
    assert callback.mask.sparsity == 50


def test_a_seed_may_be_numpys(tmp_path):
    learn = learner()
    fit(learn, 2, callback := SparsifyCallback(50, schedule=one_shot, start_epoch=1, lth=True, seed=np.int64(3)))
    with pytest.raises(ValueError, match='seed=3.0 is not a whole number'): Sparsifier(learn.model, seed=3.)
    assert Ticket.load(Ticket.from_callback(callback).save(tmp_path/'t.safetensors')).mask == callback.mask
