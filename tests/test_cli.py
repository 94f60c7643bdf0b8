"lth-nb: what it trains, what it answers and where, how it ends."
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from lth_nb import __version__, arms
from lth_nb.arms import Pruning
from lth_nb.fitting import set_generators
from lth_nb.cli import _file_names, app
from lth_nb.experiment import Experiment
from lth_nb.recipe import Recipe, digits_learner
from lth_nb.results import Results
from lth_nb.settings import DEFAULTS
from lth_nb.sparsifier import Sparsifier
from lth_nb.ticket import Ticket

COMMANDS = 'compare', 'status', 'report', 'inspect', 'apply'
TINY = '''
epochs = 1
lr = 2e-3
seeds = 3
schedule = "geometric"
rounds = 2
sparsity = 75
controls = "shuffled"
options = {hidden = [12]}
'''


def ask(*args):
    "Run a command in this process."
    return CliRunner().invoke(app, list(map(str, args)), catch_exceptions=False)


def answer(*args):
    "The JSON that a command answers."
    done = ask(*args, '--json')
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def shell(*args, cwd, **kwargs):
    "Run a command in a process of its own."
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONWARNINGS', 'FORCE_COLOR')}
    return subprocess.run([sys.executable, '-m', 'lth_nb.cli', *args], cwd=cwd, env=env, capture_output=True, text=True, **kwargs)


def refused(done):
    "The one line on stderr of a command that could not."
    assert (done.stdout, getattr(done, 'exit_code', getattr(done, 'returncode', None))) == ('', 2)
    assert re.fullmatch('Error: [^\n]+\n', done.stderr), done.stderr
    return done.stderr


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty current folder."
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A folder with a small comparison that is done, and what it answered."
    folder = tmp_path_factory.mktemp('finished')
    (folder/'tiny.toml').write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, answer('compare', 'tiny.toml', '--tickets')


@pytest.fixture
def run(finished, monkeypatch):
    "The run of that comparison; its folder is the current one."
    monkeypatch.chdir(finished[0])
    return Path('runs/tiny')


@pytest.fixture
def ticket(run): return run/'tickets/imp-initialisation-level2-seed0.safetensors'


# what it says of itself

def test_version_and_help():
    assert ask('--version').stdout == f'lth-nb {__version__}\n'
    assert ask().exit_code == 0 and all(c in ask().stdout for c in COMMANDS) and '130' in ask('--help').stdout


@pytest.mark.parametrize('command', COMMANDS)
def test_every_help_has_an_example(command): assert f'Example: lth-nb {command} ' in ' '.join(ask(command, '--help').stdout.split())


