"Names are the same in every process and follow every change that counts; recipes refuse what cannot be."
import enum
import functools
import importlib
import itertools
import json
import operator
import os
import pickle
import random
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.learner import Learner
from fastai.vision.augment import aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageDataLoaders
from fasttransform import Transform
from helpers_fastai import small_dls
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lth_nb.fitting import Seeded
from lth_nb.cpu import FastCPU
from lth_nb.data import digits_dls
from lth_nb.naming import _hash, _library_name, digest, fingerprint, versions
from lth_nb.recipe import Recipe, digits_learner, imagenette_learner

TESTS = Path(__file__).parent

# ------------------------------------------------------------------ a project of the user's

PROJECT = {
'project.py': '''
import contextlib
import functools
from dataclasses import dataclass, field
from enum import Enum
import torch
import helpers
import helpers as h
from helpers import scale, Base

WIDTH = 4
NAMES = {'relu', 'gelu'}

class Color(Enum):
    red = 1
    def hot(self): return self is Color.red

@dataclass(frozen=True)
class Settings:
    depth: int = 1
    sizes: list = field(default_factory=lambda: [1, 2])
    def area(self): return self.depth*WIDTH

class Net(Base):
    "A network."
    rate = 3
    def __init__(self): self.other = Net
    @property
    def wide(self): return WIDTH + 1
    @functools.cached_property
    def deep(self): return 5
    @classmethod
    def made(cls): return cls.rate + 6
    @staticmethod
    def plain(x=7): return lambda y: x + y + 8

def scaled(k):
    def decorate(f):
        @functools.wraps(f)
        def inner(*args): return f(*args)*k
        return inner
    return decorate

@scaled(9)
def decorated(n): return even(n)
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)

@functools.lru_cache(maxsize=WIDTH)
def cached(x): return x + 10

@contextlib.contextmanager
def managed(): yield 11

@torch.no_grad()
def without_gradient(): return 12

lambdas = [lambda x: x + 13, lambda x: x + 14]

def closing(k, unused=15):
    return lambda: k
kept, empty = closing(16), None

def make(a=17, *, b=18):
    "Make it."
    import helpers.late
    from helpers.named import chosen
    class Local:
        z = 19
        def f(self): return [scale(i) for i in range(20)]
    def inner(x=21): return Local, lambdas, cached, managed, without_gradient, decorated, kept
    # a comment
    return inner, Color, Settings(22), Net, NAMES, h.deep.CONSTANT, helpers.late.late(), chosen
make.mark = 23
def dotted(): return h.scale(helpers.deep.CONSTANT)
''',
'helpers/__init__.py': '''
from . import also, deep
def scale(x): return x*deep.CONSTANT
def unused(x): return x
class Base:
    def hello(self): return scale(self)
''',
'helpers/deep.py': 'CONSTANT = 7\ndef unused(): return 3\n',
'helpers/also.py': 'VALUE = 3\n',
'helpers/late.py': 'def late(): return 9\n',
'helpers/named.py': 'def chosen(): return 1\ndef not_chosen(): return 1\n',
}


def written(folder, *changes):
    "Write the project with some texts replaced, (file, old, new)."
    texts = dict(PROJECT)
    for file, old, new in changes:
        assert texts[file].count(old) == 1, f'{old!r} stands {texts[file].count(old)} times in {file}'
        texts[file] = texts[file].replace(old, new)
    for name, text in texts.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text(text)
    return folder


class imported:
    "The project imported anew, and forgotten again."
    def __init__(self, folder): self.folder = str(folder)
    def forget(self):
        for name in [n for n in sys.modules if n.partition('.')[0] in ('project', 'helpers')]: del sys.modules[name]
    def __enter__(self):
        self.forget()
        sys.path.insert(0, self.folder)
        importlib.invalidate_caches()
        return importlib.import_module('project')
    def __exit__(self, *_):
        sys.path.remove(self.folder)
        self.forget()


def name_of_project(folder, *changes, what='make'):
    with imported(written(folder, *changes)) as project: return digest(getattr(project, what))


NUMBERS = [('project.py', f'{before}{n}{after}', f'{before}{n + 100}{after}') for before, n, after in [
    ('WIDTH = ', 4, ''), ('red = ', 1, ''), ('depth: int = ', 1, ''), ('[', 1, ', 2])'), ('rate = ', 3, ''), ('WIDTH + ', 1, ''), ('return ', 5, ''), ('rate + ', 6, ''),
    ('x=', 7, ''), ('x + y + ', 8, ''), ('scaled(', 9, ')'), ('x + ', 10, ''), ('yield ', 11, ''), ('return ', 12, ''), ('x + ', 13, ''), ('x + ', 14, ''), ('closing(', 16, ')'),
    ('a=', 17, ''), ('b=', 18, ''), ('z = ', 19, ''), ('range(', 20, ')'), ('x=', 21, ''), ('Settings(', 22, ')'), ('make.mark = ', 23, '')]]
