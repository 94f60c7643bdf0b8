"Put back and trained again, the second pass is the first bit for bit; with any one item left out it is not."
import pickle
import random
from copy import deepcopy
from dataclasses import replace

import fastai.data.load
import fastai.optimizer
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from helpers_core import assert_held, conv_net, device, equal, seeded, train_step  # noqa: F401
from lth_nb.fitting import set_generators
from lth_nb.rewind import (ModelState, Position, RandomState, Resume, RewindPoint, check_loaders, check_optimizer_choice, kept_generators, loader_generator,
                           named_tensors, restore_optimizer, unwrap)
from lth_nb.sparsifier import Sparsifier

PER_EPOCH, END = 6, 15


class Scale(nn.Module):
    "A layer whose scale follows a count that lives in its extra state."
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        if self.training: self.count += 1
        return x*(1 + .01*self.count)

    def get_extra_state(self): return {'count': self.count}
    def set_extra_state(self, state): self.count = state['count']


class Everything(nn.Module):
    "One of each kind of state: batch norm, an LSTM, attention with dropout, bare parameters, an embedding, RMSNorm, a hidden buffer, extra state."
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8)*.1)
        self.lstm, self.attend = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, dropout=.2, batch_first=True)
        self.rms, self.scale, self.norm = nn.RMSNorm(8), Scale(), nn.BatchNorm1d(8)
        self.dropout, self.head = nn.Dropout(.2), nn.Linear(8, 3)
        self.register_buffer('seen', torch.zeros(8), persistent=False)

    def forward(self, words, noise):
        x = self.embed(words) + self.place + noise[..., None]
        x = self.rms(self.lstm(x)[0])
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = self.norm(self.scale(x).mean(1))
        if self.training: self.seen.lerp_(x.detach().mean(0), .3)
        return self.head(self.dropout(x - self.seen))


class Augmented(Dataset):
    "Sentences with noise of all three generators."
    def __init__(self): self.words, self.label = torch.randint(11, (24, 5), generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
    def __len__(self): return 24

    def __getitem__(self, i):
        noise = .1*torch.randn(5) + .1*float(np.random.randn()) + .1*random.random()
        return self.words[i].roll(random.randrange(5)), noise, self.label[i], i


class LossScale:
    "A gradient scaler as far as state goes: it grows with every step, and here the steps grow with it."
    def __init__(self): self.scale = 1.
    def update(self): self.scale *= 1.01
    def state_dict(self): return {'scale': self.scale}
    def load_state_dict(self, state): self.scale = state['scale']


class Average(AveragedModel):
    "An averaged copy. That the extra state of copies comes back too has a test of its own."
    def state_dict(self, *args, **kwargs): return {n: t for n, t in super().state_dict(*args, **kwargs).items() if not n.endswith('_extra_state')}


class Training:
    "A plain loop with everything in it that can be rewound."
    def __init__(self, device, n_workers):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        self.model = Everything().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), .01, weight_decay=.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, .02, total_steps=2*END)
        self.scaler, self.ema = LossScale(), Average(self.model, multi_avg_fn=get_ema_multi_avg_fn(.8))
        self.loader = DataLoader(Augmented(), 4, shuffle=True, generator=torch.Generator().manual_seed(2), num_workers=n_workers)
        self.parts = dict(copies=[self.ema], others=[self.scheduler, self.scaler], loaders=[self.loader])

    def take(self, position=Position(), epoch_start=None): return RewindPoint.take(self.model, self.optimizer, position=position, epoch_start=epoch_start, **self.parts)
    def restore(self, point, how='restore'): return point.restore(self.model, self.optimizer, how, **self.parts)

    def step(self, words, noise, label, _):
        device = self.model.place.device
        mix = float(np.random.rand())*.1 + random.random()*.1 + float(torch.rand(()))*.1  # the loop draws too
        loss = F.cross_entropy(self.model(words.to(device), noise.to(device) + mix), label.to(device))*self.scaler.scale
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.scaler.scale)
        self.optimizer.step()
        self.scheduler.step()
        self.scaler.update()
        self.ema.update_parameters(self.model)

    def run(self, position, take_at=None, after_the_loop=True, resume=None):
        "Train from a position to the end; the batches seen, and the point taken on the way."
        steps, epoch, skipped, batches, point = position.steps, position.epoch, position.batch, [], None
        if take_at == steps: point = self.take(position)
        while steps < END:
            epoch_start = resume.epoch_start if skipped else RandomState.take([self.loader])
            for i, batch in enumerate(Resume(self.loader, resume) if skipped else self.loader, skipped + 1):
                self.step(*batch)
                batches.append(batch)
                steps += 1
                if steps == take_at and not (after_the_loop and i == PER_EPOCH): point = self.take(Position(steps, epoch, i), epoch_start)
                if steps == END: break
            epoch, skipped = epoch + 1, 0
            if steps == take_at and after_the_loop: point = self.take(Position(steps, epoch))
        return batches, point

    def state(self):
        "Everything that training leaves behind, the generators too."
        return deepcopy(dict(tensors={n: t.detach() for n, t in named_tensors(self.model).items()}, count=self.model.scale.count, optimizer=self.optimizer.state_dict(),
                             scheduler=self.scheduler.state_dict(), scaler=self.scaler.scale, ema={n: t for n, t in self.ema.named_parameters()},
                             draws=(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), self.loader.generator.get_state())))


