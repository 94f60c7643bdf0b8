"Units partition every weight, mean what they are called, and what follows a cut filter is found or its absence explained."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from torchvision.models import resnet18

from helpers_core import assert_held, device, quick, seeded  # noqa: F401
from lth_nb import granularity as gran
from lth_nb.granularity import layout, units
from lth_nb.sparsifier import Sparsifier

GRANULARITIES = ['weight', 'row', 'column', 'kernel', 'filter', 'channel', 'layer', 'shared_weight', 'shared_row', 'shared_column', 'shared_kernel']

MODULES = {
    'Conv1d': nn.Conv1d(6, 4, 3), 'Conv2d': nn.Conv2d(6, 4, (2, 3)), 'Conv3d': nn.Conv3d(6, 4, (2, 3, 4)),
    'Conv1d grouped': nn.Conv1d(6, 4, 3, groups=2), 'Conv2d grouped': nn.Conv2d(6, 9, (2, 3), groups=3),
    'Conv3d grouped': nn.Conv3d(4, 4, (2, 3, 1), groups=2), 'Conv2d depthwise': nn.Conv2d(6, 12, 3, groups=6),
    'ConvTranspose1d': nn.ConvTranspose1d(6, 4, 3), 'ConvTranspose2d': nn.ConvTranspose2d(6, 4, (2, 3)),
    'ConvTranspose3d': nn.ConvTranspose3d(6, 4, (2, 3, 4)), 'ConvTranspose1d grouped': nn.ConvTranspose1d(6, 4, 3, groups=2),
    'ConvTranspose2d grouped': nn.ConvTranspose2d(6, 9, (2, 3), groups=3),
    'ConvTranspose3d grouped': nn.ConvTranspose3d(4, 6, (2, 3, 1), groups=2), 'Linear': nn.Linear(6, 4)}
CONVS = [k for k in MODULES if k != 'Linear']


def n_outputs(m): return m.out_features if isinstance(m, nn.Linear) else m.out_channels


def n_inputs(m): return m.in_features if isinstance(m, nn.Linear) else m.in_channels


def unit_of_each_weight(granularity, module):
    "The number of the unit that each weight belongs to, in the weight's shape."
    u = units(granularity, module, module.weight)
    return u, u.expand(torch.arange(u.n_units)).reshape(module.weight.shape)


def an_input(m):
    if isinstance(m, nn.Linear): return torch.randn(2, m.in_features)
    return torch.randn(2, m.in_channels, *[6]*(m.weight.ndim - 2))


# ---- units ----

def test_every_registered_granularity_is_tested_here():
    with pytest.raises(ValueError) as e: units('no such', MODULES['Linear'], MODULES['Linear'].weight)
    for g in GRANULARITIES: assert g in str(e.value)
    ours = {g for g in gran._granularities if gran._granularities[g].units.__module__ == 'lth_nb.granularity'}
    assert ours == set(GRANULARITIES)


@pytest.mark.parametrize('name', MODULES)
def test_units_partition_the_weight(name):
    for granularity in GRANULARITIES:
        u, of = unit_of_each_weight(granularity, MODULES[name])
        counts = torch.bincount(of.flatten(), minlength=u.n_units)
        assert u.n_units * u.unit_size == of.numel() and len(counts) == u.n_units, granularity
        assert (counts == u.unit_size).all(), granularity


@pytest.mark.parametrize('name', MODULES)
def test_reduce_undoes_expand(name):
    for granularity in GRANULARITIES:
        u = units(granularity, MODULES[name], MODULES[name].weight)
        value = torch.arange(u.n_units, dtype=torch.double)
        assert torch.equal(u.reduce(u.expand(value).reshape(MODULES[name].weight.shape)), value), granularity


@pytest.mark.parametrize('name', MODULES)
def test_reduce_is_the_mean_over_the_unit(name):
    score = torch.randn_like(MODULES[name].weight).double()
    for granularity in GRANULARITIES:
        u, of = unit_of_each_weight(granularity, MODULES[name])
        by_hand = torch.stack([score[of == i].mean() for i in range(u.n_units)])
        torch.testing.assert_close(u.reduce(score), by_hand)