CHANGES = [*NUMBERS,
    ('project.py', "'gelu'}", "'gelu', 'silu'}"), ('project.py', 'self is Color.red', 'self is not Color.red'), ('project.py', 'self.depth*WIDTH', 'self.depth + WIDTH'),
    ('project.py', 'n != 0 and', 'n > 0 and'), ('project.py', 'f(*args)*k', 'f(*args) + k'), ('project.py', 'frozen=True', 'frozen=True, order=True'),
    ('project.py', '@torch.no_grad()', '@torch.enable_grad()'), ('project.py', '    @property\n    def wide', '    def wide'), ('project.py', 'class Net(Base)', 'class Net'),
    ('project.py', 'lambda x: x + 13, lambda x: x + 14', 'lambda x: x + 14, lambda x: x + 13'), ('project.py', 'maxsize=WIDTH', 'maxsize=WIDTH + 1'),
    ('helpers/__init__.py', 'x*deep.CONSTANT', 'x - deep.CONSTANT'), ('helpers/__init__.py', 'scale(self)', '-scale(self)'), ('helpers/deep.py', 'CONSTANT = 7', 'CONSTANT = 7.'),
    ('helpers/also.py', 'VALUE = 3', 'VALUE = 4'), ('helpers/late.py', 'return 9', 'return 8'), ('helpers/named.py', 'def chosen(): return 1', 'def chosen(): return 2')]
NEUTRAL = [('project.py', '    # a comment\n', ''), ('project.py', '"Make it."', '"Make it well."'), ('project.py', '"A network."\n', '\n'), ('project.py', 'import helpers\n', '\n\nimport helpers\n'),
    ('project.py', 'return inner, Color, Settings(22), Net,', 'return inner, \\\n        Color, Settings( 22, # two\n        ), Net,'),
    ('project.py', 'def inner(x=21): return Local', 'def inner(x=21):\n        # anew\n        return Local'), ('project.py', "{'relu', 'gelu'}", "{'gelu', 'relu'}"),
    ('project.py', 'lambda x: x + 13, lambda', 'lambda x: (x +\n    13), # first\n    lambda'),
    ('project.py', 'class Local:\n', 'class Local:\n        "Of this function"\n'), ('helpers/named.py', 'def not_chosen(): return 1', 'x = 3')]


@pytest.fixture(scope='module')
def original(tmp_path_factory): return name_of_project(tmp_path_factory.mktemp('original'))


@pytest.mark.parametrize('change', CHANGES, ids=lambda c: f'{c[1]} -> {c[2]}')
def test_a_change_that_counts_changes_the_name(tmp_path, original, change): assert name_of_project(tmp_path, change) != original


@pytest.mark.parametrize('change', NEUTRAL, ids=lambda c: f'{c[1]} -> {c[2]}')
def test_a_change_that_does_not_count_leaves_the_name(tmp_path, original, change): assert name_of_project(tmp_path, change) == original


def test_of_a_module_only_what_is_named_counts(tmp_path):
    first = name_of_project(tmp_path/'0', what='dotted')
    assert name_of_project(tmp_path/'1', ('helpers/__init__.py', 'return x\n', 'return -x\n'), ('helpers/deep.py', 'return 3', 'return 4'), what='dotted') == first
    assert name_of_project(tmp_path/'2', ('helpers/deep.py', 'CONSTANT = 7', 'CONSTANT = 8'), what='dotted') != first


def test_the_name_of_a_module_does_not_depend_on_who_imported_its_parts(tmp_path):
    with imported(written(tmp_path)) as project:
        first = digest(project.helpers)
        importlib.import_module('helpers.named')
        assert digest(project.helpers) == first
        project.helpers.deep.CONSTANT = 8
        assert digest(project.helpers) != first


def test_all_changes_have_different_names(tmp_path):
    names = [name_of_project(tmp_path/str(i), change) for i, change in enumerate(CHANGES)]
    assert len(set(names)) == len(names)


IN_A_PROCESS = '''
import json, sys
from fractions import Fraction
from pathlib import Path
import numpy as np, torch
from lth_nb.naming import _hash, _library_name, digest, fingerprint, versions
from lth_nb.data import digits_dls
from lth_nb.recipe import Recipe, digits_learner
sys.path.insert(0, sys.argv[1])
import project
values = [{'b': 1, 'a': {3, 'x', (1, 2), None}}, frozenset('hello world'), Path('a/b'), np.arange(6).reshape(2, 3).T, torch.arange(4.), Fraction(1, 3), torch.float16, print, project.Color.red,
          project.Settings(3), project.Net, project, {project.make, project.even}, project.Settings(2).area, versions(), project.scaled(3), project.lambdas]
recipe = Recipe(digits_learner, 3, options=dict(hidden=(20,)))
def local(x): return project.make(x)
print(json.dumps([*map(digest, values), digest(local), digest(project.make), fingerprint(digits_dls()), recipe.name]))
'''


def in_a_process(folder, seed, where):
    env = {**os.environ, 'PYTHONHASHSEED': str(seed), 'PYTHONPATH': f'{TESTS.parent}', 'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONWARNINGS': 'ignore'}
    script = where/f'script{seed}.py'
    script.write_text(IN_A_PROCESS)
    return subprocess.Popen([sys.executable, script, folder], cwd=where, env=env, stdout=subprocess.PIPE, text=True)


