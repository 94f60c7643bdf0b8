"""Feed damaged tickets to `Ticket.load` and `Ticket.apply`: anything but a ticket or a `ValueError` is a bug.

    .venv/bin/pip install atheris
    .venv/bin/python tests/fuzz_ticket.py -max_total_time=60

An input's first byte says what it is. 0: a file as it is. 1: the three parts of a file, which is put together with a fitting length and checksum, so
that what lies behind them is reached too. 2: a seed, from which some fields of a good file's header are changed. `test_ticket.py` runs the same without
atheris.
"""
import hashlib
import json
import random
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import nn

if __name__ == '__main__':
    import atheris
    with atheris.instrument_imports(include=['lth_nb.ticket']): import lth_nb.ticket  # noqa: F401

from lth_nb.rewind import ModelState
from lth_nb.sparsifier import Sparsifier
from lth_nb.ticket import Ticket, state_hash

BEGIN = '{"format":1,"sha256":"' + '0'*64 + '"'


class Counter(nn.Module):
    "A module with an extra state: JSON and a tensor."
    def __init__(self):
        super().__init__()
        self.seen, self.mean = 3, torch.ones(2)
    def get_extra_state(self): return {'seen': self.seen, 'by': [None, True, 'a', .5], 'mean': self.mean}
    def set_extra_state(self, state): self.seen, self.mean = int(state['seen']), torch.as_tensor(state['mean'])
    def forward(self, x): return x


class Net(nn.Module):
    "A small network with one of everything: filters with followers, a tied weight, a buffer that `state_dict()` leaves out, an extra state."
    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv, self.norm = nn.Embedding(6, width), nn.Conv1d(width, 6, 3), nn.BatchNorm1d(6)
        self.fc, self.head, self.counter = nn.Linear(6, width), nn.Linear(width, 6, bias=False), Counter()
        self.head.weight = self.embed.weight
        self.register_buffer('scale', torch.full((3,), 2.), persistent=False)
    def forward(self, x): return self.counter(self.head(self.fc(self.norm(self.conv(self.embed(x).transpose(1, 2))).mean(2))))*self.scale.sum()


BATCH = torch.arange(12).reshape(2, 6) % 6


def seal(meta, table, data):
    "Put a file together: the header's text after its beginning, the rest of the header, the numbers."
    header = f'{{"__metadata__":{{"lth_nb":{json.dumps(BEGIN + meta)}}}{table}'.encode('utf-8', 'replace')
    whole = len(header).to_bytes(8, 'little') + header + data
    return whole.replace(b'0'*64, hashlib.sha256(whole).hexdigest().encode(), 1)


def unseal(whole):
    "Take a file apart: the header's fields after its beginning, the table of tensors, the numbers."
    n = int.from_bytes(whole[:8], 'little')
    table = json.loads(whole[8:8 + n])
    meta = json.loads(table.pop('__metadata__')['lth_nb'])
    del meta['format'], meta['sha256']
    return meta, table, whole[8 + n:]


def text(fields): return ',' + json.dumps(fields, separators=(',', ':'))[1:]


@cache
def samples():
    "Files of whole tickets: of weights, of filters, and without weights."
    files = []
    for granularity, context, weights in (('weight', 'global', 'kept'), ('filter', 'local', 'kept'), ('weight', 'local', 'seed')):
        sparsifier = Sparsifier(Net(), granularity, context, ignore='fc', batch=BATCH)
        point = sparsifier.take()
        ticket = Ticket.from_sparsifier(sparsifier.prune(50), point, recipe={'steps': 3}, seed=0)
        with tempfile.TemporaryDirectory() as folder: files.append(ticket.save(Path(folder)/'sample', weights).read_bytes())
    return files


ODD = [None, True, -1, 0, 1, 3, 2**40, 2**70, .5, float('nan'), '', 'conv.weight', 'head.weight', 'norm.bias', 'filter', 'row', 'local', 'movement', 'seed', 'kept',
       'U8', 'BF16', 'F4', [], [2**60]*3, [-1, -8], [0, 0], {}, {'tensor': 0}, {'tensor': 9}, {'dict': None}, [[]]*70]

def damaged(value, r):
    "The JSON value with one thing in it changed: a value, a name, or something left out."
    if not isinstance(value, (dict, list)) or not value or r.random() < .1: return r.choice(ODD + [[value], value + 1 if isinstance(value, int) else value])
    key = r.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = r.random()
    if isinstance(value, list): return value[:key] + ([] if how < .2 else [damaged(value[key], r)]) + value[key + 1:]
    name = r.choice(['', 'fc.weight', 'mask/fc.weight', 'kept/embed.weight', 'rest/embed.weight', 'extra/1', key + 'x']) if how < .1 else key
    rest = {k: v for k, v in value.items() if k != key}
    return rest if how > .9 else {**rest, name: value[key] if name != key else damaged(value[key], r)}


def file_of(data):
    "The file that an input means."
    kind, data = data[0] % 3 if data else 0, data[1:]
    if kind == 0: return data
    if kind == 1:
        meta, table, numbers = (data.split(b'\0', 2) + [b'', b''])[:3]
        return seal(meta.decode('utf-8', 'replace'), table.decode('utf-8', 'replace'), numbers)
    r = random.Random(data)
    meta, table, numbers = unseal(r.choice(samples()))
    for _ in range(r.randint(0, 3)): meta, table = (damaged(meta, r), table) if r.random() < .8 else (meta, damaged(table, r))
    return seal(text(meta), text(table), numbers)


def try_input(data, path):
    "Load and apply; what became of it. Raises for what is neither a ticket nor a `ValueError`."
    path.write_bytes(file_of(data))
    try: ticket = Ticket.load(path)
    except ValueError: return 'refused'
    repr(ticket), repr(ticket.report())
    model = Net()
    before = state_hash(ModelState.take(model))
    try: sparsifier = ticket.apply(model)
    except ValueError:
        assert state_hash(ModelState.take(model)) == before, 'the model was changed'
        return 'not applied'
    repr(sparsifier.report())
    return 'applied'


def main():
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as folder:
        corpus, path = Path(folder)/'corpus', Path(folder)/'input.safetensors'
        corpus.mkdir()
        for i, whole in enumerate(samples()):
            meta, table, numbers = unseal(whole)
            for kind, data in enumerate([whole, b'\0'.join([text(meta).encode(), text(table).encode(), numbers]), bytes([i])]):
                (corpus/f'{i}-{kind}').write_bytes(bytes([kind]) + data)
        atheris.Setup([*sys.argv, '-timeout=5', '-rss_limit_mb=4000', '-max_len=16384', str(corpus)], lambda data: try_input(data, path))
        atheris.Fuzz()


if __name__ == '__main__': main()
