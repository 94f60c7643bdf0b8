"Twins and the line between them and their tickets: what they share, where they part, and batch norm between the ends."
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from helpers_experiment import digits, of_points, points
from helpers_fastai import same
from torch import nn

from lth_nb.all import recount_norm
from lth_nb.arms import Arm, dense, imp, shuffled, twin
from lth_nb.connectivity import Connectivity, barrier, between
from lth_nb.experiment import Experiment
from lth_nb.rewind import RandomState
from lth_nb.schedule import iterative, one_shot
from lth_nb.store import Store

STEP, EPOCH, START = imp(rewind_step=5), imp(rewind_epoch=1), imp()


def experiment(arms, recipe=None, **kwargs): return Experiment(recipe or of_points(3), arms, one_shot, 50, **{'seeds': [3], **kwargs})


def state_of(exp, path, arm, level, seed=3):
    "The trained state of a network, and the one it starts from."
    state, store = arm.make(exp.grid, seed, level), Store(path, exp._seen[1])
    return store.load(state).model, state.segment, store


class Watch(Callback):
    "Write down what is trained on, and a random number of each step; in a file, since values of a class are part of a recipe's name."
    def before_batch(self):
        if self.training: print(self.xb[0].sum().item(), torch.rand(()).item(), file=open(os.environ['SEEN'], 'a'))


def seen_by(path, arm, before, monkeypatch):
    "What a network's last training sees, when all it builds on is there."
    recipe = of_points(3, options=dict(noise=False, cbs=(Watch,)))
    monkeypatch.setenv('SEEN', os.devnull)
    experiment([dense(), *before], recipe).run(path, progress=False)
    monkeypatch.setenv('SEEN', str(path/'seen'))
    experiment([dense(), arm], recipe).run(path, progress=False)
    return [line.split() for line in (path/'seen').read_text().splitlines()]


@pytest.mark.parametrize('ticket', [START, STEP, EPOCH], ids=['start', 'step', 'epoch'])
def test_a_twin_sees_as_many_batches_as_its_ticket_in_another_order_with_other_noise(tmp_path, ticket, monkeypatch):
    of_ticket = seen_by(tmp_path/'a', ticket, [twin(of=ticket, levels=[0])], monkeypatch)
    of_twin = seen_by(tmp_path/'b', twin(of=ticket, levels=[1]), [ticket], monkeypatch)
    assert len(of_ticket) == len(of_twin) > 3
    for one, other in zip(zip(*of_ticket), zip(*of_twin)): assert not set(one[:2]) & set(other[:2])


def _as_its_ticket(grid, seed, level, of):
    state = twin(of=of).make(grid, seed, level)
    return replace(state, segment=replace(state.segment, seed=seed))


@pytest.mark.parametrize('ticket', [START, STEP, EPOCH], ids=['start', 'step', 'epoch'])
@pytest.mark.parametrize('level', [0, 1])
def test_in_the_same_order_a_twin_would_be_the_ticket(tmp_path, ticket, level):
    "All that differs between the two is the seed of order and noise: start, optimizer and learning rate are the same."
    recipe = of_points(3, anneal='cos')
    same_again = Arm('again', partial(_as_its_ticket, of=ticket), 'twin', ticket, [level])
    exp = experiment([dense(), ticket, same_again], recipe)
    assert not exp.run(tmp_path, progress=False).failed
    (a, *_), (b, *_) = (state_of(exp, tmp_path, arm, level) for arm in (ticket, same_again))
    assert same(a.tensors, b.tensors)
    (c, segment, _) = state_of(twins := experiment([dense(), ticket, twin(of=ticket)], recipe), twins.run(tmp_path, progress=False).path, twin(of=ticket), level)
    assert not same(a.tensors, c.tensors) and segment.replicate == 3 != segment.seed


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
    first = exp.connectivity(tmp_path, n_points=3, progress=False)
    assert torch.equal(before.cpu, RandomState.take().cpu) and files == {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    assert first.frame.equals(exp.connectivity(tmp_path, n_points=3, progress=False).frame)


def _itself(grid, seed, level, of): return of.make(grid, seed, level)


def test_a_line_from_a_network_to_itself_is_flat(tmp_path):
    "Batch norm is counted anew at all points or at none."
    exp = experiment([dense(), EPOCH, Arm('itself', partial(_itself, of=EPOCH), 'twin', EPOCH, [0, 1])], of_points(3, options=dict(noise=False)))
    exp.run(tmp_path, progress=False)
    frame = exp.connectivity(tmp_path, n_points=5, progress=False).frame
    assert (frame.groupby('level').valid_loss.agg(np.ptp) < 1e-6).all()


class Doubled(Callback):
    "Change what the model is given."
    def before_batch(self): self.learn.xb = tuple(2*x for x in self.xb)


def test_statistics_are_counted_of_what_the_model_is_given():
    learn = points(noise=False, cbs=(Doubled,))
    norm = next(m for m in learn.model.modules() if isinstance(m, nn.BatchNorm1d))
    before = [p.detach().clone() for p in learn.model.parameters()]
    recount_norm(learn)
    inputs = []
    norm.register_forward_pre_hook(lambda m, x: inputs.append(x[0].detach()))
    with learn.no_bar(), learn.no_logging(): learn.validate(dl=learn.dls.train)
    assert torch.allclose(norm.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0), atol=1e-5)
    assert norm.momentum == .1 and all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))


class Interrupted(Callback):
    "Stop while the statistics are counted."
    def before_batch(self): raise KeyboardInterrupt()


def test_counting_that_is_interrupted_leaves_the_momentum_as_it_was():
    learn = points(noise=False, cbs=(Interrupted,))
    with pytest.raises(KeyboardInterrupt): recount_norm(learn)
    assert next(m for m in learn.model.modules() if isinstance(m, nn.BatchNorm1d)).momentum == .1


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
    with pytest.raises(ValueError, match='in a new folder, with keep_states=True'): exp.connectivity(tmp_path, progress=False)
    twice = Experiment(digits(), [dense(), START, twin(of=START), twin(of=START, name='again')], one_shot, 50, [0])
    twice.run(tmp_path/'twice', progress=False)
    with pytest.raises(ValueError, match='has two twins'): twice.connectivity(tmp_path/'twice', progress=False)
    with pytest.raises(ValueError, match="metric='top_5' is not there"):
        (connected := Experiment(digits(), exp.arms, one_shot, 50, [0])).run(tmp_path/'b', progress=False)
        connected.connectivity(tmp_path/'b', 3, progress=False).barriers('top_5')


def test_seeds_whose_units_fit_differently_are_one_row():
    lines = [dict(arm='imp', level=1, sparsity=s, seed=seed, share=share, valid_loss=1., psnr=30. + (share == 50)) for seed, s in enumerate([47.8, 50., 49.2]) for share in (0., 50., 100.)]
    row, = Connectivity(pd.DataFrame(lines)).barriers('psnr', higher_is_better=False).to_dict('records')
    assert (row['n_seeds'], row['sparsity'], row['barrier']) == (3, 49., 1.)
    assert Connectivity(pd.DataFrame(lines)).barriers('psnr', higher_is_better=True).barrier[0] == 0