def test_every_process_gives_the_same_names_until_a_helper_is_edited(tmp_path, original):
    folder = written(tmp_path/'project')
    (elsewhere := tmp_path/'elsewhere').mkdir()
    first, second = (json.loads(process.communicate()[0]) for process in [
        in_a_process(folder, 1, tmp_path), in_a_process(written(elsewhere/'project', *NEUTRAL[:2]), 2, elsewhere)])
    assert first == second and first[-3] == original
    written(folder, ('helpers/deep.py', 'CONSTANT = 7', 'CONSTANT = 8'))
    third = json.loads(in_a_process(folder, 3, tmp_path).communicate()[0])
    changed = [a != b for a, b in zip(first, third)]
    assert changed == [False]*10 + [True, True, True, False, False, False, False, True, True, False, False]


def test_a_file_edited_after_it_was_imported_is_noticed(tmp_path, original):
    with imported(written(tmp_path)) as project:
        written(tmp_path, NEUTRAL[0])
        assert digest(project.make) == original # lines have moved, and that is all
        written(tmp_path, ('project.py', 'self.depth*WIDTH', 'self.depth + WIDTH'))
        with pytest.raises(ValueError, match='what runs is not what .*project.py says now'): digest(project.make)
        written(tmp_path)
        assert digest(project.make) == original


def test_values_that_change_in_a_running_process_change_the_name(tmp_path, original):
    with imported(written(tmp_path)) as project:
        project.helpers.deep.CONSTANT = 8
        assert digest(project.make) != original
        project.helpers.deep.CONSTANT = 7
        project.Net.extra = 1
        assert digest(project.make) != original
        del project.Net.extra
        assert digest(project.make) == original
        project.NAMES.add('silu')
        assert digest(project.make) != original


def defined(tmp_path, text, name='f'):
    "Something defined in a file of its own."
    file = tmp_path/f'file{len(list(tmp_path.iterdir()))}.py'
    file.write_text(text)
    found = {'__name__': file.stem}
    exec(compile(text, str(file), 'exec'), found)
    return found[name]


@pytest.mark.parametrize('text, change', [
    ('K = 1\nclass A:\n    def g(self): return K\ndef f(): return A().g()', ('K = 1', 'K = 2')),
    ('K = [1]\nD = {}\ndef f(): return D\nD[f] = f\nD["k"] = K', ('[1]', '[2]')),
    ('S = set()\ndef g(): return 1\ndef f(): return S\nS.add(f); S.add(g)', ('return 1', 'return 2')),
    ('K = 1\ndef f(x=K): return x', ('K = 1', 'K = 2')),
    ('K = 1\ndef f(*, x=K): return x', ('K = 1', 'K = 2')),
    ('K = 1\nasync def f():\n    return [x async for x in g()]\nasync def g(): yield K', ('K = 1', 'K = 2')),
    ('K = 1\nf = (lambda: (lambda: (lambda: K)))', ('K = 1', 'K = 2')),
    ('def f(x, *, y: "int" = 1): return x', ('x, *, y', 'x, y')),
    ('def f(x): return [i for i in range(3) if (lambda: i)()]', ('i)()', 'x)()')),
    ('import torch\nD = torch.float16\n@torch.autocast("cpu", dtype=D)\ndef f(): return 1', ('float16', 'bfloat16')),
    ('from collections import namedtuple\nP = namedtuple("P", "a b", defaults=[1])\ndef f(): return P(1)', ('[1]', '[2]')),
    ('from typing import NamedTuple\nclass P(NamedTuple):\n    a: int = 1\n    def g(self): return 1\ndef f(): return P', ('return 1', 'return 2')),
    ('from dataclasses import dataclass\n@dataclass(slots=True, kw_only=True)\nclass P:\n    a: int = 1\n    b: int = 1\ndef f(): return P', ('b: int = 1', 'b: int = 2')),
    ('from dataclasses import dataclass\n@dataclass\nclass P:\n    a: int = 1\n    b: int = 1\ndef f(): return P', ('    a: int = 1\n    b: int = 1', '    b: int = 1\n    a: int = 1')),
    ('from abc import ABC, abstractmethod\nclass A(ABC):\n    @abstractmethod\n    def g(self): return 1\ndef f(): return A', ('return 1', 'return 2')),
    ('class M(type):\n    def __call__(cls): return 1\nclass A(metaclass=M): pass\ndef f(): return A', ('return 1', 'return 2')),
    ('from functools import partial\ndef g(x, k): return x*k\nf = partial(g, k=1)', ('k=1', 'k=2')),
    ('from functools import partialmethod\nclass A:\n    def g(self, k): return k\n    h = partialmethod(g, 1)\ndef f(): return A', ('(g, 1)', '(g, 2)')),
    ('class A:\n    def __init__(self, k): self.k = k\n    @classmethod\n    def g(cls): return 1\nf = A.g', ('return 1', 'return 2')),
    ('class D(dict):\n    def __missing__(self, k): return 1\nf = D(a=1)', ('return 1', 'return 2')),
    ('def f():\n    class A:\n        def g(self): return h()\n    return A\ndef h(): return 1', ('return 1', 'return 2')),
    ('def f():\n    "text"\n    return 1', ('return 1', '"text"')),
], ids=itertools.count())
def test_more_kinds_of_definitions(tmp_path, text, change):
    assert digest(defined(tmp_path, text)) == digest(defined(tmp_path, text)) == digest(defined(tmp_path, '# moved\n\n' + text))
    assert digest(defined(tmp_path, text.replace(*change))) != digest(defined(tmp_path, text))