@given(shape=st.tuples(*[st.integers(1, 4)]*4), groups=st.integers(1, 3), transposed=st.booleans(), granularity=st.sampled_from(GRANULARITIES))
@quick
def test_units_partition_any_convolution(shape, groups, transposed, granularity):
    out, inp, *kernel = shape
    module = (nn.ConvTranspose2d if transposed else nn.Conv2d)(inp*groups, out*groups, kernel, groups=groups)
    u, of = unit_of_each_weight(granularity, module)
    assert (torch.bincount(of.flatten(), minlength=u.n_units) == u.unit_size).all() and u.n_units*u.unit_size == module.weight.numel()


@pytest.mark.parametrize('name', MODULES)
def test_a_filter_is_what_makes_one_output(name):
    "Cut filter k: output k, and it alone, becomes zero."
    m = MODULES[name]
    u, of = unit_of_each_weight('filter', m)
    assert u.n_units == n_outputs(m)
    x = an_input(m)
    for k in range(u.n_units):
        y = type_call(m, x, m.weight*(of != k))
        zero = (y.abs().sum([d for d in range(y.ndim) if d != 1]) == 0)
        assert zero.tolist() == [i == k for i in range(u.n_units)]


def type_call(m, x, weight):
    "Run a layer with another weight and no bias."
    return torch.func.functional_call(m, {'weight': weight.detach(), 'bias': torch.zeros(n_outputs(m))}, (x,))


@pytest.mark.parametrize('name', MODULES)
def test_a_channel_is_what_reads_one_input(name):
    "Cut channel k: the output no longer depends on input k, and on each other one it does."
    m = MODULES[name]
    u, of = unit_of_each_weight('channel', m)
    assert u.n_units == n_inputs(m)
    x = an_input(m)
    for k in range(u.n_units):
        cut = m.weight*(of != k)
        y = type_call(m, x, cut)
        for i in range(n_inputs(m)):
            other = x.clone()
            other[:, i] += 1
            assert torch.equal(type_call(m, other, cut), y) == (i == k)


@pytest.mark.parametrize('name', CONVS)
def test_a_kernel_joins_one_input_to_one_output(name):
    m = MODULES[name]
    u, of = unit_of_each_weight('kernel', m)
    assert u.n_units == n_inputs(m)*n_outputs(m)//m.groups
    assert (of.flatten(2) == of.flatten(2)[..., :1]).all()  # the same over all of space


def test_by_hand():
    grouped = nn.Conv2d(4, 6, 3, groups=2)  # weight (6, 2, 3, 3): outputs 0-2 read inputs 0-1, outputs 3-5 inputs 2-3
    _, of = unit_of_each_weight('channel', grouped)
    assert of[:, :, 0, 0].tolist() == [[0, 1]]*3 + [[2, 3]]*3
    up = nn.ConvTranspose2d(4, 6, 3, groups=2)  # weight (4, 3, 3, 3): inputs 0-1 make outputs 0-2, inputs 2-3 outputs 3-5
    _, of = unit_of_each_weight('filter', up)
    assert of[:, :, 0, 0].tolist() == [[0, 1, 2]]*2 + [[3, 4, 5]]*2
    _, of = unit_of_each_weight('channel', up)
    assert of[:, :, 0, 0].tolist() == [[0]*3, [1]*3, [2]*3, [3]*3]
    conv = nn.Conv2d(1, 1, (2, 3))
    assert unit_of_each_weight('row', conv)[1].tolist() == [[[[0, 0, 0], [1, 1, 1]]]]
    assert unit_of_each_weight('column', conv)[1].tolist() == [[[[0, 1, 2], [0, 1, 2]]]]
    fc = nn.Linear(3, 2)
    assert unit_of_each_weight('row', fc)[1].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert unit_of_each_weight('column', fc)[1].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert unit_of_each_weight('kernel', fc)[0].unit_size == 1
    assert unit_of_each_weight('layer', grouped)[0].n_units == 1
    shared = nn.Conv2d(2, 3, 2)
    assert unit_of_each_weight('shared_kernel', shared)[1][:, :, 0, 0].tolist() == [[0, 1]]*3
    assert unit_of_each_weight('shared_weight', shared)[1][0].tolist() == unit_of_each_weight('shared_weight', shared)[1][2].tolist()


