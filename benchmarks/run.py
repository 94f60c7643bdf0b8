"""Measure side by side, in one run, and write benchmarks/results.md.

    make bench                                  # everything, about an hour and a half on two cores
    .venv/bin/python benchmarks/run.py prune    # one part: prune, memory, hold, step, epoch or arms; its last result is replaced
"""
import json
import platform
import subprocess
import sys
import time
import warnings
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet18, vgg16

from lth_nb.sparsifier import Sparsifier
from training import ALLOCATORS, VARIANTS, arms_here, arms_peer, epoch_of, seconds, shares_of_step, steps_apart, validation, variant

HERE = Path(__file__).parent
warnings.filterwarnings('ignore')


def side_by_side(contenders, repeats):
    "Call all in turn, again and again; each contender makes its own fresh setup, untimed. Times of the first turn are not counted."
    times = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, setup in contenders.items():
            taken = seconds(setup())
            if turn: times[name].append(taken)
    return {name: dict(median=median(t), min=min(t), max=max(t), n=len(t)) for name, t in times.items()}


def pruning_of(model):
    "One global pruning to 50 %, by each library, each on a fresh copy."
    from fasterai.core.criteria import large_final
    from fasterai.sparse.sparsifier import Sparsifier as FasteraiSparsifier
    types = (nn.Conv2d, nn.Linear)
    def ours_mask(): return lambda sp=Sparsifier(model): sp.next_mask(50)
    def ours_prune(): return lambda sp=Sparsifier(deepcopy(model)): sp.prune(50)
    def fasterai(): return lambda sp=FasteraiSparsifier(deepcopy(model), 'weight', 'global', large_final, layer_type=types): sp.sparsify_model(.5)
    def torch_prune():
        copy = deepcopy(model)
        weights = [(m, 'weight') for m in copy.modules() if isinstance(m, types)]
        return lambda: prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=.5)
    return {'lth_nb, the mask': ours_mask, 'lth_nb, mask and model': ours_prune, 'fasterai': fasterai, 'torch.nn.utils.prune': torch_prune}


def bench_prune():
    "One global pruning of ResNet-18 and VGG-16."
    return {'ResNet-18': side_by_side(pruning_of(resnet18(num_classes=10)), 7), 'VGG-16': side_by_side(pruning_of(vgg16()), 3)}


MEMORY = '''
import re, time, torch
from torch import nn
from lth_nb.sparsifier import Sparsifier
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(10_000, 10_000, bias=False) for _ in range(5)])
sp = Sparsifier(model)
small = Sparsifier(nn.Linear(100, 100)).next_mask(50)
open("/proc/self/clear_refs", "w").write("5")
before, start = status("VmRSS"), time.perf_counter()
mask = sp.next_mask(50)
print(time.perf_counter() - start, status("VmHWM") - before, sum(t.numel() for t in mask.values()), mask.n_total - mask.n_kept)
'''


def bench_memory():
    "Peak memory of one global pruning of 500 million weights, beyond what was there before and the new mask."
    taken, peak, mask_bytes, n_cut = map(float, subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, check=True).stdout.split())
    return dict(seconds=taken, n_cut=int(n_cut), extra_bytes=peak - mask_bytes, weight_bytes=4*mask_bytes, share=(peak - mask_bytes)/(4*mask_bytes))


OPTIMIZERS = {
    'SGD with momentum': partial(torch.optim.SGD, lr=1e-3, momentum=.9),
    'Adam, fused': partial(torch.optim.Adam, lr=1e-3, fused=True),
    'Adam': partial(torch.optim.Adam, lr=1e-3)}


def bench_hold():
    "What keeping a mask adds to training steps of ResNet-18 at 64 px and batch 64; ten steps at a time, as in training, so that one model has the caches."
    x, y = torch.randn(64, 3, 64, 64), torch.randint(10, (64,))
    def steps(make_optimizer, masked):
        model = resnet18(num_classes=10)
        optimizer = make_optimizer(model.parameters())
        if masked: Sparsifier(model).attach(optimizer).prune(50)
        def step():
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return lambda: lambda: [step() for _ in range(10)]
    return {name: side_by_side({kind: steps(make, kind == 'masked') for kind in ('dense', 'masked')}, 8) for name, make in OPTIMIZERS.items()}


def bench_epoch():
    "One epoch, training and validation, on all of Imagenette at 64 px, from a filled cache and from JPEGs."
    return side_by_side({kind: partial(epoch_of, kind) for kind in ('fastai', 'cache', 'cache, FastCPU')}, 2)


def bench_arms():
    "The blog's three arms, here and with fasterai."
    return {'fastai and fasterai': arms_peer(), 'lth_nb': arms_here()}


def bench_step():
    "What a step consists of, and what was tried to make it faster."
    return dict(shares={name: shares_of_step(VARIANTS[name]) for name in ('float32', 'bf16, channels_last')},
                variants=side_by_side({name: variant(settings) for name, settings in VARIANTS.items()}, 5),
                allocator=side_by_side({name: lambda env=env: lambda: steps_apart(env) for name, env in ALLOCATORS.items()}, 3),
                validation=side_by_side({f'batches of {bs}': validation(bs) for bs in (64, 256)}, 5))


def machine():
    "What it was measured on."
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor())
    names = ('torch', 'torchvision', 'fastai', 'fasterai')
    return dict(cpu=cpu, threads=torch.get_num_threads(), python=platform.python_version(), **{n: version(n) for n in names}, date=time.strftime('%Y-%m-%d'))


def markdown_table(rows):
    "A table of dicts that have the same keys."
    head = [f'| {" | ".join(rows[0])} |', '| :--- '*len(rows[0]) + '|']
    return '\n'.join(head + [f'| {" | ".join(map(str, row.values()))} |' for row in rows]) + '\n'


