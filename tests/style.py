"""Measure how the package reads: `python tests/style.py [folder of a checkout]` prints the
table.
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

import numpy as np

# Functions with this name are entry points of a module, which is one meaning.
ENTRY_POINTS = {'main'}
# A function's docstring says what the function does, so it begins with a verb and with none of these.
NO_VERB = {
    *'what which how whether where when who why is are was does do did has have'.split(),
    *'the a an every each all one two some any no none this that these those its if as of'.split(),
}


def modules(root: Path) -> list:
    """List the exported modules, the generated index left out."""
    return [p for p in sorted((root / 'clear_nb').glob('*.py')) if not p.name.startswith('_')]


def code_cells(path: Path) -> list:
    """List the sources of the code cells that hold more than imports."""
    cells = json.loads(path.read_text())['cells']
    found = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    only_imports = r'^(#.*|(import|from) .*|\s+.*|\))$'
    return [s for s in found if re.sub(only_imports, '', s, flags=re.M).strip()]


def prose_per_code_cell(path: Path) -> tuple:
    """Count code cells per prose cell and the median words of a prose cell."""
    cells = json.loads(path.read_text())['cells']
    prose = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    return len(code_cells(path)) / max(1, len(prose)), float(
        np.median([len(p.split()) for p in prose])
    )


def widths(path: Path) -> list:
    """List the lengths of a module's lines, nbdev's own lines left out."""
    text = re.sub(r'^__all__ = \[.*?\]$', '', path.read_text(), flags=re.M | re.S)
    return [len(l) for l in text.splitlines() if l.strip() and not l.startswith(('# %%', '# AUTO'))]


def functions(path: Path) -> list:
    """List (name, node) of every function of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)]
    return [(f'{path.stem}.{n.name}', n) for n in nodes]


def lines_of(node) -> int:
    """Count the lines of a function's body, its docstring left out."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def tokens_of(source: str) -> int:
    """Count the tokens of a source without comments, line breaks and docstrings."""
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(t.type not in skip and bool(t.string) for t in found)


def function_tokens(path: Path) -> dict:
    """Map each function of a module to the number of its tokens."""
    lines, out = path.read_text().splitlines(), {}
    for name, node in functions(path):
        source = '\n'.join(lines[node.lineno - 1 : node.end_lineno])
        out[name] = tokens_of(
            re.sub(r'^ +', '', source) if node.col_offset == 0 else _dedent(source)
        )
    return out


def _dedent(source: str) -> str:
    margin = re.match(r' *', source)[0]
    return re.sub(rf'^{margin}', '', source, flags=re.M)


def public_names(root: Path) -> dict:
    """Map each module to the names it exports."""
    out = {}
    for p in modules(root):
        for n in ast.parse(p.read_text()).body:
            if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__':
                out[p.stem] = ast.literal_eval(n.value)
    return out


def homonyms(root: Path) -> dict:
    """Map each spelling that stands for several public names to these names; case does not
    count.
    """
    found = defaultdict(list)
    for module, names in public_names(root).items():
        for name in set(names) - ENTRY_POINTS:
            found[name.lower().replace('_', '')].append(f'{module}.{name}')
    return {k: sorted(v) for k, v in found.items() if len(v) > 1}


def openings(root: Path) -> list:
    """List the functions whose docstring does not begin with a verb."""
    bad = []
    for p in modules(root):
        for name, node in functions(p):
            doc = ast.get_docstring(node)
            if doc and re.split(r'\W', doc.lower(), maxsplit=1)[0] in NO_VERB:
                bad.append(f'{name}: {doc.splitlines()[0]}')
    return bad


def lambdas(root: Path) -> float:
    """Count the lambdas in a thousand lines."""
    sources = [p.read_text() for p in modules(root)]
    count = sum(isinstance(n, ast.Lambda) for s in sources for n in ast.walk(ast.parse(s)))
    return 1000 * count / sum(s.count('\n') for s in sources)


def one_caller(root: Path) -> tuple:
    """Count the private functions that exactly one place calls, and all private functions."""
    trees = [ast.parse(p.read_text()) for p in modules(root)]
    private = {
        n.name
        for t in trees
        for n in ast.walk(t)
        if isinstance(n, ast.FunctionDef) and n.name.startswith('_') and not n.name.endswith('__')
    }
    used = defaultdict(int)
    for t in trees:
        for n in ast.walk(t):
            name = (
                n.id if isinstance(n, ast.Name) else n.attr if isinstance(n, ast.Attribute) else ''
            )
            used[name] += name in private
    return sum(used[n] == 1 for n in private), len(private)


def summary(root: Path) -> dict:
    """Collect the figures of a checkout."""
    every = [w for p in modules(root) for w in widths(p)]
    tokens = [n for p in modules(root) for n in function_tokens(p).values()]
    lines = [lines_of(n) for p in modules(root) for _, n in functions(p)]
    docs = [n for p in modules(root) for _, n in functions(p) if ast.get_docstring(n)]
    names = sum(map(len, public_names(root).values()))
    shared = sum(map(len, homonyms(root).values()))
    single, private = one_caller(root)

    def pick(values, *at):
        return ' / '.join(f'{np.percentile(values, q):.0f}' for q in at)

    return {
        'lines of the package': len(every),
        'width p50 / p90 / max': pick(every, 50, 90, 100),
        'lines above 120, %': f'{100 * np.mean(np.array(every) > 120):.1f}',
        'tokens per function p50 / p90 / max': pick(tokens, 50, 90, 100),
        'lines per function body p50 / p90 / max': pick(lines, 50, 90, 100),
        'lambdas per 1,000 lines': f'{lambdas(root):.1f}',
        'homonyms': f'{shared} of {names} public names, {100 * shared / names:.1f} %',
        'docstrings without a verb first': f'{len(openings(root))} of {len(docs)}',
        'private functions with one caller': f'{single} of {private}',
    }


if __name__ == '__main__':
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else '.')
    for name, value in summary(checkout).items():
        print(f'{name:45} {value}')
    for path in modules(checkout):
        print(f'{path.stem:45} {len(widths(path))} lines')
    crowded = 'explore bench cli run report stats tables evaluate rows variants bench_files'
    crowded = [*crowded.split(), *'sources candidates pathways annotate builder'.split()]
    for path in sorted((checkout / 'nbs').rglob('*.ipynb')):
        if re.sub(r'^\d+_', '', path.stem) in crowded:
            ratio, words = prose_per_code_cell(path)
            print(f'{path.stem:45} {ratio:.1f} code cells per prose cell, {words:.0f} words')
