"SparsifyCallback in fastai's Learner: the procedure, step by step."
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import ParamScheduler, SchedCos, fit_flat_cos, fit_one_cycle
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import ValueMetric
from fastai.optimizer import Adam, OptimWrapper, RMSProp, SGD
from torch import nn

from helpers_fastai import (N_BATCHES, ConvNet, CpuMixedPrecision, SkipSteps, Spy, Steps, different, is_empty, is_masked, n_zeros,
                            same, small_dls, small_learner, small_model, tensors_of, weights_of)
from lth_nb.callback import SparsifyCallback
from lth_nb.fitting import MaskCallback, Seeded
from lth_nb.criteria import large_final
from lth_nb.rewind import Position, RewindPoint
from lth_nb.schedule import agp, cos, dsd, geometric, iterative, lin, one_cycle, one_shot
from lth_nb.sparsifier import Sparsifier

N_TOTAL = 8*16 + 16*3 # 176 prunable weights
BLOG_CUTS = [0]*5 + [29]*5 + [59]*5 + [88]*5 # nearest to 176·(0, 50/3, 100/3, 50)/100 = 0, 29.33, 58.67, 88

def positional(**kw): return SparsifyCallback(50, 'weight', 'global', large_final, iterative, start_epoch=5, lth=True, **kw)
def keywords(**kw): return SparsifyCallback(end_sparsity=50, granularity='weight', method='global', criteria=large_final, schedule=iterative,
                                            start_epoch=5, lth=True, **kw)
def context(**kw): return SparsifyCallback(end_sparsity=50, granularity='weight', context='global', criteria='large_final', schedule=iterative(3),
                                           start_epoch=5, lth=True, **kw)


def blog_fit(sp_cb, n_epoch=20, cbs=(), **kwargs):
    "The blog's fit, with spies just before and just after what the callback does at the start of an epoch."
    learn = small_learner(**kwargs)
    before, after = Spy(sp_cb, 54), Spy(sp_cb, 56)
    learn.fit(n_epoch, 1e-2, cbs=[sp_cb, before, after, *cbs])
    return learn, before, after


# 1. The blog's lines

@pytest.mark.parametrize('form, k', [(positional, 0), (positional, 1), (positional, 5), (keywords, 1), (context, 0)])
def test_blog_rewinds_to_the_bit(form, k):
    sp_cb = form(rewind_epoch=k)
    learn, before, after = blog_fit(sp_cb)
    origin = after.seen[k]['tensors'] if k < 5 else before.seen[5]['tensors']
    for epoch in range(20):
        was, now = before.seen[epoch], after.seen[epoch]
        if epoch in (5, 10, 15):
            assert is_masked(now['tensors'], origin, now['mask']) is True
            assert now['position'] == Position(k*N_BATCHES, k, 0)
            assert is_empty(now['opt']) and not is_empty(was['opt'])
            assert len(different(was['tensors'], origin)) == (0 if (k, epoch) == (5, 5) else len(origin)), 'nothing was trained before the rewind'
        else:
            assert same(was['tensors'], now['tensors']) and same(was['opt'], now['opt']) and same(was['mask'], now['mask'])
        assert sum(int((~m).sum()) for m in now['mask'].values()) == BLOG_CUTS[epoch]
        assert sum(int((~m).sum()) for m in was['mask'].values()) == ([0] + BLOG_CUTS)[epoch]
    assert [v[-1] for v in learn.recorder.values] == pytest.approx([100*n/N_TOTAL for n in BLOG_CUTS])


def test_each_pruning_cuts_the_lowest_of_the_trained_weights():
    sp_cb = positional()
    _, before, after = blog_fit(sp_cb)
    for epoch, n_cut in ((5, 29), (10, 59), (15, 88)):
        trained = torch.cat([before.seen[epoch]['tensors'][n].abs().flatten() for n in weights_of(sp_cb)])
        keep = torch.cat([after.seen[epoch]['mask'][n].flatten() for n in weights_of(sp_cb)])
        assert keep.sum() == N_TOTAL - n_cut
        assert trained[~keep].max() <= trained[keep].min()
        assert not (keep & ~torch.cat([before.seen[epoch]['mask'][n].flatten() for n in weights_of(sp_cb)])).any(), 'a cut weight came back'


def test_masks_change_between_the_epochs_and_nowhere_else():
    sp_cb, seen = positional(), []
    class Count(Callback):
        order, run_valid = 200, False
        def before_batch(self): seen.append((self.learn.epoch, sp_cb.mask.n_total - sp_cb.mask.n_kept, n_zeros(sp_cb)))
        def after_step(self): seen.append((self.learn.epoch, sp_cb.mask.n_total - sp_cb.mask.n_kept, n_zeros(sp_cb)))
    blog_fit(sp_cb, cbs=[Count()])
    assert len(seen) == 20*N_BATCHES*2
    assert all(cut == zeros == BLOG_CUTS[epoch] for epoch, cut, zeros in seen)


def test_no_step_between_pruning_and_rewind(monkeypatch):
    log, set_mask, restore = [], Sparsifier.set_mask, RewindPoint.restore
    def noted(self, mask):
        if hasattr(self, 'mask') and mask is not self.mask: log.append('prune')
        return set_mask(self, mask)
    monkeypatch.setattr(Sparsifier, 'set_mask', noted)
    monkeypatch.setattr(RewindPoint, 'restore', lambda self, *a, **k: (log.append('rewind'), restore(self, *a, **k))[1])
    class Note(Callback):
        order, run_valid = -5, False
        def after_pred(self): log.append('forward')
        def after_step(self): log.append('step')
    sp_cb, steps = positional(), Steps()
    blog_fit(sp_cb, cbs=[Note(), steps])
    epochs = lambda n: ['forward', 'step']*N_BATCHES*n
    turn = ['prune', 'rewind']
    assert log == epochs(5) + turn + epochs(5) + turn + epochs(5) + turn + epochs(5)
    assert steps.n == 20*N_BATCHES


