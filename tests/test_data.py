"The loaders and their cache under processes, kills and damage."
import multiprocessing
import os
import pickle
import random
import signal
import time
from copy import deepcopy

import fastai.callback.progress  # noqa: F401, gives learners no_bar
import numpy as np
import pytest
import torch
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import TensorCategory, TensorImage
from fastai.vision.augment import Flip, RandomResizedCrop
from fastai.vision.core import PILImage
from fasttransform import Transform
from PIL import Image
from scipy import stats
from torch import nn
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

import lth_nb.data as data
from lth_nb.cpu import FastCPU
from lth_nb.data import IMAGENETTE, balanced, decode_once, digits_dls, imagenette_dls, imagenette_names, imagenette_path, square_image
from lth_nb.rewind import ModelState, Position, RandomState, Resume, RewindPoint


# --- folders

def make_folder(root, n=4, seed=0):
    "A folder laid out as Imagenette, with `n` smooth random pictures of several shapes in each class."
    rng = np.random.default_rng(seed)
    for here in (root/s/c for s in ('train', 'val') for c in IMAGENETTE):
        here.mkdir(parents=True)
        for i in range(n):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize([(40, 30), (30, 40), (33, 33), (61, 24)][i % 4], Image.BICUBIC).save(here/f'{i}.JPEG')
    return root


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('noise')/'imagenette')


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')


@pytest.fixture
def dls(folder, cache): return imagenette_dls(16, bs=8, path=folder, device='cpu', cache=cache)


@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "Eight pictures of each class and split of the real Imagenette, linked into a folder of their own."
    try: path = imagenette_path()
    except ValueError as e: pytest.skip(str(e))
    root, names = tmp_path_factory.mktemp('real'), imagenette_names(path)
    for start in {o.rsplit('/', 1)[0] for o in names}:
        (root/start).mkdir(parents=True)
        for o in [o for o in names if o.startswith(start + '/')][:8]: (root/o).symlink_to((path/o).resolve())
    return root


