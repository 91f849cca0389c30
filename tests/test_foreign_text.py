"""Text of other people on its whole way: files of a benchmark, names of models and replies go
through `bench` and `compare` into CSV, Markdown, JSON, figures, LaTeX, HTML and the terminal.
"""

import ast
import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import bench_rows
import pandas as pd
import pytest
from test_escape import check_csv, check_markdown, unseen
from test_rows_hard import CASES

from clear_nb import escape
from clear_nb.adapters import CallableAdapter
from clear_nb.artefacts import to_latex, to_markdown
from clear_nb.cli import main
from clear_nb.core import PATHS
from clear_nb.evaluate import run_rows
from clear_nb.grammar import storable

FAULTS = CASES / 'faults'
FORMULA = re.compile(r'\s*[=+@\-\t\r]')

# name of a kind: a text that harms somewhere
NASTY = {
    'formula': "=cmd|' /C calc'!A0",
    'plus': '+1+cmd',
    'minus': '-2+3',
    'at': '@SUM(1)',
    'wide formula': '＝1+1',
    'tab and formula': '\t=1+1',
    'pipe': 'a|b|c',
    'new line': 'a\nb | c',
    'carriage return': 'a\rb',
    'script': '<script>alert(1)</script>',
    'picture': '<img src=x onerror=alert(1)>',
    'link': '[here](http://evil/x) ![x](http://evil/y.png)',
    'latex': r'\input{/etc/passwd} 100% & #1 _x_ {y} ~ ^',
    'maths': '$x^2$ $\\frac{1}{0}$',
    'one dollar': 'costs $5',
    'leading underscore': '_hidden',
    'escape codes': '\x1b[31mred\x1b[0m \x1b]0;title\x07',
    'backspaces': 'safe\x08\x08\x08\x08evil',
    'right to left': 'abc\u202edcba',
    'half a character': 'a\ud83d b',
    'null': 'a\0b',
    'line separator': 'a\u2028b',
    'emoji and Chinese': '🙂 好的',
}


def no_controls(text):
    assert unseen(text) == set(), ascii(text)


def check_cells(folder):
    """No cell of the CSV files of a report begins a formula."""
    for path in folder.glob('*.csv'):
        check_csv(path.read_text(encoding='utf-8'))


# ---------------------------------------------------------------- files of the review (D9)


@pytest.mark.parametrize('name', ['formula_cat', 'inject_cat', 'inject_index'])
def test_files_of_the_review(name, tmp_path, capsys):
    """The report of such a file holds no formula, no broken table, no code for the terminal."""
    file, out = FAULTS / f'{name}.tsv', tmp_path / 'r'
    model = 'python:bench_rows:silly'
    assert main(['bench', '--model', model, '--data', str(file), '--out', str(out)]) in (0, 1)
    said = capsys.readouterr()
    no_controls(said.out + said.err)
    page = (out / 'bench.md').read_text(encoding='utf-8')
    assert '<script>' not in page.replace('\\<', '') and '<img' not in page.replace('\\<', '')
    check_markdown(page)
    check_markdown(said.out)
    check_cells(out)
    assert json.loads((out / 'bench.json').read_text(encoding='utf-8'))['models']


# ---------------------------------------------------------------- every field, every kind


@pytest.fixture(scope='module')
def harmed(tmp_path_factory):
    """Two runs whose model, benchmark, category, question, options and replies are nasty."""
    place, texts = tmp_path_factory.mktemp('harm'), list(NASTY.values())
    rows = []
    for k, text in enumerate(texts):
        row = bench_rows.rows(1, severities=('clean',))[0]
        storable = text.encode('utf-8', 'replace').decode()
        new = dict(index=str(k), group='', category=storable, question=storable, answer='B')
        rows.append(replace(row, benchmark='MMStar', options=dict(A='x', B=storable), **new))
    for n, name in enumerate((texts[0], texts[13])):
        said = iter(texts[n:] + texts)

        def answers(picture, prompt):
            return next(said)

        run_rows(CallableAdapter(answers, name), rows, place / f'r{n}', progress=False)
    return place


