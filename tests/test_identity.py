"""A result is never taken for one that other code, numbers or inputs would give."""

import ast
import json
import textwrap

import pytest
import style

from clear_nb import core, identity
from clear_nb.core import ROOT, rng
from clear_nb.identity import (
    code_hashes,
    differences,
    identity_key,
    made_from,
    module_source,
    reached_modules,
    source_hash,
)

MODULES = [p.stem for p in style.modules(ROOT)]


def constants(tree):
    """List the plain constants of a tree; docstrings and the parts of f-strings are left out."""
    skip = set()
    for n in ast.walk(tree):
        if isinstance(n, (ast.JoinedStr, ast.Expr)):
            skip |= {id(c) for c in ast.walk(n) if isinstance(c, ast.Constant)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in skip]
    return [n for n in found if isinstance(n.value, (int, float, str)) and n.value is not ...]


def with_other_constant(source, number):
    """Change one constant of a source, or return None where there is none."""
    found = constants(ast.parse(source))
    if not found:
        return None
    node = found[number % len(found)]
    lines = source.splitlines(keepends=True)
    before, after = lines[: node.lineno - 1], lines[node.end_lineno :]
    first, last = lines[node.lineno - 1].encode(), lines[node.end_lineno - 1].encode()
    other = repr(node.value + 'x') if isinstance(node.value, str) else repr(not node.value)
    if type(node.value) in (int, float):
        other = repr(node.value + 1)
    middle = first[: node.col_offset].decode() + other + last[node.end_col_offset :].decode()
    return ''.join([*before, middle, *after])


def with_other_words(source):
    """Change every docstring, add comments and blank lines; what the source does stays."""
    tree = ast.parse(source)
    for n in ast.walk(tree):
        body = getattr(n, 'body', None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            text = body[0].value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                text.value += ' In other words.'
    return '# a comment\n\n' + ast.unparse(tree) + '\n\n\n# the end\n'


def function_sources(module):
    """List (name, source) of the functions and classes at the top of a module."""
    text = module_source(module)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [n for n in ast.parse(text).body if isinstance(n, kinds)]
    return [(n.name, textwrap.dedent(ast.get_source_segment(text, n))) for n in nodes]


@pytest.mark.parametrize('module', MODULES)
def test_every_constant_counts(module):
    """One changed constant in any function changes its hash; other words change nothing."""
    draw = rng('identity test', module)
    tried = 0
    for name, source in function_sources(module):
        assert source_hash(source) == source_hash(with_other_words(source)), name
        changed = with_other_constant(source, int(draw.integers(1000)))
        if changed is not None:
            tried += 1
            assert source_hash(source) != source_hash(changed), name
    assert tried or not function_sources(module)


@pytest.mark.parametrize('module', MODULES)
def test_change_reaches_everything_above(module, monkeypatch):
    """A change in a module changes the identity of each module that can reach it, and of no
    other.
    """
    reach = {m: {m, *reached_modules(module_source(m))} for m in MODULES}
    before = {m: code_hashes(m) for m in MODULES}
    changed = module_source(module) + '\nadded = 1\n'
    monkeypatch.setattr(
        identity, 'module_source', lambda m: changed if m == module else module_source(m)
    )
    for m in MODULES:
        assert (code_hashes(m) != before[m]) == (module in reach[m]), m


def test_case_of_the_review(monkeypatch):
    """One changed line in `core._seed` draws other scenes, so whatever draws scenes is another
    result.
    """
    source = module_source('core')
    line = "digest(), 'little'"
    assert source.count(line) == 1
    other = source.replace(line, "digest(), 'big'")
    keep = {m: made_from(m) for m in ('scenes', 'bench_files', 'builder', 'grpo', 'ablations')}
    monkeypatch.setattr(
        identity, 'module_source', lambda m: other if m == 'core' else module_source(m)
    )
    for module, before in keep.items():
        after = made_from(module)
        assert identity_key(after) != identity_key(before)
        assert differences(before, after) == ['other code in core']


@pytest.mark.parametrize(
    'one, two',
    [
        ('from clear_nb.core import rng\nrng(0)', 'from clear_nb import core\ncore.rng(0)'),
        ('from .core import rng\nrng(0)', 'import clear_nb.core as c\nc.rng(0)'),
        ('from . import flow as f\nf.x', 'from .flow import x\nx'),
        ('import numpy as np\nnp.zeros(1)', 'from numpy import zeros\nzeros(1)'),
        (
            'def f():\n    from .core import rng\n    return rng',
            'from .core import rng\ndef f(): return rng',
        ),
        ('x = 1 # one', 'x = 1'),
        ('def f(a, b):\n  return (a +\n     b)', '"Add."\ndef f(a, b): return a + b'),
        ("__all__ = ['f']\nf = 1", 'f = 1'),
    ],
)
def test_spelling_does_not_count(one, two):
    assert source_hash(one) == source_hash(two)


@pytest.mark.parametrize(
    'one, two',
    [
        ('from .core import rng\nrng(0)', 'from .data import rng\nrng(0)'),
        ('from . import flow\nflow.x', 'from . import vae\nvae.x'),
        ('x = 1', 'x = 1.0'),
        ('x = 1', 'x = True'),
        ('x = None', 'x = 0'),
        ("x = '1'", 'x = 1'),
        ('def f(a): return a', 'def f(a=1): return a'),
        ('import a\ndef f(a): return a.b', 'import a\ndef f(c): return a.b'),
        ('def f(): return 1', 'def f(): yield 1'),
        ('x = a[1:]', 'x = a[:1]'),
        ('f(*a)', 'f(a)'),
    ],
)
def test_meaning_counts(one, two):
    assert source_hash(one) != source_hash(two)


def test_parameters_inputs_and_precision(tmp_path):
    """Each part of an identity is named when it differs; what cannot act is not in it."""
    file = tmp_path / 'weights'
    file.write_text('1')
    made = made_from(core.rng, params=dict(a=1, b=(2, 3)), inputs=dict(weights=file))
    assert json.loads(json.dumps(made)) == made
    file.write_text('2')
    other = made_from(
        core.rng, params=dict(a=1, b=(2, 4)), inputs=dict(weights=file), precision='bf16'
    )
    assert differences(made, other) == [
        'b: [2, 3] there, [2, 4] here',
        'other content of weights',
        "precision '' there, 'bf16' here",
    ]
    assert differences({}, other) == differences(None, other) == ['its identity is unknown']
    with pytest.raises(FileNotFoundError, match='no input'):
        made_from(core.rng, inputs=dict(weights=tmp_path / 'none'))
    with pytest.raises(TypeError, match='no function'):
        made_from(3)


def test_package_data_counts():
    """A module that reads the paper's numbers depends on them."""
    assert 'data/paper' in code_hashes('paper') and 'data/paper' not in code_hashes('flow')
