"""Names that no file can hold, errors of a server, warnings and pages: foreign text stays text.

The rest of the way is in test_foreign_text.
"""

import ast
import base64
import csv
import io
import json
import re
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pandas as pd
import pytest
from bench_rows import picture
from fake_server import FakeServer, Status, hasty
from test_style import MODULES

from clear_nb.artefacts import save_table, to_latex
from clear_nb.cli import main
from clear_nb.escape import figure_text
from clear_nb.panel import mark_tags, render_page
from clear_nb.stats import Estimate
from clear_nb.watch import _PAGE

FORMULA, TAG, SIGNS, MATHS = "=cmd|' /C calc'!A0", '<script>alert(1)</script>', '_{}$&#%', '$x$'
CODES, HALF, LINES = '\x1b[2J\x1b]0;gone\x07', '\ud83d', 'one\n| two | three\r\n=4'
PIECES = [
    FORMULA,
    TAG,
    SIGNS,
    MATHS,
    r'$\frac$',
    CODES,
    HALF,
    LINES,
    '@SUM(1)',
    '\u202egnp',
    '+1+1',
]
EVERY = ' '.join(PIECES)
NAMES = [EVERY, f'_{MATHS}|{CODES}']  # of two models
# a file name with a byte of another locale
BENCHMARK = FORMULA.replace('/', '') + '<script>' + SIGNS + MATHS + '\udce9'
STORED = [p for p in PIECES if p != HALF]  # no file can hold half a character

# ----------------------------------------------------------------- what each kind of file may hold


def unseen(text, allowed='\n'):
    """The characters of a text that a terminal would obey or hide."""
    return {c for c in text if unicodedata.category(c) in ('Cc', 'Cf', 'Cs') and c not in allowed}


def check_csv(text):
    """No cell begins a formula, none holds a code."""
    for row in csv.reader(io.StringIO(text, newline='')):
        for cell in row:
            number = re.fullmatch(r'[+-]?[\d.]+(e[+-]?\d+)?', cell)
            assert number or cell.lstrip(' ')[:1] not in tuple('=+-@\t\r\n'), cell
            assert unseen(cell, '\n\t') == set(), cell


def check_markdown(text):
    """Every row of a table has the columns of its head, and no line begins an element."""
    columns = None
    for line in text.split('\n'):
        bars = len(re.findall(r'(?<!\\)(?:\\\\)*\|', line)) if line.startswith('|') else 0
        if bars and columns is not None:
            assert bars == columns, line
        columns = bars or None
        assert not re.search(r'(?<!\\)<\w', line) and not re.search(r'(?<!\\)\$', line), line
    assert unseen(text) == set()


def check_svg(text, names):
    """It is XML without scripts and names the models."""
    tags = {e.tag.rpartition('}')[2] for e in ET.fromstring(text).iter()}
    assert 'path' in tags and not tags & {'script', 'foreignObject', 'a'}
    for name in names:  # matplotlib writes what it draws as a comment
        shown = figure_text(name).replace(r'\$', '$').strip()
        assert shown[:12].replace('--', '&#45;&#45;') in text.replace('&lt;', '<')


# ----------------------------------------------------------------- one run and one comparison


def write_table(path):
    """A benchmark whose every text is hostile."""
    code = base64.b64encode(picture(0, 24, 24)).decode()
    columns = ['index', 'image', 'question', 'A', 'B', 'answer', 'category', 'l2-category', 'hint']
    with path.open('w', encoding='utf-8', newline='') as f:
        table = csv.writer(f, delimiter='\t', quoting=csv.QUOTE_ALL)
        table.writerow(columns)
        for k, piece in enumerate(STORED):
            index = f'{k}{FORMULA}{TAG}{MATHS}' if k % 2 else f'={k}'
            table.writerow([index, code, piece, piece, 'plain', 'B', piece, piece[::-1], piece])
        table.writerow([f'={TAG}', code, '?', 'x', 'y', '', piece, piece, ''])  # has no answer


@pytest.fixture(scope='module')
def reported(tmp_path_factory):
    """The folder of two runs and their comparison, and all that was printed."""
    folder, printed = tmp_path_factory.mktemp('hostile'), io.StringIO()
    data, replies = folder / f'{BENCHMARK}.tsv', iter([*PIECES, EVERY] * 9)
    write_table(data)

    def say(request):
        said = next(replies)
        return Status(400, EVERY) if said == FORMULA else said

    with pytest.MonkeyPatch.context() as patched, FakeServer(default=say) as server:
        patched.setenv('OPENAI_API_KEY', 'x')
        patched.setattr('sys.stdout', printed)
        patched.setattr('sys.stderr', printed)
        for k, name in enumerate(NAMES):
            model = f'server:{name}@{server.url}'
            run = ['--data', str(data), '--model', model, '--out', str(folder / str(k))]
            assert main(['bench', *run, '--set', 'workers=1']) == 1  # some rows are pending
        assert main(['compare', *(str(folder / k) for k in '01'), '--out', str(folder / 'both')])
    return folder, printed.getvalue()