def test_recurrent_and_attention_weights_have_rows_and_columns():
    lstm, attend = nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)
    assert units('filter', lstm, lstm.weight_ih_l0).n_units == 16
    assert units('channel', attend, attend.in_proj_weight).n_units == 4


@pytest.mark.parametrize('granularity', [g for g in GRANULARITIES if g not in ('weight', 'layer')])
def test_a_weight_of_unknown_layout_is_refused_by_name(granularity):
    m = nn.Bilinear(2, 3, 4)
    with pytest.raises(ValueError, match='fc.weight'): units(granularity, m, m.weight, 'fc.weight')
    for known in ('weight', 'layer'): assert units(known, m, m.weight).n_units in (24, 1)


@pytest.mark.parametrize('cell', [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells_have_rows_like_recurrent_layers(cell):
    "They are prunable by default, so every granularity must know them."
    m = cell(3, 4)
    assert units('row', m, m.weight_ih).unit_size == 3
    assert units('filter', m, m.weight_hh).n_units == len(m.weight_hh)


# ---- followers: a cut filter's output is exactly zero, whatever comes after ----

class Preactivation(nn.Module):
    "A pre-activation block whose modules are declared in another order than they run."
    def __init__(self):
        super().__init__()
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.head, self.norm1 = nn.Linear(4, 3), nn.BatchNorm2d(4)
        self.conv1, self.stem = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    "One norm for two convolutions, and one convolution read twice."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.own, self.head = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.b(self.norm(self.a(x))))
        x = self.c(x)
        return self.head((x + self.own(x)).mean((2, 3)))


class Unreached(nn.Module):
    "A layer that no batch reaches."
    def __init__(self):
        super().__init__()
        self.used, self.norm, self.spare = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(4, 6)

    def forward(self, x): return self.norm(self.used(x))


def seq(*ms): return lambda: nn.Sequential(*ms)


torch.manual_seed(0)  # the same inputs in every process
IMAGE, ROWS, WORDS = torch.randn(4, 3, 8, 8), torch.randn(5, 4), torch.randn(2, 7, 4)
# what is run, on what, and for each layer the module after which its output must be zero (itself, or the norm), and the filters' axis there
NETS = {
    'resnet18': (lambda: resnet18(num_classes=3), torch.randn(2, 3, 32, 32), {
        'conv1': ('bn1', 1), 'layer1.0.conv2': ('layer1.0.bn2', 1), 'layer2.0.downsample.0': ('layer2.0.downsample.1', 1), 'fc': ('fc', -1)}),
    'pre-activation, declared in another order': (Preactivation, IMAGE, {'conv1': ('norm2', 1), 'conv2': ('conv2', 1), 'stem': ('stem', 1), 'head': ('head', -1)}),
    'grouped and depthwise': (seq(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12)), IMAGE,
                              {'0': ('1', 1), '3': ('4', 1)}),
    'grouped, bias and no norm': (seq(nn.Conv2d(3, 6, 3, groups=3), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2)), IMAGE, {'0': ('0', 1), '2': ('2', 1)}),
    'transposed': (seq(nn.ConvTranspose2d(3, 6, 2, groups=3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2)), IMAGE,
                   {'0': ('1', 1), '3': ('3', 1)}),
    'linear and layer norm': (seq(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 5)), WORDS, {'0': ('1', -1), '3': ('3', -1)}),
    'linear and rms norm': (seq(nn.Linear(4, 6), nn.RMSNorm(6)), WORDS, {'0': ('1', -1)}),
    # not ReLU: with so few rows it can be zero for all units that are left, and then what stays of the last layer, which has no bias, gives zero too
    'linear and batch norm': (seq(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3, bias=False)), ROWS, {'0': ('1', -1), '3': ('3', -1)}),
    'group norm': (seq(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 4, 1)), IMAGE, {'0': ('1', 1), '3': ('3', 1)}),
    'instance norm': (seq(nn.Conv1d(4, 6, 3), nn.InstanceNorm1d(6, affine=True)), torch.randn(2, 4, 9), {'0': ('1', 1)}),
    'three dimensions': (seq(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)), torch.randn(2, 3, 4, 4, 4), {'0': ('1', 1)})}


