"Learners that would make wrong results without an error: refused beforehand, or trained right all the same."
import importlib
import os
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import AccumMetric, accuracy, top_k_accuracy
from filelock import Timeout
from helpers_experiment import differences, left, of_points, points, seed_inside, state_of, store_of
from helpers_fastai import generators_kept, small_dls, small_model
from torch import nn

from lth_nb.arms import dense, dense_long, finetune, imp, lr_rewind, reinit, shuffled
from lth_nb.callback import SparsifyCallback
from lth_nb.cpu import FastCPU
from lth_nb.fitting import Seeded
from lth_nb.experiment import Experiment, _wave
from lth_nb.recipe import Recipe
from lth_nb.schedule import iterative, one_shot
from lth_nb.ticket import Ticket
from lth_nb.training import attempt_segment


@pytest.fixture(autouse=True)
def quiet():
    with generators_kept(): yield


def experiment(learner, *arms, epochs=2, seeds=(0,), **options): return Experiment(Recipe(learner, epochs, lr=1e-2, options=options), arms or [dense()], one_shot, 50, seeds)
def small(model=None, loss=None, **kwargs): return Learner(small_dls(3), model or small_model(0.), loss_func=loss or CrossEntropyLossFlat(), metrics=[accuracy], **kwargs)


# ------------------------------------------------------------------ refused

def with_a_schedule(): return small(cbs=ParamScheduler({'lr': SchedCos(1e-1, 0.)}))
def that_stops_early(): return small(cbs=EarlyStoppingCallback())
def on_a_plateau(): return small(cbs=ReduceLROnPlateau())
def with_a_metric_called_cost(): return Learner(small_dls(3), small_model(0.), loss_func=CrossEntropyLossFlat(), metrics=AccumMetric(lambda p, y: 0., name='cost'))
def with_two_top_k(): return Learner(small_dls(3), small_model(0.), loss_func=CrossEntropyLossFlat(), metrics=[partial(top_k_accuracy, k=1), partial(top_k_accuracy, k=2)])
def with_a_metric_called_time(): return Learner(small_dls(3), small_model(0.), loss_func=CrossEntropyLossFlat(), metrics=AccumMetric(lambda p, y: 0., name='time'))
def with_a_vector(): return Learner(small_dls(3), small_model(0.), loss_func=CrossEntropyLossFlat(), metrics=AccumMetric(lambda p, y: y.bincount(), name='counts', flatten=False))
def that_times_itself(): return small(cbs=FastCPU())
def without_a_batch():
    learn = small()
    learn.dls.train.bs, learn.dls.train.drop_last = 1000, True
    return learn


@pytest.mark.parametrize('learner, says', [(with_a_schedule, 'ParamScheduler'), (that_stops_early, 'EarlyStoppingCallback'), (on_a_plateau, 'ReduceLROnPlateau'), (that_times_itself, 'decides by timing'),
                                           (with_a_metric_called_cost, "'cost'"), (with_a_metric_called_time, "'time'"), (with_two_top_k, "two metrics are called 'top_k_accuracy'"), (without_a_batch, 'fill no batch of 1000')])
def test_what_cannot_be_cut_into_segments_is_refused(learner, says):
    with pytest.raises(ValueError, match=says): experiment(learner).plan()


def test_a_metric_that_is_no_number_is_named(tmp_path):
    with pytest.warns(UserWarning, match="the metric 'counts' gives a .*: must give one number"): results = experiment(with_a_vector).run(tmp_path, progress=False)
    assert "'counts'" in results.failed[0]['reason'] and not list(tmp_path.glob('segments/*/*.pt'))


def seeded_inside():
    torch.manual_seed(42)
    return small()


def test_weights_that_do_not_follow_from_the_seed_are_told_and_no_control():
    t = imp(name='t')
    with pytest.warns(UserWarning, match='0.weight begins with the same values for every seed'): experiment(seeded_inside, dense(), t, seeds=(0, 1)).plan()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match='reinit of t needs a fresh initialisation'): experiment(seeded_inside, dense(), t, reinit(of=t)).plan()


def test_a_control_names_the_arm_that_is_there():
    with pytest.raises(ValueError, match="another arm that is also called 't'"): experiment(points, imp(name='t'), reinit(of=imp(rewind_epoch=1, name='t')))