class Shift(Transform):
    order = 3
    def encodes(self, x:int): return x + 1
    def encodes(self, x:str): return x + 'a'


class Note(Callback):
    order = 3
    def before_fit(self): self.notes = []


class Net(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(2, 2)
    def forward(self, x): return self.fc(x)


def test_classes_of_libraries_can_be_built_upon():
    assert len({digest(o) for o in (Shift, Note, Net, [Shift], Transform, Callback)}) == 6


@pytest.mark.parametrize('value, said', [
    (eval('lambda x: x'), "<lambda>.* its source cannot be read"), (eval(compile('lambda: 1', '<stdin>', 'eval')), 'eval and exec keep none'), ([1, {'a': (i for i in 'ab')}], r"value\[1\]\['a'\], a generator"), (random.Random(1), 'a random generator of its own'),
    (object(), 'a object'), (nn.Linear(2, 2), 'a Linear'), (torch.zeros(2).to_sparse(), 'sparse'), (SimpleNamespace(x=itertools.count()), r"value\['x'\], a count"),
    (functools.partial(digest, what=iter([])), r"value.keywords\['what'\]"), (np.array([object()]), 'a object'), ({object(): 1}, 'has the key <object'), ([iter(())].__iter__(), 'a list_iterator')])
def test_what_has_no_name_is_refused_where_it_is(value, said):
    with pytest.raises(ValueError, match=said): digest(value)


@pytest.mark.parametrize('text, said', [
    ('K = iter([])\ndef f(): return K', 'f uses the global `K`, a list_iterator'), ('def f(x=iter([])): pass', 'f uses the default `x`, a'),
    ('def g(k): return lambda: k\nf = g(iter([]))', 'uses the closure variable `k`, a'), ('def f(): pass\nf.k = iter([])', 'f uses the attribute `k`, a'),
    ('class A:\n    k = iter([])\ndef f(): return A', 'f → A uses the attribute `k`, a'), ('K = iter([])\ndef g(): return K\ndef f(): return g()', 'f → g uses the global `K`, a'),
    ('K = {"a": [iter([])]}\ndef f(): return K', r"f uses the global `K`\['a'\]\[0\], a"), ('g = eval("lambda: 1")\ndef f(): return g()', 'f → <lambda>.* its source cannot be read'),
    ('from functools import singledispatch\n@singledispatch\ndef f(x): return 1\n@f.register\ndef g(x: int): return 2', 'f uses the attribute `_clear_cache`.*WeakKeyDictionary')])
def test_the_error_names_who_uses_it(tmp_path, text, said):
    with pytest.raises(ValueError, match=said): digest(defined(tmp_path, text))


def test_objects_that_a_library_keeps_have_its_name():
    from fastai.vision.all import BBoxBlock, OpenMask, PointBlock, exp_rmspe, rmse
    assert len(set(map(digest, [BBoxBlock, PointBlock, OpenMask, exp_rmspe, rmse]))) == 5
    with pytest.raises(ValueError, match='a AccumMetric'): digest(type(rmse)(len))


def test_this_package_counts_as_a_library():
    def outside(): return digits_learner()
    assert [_library_name(o) for o in (digits_learner, Recipe, digest, outside, Net)] == ['lth_nb.recipe.digits_learner', 'lth_nb.recipe.Recipe', 'lth_nb.naming.digest', None, None]


def test_which_function_stands_where_counts(tmp_path):
    f, g = (defined(tmp_path, f'def f(): return {i}') for i in range(2))
    assert len({digest(o) for o in ((f, g), (g, f), (f, g, f), (f, g, g), {'a': f, 'b': g}, {'a': g, 'b': f})}) == 6


def test_what_contains_itself_is_refused():
    circle = [1]
    circle.append(circle)
    with pytest.raises(ValueError, match='contains itself'): digest(circle)


def test_a_cell_of_a_notebook_has_a_source():
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell()
    cell = lambda text: shell.run_cell(text).raise_error()
    cell('K = 1\nclass A:\n    "a class"\n    def g(self): return K')
    cell('import asyncio\ndef f(): return A().g()')
    first = digest(shell.user_ns['f'])
    cell('# once more\ndef f():\n    return A().g()')
    assert digest(shell.user_ns['f']) == first
    cell('K = 2')
    assert digest(shell.user_ns['f']) != first
    cell('K = 1\nclass A:\n    def g(self): return -K')
    assert digest(shell.user_ns['f']) != first
    cell('from __future__ import annotations')
    cell('def f():\n    def g(x: int): return x\n    return g')
    assert digest(shell.user_ns['f'])


# ------------------------------------------------------------------ values

class Kind(enum.Enum): one, two = 1, 2
class Level(enum.IntEnum): one, two = 1, 2
Point = namedtuple('Point', 'x y')
@dataclass
class Pair:
    a: object
    b: object = 0
    def total(self): return self.a + self.b


DIFFERENT = [None, True, 1, 1., 1j, '1', b'1', Fraction(1), (1,), [1], {1}, frozenset([1]), {1: 1}, deque([1]), OrderedDict({1: 1}), Counter([1]), defaultdict(int, {1: 1}), defaultdict(list, {1: 1}),
    range(1), slice(1), slice(1, None), Kind.one, Kind.two, Level.one, Path('1'), Point(1, 1), Pair(1, 1), Pair(1), Pair(1, 1.), Pair(1, 1).total, Pair(2, 1).total, Pair.total, Pair, Point, Kind, np.int64(1), np.float32(1),
    np.array(1), np.array([1]), np.array([1], 'f4'), np.array([1], '>f4'), np.array([[1]]), np.array(['1']), np.array([1], object), np.zeros(0), np.zeros((0, 1)), torch.tensor(1), torch.tensor([1]), torch.tensor([1.]),
    torch.tensor([1.], requires_grad=True), torch.tensor([1], dtype=torch.bfloat16), torch.zeros(0), torch.zeros(0, 1), nn.Parameter(torch.tensor([1.])), torch.tensor([1j]), torch.float32, torch.float16,
    torch.device('cpu'), torch.device('cuda:0'), np.dtype('f4'), np.dtype('>f4'), len, print, dict, 'a'.join, 'b'.join, operator.add, nn.Linear, nn.functional.relu, torch.relu, torch, np, np.add, functools.partial(int, 1),
    functools.partial(int, base=1), functools.partial(int), random.randint, random.random, np.random.normal, 0., -0., float('nan'), float('inf'), '', b'', (), [], {}, set(), ((),), ([],), (1, 2), ('ab', 'c'), ('a', 'bc'),
    {'a': 1, 'b': 2}, {'a': 2, 'b': 1}, {'ab': 12}, SimpleNamespace(a=1), list[int], list[str], int | None, ..., '\ud800', 10**5, digits_learner, imagenette_learner, digest]


def test_different_values_have_different_names():
    names = Counter(map(digest, DIFFERENT))
    assert [v for v in DIFFERENT if names[digest(v)] > 1] == []
    assert all(len(n) == 32 and int(n, 16) >= 0 for n in names)


def test_equal_values_have_one_name():
    base = np.arange(24.).reshape(4, 6)
    assert digest(base[:, ::2]) == digest(base[:, ::2].copy()) == digest(np.asfortranarray(base[:, ::2]))
    tensor = torch.arange(24.).reshape(4, 6)
    assert digest(tensor.T) == digest(tensor.T.contiguous()) and digest(torch.tensor([1j]).conj()) == digest(torch.tensor([1j]).conj().resolve_conj())
    assert digest({'a': 1, 'b': 2, 3: 4}) == digest({3: 4, 'b': 2, 'a': 1}) and digest(set('abcdefgh')) == digest(set('hgfedcba'))
    assert digest(OrderedDict(a=1, b=2)) != digest(OrderedDict(b=2, a=1)) and _hash('ab', 'c') != _hash('a', 'bc')
    assert digest(Pair([1], {2})) == digest(Pair([1], {2})) and digest(functools.partial(int, base=2)) == digest(functools.partial(int, base=2))
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert digest(picture) == digest(picture.copy()) != digest(picture.convert('L'))


keys = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(), st.fractions())
values = st.recursive(keys, lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(keys, inner, max_size=3), st.frozensets(keys, max_size=3)), max_leaves=8)