@pytest.mark.parametrize('opt_func', [Adam, partial(SGD, mom=.9), partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['Adam', 'SGD', 'AdamW'])
@pytest.mark.parametrize('how', ['fresh', 'restore', 'keep'])
def test_optimizer_choices(how, opt_func):
    sp_cb = positional(rewind_epoch=1, optimizer=how)
    _, before, after = blog_fit(sp_cb, opt_func=opt_func)
    recorded = after.seen[1]['opt']
    assert not is_empty(recorded)
    for epoch in (5, 10, 15):
        now, was = after.seen[epoch]['opt'], before.seen[epoch]['opt']
        if how == 'fresh': assert is_empty(now)
        else: assert same(now, recorded if how == 'restore' else was)
        assert not same(was, recorded)


def test_fresh_optimizer_keeps_fastais_marks():
    learn = small_learner(wd=.1)
    learn.create_opt()
    marks = [{k: v for k, v in s.items() if k in ('force_train', 'do_wd')} for s in learn.opt.state_dict()['state']]
    learn.fit(4, 1e-2, cbs=SparsifyCallback(50, schedule=one_shot, start_epoch=2, lth=True))
    assert [{k: v for k, v in s.items() if k in ('force_train', 'do_wd')} for s in learn.opt.state_dict()['state']] == marks
    assert any(marks)


@pytest.mark.parametrize('k', [0, 1])
def test_reset_end(k):
    for reset_end in (False, True):
        sp_cb = positional(rewind_epoch=k, reset_end=reset_end)
        learn, before, after = blog_fit(sp_cb)
        now, origin = tensors_of(learn.model), after.seen[k]['tensors']
        assert n_zeros(sp_cb) == 88 == sp_cb.mask.n_total - sp_cb.mask.n_kept
        if reset_end:
            assert is_masked(now, origin, sp_cb.mask) is True
            assert sp_cb.position == Position(k*N_BATCHES, k, 0)
        else:
            assert same(now, after.end['tensors'])
            assert all(not same(now[n][sp_cb.mask[n]], origin[n][sp_cb.mask[n]]) for n in sp_cb.mask)
            assert sp_cb.position == Position((k + 5)*N_BATCHES, k + 5, 0)


def test_reset_end_without_rounds():
    sp_cb = SparsifyCallback(50, schedule=agp, start_epoch=1.5, rewind_epoch=1, reset_end=True)
    learn, before, after = blog_fit(sp_cb, 4)
    assert is_masked(tensors_of(learn.model), after.seen[1]['tensors'], sp_cb.mask) is True
    assert n_zeros(sp_cb) == 88


def test_sparsity_is_a_column_and_no_metric():
    learn = small_learner()
    n_metrics, logged = len(learn.metrics), []
    learn.logger = logged.append
    for fit in (1, 2):
        learn.fit(4, 1e-2, cbs=SparsifyCallback(50, start_epoch=1, lth=True))
        assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'time']
        assert len(learn.metrics) == n_metrics and 'sparsity' not in learn.metrics.attrgot('name')
        assert [v[3] for v in learn.recorder.values] == pytest.approx([0, 100*29/N_TOTAL, 100*59/N_TOTAL, 50])
        assert all(len(row) == 6 and row[4] == v[3] for row, v in zip(logged[-4:], learn.recorder.values))
    learn.fit(1, 1e-2)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'], 'a column is left behind'


def test_sparsity_column_in_the_table_and_in_csv(tmp_path):
    learn = small_learner(path=tmp_path)
    learn.add_cb(ProgressCallback())
    logged = []
    learn.progress._write_stats = lambda log: logged.append(list(log))
    learn.recorder.add_time, learn.recorder.train_metrics = False, True
    learn.fit(4, 1e-2, cbs=[SparsifyCallback(50, start_epoch=1, lth=True), CSVLogger()])
    assert logged[0] == ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', 'sparsity']
    assert [row[-1] for row in logged[1:]] == pytest.approx([0, 100*29/N_TOTAL, 100*59/N_TOTAL, 50])
    header, *rows = (tmp_path/'history.csv').read_text().split()
    assert header.split(',')[-1] == 'sparsity' and len(rows) == 4 and float(rows[-1].split(',')[-1]) == 50


def test_mask_holds_in_further_fits():
    sp_cb = positional(reset_end=True)
    learn, *_ = blog_fit(sp_cb)
    mask = sp_cb.mask
    for fit in (learn.fit, learn.fit_one_cycle):
        steps = Steps(sp_cb)
        was = tensors_of(learn.model)
        fit(2, 1e-2, cbs=[sp_cb, steps])
        assert steps.n == 2*N_BATCHES and steps.n_leaks == 0 < steps.checked
        assert sp_cb.mask is mask and n_zeros(sp_cb) == 88
        assert [v[-1] for v in learn.recorder.values] == [50, 50]
        assert all(not same(was[n][m], tensors_of(learn.model)[n][m]) for n, m in mask.items()), 'nothing was trained'


def test_further_one_cycle_has_its_own_length():
    learn, alone = small_learner(), small_learner()
    sp_cb = SparsifyCallback(50, start_epoch=1, lth=True)
    learn.fit_one_cycle(4, 1e-2, cbs=sp_cb)
    learn.fit_one_cycle(3, 1e-2, cbs=sp_cb)
    alone.fit_one_cycle(3, 1e-2)
    assert learn.recorder.lrs == alone.recorder.lrs


def test_the_model_stays_plain():
    plain = small_learner().model
    names = list(plain.state_dict())
    sp_cb = positional()
    learn, *_ = blog_fit(sp_cb)
    assert list(learn.model.state_dict()) == names
    plain.load_state_dict(learn.model.state_dict(), strict=True)
    for m in learn.model.modules():
        hooks = [v for k, v in vars(m).items() if k.endswith('_hooks')]
        assert hooks and not any(hooks) and not hasattr(m, 'parametrizations')
    for p in learn.model.parameters(): assert not p._backward_hooks and not p._post_accumulate_grad_hooks


