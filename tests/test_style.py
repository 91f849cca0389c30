"""The house style, measured: short cells, short functions, a lesson after each export, imports
that go one way.
"""

import ast
import re

import nbformat
import numpy as np
import pytest
import style

from clear_nb.core import ROOT
from clear_nb.pipeline import library_notebooks

LIBRARY = library_notebooks()
MODULES = [p for p in sorted((ROOT / 'clear_nb').glob('*.py')) if not p.name.startswith('_')]

# What each module may import directly; what those may import is allowed as well.
MAY_IMPORT = {
    # what everything stands on
    'core': [],
    'identity': ['core'],
    'folders': ['identity'],
    'signals': [],
    'presets': ['core'],
    'records': ['core', 'presets'],
    'paper': ['core'],
    'stats': ['core'],
    # the world
    'degrade': ['core'],
    'scenes': ['core'],
    # the method
    'images': ['core'],
    'flow': ['core'],
    'vae': ['core', 'presets'],
    'vit': ['core', 'presets'],
    'mot': ['core', 'vit'],
    'grammar': [],
    'trajectory': ['core', 'grammar', 'vae', 'vit', 'mot'],
    'model': ['mot', 'vit', 'vae', 'flow', 'trajectory', 'images', 'records', 'folders'],
    'decode': ['model'],
    'restore': ['images', 'decode'],
    'generate': ['restore', 'presets'],
    'reward': ['grammar', 'trajectory', 'presets'],
    # the stages
    'server': ['core', 'grammar'],
    'judge': ['reward', 'server'],
    'ask': ['generate'],
    'traces': ['scenes', 'model'],
    'data': ['degrade', 'ask', 'traces'],
    'stored': ['data'],
    'ranks': ['model'],
    'train': ['ask', 'ranks', 'identity', 'folders'],
    'base': ['train', 'data', 'reward'],
    'sft': ['base', 'stored'],
    'bridge': ['sft'],
    'grpo': ['base', 'judge', 'stored'],
    'watch': ['stats', 'train', 'data', 'reward'],
    # the benchmark
    'escape': [],
    'cells': ['images'],
    'rows': ['cells', 'degrade', 'grammar', 'scenes'],
    'variants': ['rows', 'signals'],
    'bench_files': ['variants', 'folders'],
    'scoring': ['degrade', 'judge', 'reward', 'stats'],
    'wording': [],
    'evaluate': ['rows', 'wording', 'folders', 'escape'],
    'answer': ['generate', 'records', 'escape'],
    'adapters': ['ask', 'answer', 'data', 'rows', 'server', 'wording'],
    'tables': ['paper', 'stats'],
    'claims': ['tables'],
    'figures': ['tables'],
    'artefacts': ['stats', 'escape'],
    'bench': ['evaluate', 'scoring', 'artefacts', 'records', 'escape'],
    'exchange': ['evaluate'],
    'serve': ['adapters', 'escape'],
    'sources': ['images', 'presets', 'rows'],
    'candidates': ['sources'],
    'pathways': ['candidates', 'scoring', 'server', 'wording'],
    'annotate': ['pathways'],
    'builder': ['annotate', 'stored', 'folders', 'escape'],
    'corrupting': ['rows'],
    'cli': [
        *('bench', 'bench_files', 'builder', 'answer', 'adapters', 'corrupting', 'signals'),
        *('exchange', 'serve'),
        'escape',
    ],
    # the study
    'mmd_bench': ['adapters', 'bench_files', 'evaluate', 'scoring', 'data'],
    'recipes': ['sft', 'bridge', 'grpo'],
    'ablations': ['paper', 'recipes', 'mmd_bench'],
    'perceptual': ['claims', 'data'],
    'gallery': ['mmd_bench', 'watch'],
    'attention': ['grpo'],
    'explore': ['answer', 'attention', 'degrade', 'escape', 'scenes'],
    'panel': ['explore'],
    'scale': ['images', 'model', 'paper'],
    'readme': ['core'],
    'contents': ['readme'],
    'pipeline': ['folders', 'identity', 'readme', 'records', 'signals'],
}