# ------------------------------------------------------------------ trained right

class ScaledLoss(nn.Module):
    "Cross entropy divided by its own running mean."
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.ones(()))

    def forward(self, predictions, targets):
        loss = nn.functional.cross_entropy(predictions, targets)
        if self.training: self.mean = .9*self.mean + .1*loss.detach()
        return loss/self.mean


def with_scaled_loss(): return small(loss=ScaledLoss())


def test_a_loss_with_a_state_is_resumed_and_rewound(tmp_path):
    t = imp(rewind_epoch=1, name='t')
    for epochs in (1, 2): experiment(with_scaled_loss, epochs=epochs).run(tmp_path/'on', progress=False)
    for folder in ('on', 'new'): experiment(with_scaled_loss, dense(), t).run(tmp_path/folder, progress=False)
    assert not differences(left(tmp_path/'on'), left(tmp_path/'new'))
    learn, sp_cb = Recipe(with_scaled_loss, 2).make(0), SparsifyCallback(50, schedule=one_shot, start_epoch=2, lth=True, rewind_epoch=1)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=[Seeded(0), sp_cb])
    exp = experiment(with_scaled_loss, dense(), t)
    kept = state_of(exp, tmp_path/'new', t, 1, 0)
    assert kept.others[0]['mean'] == learn.loss_func.mean and all(v.equal(kept.tensors[n]) for n, v in learn.model.state_dict().items())


HELPER = 'def width(): return {}\n'
LEARNER = '''
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from helpers_fastai import small_dls
from torch import nn
import edited_helper

def learner():
    n = edited_helper.width()
    return Learner(small_dls(2), nn.Sequential(nn.Flatten(), nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 4)), loss_func=CrossEntropyLossFlat())
'''


@pytest.fixture
def edited(tmp_path, monkeypatch):
    "A module with a learner, and a function that changes the helper it calls."
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{Path(__file__).parent}')
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    (tmp_path/'edited_helper.py').write_text(HELPER.format(16))
    (tmp_path/'edited_learner.py').write_text(LEARNER)
    importlib.invalidate_caches()
    module = importlib.import_module('edited_learner')
    def change(n):
        (tmp_path/'edited_helper.py').write_text(HELPER.format(n) + '\n'*n)
        importlib.reload(module.edited_helper)
    yield module.learner, change
    for name in ('edited_helper', 'edited_learner'): sys.modules.pop(name, None)


def widths(path): return {torch.load(f, weights_only=True)['tensors']['1.weight'].shape[0] for f in Path(path).glob('segments/*/state-*.pt')}


def test_workers_train_what_the_name_says_after_an_edit(edited, tmp_path):
    learner, change = edited
    for n in (16, 24):
        change(n)
        done = experiment(learner, epochs=1, seeds=(0, 1)).run(tmp_path/f'{n}', n_jobs=2, progress=False)
        assert not done.failed and widths(tmp_path/f'{n}') == {n}


def test_an_edit_between_plan_and_run_is_another_experiment(edited, tmp_path):
    learner, change = edited
    exp = experiment(learner, epochs=1)
    exp.plan()
    change(24)
    exp.run(tmp_path, progress=False)
    change(16)
    assert experiment(learner, epochs=1).plan(tmp_path).left == 1 and widths(tmp_path) == {24}


def initial_seed(seed):
    with generators_kept(): return seed_inside(seed)


def that_kills(parent, bad):
    if os.getpid() != parent and torch.initial_seed() == bad: os._exit(9)
    return small()


def test_an_arm_that_kills_its_process_leaves_the_others_alone(tmp_path):
    exp = experiment(that_kills, epochs=1, seeds=(0, 1, 2), parent=os.getpid(), bad=initial_seed(1))
    done = exp.run(tmp_path, n_jobs=2, progress=False)
    assert {r['seed'] for r in done.rows} == {0, 2} and [f['seed'] for f in done.failed] == [1] and 'process died' in done.failed[0]['reason']


def that_waits_for_a_lock():
    if 'trained' in os.environ: raise Timeout('somewhere else')
    return small()


def test_a_lock_of_the_users_own_is_a_failure_and_no_endless_wait(tmp_path, monkeypatch):
    exp = experiment(that_waits_for_a_lock, epochs=1)
    exp.plan()
    monkeypatch.setenv('trained', '1')
    done = exp.run(tmp_path, progress=False)
    assert 'Timeout' in done.failed[0]['reason']


