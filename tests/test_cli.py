"""Exit statuses of every command, as its help promises them: 0 complete, 1 rows pending or cut, 2 one
sentence for the user. Signals are in test_signals.
"""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fake_server import FakeServer, Status, hasty  # noqa: F401
from PIL import Image

from clear_nb.cli import COMMANDS, main
from clear_nb.core import PATHS, ROOT

GRPO = PATHS.checkpoints / 'tiny' / 'grpo'


SILENT = {'now'}


def picky(picture, prompt):  # is silent while SILENT holds something
    if SILENT:
        raise TimeoutError('no reply')
    return 'B'


@pytest.fixture(scope='module')
def at(tmp_path_factory):
    """A folder with a built benchmark, a file, a finished run, a picture, and damaged things."""
    top = tmp_path_factory.mktemp('cli')
    built, run = top / 'built', top / 'run'
    scenes = ['corrupt', '--scenes', 'mmstar', '--n', '3', '--severity', 'low', '--out', str(built)]
    assert main(scenes) == 0
    model = ['bench', '--model', 'python:bench_rows:silly', '--data', str(built)]
    assert main([*model, '--out', str(run)]) == 0
    photo, text, locked = top / 'photo.png', top / 'notes.txt', top / 'locked'
    Image.new('RGB', (64, 64), (200, 40, 40)).save(photo)
    text.write_text('no picture, no table', encoding='utf-8')
    (top / 'table.tsv').write_text('index\tquestion\n0\twhy\n', encoding='utf-8')
    (top / 'empty.tsv').write_text('', encoding='utf-8')
    for name, note in (
        ('damaged', '{"rows": 3'),
        ('foreign', '[1, 2]'),
        ('newer', '{"format": 9}'),
    ):
        (top / name).mkdir()
        (top / name / 'run.json').write_text(note, encoding='utf-8')
        (top / name / 'info.json').write_text(note, encoding='utf-8')
    locked.mkdir()
    return SimpleNamespace(top=top, built=built, run=run, photo=photo, text=text, grpo=GRPO)


def status_of(arguments):
    """Run a command in this process. argparse leaves by SystemExit, with the same statuses."""
    try:
        return main(arguments)
    except SystemExit as e:
        return e.code


BENCH = ['bench', '--model', 'python:bench_rows:silly', '--data', '{built}', '--out', '{out}']
COMPARE = ['compare', '{run}', '--out', '{out}']
CORRUPT = ['corrupt', '--scenes', 'mmstar', '--out', '{out}']
ANSWER = ['answer', '--image', '{photo}', '--question', 'what color', '--device', 'cpu']
BUILD = [
    'build-data',
    '--base',
    'python:bench_rows:silly',
    '--annotator',
    'm@http://localhost:9/v1',
]
BUILD += ['--out', '{out}', '--source', '{top}']
IMPORT = ['import', '--from', 'vlmevalkit', '{text}', '--data', '{built}', '--out', '{out}']
SERVE = ['serve', '--model', 'clear:{grpo}', '--port', '0']