def test_report_and_plan():
    learn = small_learner()
    sp_cb = positional(rewind_epoch=1)
    plan = sp_cb.plan(learn, 20)
    assert list(plan) == [(5*N_BATCHES, pytest.approx(50/3)), (10*N_BATCHES, pytest.approx(100/3)), (15*N_BATCHES, 50)]
    assert plan.n_cut == (29, 59, 88) and plan.rewind == N_BATCHES and len(plan) == 3
    rows = plan._repr_markdown_().split('\n')
    assert [r.split('|')[1].strip() for r in rows[2:5]] == ['5', '10', '15'] and '88' in rows[4]
    with pytest.raises(ValueError, match='nothing has been pruned'): sp_cb.report()
    before = tensors_of(learn.model)
    assert not different(before, tensors_of(learn.model)) and sp_cb.sparsifier is None, 'plan changed something'
    learn.fit(20, 1e-2, cbs=sp_cb)
    report = sp_cb.report()
    assert {(n, k, t) for n, k, t in report.rows} == {(n, int(m.sum()), m.numel()) for n, m in sp_cb.mask.items()}
    assert report.lines[-1] == ('in all', 88, 176, 50.) and '50.00 %' in repr(report)


@pytest.mark.parametrize('kwargs', [dict(context='local'), dict(end_sparsity={'0.weight': 33, '4.weight': 71}), dict(rates={'4.weight': 50})],
                         ids=['local', 'per layer', 'rates'])
def test_plan_shows_what_the_fit_does(kwargs):
    "The counts the plan shows are those of the fit, and each pruning has its row."
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)) if 'context' in kwargs else small_model()
    learn, cuts = small_learner(model), []
    sp_cb = SparsifyCallback(**{'end_sparsity': 50, 'start_epoch': 1, 'lth': True, **kwargs})
    plan = sp_cb.plan(learn, 4)
    class Count(Callback):
        order = 200
        def before_train(self): cuts.append(sp_cb.mask.n_total - sp_cb.mask.n_kept)
    learn.fit(4, 1e-2, cbs=[sp_cb, Count()])
    if 'rates' not in kwargs: assert list(plan.n_cut) == cuts[1:]
    assert len([r for r in plan._repr_markdown_().split('\n') if r.startswith('|')]) == 2 + 3


# 2. Zero stays zero

OPTIMIZERS = dict(Adam=Adam, AdamL2=partial(Adam, decouple_wd=False), SGD=partial(SGD, mom=.9), RMSProp=partial(RMSProp, mom=.9),
                  AdamW=partial(OptimWrapper, opt=torch.optim.AdamW), nesterov=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True))
EXTRAS = dict(plain=lambda: [], clip=lambda: [GradientClip(.1)], accumulate=lambda: [GradientAccumulation(16)], skip=lambda: [SkipSteps()],
              mixed=lambda: [CpuMixedPrecision(init_scale=2.**10)])

