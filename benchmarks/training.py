"""Training of ResNet-18 on Imagenette, for `make bench`: an epoch, the blog's three arms, and what a step consists of."""
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torchvision.models import resnet18

EPOCHS = 5 # of a round, as in the blog
PEER_EPOCHS = EPOCHS*(1 + 4 + 4) # dense; then two fits of a dense round and three pruned ones


def seconds(run):
    "Wall time of one call."
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def plain_learner():
    "A learner on JPEGs, as fastai's documentation shows it."
    from fastai.vision.all import ImageDataLoaders, Learner, Resize, accuracy
    from lth_nb.data import imagenette_path
    dls = ImageDataLoaders.from_folder(imagenette_path(), train='train', valid='val', item_tfms=Resize(64), bs=64, num_workers=2)
    return Learner(dls, resnet18(num_classes=10), metrics=accuracy)


def epoch_of(kind):
    "Make a learner, and give what trains it for an epoch: from JPEGs, or from the cache, with or without the CPU callback."
    from lth_nb.cpu import FastCPU
    from lth_nb.recipe import imagenette_learner
    learn = plain_learner() if kind == 'fastai' else imagenette_learner()
    if 'FastCPU' in kind: learn.add_cb(FastCPU(bf16=True))
    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return epoch


def arms_here():
    "The blog's three arms from JPEGs, by an experiment in bfloat16 where that pays, with a process a core, with a new cache, in a folder of its own: its wall time, its epochs, and the accuracies."
    from lth_nb.all import Experiment, Recipe, dense, fast_bf16, imagenette_learner, imp, iterative
    recipe = Recipe(imagenette_learner, epochs=EPOCHS, lr=1e-3, precision='bf16' if fast_bf16() else 'float32', options=dict(size=64, bs=64, opt='fused_adam'))
    exp = Experiment(recipe, [dense(), imp(), imp(rewind_epoch=1, full_epochs=True)], iterative, 50, [0])
    with TemporaryDirectory() as folder, patch.dict(os.environ, LTH_NB_CACHE=folder):
        start = time.perf_counter()
        epochs = exp.plan().epochs
        found = exp.run(Path(folder)/'run', n_jobs=os.cpu_count(), progress=False)
        taken = time.perf_counter() - start
    if found.failed: raise RuntimeError(found.failed)
    return dict(seconds=taken, epochs=epochs, processes=os.cpu_count(), precision=recipe.precision, accuracies=[r['accuracy'] for r in found.rows if r['level'] in (0, 3)])


def arms_peer():
    "What the same comparison takes with fasterai, whose arms share nothing: five of its 45 epochs are timed, without its callback, and taken nine times."
    learn = plain_learner()
    with learn.no_bar(), learn.no_logging(): taken = seconds(lambda: learn.fit(EPOCHS, 1e-3))
    return dict(seconds=taken*PEER_EPOCHS/EPOCHS, epochs=PEER_EPOCHS)


KINDS = { # kind of work -> parts of the names of torch's operations
    'convolutions': ['convolution'],
    'batch norm': ['batch_norm'],
    'activations and pooling': ['clamp_min', 'threshold', 'max_pool', 'mean'],
    'optimizer': ['fused_adam', 'Optimizer.step'],
    'mask': ['bitwise_and'],
    'copies': ['aten::copy_']}


def steps(masked=True, channels_last=False, precision=None, compiled=False, batches=None):
    "Make a ResNet-18, and give what trains it for a step."
    from lth_nb.sparsifier import Sparsifier
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    if channels_last: model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    if masked: Sparsifier(model).attach(optimizer).prune(50)
    run, images = torch.compile(model) if compiled else model, (torch.randn(64, 3, 64, 64), torch.randint(10, (64,)))
    def step():
        with record_function('data'): x, y = next(batches) if batches else images
        if channels_last: x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast('cpu', precision) if precision else nullcontext(): loss = nn.functional.cross_entropy(run(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def shares_of_step(settings):
    "The share of each kind of work in masked steps on real batches, in percent."
    from lth_nb.data import imagenette_dls
    step = steps(batches=iter(imagenette_dls().train), **settings)
    for _ in range(3): step()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for _ in range(20): step()
    found = prof.key_averages()
    whole = sum(e.self_cpu_time_total for e in found)
    shares = {kind: sum(e.self_cpu_time_total for e in found if any(word in e.key for word in words)) for kind, words in KINDS.items()}
    shares['data'] = next(e.cpu_time_total for e in found if e.key == 'data')  # with all that the loader calls
    shares['other'] = whole - sum(shares.values())
    return {kind: 100*t/whole for kind, t in shares.items()}


VARIANTS = {
    'float32': {},
    'channels_last': dict(channels_last=True),
    'bf16': dict(precision=torch.bfloat16),
    'bf16, channels_last': dict(channels_last=True, precision=torch.bfloat16),
    'torch.compile': dict(compiled=True),
    'torch.compile, channels_last': dict(compiled=True, channels_last=True)}


def variant(settings):
    "Set a variant up, and give ten of its steps."
    step = steps(**settings)
    return lambda: lambda: [step() for _ in range(10)]


ALLOCATORS = { # environments of glibc's malloc, which gives large blocks back to the system
    'malloc as it comes': {},
    'malloc keeping memory': dict(MALLOC_MMAP_THRESHOLD_='4294967296', MALLOC_TRIM_THRESHOLD_='8589934592', MALLOC_TOP_PAD_='268435456')}


def steps_apart(environment):
    "Train fifty steps in a process with its own environment."
    code = 'import training; step = training.steps(); [step() for _ in range(50)]'
    subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent, env=os.environ | environment, check=True)


def validation(bs):
    "Set a network up, and give the validation of 3,840 images in batches."
    model, images = resnet18(num_classes=10).eval(), torch.randn(3840, 3, 64, 64)
    def run():
        with torch.no_grad():
            for part in images.split(bs): model(part)
    return lambda: run