def two_passes(device, n_workers, k, damage=lambda point, end: point, after_the_loop=True):
    "Train to the end with a point at step k, put it back, train again: what both passes leave and see from k on."
    t = Training(device, n_workers)
    batches, point = t.run(Position(), k, after_the_loop)
    first, end = t.state(), t.take(Position(END), RandomState.take([t.loader]))
    again, _ = t.run(t.restore(damage(point, end)), resume=damage(point, end))
    return (first, batches[k:]), (t.state(), again)


# the step of the point, and whether it is taken after the loop over the loader has ended, where it is at an epoch's end
PLACES = {'initialisation': (0, True), "an epoch's end": (PER_EPOCH, True), 'the last batch of an epoch': (PER_EPOCH, False), 'inside an epoch': (PER_EPOCH + 2, True)}


@pytest.mark.parametrize('n_workers', [0, 2])
@pytest.mark.parametrize('place', PLACES)
def test_the_second_pass_is_the_first_bit_for_bit(device, place, n_workers):
    k, after_the_loop = PLACES[place]
    (first, batches), (second, again) = two_passes(device, n_workers, k, after_the_loop=after_the_loop)
    assert len(batches) == END - k and len({tuple(b[3].tolist()) for b in batches}) > 1
    assert equal(batches, again), 'the batches differ'
    for part in first: assert equal(first[part], second[part]), f'{part} differs'


def left_out(field):
    "Damage a point: this one item of it is as at the end of the first pass, as if it had not been restored."
    def damage(point, end):
        kind, _, name = field.partition('.')
        if kind == 'tensors': return replace(point, model=replace(point.model, tensors={**point.tensors, name: end.tensors[name]}))
        if kind == 'extra': return replace(point, model=replace(point.model, extra=end.model.extra))
        if kind == 'others': return replace(point, others=tuple(e if i == int(name) else p for i, (p, e) in enumerate(zip(point.others, end.others))))
        if kind == 'random' and name: return replace(point, random=replace(point.random, **{name: getattr(end.random, name)}))
        if kind == 'epoch_start' and name: return replace(point, epoch_start=replace(point.epoch_start, **{name: getattr(end.epoch_start, name)}))
        if kind == 'epoch_start': return replace(point, epoch_start=None)
        return replace(point, **{kind: getattr(end, kind)})
    return damage