@pytest.mark.parametrize('opt_func', OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize('kwargs', [dict(lth=True, optimizer='keep'), dict(lth=True, optimizer='restore', rewind_epoch=1), dict(schedule=agp)],
                         ids=['keep', 'restore', 'agp'])
def test_zero_stays_zero_for_each_optimizer(opt_func, kwargs):
    sp_cb = SparsifyCallback(50, start_epoch=1, **kwargs)
    steps, learn = Steps(sp_cb), small_learner(opt_func=opt_func, wd=.1)
    learn.fit(4, 1e-2, cbs=[sp_cb, steps])
    assert steps.n_leaks == 0 < steps.checked and n_zeros(sp_cb) == 88


@pytest.mark.parametrize('extra', EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize('opt_func', [Adam, OPTIMIZERS['AdamW']], ids=['Adam', 'AdamW'])
def test_zero_stays_zero_with_other_callbacks(extra, opt_func):
    sp_cb = SparsifyCallback(50, start_epoch=1, lth=True, optimizer='keep')
    steps, learn = Steps(sp_cb), small_learner(opt_func=opt_func, wd=.1)
    learn.fit(7, 1e-2, cbs=[sp_cb, steps, *extra()])
    assert steps.n_leaks == 0 < steps.checked and n_zeros(sp_cb) == 88


def test_gradients_of_what_is_cut_are_zero_before_clipping():
    sp_cb, norms = SparsifyCallback(80, schedule=one_shot, start_epoch=1, lth=True), []
    class Look(Callback):
        order, run_valid = 10, False # just before GradientClip
        def before_step(self):
            for n, keep in sp_cb.mask.items(): norms.append(float(dict(self.learn.model.named_parameters())[n].grad[~keep].abs().sum()))
    small_learner().fit(2, 1e-2, cbs=[sp_cb, GradientClip(.1), Look()])
    assert len(norms) == 2*2*N_BATCHES and not any(norms)


def test_a_cut_weight_whose_gradient_is_not_finite_stays_zero():
    "The derivative of √|w| at a weight that was set to zero is infinite; multiplied by zero it would be NaN."
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(8, 16), nn.Linear(16, 3)
        def forward(self, x): return self.out(torch.relu(x @ self.fc.weight.abs().sqrt().T))
    sp_cb = SparsifyCallback(50, schedule=one_shot, start_epoch=1)
    learn = small_learner(Root)
    learn.fit(2, 1e-2, cbs=[sp_cb, GradientClip(1.)])
    assert not any(t.isnan().any() for t in tensors_of(learn.model).values()) and n_zeros(sp_cb) == round(.5*sp_cb.mask.n_total)


def test_skipped_steps_are_no_steps():
    sp_cb = SparsifyCallback(50, schedule=one_shot, start_epoch=2, lth=True, rewind_step=3)
    seen = []
    class Note(Callback):
        order, run_valid = 200, False
        def after_batch(self): seen.append((sp_cb.position, tensors_of(self.learn.model)))
    steps, learn = Steps(), small_learner()
    learn.fit(4, 1e-2, cbs=[sp_cb, SkipSteps(), steps, Note()])
    assert [p.steps for p, _ in seen[:8]] == [0, 1, 1, 2, 2, 3, 3, 4] # the first of each two is skipped
    assert sp_cb.rewind_point.position == Position(3, 1, 2)
    weights = dict(learn.model.named_parameters())
    assert all(same(sp_cb.rewind_point.tensors[n], seen[5][1][n]) for n in weights)
    assert len(seen) == 2*N_BATCHES + 2 + N_BATCHES and steps.n == len(seen)//2
    assert sp_cb.position.steps == 3 + 3 and sp_cb.position.epoch == 3


def test_accumulated_steps_are_counted_once():
    sp_cb, steps = SparsifyCallback(50, schedule=one_shot, start_epoch=2, lth=True, rewind_step=3), Steps()
    learn = small_learner()
    learn.fit(4, 1e-2, cbs=[sp_cb, GradientAccumulation(16), steps])
    assert sp_cb.rewind_point.position == Position(3, 1, 2)
    assert steps.n == 4 + 1 + 2 and sp_cb.position.steps == 6


def test_accumulated_gradients_do_not_cross_a_rewind():
    "Three batches a step, four batches an epoch: at the rewind a gradient waits, and is dropped."
    learn, seen = small_learner(dropout=0., dls=small_dls(shuffle=False)), []
    class Look(Callback):
        order, run_valid = 0, False
        def before_batch(self):
            if self.learn.iter == 0: seen.append((self.learn.epoch, self.learn.gradient_accumulation.count,
                                                  sum(float(p.grad.abs().sum()) for p in self.learn.model.parameters() if p.grad is not None)))
    learn.fit(4, 1e-2, cbs=[SparsifyCallback(50, schedule=one_shot, start_epoch=2, lth=True), GradientAccumulation(24), Look()])
    assert seen[0][1:] == seen[2][1:] == (0, 0.) and seen[1][1] == 8 and seen[1][2] > 0


def test_mixed_precision_skips_and_is_rewound():
    "Overflows skip steps and halve the scale, two good steps double it; the scale and the growth counter are part of what is rewound."
    sp_cb = SparsifyCallback(50, schedule=one_shot, start_epoch=2, lth=True, rewind_epoch=1, optimizer='restore')
    mixed, scales, positions = CpuMixedPrecision(overflow_at=(1, 4, 5, 6), init_scale=2.**10, growth_interval=2), {}, {}
    class Look(Callback):
        order = 200
        def before_epoch(self): scales[self.learn.epoch], positions[self.learn.epoch] = deepcopy(self.learn.scaler.state_dict()), sp_cb.position
    steps, learn = Steps(sp_cb), small_learner()
    learn.fit(3, 1e-2, cbs=[sp_cb, mixed, Look(), steps])
    assert mixed.n_skipped == 4 and steps.n == 12 - 4 and steps.n_leaks == 0
    assert positions == {0: Position(), 1: Position(3, 1), 2: Position(3, 1)} and sp_cb.position == Position(7, 2)
    assert (scales[1]['scale'], scales[1]['_growth_tracker']) == (2.**10, 0) and scales[2] == scales[1] and n_zeros(sp_cb) == 88


def test_save_load_and_deepcopy_carry_plain_zeros(tmp_path):
    sp_cb = SparsifyCallback(50, start_epoch=1, lth=True)
    learn = small_learner(path=tmp_path)
    learn.fit(4, 1e-2, cbs=sp_cb)
    learn.save('pruned')
    again, copied = small_learner(path=tmp_path, seed=2), deepcopy(learn.model)
    again.load('pruned', weights_only=False)
    for model in (again.model, copied):
        assert same(tensors_of(model), tensors_of(learn.model))
        assert all(not dict(model.named_parameters())[n][~m].any() for n, m in sp_cb.mask.items())
    hold = MaskCallback(Sparsifier(again.model, mask=sp_cb.mask))
    again.fit(1, 1e-2, cbs=[hold, steps := Steps(hold)])
    assert steps.n_leaks == 0 < steps.checked and hold.mask == sp_cb.mask
    assert [v[-1] for v in again.recorder.values] == [50]


def test_loading_dense_weights_into_a_finished_callback_holds_in_the_next_fit(tmp_path):
    learn = small_learner(path=tmp_path)
    learn.save('dense')
    sp_cb = SparsifyCallback(50, start_epoch=1, lth=True)
    learn.fit(4, 1e-2, cbs=sp_cb)
    learn.load('dense', weights_only=False)
    learn.fit(1, 1e-2, cbs=[sp_cb, steps := Steps(sp_cb)])
    assert steps.n_leaks == 0 < steps.checked and n_zeros(sp_cb) == 88


def test_export_and_deepcopy_with_the_callback_on_the_learner(tmp_path):
    learn = small_learner(path=tmp_path, cbs=SparsifyCallback(50, start_epoch=1, lth=True))
    del learn.logger
    learn.logger = print
    with learn.no_logging(): learn.fit(4, 1e-2)
    copied = deepcopy(learn)
    assert copied.sparsify.sparsifier.model is copied.model and copied.sparsify.mask == learn.sparsify.mask
    with copied.no_logging(): copied.fit(1, 1e-2)
    assert n_zeros(copied.sparsify) == 88 and same(tensors_of(learn.model), tensors_of(learn.model))


# 3. Callbacks that track a best

def with_score(scores, **kwargs):
    "A learner whose metric at each epoch is written down beforehand."
    learn = small_learner(**kwargs)
    learn.metrics = [ValueMetric(lambda: scores[learn.epoch], 'score')]
    return learn

BEST_IS_DENSE = [1, 2, 9, 2, 1] + [1, 8, 1, 1, 1] + [7, 1, 1, 1, 1] + [1, 2, 5, 3, 2] # best of all at 2, of the last round at 17

class AtEnds(Callback):
    "Keep the tensors at the end of each epoch."
    order = 58
    def __init__(self): self.seen = {}
    def after_epoch(self): self.seen[self.learn.epoch] = tensors_of(self.learn.model)

@pytest.mark.parametrize('reset_end', [False, True])
def test_save_model_keeps_the_best_of_the_last_round(tmp_path, reset_end):
    learn = with_score(BEST_IS_DENSE, path=tmp_path)
    sp_cb, ends, spy = positional(reset_end=reset_end), AtEnds(), Spy
    before = spy(sp_cb, 56)
    learn.fit(20, 1e-2, cbs=[sp_cb, save := SaveModelCallback(monitor='score', comp=np.greater), ends, before])
    now, saved = tensors_of(learn.model), torch.load(tmp_path/'models'/'model.pth')
    assert same(saved, ends.seen[17]) and save.best == 5, 'the file and the best value are no longer those of the best epoch'
    if reset_end: assert is_masked(now, before.seen[0]['tensors'], sp_cb.mask) is True
    else: assert same(now, ends.seen[17]) and not same(now, ends.seen[19])
    assert n_zeros(sp_cb) == 88


def test_save_model_with_the_callbacks_on_the_learner(tmp_path):
    learn = with_score(BEST_IS_DENSE, path=tmp_path)
    sp_cb, ends = positional(), AtEnds()
    learn.add_cbs([SaveModelCallback(monitor='score', comp=np.greater, with_opt=True), sp_cb, ends])
    learn.fit(20, 1e-2)
    assert same(tensors_of(learn.model), ends.seen[17]) and n_zeros(sp_cb) == 88


def test_save_model_when_the_last_round_is_cut_short(tmp_path):
    "Before its first epoch ends there is nothing better in this round than where it starts."
    learn = with_score(BEST_IS_DENSE, path=tmp_path)
    sp_cb = positional(rewind_epoch=1)
    after = Spy(sp_cb, 56)
    class Stop(Callback):
        def before_batch(self):
            if self.learn.epoch == 15 and self.learn.iter == 2: raise CancelFitException()
    learn.fit(20, 1e-2, cbs=[sp_cb, SaveModelCallback(monitor='score', comp=np.greater), after, Stop()])
    assert is_masked(tensors_of(learn.model), after.seen[1]['tensors'], sp_cb.mask) is True and n_zeros(sp_cb) == 88


@pytest.mark.parametrize('kwargs', [dict(every_epoch=True), dict(at_end=True)], ids=['every epoch', 'at the end'])
def test_save_model_in_its_other_modes(tmp_path, kwargs):
    "Every epoch, or the end: the files are what the network was, and nothing is loaded."
    learn = with_score(BEST_IS_DENSE, path=tmp_path)
    sp_cb, ends = positional(), AtEnds()
    learn.fit(20, 1e-2, cbs=[sp_cb, SaveModelCallback(monitor='score', comp=np.greater, **kwargs), ends])
    assert same(tensors_of(learn.model), ends.seen[19])
    files = {f'model_{e}': e for e in range(20)} if 'every_epoch' in kwargs else {'model': 19}
    assert {f.stem for f in (tmp_path/'models').iterdir()} == set(files)
    assert all(same(torch.load(tmp_path/'models'/f'{f}.pth'), ends.seen[e]) for f, e in files.items())


def test_save_model_when_no_epoch_of_the_last_round_counts(tmp_path):
    "Where the last round's values are all NaN there is no best of it, and an earlier one is not it."
    learn = with_score(BEST_IS_DENSE[:15] + [float('nan')]*5, path=tmp_path)
    sp_cb, ends = positional(), AtEnds()
    learn.fit(20, 1e-2, cbs=[sp_cb, SaveModelCallback(monitor='score', comp=np.greater), ends])
    assert n_zeros(sp_cb) == 88
    assert not any(is_masked(tensors_of(learn.model), ends.seen[e], sp_cb.mask) is True for e in range(15)), 'the weights are of an earlier round'


@pytest.mark.parametrize('ending', ['whole', 'cancelled'])
def test_weights_loaded_when_the_fit_ends_are_masked(ending):
    "Another callback may put dense weights in at the end of a fit; the mask has the last word."
    learn, sp_cb = small_learner(), SparsifyCallback(50, start_epoch=1, lth=True)
    dense = deepcopy(learn.model.state_dict())
    class Loads(Callback):
        order = 90
        def before_batch(self):
            if ending == 'cancelled' and self.learn.epoch == 3: raise CancelFitException()
        def after_fit(self): self.learn.model.load_state_dict(dense)
    learn.fit(4, 1e-2, cbs=[sp_cb, Loads()])
    assert is_masked(tensors_of(learn.model), dense, sp_cb.mask) is True and n_zeros(sp_cb) == 88


def test_early_stopping_waits_anew_in_each_round(tmp_path):
    learn = with_score([9, 8, 8, 8, 8]*4, path=tmp_path)
    sp_cb = positional()
    learn.fit(20, 1e-2, cbs=[sp_cb, EarlyStoppingCallback(monitor='score', comp=np.greater, patience=5)])
    assert len(learn.recorder.values) == 20 and n_zeros(sp_cb) == 88


def test_early_stopping_in_the_last_round_finishes_the_plan(tmp_path):
    learn = with_score(BEST_IS_DENSE, path=tmp_path)
    sp_cb, ends = positional(), AtEnds()
    cbs = [SaveModelCallback(monitor='score', comp=np.greater), EarlyStoppingCallback(monitor='score', comp=np.greater, patience=5), ends]
    scores = BEST_IS_DENSE[:15] + [3, 1, 1, 1, 1]
    learn.metrics = [ValueMetric(lambda: scores[learn.epoch], 'score')]
    cbs[1].patience = 4
    scores[:15] = [5, 6, 7, 8, 9]*3
    learn.fit(20, 1e-2, cbs=[sp_cb, *cbs])
    assert learn.epoch == 19 and same(tensors_of(learn.model), ends.seen[15]) and n_zeros(sp_cb) == 88
    mask = sp_cb.mask
    learn.fit(1, 1e-2, cbs=sp_cb)
    assert sp_cb.mask is mask and n_zeros(sp_cb) == 88


def test_reduced_rate_is_back_at_the_rewind():
    learn = with_score([9, 1, 1, 1, 1]*4)
    sp_cb = positional(rewind_epoch=1)
    learn.fit(20, 1e-2, cbs=[sp_cb, ReduceLROnPlateau(monitor='score', comp=np.greater, patience=2)])
    each_epoch = learn.recorder.lrs[::N_BATCHES]
    dense = [1e-2, 1e-2, 1e-2, 1e-3, 1e-3]
    assert each_epoch == pytest.approx(dense + dense*3)


# 8. Prunings inside epochs

SCHEDULES = dict(agp=agp, one_cycle=one_cycle, cos=cos, lin=lin, few=agp(5), dsd=dsd(6), iterative=iterative, one_shot=one_shot, geometric=geometric)

@pytest.mark.parametrize('schedule', SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize('start', [0, .5, 1.75])
def test_prunings_inside_epochs(schedule, start):
    sp_cb, seen = SparsifyCallback(50, schedule=schedule, start_epoch=start), []
    class Count(Callback):
        order, run_valid = 200, False
        def before_batch(self): seen.append(sp_cb.mask.n_total - sp_cb.mask.n_kept)
        def after_step(self): assert n_zeros(sp_cb) >= seen[-1] and all(not w[~sp_cb.mask[n]].any() for n, w in weights_of(sp_cb).items())
    learn = small_learner()
    plan = sp_cb.plan(learn, 5)
    learn.fit(5, 1e-2, cbs=[sp_cb, Count()])
    expected, cuts = [], dict(zip([step for step, _ in plan], plan.n_cut))
    for step in range(5*N_BATCHES): expected.append(cuts.get(step, expected[-1] if expected else 0))
    assert seen == expected and len(seen) == 20
    assert plan[0][0] == start*N_BATCHES if hasattr(plan, '__getitem__') else plan.plan[0][0] == start*N_BATCHES
    assert (seen[-1] == 0) if schedule == dsd(6) else seen[-1] == 88 == n_zeros(sp_cb)
    if schedule == dsd(6): assert max(seen) == 88


def test_dsd_brings_the_best_back():
    "On the way back the cut weights that were largest when cut return first, and at the end all train."
    sp_cb, masks, was = SparsifyCallback(60, schedule=dsd(6), start_epoch=1), [], {}
    class Look(Callback):
        order, run_valid = 54, False
        def before_epoch(self): masks.append((sp_cb.mask, {n: w.detach().clone() for n, w in weights_of(sp_cb).items()}))
        def before_batch(self): self.before_epoch()
    learn = small_learner()
    learn.fit(7, 1e-2, cbs=[sp_cb, Look()])
    last, changes = {n: torch.zeros_like(w) for n, w in weights_of(sp_cb).items()}, []
    for (old, values), (new, _) in zip(masks, masks[1:]):
        for n in new: last[n] = torch.where(old[n], values[n], last[n])
        back = torch.cat([(~old[n] & new[n]).flatten() for n in new])
        still = torch.cat([(~old[n] & ~new[n]).flatten() for n in new])
        scores = torch.cat([last[n].abs().flatten() for n in new])
        if back.any():
            changes.append((int(back.sum()), int(still.sum())))
            assert not still.any() or scores[back].min() >= scores[still].max(), 'weights came back that were smaller than some that did not'
    assert len(changes) == 3 and changes[-1][1] == 0
    assert sp_cb.mask.n_kept == N_TOTAL and n_zeros(sp_cb) == 0


@pytest.mark.parametrize('schedule', [cos, lin, one_cycle, agp, dsd(20), iterative(60)], ids=['cos', 'lin', 'one_cycle', 'agp', 'dsd', 'iterative'])
def test_low_levels_on_the_way_do_not_warn(schedule):
    "The warning for shares is about what the user wrote, not about a schedule's first levels."
    learn = small_learner(dls=small_dls(12))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(6, 1e-2, cbs=SparsifyCallback(30, schedule=schedule))


# 9. Copies

class Ema(Callback):
    "A user's averaged copy, updated after each step."
    run_valid = False
    def __init__(self, copy, order, event='after_step'):
        self.copy, self._order = copy, order
        setattr(self, event, self._update)

    @property
    def order(self): return self._order

    @torch.no_grad()
    def _update(self):
        now = dict(self.learn.model.named_parameters())
        for n, p in self.copy.named_parameters(): p.lerp_(now[n], .2)
        for (n, b), (_, mine) in zip(self.learn.model.named_buffers(), self.copy.named_buffers()): mine.copy_(b)

@pytest.mark.parametrize('order', [0, 54, 60])
@pytest.mark.parametrize('kwargs', [dict(lth=True, rewind_epoch=1), dict(lth=True, rewind_epoch=1, optimizer='keep'), dict(schedule=agp)],
                         ids=['fresh', 'keep', 'agp'])
def test_copies_are_masked_and_rewound(order, kwargs):
    learn = small_learner()
    ema = deepcopy(learn.model)
    sp_cb, seen, leaks = SparsifyCallback(50, start_epoch=2, copies=[ema], **kwargs), {}, []
    class Look(Callback):
        order = 200
        def before_epoch(self): seen[self.learn.epoch] = tensors_of(ema)
        def after_batch(self): leaks.append(sum(int((p[~sp_cb.mask[n]] != 0).sum()) for n, p in ema.named_parameters() if n in sp_cb.mask))
    learn.fit(5, 1e-2, cbs=[sp_cb, Ema(ema, order), Look()])
    assert not any(leaks), f'{max(leaks)} cut weights of the copy are not zero'
    if 'lth' in kwargs:
        for epoch, masked in ((2, 29), (3, 59), (4, 88)):
            cut = {n: seen[epoch][n] == 0 for n in sp_cb.mask}
            assert sum(int(c.sum()) for c in cut.values()) == masked
            assert is_masked(seen[epoch], seen[1], {n: ~c for n, c in cut.items()}) is True
    assert not same(seen[1], seen[0]) and sum(int((p == 0).sum()) for n, p in ema.named_parameters() if n in sp_cb.mask) == 88


def test_a_copy_updated_after_the_batch_is_rewound_inside_an_epoch():
    "A rewind point inside an epoch has the copy as it was when the next batch began, whenever the user's callback updates it."
    learn = small_learner()
    ema = deepcopy(learn.model)
    sp_cb, seen = SparsifyCallback(0, schedule=one_shot, start_epoch=2, copies=[ema], lth=True, rewind_step=3, optimizer='restore'), []
    class Look(Callback):
        order, run_valid = 200, False
        def after_batch(self): seen.append(tensors_of(ema))
    learn.fit(4, 1e-2, cbs=[sp_cb, Ema(ema, 60, 'after_batch'), Look()])
    assert len(seen) == 8 + 5 and same(seen[8:], seen[3:8])


# 10. Layers, rates, contexts, filters

def test_sparsity_for_each_layer():
    learn = small_learner(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))
    sp_cb = SparsifyCallback({'0': 75, '4.*': 20}, start_epoch=1, lth=True)
    spy = Spy(sp_cb, 56)
    learn.fit(4, 1e-2, cbs=[sp_cb, spy])
    kept = {e: {n: int(m.sum()) for n, m in spy.seen[e]['mask'].items()} for e in spy.seen}
    assert [kept[e]['0.weight'] for e in range(4)] == [128, 96, 64, 32]
    assert [kept[e]['4.weight'] for e in range(4)] == [48, 45, 42, 38] # 48·(0, 6.67, 13.33, 20)/100 = 0, 3.2, 6.4, 9.6
    assert all(kept[e]['2.weight'] == 256 for e in range(4))
    assert is_masked(spy.seen[3]['tensors'], spy.seen[0]['tensors'], spy.seen[3]['mask']) is True


def test_a_rate_for_the_output_layer():
    "One shot at 80 %: the output layer loses half of that, 40 % of its 48 weights, and the target counts for the rest."
    learn = small_learner()
    sp_cb = SparsifyCallback(80, schedule=one_shot, start_epoch=1, lth=True, rates={'4.weight': 50})
    learn.fit(2, 1e-2, cbs=sp_cb)
    assert {n: int(m.sum()) for n, m in sp_cb.mask.items()} == {'0.weight': 26, '4.weight': 29}
    assert sp_cb.report().lines[-1][1:3] == (55, 176)


def test_rates_over_rounds_follow_what_is_left():
    "Two rounds of the iterative schedule to 60 %: the rest goes 128 → 90 → 51; a rate of 50 loses half of each share."
    learn = small_learner()
    sp_cb = SparsifyCallback(60, schedule=iterative(2), start_epoch=1, lth=True, rates={'4.weight': 50})
    spy = Spy(sp_cb, 56)
    learn.fit(3, 1e-2, cbs=[sp_cb, spy])
    kept = [{n: int(m.sum()) for n, m in spy.seen[e]['mask'].items()} for e in range(3)]
    assert [k['0.weight'] for k in kept] == [128, 90, 51]
    first = round(48*(1 - (1 - 90/128)/2)) # 40.875 → 41
    assert [k['4.weight'] for k in kept] == [48, first, round(first*(1 - (1 - 51/90)/2))]


def test_local_context():
    sp_cb = SparsifyCallback(50, context='local', start_epoch=1, lth=True)
    small_learner().fit(4, 1e-2, cbs=sp_cb)
    assert {n: int(m.sum()) for n, m in sp_cb.mask.items()} == {'0.weight': 64, '4.weight': 24}


def test_layers_and_ignore():
    sp_cb = SparsifyCallback(50, start_epoch=1, lth=True, ignore='4')
    small_learner().fit(4, 1e-2, cbs=sp_cb)
    assert list(sp_cb.mask) == ['0.weight'] and sp_cb.mask.n_kept == 64
    sp_cb = SparsifyCallback(50, start_epoch=1, lth=True, layers=nn.Linear, ignore='0.weight')
    small_learner().fit(4, 1e-2, cbs=sp_cb)
    assert list(sp_cb.mask) == ['4.weight'] and sp_cb.mask.n_kept == 24


def test_frozen_layers_are_left_out_and_named():
    learn = small_learner()
    learn.model[0].weight.requires_grad_(False)
    sp_cb = SparsifyCallback(50, start_epoch=1, lth=True)
    learn.fit(4, 1e-2, cbs=sp_cb)
    assert list(sp_cb.mask) == ['4.weight'] and 'frozen' in repr(sp_cb.report()) and '0.weight' in repr(sp_cb.report())


@pytest.mark.parametrize('how', ['fresh', 'keep'])
def test_filters_with_what_follows_them(how):
    "Whole filters go with scale and shift of their batch norm and the bias, through every rewind; no batch is given by the user."
    learn = small_learner(ConvNet, dls=small_dls(shape=(1, 6, 6)))
    sp_cb = SparsifyCallback(50, 'filter', 'local', start_epoch=1, lth=True, rewind_epoch=1, ignore='fc', optimizer=how)
    spy, steps = Spy(sp_cb, 56), Steps(sp_cb)
    learn.fit(4, 1e-2, cbs=[sp_cb, spy, steps])
    assert steps.n_leaks == 0 < steps.checked
    for epoch, live in ((1, (7, 9)), (2, (6, 7)), (3, (4, 5))): # 8 and 10 filters, 16.7, 33.3, 50 %, whole filters, never more
        mask, now = spy.seen[epoch]['mask'], spy.seen[epoch]['tensors']
        for i, n in enumerate(live, 1):
            alive = mask[f'conv{i}.weight'].flatten(1).any(1)
            assert alive.sum() == n and torch.equal(mask[f'conv{i}.weight'].flatten(1).all(1), alive)
            for follower in (f'conv{i}.bias', f'bn{i}.weight', f'bn{i}.bias'):
                assert torch.equal(mask[follower], alive) and not now[follower][~alive].any()
        assert is_masked(now, spy.seen[1]['tensors'] if epoch > 1 else now, mask) is True
    x = learn.dls.train.one_batch()[0]
    learn.model.eval()
    with torch.no_grad(): out = learn.model.bn1(learn.model.conv1(x))
    assert not out[:, ~sp_cb.mask['bn1.weight']].any() and sp_cb.mask.n_total == 8*9 + 8*10*9


def test_a_third_of_the_way_is_a_third():
    "Counts on the way are those of exact fractions: 50/3 % of 6 filters is one filter, and 50/3 % of 9 weights is 1.5, so two."
    learn = small_learner(nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6*16, 3)), dls=small_dls(shape=(1, 6, 6)))
    sp_cb = SparsifyCallback(50, 'filter', 'local', start_epoch=1, ignore='4')
    spy = Spy(sp_cb, 56)
    learn.fit(4, 1e-2, cbs=[sp_cb, spy])
    filters = [int(spy.seen[e]['mask']['0.weight'].flatten(1).any(1).sum()) for e in range(4)]
    learn = small_learner(nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 3)))
    sp_cb = SparsifyCallback(50, start_epoch=1, layers='2')
    spy = Spy(sp_cb, 56)
    learn.fit(4, 1e-2, cbs=[sp_cb, spy])
    assert (filters, [int(spy.seen[e]['mask']['2.weight'].sum()) for e in range(4)]) == ([6, 5, 4, 3], [9, 7, 6, 4])