def assert_cut_outputs_are_zero(sp, batch, after):
    "Check it in training and in evaluation mode."
    seen, plain = {}, sp.model
    ends = dict(plain.named_modules())
    handles = [ends[end].register_forward_hook(lambda m, i, out, end=end: seen.__setitem__(end, out.clone())) for end, _ in after.values()]
    n_checked = 0
    for training in (False, True):
        before = {n: b.clone() for n, b in plain.named_buffers()}
        plain.train(training)(batch)
        for n, b in plain.named_buffers(): b.copy_(before[n])
        for layer, (end, axis) in after.items():
            module, keep = plain.get_submodule(layer), sp.mask[f'{layer}.weight']
            live = layout(module, keep).live_filters(keep)
            if live.all(): continue
            y = seen[end].movedim(axis, 0)
            assert (y[~live] == 0).all(), f'{layer} is cut and {end} gives something, training={training}'
            assert (y[live] != 0).any()
            n_checked += 1
    for h in handles: h.remove()
    assert n_checked


@pytest.mark.parametrize('name', NETS)
def test_a_cut_filter_gives_zero_through_training_and_rewinding(name, device):
    torch.manual_seed(0)
    make, batch, after = NETS[name]
    model, batch = make().to(device), batch.to(device)
    for m in model.modules():  # as after some training: nothing is at the value it is made with
        if getattr(m, 'running_mean', None) is not None: m.running_mean.normal_(); m.running_var.uniform_(.5, 2)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.1)
    sp = Sparsifier(model, 'filter', 'local', batch=batch)
    sgd = torch.optim.SGD(model.parameters(), 1e-3, momentum=.9, weight_decay=.1)
    sp.attach(sgd)

    def train(n):
        model.train()
        for _ in range(n):
            sgd.zero_grad()
            model(batch).square().mean().backward()
            sgd.step()
            assert_held(sp)

    start = sp.take()
    model.train()
    for _ in range(2):
        model(batch).square().mean().backward()
        sgd.step()
    point = sp.take()
    for how, sparsity in (('keep', 40), ('restore', 60), ('fresh', 70)):
        sp.prune(sparsity, point, how)
        assert_cut_outputs_are_zero(sp, batch, after)
        train(3)
        assert_cut_outputs_are_zero(sp, batch, after)
    sp.rewind(start)
    assert_held(sp)
    assert_cut_outputs_are_zero(sp, batch, after)


def test_what_is_shared_is_no_follower_and_the_report_says_why():
    sp = Sparsifier(Shared(), 'filter', batch=IMAGE)
    assert sp.followers['a.weight'] == ['a.bias'] and sp.followers['b.weight'] == ['b.bias'] and sp.followers['c.weight'] == ['c.bias']
    notes = sp.report().notes
    assert 'used elsewhere' in notes['a.weight'] and 'used elsewhere' in notes['b.weight']
    assert 'add' in notes['c.weight']
    for n in ('a.weight', 'c.weight'): assert f'{n}: {notes[n]}' in repr(sp.report())


def test_a_layer_the_batch_does_not_reach_is_noted():
    sp = Sparsifier(Unreached(), 'filter', batch=WORDS)
    assert sp.followers['used.weight'] == ['used.bias', 'norm.weight', 'norm.bias']
    assert sp.followers['spare.weight'] == ['spare.bias'] and 'does not reach' in sp.report().notes['spare.weight']