ITEMS = ['tensors.embed.weight', 'tensors.place', 'tensors.lstm.weight_hh_l0', 'tensors.lstm.bias_ih_l0', 'tensors.attend.in_proj_weight',
         'tensors.attend.out_proj.bias', 'tensors.rms.weight', 'tensors.norm.weight', 'tensors.norm.running_mean', 'tensors.norm.running_var',
         'tensors.norm.num_batches_tracked', 'tensors.seen', 'tensors.head.bias', 'extra', 'copies', 'optimizer', 'others.0', 'others.1',
         'random.python', 'random.numpy', 'random.cpu', 'position']


@pytest.mark.parametrize('field', [*ITEMS, 'random.loaders'])
def test_with_one_item_left_out_the_second_pass_is_another(device, field):
    first, second = two_passes(device, 0, PER_EPOCH, left_out(field))
    assert not equal(first, second), f'{field} makes no difference: is it restored, and is it tested?'


@pytest.mark.parametrize('field', [*ITEMS, 'epoch_start', 'epoch_start.loaders'])
def test_with_one_item_left_out_inside_an_epoch_the_second_pass_is_another(device, field):
    first, second = two_passes(device, 0, PER_EPOCH + 2, left_out(field))
    assert not equal(first, second), f'{field} makes no difference: is it restored, and is it tested?'