def told_apart(value):
    "A text that is another one for every other value, with types and without order where there is none."
    if isinstance(value, dict): return 'd' + repr(sorted((told_apart(k), told_apart(v)) for k, v in value.items()))
    if isinstance(value, frozenset): return 's' + repr(sorted(map(told_apart, value)))
    if isinstance(value, (list, tuple)): return type(value).__name__ + repr(list(map(told_apart, value)))
    return repr(value)


@settings(max_examples=150, deadline=None)
@given(values, values)
def test_names_are_equal_where_values_are(a, b):
    assert (digest(a) == digest(b)) == (told_apart(a) == told_apart(b))
    assert digest(pickle.loads(pickle.dumps(a))) == digest(a)


# ------------------------------------------------------------------ data

def served(dataset, valid=None): return DataLoaders(DataLoader(dataset, batch_size=2, shuffle=True), DataLoader(valid or dataset, batch_size=2))


def pictures(folder, **kwargs):
    for i in range(8):
        file = folder/('train', 'valid')[i//4]/('dark', 'light')[i % 2]/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists(): Image.fromarray(np.full((16, 16, 3), 20*i, np.uint8)).save(file)
    return ImageDataLoaders.from_folder(folder, bs=4, num_workers=0, **kwargs)


def test_augmentation_is_not_in_the_fingerprint(tmp_path):
    plain, augmented = pictures(tmp_path), pictures(tmp_path, batch_tfms=aug_transforms())
    found = fingerprint(augmented)
    assert not torch.equal(augmented.one_batch()[0], augmented.one_batch()[0])
    assert fingerprint(augmented) == found == fingerprint(plain)


@pytest.mark.parametrize('change', ['content', 'name', 'class', 'new', 'none'])
def test_every_file_counts(tmp_path, change):
    found = fingerprint(pictures(tmp_path/'a'))
    pictures(tmp_path/'b')
    file = tmp_path/'b/valid/light/7.png'
    if change == 'content': Image.fromarray(np.full((16, 16, 3), 141, np.uint8)).save(file)
    if change == 'name': file.rename(file.with_name('9.png'))
    if change == 'class': file.rename(tmp_path/'b/valid/dark/7.png')
    if change == 'new': (file.with_name('9.png')).write_bytes(file.read_bytes())
    assert (fingerprint(ImageDataLoaders.from_folder(tmp_path/'b', bs=4, num_workers=0)) == found) == (change == 'none')


def test_targets_made_from_names_count(tmp_path):
    pictures(tmp_path)
    files = sorted(tmp_path.rglob('*.png'))
    made = [fingerprint(DataLoaders.from_dsets(*(Datasets([f], [[PILImage.create], [label]]) for f in files[:2]), dl_type=TfmdDL)) for label in (lambda f: 1, lambda f: 2, lambda f: 1)]
    assert made[0] == made[2] != made[1]


def test_files_in_a_table_count_by_their_pictures(tmp_path):
    pd = pytest.importorskip('pandas')
    pictures(tmp_path)
    table = pd.DataFrame(dict(name=[str(o.relative_to(tmp_path)) for o in sorted(tmp_path.rglob('*.png'))], label=list('aabb')*2))
    def made(): return fingerprint(ImageDataLoaders.from_df(table, tmp_path, valid_pct=.5, seed=1, bs=2, num_workers=0, batch_tfms=aug_transforms()))
    found = made()
    assert made() == found
    table.loc[3, 'label'] = 'a'
    assert made() != found
    table.loc[3, 'label'] = 'b'
    Image.fromarray(np.full((16, 16, 3), 1, np.uint8)).save(tmp_path/'valid/light/7.png')
    assert made() != found


def test_names_count_below_the_common_folder(tmp_path):
    def made(*names):
        for name in names:
            (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path/name)
        return fingerprint(DataLoaders.from_dsets(*[Datasets([tmp_path/name for name in names], [[PILImage.create], [lambda f: 1]])]*2, dl_type=TfmdDL))
    assert made('a/1.png', 'b/2.png') == made('moved/a/1.png', 'moved/b/2.png') != made('a/1.png', 'c/2.png')


class Drawn(Dataset):
    "Points with noise from all generators, and perhaps from one of its own."
    def __init__(self, own=None): self.x, self.own = torch.arange(6.), own
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i] + torch.rand(1) + np.random.rand() + random.random() + (self.own.random() if self.own else 0), i % 2