# 5. Schedules of the learning rate

def rates_of(learn): return dict(lr=list(learn.recorder.hps['lr']), **({'mom': list(learn.recorder.hps['mom'])} if 'mom' in learn.recorder.hps else {}))

@pytest.mark.parametrize('fit', ['fit_one_cycle', 'fit_flat_cos'])
@pytest.mark.parametrize('opt_func', [Adam, OPTIMIZERS['AdamW']], ids=['Adam', 'AdamW'])
def test_each_round_is_a_training_of_its_own(fit, opt_func):
    learn, alone = small_learner(opt_func=opt_func), small_learner(opt_func=opt_func)
    getattr(learn, fit)(20, 1e-2, cbs=positional())
    getattr(alone, fit)(5, 1e-2)
    together, single = rates_of(learn), rates_of(alone)
    for hyper, values in single.items(): assert together[hyper] == values*4
    assert learn.recorder.lrs == alone.recorder.lrs*4 and len(set(alone.recorder.lrs)) > 4
    assert ('mom' in single) == (fit == 'fit_one_cycle')


def test_a_round_from_epoch_k_starts_at_k_in_its_schedule():
    "Rewound to epoch 1 with rounds of 4: a schedule of 5 epochs, from its second one on, the same as the dense network's."
    learn, alone = small_learner(), small_learner()
    learn.fit_one_cycle(5 + 3*4, 1e-2, cbs=SparsifyCallback(50, start_epoch=5, lth=True, rewind_epoch=1))
    alone.fit_one_cycle(5, 1e-2)
    assert learn.recorder.lrs == alone.recorder.lrs + alone.recorder.lrs[N_BATCHES:]*3
    assert learn.recorder.hps['mom'] == alone.recorder.hps['mom'] + alone.recorder.hps['mom'][N_BATCHES:]*3