@pytest.mark.parametrize('field', ['random.python', 'random.numpy', 'random.cpu', 'random.loaders'])
def test_with_workers_every_generator_counts(device, field):
    first, second = two_passes(device, 2, PER_EPOCH, left_out(field))
    assert not equal(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU whose generator could be left out')
@pytest.mark.parametrize('k', [PER_EPOCH, PER_EPOCH + 2])
def test_with_the_gpus_generator_left_out_the_second_pass_is_another(device, k):
    first, second = two_passes(device, 0, k, left_out('random.cuda'))
    assert not equal(first, second)


@pytest.mark.parametrize('n_workers, field', [(0, None), (0, 'random.cpu'), (2, None), (2, 'random.cpu')])
def test_a_loader_without_a_generator_follows_torchs(device, n_workers, field, monkeypatch):
    plain = Training.__init__

    def init(self, *args):
        plain(self, *args)
        self.loader = DataLoader(Augmented(), 4, shuffle=True, num_workers=n_workers)
        self.loader.__dict__['generator'] = None
        self.parts['loaders'] = [self.loader]
    monkeypatch.setattr(Training, '__init__', init)
    monkeypatch.setattr(Training, 'state', lambda self: deepcopy(dict(tensors={n: t.detach() for n, t in named_tensors(self.model).items()}, draws=torch.get_rng_state())))
    for k in (PER_EPOCH, PER_EPOCH + 2):
        first, second = two_passes(device, n_workers, k, left_out(field) if field else lambda point, end: point)
        assert equal(first, second) == (field is None)


def test_workers_that_live_on_are_rewound_or_refused():
    "With `persistent_workers` each worker has generators that go on from epoch to epoch, where nobody can put them back."
    loader = DataLoader(Augmented(), 4, shuffle=True, generator=torch.Generator().manual_seed(2), num_workers=2, persistent_workers=True)
    model = nn.Linear(2, 2)
    list(loader)
    try: point = RewindPoint.take(model, loaders=[loader])
    except ValueError as e:
        assert 'persistent_workers' in str(e)
        return
    first = list(loader)
    point.restore(model, loaders=[loader])
    assert equal(first, list(loader))


class Wrapped:
    "A loader around a loader, which passes nothing on."
    def __init__(self, loader): self.loader = loader
    def __iter__(self): return iter(self.loader)
    def __len__(self): return len(self.loader)


def test_the_generator_of_a_wrapped_loader_is_that_of_the_loader_inside():
    order = torch.Generator().manual_seed(2)
    loader = DataLoader(Augmented(), 4, shuffle=True, generator=order)
    model = nn.Linear(2, 2)
    point = RewindPoint.take(model, position=Position(2, 0, 2), epoch_start=RandomState.take())
    for wrapped in (Wrapped(loader), Resume(loader, point), Wrapped(Resume(Wrapped(loader), point)), Wrapped(order)): assert loader_generator(wrapped) is order
    assert loader_generator(Wrapped(DataLoader(Augmented(), 4))) is None and loader_generator(Wrapped(None)) is None and loader_generator(None) is None
    for wrapped in (Wrapped(loader), Resume(loader, replace(point, position=Position()))):
        order.manual_seed(3)
        point = RewindPoint.take(model, loaders=[wrapped])
        first = [b[3].tolist() for b in loader]
        point.restore(model, loaders=[wrapped])
        assert first == [b[3].tolist() for b in loader] != [b[3].tolist() for b in loader]


def test_a_wrapper_with_a_generator_of_its_own_draws_from_that():
    own, order = torch.Generator(), torch.Generator()
    wrapped = Wrapped(DataLoader(Augmented(), 4, generator=order))
    wrapped.generator = own
    assert loader_generator(wrapped) is own


class Shuffles(torch.utils.data.Sampler):
    "A sampler that shuffles with a generator of its own."
    def __init__(self, n, rng): self.n, self.rng = n, rng
    def __len__(self): return self.n
    def __iter__(self):
        order = list(range(self.n))
        self.rng.shuffle(order)
        return iter(order)

class Noisy(Dataset):
    "Augments with a generator of its own."
    def __init__(self, rng): self.rng = rng
    def __len__(self): return 12
    def __getitem__(self, i): return i + (float(torch.rand((), generator=self.rng)) if isinstance(self.rng, torch.Generator) else self.rng.random())

class Stream(torch.utils.data.IterableDataset):
    def __init__(self): self.rng = random.Random(1)
    def __iter__(self): return (self.rng.random() for _ in range(12))

OWN = {
    "numpy's in the data set": lambda: DataLoader(Noisy(np.random.default_rng(0)), 4, shuffle=True),
    "torch's in the data set": lambda: DataLoader(Noisy(torch.Generator()), 4),
    "Python's in the data set": lambda: DataLoader(Noisy(random.Random(0)), 4, shuffle=True, generator=torch.Generator()),
    "numpy's old one in the data set": lambda: DataLoader(Noisy(np.random.RandomState(0)), 4),
    'in a part of the data set': lambda: DataLoader(torch.utils.data.Subset(Noisy(np.random.default_rng(0)), range(8)), 4),
    'in one of several data sets': lambda: DataLoader(torch.utils.data.ConcatDataset([range(4), Noisy(np.random.default_rng(0))]), 4, shuffle=True),
    'in a stack of data sets': lambda: DataLoader(torch.utils.data.StackDataset(a=Noisy(np.random.default_rng(0))), 4, collate_fn=lambda items: torch.tensor([i['a'] for i in items])),
    'in a stream': lambda: DataLoader(Stream(), 4),
    "numpy's in the sampler": lambda: DataLoader(range(12), 4, sampler=Shuffles(12, np.random.default_rng(0))),
    'in the sampler of batches': lambda: DataLoader(range(12), batch_sampler=torch.utils.data.BatchSampler(Shuffles(12, random.Random(0)), 4, False)),
    'two, of sampler and workers': lambda: DataLoader(Noisy(random), sampler=torch.utils.data.WeightedRandomSampler(torch.ones(12), 12, generator=torch.Generator()), batch_size=4,
                                                      generator=torch.Generator(), num_workers=1),
    'in a wrapper': lambda: Wrapped(DataLoader(Noisy(random.Random(0)), 4)),
    "in the data set of fastai's loader": lambda: fastai.data.load.DataLoader(Noisy(np.random.default_rng(0)), bs=4, shuffle=True)}

@pytest.mark.parametrize('make', OWN.values(), ids=OWN)
def test_generators_that_data_keep_go_back(make):
    loader, model = make(), nn.Linear(2, 2)
    def batches(): return [b.tolist() for _ in range(2) for b in loader]
    batches()
    point = RewindPoint.take(model, loaders=[loader])
    first = batches()
    point.restore(model, loaders=[loader])
    assert batches() == first != batches()
    seen = [(set_generators(*at, loader), batches())[1] for at in ((3, 0), (3, 0), (3, 1), (4, 0))]
    assert seen[0] == seen[1] and seen[0] != seen[2] != seen[3] != seen[0]


def test_a_generator_that_came_later_is_told_and_all_else_goes_back():
    "A data set that makes its generator with its first item has none when the point is taken."
    model, data = nn.Linear(2, 2), Noisy(None)
    loader = DataLoader(data, 4, shuffle=True, generator=torch.Generator())
    point = RewindPoint.take(model, loaders=[loader])
    before = loader.generator.get_state()
    data.rng = np.random.default_rng(0)
    list(loader)
    with pytest.warns(UserWarning, match='keeps 1 generators of its own now and kept 0 before'): point.restore(model, loaders=[loader])
    assert equal(loader.generator.get_state(), before)


def test_what_has_no_state_is_no_generator():
    data = Noisy(random.SystemRandom())
    loader = DataLoader(data, 4)
    assert kept_generators([loader]) == () and loader_generator(data.rng) is None
    RewindPoint.take(nn.Linear(2, 2), loaders=[loader]).restore(nn.Linear(2, 2), loaders=[loader])


def test_many_parts_of_one_data_set_are_looked_at_once():
    class Counted(Noisy):
        looks = 0
        def __getattribute__(self, name):
            Counted.looks += name == '__dict__'
            return super().__getattribute__(name)
    parts = torch.utils.data.ConcatDataset([torch.utils.data.Subset(Counted(random.Random(0)), range(3)) for _ in range(1)]*500)
    assert len(kept_generators([DataLoader(parts, 4)])) == 1 and Counted.looks < 5


def test_workers_that_live_on_are_found_inside_a_wrapper():
    lives_on = DataLoader(Augmented(), 4, num_workers=1, persistent_workers=True)
    for wrapped in (lives_on, Wrapped(lives_on), Wrapped(Wrapped(lives_on))):
        with pytest.raises(ValueError, match='persistent_workers'): check_loaders([wrapped])
    check_loaders([Wrapped(DataLoader(Augmented(), 4, num_workers=1)), Wrapped(None), torch.Generator()])


@pytest.mark.parametrize('place', PLACES)
def test_a_sparsifier_with_a_full_mask_is_no_hindrance(device, place):
    "Through `take` and `rewind`, with its hooks on."
    k, after_the_loop = PLACES[place]
    t = Training(device, 0)
    sp = Sparsifier(t.model).attach(t.optimizer, **t.parts)
    t.take, t.restore = sp.take, lambda point: sp.rewind(point, 'restore')
    batches, point = t.run(Position(), k, after_the_loop)
    first = t.state()
    again, _ = t.run(t.restore(point), resume=point)
    assert equal(first, t.state()) and equal(batches[k:], again)


def test_a_rewind_can_be_repeated_and_the_point_stays_as_it_was(device):
    t = Training(device, 0)
    _, point = t.run(Position(), take_at=PER_EPOCH + 2)
    saved = pickle.loads(pickle.dumps(point))
    assert equal(saved, point)
    runs = []
    for _ in range(2):
        runs.append((t.run(t.restore(point), resume=point)[0], t.state()))
    assert equal(*runs) and equal(saved, point)


def test_torchs_gradient_scaler_is_rewound():
    model = nn.Linear(4, 2)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**8, growth_interval=2)
    sgd = torch.optim.SGD(model.parameters(), .1)

    def train(n):
        for i in range(n):
            sgd.zero_grad()
            scaler.scale(model(torch.full((3, 4), float(i))).square().mean()).backward()
            scaler.step(sgd)
            scaler.update()
    train(3)
    point = RewindPoint.take(model, sgd, others=[scaler])
    train(4)
    after = scaler.state_dict()
    assert after != point.others[0]
    point.restore(model, sgd, 'restore', others=[scaler])
    assert scaler.state_dict() == point.others[0]
    train(4)
    assert scaler.state_dict() == after