# name of a case: the command, and a part of the sentence
REFUSALS = {
    'no command': ([], 'required'),
    'unknown command': (['benchmark'], 'invalid choice'),
    'unknown option': ([*BENCH, '--batches', '3'], 'unrecognized arguments'),
    # bench
    'bench: no model': (['bench', '--data', '{built}', '--out', '{out}'], '--model'),
    'bench: unknown kind of model': ([*BENCH, '--model', 'gpt'], "cannot read model 'gpt'"),
    'bench: no checkpoint': ([*BENCH, '--model', 'clear:{top}/no'], 'no checkpoint at'),
    'bench: a file as checkpoint': (
        [*BENCH, '--model', 'clear:{text}'],
        'is a file; pass the folder',
    ),
    'bench: no function': ([*BENCH, '--model', 'python:bench_rows:no'], 'cannot find the function'),
    'bench: no benchmark': ([*BENCH, '--data', '{top}/no'], 'no benchmark at'),
    'bench: a folder without benchmark': (
        [*BENCH, '--data', '{top}/locked'],
        'no finished benchmark',
    ),
    'bench: a file that is no table': ([*BENCH, '--data', '{text}'], 'notes.txt'),
    'bench: a table without answers': ([*BENCH, '--data', '{top}/table.tsv'], 'answer'),
    'bench: an empty table': ([*BENCH, '--data', '{top}/empty.tsv'], 'empty.tsv'),
    'bench: damaged note': ([*BENCH, '--data', '{top}/damaged'], 'info.json is damaged'),
    'bench: foreign note': ([*BENCH, '--data', '{top}/foreign'], 'info.json has another form'),
    'bench: newer note': ([*BENCH, '--data', '{top}/newer'], 'info.json'),
    'bench: severity that is none': ([*BENCH, '--severity', 'harder'], 'invalid choice'),
    'bench: severity that is not there': (
        [*BENCH, '--severity', 'hard'],
        'no row has the severity',
    ),
    'bench: batch 0': ([*BENCH, '--batch', '0'], 'batch must be at least 1'),
    'bench: batch that is no number': ([*BENCH, '--batch', 'x'], 'invalid int value'),
    'bench: limit -1': ([*BENCH, '--limit', '-1'], 'limit must be at least 1'),
    'bench: unknown setting': ([*BENCH, '--set', 'heat=1'], "'heat'"),
    'bench: setting without value': ([*BENCH, '--set', 'heat'], 'write NAME=VALUE'),
    'bench: setting twice': ([*BENCH, '--set', 'a=1', 'a=2'], 'each name once'),
    'bench: unknown protocol': ([*BENCH, '--protocol', 'best'], 'invalid choice'),
    'bench: unknown kit': ([*BENCH, '--compat', 'mykit'], 'invalid choice'),
    'bench: a file as folder': ([*BENCH, '--out', '{text}'], 'is a file; name a folder'),
    'bench: folder below a file': ([*BENCH, '--out', '{text}/run'], 'is a file; name a folder'),
    'bench: another device': ([*BENCH, '--model', 'clear:{grpo}', '--device', 'tpu9'], 'tpu9'),
    'bench: another format': ([*BENCH, '--model', 'clear:{grpo}', '--dtype', 'int3'], 'int3'),
    'bench: judge without address': ([*BENCH, '--judge', 'm@ftp://x'], 'must look like http'),
    # compare
    'compare: no run': (['compare', '--out', '{out}'], 'required'),
    'compare: a folder without run': ([*COMPARE[:1], '{top}', *COMPARE[2:]], 'holds no run'),
    'compare: the same run twice': (['compare', '{run}', '{run}', '--out', '{out}'], 'named twice'),
    'compare: into a run': (['compare', '{run}', '--out', '{run}'], 'is the folder of a run'),
    'compare: judge settings alone': ([*COMPARE, '--judge-set', 'tries=2'], 'add --judge'),
    # corrupt
    'corrupt: nothing named': (['corrupt', '--out', '{out}'], 'required'),
    'corrupt: both named': ([*CORRUPT, '--data', '{built}'], 'not allowed with'),
    'corrupt: unknown scenes': (
        ['corrupt', '--scenes', 'photos', '--out', '{out}'],
        'invalid choice',
    ),
    'corrupt: no file': (['corrupt', '--data', '{top}/no', '--out', '{out}'], 'no file or folder'),
    'corrupt: no table': (['corrupt', '--data', '{text}', '--out', '{out}'], 'notes.txt'),
    'corrupt: no question': ([*CORRUPT, '--n', '0'], 'n must be at least 1'),
    'corrupt: no worker': ([*CORRUPT, '--workers', '0'], 'workers must be at least 1'),
    'corrupt: columns without name': (
        ['corrupt', '--data', '{text}', '--out', '{out}', '--columns', 'x'],
        'FIELD=COLUMN',
    ),
    'corrupt: into a file': ([*CORRUPT[:-1], '{text}'], 'is a file; name a folder'),
    # answer
    'answer: no picture': (['answer', '--image', '{top}/no.png', '--question', 'x'], 'no.png'),
    'answer: a text as picture': (['answer', '--image', '{text}', '--question', 'x'], 'notes.txt'),
    'answer: no model': ([*ANSWER, '--model', '{top}/no'], 'no checkpoint'),
    'answer: unknown policy': ([*ANSWER, '--policy', 'maybe'], 'invalid choice'),
    'answer: out without folder': ([*ANSWER, '--out', '{top}/no/x.png'], '{top}/no'),
    # build-data
    'build: no source': ([*BUILD[:-1], '{top}/no'], 'there is no such folder'),
    'build: a folder without parquet': ([*BUILD[:-1], '{top}/locked'], 'no parquet file'),
    'build: unknown number': ([*BUILD, '--set', 'shares=1'], "did you mean 'share'"),
    'build: no example': ([*BUILD, '--n', '0'], 'n'),
    'build: no worker': ([*BUILD, '--workers', '0'], 'workers must be at least 1'),
    # import
    'import: unknown kit': (['import', '--from', 'helm', *IMPORT[3:]], 'invalid choice'),
    'import: no file': ([*IMPORT[:3], '{top}/no.xlsx', *IMPORT[4:]], 'no.xlsx'),
    'import: no benchmark': ([*IMPORT[:5], '{top}/no', *IMPORT[6:]], 'no benchmark at'),
    'import: a file of another kind': (IMPORT, 'notes.txt'),
    # serve
    'serve: another kind of model': (['serve', '--model', 'hf:x', '--port', '0'], 'clear:FOLDER'),
    'serve: no folder': (['serve', '--model', 'clear:{top}/no', '--port', '0'], 'no CLEAR model'),
    'serve: no port': ([*SERVE[:-1], '70000'], 'from 0 to 65535'),
    'serve: another device': ([*SERVE, '--device', 'tpu9'], 'tpu9'),
}