@pytest.mark.parametrize('case', ['over another dimension', 'over two dimensions', 'without scale', 'then dropout', 'module used twice'])
def test_a_norm_that_cannot_follow_is_none_and_noted(case):
    twice = nn.Linear(4, 4)
    net, batch = {
        'over another dimension': (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(7)), WORDS),
        'over two dimensions': (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((7, 6))), WORDS),
        'without scale': (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False)), WORDS),
        'then dropout': (nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.LayerNorm(6)), WORDS),
        'module used twice': (nn.Sequential(twice, nn.LayerNorm(4), twice), WORDS)}[case]
    sp = Sparsifier(net, 'filter', batch=batch)
    assert sp.followers['0.weight'] == ['0.bias']
    assert '0.weight' in sp.report().notes


def test_the_trace_changes_nothing(device):
    "Modes, buffers, random state and gradients stay as they were."
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2)).to(device)
    model[1].eval()
    before, modes = {n: t.clone() for n, t in model.state_dict().items()}, [m.training for m in model.modules()]
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    Sparsifier(model, 'filter', batch=IMAGE.to(device))
    assert torch.equal(torch.rand(2), drawn)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_batch_may_be_a_tuple_or_a_dict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)

        def forward(self, x, scale): return self.norm(self.fc(x*scale))
    for batch in ((WORDS, 2.), {'x': WORDS, 'scale': 2.}):
        assert 'norm.weight' in Sparsifier(Two(), 'filter', batch=batch).followers['fc.weight']


def test_frozen_followers_can_be_attached():
    "Norms are often frozen in fine-tuning."
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].requires_grad_(False)
    sgd = torch.optim.SGD(model[0].parameters(), .1)
    sp = Sparsifier(model, 'filter', batch=IMAGE).attach(sgd)
    sp.prune(50)
    model(IMAGE).sum().backward()
    sgd.step()
    assert_held(sp)


@pytest.mark.parametrize('make, batch', [
    (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), torch.tensor([[1, 2]])),
    (lambda: nn.Sequential(nn.GRUCell(3, 4), nn.Linear(4, 3)), torch.randn(2, 3))], ids=['embedding', 'cell'])
def test_granularity_layer_takes_weights_of_unknown_layout(make, batch):
    model = make()
    sp = Sparsifier(model, 'layer', layers=[type(model[0]), nn.Linear], batch=batch)
    sp.prune(60)
    assert 0 < sp.mask.sparsity <= 60


def test_followers_inside_a_compiled_part_have_plain_names():
    inside = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(torch.compile(inside, backend='eager'), nn.Flatten(), nn.Linear(144, 2))
    sp = Sparsifier(model, 'filter', batch=IMAGE).prune(40)
    assert set(sp.followers) == {'0.0.weight', '2.weight'} and all('_orig_mod' not in n for n in sp.mask)
    now = {n.replace('_orig_mod.', ''): p for n, p in model.named_parameters()}
    assert all((now[n][~keep] == 0).all() for n, keep in sp.mask.items())


def test_a_layer_that_a_fused_call_hides_gets_no_foreign_norm():
    "`nn.TransformerEncoderLayer` can run as one fused call in evaluation mode: the norm after it is not its last linear layer's."
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    sp = Sparsifier(nn.Sequential(layer, nn.LayerNorm(4)), 'filter', batch=WORDS)
    assert not any(f.startswith('1.') for fs in sp.followers.values() for f in fs)


def test_functional_calls_are_traced_too():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)

        def forward(self, x): return F.layer_norm(F.linear(x, self.fc.weight, self.fc.bias), (6,), self.norm.weight, self.norm.bias)
    assert Sparsifier(Functional(), 'filter', batch=WORDS).followers['fc.weight'] == ['fc.bias', 'norm.weight', 'norm.bias']