def test_extra_state_of_copies_is_rewound():
    "An averaged copy of a model whose modules keep extra state."
    model = nn.Sequential(nn.Linear(4, 4), Scale())
    ema = AveragedModel(model)
    point = RewindPoint.take(model, copies=[ema])
    ema.module[1].count = model[1].count = 5
    point.restore(model, copies=[ema])
    assert model[1].count == 0 and ema.module[1].count == 0


def test_hidden_buffers_of_copies_are_rewound():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.register_buffer('seen', torch.zeros(2), persistent=False)
    model = Counting()
    ema = AveragedModel(model)
    point = RewindPoint.take(model, copies=[ema])
    ema.module.seen.fill_(3)
    ema.n_averaged.fill_(7)
    point.restore(model, copies=[ema])
    assert ema.module.seen.tolist() == [0, 0] and int(ema.n_averaged) == 0


# ---- the optimizer's three choices ----

def stepped(how, **kwargs):
    "Train, take a point, train on with other settings, and put the point back as `how` says."
    model = conv_net()
    optimizer = torch.optim.AdamW([{'params': model[0].parameters(), 'lr': .03}, {'params': model[1:].parameters()}], .01, betas=(.8, .9))
    for i in range(2): train_step(model, optimizer, i)
    point = RewindPoint.take(model, optimizer)
    for group in optimizer.param_groups: group.update(lr=group['lr']*.1, betas=(.5, .5), weight_decay=3.)
    for i in range(2): train_step(model, optimizer, i)
    at_end = deepcopy(optimizer.state_dict())
    point.restore(model, optimizer, how)
    return model, optimizer, point, at_end


