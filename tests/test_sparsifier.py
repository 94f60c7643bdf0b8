"Zero stays zero whatever trains; cut weights have no influence; counts are exact; what cannot be is refused and changes nothing."
import copy
import io
import pickle
import shutil
import warnings
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from hypothesis import given, strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers_core import assert_held, conv_net, device, equal, images, n_cut, quick, seeded, train_step  # noqa: F401
from lth_nb.mask import Mask, n_to_cut
from lth_nb.rewind import named_tensors, unwrap
from lth_nb.schedule import geometric, iterative
from lth_nb.selection import prunable
from lth_nb.sparsifier import Sparsifier
from lth_nb.ticket import Ticket

# ---- the same weights as torch's own global pruning ----

ARCHITECTURES = {
    'squeezenet1_1': tv.squeezenet1_1, 'shufflenet_v2_x0_5': tv.shufflenet_v2_x0_5,
    'vit': lambda weights: tv.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128),
    'mobilenet_v3_small': tv.mobilenet_v3_small, 'mnasnet0_5': tv.mnasnet0_5, 'regnet_y_400mf': tv.regnet_y_400mf, 'resnet18': tv.resnet18,
    'efficientnet_b0': tv.efficientnet_b0, 'densenet121': tv.densenet121,
    'googlenet': lambda weights: tv.googlenet(weights=weights, aux_logits=False, init_weights=False), 'swin_t': tv.swin_t, 'convnext_tiny': tv.convnext_tiny}
FAST = ['squeezenet1_1', 'shufflenet_v2_x0_5', 'vit', 'mobilenet_v3_small']


@pytest.mark.parametrize('name', [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES])
@pytest.mark.parametrize('sparsity', [37, 90])
def test_torchs_global_pruning_cuts_the_same_weights(name, sparsity):
    torch.manual_seed(0)
    model = ARCHITECTURES[name](weights=None)
    sp = Sparsifier(model, allow_empty=True)
    mask = sp.next_mask(sparsity)
    places = [(m, n.rpartition('.')[2]) for n, m in sp.selection.modules.items()]
    before = {n: w.detach().clone() for n, w in sp.weights.items()}
    torch_prune.global_unstructured(places, torch_prune.L1Unstructured, amount=n_to_cut(mask.n_total, sparsity))
    theirs = {n: getattr(m, f'{attribute}_mask').bool() for n, (m, attribute) in zip(sp.weights, places)}
    assert sum(int((~t).sum()) for t in theirs.values()) == n_cut(mask)
    threshold = max(float(before[n][~t].abs().max()) for n, t in mask.items() if not t.all())
    for n, t in mask.items():
        differ = theirs[n] != t
        assert (before[n][differ].abs() == threshold).all(), n  # only where weights tie at the threshold


# ---- zero stays zero: after every step ----

OPTIMIZERS = {
    'SGD with momentum': lambda ps: torch.optim.SGD(ps, .05, momentum=.9, nesterov=True, weight_decay=.1),
    'Adam': lambda ps: torch.optim.Adam(ps, .01, weight_decay=.1), 'Adam one by one': lambda ps: torch.optim.Adam(ps, .01, foreach=False),
    'Adam fused': lambda ps: torch.optim.Adam(ps, .01, fused=True), 'AdamW': lambda ps: torch.optim.AdamW(ps, .01, weight_decay=.5),
    'RMSprop': lambda ps: torch.optim.RMSprop(ps, .001, momentum=.9, centered=True, weight_decay=.1), 'NAdam': torch.optim.NAdam, 'RAdam': torch.optim.RAdam,
    'Adagrad': torch.optim.Adagrad, 'Adamax': torch.optim.Adamax, 'Adadelta': torch.optim.Adadelta, 'ASGD': torch.optim.ASGD, 'Rprop': torch.optim.Rprop,
    'Adafactor': torch.optim.Adafactor}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_zero_stays_zero_after_every_step(name, device):
    "With momenta from before the pruning, which would move what is cut; with clipping and accumulation."
    model = conv_net(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    sp = Sparsifier(model).attach(optimizer)
    for i in range(2): train_step(model, optimizer, i)
    for sparsity in (40, 80):
        sp.prune(sparsity)
        assert n_cut(sp.mask) == n_to_cut(sp.mask.n_total, sparsity)
        for i in range(4):
            optimizer.zero_grad()
            for part in range(2):  # accumulate
                x, y = images(device, 10*i + part)
                F.cross_entropy(model(x), y).backward()
                for n, keep in sp.mask.items(): assert (sp.weights[n].grad[~keep] == 0).all()
            nn.utils.clip_grad_norm_(model.parameters(), .1)
            optimizer.step()
            assert_held(sp)
    assert all((w[sp.mask[n]] != 0).any() for n, w in sp.weights.items())


def test_lbfgs_which_steps_by_a_closure(device):
    model = conv_net(device)
    lbfgs, (x, y) = torch.optim.LBFGS(model.parameters(), max_iter=3), images(device)
    sp = Sparsifier(model).attach(lbfgs)

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    lbfgs.step(closure)
    sp.prune(60)
    for _ in range(2):
        lbfgs.step(closure)
        assert_held(sp)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mixed_precision_with_steps_that_are_skipped(dtype, device):
    model = conv_net(device)
    adam = torch.optim.Adam(model.parameters(), .01)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.**10)
    sp = Sparsifier(model).attach(adam, others=[scaler])
    skipped = []

    def step(i, blow_up=1.):
        x, y = images(device, i)
        adam.zero_grad()
        with torch.autocast(device.type, dtype): loss = F.cross_entropy(model(x), y)
        scaler.scale(loss*blow_up).backward()
        scaler.unscale_(adam)
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        before, scale = copy.deepcopy(model.state_dict()), scaler.get_scale()
        scaler.step(adam)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped.append(i)
            assert equal(dict(before), dict(model.state_dict()))
    step(0)
    sp.prune(70)
    for i in range(1, 6):
        step(i, float('inf') if i in (2, 4) else 1.)
        assert_held(sp)
    assert skipped == [2, 4]
    assert all(w.isfinite().all() for w in sp.weights.values())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_models_in_other_precisions(dtype, device):
    "Also when the precision changes after the sparsifier was made."
    for after in (False, True):
        model = conv_net(device) if after else conv_net(device).to(dtype)
        sp = Sparsifier(model)
        sp.prune(50)
        model.to(dtype)
        sgd = torch.optim.SGD(model.parameters(), .1, momentum=.9)
        sp.attach(sgd)
        for sparsity in (60, 75):
            sp.prune(sparsity)
            assert n_cut(sp.mask) == n_to_cut(sp.mask.n_total, sparsity)
            x, y = images(device)
            model(x.to(dtype)).sum().backward()
            sgd.step()
            assert_held(sp)