@pytest.mark.parametrize('n_batches, step', [(4, 3), (7, 5), (11, 7)])
@pytest.mark.parametrize('fit', ['fit_one_cycle', 'fit_flat_cos'])
def test_a_round_from_inside_an_epoch_continues_the_same_curve(fit, n_batches, step):
    learn, alone = small_learner(dls=small_dls(n_batches)), small_learner(dls=small_dls(n_batches))
    getattr(learn, fit)(8, 1e-2, cbs=SparsifyCallback(50, start_epoch=2, lth=True, rewind_step=step))
    getattr(alone, fit)(2, 1e-2)
    together, single = rates_of(learn), rates_of(alone)
    for hyper, values in single.items(): assert together[hyper] == values + values[step:]*3


@pytest.mark.parametrize('n_batches, step', [(4, 3), (7, 6), (11, 7)])
def test_a_round_from_inside_an_epoch_continues_the_same_progress(n_batches, step):
    "To the last bit, also where a schedule reads it in double precision: the steps after the rewind are those of the first pass."
    learn, sp_cb = small_learner(dls=small_dls(n_batches)), SparsifyCallback(50, start_epoch=2, lth=True, rewind_step=step)
    seen = []
    class Look(Callback):
        order, run_valid = 60, False
        def before_batch(self): seen.append(self.learn.pct_train)
    learn.fit(8, 1e-2, cbs=[sp_cb, Look(), ParamScheduler({'lr': SchedCos(1e-2, 1e-4)})])
    assert seen == seen[:2*n_batches] + seen[step:2*n_batches]*3
    assert learn.recorder.lrs == learn.recorder.lrs[:2*n_batches] + learn.recorder.lrs[step:2*n_batches]*3


def test_without_rewinding_the_schedule_is_the_whole_fits():
    learn, alone = small_learner(), small_learner()
    learn.fit_one_cycle(6, 1e-2, cbs=SparsifyCallback(50, schedule=agp, start_epoch=1))
    alone.fit_one_cycle(6, 1e-2)
    assert learn.recorder.lrs == alone.recorder.lrs


def test_a_round_trains_as_a_separate_fit_does():
    "The dense round of a one-cycle fit is the same training, to the bit, as a fit of that length."
    learn, alone = small_learner(), small_learner()
    sp_cb = SparsifyCallback(50, start_epoch=2, lth=True)
    spy = Spy(sp_cb, 54)
    learn.fit_one_cycle(8, 1e-2, cbs=[sp_cb, Seeded(3), spy])
    alone.fit_one_cycle(2, 1e-2, cbs=Seeded(3))
    assert same(spy.seen[2]['tensors'], tensors_of(alone.model))