def test_help_does_not_wait_for_torch(tmp_path):
    code = 'import sys, lth_nb.cli; print({m for m in ("torch", "fastai", "pandas", "scipy", "matplotlib") if m in sys.modules})'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path).stdout == 'set()\n'
    done = shell('compare', '--help', cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ''


def test_the_defaults_are_the_librarys():
    theirs = {f.name: f.default for kind in (Recipe, Experiment, Pruning) for f in fields(kind)}
    for name in ('lr', 'precision', 'threads', 'sparsity', 'granularity'): assert DEFAULTS[name] == theirs[name]
    assert (DEFAULTS['seeds'], DEFAULTS['criteria'], theirs['anneal']) == (len(theirs['seeds']), theirs['criteria'].name, None)
    told = ' '.join(re.sub('[│╭╮╰╯─]', ' ', ask('compare', '--help').stdout).split())
    for name in DEFAULTS.keys() - {'rewind_epoch', 'tickets', 'margin', 'higher_is_better'}: assert f"({DEFAULTS[name]})" in told, name
    assert all(control in told for control in ('reinit', 'shuffled', 'random_mask', 'dense_long', 'supermask', 'Default: 1 point'))


# what is compared

def plan(*args):
    "The segments of the first seed that would be trained: of whom, how many epochs."
    planned = answer('compare', *args, '--plan')
    return planned, {s['used_by']: s['to_epoch'] - s['from_epoch'] for s in planned['segments'] if s['seed'] == planned['segments'][0]['seed']}


def test_options_override_the_file_and_the_file_the_defaults(here):
    (here/'r.toml').write_text('epochs = 3\nseeds = [4, 7]\ncontrols = "none"\noptions = {hidden = [12]}')
    planned, segments = plan('r.toml')
    assert {s['seed'] for s in planned['segments']} == {4, 7} and set(segments.values()) == {3} and len(segments) == 4
    planned, segments = plan('r.toml', '--epochs', 2, '--seeds', '1,5,6', '--schedule', 'one_shot', '--rewind-epoch', 0, '--rewind-epoch', 1, '--controls', 'reinit,supermask')
    assert {s['seed'] for s in planned['segments']} == {1, 5, 6} and max(segments.values()) == 2
    tickets = 'imp → initialisation', 'imp → epoch 1'
    assert {name for names in segments for name in names.split('; ')} == {'dense', *(f'{control}{t}, level 1' for t in tickets for control in ('', 'reinit of ', 'supermask of '))}
    assert not (here/'runs').exists(), 'a plan writes nothing'


def test_a_table_for_each_arm(here):
    (here/'r.toml').write_text('''epochs = 2\nschedule = "one_shot"\noptions = {hidden = [12]}
[arms.dense]\n[arms.early]\narm = "imp"\n[arms.late]\narm = "imp"\nrewind_epoch = 1\n[arms.tuned]\narm = "finetune"\nof = "late"\nepochs = 1\n[arms.shuffled]\nof = "late"''')
    assert plan('r.toml')[1] == {'dense': 2, 'early, level 1': 2, 'late, level 1': 1, 'tuned, level 1': 1, 'shuffled, level 1': 1}


def test_the_plan_for_people(here):
    done = ask('compare', '--plan')
    assert done.exit_code == 0 and done.stderr == '' and 'imp → initialisation, level 3' in done.stdout and 'epochs in all' in done.stdout


def test_every_setting_arrives(here, monkeypatch):
    seen = {}
    def look(self, path, n_jobs=1, **kwargs):
        seen.update(recipe=self.recipe, pruning=self.pruning, levels=self.grid.sparsities, path=path, n_jobs=n_jobs)
        return Results(path=path)
    monkeypatch.setattr(Experiment, 'run', look)
    (here/'r.toml').write_text('context = "local"\nignore = ["5"]\nversion = "second"\noptions = {hidden = [12, 10]}')
    ask('compare', 'r.toml', '--lr', '.01', '--anneal', 'cos', '--precision', 'bf16', '--threads', 2, '--sparsity', 60, '--rounds', 2, '--granularity', 'row', '--criteria', 'movement',
        '--n-jobs', 2, '--out', 'runs/x')
    recipe, pruning = seen['recipe'], seen['pruning']
    assert (recipe.lr, recipe.anneal, recipe.precision, recipe.threads, recipe.version) == (.01, 'cos', 'bf16', 2, 'second')
    assert (pruning.granularity, pruning.criteria.name, pruning.context, pruning.ignore) == ('row', 'movement', 'local', ['5'])
    assert (seen['levels'], seen['path'], seen['n_jobs']) == ((30, 60), Path('runs/x'), 2)


# what it answers

def test_compare_answers_with_table_and_verdicts(finished, run):
    _, said = finished
    results = Results.load(run)
    assert (said['run'], said['networks'], said['failed'], said['margin']) == (str(run), len(results.rows), [], 1)
    assert [(r['arm'], r['level'], round(r['mean'], 4)) for r in said['table']] == [(r.arm, r.level, round(r.mean, 4)) for r in results.table().itertuples()]
    assert [r['verdict'] for r in said['verdicts']] == list(results.verdict().frame.verdict)
    assert said['words'] == [f'{heading}: {text}' for heading, text in results.verdict().lines]
    assert {Path(t).name for t in said['tickets']} == {f'imp-initialisation-level2-seed{s}.safetensors' for s in range(3)}


def test_again_it_costs_nothing_and_speaks_to_people(finished, run):
    before = {f: f.stat().st_mtime_ns for f in run.glob('segments/*/*.*')}
    done = ask('compare', 'tiny.toml', '--margin', 90)
    assert done.exit_code == 0 and '0 still to train' in done.stderr
    assert re.search(r'dense +0 +0\.00 ', done.stdout) and '`imp → initialisation`, level 2, 75.00 % sparsity: winning:' in done.stdout
    assert before and before == {f: f.stat().st_mtime_ns for f in run.glob('segments/*/*.*')}


def test_names_are_shown_as_they_are(here):
    (here/'r.toml').write_text('epochs = 1\nseeds = 1\nschedule = "one_shot"\noptions = {hidden = [12]}\n[arms.dense]\n[arms."[red]:smile: x[/red]"]\narm = "imp"')
    done = ask('compare', 'r.toml')
    assert done.exit_code == 0 and done.stdout.count('[red]:smile: x[/red]') == 2


MINE = '''
import os
from lth_nb.recipe import digits_learner
print('imported')

def make_learner(last):
    print('made'); os.system('echo from the shell')
    return digits_learner(hidden=(12, last))
'''


def test_a_learner_of_ones_own_an_arm_that_fails_and_nothing_else_on_stdout(here):
    (here/'cli_mine.py').write_text(MINE)
    (here/'mine.toml').write_text('learner = "cli_mine:make_learner"\noptions = {last = 2}\nepochs = 1\nseeds = 1\nschedule = "one_shot"\nsparsity = 99')
    done = shell('compare', 'mine.toml', '--json', cwd=here)
    said = json.loads(done.stdout)
    assert done.returncode == 1 and said['networks'] == 1 and [r['arm'] for r in said['table']] == ['dense']
    assert [f['arm'] for f in said['failed']] == ['imp → initialisation', 'reinit of imp → initialisation', 'shuffled of imp → initialisation']
    assert all('to nothing' in f['reason'] for f in said['failed'])
    assert all(text in done.stderr for text in ('imported', 'made', 'from the shell', 'epochs')) and 'Warning' not in done.stderr and 'Traceback' not in done.stderr
    assert answer('compare', 'mine.toml', '--plan')['left'] == 3, 'also without a process of its own'
    told = ask('status', 'runs/mine')
    assert told.exit_code == 0 and '1 networks done, 3 left' in told.stdout and told.stdout.count('Failed: 3 networks of imp') == 1


@pytest.mark.slow
def test_a_learner_of_ones_own_in_two_processes(here):
    (here/'cli_mine.py').write_text(MINE)
    (here/'mine.toml').write_text('learner = "cli_mine:make_learner"\noptions = {last = 10}\nepochs = 1\nseeds = 2\nn_jobs = 2')
    done = shell('compare', 'mine.toml', '--json', cwd=here)
    assert done.returncode == 0 and json.loads(done.stdout)['networks'] == 12
    assert 'Warning' not in done.stderr


def test_stopped_it_says_so_and_goes_on(here):
    (here/'r.toml').write_text(TINY + 'out = "runs/r"')
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell makes what it starts in the background deaf to it
    with subprocess.Popen([sys.executable, '-m', 'lth_nb.cli', 'compare', 'r.toml', '--seeds', '60'], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard) as started:
        until = time.time() + 120
        while len(list(here.glob('runs/r/segments/*/epochs.jsonl'))) < 3 and time.time() < until: time.sleep(.05)
        going = answer('status', 'runs/r')
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
    assert (started.returncode, out) == (130, '') and 'Stopped; the same command goes on' in err and 'Traceback' not in err
    assert going['done'] >= 1 and going['left'] >= 200 and going['epochs'] >= 3 and going['seconds_ago'] < 60
    now = answer('status', 'runs/r')
    planned, _ = plan('r.toml', '--seeds', 60)
    assert planned['left'] == planned['epochs'] - now['epochs'] < planned['epochs']


# what is wrong

WRONG = {'--sparsity 101': 'sparsity=101', '--sparsity much': 'sparsity', '--epochs 2.5': 'epochs', '--epoch 3': '--epochs', '--data mnist': "data='mnist': must be one of digits, imagenette",
         '--lr 0': 'lr=0.0', '--anneal linear': "anneal='linear'", '--precision fp16': 'fp16', '--threads 0': 'threads=0', '--seeds six': "seeds='six'", '--seeds 0': "seeds='0'",
         '--seeds 1,1': 'twice', '--schedule agp': 'one_shot, iterative, geometric', '--schedule one_shot --rounds 3': 'rounds=3', '--rounds 0': 'n_steps=0', '--rewind-epoch 5': 'leaves nothing',
         '--rewind-epoch -1': 'rewind_epoch=-1', '--controls reinit,dense': "controls='dense': must be one of reinit", '--granularity stripe': 'stripe', '--criteria size': 'large_final',
         '--n-jobs 0': 'n_jobs=0', '--margin -1': 'margin=-1', '--margin nan': 'margin=nan', '--margin inf': 'margin=inf', '--metric f1': "metric='f1'", 'nowhere.toml': 'nowhere.toml: No such file',
         '--out r.toml': 'r.toml'}


@pytest.mark.parametrize('args', WRONG)
def test_wrong_options_are_one_line(here, args):
    (here/'r.toml').write_text('')
    done = ask('compare', *args.split())
    if args.startswith('--out'): assert (done.exit_code, done.stdout) == (2, '') and 'r.toml' in done.stderr.splitlines()[-1]
    else: assert WRONG[args] in refused(done)
    assert not (here/'runs').exists()


FILES = {'epochs = ': 'r.toml is not written as TOML', 'epoch = 3': "no setting 'epoch': must be one of", 'epochs = "5"': "epochs='5'", 'seeds = 2.5': 'seeds=2.5', 'seeds = [1, 2.5]': 'seeds=[1, 2.5]',
         'n_jobs = "two"': "n_jobs='two'", 'margin = "1"': "margin='1'", 'tickets = 1': 'tickets=1', 'out = 3': 'out=3', 'options = {depth = 3}': 'depth', 'rates = 3': 'rates=3',
         'learner = "cli_none:f"': "learner='cli_none:f' cannot be imported", 'learner = "mine"': 'must look like', 'learner = "cli_bad:f"': 'ZeroDivisionError',
         'learner = "cli_bad2:f"': 'RuntimeError: no data', 'learner = "cli_bad2:f"\ndata = "digits"': "data='digits' beside learner", 'arms = 3': 'arms=3', '[arms]\nimp = 3': 'arms.imp=3',
         '[arms.x]': "arms.x.arm='x': must be one of dense, imp", '[arms.imp]\nepoch = 1': "arms.imp does not fit imp: got an unexpected keyword argument 'epoch'",
         '[arms.reinit]': "missing a required argument: 'of'", '[arms.reinit]\nof = "imp"\n[arms.imp]': "arms.reinit.of='imp'", 'controls = ["reinit"]\n[arms.imp]': 'beside arms in r.toml'}


@pytest.mark.parametrize('text', FILES)
def test_wrong_files_are_one_line(here, text):
    (here/'r.toml').write_text(text)
    (here/'cli_bad.py').write_text('1/0')
    (here/'cli_bad2.py').write_text('def f(): raise RuntimeError("no\\ndata")')
    assert FILES[text] in refused(ask('compare', 'r.toml'))


def test_what_is_wrong_in_a_process_of_its_own(here):
    for args, said in ((('compare', 'nowhere.toml', '--json'), 'nowhere.toml'), (('compare', '--epochs', 'five'), '--epochs'), (('status', 'nowhere'), 'nowhere')):
        assert said in refused(shell(*args, cwd=here))


def test_a_share_for_a_percentage_is_warned_of(here):
    done = ask('compare', '--sparsity', '.5', '--plan')
    assert done.exit_code == 0 and re.match('Warning: sparsity=0.5 means 0.5 %[^\n]+\n$', done.stderr)


def test_every_arm_has_files_of_its_own():
    names = _file_names(['imp → epoch 1', 'a b', 'a-b', 'A_B', 'билет', '→'])
    assert list(names.values()) == ['imp-epoch-1', 'a-b', 'a-b-2', 'A-B-3', 'билет', 'arm']


# status, report

def test_status_counts_what_is_written_down(here):
    networks = [dict(arm='imp', level=level, seed=0, segment=f's{level}', begin=0, batch=20) for level in (1, 2, 3)]
    failed = [dict(arm='imp', level=level, seed=0, reason='OSError: disk full') for level in (1, 3)]
    (here/'x/segments/s1').mkdir(parents=True), (here/'x/segments/s2').mkdir()
    (here/'x/experiment.json').write_text(json.dumps(dict(networks=networks)))
    (here/'x/results.json').write_text(json.dumps(dict(failed=failed, info={})))
    (here/'x/segments/s1/epochs.jsonl').write_text('{"epoch": 1, "batch": 10}\n{"epoch": 2, "batch": 20}\n')
    (here/'x/segments/s2/epochs.jsonl').write_text('{"epoch": 1, "batch": 10}\n')
    said = answer('status', 'x')
    assert (said['done'], said['left'], said['epochs']) == (1, 2, 3) and said['failed'] == failed[1:], 'a failure that was mended is none'
    assert said['arms'] == [dict(arm='imp', level=level, done=int(level == 1), left=int(level != 1)) for level in (1, 2, 3)]


def test_status_of_a_finished_run(run):
    said = answer('status', run)
    assert (said['done'], said['left'], said['failed']) == (12, 0, []) and re.search(r'imp → initialisation +2 +3 +0', ask('status', run).stdout)


def test_report_says_where(run):
    assert answer('report', run)['report'] == str(run/'report.html')
    page = (run/'report.html').read_text()
    assert page.startswith('<!doctype html>') and 'shuffled of imp' in page and 'a margin of 1' in page
    ask('report', run, '--margin', 2)
    assert 'a margin of 2' in (run/'report.html').read_text()
    for way, said in (('--higher-is-better', False), ('--lower-is-better', True)):
        ask('report', run, '--metric', 'valid_loss', '--margin', 2, way)
        assert ('less is better' in (run/'report.html').read_text()) == said
    assert 'margin=-1' in refused(ask('report', run, '--margin', -1)) and "metric='f1'" in refused(ask('report', run, '--metric', 'f1'))


@pytest.mark.parametrize('command', ['status', 'report'])
def test_no_run(here, command): assert 'nowhere' in refused(ask(command, 'nowhere'))


# inspect, apply

def test_inspect_tells_what_the_ticket_says(ticket):
    said, found = answer('inspect', ticket), Ticket.load(ticket)
    assert (said['kept'], said['total'], said['weights'], said['bytes']) == (found.mask.n_kept, found.mask.n_total, 'kept', ticket.stat().st_size)
    assert said['provenance'] == found.provenance
    assert {r['weight']: r['sparsity'] for r in said['layers']} == pytest.approx(found.provenance['sparsity'])
    shown = ask('inspect', ticket).stdout
    assert all(text in shown for text in ('1.weight', '3.weight', 'in all', found.provenance['rewind_sha256'], 'hidden=[12]'))


def test_apply_writes_a_plain_state_dict(ticket, tmp_path):
    said = answer('apply', ticket, '--model', 'lth_nb.recipe:digits_learner:hidden=(12,)', '--out', tmp_path/'w.safetensors')
    model = digits_learner(hidden=(12,)).model
    model.load_state_dict(load_file(tmp_path/'w.safetensors'))
    state = Ticket.load(ticket).state.tensors
    assert said['tensors'] == len(state) and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.a, self.b = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.b.weight = self.a.weight


def make_tied(width=4): return Tied(width)
def make_nothing(): return 3


def test_apply_to_torchvision_to_tied_weights_and_from_a_seed(here, monkeypatch):
    from torchvision.models import squeezenet1_1
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name, make in (('torchvision:squeezenet1_1:num_classes=3', lambda: squeezenet1_1(num_classes=3)), ('test_cli:make_tied:width=6', lambda: make_tied(6))):
        set_generators(5, 0)
        sparsifier = Sparsifier(model := make(), context='local')
        point = sparsifier.take()
        Ticket.from_sparsifier(sparsifier.prune(60), point, seed=5).save('t.safetensors', weights='seed')
        assert answer('inspect', 't.safetensors')['weights'] == 'seed'
        answer('apply', 't.safetensors', '--model', name, '--out', 'w.safetensors')
        other = make()
        other.load_state_dict(load_file('w.safetensors'))
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize('model, said', {'torchvision:squeezenet1_1': 'the ticket of another model', 'torchvision:resnet19': 'Unknown model', 'mine': 'must look like', 'test_cli:make_nothing': 'made a int',
                                         'lth_nb.recipe:digits_learner:hidden': 'must look like', 'lth_nb.recipe:digits_learner:12': 'must look like', 'lth_nb.recipe:digits_learner:depth=2': 'depth'}.items())
def test_a_wrong_model_is_one_line_and_writes_nothing(ticket, tmp_path, model, said, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert said in refused(ask('apply', ticket, '--model', model, '--out', tmp_path/'w.safetensors'))
    assert not list(tmp_path.iterdir())


def test_a_wrong_ticket_and_a_wrong_place_are_one_line(ticket, tmp_path):
    (tmp_path/'bad').write_bytes(ticket.read_bytes()[:-1])
    tiny = '--model', 'lth_nb.recipe:digits_learner:hidden=(12,)'
    assert 'checksum' in refused(ask('inspect', tmp_path/'bad')) and 'checksum' in refused(ask('apply', tmp_path/'bad', *tiny, '--out', tmp_path/'w'))
    assert 'No such file' in refused(ask('inspect', tmp_path/'none')) and 'Is a directory' in refused(ask('inspect', tmp_path))
    assert 'there is no folder' in refused(ask('apply', ticket, *tiny, '--out', tmp_path/'no/w')) and "'--out'" in refused(ask('apply', ticket, *tiny))


def test_the_makers_of_arms_are_found():
    from lth_nb.settings import _makers
    assert {'dense', 'imp', 'one_shot_ticket', 'lr_rewind', 'finetune', 'reinit', 'shuffled', 'random_mask', 'dense_long', 'supermask', 'twin'} == set(_makers()) and hasattr(arms, 'imp')


def test_a_criterion_of_ones_own(here, monkeypatch):
    (here/'own_criterion.py').write_text('from lth_nb.criteria import criterion\n\n@criterion\ndef by_square(now): return now**2\n')
    said = answer('compare', '--criteria', 'own_criterion:by_square', '--plan', '--seeds', 1)
    assert said['networks'] > 0
    assert "criteria='own_criterion:none' cannot be imported" in refused(ask('compare', '--criteria', 'own_criterion:none', '--plan'))


def test_a_twin_is_an_arm_of_a_file_and_no_control(tmp_path):
    "A twin is there to be compared with on the line, not to be beaten."
    from lth_nb.settings import make_experiment, read_settings
    with pytest.raises(ValueError, match="controls='twin'"): make_experiment(read_settings(None, dict(controls='twin')))
    (tmp_path/'t.toml').write_text('[arms.imp]\n[arms.again]\narm = "twin"\nof = "imp"\nlevels = [0]\n')
    assert [a.kind for a in make_experiment(read_settings(tmp_path/'t.toml', {})).arms] == ['ticket', 'twin']


def test_the_file_of_the_gpu_workflow_has_the_three_arms_of_the_blog():
    from lth_nb.settings import _arms, _parts, read_settings
    settings = read_settings(Path(__file__).parents[1]/'experiments/gpu.toml', {})
    recipe, _ = _parts(settings)
    assert [(a.kind, str(a.rewind)) for a in _arms(settings['arms'])] == [('dense', 'None'), ('ticket', 'initialisation'), ('ticket', 'epoch 1')]
    assert recipe.epochs == 5 and dict(recipe.options) | dict(n_train=3200, n_valid=1000) == dict(size=128, n_train=3200, n_valid=1000, flip=True, min_scale=.35)