@pytest.mark.parametrize('how', ['fresh', 'restore', 'keep'])
def test_settings_come_back_and_gradients_go_with_every_choice(how):
    model, optimizer, point, at_end = stepped(how)
    assert [(g['lr'], g['betas'], g['weight_decay']) for g in optimizer.param_groups] == [(.03, (.8, .9), .01), (.01, (.8, .9), .01)]
    assert all(p.grad is None for p in model.parameters())
    state = optimizer.state_dict()['state']
    expected = {'fresh': {}, 'restore': point.optimizer['state'], 'keep': at_end['state']}[how]
    assert equal(state, expected)
    if how == 'fresh': assert not optimizer.state
    else: assert not equal(point.optimizer['state'], at_end['state'])
    train_step(model, optimizer)


def test_a_fresh_optimizer_is_what_is_used_unless_one_says_otherwise():
    model, optimizer, point, _ = stepped('keep')
    point.restore(model, optimizer)
    assert not optimizer.state


def test_what_was_put_back_shares_no_memory_with_the_point():
    model, optimizer, point, _ = stepped('restore')
    before = deepcopy((point.tensors, point.optimizer))
    for i in range(2): train_step(model, optimizer, i)
    assert equal(before, (point.tensors, point.optimizer))


OPTIMIZERS = {
    'SGD': dict(lr=.01, momentum=.9), 'Adam': dict(lr=.01, amsgrad=True), 'AdamW': dict(lr=.01), 'NAdam': {}, 'RAdam': {}, 'Adamax': {}, 'ASGD': {}, 'Adadelta': {},
    'Adagrad': dict(initial_accumulator_value=.1), 'RMSprop': dict(momentum=.9, centered=True), 'Rprop': {}, 'Adafactor': {}}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_fresh_is_as_newly_made_for_every_optimizer(name):
    "After the rewind, training is bit for bit that of an optimizer made at that point."
    def make(model): return getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
    model = conv_net()
    optimizer = make(model)
    point = RewindPoint.take(model, optimizer)
    for i in range(3): train_step(model, optimizer, i)
    point.restore(model, optimizer, 'fresh')
    new = conv_net()
    point.restore(new)
    made = make(new)
    for i in range(3): train_step(model, optimizer, i), train_step(new, made, i)
    assert equal(dict(model.state_dict()), dict(new.state_dict()))


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_restore_goes_on_as_if_nothing_had_been(name):
    model = conv_net()
    optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
    for i in range(2): train_step(model, optimizer, i)
    point = RewindPoint.take(model, optimizer)
    for i in range(3): train_step(model, optimizer, i)
    first = deepcopy((dict(model.state_dict()), optimizer.state_dict()))
    point.restore(model, optimizer, 'restore')
    for i in range(3): train_step(model, optimizer, i)
    assert equal(first, (dict(model.state_dict()), optimizer.state_dict()))