def test_report_of_nasty_texts(harmed, capsys):
    """`compare` writes all its files; none of them harms its reader."""
    out = harmed / 'report'
    assert main(['compare', str(harmed / 'r0'), str(harmed / 'r1'), '--out', str(out)]) == 0
    said = capsys.readouterr()
    no_controls(said.out + said.err)
    check_markdown(said.out)
    page = (out / 'bench.md').read_text(encoding='utf-8')
    check_markdown(page)
    no_controls(page)
    check_cells(out)
    drawn = (out / 'bench.svg').read_text(encoding='utf-8')
    assert '<script>' not in drawn and (out / 'bench.png').stat().st_size > 1000
    frame = pd.read_parquet(harmed / 'r0' / 'results.parquet')
    assert len(frame) == len(NASTY)


@pytest.mark.parametrize('kind', NASTY)
def test_every_format(kind):
    """One text in every format: it stays on its line, in its cell, and means nothing else."""
    text = NASTY[kind]
    no_controls(escape.terminal_line(text))
    assert '\n' not in escape.terminal_line(text)
    no_controls(re.sub(r'[\n\t]', '', escape.terminal_text(text)))
    cell = escape.csv_cell(text)
    assert not FORMULA.match(cell) and not cell.startswith('＝')
    stored = storable(text)  # a table of pandas holds no half character
    table = to_markdown(pd.DataFrame([[stored, 1]], columns=[stored, 'n'], dtype=object))
    assert len(table.splitlines()) == 3
    check_markdown(table)
    shown = []
    reader = HTMLParser(convert_charrefs=True)
    reader.handle_data = shown.append
    reader.handle_starttag = pytest.fail
    reader.feed(escape.html_text(text))
    reader.close()
    assert ''.join(shown) == escape.visible(text, lines=True)
    label = escape.figure_text(text)
    assert not label.startswith('_') and '\n' not in label and len(label) <= 61
    assert label.replace(r'\$', '').count('$') == 0


@pytest.mark.parametrize('kind', NASTY)
def test_latex_runs_nothing(kind):
    """No command of the text is left: a backslash is followed by one of our own commands."""
    table = pd.DataFrame([[storable(NASTY[kind]), 1]], columns=['name', 'n'], dtype=object)
    page = to_latex(table, 'a caption', 'x')
    assert r'\input' not in page
    line = next(l for l in page.splitlines() if l.rstrip().endswith(r'& 1 \\'))
    bare = re.sub(r'\\textbackslash\{\}|\\[&%$#_{}]|\$[^$]*\$|\\text\w+\{\}|\\\\$', '', line)
    assert not re.search(r'\\[a-zA-Z]', bare) and bare.count('&') == 1, line


# ---------------------------------------------------------------- siblings, found in the code

SHOWN_BY = {'to_csv': 'csv_table', 'to_latex': 'latex_text', 'to_html': 'html_text'}


def calls(path):
    """List the method calls of a module: name, line, and the text of the whole expression."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node)


@pytest.mark.parametrize('path', sorted(PATHS.package.glob('*.py')), ids=lambda p: p.stem)
def test_tables_are_written_by_one_way(path):
    """Whatever writes a table of a format names the function that makes its texts safe."""
    source = path.read_text(encoding='utf-8')
    for node, text in calls(path):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ''
        if name in SHOWN_BY:
            assert SHOWN_BY[name] in source, f'{path.name}:{node.lineno} {text[:80]}'


COMMANDS = ('cli', 'answer', 'builder', 'serve', 'corrupting', 'exchange')


@pytest.mark.parametrize('name', COMMANDS)
def test_what_commands_print_is_escaped(name):
    """Every `print` of a command shows its text through `escape`, or a table through Markdown."""
    safe = ('terminal_line', 'terminal_text', 'to_markdown', '_build_table', 'build_table')
    for node, text in calls(PATHS.package / f'{name}.py'):
        if isinstance(node.func, ast.Name) and node.func.id == 'print' and node.args:
            plain = isinstance(node.args[0], ast.Constant)
            assert plain or any(s in text for s in safe), f'{name}:{node.lineno} {text}'
