"The blog's three arms with a real ResNet-18 on photographs: what is asserted is the procedure, not the accuracy."
import pytest
import torch
from copy import deepcopy
from fastai.vision.all import Callback, CancelFitException, Learner, accuracy
from torchvision.models import resnet18

from lth_nb.all import *

COUNTS = [1_862_005, 3_724_011, 5_586_016]
START, ROUND, ROUNDS = 2, 1, 3


@pytest.fixture(scope='module')
def dls():
    try: return imagenette_dls(size=64, bs=64, n_train=320, n_valid=100)
    except (ValueError, OSError) as e: pytest.skip(f'Imagenette is neither in LTH_NB_IMAGENETTE nor to be downloaded: {e}')


@pytest.fixture(scope='module')
def initial_weights():
    torch.manual_seed(0)
    return deepcopy(resnet18(num_classes=10).state_dict())


class Procedure(Callback):
    "After each pruning, compare the network with the rewind point; after each step, look for weights that came back."
    order = 56  # right after the pruning

    def before_fit(self): self.at_rewind, self.counts, self.steps = [], [], 0

    def before_epoch(self):
        cb = self.learn.sparsify
        if len(cb._todo) == len(cb._fit_plan) or cb.mask.n_kept == cb.mask.n_total: return
        cut = cb.mask.n_total - cb.mask.n_kept
        if self.counts and self.counts[-1] == cut: return
        self.counts.append(cut)
        point, now = cb.rewind_point.tensors, self.learn.model.state_dict()
        self.at_rewind.append(all(torch.equal(now[n], point[n]*cb.mask[n] if n in cb.mask else point[n]) for n in now))
        assert not any('avg' in k or 'sqr' in k for s in self.learn.opt.state.values() for k in s), 'the optimizer is not fresh'

    def after_batch(self):
        if not self.training: return
        self.steps += 1
        cb = self.learn.sparsify
        back = sum(int((w[~cb.mask[n]] != 0).sum()) for n, w in cb.sparsifier.weights.items())
        assert back == 0, f'{back} weights came back in step {self.steps}'


@pytest.mark.parametrize('rewind_epoch, reset_end', [(0, False), (1, True)])
def test_ticket_arms(dls, initial_weights, rewind_epoch, reset_end):
    learn = Learner(dls, resnet18(num_classes=10), metrics=accuracy)
    learn.model.load_state_dict(initial_weights)
    watch = Procedure()
    sp_cb = SparsifyCallback(50, 'weight', 'global', large_final, iterative, start_epoch=START, lth=True, rewind_epoch=rewind_epoch, reset_end=reset_end)
    with learn.no_bar(), learn.no_logging(): learn.fit(START + ROUNDS*ROUND, cbs=[sp_cb, watch])
    assert watch.counts == COUNTS
    assert watch.at_rewind == [True]*ROUNDS
    assert watch.steps == len(dls.train)*(START + ROUNDS*ROUND)
    assert sp_cb.position.epoch == (rewind_epoch if reset_end else rewind_epoch + ROUND)
    assert 'sparsity' not in [m.name for m in learn.metrics] and learn.recorder.metric_names[-2] == 'sparsity'
    plain = resnet18(num_classes=10)
    plain.load_state_dict(learn.model.state_dict(), strict=True)
    point, end = sp_cb.rewind_point.tensors, learn.model.state_dict()
    same = all(torch.equal(end[n], point[n]*sp_cb.mask[n] if n in sp_cb.mask else point[n]) for n in end)
    assert same == reset_end
    if rewind_epoch == 0: assert all(torch.equal(point[n], w) for n, w in initial_weights.items())
    zeros = sum(int((end[n] == 0).sum()) for n in sp_cb.mask)
    assert zeros == COUNTS[-1]


def test_dense_arm_is_the_tickets_beginning(dls, initial_weights):
    "The callback changes nothing before it prunes: the ticket's first epoch is the dense network's, bit for bit."
    class AfterOneEpoch(Callback):
        def after_train(self):
            self.weights = deepcopy(self.learn.model.state_dict())
            raise CancelFitException
    found = []
    for cbs in ([], [SparsifyCallback(50, start_epoch=2, lth=True)]):
        learn = Learner(dls, resnet18(num_classes=10))
        learn.model.load_state_dict(initial_weights)
        after = AfterOneEpoch()
        with learn.no_bar(), learn.no_logging(): learn.fit(5, cbs=[Seeded(0), after, *cbs])
        found.append(after.weights)
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
