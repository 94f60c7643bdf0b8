"Experiments that are killed, run out of space, meet each other or lose a worker end with the bits of one that nothing happened to."
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import joblib
import pytest
import torch
from helpers_experiment import Child, differences, left, of_points, on_digits, points, seed_inside, states, trained_batches
from helpers_fastai import generators_kept
from joblib.externals.loky import get_reusable_executor

import lth_nb.files
from lth_nb.arms import dense, dense_long, imp, shuffled, supermask
from lth_nb.experiment import Experiment
from lth_nb.recipe import Recipe
from lth_nb.results import Results
from lth_nb.schedule import iterative, one_shot


def on_points(seeds=(0,)):
    ticket = imp(rewind_epoch=1)
    return Experiment(of_points(), [dense(), ticket, imp(rewind_step=6, optimizer='keep'), shuffled(of=ticket), supermask(of=imp(), levels=[1])], iterative(2), 50, seeds)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "What nothing happened to: experiment -> what it leaves, the seconds it took."
    made = {}
    def _of(make):
        if make not in made:
            path, began = tmp_path_factory.mktemp('undisturbed'), time.time()
            with generators_kept(): make().run(path, progress=False)
            made[make] = left(path), time.time() - began
        return made[make]
    return _of


def no_rubbish(path):
    "Nothing but what was asked for is left, and files that were being written when a process died."
    names = Counter(f.name for f in Path(path).rglob('*') if f.is_file() and not f.name.endswith('.tmp'))
    assert names.keys() <= {'experiment.json', 'results.csv', 'results.parquet', 'results.json', 'epochs.jsonl', 'lock', *(n for n in names if n.startswith('state-') or n.endswith(('.npz', '.pt')))}


# ------------------------------------------------------------------ killed

def killed_and_started_again(path, make, expected, seconds, n_kills, draw):
    "Kill a run at random moments, as often as asked; whenever one ends before, begin another one."
    n, i = 0, 0
    while n < n_kills:
        folder = path/f'{i}'
        while n < n_kills:
            n += (was_killed := Child(folder, make).go().kill(after=draw.uniform(0, .5*seconds)))
            if not was_killed: break
        _, failed = Child(folder, make).go().end()
        assert not failed and differences(left(folder), expected) == [], f'after {n} kills'
        no_rubbish(folder)
        shutil.rmtree(folder)
        i += 1


def test_killed_three_times(tmp_path, undisturbed): killed_and_started_again(tmp_path, on_digits, *undisturbed(on_digits), 3, random.Random(1))


@pytest.mark.slow
@pytest.mark.parametrize('make', [on_digits, on_points])
def test_killed_twenty_times(make, tmp_path, undisturbed): killed_and_started_again(tmp_path, make, *undisturbed(make), 20, random.Random(2))


class Killed(BaseException): "As a kill, this is caught by nobody."


@contextmanager
def dies_after(monkeypatch, n_files):
    "Die right after the n-th file has got its name."
    plain, seen = os.replace, []
    def replace(tmp, file):
        plain(tmp, file)
        seen.append(Path(file).name)
        if len(seen) == n_files: raise Killed()
    with monkeypatch.context() as m:
        m.setattr(lth_nb.files.os, 'replace', replace)
        yield seen


def small():
    "Every kind of file, and little else."
    ticket = imp(rewind_step=6, optimizer='keep')
    return Experiment(of_points(), [dense(), ticket, supermask(of=ticket)], one_shot, 50, [0])


def test_killed_after_each_file(tmp_path, monkeypatch, undisturbed):
    "What is on the disk between two files is enough to go on from, whichever they are."
    expected, _ = undisturbed(small)
    with dies_after(monkeypatch, 0) as files, generators_kept(): small().run(tmp_path/'0', progress=False)
    assert {'experiment.json', 'epochs.jsonl', 'state-6.pt', 'state-8.pt', 'results.parquet'} <= set(files)
    for n in range(1, len(files) + 1):
        path = tmp_path/f'{n}'
        with generators_kept():
            with dies_after(monkeypatch, n), pytest.raises(Killed): small().run(path, progress=False)
            small().run(path, progress=False)
        assert differences(left(path), expected) == [], f'after {files[:n]}'