@pytest.mark.parametrize('case', REFUSALS)
def test_refusals(at, tmp_path, case, capsys):
    """Status 2, one sentence on standard error, nothing on standard output, nothing written."""
    arguments, sentence = REFUSALS[case]
    places = dict(vars(at), out=tmp_path / 'out')
    before = sorted(at.top.rglob('*'))
    assert status_of([a.format(**places) for a in arguments]) == 2
    said = capsys.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert sentence.format(**places) in said.err and said.out == ''
    assert last.startswith('clear-nb') and 'Traceback' not in said.err
    assert 'usage:' in said.err or said.err.count('\n') == 1
    assert not (tmp_path / 'out').exists() and sorted(at.top.rglob('*')) == before


# ---------------------------------------------------------------- 0 and 1


def run_of(at, out, *more, model='python:bench_rows:silly', data=None):
    command = ['bench', '--model', model, '--data', str(data or at.built), '--out', str(out)]
    return main([*command, *more])


def test_bench_complete_and_pending(at, tmp_path, monkeypatch, capsys):
    """0 when every row has a reply, 1 while one is pending, 0 after the same command again."""
    assert run_of(at, tmp_path / 'a') == 0
    assert run_of(at, tmp_path / 'b', model='python:test_cli:picky') == 1
    assert 'rows are pending; run the same command again' in capsys.readouterr().err
    compare = ['compare', str(tmp_path / 'b'), '--out', str(tmp_path / 'report')]
    assert main(compare) == 1
    assert 'compare asks nothing' in capsys.readouterr().err
    monkeypatch.setattr(sys.modules['test_cli'], 'SILENT', set())
    assert run_of(at, tmp_path / 'b', model='python:test_cli:picky') == 0
    assert main(compare) == 0


def test_bench_cut(at, tmp_path, hasty, monkeypatch, capsys):  # noqa: F811
    """1 when replies were cut at the limit of tokens."""
    monkeypatch.setenv('OPENAI_API_KEY', 'x')
    body = dict(
        choices=[dict(index=0, finish_reason='length', message=dict(role='a', content='well'))]
    )
    from fake_server import Raw

    with FakeServer(default=Raw(json.dumps(body))) as server:
        assert run_of(at, tmp_path / 'a', model=f'server:m@{server.url}') == 1
    assert 'were cut at the limit of' in capsys.readouterr().err


def test_a_server_that_is_down(at, tmp_path, hasty, monkeypatch, capsys):  # noqa: F811
    """Pending rows are 1; a refused key is 2."""
    monkeypatch.setenv('OPENAI_API_KEY', 'x')
    for failure, status in ((Status(503), 1), (Status(401), 2)):
        with FakeServer(default=failure) as server:
            model = f'server:m@{server.url}'
            assert run_of(at, tmp_path / str(status), '--set', 'tries=1', model=model) == status