def test_a_gradient_that_is_not_finite_where_the_weight_is_cut_does_no_harm():
    "The slope of a root at zero is infinite; cut weights are as if they were not there."
    class Roots(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[1., 2., 3., 4.]]))

        def forward(self): return self.w.abs().sqrt().sum()
    model = Roots()
    sgd = torch.optim.SGD(model.parameters(), .1)
    sp = Sparsifier(model, layers='w').attach(sgd).prune(50)
    model().backward()
    assert model.w.grad.tolist()[0][:2] == [0, 0]
    nn.utils.clip_grad_norm_(model.parameters(), 1.)
    sgd.step()
    assert_held(sp)
    assert model.w.isfinite().all()


def test_a_cut_weight_that_has_become_nan_is_held_at_zero():
    model = conv_net()
    sp = Sparsifier(model).prune(50)
    cut = ~sp.mask['0.weight']
    with torch.no_grad(): model[0].weight[cut] = float('nan')
    sp.hold()
    assert_held(sp)


@pytest.mark.parametrize('case', ['channels last', 'sparse', 'expanded', 'double'])
def test_gradients_of_every_kind(case):
    "Whatever the memory of a weight and its gradient looks like."
    if case == 'sparse':
        model, batch = nn.Sequential(nn.Embedding(40, 4, sparse=True), nn.Linear(4, 3)), torch.tensor([1, 2, 2, 9])
    else:
        model, batch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)), torch.randn(2, 3, 8, 8)
    if case == 'channels last': model, batch = (o.to(memory_format=torch.channels_last) for o in (model, batch))
    if case == 'double': model, batch = model.double(), batch.double()
    sgd = torch.optim.SGD(model.parameters(), .1)
    sp = Sparsifier(model, context='local', layers=[nn.Embedding, nn.Linear] if case == 'sparse' else None).attach(sgd).prune(60)
    for _ in range(2):
        sgd.zero_grad()
        (sum(p.sum() for p in model.parameters()) if case == 'expanded' else model(batch).square().sum()).backward()
        sgd.step()
        assert_held(sp)
    assert all((w != 0).any() for w in sp.weights.values())


def test_averaged_copies_are_held_and_rewound_along(device):
    model = conv_net(device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(.9))
    sgd = torch.optim.SGD(model.parameters(), .05, momentum=.9)
    sp = Sparsifier(model).attach(sgd, copies=[ema])
    point = sp.take()
    for i in range(3): train_step(model, sgd, i), ema.update_parameters(model)
    moved = ema.module[0].weight.clone()
    for how in ('keep', 'restore'):
        sp.prune(50 if how == 'keep' else 70, point, how)
        assert_held(sp, ema)
        keep = sp.mask['0.weight']
        assert torch.equal(ema.module[0].weight[keep], point.tensors['0.weight'][keep]) and not torch.equal(moved[keep], ema.module[0].weight[keep])
        for i in range(3):
            train_step(model, sgd, i), ema.update_parameters(model)
            assert_held(sp), assert_held(sp, ema)