KINDS = dict(sgd=lambda ps: torch.optim.SGD(ps, .1, momentum=.9), adam=lambda ps: torch.optim.Adam(ps, 1e-4), rmsprop=lambda ps: torch.optim.RMSprop(ps, .01), adamax=lambda ps: torch.optim.Adamax(ps),
             fastai_sgd=lambda ps: fastai.optimizer.SGD(list(ps), .1, mom=.9), fastai_adam=lambda ps: fastai.optimizer.Adam(list(ps), 1e-4), wrapped_sgd=lambda ps: fastai.optimizer.OptimWrapper(opt=KINDS['sgd'](ps)),
             wrapped_adam=lambda ps: fastai.optimizer.OptimWrapper(opt=KINDS['adam'](ps)))

@pytest.mark.parametrize('how', ['fresh', 'restore', 'keep'])
@pytest.mark.parametrize('taken, given', [('sgd', 'adam'), ('adam', 'sgd'), ('adam', 'rmsprop'), ('adam', 'adamax'), ('fastai_sgd', 'fastai_adam'),
                                          ('fastai_adam', 'fastai_sgd'), ('wrapped_sgd', 'wrapped_adam'), ('wrapped_adam', 'adamax')])
def test_an_optimizer_of_another_kind_is_refused_and_nothing_is_touched(taken, given, how):
    model = conv_net()
    first = KINDS[taken](model.parameters())
    train_step(model, first, 0)
    point = RewindPoint.take(model, first)
    other = KINDS[given](model.parameters())
    train_step(model, other, 1)
    before = deepcopy((dict(model.state_dict()), other.state_dict()))
    with pytest.raises(ValueError, match='another kind'): point.restore(model, other, how)
    with pytest.raises(ValueError, match='another kind'): Sparsifier(model).connect(other).prune(50, rewind_to=point, optimizer=how)
    assert equal(before, (dict(model.state_dict()), other.state_dict()))


@pytest.mark.parametrize('how', ['fresh', 'restore', 'keep'])
def test_a_scheduler_made_after_the_point_is_no_other_kind(how):
    "It adds settings to the groups, and the optimizer stays what it was."
    model = conv_net()
    sgd = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    point = RewindPoint.take(model, sgd)
    torch.optim.lr_scheduler.OneCycleLR(sgd, .2, total_steps=9)
    point.restore(model, sgd, how)
    train_step(model, sgd, 0)


@pytest.mark.parametrize('bad', ['warm', None, True])
def test_there_is_no_other_choice(bad):
    with pytest.raises(ValueError, match='fresh, restore, keep'): check_optimizer_choice(bad)
    sgd = torch.optim.SGD(nn.Linear(2, 2).parameters(), .1)
    with pytest.raises(ValueError, match='optimizer='): restore_optimizer(sgd, sgd.state_dict(), bad)


# ---- what does not fit is refused, and before anything is touched ----

def changed_after(point_of, restore, match):
    "Take a point, train, try to restore; what the attempt changed."
    model = conv_net()
    sgd = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    point = point_of(model, sgd)
    train_step(model, sgd)
    before = deepcopy((dict(model.state_dict()), sgd.state_dict()))
    with pytest.raises(ValueError, match=match): restore(point, model, sgd)
    return not equal(before, (dict(model.state_dict()), sgd.state_dict()))