def test_files_of_a_report(reported):
    """CSV, Markdown, JSON and the figure of both runs and of the comparison."""
    folder, _ = reported
    for place in ('0', '1', 'both'):
        names = NAMES if place == 'both' else [NAMES[int(place)]]
        files = {p.name: p for p in (folder / place).iterdir() if p.is_file()}
        tables = [n for n in files if n.endswith('.csv')]
        assert {'bench.csv', 'bench_left_out.csv', 'bench_category.csv'} <= {*tables}
        for name in tables:
            check_csv(files[name].read_text(encoding='utf-8'))
        check_markdown(files['bench.md'].read_text(encoding='utf-8'))
        check_svg(files['bench.svg'].read_text(encoding='utf-8'), names)
        assert len(json.loads(files['bench.json'].read_bytes())['models']) == len(names)


def test_nothing_is_lost(reported):
    """The texts stand in the files, each as it can be shown."""
    folder, _ = reported
    for k in '01':
        [run] = json.loads((folder / k / 'bench.json').read_bytes())['models']
        assert (run['replies'], run['pending'], len(run['rejects'])) == (len(STORED), 1, 1)
    found = pd.read_csv(folder / 'both' / 'bench_category.csv')
    assert {f"'{FORMULA}", TAG, SIGNS, MATHS} <= {*found.name}
    left = pd.read_csv(folder / '0' / 'bench_left_out.csv')
    assert {f"'={TAG}"} <= {*left['index']} and left.detail.str.contains('cmd|', regex=False).any()


def test_nothing_reaches_the_terminal(reported):
    """Neither codes nor hidden characters are printed."""
    _, printed = reported
    assert unseen(printed) == set()
    assert r'\x1b[2J' in printed and r'\u202e' in printed


def test_warnings_are_shown(capsys, monkeypatch):
    """A warning, which may quote a server, is printed without codes by every command."""
    monkeypatch.setattr(warnings, 'formatwarning', None)
    with pytest.raises(SystemExit):
        main(['--version'])
    shown = warnings.formatwarning(UserWarning(EVERY), UserWarning, 'judge.py', 1)
    assert unseen(shown) == set() and r'\x1b[2J' in shown and 'judge.py' in shown


# ----------------------------------------------------------------- tables of the study, pages


def test_tables_of_the_study(tmp_path):
    """Cells and headings of an artefact in its three forms."""
    values = [Estimate(3, 50.0, 10.0, 90.0)] * len(STORED)
    head = ' '.join(STORED)
    table = pd.DataFrame({head: STORED, f'={MATHS}': values, '@x': [None, *STORED[1:]]})
    source = dict(preset='tiny', notebook='x', variant='', seed=0, commit='0' * 40)
    files = save_table(table, 'hostile', 'A caption.', [source], tmp_path)
    check_csv(files['csv'].read_text(encoding='utf-8'))
    check_markdown(files['md'].read_text(encoding='utf-8'))
    check_latex(files['tex'].read_text(encoding='utf-8'), 3)
    check_latex(to_latex(table, EVERY, 'x'), 3)


def check_latex(text, columns):
    """Rows have their columns, braces are balanced, no command is a foreign one."""
    body = text.partition('\\midrule\n')[2].partition('\\bottomrule')[0]
    rows = [row for row in body.split('\\\\\n') if row.strip()]
    assert len(rows) == len(STORED)
    assert {len(re.findall(r'(?<!\\)&', row)) for row in rows} == {columns - 1}
    bare = re.sub(r'\\[\\{}$&#%_]', '', text)
    assert bare.count('{') == bare.count('}') and bare.count('$') % 2 == 0
    assert not re.search(r'\\(frac|input|write|x1b)\b', text) and unseen(text) == set()


PARSED = SimpleNamespace(question=EVERY, settings=EVERY, answer=EVERY, correct=False)


def test_pages():
    """What a model, a question and a picture say stays text in the pages of panel and watch."""
    rollout = SimpleNamespace(texts=PIECES)
    seen = SimpleNamespace(**vars(PARSED), right_answer=EVERY, rollout=rollout)
    row = dict(question=EVERY, picture=EVERY, right=EVERY, files={EVERY: EVERY})
    row |= dict(texts=PIECES, said=EVERY, reward=EVERY)
    pages = [
        render_page('trajectory', e=seen, pictures=[]),
        render_page('status', kind='fault', text=EVERY),
        _PAGE.render(step=EVERY, rows=[row]),
    ]
    for page in pages:
        assert '<script' not in page and '&lt;script&gt;' in page
    assert unseen(''.join(map(mark_tags, PIECES))) == set()


# ----------------------------------------------------------------- no template that escapes nothing


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_pages_are_escaped(path):
    """Templates escape what they are filled with; `escape` alone knows how HTML is escaped."""
    source = path.read_text(encoding='utf-8')
    for call in [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]:
        if getattr(call.func, 'id', '') == 'Environment':
            assert 'autoescape=True' in ast.unparse(call)
    assert {*re.findall(r'(\w+)\s*\|\s*safe\b', source)} <= {'mark_tags'}
    assert 'html.escape' not in source or path.stem == 'escape'