def cells(path):
    """Code cells that hold more than imports."""
    found = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
    return [
        s for s in found if re.sub(r'^(#.*|(import|from) .*|\s+.*|\))$', '', s, flags=re.M).strip()
    ]


def is_export(source):
    return re.match(r'#\|\s*exporti?\b', source)


def is_lesson(source):
    return not re.match(r'#\|', source)


def length(source):
    """Lines of code: directives, comments and blank lines do not count."""
    return sum(bool(l.strip()) and not l.lstrip().startswith('#') for l in source.splitlines())


def functions(path):
    """Name and number of lines of every function in a module."""
    tree = ast.parse(path.read_text())
    return [
        (f'{path.stem}.{n.name}', n.end_lineno - n.lineno + 1)
        for n in ast.walk(tree)
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def imported(path):
    """Modules of the package that a module imports."""
    nodes = [
        n
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.ImportFrom) and n.level
    ]
    return {
        name
        for n in nodes
        for name in ([n.module.split('.')[0]] if n.module else [a.name for a in n.names])
    }


def reachable(module):
    """Closure of MAY_IMPORT."""
    return set(MAY_IMPORT[module]).union(*(reachable(m) for m in MAY_IMPORT[module]))


def test_cells_are_short():
    """At most 26 formatted lines at the 90th percentile."""
    books = [*LIBRARY, *(ROOT / 'nbs').glob('*.ipynb')]
    lengths = {p.stem: [length(s) for s in style.code_cells(p)] for p in books}
    worst = {k: np.percentile(v, 90) for k, v in lengths.items() if v}
    worst = {k: float(v) for k, v in worst.items() if v > 26}
    assert np.percentile(sum(lengths.values(), []), 90) <= 26, f'above 26 lines: {worst}'


def test_functions_are_short():
    """Bodies have at most 20 lines at the 90th percentile, none has more than 80."""
    lengths = {n: style.lines_of(f) for p in MODULES for n, f in style.functions(p)}
    assert {k: v for k, v in lengths.items() if v > 80} == {}
    assert np.percentile(list(lengths.values()), 90) <= 20


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_lessons(path):
    """At least 0.8 lesson cells per export cell, and lessons that can fail."""
    sources = cells(path)
    exports, lessons = [s for s in sources if is_export(s)], [s for s in sources if is_lesson(s)]
    assert len(lessons) >= 0.8 * len(exports), f'{len(lessons)} lessons for {len(exports)} exports'
    assert sum('assert' in s for s in lessons) >= len(lessons) / 2


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_title(path):
    """First cell: a title and a claim, which becomes the module's docstring."""
    lines = nbformat.read(path, 4).cells[0].source.splitlines()
    assert lines[0].startswith('# ') and any(l.startswith('> ') for l in lines)


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_imports_go_downwards(path):
    """Only the modules that the table allows; a new module needs a row."""
    assert path.stem in MAY_IMPORT, f'add {path.stem} to MAY_IMPORT'
    assert imported(path) <= reachable(path.stem)


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_no_silent_failure(path):
    """No star imports, no bare or catch-all except, no global seeds."""
    source = path.read_text()
    assert not re.search(
        r'import \*|except( Exception)?:|np\.random\.seed|torch\.manual_seed\(|random\.seed\(',
        source,
    )


def test_lines_are_narrow():
    """At most 100 characters at the 90th percentile, none above 140."""
    widths = [w for p in MODULES for w in style.widths(p)]
    assert np.percentile(widths, 90) <= 100
    assert max(widths) <= 140


def test_functions_say_little():
    """At most 175 tokens at the 90th percentile, none above 400."""
    tokens = {n: k for p in MODULES for n, k in style.function_tokens(p).items()}
    assert {n: k for n, k in tokens.items() if k > 400} == {}
    assert np.percentile(list(tokens.values()), 90) <= 175


def test_names_have_one_meaning():
    """At most 1.5 % of the public names are spelled like another one."""
    names = sum(map(len, style.public_names(ROOT).values()))
    assert sum(map(len, style.homonyms(ROOT).values())) <= 0.015 * names


def test_docstrings_begin_with_a_verb():
    """No function's docstring begins with a word that cannot be an imperative verb."""
    assert style.openings(ROOT) == []