def net(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


@pytest.fixture
def learn(dls, tmp_path):
    torch.manual_seed(0)
    learn = Learner(dls, net(), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): yield learn


# --- pixels

@pytest.mark.parametrize('size', [16, 24, 50])
def test_pixels_are_pillows_own(folder, tmp_path, size):
    names = imagenette_names(folder)
    decoded = decode_once(folder, names, size, tmp_path)
    for i, name in enumerate(names):
        img = Image.open(folder/name)
        scale = size/min(img.size)
        w, h = (int(o*scale + 1e-9) for o in img.size)
        img = img.resize((w, h), Image.BILINEAR)
        left, top = round((w - size)/2), round((h - size)/2)
        expected = np.asarray(img.crop((left, top, left + size, top + size)))
        assert np.array_equal(decoded[i], expected.transpose(2, 0, 1)), name


def test_real_pictures(real, tmp_path):
    dls = imagenette_dls(32, bs=16, path=real, n_train=40, device='cpu', cache=tmp_path)
    names, rows = imagenette_names(real), dls.train_ds.rows
    crop = lambda o: np.asarray(CenterCrop(32)(Resize(32, InterpolationMode.BILINEAR)(Image.open(real/o).convert('RGB')))) # noqa: E731
    assert all(np.array_equal(dls.train_ds[k][0].numpy(), crop(names[r]).transpose(2, 0, 1)) for k, r in enumerate(rows))
    assert len(dls.valid_ds) == 80 and dls.c == 10
    learn = Learner(dls, net(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=FastCPU(bf16=True))
    assert np.isfinite(learn.recorder.values[-1]).all()


def test_grey_and_odd_files(tmp_path):
    Image.fromarray(np.full((20, 30), 77, np.uint8)).save(tmp_path/'grey.JPEG')
    grey = square_image(tmp_path/'grey.JPEG', 8)
    assert grey.shape == (3, 8, 8) and (grey == 77).all()
    (tmp_path/'bad.JPEG').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='bad.JPEG'): square_image(tmp_path/'bad.JPEG', 8)
    cut = (tmp_path/'grey.JPEG').read_bytes()[:200]
    (tmp_path/'cut.JPEG').write_bytes(cut)
    with pytest.raises(ValueError, match='cut.JPEG'): square_image(tmp_path/'cut.JPEG', 8)


def test_batches_are_normalised(dls):
    x, y = dls.valid.one_batch()
    raw, labels = dls.valid_ds.batch(range(8))
    mean, std = (torch.tensor(o).view(3, 1, 1) for o in data.imagenet_stats)
    assert torch.allclose(x, ((raw.float()/255 - mean)/std).as_subclass(torch.Tensor), atol=1e-6)
    assert torch.equal(y, labels.as_subclass(torch.Tensor)) and x.is_contiguous()


# --- the cache

FORK = multiprocessing.get_context('fork') if hasattr(os, 'fork') else None
forks = pytest.mark.skipif(FORK is None, reason='needs os.fork')


def pixels(folder, cache): return decode_once(folder, imagenette_names(folder), 16, cache)

def build(folder, cache, ready, go, built, slow):
    "In a process of its own: build the cache when told to, the pictures after the first `slow` ones taking for ever."
    load, plain, done = data.square_image, data._build, []
    def slow_load(path, size):
        done.append(path)
        if len(done) > slow: time.sleep(1000)
        return load(path, size)
    def slow_build(*args):
        built.value += 1
        time.sleep(.3) # long enough for the other to arrive
        plain(*args)
    data.square_image, data._build = slow_load, slow_build
    ready.set()
    assert go.wait(60)
    found = pixels(folder, cache)
    assert all(np.array_equal(found[i], load(folder/o, 16)) for i, o in enumerate(imagenette_names(folder)))


def start(folder, cache, go, slow=10**9):
    ready, built = FORK.Event(), FORK.Value('i', 0)
    child = FORK.Process(target=build, args=(folder, cache, ready, go, built, slow))
    child.start()
    return child, ready, built


def wait(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(.01)


@forks
def test_two_processes_build_once(folder, tmp_path):
    cache, go = tmp_path/'cache', FORK.Event()
    both = [start(folder, cache, go) for _ in range(2)]
    for _, ready, _ in both: assert ready.wait(60)
    go.set()
    for child, _, _ in both: child.join(60)
    assert [child.exitcode for child, _, _ in both] == [0, 0] # each compared all pixels
    assert sorted(built.value for _, _, built in both) == [0, 1] # one built, the other waited
    assert sorted(o.suffix for o in cache.iterdir()) == ['.json', '.lock', '.u8']


@forks
def test_killed_while_building(tmp_path):
    folder, cache, go = make_folder(tmp_path/'imagenette', n=30), tmp_path/'cache', FORK.Event() # 600 pictures: a part of 512 and one of 88
    go.set()
    child, _, _ = start(folder, cache, go, slow=550)
    wait(lambda: any(o.stat().st_size > 0 for o in cache.glob('*.tmp')))
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert list(cache.glob('*.tmp')) and not list(cache.glob('*.u8')) and not list(cache.glob('*.json'))
    (cache/'images-v1-96px-0123456789abcdef.u8.7-7.tmp').write_bytes(b'left by a build of another size')
    (cache/'thesis.tmp').write_bytes(b'of somebody else')
    names, decoded = imagenette_names(folder), pixels(folder, cache)
    assert all(np.array_equal(decoded[i], square_image(folder/o, 16)) for i, o in enumerate(names))
    assert [f.name for f in cache.glob('*.tmp')] == ['thesis.tmp']


@forks
def test_killed_between_pixels_and_description(folder, tmp_path, monkeypatch):
    def die(file, meta, paths):
        monkeypatch.setattr(data.json, 'dumps', lambda o: os.kill(os.getpid(), signal.SIGKILL))
        plain(file, meta, paths)
    plain = data._build
    monkeypatch.setattr(data, '_build', die)
    child = FORK.Process(target=pixels, args=(folder, tmp_path))
    child.start(), child.join(60)
    assert child.exitcode == -signal.SIGKILL and len(list(tmp_path.glob('*.u8'))) == 1 and not list(tmp_path.glob('*.json'))
    monkeypatch.setattr(data, '_build', plain)
    pixels(folder, tmp_path)
    assert len(list(tmp_path.glob('*.json'))) == 1 and not list(tmp_path.glob('*.tmp'))


def _cut(file): file.write_bytes(file.read_bytes()[:-100])
def _flip(file): file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
def _grow(file): file.write_bytes(file.read_bytes() + b'0')
def _drop(file): file.unlink()
def _no_meta(file): file.with_suffix('.json').unlink()
def _half_meta(file): file.with_suffix('.json').write_text(file.with_suffix('.json').read_text()[:40])
def _list_meta(file): file.with_suffix('.json').write_text('[]')
def _binary_meta(file): file.with_suffix('.json').write_bytes(b'\xff\xfe')
def _old_format(file): file.with_suffix('.json').write_text(file.with_suffix('.json').read_text().replace('"format": 1', '"format": 0'))


@pytest.mark.parametrize('damage', [_cut, _flip, _grow, _drop, _no_meta, _half_meta, _list_meta, _binary_meta, _old_format])
def test_damage_is_noticed(folder, tmp_path, damage, monkeypatch):
    whole = pixels(folder, tmp_path)
    before, meta = whole[:].copy(), whole.file.with_suffix('.json').read_text()
    damage(whole.file)
    again = pixels(folder, tmp_path)
    assert np.array_equal(again[:], before) and again.file.with_suffix('.json').read_text() == meta
    monkeypatch.setattr(data, '_build', None) # a whole cache is not built again
    pixels(folder, tmp_path)


def test_a_changed_folder_means_a_new_cache(tmp_path):
    folder = make_folder(tmp_path/'imagenette', n=2)
    old = pixels(folder, tmp_path/'cache')
    Image.new('RGB', (50, 50), 'red').save(folder/'train/n01440764/0.JPEG')
    new = pixels(folder, tmp_path/'cache')
    assert new.file != old.file and not np.array_equal(new[0], old[0]) and np.array_equal(new[1:], old[1:])
    assert decode_once(folder, imagenette_names(folder), 8, tmp_path/'cache').file not in (old.file, new.file)


def test_a_bad_picture_leaves_nothing_half_built(tmp_path):
    folder = make_folder(tmp_path/'imagenette', n=2)
    (folder/'val/n03888257/1.JPEG').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='n03888257/1.JPEG'): pixels(folder, tmp_path/'cache')
    assert [o.name for o in (tmp_path/'cache').iterdir()] == ['building.lock']


def test_a_full_disk_is_an_error_and_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(data.os, 'fsync', full)
    with pytest.raises(OSError, match='No space'): pixels(folder, tmp_path)
    assert [o.name for o in tmp_path.iterdir()] == ['building.lock']


def test_where_the_cache_lies(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('LTH_NB_CACHE', str(tmp_path/'env'))
    monkeypatch.setenv('LTH_NB_IMAGENETTE', str(folder))
    assert imagenette_dls(16, bs=4).train_ds.images.file.parent == tmp_path/'env'
    assert imagenette_dls(16, bs=4, cache=tmp_path/'arg').train_ds.images.file.parent == tmp_path/'arg'
    monkeypatch.delenv('LTH_NB_CACHE')
    monkeypatch.setattr(data, 'user_cache_path', lambda *a, **k: tmp_path/'user')
    assert data.cache_folder() == tmp_path/'user'


def test_without_imagenette(monkeypatch):
    def offline(url): raise OSError('no network')
    monkeypatch.delenv('LTH_NB_IMAGENETTE', raising=False)
    monkeypatch.setattr(data, 'untar_data', offline)
    with pytest.raises(ValueError, match='LTH_NB_IMAGENETTE'): imagenette_path()


def test_a_folder_that_is_something_else(tmp_path):
    with pytest.raises(ValueError, match='train/<class>'): imagenette_dls(path=tmp_path/'nowhere')
    folder = make_folder(tmp_path/'imagenette', n=1)
    for o in (folder/'val/n03445777').iterdir(): o.rename(o.with_name('._' + o.name))
    with pytest.raises(ValueError, match='1 of 20 folders, among them val/n03445777'): imagenette_dls(path=folder)


@pytest.mark.parametrize('wrong', [dict(size=0), dict(size=16.), dict(bs=0), dict(bs=41), dict(n_train=0), dict(n_train=41), dict(n_valid=1.5),
                                   dict(n_valid=True), dict(n_train=5, bs=6), dict(min_scale=0), dict(min_scale=35), dict(min_scale='.35'), dict(size=64, min_scale=.0002)])
def test_wrong_arguments(folder, tmp_path, wrong):
    with pytest.raises(ValueError, match='n_train=|n_valid=|size=|bs=|min_scale='): imagenette_dls(**{**dict(size=8, bs=4, path=folder, cache=tmp_path), **wrong})
    assert not list(tmp_path.iterdir()) # before anything is decoded


# --- subsets

def test_balanced_is_balanced_nested_and_fixed():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 7, 500)
    names = [f'{i}.JPEG' for i in range(500)]
    last, sizes = set(), np.bincount(labels)
    for n in range(1, 501, 13):
        rows = balanced(labels, names, n)
        got = np.bincount(labels[rows], minlength=7)
        assert len(set(rows)) == n and last <= set(rows)
        level = got.max()
        assert all(g == s or g >= level - 1 for g, s in zip(got, sizes)) # one less only where a class has no more, or n does not divide
        last = set(rows)
    mixed = rng.permutation(500)
    again = balanced(labels[mixed], [names[i] for i in mixed], 100)
    assert {names[i] for i in mixed[again]} == {names[i] for i in balanced(labels, names, 100)}


def test_subset_ignores_the_training_seed(folder, tmp_path):
    found = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        found.append(imagenette_dls(16, bs=4, path=folder, n_train=20, n_valid=10, cache=tmp_path))
    assert [d.train_ds.fingerprint() for d in found] == [found[0].train_ds.fingerprint()]*2
    for items in (found[0].train_ds, found[0].valid_ds): assert set(np.bincount(items.labels[items.rows])) == {len(items)//10}
    assert not set(found[0].train_ds.rows) & set(found[0].valid_ds.rows)
    assert found[0].train_ds.rows.max() < 40 <= found[0].valid_ds.rows.min()


# --- loaders

def batches(dl, seed=3):
    dl.rng = random.Random(seed)
    return [tuple(o.clone() for o in b) for b in dl]


def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


AUGMENTED = {'plain': {}, 'mirrored': dict(flip=True), 'parts': dict(min_scale=.35), 'both': dict(flip=True, min_scale=.35)}


@pytest.mark.parametrize('how', AUGMENTED.values(), ids=AUGMENTED)
def test_same_generator_same_batches(folder, cache, how):
    none, two = (imagenette_dls(16, bs=7, path=folder, n_train=38, num_workers=n, device='cpu', cache=cache, **how) for n in (0, 2))
    first = batches(none.train)
    assert len(first) == len(none.train) == 5 and all(len(x) == 7 for x, _ in first)
    assert same(first, batches(none.train)) and same(first, batches(two.train)) and not same(first, batches(none.train, seed=4))
    assert same(batches(none.valid), batches(two.valid)) and sum(len(x) for x, _ in none.valid) == 40
    torch.manual_seed(99), np.random.seed(99), random.seed(99) # only the loader's generator counts
    assert same(first, batches(none.train))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_second_pass_changes_nothing_in_the_first(folder, cache, workers):
    dls = imagenette_dls(16, bs=7, path=folder, num_workers=workers, flip=True, min_scale=.35, device='cpu', cache=cache)
    first, again = batches(dls.train), []
    dls.train.rng = random.Random(3)
    for batch in dls.train:
        again.append(tuple(o.clone() for o in batch))
        if len(again) == 2: dls.train.one_batch()
    assert same(first, again)


def test_going_on_inside_an_epoch_serves_the_same_parts(folder, cache):
    dls = imagenette_dls(16, bs=7, path=folder, flip=True, min_scale=.35, device='cpu', cache=cache)
    first = batches(dls.train)
    point = RewindPoint(ModelState({}, {}), (), None, (), RandomState.take(), RandomState.take(), Position(steps=2, epoch=0, batch=2))
    dls.train.rng = random.Random(3)
    assert same(first[2:], list(Resume(dls.train, point)))


def test_flip_mirrors_some_images_and_changes_nothing_else(folder, tmp_path):
    plain, flipped = (imagenette_dls(16, bs=8, path=folder, flip=f, device='cpu', cache=tmp_path) for f in (False, True))
    pairs = [(a, b) for (x, y), (v, w) in zip(batches(plain.train), batches(flipped.train)) for a, b in zip(x, v) if torch.equal(y, w)]
    assert len(pairs) == 40
    as_is = [torch.equal(a, b) for a, b in pairs]
    assert all(s or torch.equal(a, b.flip(-1)) for s, (a, b) in zip(as_is, pairs)) and 8 < sum(as_is) < 32
    assert same(batches(plain.valid), batches(flipped.valid))
    flipped.train.rng = random.Random(0)
    assert not torch.equal(*(torch.as_tensor(data.mirrored(random.Random(s), 40)) for s in (0, 1)))


# --- random parts

def test_parts_are_those_of_the_box():
    image = np.zeros((3, 20, 40), np.uint8)
    image[:, 5:10, 30:40] = 255  # top 25 to 50 %, the last quarter of the width
    inside = slice(None), slice(1, -1), slice(1, -1)  # at the rim, scaling looks one pixel further
    assert (data.cut_out(image, (.75, .25, 1, .5), 8)[inside] == 255).all() and (data.cut_out(image, (0, .5, 1, 1), 8)[inside] == 0).all()
    assert np.array_equal(data.cut_out(image[:, :20, :20], (0, 0, 1, 1), 20), image[:, :20, :20])


@pytest.mark.parametrize('min_scale', [.08, .35, 1])
def test_boxes_are_drawn_as_fastai_draws_them(min_scale):
    "The shares of area and the shapes of many boxes, beside those of `RandomResizedCrop`."
    crop, theirs = RandomResizedCrop(64, min_scale=min_scale), []
    image = PILImage.create(np.zeros((1000, 1000, 3), np.uint8))
    random.seed(0)
    for _ in range(4000):
        crop.before_call(image, 0)
        theirs.append(crop.cp_size)
    left, top, right, bottom = data.random_boxes(random.Random(1), 4000, min_scale).T
    ours, theirs = np.array([right - left, bottom - top]), np.array(theirs).T/1000
    for look in (np.prod, lambda sides, axis: np.log(sides[0]/sides[1]) + np.zeros(4000)):
        assert stats.ks_2samp(look(ours, axis=0).round(2), look(theirs, axis=0).round(2)).pvalue > .001
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 1 and bottom.max() <= 1


def test_corners_reach_every_place():
    left, top, right, bottom = data.random_boxes(random.Random(0), 4000, .35).T
    some = right - left < .999
    for corner, end in ((left, right), (top, bottom)):
        place = corner[some]/(1 - (end - corner)[some])
        assert stats.kstest(place[np.isfinite(place)], 'uniform').pvalue > .001


def test_parts_and_mirroring_do_not_go_together():
    boxes, flips = data.random_boxes(random.Random(0), 4000, .35), data.mirrored(random.Random(0), 4000)
    for column in boxes.T: assert abs(np.corrcoef(column, flips)[0, 1]) < .06


def test_parts_leave_order_and_validation_alone(folder, tmp_path):
    plain, cut = (imagenette_dls(16, bs=8, path=folder, min_scale=m, device='cpu', cache=tmp_path) for m in (1., .35))
    first = batches(cut.train)
    assert all(x.shape == (8, 3, 16, 16) for x, _ in first)
    assert all(torch.equal(y, w) for (_, y), (_, w) in zip(first, batches(plain.train))) and not same(first, batches(plain.train))
    assert same(batches(plain.valid), batches(cut.valid))
    assert cut.train_ds.fingerprint() != plain.train_ds.fingerprint() and cut.valid_ds.fingerprint() == plain.valid_ds.fingerprint()


def test_new_images_are_served_whole(folder, tmp_path):
    cut = imagenette_dls(16, bs=8, path=folder, min_scale=.35, device='cpu', cache=tmp_path)
    file = folder/imagenette_names(folder)[0]
    for loader in (cut.train, cut.valid):
        found = loader.new(dataset=[file]*8, shuffle=False)
        assert torch.equal(found.one_batch()[0], cut.test_dl([file]*8).one_batch()[0])


def test_every_image_once_and_with_its_label(dls):
    by_pixels = {dls.train_ds[i][0].numpy().tobytes(): int(dls.train_ds[i][1]) for i in range(len(dls.train_ds))}
    got = [(dls.train.decode(b)) for b in dls.train]
    flat = [(x.numpy(), int(y)) for xs, ys in got for x, y in zip(xs, ys)]
    assert len(flat) == 40
    originals = torch.stack([o[0].as_subclass(torch.Tensor).int() for o in dls.train_ds])
    labels = [int(o[1]) for o in dls.train_ds]
    nearest = [int((originals - torch.as_tensor(x)).abs().flatten(1).sum(1).argmin()) for x, _ in flat] # decoding rounds
    assert sorted(nearest) == list(range(40)) and [labels[i] for i in nearest] == [y for _, y in flat] and len(by_pixels) == 40


@pytest.mark.parametrize('workers', [0, 2])
def test_copies_and_pickles(folder, tmp_path, workers):
    dls = imagenette_dls(16, bs=8, path=folder, num_workers=workers, flip=True, device='cpu', cache=tmp_path)
    first = batches(dls.train)
    pickled = pickle.dumps(dls)
    assert len(pickled) < 20_000 # names the file, does not hold its 61 kB of pixels
    for other in (deepcopy(dls), pickle.loads(pickled)): assert same(batches(other.train), first)
    assert same(batches(dls.train.new()), first) and len(dls.train.new(bs=5)) == 8
    assert len(dls.train.new(shuffle=False, drop_last=False, bs=16)) == 3


def test_what_would_be_ignored_is_refused(dls):
    dls.add_tfms([Transform(lambda o: o)], 'after_item')
    with pytest.raises(ValueError, match='after_batch'): dls.one_batch()


def test_fastais_augmentations_are_for_training_only(dls):
    plain = batches(dls.train), batches(dls.valid)
    dls.add_tfms([Flip(p=1.)], 'after_batch')
    for (x, _), (v, _) in zip(batches(dls.train), plain[0]): assert torch.allclose(x.flip(-1), v, atol=1e-4) # Flip interpolates
    for (x, _), (v, _) in zip(batches(dls.valid), plain[1]): assert torch.allclose(x, v, atol=1e-4)


def test_showing(dls, learn):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    dls.show_batch(max_n=4)
    titles = {ax.get_title() for ax in plt.gcf().axes if ax.images}
    assert titles and titles <= set(IMAGENETTE.values())
    shown = plt.gcf().axes[0].images[0].get_array()
    assert shown.shape == (16, 16, 3) and shown.max() > 1 # pixels, not normalised numbers
    learn.show_results(max_n=4)
    assert all(t in IMAGENETTE.values() for ax in plt.gcf().axes if ax.images for t in ax.get_title().split('\n'))
    plt.close('all')
    x, y = dls.decode(dls.one_batch())
    assert isinstance(x, TensorImage) and isinstance(y, TensorCategory)
    assert type(dls.one_batch()[0]) is type(dls.one_batch()[1]) is torch.Tensor


def test_interpretation(learn):
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == 40 and list(interp.vocab) == list(IMAGENETTE.values())


def test_predictions(folder, learn):
    names = imagenette_names(folder)[40:]
    preds, targets = learn.get_preds()
    assert targets.tolist() == [list(IMAGENETTE).index(o.split('/')[1]) for o in names]
    from_files, none = learn.get_preds(dl=learn.dls.test_dl([folder/o for o in names]))
    assert torch.equal(from_files, preds) and none is None
    assert torch.allclose(learn.get_preds(dl=learn.dls.test_dl([str(folder/names[3]), Image.open(folder/names[5])]))[0], preds[[3, 5]], atol=1e-6)
    assert torch.allclose(learn.predict(folder/names[7])[2], preds[7], atol=1e-6)
    train, idxs = learn.get_preds(ds_idx=0)[1], learn.dls.train_ds.rows
    assert train.tolist() == learn.dls.train_ds.labels[idxs].tolist()
    with pytest.raises(ValueError, match='test_items'): learn.dls.test_dl([np.zeros((3, 9, 9), np.uint8)])
    with pytest.raises(ValueError, match='test_items is empty'): learn.dls.test_dl([])
    with pytest.raises(ValueError, match='nowhere.JPEG'): learn.dls.test_dl(['nowhere.JPEG'])


def test_exported_learner_needs_no_cache(folder, tmp_path):
    learn = Learner(imagenette_dls(16, bs=8, path=folder, device='cpu', cache=tmp_path), net())
    with learn.no_bar(): before = learn.predict(folder/'val/n03000684/0.JPEG')[2]
    learn.add_cb(FastCPU(bf16=False, channels_last=True))
    learn.export(tmp_path/'learner.pkl')
    assert len(learn.dls.new_empty().train_ds.images) == 0
    for o in tmp_path.glob('*.u8'): o.unlink()
    loaded = load_learner(tmp_path/'learner.pkl')
    with loaded.no_bar(): assert torch.allclose(loaded.predict(folder/'val/n03000684/0.JPEG')[2], before, atol=1e-5)


# --- digits

def test_digits():
    dls = digits_dls(device='cpu')
    x, y = dls.valid.one_batch()
    assert x.shape == (64, 1, 8, 8) and x.dtype == torch.float32 and dls.c == 10 and list(dls.vocab) == list('0123456789')
    everything = torch.cat([b[0] for b in dls.train.new(drop_last=False)])
    assert everything.shape == (1437, 1, 8, 8) and abs(everything.mean()) < 1e-4 and abs(everything.std() - 1) < 1e-3
    rows = [set(o.rows) for o in (dls.train_ds, dls.valid_ds)]
    assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == 1797
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert digits_dls().train_ds.fingerprint() == dls.train_ds.fingerprint() != digits_dls(seed=1).train_ds.fingerprint()
    assert np.bincount(dls.train_ds.labels[dls.train_ds.rows]).min() > 1437*.09
    with pytest.raises(ValueError, match='valid_pct'): digits_dls(valid_pct=20)
    with pytest.raises(ValueError, match='test_items'): dls.test_dl(['three.png'])