@pytest.mark.parametrize('way', ['deepcopy', 'pickle'])
def test_copies_of_a_sparsifier_go_on_by_themselves(way, device):
    "A copy holds its own model, with the same mask; the original is not touched."
    model = conv_net(device)
    sgd = torch.optim.SGD(model.parameters(), .05, momentum=.9)
    sp = Sparsifier(model, criteria='magnitude_increase').attach(sgd)
    train_step(model, sgd)
    sp.prune(50)
    train_step(model, sgd)
    other = copy.deepcopy(sp) if way == 'deepcopy' else pickle.loads(pickle.dumps(sp))
    before = copy.deepcopy(dict(model.state_dict()))
    assert other.mask == sp.mask and other.model is not model and all(w is named_tensors(other.model)[n] for n, w in other.weights.items())
    again = torch.optim.SGD(other.model.parameters(), .05, momentum=.9)
    other.attach(again)
    for i in range(3):
        train_step(other.model, again, i)
        assert_held(other)
    other.prune(80)
    train_step(other.model, again)
    assert_held(other)
    assert n_cut(other.mask) == n_to_cut(other.mask.n_total, 80) and n_cut(sp.mask) == n_to_cut(sp.mask.n_total, 50)
    assert equal(before, dict(model.state_dict())) and not equal(before, dict(other.model.state_dict()))


def test_a_copied_model_has_no_hooks_left():
    "The model alone, copied or pickled while attached, is a plain model."
    model = conv_net()
    sgd = torch.optim.SGD(model.parameters(), .05)
    sp = Sparsifier(model).attach(sgd).prune(50)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x, y = images()
        F.cross_entropy(other(x), y).backward()
        assert (other[0].weight.grad[~sp.mask['0.weight']] != 0).any()


def test_the_state_dict_stays_plain_and_comes_back(device):
    plain = list(conv_net().state_dict())
    model = conv_net(device)
    sgd = torch.optim.SGD(model.parameters(), .05)
    sp = Sparsifier(model).attach(sgd).prune(60)
    train_step(model, sgd)
    assert list(model.state_dict()) == plain
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train_step(model, sgd)
    model.load_state_dict(saved, strict=True)
    for i in range(2):
        assert_held(sp)
        train_step(model, sgd, i)
    other = conv_net(device)
    other.load_state_dict(saved, strict=True)
    assert_held(sp, other)


def test_detached_it_holds_no_more_and_attached_twice_it_holds_once():
    model = conv_net()
    first, second = (torch.optim.SGD(model.parameters(), .05) for _ in range(2))
    sp = Sparsifier(model).attach(first).attach(second).prune(50)
    train_step(model, second)
    assert_held(sp)
    sp.detach()
    train_step(model, second), train_step(model, first)
    assert (model[0].weight[~sp.mask['0.weight']] != 0).any()


# ---- wrappers ----

WRAPPERS = {'DataParallel': nn.DataParallel, 'compiled': lambda m: torch.compile(m, backend='aot_eager'),
            'both': lambda m: nn.DataParallel(torch.compile(m, backend='eager')), 'averaged': AveragedModel}


def trained_in(wrap, device):
    "Train a wrapped model with a mask; the wrapped model and its sparsifier."
    plain = conv_net(device)
    model = wrap(plain)
    sgd = torch.optim.SGD(model.parameters(), .05, momentum=.9, weight_decay=.1)
    sp = Sparsifier(model).attach(sgd)
    train_step(model, sgd)
    point = sp.take()
    for sparsity in (40, 70):
        sp.prune(sparsity, point, 'restore')
        for i in range(3):
            train_step(model, sgd, i)
            assert_held(sp)
    return model, sp


@pytest.mark.parametrize('name', WRAPPERS)
def test_wrapped_models_are_held_and_their_names_are_plain(name, device):
    model, sp = trained_in(WRAPPERS[name], device)
    assert list(sp.mask) == list(Sparsifier(conv_net()).mask)
    other = conv_net(device)
    other.load_state_dict(unwrap(model).state_dict(), strict=True)
    assert_held(sp, other)
    assert list(named_tensors(model)) == list(named_tensors(other))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None and shutil.which('clang++') is None, reason='Inductor needs a C++ compiler')
def test_compiled_by_inductor(device):
    model, sp = trained_in(torch.compile, device)
    other = conv_net(device)
    other.load_state_dict(unwrap(model).state_dict(), strict=True)
    assert_held(sp, other)


def test_a_compiled_part_has_plain_names():
    inner = nn.Sequential(nn.Linear(4, 4))
    model = nn.Sequential(torch.compile(inner, backend='eager'), nn.Linear(4, 2))
    sp = Sparsifier(model, layers=['0.0.weight', '1']).prune(50)
    assert list(sp.mask) == ['0.0.weight', '1.weight'] == [n for n in sp.take().tensors if n.endswith('weight')]


# ---- the proof that cut weights have no influence ----