def test_left_over_files_of_a_killed_process_are_removed(tmp_path):
    exp = experiment(points, epochs=2)
    exp.run(tmp_path, progress=False)
    segment = next(tmp_path.glob('segments/*'))
    (segment/'state-8.pt').unlink()
    (segment/'state-8.pt.99999-1.tmp').write_bytes(b'half')
    (segment/'epochs.jsonl').unlink()
    exp.run(tmp_path, progress=False)
    assert not list(tmp_path.rglob('*.tmp'))


# ------------------------------------------------------------------ what is taken out of a run

def test_tickets_say_from_which_seed_they_can_be_rebuilt(tmp_path):
    t, kept = imp(name='t'), finetune(name='kept')
    fresh = reinit(of=t, name='fresh')
    exp = Experiment(of_points(1), [dense(), t, fresh, kept, back := lr_rewind(name='back'), moved := shuffled(of=kept)], one_shot, 50, (0,))
    exp.run(tmp_path, progress=False)
    for arm in (t, fresh):
        ticket = exp.ticket(tmp_path, arm)
        small_file = Ticket.load(ticket.save(tmp_path/'seed.safetensors', weights='seed'))
        small_file.apply(exp.recipe.make(small_file.provenance['seed']).model)
    for arm in (kept, back, moved):
        with pytest.raises(ValueError, match='keeps its trained weights'): exp.ticket(tmp_path, arm)


@pytest.mark.parametrize('of, epochs', [(lr_rewind(1), 1), (imp(rewind_epoch=1), 1), (imp(rewind_epoch=1, full_epochs=True), 2), (imp(), 2)], ids=str)
def test_fine_tuning_takes_as_many_epochs_as_the_ticket(of, epochs):
    exp = Experiment(of_points(2), [finetune(of=of)], one_shot, 50, (0,))
    state, = exp.networks.values()
    assert state.batch - state.segment.begin == epochs*exp.grid.n_batches


# ------------------------------------------------------------------ what is trained first

def test_what_others_wait_for_is_trained_first_and_no_further(tmp_path):
    t = imp(name='t')
    exp = Experiment(of_points(1), [dense(), t, dense_long(of=t, name='long')], one_shot, 50, (0,))
    store, end = store_of(exp, tmp_path), exp.grid.end
    first, more = _wave(store, exp, {}, set(), 1), _wave(store, exp, {}, set(), 2)
    assert [part for part in first.values()] == [([end], end)] == [part for part in more.values()]
    done = exp.run(tmp_path, progress=False)
    assert not done.failed and [r['cost'] for r in done.rows] == [1, 2, 2]


@pytest.mark.parametrize('n_jobs, filled', [(1, []), (2, ['dense']), (3, []), (4, ['dense']), (9, ['dense', 'reinit of t'])])
def test_a_wave_is_filled_up_with_the_longest_as_far_as_it_lasts(n_jobs, filled, tmp_path):
    "With three tickets that others wait for and two workers, one would be idle in the second half; a part of the long training takes its turn."
    t = imp(name='t')
    exp = Experiment(of_points(2), [dense(), t, imp(optimizer='keep', name='kept'), finetune(of=t), reinit(of=t, levels='all'), dense_long(of=t)], iterative, 50, (0,))
    store, end = store_of(exp, tmp_path), exp.grid.end
    replace(exp, arms=[dense()]).run(tmp_path, progress=False)
    wave = _wave(store, exp, {}, set(), n_jobs)
    arms = {s.segment: a.name for (a, level, _), s in exp.networks.items() if level < 2}
    parts = {arms[s]: part for s, part in wave.items()}
    assert sorted(parts) == sorted(['finetune of t', 'kept', 't', *filled])
    assert parts.get('dense', ([4*end], 2*end)) == ([4*end], 2*end) and {part for arm, (_, part) in parts.items() if arm in ('t', 'kept', 'reinit of t')} == {end}


def test_a_wave_begins_with_the_longest(tmp_path):
    "Counted from where each stands."
    t = imp(name='t')
    exp = Experiment(of_points(2), [dense(), t, imp(rewind_epoch=1, name='late'), dense_long(of=t)], iterative, 50, (0,))
    replace(exp, arms=[dense(), dense_long(of=t)]).run(tmp_path, progress=False)
    wave, end = _wave(store_of(exp, tmp_path), exp, {}, set(), 2), exp.grid.end
    assert [at - s.begin for s, (_, at) in wave.items()] == [end, end/2]