def stand(own=None): return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate(), own and repr(own.bit_generator.state)


def test_random_items_do_not_make_it_differ_and_no_generator_moves():
    before = stand()
    torch.manual_seed(3)
    found = fingerprint(served(Drawn()))
    torch.manual_seed(4)
    np.random.rand(); random.random()
    moved = stand()
    assert fingerprint(served(Drawn())) == found and stand() == moved != before


def test_a_dataset_that_draws_from_its_own_generator_is_refused_and_left_as_it_was():
    own = np.random.default_rng(1)
    before = stand(own)
    with pytest.raises(ValueError, match=r'dls\[0\].dataset\[0\] is another one each time'): fingerprint(served(Drawn(own)))
    assert stand(own) == before


def test_fingerprints_leave_the_loaders_generators_alone():
    dls = digits_dls()
    before = dls.train.rng.getstate()
    fingerprint(dls)
    assert dls.train.rng.getstate() == before
    dls = small_dls(kind='torch with a generator')
    before = dls.train.generator.get_state()
    fingerprint(dls)
    assert torch.equal(dls.train.generator.get_state(), before)


def points(n=6): return TensorDataset(torch.arange(3.*n).reshape(n, 3), torch.arange(n) % 2)


DATA = [lambda: served(points()), lambda: served(points(), points(4)), lambda: served(points(4), points()), lambda: served(Subset(points(), [1, 2])), lambda: served(Subset(points(), [2, 1])),
        lambda: served(ConcatDataset([points(), points(4)])), lambda: served([(1, 2), (3, 4)]), lambda: served([(1, 2), (3, 5)]), lambda: served([{'x': torch.ones(2), 'y': 'a'}]),
        lambda: served(torch.arange(4.)), lambda: served(np.arange(4.)), lambda: small_dls(), lambda: digits_dls(), lambda: digits_dls(seed=3)]


def test_each_data_set_has_its_own_fingerprint():
    names = [fingerprint(d()) for d in DATA]
    assert len(set(names)) == len(DATA) and names == [fingerprint(d()) for d in DATA]


@pytest.mark.parametrize('i', [0, 5])
def test_one_number_changes_the_fingerprint(i):
    other = DATA[i]()
    tensors = (other.train.dataset if i == 0 else other.train.dataset.datasets[1]).tensors
    tensors[1][3] += 1
    assert fingerprint(other) != fingerprint(DATA[i]())


def test_a_table_of_fastai():
    pd = pytest.importorskip('pandas')
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders
    table = pd.DataFrame(dict(a=[1., 2., 3., 4.]*4, b=list('xyxy')*4, y=[0, 1, 0, 1]*4))
    def made(t): return TabularDataLoaders.from_df(t, procs=[Categorify, FillMissing, Normalize], cat_names=['b'], cont_names=['a'], y_names='y', valid_idx=[0, 1, 2], bs=4)
    assert fingerprint(made(table)) == fingerprint(made(table.copy()))
    table.loc[9, 'a'] = 7.
    assert fingerprint(made(table)) != fingerprint(made(pd.DataFrame(dict(a=[1., 2., 3., 4.]*4, b=list('xyxy')*4, y=[0, 1, 0, 1]*4))))


class Stream(IterableDataset):
    def __iter__(self): return iter(range(4))