def test_what_a_killed_writer_leaves_is_read_by_nobody(tmp_path, undisturbed):
    expected, _ = undisturbed(small)
    with generators_kept(): small().run(tmp_path, progress=False)
    for f in list(tmp_path.rglob('*')):
        if f.is_file() and f.name != 'lock': f.with_name(f'{f.name}.1-2.tmp').write_bytes(f.read_bytes()[:-3])
    with trained_batches() as counted: results = small().run(tmp_path, progress=False)
    assert counted['train'] == 0 and not results.failed and differences(left(tmp_path), expected) == []


# ------------------------------------------------------------------ out of space

@contextmanager
def small_disk(path, kilobytes):
    "A disk of that size, and what makes it larger."
    path.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'tmpfs', str(path)], capture_output=True)
    if done.returncode: pytest.skip('only root can mount a disk')
    try: yield lambda: subprocess.run(['mount', '-o', 'remount,size=64m', str(path)], check=True)
    finally: subprocess.run(['umount', str(path)], check=True)


@pytest.mark.skipif(os.name != 'posix' or not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='only root can mount a disk')
@pytest.mark.parametrize('share', [.1, .3, .5, .7, .8, .9, .95])
def test_a_full_disk(share, tmp_path, undisturbed):
    "It says so; nothing is spoilt; when there is space, it ends as if there had always been."
    expected, _ = undisturbed(on_points)
    with generators_kept(): on_points().run(tmp_path/'all', progress=False)
    needed = sum(-(-f.stat().st_size//4096)*4 for f in (tmp_path/'all').rglob('*') if f.is_file())
    with small_disk(tmp_path/'disk', int(share*needed)) as grow, generators_kept():
        try: reasons = [f['reason'] for f in on_points().run(tmp_path/'disk', progress=False).failed]
        except OSError as e: reasons = [str(e)] # not even the results could be written
        assert reasons and all('No space left on device' in r for r in reasons), reasons
        assert not list((tmp_path/'disk').rglob('*.tmp'))
        for f in (tmp_path/'disk').rglob('*.pt'): torch.load(f, weights_only=True)
        grow()
        assert not on_points().run(tmp_path/'disk', progress=False).failed
        assert differences(left(tmp_path/'disk'), expected) == []


def test_files_that_may_not_grow(tmp_path, undisturbed):
    "The same where nobody may mount a disk: states are larger than a file may be."
    expected, _ = undisturbed(on_points)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with generators_kept():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        try: results = on_points().run(tmp_path, progress=False)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert results.failed and all('File too large' in f['reason'] for f in results.failed), results.failed
        assert Results.load(tmp_path).failed == results.failed and not states(tmp_path) and not list(tmp_path.rglob('*.tmp'))
        assert not on_points().run(tmp_path, progress=False).failed
    assert differences(left(tmp_path), expected) == []


# ------------------------------------------------------------------ together

def test_two_processes_in_one_folder(tmp_path, undisturbed):
    "They share the work: every batch is trained once."
    expected, _ = undisturbed(on_digits)
    both = [Child(tmp_path, on_digits) for _ in range(2)]
    for child in both: child.go()
    (n_first, failed_first), (n_second, failed_second) = (child.end() for child in both)
    plan = on_digits().plan()
    assert failed_first == failed_second == () and n_first + n_second == round(plan.epochs*on_digits().grid.n_batches)
    assert differences(left(tmp_path), expected) == []


def several(): return on_points(seeds=range(4))


@pytest.mark.slow
@pytest.mark.parametrize('attempt', range(5))
def test_three_processes_in_one_folder_one_of_which_is_killed(attempt, tmp_path, undisturbed):
    expected, seconds = undisturbed(several)
    first, *others = (Child(tmp_path, several).go() for _ in range(3))
    first.kill(after=random.Random(attempt).uniform(0, .5*seconds))
    assert all(failed == () for _, failed in (child.end() for child in others))
    assert differences(left(tmp_path), expected) == []


def longer(): return Experiment(of_points(), [dense(), dense_long(of=imp()), imp(rewind_epoch=1)], one_shot, 50, [0, 1])


def test_two_experiments_in_one_folder(tmp_path, undisturbed):
    "Some arms are in both, and share their segments."
    with generators_kept(): longer().run(tmp_path/'longer', progress=False)
    for child in [Child(tmp_path/'both', make).go() for make in (longer, on_points)]: assert child.end()[1] == ()
    expected, also = undisturbed(on_points)[0], left(tmp_path/'longer')
    found = left(tmp_path/'both')
    for kind in ('masks', 'epochs', 'states'): assert differences(found[kind], {**expected[kind], **also[kind], **{k: v for k, v in expected[kind].items() if k in found[kind] and k not in also[kind]}}) == []


# ------------------------------------------------------------------ workers that die

def deadly(fails=()):
    "Its process is killed for some seeds, as by a system that runs out of memory, until that was mended."
    if torch.initial_seed() in fails and not os.environ.get('LTH_NB_TEST_REPAIRED') and multiprocessing.parent_process() is not None: os.kill(os.getpid(), signal.SIGKILL)
    return points()


@pytest.mark.slow
def test_a_job_that_is_killed_takes_nothing_else_down(tmp_path, monkeypatch):
    "The run says so, and the next one goes on."
    exp = Experiment(Recipe(deadly, 2, lr=1e-2, options=dict(fails=(seed_inside(2),))), [dense(), imp()], one_shot, 50, [0, 1, 2])
    with generators_kept():
        try: reasons = [f['reason'] for f in exp.run(tmp_path/'run', n_jobs=2, progress=False).failed]
        except Exception as e: reasons = [str(e)]
        assert reasons and all('terminated' in r or 'died' in r or 'killed' in r for r in reasons), reasons
        monkeypatch.setenv('LTH_NB_TEST_REPAIRED', '1')
        get_reusable_executor().shutdown() # its processes have the environment they began with
        assert not exp.run(tmp_path/'run', n_jobs=2, progress=False).failed
        exp.run(tmp_path/'alone', progress=False)
    assert differences(left(tmp_path/'run'), left(tmp_path/'alone')) == []


@pytest.mark.slow
def test_a_dask_cluster_that_loses_a_worker(tmp_path, undisturbed):
    distributed = pytest.importorskip('distributed')
    expected, _ = undisturbed(many)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        pids, killed = sorted(client.run(os.getpid).values()), []
        def kill():
            while len(list(tmp_path.glob('segments/*/state-44.pt'))) < 3: time.sleep(.02)
            os.kill(pids[0], signal.SIGKILL)
            killed.append(len(list(tmp_path.glob('segments/*/state-44.pt'))))
        killer = threading.Thread(target=kill)
        killer.start()
        with joblib.parallel_config('dask'), trained_batches() as counted: results = many().run(tmp_path, n_jobs=2, progress=False)
        killer.join()
        assert len(set(client.run(os.getpid).values()) - set(pids)) >= 1, 'the worker was replaced'
    assert killed[0] < len(expected['states']) and counted['train'] == 0, 'it was killed on the way, and nothing was trained here'
    assert not results.failed and differences(left(tmp_path), expected) == []


def many(): return on_digits(seeds=range(6))


@pytest.mark.slow
def test_threads_of_a_dask_worker_take_turns(tmp_path, undisturbed):
    "A cluster's default is several threads a worker, which share their generators."
    distributed = pytest.importorskip('distributed')
    expected, _ = undisturbed(several)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=3, dashboard_address=None) as cluster, distributed.Client(cluster):
        with joblib.parallel_config('dask'): results = several().run(tmp_path, n_jobs=2, progress=False)
    assert not results.failed and differences(left(tmp_path), expected) == []