@pytest.mark.parametrize('momentum, clip', [(0, None), (.9, None), (.9, .05)])
def test_training_equals_the_reparametrised_network_bit_for_bit(momentum, clip):
    "weight = original × mask, as `torch.nn.utils.prune` has it: there the cut weights cannot have any influence."
    masked, theirs = conv_net(), conv_net()
    sp = Sparsifier(masked).prune(70)
    for n, m in theirs.named_modules():
        if f'{n}.weight' in sp.mask: torch_prune.custom_from_mask(m, 'weight', sp.mask[f'{n}.weight'])
    at = dict(theirs.named_parameters())
    same_order = [at[f'{n}_orig'] if n in sp.mask else at[n] for n, _ in masked.named_parameters()]
    ours = list(masked.parameters())
    optimizers = [torch.optim.SGD(ps, .1, momentum=momentum, nesterov=momentum > 0) for ps in (ours, same_order)]
    sp.attach(optimizers[0])
    for i in range(8):
        norms = []
        for model, parameters, optimizer in zip((masked, theirs), (ours, same_order), optimizers):
            x, y = images(seed=i)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if clip: norms.append(nn.utils.clip_grad_norm_(parameters, clip))
            optimizer.step()
        if clip: assert norms[0] > clip and torch.equal(*norms)  # it does clip
    for n, p in masked.named_parameters():
        if n in sp.mask: assert torch.equal(p[sp.mask[n]], at[f'{n}_orig'][sp.mask[n]]) and not torch.equal(p, at[f'{n}_orig'])
        else: assert torch.equal(p, at[n])
    x, _ = images(seed=99)
    assert torch.equal(masked(x), theirs(x))


# ---- counts ----

@given(st.lists(st.integers(1, 99).map(float), min_size=1, max_size=4), st.sampled_from(['global', 'local']), st.integers(0, 3))
@quick
def test_counts_are_exact_up_and_down(sparsities, context, seed):
    "However sparsity goes: the exact count, in the network or in each layer; kept weights untouched; what is cut by more stays cut."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(13, 9), nn.Linear(9, 11, bias=False), nn.Linear(11, 3))
    sp = Sparsifier(model, context=context, allow_empty=True)
    for s in sparsities:
        mask, weights = sp.mask, {n: w.detach().clone() for n, w in sp.weights.items()}
        grows = {n: n_to_cut(t.numel(), s) >= int((~t).sum()) for n, t in mask.items()} if context == 'local' else \
            dict.fromkeys(mask, n_to_cut(mask.n_total, s) >= n_cut(mask))
        sp.prune(s)
        if context == 'global': assert n_cut(sp.mask) == n_to_cut(sp.mask.n_total, s)
        for n, t in sp.mask.items():
            if context == 'local': assert int((~t).sum()) == n_to_cut(t.numel(), s)
            assert (t <= mask[n]).all() if grows[n] else (t >= mask[n]).all()
            assert torch.equal(sp.weights[n].detach(), weights[n]*t)


@given(st.lists(st.integers(1, 99).map(float), min_size=1, max_size=3), st.sampled_from(['row', 'column', 'kernel', 'filter', 'channel', 'shared_kernel']),
       st.sampled_from(['global', 'local']))
@quick
def test_larger_units_are_whole_and_never_more_than_asked(sparsities, granularity, context):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(100, 5))
    sp = Sparsifier(model, granularity, context, batch=torch.randn(1, 3, 8, 8), allow_empty=True)
    for s in sparsities:
        sp.prune(s)
        asked = {n: n_to_cut(t.numel(), s, down=sp.units[n].unit_size > 1) for n, t in sp.mask.weights.items()}
        for n, t in sp.mask.weights.items():
            per_unit = sp.units[n].reduce(t.double())
            assert ((per_unit == 0) | (per_unit == 1)).all()
            size = sp.units[n].unit_size
            if context == 'local': assert int((~t).sum()) == asked[n] - asked[n] % size
        largest = max(sp.units[n].unit_size for n in sp.weights)
        if context == 'global': assert n_to_cut(sp.mask.n_total, s, down=True) - largest < n_cut(sp.mask) <= n_to_cut(sp.mask.n_total, s, down=True)


@pytest.mark.parametrize('context', ['global', 'local'])
def test_rates_of_the_papers_network(context):
    "784-300-100-10, a fifth of what is left each time, the output layer at half of that: the densities of the paper's figures."
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    for i in (0, 2, 4): nn.init.xavier_normal_(model[i].weight)  # as in the paper
    sp = Sparsifier(model, context=context, rates={'4': 50})
    left, output = {}, Fraction(1000)
    for i, sparsity in enumerate(geometric(n_steps=15).levels(100*(1 - .8**15)), 1):
        before = int(sp.mask['4.weight'].sum())
        sp.prune(sparsity)
        left[i] = round(sp.mask.density, 1)
        assert abs(int(sp.mask['4.weight'].sum()) - before*.9) <= 1
        if context == 'local':
            for n in ('0.weight', '2.weight'): assert abs(int(sp.mask[n].sum())/sp.mask[n].numel() - .8**i) < 1e-3
    assert {i: left[i] for i in (3, 7, 9, 15)} == {3: 51.3, 7: 21.1, 9: 13.5, 15: 3.6}


def test_rounds_of_a_schedule_take_every_row_that_fits():
    "A third of 30 rows, and a fifth of ten, in floating point too."
    sp = Sparsifier(nn.Sequential(nn.Linear(7, 30)), 'row')
    rows = [int((~sp.prune(s).mask['0.weight'][:, 0]).sum()) for s in iterative.levels(50)]
    assert rows == [5, 10, 15]
    sp = Sparsifier(nn.Sequential(nn.Linear(10, 10)), 'row').prune(geometric.levels(80)[0])
    assert n_cut(sp.mask) == 20