class Named(Stream):
    def fingerprint(self): return 'my data, third edition'


def test_what_cannot_be_read_item_by_item_needs_a_name():
    with pytest.raises(ValueError, match=r'dls\[0\].dataset, a Stream, cannot be read item by item .*method fingerprint'): fingerprint(served_stream(Stream()))
    assert fingerprint(served_stream(Named())) == fingerprint(served_stream(Named()))
    with pytest.raises(ValueError, match=r'dls\[0\].dataset\[1\]\[0\], a generator'): fingerprint(served([(1,), ((i for i in ()),)]))
    with pytest.raises(ValueError, match='dls is a Learner'): fingerprint(Learner(digits_dls(), nn.Linear(1, 1)))


def served_stream(data): return DataLoaders(DataLoader(data), DataLoader(data))


# ------------------------------------------------------------------ recipes

def make_learner(width=4, bs=64, opt='adam'): return digits_learner((width,), bs, opt)


@pytest.mark.parametrize('wrong, said', [
    (dict(epochs=2.5), 'epochs=2.5: must be a whole number'), (dict(epochs=0), 'epochs=0'), (dict(epochs=True), 'epochs=True'), (dict(epochs='3'), "epochs='3'"), (dict(lr=float('nan')), 'lr=nan'),
    (dict(lr=0), 'lr=0'), (dict(lr=-1), 'lr=-1'), (dict(lr=float('inf')), 'lr=inf'), (dict(lr='1e-3'), "lr='1e-3'"), (dict(lr=None), 'lr=None'), (dict(lr=np.complex64(1)), 'lr='), (dict(lr=slice(1)), 'lr=slice'), (dict(anneal='step'), "anneal='step': must be one of .None, 'one_cycle', 'cos'"),
    (dict(anneal=['cos']), 'anneal='), (dict(precision='fp16'), "precision='fp16': must be one of"), (dict(precision=None), 'precision=None'), (dict(threads=0), 'threads=0'), (dict(threads=1.), 'threads=1.0'),
    (dict(options=[1]), r'options=\[1\]: must be a dictionary'), (dict(options=dict(depth=3)), "do not fit make_learner: got an unexpected keyword argument 'depth'"), (dict(options={1: 2}), 'options='),
    (dict(options=dict(width=iter([]))), r"options\['width'\], a list_iterator"), (dict(version=3), 'version=3: must be a text'), (dict(learner=3), 'learner is a int'), (dict(learner=nn.Linear(1, 1)), 'learner is a Linear'),
    (dict(learner=eval('lambda: 1')), 'its source cannot be read'), (dict(learner=lambda dls: 1), "missing a required argument: 'dls'")])
def test_wrong_arguments_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said): Recipe(**{'learner': make_learner, 'epochs': 2, **wrong})


def test_a_learner_in_the_place_of_its_function_is_refused():
    with pytest.raises(ValueError, match='learner is a Learner: must be a function'): Recipe(digits_learner(), 2)


CHANGED = [dict(lr=2e-3), dict(anneal='cos'), dict(anneal='one_cycle'), dict(precision='bf16'), dict(threads=2), dict(options=dict(width=5)), dict(version='2'), dict(learner=digits_learner)]


def test_all_but_the_length_is_in_the_name():
    recipe = Recipe(make_learner, 2)
    assert len({recipe.name, *(replace(recipe, **c).name for c in CHANGED)}) == len(CHANGED) + 1
    assert replace(recipe, epochs=7).name == recipe.name == Recipe(make_learner, np.int64(2), lr=np.float64(1e-3)).name
    assert Recipe(make_learner, 2, lr=1).name == Recipe(make_learner, 2, lr=1.).name


def test_versions_and_device_are_in_the_name(monkeypatch):
    recipe = Recipe(make_learner, 2)
    first = recipe.name
    monkeypatch.setattr(torch, '__version__', '9.9')
    assert versions()['torch'] == '9.9' and recipe.name != first
    monkeypatch.undo()
    monkeypatch.setattr('lth_nb.recipe.default_device', lambda: torch.device('cuda'))
    assert recipe.name != first
    monkeypatch.undo()
    monkeypatch.setattr('lth_nb.naming.FORMAT', 99)
    assert recipe.name != first
    monkeypatch.undo()
    assert recipe.name == first


def test_the_name_follows_a_helper_that_is_changed_later(tmp_path):
    with imported(written(tmp_path)) as project:
        recipe = Recipe(project.make, 2)
        first = recipe.name
        project.helpers.deep.CONSTANT = 8
        assert recipe.name != first


def test_a_recipe_is_frozen_to_the_inside():
    options = dict(width=3)
    recipe = Recipe(make_learner, 2, options=options)
    name = recipe.name
    options['width'] = 5
    with pytest.raises(TypeError): recipe.options['width'] = 5
    with pytest.raises(AttributeError): recipe.epochs = 3
    assert recipe.name == name and recipe.with_options(width=5).options == {'width': 5} and recipe.options == {'width': 3}

    def greedy(sizes): sizes.pop(); return digits_learner(sizes)
    recipe = Recipe(greedy, 2, options=dict(sizes=[5, 4]))
    name = recipe.name
    recipe.make(0)
    assert recipe.options == {'sizes': [5, 4]} and recipe.name == name


