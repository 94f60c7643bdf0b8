"Two processes on the CPU: masks hold under DistributedDataParallel, rank 0 decides, and ranks that have drifted apart all say so."
import datetime
import os
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers_core import assert_held, conv_net, equal, images, n_cut
from lth_nb.mask import n_to_cut
from lth_nb.rewind import named_tensors, unwrap
from lth_nb.sparsifier import Sparsifier

pytestmark = [pytest.mark.skipif(not dist.is_available(), reason='this torch is built without torch.distributed'),
              pytest.mark.skipif(sys.platform == 'win32', reason='gloo with a file store is tested on Linux and macOS')]


def _process(rank, job, folder):
    "Join the group, run a job, and write down what it returns."
    torch.set_num_threads(1)
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo' if sys.platform == 'linux' else 'lo0')
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20))
    result = job(rank)
    dist.barrier()
    dist.destroy_process_group()
    with open(f'{folder}/{rank}', 'wb') as f: pickle.dump(result, f)


def in_two_processes(job, folder):
    "Run `job(rank)` in two processes; what both return."
    mp.set_forkserver_preload(['helpers_core', 'lth_nb.sparsifier'])  # torch is imported once for all of them
    mp.start_processes(_process, (job, str(folder)), nprocs=2, start_method='forkserver')
    return [pickle.loads((folder/str(rank)).read_bytes()) for rank in range(2)]


def held_under_ddp(rank):
    "Train with hooks, clipping and accumulation on different data in each rank, through two prunings with a rewind."
    plain = conv_net()
    ddp = DistributedDataParallel(plain)
    sgd = torch.optim.SGD(ddp.parameters(), .05, momentum=.9, weight_decay=.1)
    sp = Sparsifier(ddp).attach(sgd)
    names, gradients_zero = list(sp.mask), True

    def step(i):
        nonlocal gradients_zero
        sgd.zero_grad()
        with ddp.no_sync(): nn.functional.cross_entropy(ddp(images(seed=4*i + rank)[0]), images(seed=i)[1]).backward()
        nn.functional.cross_entropy(ddp(images(seed=4*i + 2 + rank)[0]), images(seed=i)[1]).backward()
        gradients_zero &= all(bool((sp.weights[n].grad[~keep] == 0).all()) for n, keep in sp.mask.items())
        norm = nn.utils.clip_grad_norm_(ddp.parameters(), .5)
        sgd.step()
        return norm
    step(0)
    point = sp.take()
    for how, sparsity in (('restore', 40), ('keep', 75)):
        sp.prune(sparsity, point, how)
        for i in range(3):
            norm = step(i)
            assert_held(sp)
    assert n_cut(sp.mask) == n_to_cut(sp.mask.n_total, 75)
    other = conv_net()
    other.load_state_dict(unwrap(ddp).state_dict(), strict=True)
    assert_held(sp, other)
    return names, gradients_zero, sp.mask, {n: t.detach().clone() for n, t in plain.named_parameters()}, norm, list(named_tensors(ddp))


def test_masks_hold_and_ranks_agree(tmp_path):
    (names, zero, mask, weights, norm, tensors), (_, zero_1, mask_1, weights_1, norm_1, _) = in_two_processes(held_under_ddp, tmp_path)
    assert names == list(Sparsifier(conv_net()).mask) and tensors == list(named_tensors(conv_net()))
    assert zero and zero_1
    assert mask == mask_1 and equal(weights, weights_1) and equal(norm, norm_1)


def influence(rank):
    "Train under DDP with a mask and momentum from before, and without DDP on both ranks' data: the same gradients, so the same weights."
    plain, ddp = conv_net().double().eval(), DistributedDataParallel(conv_net().double().eval())
    for model in (plain, ddp):
        sgd = torch.optim.SGD(model.parameters(), .05, momentum=.9)
        sp = Sparsifier(model).attach(sgd).prune(60)
        for i in range(3):
            sgd.zero_grad()
            if model is ddp: model(images(seed=2*i + rank)[0].double()).square().mean().backward()
            else: (sum(model(images(seed=2*i + r)[0].double()).square().mean() for r in range(2))/2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), .1)
            sgd.step()
    return max(float((a - b).abs().max()) for a, b in zip(plain.parameters(), ddp.parameters()))


def test_training_is_that_of_one_process_with_all_the_data(tmp_path):
    assert max(in_two_processes(influence, tmp_path)) < 1e-12


def error_of(fn):
    "The type and message of what `fn` raises; None where it returns."
    try: fn()
    except Exception as e: return type(e), str(e)


def drifted(rank):
    "Let one rank drift: what each says, and whether anything was changed; then, mended, whether they agree again."
    model = conv_net()
    sp = Sparsifier(model)
    with torch.no_grad(): model[3].weight.mul_(1 + rank)
    before = model[3].weight.clone()
    said = error_of(lambda: sp.prune(50))
    untouched = torch.equal(before, model[3].weight) and n_cut(sp.mask) == 0
    for p in model.parameters(): dist.broadcast(p.data, 0)
    return said, untouched, sp.prune(50).mask


def test_ranks_that_drifted_raise_on_every_rank(tmp_path):
    results = in_two_processes(drifted, tmp_path)
    for said, untouched, _ in results:
        assert said is not None and said[0] is RuntimeError and 'drifted' in said[1] and untouched
    assert results[0][2] == results[1][2]


def refused_by_one(rank):
    "One rank cannot choose at all, for its scores are no numbers or a layer would be empty: none waits for it."
    model = conv_net()
    sp = Sparsifier(model)
    with torch.no_grad():
        if rank == 1: model[0].weight[0] = float('nan')
    said = [error_of(lambda: sp.prune(50))]
    with torch.no_grad(): model[0].weight.copy_(torch.full_like(model[0].weight, 1e-6 if rank == 1 else 10.))
    said.append(error_of(lambda: sp.prune(50)))
    return said


def test_when_one_rank_cannot_choose_every_rank_raises(tmp_path):
    for said in in_two_processes(refused_by_one, tmp_path):
        assert all(s is not None and s[0] in (ValueError, RuntimeError) for s in said), said
        assert not any('imed out' in s[1] or 'onnection' in s[1] for s in said), said


def chance(rank):
    "Cut at random without a seed, with generators that differ between ranks, as they usually do."
    torch.manual_seed(rank)
    return Sparsifier(conv_net_without_seed(), criteria='random_score').prune(50).mask


def conv_net_without_seed():
    "Leave torch's generator where it stands."
    state = torch.get_rng_state()
    model = conv_net()
    torch.set_rng_state(state)
    return model


def test_chance_without_a_seed_is_that_of_rank_0(tmp_path):
    one, other = in_two_processes(chance, tmp_path)
    assert one == other