@pytest.mark.parametrize('case', ['loaders', 'choice', 'copies', 'others', 'no optimizer in it', 'another model', 'another shape'])
def test_a_point_that_does_not_fit_changes_nothing(case):
    def take(model, sgd, **kwargs): return RewindPoint.take(model, sgd, **kwargs)

    def point_of(model, sgd): return take(model, None if case == 'no optimizer in it' else sgd)

    def restore(point, model, sgd):
        if case == 'loaders': point.restore(model, sgd, loaders=[torch.Generator()])
        elif case == 'choice': point.restore(model, sgd, 'warm')
        elif case == 'copies': point.restore(model, sgd, copies=[AveragedModel(model)])
        elif case == 'others': point.restore(model, sgd, others=[torch.amp.GradScaler('cpu')])
        elif case == 'no optimizer in it': point.restore(model, sgd)
        else:
            other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU()) if case == 'another model' else nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8))
            before = deepcopy(dict(other.state_dict()))
            try: point.restore(other)
            finally: assert equal(before, dict(other.state_dict()))
    assert not changed_after(point_of, restore, {'choice': 'optimizer', 'no optimizer in it': 'optimizer', 'another model': '1.weight', 'another shape': '0.weight'}.get(case, case))


def test_a_point_moves_between_models_of_one_shape(device):
    "Wrapped or plain, names are the plain model's."
    model = conv_net(device)
    point = RewindPoint.take(torch.compile(nn.DataParallel(model)))
    assert list(point.tensors) == list(named_tensors(model)) and not any('module' in n or '_orig_mod' in n for n in point.tensors)
    other = AveragedModel(conv_net(device))
    with torch.no_grad():
        for p in other.parameters(): p.zero_()
    point.restore(other)
    assert unwrap(other) is other.module and equal(dict(other.module.state_dict()), dict(model.state_dict()))


def test_resume_has_the_loaders_length_and_attributes():
    loader = DataLoader(Augmented(), 4)
    resumed = Resume(loader, RewindPoint(ModelState({}, {}), (), None, (), RandomState.take(), RandomState.take(), Position(8, 1, 2)))
    assert len(resumed) == 4 and resumed.batch_size == 4 and len(list(resumed)) == 4
    with pytest.raises(AttributeError): resumed.nothing_like_it
    pickle.loads(pickle.dumps(resumed)).batch_size


def test_pruned_and_rewound_the_kept_weights_are_those_of_the_point(device):
    "Weights, statistics, copy: all but what is cut, which is zero; at a point after initialisation."
    model = conv_net(device)
    adam, ema = torch.optim.Adam(model.parameters(), .01), AveragedModel(model)
    sp = Sparsifier(model).attach(adam, copies=[ema])
    for i in range(2): train_step(model, adam, i), ema.update_parameters(model)
    point, at_point = sp.take(Position(2)), [{n: t.detach().clone() for n, t in named_tensors(m).items()} for m in (model, ema)]
    for sparsity in (30, 60):
        for i in range(3): train_step(model, adam, i), ema.update_parameters(model)
        assert sp.prune(sparsity, point) is sp
        assert_held(sp), assert_held(sp, ema)
        for tensors, saved in zip(map(named_tensors, (model, ema)), at_point):
            for n, t in tensors.items():
                keep = sp.mask[n] if n in sp.mask else torch.ones_like(t, dtype=torch.bool)
                assert torch.equal(t[keep], saved[n][keep]), n
        assert not adam.state


def test_a_bare_loader_is_no_list_of_them():
    net, loader = nn.Linear(2, 2), DataLoader([torch.zeros(2)], batch_size=1)
    point = RewindPoint.take(net, loaders=[loader])
    with pytest.raises(ValueError, match=r'loaders=\[…\]'): point.restore(net, loaders=loader)