def test_recipes_pickle_compare_and_hash():
    recipe = Recipe(make_learner, 2, options=dict(width=3))
    other = pickle.loads(pickle.dumps(recipe))
    assert other == recipe and hash(other) == hash(recipe) and other.name == recipe.name and other != recipe.with_options(width=4)
    with pytest.raises(TypeError): other.options['width'] = 5


def test_the_seed_decides_initialisation_and_order():
    recipe = Recipe(make_learner, 1)
    def trained(seed, noise):
        torch.manual_seed(noise); np.random.seed(noise); random.seed(noise)
        learn = recipe.make(seed)
        before = [p.detach().clone() for p in learn.model.parameters()]
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Seeded(seed))
        return before, list(learn.model.parameters())
    (a, a_end), (b, b_end), (c, _) = trained(0, 1), trained(0, 2), trained(1, 1)
    assert all(map(torch.equal, a + a_end, b + b_end)) and not torch.equal(a[0], c[0])


def test_precision_is_turned_on():
    assert not any(isinstance(cb, FastCPU) for cb in Recipe(make_learner, 1).make(0).cbs)
    learn = Recipe(make_learner, 1, precision='bf16').make(0)
    found = []
    learn.model.register_forward_hook(lambda module, x, y: found.append(y.dtype))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert set(found) == {torch.bfloat16} and learn.fast_cpu.bf16


@pytest.mark.parametrize('seed', [-1, 1.5, True, None, 'a'])
def test_a_wrong_seed_is_refused(seed):
    with pytest.raises(ValueError, match='seed='): Recipe(make_learner, 1).make(seed)


def test_a_function_that_makes_something_else_is_refused():
    with pytest.raises(ValueError, match='learner=make_model made a Linear: must make a fastai Learner'): Recipe(make_model, 1).make(0)


def make_model(): return nn.Linear(1, 1)


def test_the_digits_learner():
    learn = digits_learner(hidden=(30, 20), bs=32, opt='sgd', wd=.1)
    assert [m.out_features for m in learn.model if isinstance(m, nn.Linear)] == [30, 20, 10] and learn.dls.bs == 32
    learn.create_opt()
    assert learn.opt.hypers[0]['mom'] == .9 and learn.wd == .1
    with pytest.raises(ValueError, match="opt='adamw': must be one of"): digits_learner(opt='adamw')
    assert [p.numel() for p in digits_learner().model.parameters()] == [19200, 300, 30000, 100, 1000, 10]


def imagenette(folder):
    from lth_nb.data import IMAGENETTE
    for i, name in enumerate(IMAGENETTE):
        for split, n in (('train', 2), ('val', 1)):
            (folder/split/name).mkdir(parents=True)
            for j in range(n): Image.fromarray(np.full((40, 48, 3), 10*i + j, np.uint8)).save(folder/split/name/f'{name}_{j}.JPEG')
    return folder


def test_the_imagenette_learner(tmp_path, monkeypatch):
    monkeypatch.setenv('LTH_NB_IMAGENETTE', str(imagenette(tmp_path/'images')))
    monkeypatch.setenv('LTH_NB_CACHE', str(tmp_path/'cache'))
    learn = imagenette_learner(size=32, bs=4, n_train=10, arch='squeezenet1_1')
    assert len(learn.dls.train_ds) == 10 and len(learn.dls.valid_ds) == 10 and learn.wd is None and [m.name for m in learn.metrics] == ['accuracy']
    assert learn.model(learn.dls.one_batch()[0]).shape == (4, 10)
    with pytest.raises(ValueError, match="arch='resnet19': must be one of"): imagenette_learner(arch='resnet19')


@pytest.mark.parametrize('hidden', [300, (300, 0), (3., 4), 'ab'])
def test_wrong_layers_are_refused(hidden):
    with pytest.raises(ValueError, match='hidden='): digits_learner(hidden)


def learner_on(device):
    learn = digits_learner((4,))
    learn.dls._device = torch.device(device)
    return learn


def test_each_device_has_its_own_bfloat16():
    made = Recipe(learner_on, 1, precision='bf16', options=dict(device='cuda')).make(0)
    assert made.mixed_precision.amp_mode.value == 'bf16' and not hasattr(made, 'fast_cpu')
    with pytest.raises(ValueError, match="the data goes to mps: use 'float32'"): Recipe(learner_on, 1, precision='bf16', options=dict(device='mps')).make(0)


def test_how_a_recipe_looks():
    recipe = Recipe(functools.partial(make_learner, bs=32), 3, anneal='cos', options=dict(width=3))
    assert repr(recipe) == "Recipe(make_learner, 3 epochs, anneal='cos', width=3)"
    assert repr(recipe.with_options(width=np.ones(3), opt=print)) == "Recipe(make_learner, 3 epochs, anneal='cos', width=array([1., 1., 1.]), opt=print)"
    assert '| lr | 0.001 |' in recipe._repr_markdown_() and recipe.name in recipe._repr_markdown_()


class Copied:
    "Copying or pickling an instance leaves `__slotnames__` on its class."
    def __init__(self): self.n = 1


def test_a_class_keeps_its_name_after_an_instance_was_copied():
    from copy import deepcopy
    before = digest(Copied)
    deepcopy(Copied())
    assert '__slotnames__' in vars(Copied) and digest(Copied) == before