def test_no_usable_row(at, tmp_path, capsys):
    """A file of which no row can be used is an error, not an empty table."""
    file = tmp_path / 'MMStar.tsv'
    file.write_text('index\timage\tquestion\tA\tB\tanswer\n0\tzzz\twhy\tx\ty\tA\n')
    assert run_of(at, tmp_path / 'a', data=file) == 2
    assert 'no row' in capsys.readouterr().err.splitlines()[-1]


def test_corrupt_and_answer(at, tmp_path, capsys):
    """0 when everything was written; the second time as well."""
    command = ['corrupt', '--scenes', 'mmvp', '--n', '2', '--severity', 'low']
    for _ in range(2):
        assert main([*command, '--out', str(tmp_path / 'c')]) == 0
    assert main([*command, '--seed', '4', '--out', str(tmp_path / 'c')]) == 2
    asked = [
        'answer',
        '--image',
        str(at.photo),
        '--question',
        'what color is it',
        '--device',
        'cpu',
    ]
    assert main(asked) == 0
    assert 'answer:' in capsys.readouterr().out


# ---------------------------------------------------------------- as processes


def process(*arguments):
    command = [sys.executable, '-m', 'clear_nb.cli', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize('command', COMMANDS)
def test_help_names_the_statuses(command):
    """The help of every command says which statuses it has."""
    done = process(command, '--help')
    promised = ' '.join(done.stdout.split())
    assert done.returncode == 0 and 'Exit status:' in promised
    wanted = {'answer': '0 2', 'serve': '2 130 143 129', 'build-data': '0 1 2 130 143 129'}
    numbers = wanted.get(command, '0 1 2 130 143 129' if command != 'corrupt' else '0 2 130')
    tail = promised.partition('Exit status:')[2]
    for number in numbers.split():
        assert re.search(rf'\b{number}\b', tail), (command, number)


def test_status_of_a_process(at, tmp_path):
    """What `main` returns is what the shell sees, and a refusal loads nothing heavy."""
    assert process('--version').returncode == 0
    done = process('bench', '--model', 'gpt', '--data', at.built, '--out', tmp_path / 'x')
    assert done.returncode == 2 and done.stderr.startswith('clear-nb: ')


HEAVY = ('torch', 'transformers', 'diffusers', 'datasets', 'pandas', 'scipy', 'pyarrow', 'openai')
LIGHT = {
    'help': ['bench', '--help'],
    'version': ['--version'],
    'no benchmark': ['bench', '--model', 'hf:x', '--data', 'no', '--out', '/nowhere/x'],
    'no picture': ['answer', '--image', 'no.png', '--question', 'x'],
    'no run': ['compare', 'no', '--out', 'x'],
    'no file': ['corrupt', '--data', 'no', '--out', 'x'],
    'no source': ['build-data', '--source', 'no', '--base', 'x', '--annotator', 'y', '--out', 'x'],
    'no model': ['serve', '--model', 'clear:no'],
}


@pytest.mark.parametrize('case', LIGHT)
def test_refusals_import_nothing_heavy(case, tmp_path):
    """Help, version and refusals come before the heavy libraries (H21)."""
    code = (
        'import sys; from clear_nb.cli import main\n'
        f'try: main({LIGHT[case]!r})\n'
        'except SystemExit: pass\n'
        f'print([m for m in {HEAVY} if m in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.stdout.splitlines()[-1] == '[]', done.stderr


def test_answer_imports_what_it_needs(at, tmp_path):
    """`answer` leaves out the libraries of tables, data sets and other models (H21)."""
    unneeded = ('diffusers', 'datasets', 'pandas', 'scipy', 'pyarrow', 'openai', 'matplotlib')
    asked = ['answer', '--image', str(at.photo), '--question', 'what color', '--device', 'cpu']
    code = (
        f'import sys; from clear_nb.cli import main; main({asked!r})\n'
        f'print([m for m in {unneeded} if m in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.splitlines()[-1] == '[]', done.stderr