# ---- dense-sparse-dense: the best come back ----

@pytest.mark.parametrize('granularity', ['weight', 'row'])
@pytest.mark.parametrize('context', ['global', 'local'])
def test_less_sparsity_brings_back_the_best(granularity, context, device):
    "By their last values, whenever they were cut; none that was kept goes; training has moved the others on."
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)).to(device)
    adam, x = torch.optim.Adam(model.parameters(), .01), torch.randn(16, 20, device=device)
    sp = Sparsifier(model, granularity, context, allow_empty=True).attach(adam)

    def train(n):
        for _ in range(n):
            adam.zero_grad()
            model(x).square().mean().backward()
            adam.step()
    last = {n: w.detach().abs().clone() for n, w in sp.weights.items()}
    for sparsity in (60, 80):
        train(3)
        for n, w in sp.weights.items(): last[n] = torch.where(sp.mask[n], w.detach().abs(), last[n])
        sp.prune(sparsity)
    before = sp.mask
    train(3)
    sp.prune(30)  # some of both rounds come back
    sizes = {sp.units[n].unit_size for n in sp.weights}
    if context == 'global': assert n_to_cut(900, 30) - max(sizes) < n_cut(sp.mask) <= n_to_cut(900, 30)
    groups = [list(sp.weights)] if context == 'global' else [[n] for n in sp.weights]
    for names in groups:
        back = torch.cat([sp.units[n].reduce(last[n])[sp.units[n].reduce((sp.mask[n] & ~before[n]).float()) == 1] for n in names])
        out = torch.cat([sp.units[n].reduce(last[n])[sp.units[n].reduce((~sp.mask[n]).float()) == 1] for n in names])
        assert len(back) and len(out)
        if granularity == 'weight' or context == 'local': assert back.min() >= out.max()
    for n, t in sp.mask.items():
        assert t[before[n]].all()
        assert (sp.weights[n][t & ~before[n]] == 0).all()  # they come back at zero
    train(3)
    assert_held(sp)
    assert any((sp.weights[n][sp.mask[n] & ~before[n]] != 0).any() for n in sp.weights)
    sp.prune(0)
    assert n_cut(sp.mask) == 0
    train(1)


# ---- which weights ----

class Tied(nn.Module):
    "An embedding tied to the head, as in a language model."
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x): return self.head(self.body(self.embed(x)))


def test_a_tied_weight_counts_once_and_is_held_under_both_names():
    for layers, names in ((None, ['body.weight', 'head.weight']), ([nn.Embedding, nn.Linear], ['embed.weight', 'body.weight'])):
        model = Tied()
        sgd = torch.optim.SGD(model.parameters(), .1, momentum=.9)
        sp = Sparsifier(model, layers=layers, allow_empty=True).attach(sgd, copies=[copy.deepcopy(model)])
        assert list(sp.mask) == names and sp.mask.n_total == 28 + 16
        if layers: assert 'tied to embed.weight' in sp.report().notes['head.weight']
        point = sp.take()
        for s in (50, 70):
            sp.prune(s, point)
            model(torch.tensor([1, 2, 3])).square().sum().backward()
            sgd.step()
            assert_held(sp)
            assert (model.embed.weight == 0).sum() == (model.head.weight == 0).sum() == (~sp.mask[names[-1 if layers is None else 0]]).sum()


def test_two_layers_tied_to_each_other_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    chosen = prunable(model)
    assert list(chosen.weights) == ['0.weight', '1.weight'] and 'tied to 0.weight' in chosen.notes['2.weight']
    assert list(prunable(model, ignore='0.weight').weights) in (['1.weight'], ['1.weight', '2.weight'])


def test_frozen_weights_are_left_out_and_named():
    model = conv_net()
    model[3].requires_grad_(False)
    sp = Sparsifier(model)
    before = model[3].weight.clone()
    sp.prune(80)
    assert list(sp.mask) == ['0.weight', '6.weight'] and torch.equal(model[3].weight, before)
    assert 'frozen' in sp.report().notes['3.weight'] and '3.weight: frozen' in repr(sp.report()) and '3.weight: frozen' in sp.report()._repr_markdown_()
    for p in model.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match='no weight to cut'): Sparsifier(model)


def test_parametrized_weights_are_left_out_and_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    chosen = prunable(model)
    assert list(chosen.weights) == ['0.weight'] and 'parametrized' in chosen.notes['1.weight']


class Mixed(nn.Module):
    "A bit of everything that can be chosen."
    def __init__(self):
        super().__init__()
        self.convs, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose1d(2, 2, 3)), nn.Linear(4, 2)
        self.gate, self.attend, self.rnn = nn.Parameter(torch.randn(3, 3)), nn.MultiheadAttention(4, 2, add_bias_kv=True), nn.GRU(4, 4)


