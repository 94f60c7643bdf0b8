"Twins and the line between them and their tickets: what they share, where they part, and batch norm between the ends."
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_experiment import digits, of_points
from helpers_fastai import same
from torch import nn

from lth_nb.arms import dense, imp, shuffled, twin
from lth_nb.connectivity import barrier, between
from lth_nb.experiment import Experiment
from lth_nb.rewind import ModelState, RandomState
from lth_nb.schedule import iterative, one_shot
from lth_nb.store import Store
from lth_nb.training import make_learner

STEP, EPOCH, START = imp(rewind_step=5), imp(rewind_epoch=1), imp()


def experiment(arms, recipe=None, **kwargs): return Experiment(recipe or of_points(3), arms, one_shot, 50, **{'seeds': [3], **kwargs})


def state_of(exp, path, arm, level, seed=3):
    "The trained state of a network, and the one it starts from."
    state, store = arm.make(exp.grid, seed, level), Store(path, exp._seen[1])
    return store.load(state).model, state.segment, store


@pytest.mark.parametrize('ticket', [START, STEP, EPOCH], ids=['start', 'step', 'epoch'])
@pytest.mark.parametrize('level', [0, 1])
def test_a_twin_starts_as_the_ticket_does_and_ends_elsewhere(tmp_path, ticket, level):
    exp = experiment([dense(), ticket, twin(of=ticket)])
    assert not exp.run(tmp_path, progress=False).failed
    (a, segment, store), (b, again, _) = (state_of(exp, tmp_path, arm, level) for arm in (ticket, twin(of=ticket)))
    assert again.begin == ticket.rewind.batch(exp.grid) and again.mask == segment.mask and again.replicate == segment.seed != again.seed
    begun = []
    for s in (replace(segment, begin=again.begin, start=again.start), again):
        learn = make_learner(exp.recipe, s)
        learn.create_opt()
        store.start(exp.recipe, learn, s)
        begun.append(ModelState.take(learn.model).tensors)
    assert same(*begun)
    assert not torch.equal(a.tensors['0.weight'], b.tensors['0.weight'])


def batches_of(exp, store, segment):
    "What a segment trains on from its start to the end of that epoch."
    learn, seen = make_learner(exp.recipe, segment), []
    learn.create_opt()
    point = store.start(exp.recipe, learn, segment)
    from lth_nb.fitting import set_generators
    from lth_nb.rewind import Resume
    set_generators(segment.seed, point.position.epoch, learn.dls.train)
    for x, _ in Resume(learn.dls.train, point): seen.append(x)
    return torch.stack(seen), torch.rand(3)


def test_inside_an_epoch_a_twin_has_an_order_and_a_noise_of_its_own(tmp_path):
    exp = experiment([dense(), STEP, twin(of=STEP)])
    exp.run(tmp_path, progress=False)
    _, ticket, store = state_of(exp, tmp_path, STEP, 1)
    _, other, _ = state_of(exp, tmp_path, twin(of=STEP), 1)
    (x, noise), (y, other_noise) = batches_of(exp, store, ticket), batches_of(exp, store, other)
    assert x.shape == y.shape and not torch.equal(x, y) and not torch.equal(noise, other_noise)


def test_the_twins_of_two_seeds_differ_and_the_plan_counts_replicates(tmp_path):
    exp = experiment([dense(), START, twin(of=START)], seeds=[3, 4])
    results = exp.run(tmp_path, progress=False)
    assert {r['seed'] for r in results.rows} == {3, 4} and {seed for seed, *_ in exp.plan().rows} == {3, 4}
    values = results.frame.query('kind == "twin" and level == 1').valid_loss
    assert values.nunique() == 2
    assert len(results.verdict(margin=5, min_seeds=2).frame) == 1  # the twin is neither judged nor an opponent


def test_the_line_leaves_files_and_generators_alone(tmp_path):
    exp = experiment([dense(), EPOCH, twin(of=EPOCH)])
    exp.run(tmp_path, progress=False)
    files = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    torch.manual_seed(5); before = RandomState.take()
    first = exp.connectivity(tmp_path, n_points=3)
    assert torch.equal(before.cpu, RandomState.take().cpu) and files == {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    assert first.frame.equals(exp.connectivity(tmp_path, n_points=3).frame)


def test_batch_norm_is_counted_anew_between_the_ends_and_nowhere_else(tmp_path):
    exp = experiment([dense(), EPOCH, twin(of=EPOCH)])
    results = exp.run(tmp_path, progress=False)
    frame = exp.connectivity(tmp_path, n_points=3).frame.query('level == 1')
    (a, segment, _), (b, *_) = (state_of(exp, tmp_path, arm, 1) for arm in (EPOCH, twin(of=EPOCH)))
    ends = [next(r['valid_loss'] for r in results.rows if (r['arm'], r['level']) == (arm.name, 1)) for arm in (EPOCH, twin(of=EPOCH))]
    assert list(frame.valid_loss.iloc[[0, 2]]) == ends
    learn = make_learner(exp.recipe, segment)
    between(a, b, .5).restore(learn.model)
    with learn.no_bar(), learn.no_logging(): not_counted = learn.validate()[0]
    assert frame.valid_loss.iloc[1] != not_counted
    norm = next(m for m in learn.model.modules() if isinstance(m, nn.BatchNorm1d))
    assert torch.allclose(norm.running_mean, torch.lerp(a.tensors['1.running_mean'], b.tensors['1.running_mean'], .5))


def test_cut_weights_stay_cut_on_the_whole_line(tmp_path):
    exp = experiment([dense(), START, twin(of=START)], digits())
    exp.run(tmp_path, progress=False)
    (a, *_), (b, *_) = (state_of(exp, tmp_path, arm, 1) for arm in (START, twin(of=START)))
    mask = exp.run(tmp_path, progress=False).mask(START.name, 1, 3)
    for name, keep in mask.items(): assert not between(a, b, .3).tensors[name][~keep].any()


def test_a_barrier_by_hand():
    assert barrier([[0, 5, 2], [3, 3, 3]], True).tolist() == [4, 0]
    assert barrier([.9, .4, .8], False) == pytest.approx(.45)
    assert np.isnan(barrier([.9, np.nan, .8], False))


def test_what_cannot_be_is_said(tmp_path):
    exp = Experiment(digits(), [dense(), START, twin(of=START)], iterative, 50, [0])
    with pytest.raises(ValueError, match='levels 0 to 3'): twin(of=START, levels=[4]).levels_in(exp.grid)
    with pytest.raises(ValueError, match='give the arm of a ticket'): twin(of=shuffled(of=START))
    exp.run(tmp_path, keep_states=False, progress=False)
    with pytest.raises(ValueError, match='keep_states=True'): exp.connectivity(tmp_path)
    with pytest.raises(ValueError, match="metric='top_5' is not there"):
        (connected := Experiment(digits(), exp.arms, one_shot, 50, [0])).run(tmp_path/'b', progress=False)
        connected.connectivity(tmp_path/'b', 3).barriers('top_5')