def test_what_is_trained_part_by_part_is_the_same_to_the_last_bit(tmp_path, monkeypatch):
    "As far as others take, then on from there, in a wave made for two workers."
    t = imp(name='t')
    exp = Experiment(replace(of_points(2), anneal='one_cycle'), [dense(), t, dense_long(of=t, name='long')], iterative, 50, (0,))
    exp.run(tmp_path/'at once', progress=False)
    parts, attempt = {}, attempt_segment
    def noted(store, recipe, pruning, segment, batches, end):
        parts.setdefault(segment, []).append(end)
        return attempt(store, recipe, pruning, segment, batches, end)
    monkeypatch.setattr('lth_nb.experiment._attempt', lambda: noted)
    monkeypatch.setattr('lth_nb.experiment.joblib.effective_n_jobs', lambda n: 2)
    assert not exp.run(tmp_path/'in parts', progress=False).failed
    longest, n = next(s.segment for (a, *_), s in exp.networks.items() if a.name == 'long'), exp.grid.end
    assert parts[longest] == [n, 2*n, 3*n, 4*n]
    assert differences(left(tmp_path/'in parts'), left(tmp_path/'at once')) == []


def test_what_another_process_trains_does_not_hold_up_the_rest(tmp_path, monkeypatch):
    "The ticket, for which others wait, is taken; the control and the long training need not wait for it."
    t = imp(name='t')
    exp = Experiment(of_points(1), [dense(), t, reinit(of=t, levels='all'), dense_long(of=t)], iterative, 50, (0,))
    replace(exp, arms=[dense()]).run(tmp_path, progress=False)
    taken, order = exp.networks[t, 1, 0].segment, []
    def attempt(store, recipe, pruning, segment, *how_far):
        order.append(segment)
        if segment == taken and len({*order}) < 3:
            assert order.count(taken) < 9 # or it waits for ever
            return segment, 'busy'
        return attempt_segment(store, recipe, pruning, segment, *how_far)
    monkeypatch.setattr('lth_nb.experiment._attempt', lambda: attempt)
    assert not exp.run(tmp_path, progress=False).failed and len({*order}) > 2


def test_where_other_processes_train_everything_it_waits(tmp_path, monkeypatch):
    t = imp(name='t')
    exp = Experiment(of_points(1), [dense(), t, reinit(of=t, levels='all'), dense_long(of=t)], iterative, 50, (0,))
    replace(exp, arms=[dense()]).run(tmp_path, progress=False)
    waited, asked = [], []
    def attempt(store, recipe, pruning, segment, *how_far):
        asked.append(segment)
        assert len(asked) < 50 # or it asks again and again
        return attempt_segment(store, recipe, pruning, segment, *how_far) if waited else (segment, 'busy')
    monkeypatch.setattr('lth_nb.experiment._attempt', lambda: attempt)
    monkeypatch.setattr('lth_nb.experiment.time.sleep', waited.append)
    assert not exp.run(tmp_path, progress=False).failed and waited == [.5]


# ------------------------------------------------------------------ what a user should be told

def with_a_rate_of_its_own(): return small(lr=.5)


def broken(seed_that_fails):
    if torch.initial_seed() == seed_that_fails: raise RuntimeError('out of luck')
    return small()


def test_failures_are_told_when_a_run_ends(tmp_path):
    exp = experiment(broken, epochs=1, seeds=(0, 1, 2), seed_that_fails=initial_seed(2))
    with pytest.warns(UserWarning, match='1 of 3 networks failed; the first: RuntimeError: out of luck'): exp.run(tmp_path, progress=False)


def test_a_learner_s_own_rate_is_not_dropped_silently():
    with pytest.warns(UserWarning, match='made with lr=0.5, and trains with that of the recipe, 0.01'): experiment(with_a_rate_of_its_own).plan()


def test_pruning_before_any_training_is_told():
    with pytest.warns(UserWarning, match='give the dense epochs as start_epoch='): plan = SparsifyCallback(50, lth=True).plan(small(), 6)
    assert 'fit 0 epochs' not in repr(plan)