@pytest.mark.parametrize('layers, ignore, expected', [
    (None, None, 'convs.0 convs.2 head attend.in_proj attend.out_proj rnn.weight_ih rnn.weight_hh'), (nn.Linear, None, 'head attend.out_proj'),
    ([nn.Conv2d, nn.GRU], None, 'convs.0 rnn.weight_ih rnn.weight_hh'), ('gate', None, 'gate'), (['gate', 'head'], None, 'gate head'), ('convs', None, 'convs.0 convs.2'),
    ('convs.0.weight', None, 'convs.0'), ('*attend*', None, 'attend.in_proj attend.out_proj attend.bias_k attend.bias_v'), ('*.weight_?h_l0', None, 'rnn.weight_ih rnn.weight_hh'),
    (None, nn.GRU, 'convs.0 convs.2 head attend.in_proj attend.out_proj'), (None, ['convs', 'rnn', 'attend'], 'head'), (['gate', nn.Linear], 'head', 'gate attend.out_proj'),
    (None, '*proj*', 'convs.0 convs.2 head rnn.weight_ih rnn.weight_hh'), ((nn.Conv2d, 'gate'), ('convs.0',), 'gate')])
def test_layers_and_ignore_choose_by_type_name_pattern_and_bare_parameter(layers, ignore, expected):
    chosen, expected = list(prunable(Mixed(), layers, ignore).weights), expected.split()
    assert len(chosen) == len(expected) and all(any(c.startswith(e) for c in chosen) for e in expected), chosen


def two_layers(): return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


@pytest.mark.parametrize('kwargs, named', [
    (dict(layers='conv'), "layers='conv'"), (dict(layers=['0', 'nothing*']), "layers='nothing"), (dict(layers=nn.Conv2d), 'layers=.*Conv2d'), (dict(layers=[3]), 'layers=3'),
    (dict(ignore='conv'), "ignore='conv'"), (dict(ignore=[nn.Linear]), 'no weight to cut'), (dict(layers=[]), 'no weight to cut'), (dict(layers='0', ignore='0'), 'no weight to cut'),
    (dict(rates={'conv': 50}), "rates='conv'"), (dict(rates={'0': -1}), 'rates=.*-1'), (dict(rates={'0': float('nan')}), 'rates=.*nan'), (dict(rates={'0': 'x'}), "rates=.*'x'"),
    (dict(rates={'0': None}), 'rates=.*None'), (dict(rates={'0': 50, '2': 50}), 'rates names every layer'), (dict(context='layerwise'), "context='layerwise'"),
    (dict(granularity='filtre'), "granularity='filtre'"), (dict(granularity='filter'), 'batch= is missing'), (dict(granularity='layer', context='local'), 'layer'),
    (dict(criteria='biggest'), "criteria='biggest'")])
def test_what_cannot_be_chosen_is_refused_by_name(kwargs, named):
    with pytest.raises(ValueError, match=named): Sparsifier(two_layers(), **kwargs)


def test_lazy_modules_are_refused_by_name_until_a_batch_has_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(ValueError, match='1.weight.*run a batch'): Sparsifier(model)
    model(torch.randn(2, 4))
    assert list(Sparsifier(model).mask) == ['0.weight', '1.weight']


@pytest.mark.parametrize('optimizer', [None, object(), 'sgd'])
def test_what_is_no_torch_optimizer_cannot_be_attached(optimizer):
    with pytest.raises(ValueError, match='optimizer='): Sparsifier(two_layers()).attach(optimizer)


# ---- when pruning cannot be, nothing has changed ----

BAD = [(101, "sparsity=101"), (-1, 'sparsity=-1'), (float('nan'), 'nan'), ('x', "sparsity='x'"), (None, 'sparsity=None'), (100, 'cut 0.weight to nothing'),
       ({'conv': 50}, "sparsity='conv'"), ({'0': 101}, "sparsity.*0.*101"), ({'0': 'x'}, "sparsity.*'x'"), ({'0': None}, 'sparsity.*None'), ({'0': 50, '2': 100}, 'cut 2.weight to nothing')]


@pytest.mark.parametrize('sparsity, named', BAD)
def test_when_prune_raises_nothing_has_changed(sparsity, named):
    model = two_layers()
    sgd = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    sp = Sparsifier(model, criteria='updating_movement').attach(sgd)
    point = sp.take()
    model(torch.randn(3, 4)).square().sum().backward()
    sgd.step()
    sp.prune(30)
    before = copy.deepcopy((dict(model.state_dict()), sgd.state_dict(), sp.mask.tensors, sp.previous, [p.grad for p in model.parameters()]))
    with pytest.raises(ValueError, match=named): sp.prune(sparsity, point)
    assert equal(before, (dict(model.state_dict()), sgd.state_dict(), sp.mask.tensors, sp.previous, [p.grad for p in model.parameters()]))