def rows(times, base):
    "Markdown rows of a comparison; the ratio is to `base`."
    return '\n'.join(f'| {n} | {t["median"]:.3f} | {t["min"]:.3f} to {t["max"]:.3f} | {t["median"]/times[base]["median"]:.3f} |' for n, t in times.items())


def table(title, times, base):
    return f'### {title}\n\n| | median (s) | range (s) | ratio to {base} |\n| :--- | ---: | ---: | ---: |\n{rows(times, base)}\n'


def write(results):
    "results.md from results.json."
    parts = ['# Benchmarks\n\nMade by `make bench`. Contenders take turns in one process, and the first turn is not counted, where nothing else is said. Machines are noisy: read the ratios. Each part tells of the machine it last ran on:\n',
             markdown_table([dict(part=part) | m for part, m in results['machines'].items()])]
    if 'prune' in results:
        parts.append('## One global pruning to 50 %\n\n*The mask* finds the exact mask; *mask and model* also applies it and keeps the values that were cut. The others do both as they are documented.\n')
        parts += [table(name, times, 'lth_nb, mask and model') for name, times in results['prune'].items()]
    if r := results.get('memory'):
        parts.append(f'### 500 million weights\n\n{r["n_cut"]:,} cut in {r["seconds"]:.1f} s; peak memory beyond weights and masks {r["extra_bytes"]/1e6:.0f} MB, {100*r["share"]:.1f} % of the weights.\n')
    if 'hold' in results:
        parts.append('## Keeping a mask\n\nTen training steps of ResNet-18, 64 px, batch 64, float32, without and with a 50 % mask held by `Sparsifier.attach` (weights after the step, gradients after the backward pass). '
                     'Plain `Adam` pays more than the mask: the square root of torch is many times slower at exact zeros where it comes from MKL, and half of the running squares of the gradients are zeros now; `fused=True` takes another one.\n')
        parts += [table(name, times, 'dense') for name, times in results['hold'].items()]
    if 'epoch' in results:
        parts.append('## An epoch of Imagenette\n\nResNet-18, all 9,469 training and 3,925 validation images at 64 px, batch 64. *fastai*: `ImageDataLoaders.from_folder`, `Resize(64)`, two workers, float32, '
                     'from JPEGs. *cache*: `imagenette_dls` from a filled cache, float32. *FastCPU* adds bf16 autocast and channels_last, asked for by `bf16=True`.\n')
        parts.append(table('Training and validation', results['epoch'], 'fastai'))
    if r := results.get('step'):
        parts.append('## A step\n\nResNet-18, 64 px, batch 64, fused AdamW, a 50 % mask. Where the time of a step goes, by the profiler of torch, on real batches, in percent:\n')
        parts.append(markdown_table([dict(work=kind) | {name: f'{shares[kind]:.1f}' for name, shares in r['shares'].items()} for kind in r['shares']['float32']]))
        parts += [table('Ten steps', r['variants'], 'float32'),
                  table('Fifty steps in a process of its own, with its start', r['allocator'], 'malloc as it comes'),
                  "*Keeping*: by `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_` and `MALLOC_TOP_PAD_` of glibc. What is kept falls to pieces where sizes change: in a try with blocks of many sizes a process came to hold five times what was in use. So the library leaves malloc as it is.\n",
                  table('Validating 3,840 images', r['validation'], 'batches of 64')]
    if r := results.get('arms'):
        ours, peer = r['lth_nb'], r['fastai and fasterai']
        variants = results['step']['variants'] if ours['precision'] == 'bf16' and 'step' in results else None
        of_bf16 = f' A step in bf16 takes {variants["bf16, channels_last"]["median"]/variants["float32"]["median"]:.2f} of one in float32, as measured above.' if variants else ''
        parts.append("## The blog's three arms\n\nDense, the ticket rewound to the start and the ticket rewound to epoch 1 with full rounds of five epochs, ResNet-18, all of Imagenette, 64 px, one seed, from JPEGs to three "
                     'numbers. *fastai and fasterai*: `ImageDataLoaders.from_folder` and three fits; five of the 45 epochs were timed, with its Adam, dense and without its callback, and taken nine times. *lth_nb*: '
                     f'one `Experiment` with `fused_adam`, in {ours["precision"]}, decoding included; each ran once; every ticket begins with the dense network, which is trained once, so {ours["epochs"]:g} epochs are left ({ours["epochs"]/peer["epochs"]:.2f}), '
                     f'and the machine, on which {ours["processes"]} processes train side by side, does one in {ours["seconds"]/ours["epochs"]:.1f} s instead of {peer["seconds"]/peer["epochs"]:.1f} ({ours["seconds"]/ours["epochs"]/peer["seconds"]*peer["epochs"]:.2f}).{of_bf16}\n\n'
                     '| | epochs | minutes | ratio |\n| :--- | ---: | ---: | ---: |\n' + '\n'.join(f'| {name} | {v["epochs"]:g} | {v["seconds"]/60:.1f} | {v["seconds"]/peer["seconds"]:.2f} |' for name, v in r.items()) + '\n')
    (HERE/'results.md').write_text('\n'.join(parts))


def main(names):
    benches = dict(prune=bench_prune, memory=bench_memory, hold=bench_hold, step=bench_step, epoch=bench_epoch, arms=bench_arms)
    file = HERE/'results.json'
    results = json.loads(file.read_text()) if file.exists() else dict(machines={})
    for name in names or benches:
        results[name], results['machines'][name] = benches[name](), machine()
        file.write_text(json.dumps(results, indent=1))
        write(results)


if __name__ == '__main__': main(sys.argv[1:])
