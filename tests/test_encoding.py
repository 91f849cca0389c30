"""D12: files are the same on a machine whose locale is not UTF-8."""

import ast
import base64
import json
import re
import shutil
import subprocess

import pyarrow.parquet as pq
import pytest
from bench_rows import picture
from fake_server import FakeServer
from processes import python
from test_style import MODULES

from clear_nb.core import ROOT

# ----------------------------------------------------------------- every file is opened as UTF-8

TEXT = {  # function: number of arguments before its encoding
    'open': 3,
    'fdopen': 3,
    'read_text': 0,
    'write_text': 1,
    'TemporaryFile': 3,
    'NamedTemporaryFile': 3,
}
PROCESSES = ('run', 'Popen', 'check_output', 'check_call', 'call')
# what stands before `.open` of no file of text: a handle, a picture, a judge of lessons
NO_FILE = ('os', 'Image', 'j')


def name_of(function):
    """The name of a called function, and what stands before its point."""
    if isinstance(function, ast.Attribute):
        return function.attr, ast.unparse(function.value)
    return getattr(function, 'id', ''), ''


def text_mode(call, owner):
    """Tell whether a call opens a file of text."""
    place = 0 if owner and owner not in ('io', 'os') else 1  # `path.open(mode)`, `open(path, mode)`
    modes = [k.value for k in call.keywords if k.arg == 'mode'] or call.args[place : place + 1]
    mode = modes[0] if modes else None
    return not (isinstance(mode, ast.Constant) and 'b' in str(mode.value))


def unnamed_encodings(source):
    """List the calls that read or write text with the encoding of the locale."""
    found = []
    for call in [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]:
        name, owner = name_of(call.func)
        words = {k.arg for k in call.keywords}
        if 'encoding' in words or None in words and name in PROCESSES:
            continue
        if name in PROCESSES and owner == 'subprocess':
            bad = bool({'text', 'universal_newlines'} & words)
        elif name not in TEXT or owner in NO_FILE and (owner, name) != ('os', 'fdopen'):
            continue
        elif name in ('read_text', 'write_text'):
            bad = len(call.args) <= TEXT[name]
        else:
            bad = text_mode(call, owner)
        if bad:
            found.append(f'{call.lineno}: {ast.unparse(call)}')
    return found


def lessons(path):
    """The code of a notebook as one source; lines of magic are left out."""
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return re.sub(r'^[%!].*$', '', '\n'.join(code), flags=re.M)


SCRIPTS = sorted((ROOT / 'benchmarks').glob('*.py'))


@pytest.mark.parametrize('path', [*MODULES, *SCRIPTS], ids=lambda p: p.stem)
def test_every_text_file_is_utf_8(path):
    """Each call that opens a file names its encoding, or is binary."""
    assert unnamed_encodings(path.read_text(encoding='utf-8')) == []


def test_lessons_open_text_as_utf_8():
    """The lessons do so too."""
    books = sorted((ROOT / 'nbs').rglob('*.ipynb'))
    found = {p.stem: unnamed_encodings(lessons(p)) for p in books if '.ipynb_' not in str(p)}
    assert {k: v for k, v in found.items() if v} == {}


# ----------------------------------------------------------------- the same files in every locale

MODEL = '''
"""回答 in two voices."""

def 回答(picture, prompt):
    return '我看到一只猫 🐱，所以选B。' if '猫' in prompt else '不知道 🤷'

def résumé(picture, prompt):
    return '答案是A 👍'
'''
COMMANDS = """
import sys
from clear_nb.cli import main
bench = 'bench --data files --out {} --model python:speaker:{}'
told = bench.format('one', '回答').split() + ['--judge', 'toy@' + sys.argv[1]]
assert main('corrupt --data MMStar.tsv --out files --severity low --relative'.split()) == 0
assert main(told + ['--instruction', '请用一个字母回答 ✍']) == 0
assert main(bench.format('two', 'résumé').split() + ['--instruction', '请用一个字母回答 ✍']) == 0
assert main('compare one two --out both'.split()) == 0
"""
LOCALES = {
    'plain': dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'),
    'western': dict(LC_ALL='de_DE.ISO-8859-1', PYTHONUTF8='0', PYTHONIOENCODING='latin-1'),
}


def write_table(path):
    """A benchmark in Chinese, with an accent that ISO-8859-1 knows, and a row without answer."""
    code = base64.b64encode(picture(0, 24, 24)).decode()
    rows = [['index', 'image', 'question', 'A', 'B', 'answer', 'category']]
    rows += [[str(k), code, f'这是猫还是狗？ {k}', '狗 🐕', '猫', 'B', 'café'] for k in range(3)]
    rows += [
        ['3', code, '¿qué es?', 'naïve', '其他', 'A', '颜色'],
        ['图', code, '?', 'x', 'y', '', ''],
    ]
    path.write_text('\n'.join('\t'.join(row) for row in rows) + '\n', encoding='utf-8')


def western_locale(folder):
    """Make a locale with ISO-8859-1 in a folder; {} where this machine cannot."""
    place = folder / 'de_DE.ISO-8859-1'
    make = ['localedef', '-i', 'de_DE', '-f', 'ISO-8859-1', str(place)]
    if not shutil.which('localedef') or subprocess.run(make, capture_output=True).returncode:
        return {}
    return dict(LOCPATH=str(folder))


def stable(path):
    """The content of a file without times."""
    if path.name == 'results.parquet':
        return pq.read_table(path).drop_columns('seconds').to_pylist()
    data = path.read_bytes()
    if path.suffix in ('.json', '.jsonl'):
        return re.sub(r'"(born|seconds)": [^,}\n]*', '', data.decode('utf-8'))
    return data


def files_of(folder):
    """Every file below a folder that is no lock, by its name."""
    files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
    plain = [p for p in files if p.suffix != '.pyc' and not p.name.endswith('.lock')]
    return {p.relative_to(folder).as_posix(): stable(p) for p in plain}


@pytest.fixture(scope='module')
def in_every_locale(tmp_path_factory):
    """What the commands write and print, by the name of the locale."""
    out = {}
    with FakeServer(default=lambda request: 'B' if '选' in request.text else 'Z') as server:
        for name, env in (('utf-8', dict(PYTHONUTF8='1')), *LOCALES.items()):
            folder = tmp_path_factory.mktemp(name)
            write_table(folder / 'MMStar.tsv')
            (folder / 'speaker.py').write_text(MODEL, encoding='utf-8')
            (folder / 'commands.py').write_text(COMMANDS, encoding='utf-8')
            if name == 'western':
                env = env | western_locale(tmp_path_factory.mktemp('locales'))
            paths = dict(PYTHONPATH=f'{ROOT}:{folder}', OPENAI_API_KEY='x')
            done = python('commands.py', server.url, cwd=folder, **paths, **env)
            assert done.returncode == 0, done.stderr
            out[name] = files_of(folder), done
    return out


@pytest.mark.parametrize('name', LOCALES)
def test_the_same_files_in_every_locale(in_every_locale, name):
    """Benchmark, replies, judgements and reports are the bytes that a UTF-8 locale gives."""
    files, done = in_every_locale[name]
    wanted, _ = in_every_locale['utf-8']
    assert 'speaker:\\u56de\\u7b54' in done.stdout  # what this terminal cannot show
    assert files.keys() == wanted.keys()
    assert [k for k in wanted if files[k] != wanted[k]] == []
    assert '我看到一只猫 🐱' in wanted['one/parts/replies-0-of-1.jsonl']
    assert 'speaker:回答 − speaker:résumé' in wanted['both/bench.md'].decode('utf-8')