@pytest.mark.parametrize('case', ['an unknown choice', 'another number of loaders', 'taken before attach'])
def test_when_the_rewind_cannot_be_nothing_is_pruned(case):
    "A point that does not fit, or a choice that is none: found before the weights are cut."
    model = two_layers()
    sgd = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    sp = Sparsifier(model)
    point = sp.take()
    sp.attach(sgd, loaders=[torch.Generator()] if case == 'another number of loaders' else [])
    if case == 'an unknown choice': point = sp.take()
    before, mask = copy.deepcopy(dict(model.state_dict())), sp.mask
    with pytest.raises(ValueError, match='loaders' if 'loaders' in case else 'optimizer'): sp.prune(50, point, 'warm' if case == 'an unknown choice' else 'fresh')
    assert equal(mask.tensors, sp.mask.tensors) and equal(before, dict(model.state_dict()))


def test_a_share_warns_and_a_percentage_does_not():
    with pytest.warns(UserWarning, match='sparsity=0.5 means 0.5 %'): Sparsifier(two_layers()).prune(.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Sparsifier(two_layers()).prune(50)


def test_next_mask_touches_nothing():
    model = conv_net()
    sp = Sparsifier(model).prune(20)
    before, mask = copy.deepcopy(dict(model.state_dict())), sp.mask
    assert n_cut(sp.next_mask(60)) > n_cut(sp.mask) and sp.mask is mask and equal(before, dict(model.state_dict()))


# ---- given masks ----

def test_a_given_mask_says_what_may_be_cut_and_is_held_at_once():
    mask = Mask({'2.weight': torch.rand(4, 4) > .5})
    model = two_layers()
    sp = Sparsifier(model, mask=mask)
    assert_held(sp)
    assert (model[0].weight != 0).all() and sp.mask == mask
    sp.prune(90)
    assert (sp.mask['2.weight'] <= mask['2.weight']).all()


@pytest.mark.parametrize('mask, named', [(Mask({'3.weight': torch.ones(4, 4, dtype=torch.bool)}), '3.weight'), (Mask({'0.weight': torch.ones(4, 3, dtype=torch.bool)}), '0.weight.*shape')])
def test_a_foreign_mask_is_refused_by_name(mask, named):
    sp = Sparsifier(two_layers())
    before = sp.mask
    with pytest.raises(ValueError, match=named): sp.set_mask(mask)
    assert sp.mask is before


def test_a_mask_of_some_of_the_weights_is_refused_or_leaves_the_others_whole():
    model = two_layers()
    sgd = torch.optim.SGD(model.parameters(), .1)
    sp = Sparsifier(model).attach(sgd)
    try: sp.set_mask(Mask({'0.weight': torch.rand(4, 4) > .5}))
    except ValueError as e:
        assert '2.weight' in str(e)
        return
    model(torch.randn(2, 4)).sum().backward()
    sgd.step()
    assert_held(sp)
    assert sp.prune(70).mask.n_total == 32


def test_a_mask_without_followers_serves_where_filters_are_cut():
    model = two_layers()
    sgd = torch.optim.SGD(model.parameters(), .1)
    sp = Sparsifier(model, 'filter', batch=torch.randn(1, 4), mask=Sparsifier(two_layers(), 'row').prune(50).mask).attach(sgd)
    model(torch.randn(2, 4)).sum().backward()
    sgd.step()
    assert_held(sp)


def test_an_optimizer_of_another_model_is_refused():
    net, other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), nn.Linear(4, 2)
    with pytest.raises(ValueError, match='none of the weights'): Sparsifier(net).attach(torch.optim.SGD(other.parameters(), .1))
    with pytest.warns(UserWarning, match='does not hold 0.weight'): Sparsifier(net).attach(torch.optim.SGD(net[1].parameters(), .1))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Sparsifier(net).attach(torch.optim.SGD(net.parameters(), .1))


@pytest.mark.parametrize('norm', [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.parametrize('layers', [None, nn.Conv2d, '*weight*'])
@pytest.mark.filterwarnings('ignore')
def test_weights_that_are_computed_from_others_are_left_out(norm, layers):
    net = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 4, 3))
    net(torch.randn(1, 3, 8, 8))
    sp = Sparsifier(net, layers=layers).prune(50)
    assert list(sp.weights) == ['1.weight'] and 'computed from others' in sp.report().notes['0.weight']


# ------------------------------------------------------------------ what a user forgets

def attached(**given):
    "A layer, its optimizer with a cosine schedule, and a sparsifier attached to it."
    model = nn.Linear(10, 10)
    sgd = torch.optim.SGD(model.parameters(), .1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 10)
    return scheduler, Sparsifier(model).attach(sgd, **{k: v(scheduler) for k, v in given.items()})


def test_a_scheduler_that_was_left_out_of_a_rewind_is_told(recwarn):
    for given, warned in (({}, True), (dict(others=lambda s: [s]), False)):
        _, sp = attached(**given)
        point = sp.take()
        recwarn.clear()
        sp.prune(50, rewind_to=point)
        assert any('others=[scheduler]' in str(w.message) for w in recwarn.list) == warned


@pytest.mark.parametrize('name, value', [('others', lambda s: s), ('loaders', lambda s: torch.utils.data.DataLoader([1])), ('copies', lambda s: nn.Linear(1, 1))])
def test_what_is_no_list_is_refused(name, value):
    with pytest.raises(ValueError, match=f'{name} is a .*: give a list'): attached(**{name: value})


