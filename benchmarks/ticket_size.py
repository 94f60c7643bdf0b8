"""Sizes and times of ticket files of a ResNet-18 with ten classes, as a table in Markdown.

    .venv/bin/python benchmarks/ticket_size.py      # some seconds
"""
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torchvision.models import resnet18

from lth_nb.rewind import ModelState
from lth_nb.sparsifier import Sparsifier
from lth_nb.ticket import Ticket, state_hash

LIMITS = {('kept', 50): .56, ('kept', 95): .09, ('seed', 50): .035, ('seed', 95): .035}  # shares of the dense file


def build():
    "The network, from its seed."
    torch.manual_seed(0)
    return resnet18(num_classes=10)


def seconds(run, repeats=3):
    "The shortest wall time of some calls."
    def once():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    return min(once() for _ in range(repeats))


def saved_size(state, file):
    "What `torch.save` needs."
    torch.save(state, file)
    return file.stat().st_size


def rows(folder):
    "Of each sparsity and kind of ticket: sizes, and seconds to save, load and apply."
    file, model = folder/'file', build()
    dense = saved_size(model.state_dict(), file)
    sparsifier = Sparsifier(model, context='local')
    point = sparsifier.take()
    for sparsity in (0, 50, 80, 90, 95, 99):
        ticket = Ticket.from_sparsifier(sparsifier.prune(sparsity), point, seed=0)
        pruned = saved_size(model.state_dict(), file)
        for weights in ('kept', 'seed'):
            save = seconds(lambda: ticket.save(file, weights))
            size, load = file.stat().st_size, seconds(lambda: Ticket.load(file))
            loaded, other = Ticket.load(file), build()
            apply = seconds(lambda: loaded.apply(other), repeats=1)
            assert state_hash(ModelState.take(other)) == state_hash(ticket.state)
            assert size <= LIMITS.get((weights, sparsity), 1.1)*dense, (weights, sparsity, size/dense)
            yield [f'{sparsity}', weights, f'{dense:,}', f'{pruned:,}', f'{size:,}', f'{size/dense:.4f}', f'{save:.2f}', f'{load:.2f}', f'{apply:.2f}']


if __name__ == '__main__':
    torch.set_num_threads(1)
    print('| sparsity (%) | weights | dense, torch.save | pruned, torch.save | ticket | share of dense | save (s) | load (s) | apply (s) |')
    print('| ---: | :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |')
    with TemporaryDirectory() as folder:
        for row in rows(Path(folder)): print(f'| {" | ".join(row)} |', flush=True)
