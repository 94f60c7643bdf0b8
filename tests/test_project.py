"The project itself: who imports whom, what the package says of itself."
import ast
import configparser
import json
import re
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ORDER = [p.stem.split('_', 1)[1] for p in sorted((ROOT/'nbs/api').glob('[0-9]*.ipynb'))]
CORE = ['granularity', 'checks', 'schedule', 'mask', 'criteria', 'rewind', 'selection', 'sparsifier', 'files', 'ticket']


def imported(module):
    "Top-level packages and our modules that a module imports at its top."
    names = set()
    for node in ast.parse((ROOT/f'lth_nb/{module}.py').read_text()).body:
        if isinstance(node, ast.ImportFrom): names.add(('.'*node.level) + (node.module or ''))
        if isinstance(node, ast.Import): names |= {a.name for a in node.names}
    return {n.lstrip('.').removeprefix('lth_nb.') if n.startswith(('.', 'lth_nb.')) else n.split('.')[0] for n in names}


def test_every_notebook_has_its_module(): assert all((ROOT/f'lth_nb/{m}.py').exists() for m in ORDER) and len(ORDER) >= 9


def test_imports_run_downward():
    for i, module in enumerate(ORDER):
        upward = imported(module) & set(ORDER[i:])
        assert not upward, f'{module} imports {upward}, which stands below it'
    assert all(imported(m) & set(ORDER) <= {'checks'} for m in ('granularity', 'checks', 'schedule', 'mask'))


@pytest.mark.parametrize('module', CORE)
def test_the_core_needs_no_fastai(module):
    allowed = {'torch', 'numpy', 'fastcore', 'safetensors', 'lth_nb', *ORDER} | set(sys.stdlib_module_names)
    assert imported(module) <= allowed, f'{module} imports {imported(module) - allowed}'


def test_the_core_runs_without_fastai():
    code = f'''import sys
for name in ('fastai', 'fasttransform', 'matplotlib', 'scipy', 'pandas', 'sklearn', 'torchvision', 'IPython'): sys.modules[name] = None
import {', '.join('lth_nb.' + m for m in CORE)}
from torch import nn
print(lth_nb.sparsifier.Sparsifier(nn.Linear(10, 10)).prune(37).mask.n_kept)'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == '63', done.stderr


def test_the_wheel_says_what_settings_say(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, ROOT], check=True, capture_output=True)
    parser = configparser.ConfigParser(delimiters="=")
    parser.read(ROOT/'settings.ini')
    settings = parser['DEFAULT']
    wheel = ZipFile(next(tmp_path.glob('*.whl')))
    read = lambda end: wheel.read(next(n for n in wheel.namelist() if n.endswith(end))).decode()
    metadata = Parser().parsestr(read('METADATA'))
    needs = metadata.get_all('Requires-Dist')
    parsed = lambda texts: {(r.name.replace('-', '_'), str(r.specifier)) for r in map(Requirement, texts)}
    assert parsed(n for n in needs if 'extra' not in n) == parsed(settings['requirements'].split())
    for extra in ('dev', 'bench'):
        assert parsed(n for n in needs if f'"{extra}"' in n) == parsed(settings[f'{extra}_requirements'].split())
    assert (metadata['Version'], metadata['Summary'], metadata['Name']) == (settings['version'], settings['description'], settings['lib_name'])
    assert metadata['Requires-Python'] == f">={settings['min_python']}" and all(e in read('entry_points.txt') for e in ('lth_nb._modidx:d', 'lth-nb = lth_nb.cli:app'))
    assert {f'lth_nb/{m}.py' for m in ORDER} <= set(wheel.namelist()) and 'Description-Content-Type: text/markdown' in read('METADATA')


def test_the_version_stands_in_both_places():
    import lth_nb
    assert f'version = {lth_nb.__version__}\n' in (ROOT/'settings.ini').read_text()


def test_a_seed_of_which_an_arm_is_missing_is_still_to_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'experiments'))
    import imagenette
    from lth_nb.results import Results
    whole = Results.load(imagenette.HERE/'blog').only(seeds=[0, 1])
    names = [a.name for a in imagenette.PARTS['blog'].arms]
    monkeypatch.setattr(imagenette, 'done', lambda part: whole.only(names[:-1], seeds=1) + whole.only(seeds=0))
    assert imagenette.seeds_left('blog') == [1, 2, 3, 4]
    found = {tuple(seeds): [a.name for a in arms] for arms, seeds in imagenette.groups('blog', range(5))}
    assert found == {(1,): names[-1:], (2, 3, 4): names} # each seed trains what it lacks, and no more
    monkeypatch.setattr(imagenette, 'done', lambda part: None)
    assert imagenette.seeds_left('blog') == [0, 1, 2, 3, 4]
    assert imagenette.asked('bf16') == ('bf16', [[0], [1], [2]]) and imagenette.asked('bf16:2,0') == ('bf16', [[2, 0]])
    for slip, said in (('bf61', "no part 'bf61'"), ('bf16:3', 'no seed 3'), ('bf16:0;1', 'no seed 0;1')):
        with pytest.raises(SystemExit, match=said): imagenette.asked(slip)


def test_the_benchmark_page_says_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT/'benchmarks'))
    import run
    results = json.loads((run.HERE/'results.json').read_text())
    stored = (run.HERE/'results.md').read_text()
    monkeypatch.setattr(run, 'HERE', tmp_path)
    run.write(results)
    assert (tmp_path/'results.md').read_text() == stored and results['machines'].keys() == results.keys() - {'machines'}


@pytest.mark.parametrize('file', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda f: f.stem)
def test_no_output_shows_where_it_was_made(file):
    outputs = [o for c in json.loads(file.read_text())['cells'] for o in c.get('outputs', [])]
    assert not re.search('site-packages|ipykernel_', json.dumps(outputs))