def test_loaders_are_those_for_training():
    from fastai.data.core import DataLoaders
    with pytest.raises(ValueError, match='the one for training'): attached(loaders=lambda s: [DataLoaders([1], [2])])


def test_a_selection_is_shown_in_lines_and_not_in_numbers():
    shown = repr(prunable(nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 2))))
    assert shown.splitlines() == ['2 tensors, 60 weights may be cut:', '0.weight  (5, 10)', '1.weight  (2, 5)']


# ---- a model that was changed after the sparsifier was made ----

def new_head(model): model[-1] = nn.Linear(8, 3)
def assigned(model): model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
def without_a_head(model): del model[-1]

@pytest.mark.parametrize('change', [new_head, assigned, without_a_head])
def test_a_model_with_other_tensors_is_refused(change):
    "What prunes, takes, rewinds or counts would go on with tensors that the model no longer has."
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    sp = Sparsifier(model).prune(20)
    point, mask = sp.take(), sp.mask
    change(model)
    was = copy.deepcopy(model.state_dict())
    for touch in (lambda: sp.prune(50), lambda: sp.prune(50, rewind_to=point), lambda: sp.next_mask(50), sp.take, sp.report, lambda: sp.rewind(point)):
        with pytest.raises(ValueError, match='is another tensor'): touch()
    assert sp.mask is mask and equal(was, model.state_dict())


def test_a_model_that_moved_or_changed_its_precision_has_the_same_tensors():
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    sp = Sparsifier(model).prune(20)
    model.double().to('cpu')
    assert sp.prune(50).report().lines[-1][1] == 32


@pytest.mark.parametrize('mask, says', [({'0.weight': torch.ones(2, 2)}, 'give a Mask'), (3, 'give a Mask'), (Mask({'head.weight': torch.ones(2, 2, dtype=torch.bool)}), 'head.weight, which is no weight of this model')])
def test_what_is_no_mask_of_this_model(mask, says):
    with pytest.raises(ValueError, match=says): Sparsifier(nn.Sequential(nn.Linear(2, 2)), mask=mask)


def test_what_cannot_be_rewound_to_or_along():
    model = nn.Linear(2, 2)
    sgd, more = (torch.optim.SGD(model.parameters(), .1) for _ in range(2))
    sp = Sparsifier(model)
    with pytest.raises(ValueError, match='no rewind point'): sp.rewind(model.state_dict())
    with pytest.raises(ValueError, match='no state_dict'): sp.attach(sgd, others=[object()])
    with pytest.raises(ValueError, match=r'others=\[…\]'): sp.attach([sgd, more])
    assert sp.attach(sgd, others=[more]).optimizer is sgd


# ---- names of modules ----

def test_the_name_of_an_embedding_means_its_weight():
    "Also where it is tied to a layer that would be cut, which is then spared with it, and said."
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict(dict(emb=nn.Embedding(9, 4), norm=nn.LayerNorm(4), mix=nn.Linear(4, 4)))
            self.out = nn.Linear(4, 9)
            self.out.weight = self.body.emb.weight
    model = Tied()
    assert list(prunable(model).weights) == ['body.mix.weight', 'out.weight'] and 'tied to out.weight' in prunable(model).notes['body.emb.weight']
    assert list(prunable(model, layers='body.emb').weights) == ['body.emb.weight'] and list(prunable(model, layers='body').weights) == ['body.mix.weight']
    for ignore in ('body.emb', 'body.emb.weight', 'out', ['body.emb']): assert list(prunable(model, ignore=ignore).weights) == ['body.mix.weight'], ignore
    assert 'tied to body.emb.weight, which is ignored' in prunable(model, ignore='body.emb').notes['out.weight']
    for choice in ('body.norm', 'bod'):
        with pytest.raises(ValueError, match='means no weight'): prunable(model, layers=choice)


@pytest.mark.parametrize('parametrize', [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal, nn.utils.weight_norm])
def test_the_name_of_a_layer_whose_weight_is_computed_means_nothing(parametrize):
    "What it is computed from could be cut, and its weight would have no zero."
    model = nn.Sequential(parametrize(nn.Linear(6, 6)), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="layers='0' means no weight"): prunable(model, layers='0')


def test_the_name_of_a_module_means_neither_its_biases_nor_its_normalisation():
    model = nn.ModuleDict(dict(body=nn.ModuleDict(dict(norm=nn.LayerNorm((4, 4)), emb=nn.Embedding(9, 4)))))
    model.body.emb.bias = nn.Parameter(torch.ones(2, 2))
    assert list(prunable(model, layers='body').weights) == ['body.emb.weight']


def test_sparsities_for_a_module_are_for_all_of_it_that_was_chosen():
    model = nn.ModuleDict(dict(body=nn.ModuleDict(dict(emb=nn.Embedding(10, 4), mix=nn.Linear(4, 5))), out=nn.Linear(4, 5)))
    sp = Sparsifier(model, layers=['body.emb', 'body.mix', 'out'])
    sp.prune({'body': 50})
    assert {n: sp.mask.kept_in(n) for n in sp.weights} == {'body.emb.weight': 20, 'body.mix.weight': 10, 'out.weight': 20}
