"""Notebooks, library and README say the same thing."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from clear_nb.contents import LINKS, chapters, index_text, links_text, with_claims
from clear_nb.core import ROOT
from clear_nb.pipeline import library_notebooks
from clear_nb.readme import readme_text

BIN = Path(sys.executable).parent
LIBRARY = library_notebooks()
MODULES = [
    p
    for p in sorted((ROOT / 'clear_nb').rglob('*.py'))
    if p.name not in ('__init__.py', '_modidx.py')
]


def snapshot(root):
    """Relative path to bytes of everything that nbdev may touch."""
    files = [
        p
        for folder in ('nbs', 'clear_nb')
        for p in (root / folder).rglob('*')
        if p.is_file() and '__pycache__' not in p.parts
    ]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def copy(tmp_path):
    """A copy of the tree that may be written to."""
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.*.tmp*')
    for folder in ('nbs', 'clear_nb'):
        shutil.copytree(ROOT / folder, tmp_path / 'copy' / folder, ignore=skip)
    for name in ('settings.ini', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT / name, tmp_path / 'copy' / name)
    return tmp_path / 'copy'


@pytest.mark.parametrize('command', ['nbdev_clean', 'nbdev_export'])
def test_no_difference(copy, command):
    """Cleaning and exporting a fresh copy changes nothing."""
    before = snapshot(copy)
    done = subprocess.run(
        [str(BIN / command)], cwd=copy, capture_output=True, text=True, timeout=300
    )
    after = snapshot(copy)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert done.returncode == 0, done.stderr[-2000:]
    assert not changed, f'run {command}: it changes {changed}'


def as_jupyterlab_keeps(nb):
    """What JupyterLab changes while a notebook is open: names of kernel and language, counts,
    states of cells.
    """
    nb['metadata'] |= dict(
        kernelspec=dict(name='python3', language='python', display_name='Python 3 (ipykernel)'),
        language_info=dict(
            name='python', version='3.12.1', codemirror_mode=dict(name='ipython', version=3)
        ),
    )
    for k, cell in enumerate(nb['cells']):
        cell['metadata'] |= dict(editable=True, slideshow=dict(slide_type=''), trusted=True)
        cell['metadata'] |= dict(jupyter=dict(source_hidden=False), collapsed=True, scrolled=True)
        if cell['cell_type'] == 'code':
            cell['execution_count'] = k + 1
            for output in cell['outputs']:
                if output['output_type'] == 'execute_result':
                    output['execution_count'] = k + 1
    return dict(reversed(nb.items()))  # the order of keys is the browser's


def test_jupyterlab_leaves_no_difference(copy):
    """Opening and saving every notebook through JupyterLab's own server code, then nbdev_clean:
    the same bytes.
    """
    from jupyter_server.services.contents.largefilemanager import LargeFileManager

    manager, before = LargeFileManager(root_dir=str(copy)), snapshot(copy)
    paths = [k for k in before if k.endswith('.ipynb')]
    for path in paths:
        sent = json.loads(json.dumps(manager.get(path), default=str))  # as over HTTP
        saved = dict(type='notebook', format='json', content=as_jupyterlab_keeps(sent['content']))
        manager.save(saved, path)
    saved = snapshot(copy)
    assert all(saved[k] != before[k] for k in paths)
    done = subprocess.run(
        [str(BIN / 'nbdev_clean')], cwd=copy, capture_output=True, text=True, timeout=300
    )
    after = snapshot(copy)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [k for k in paths if after[k] != before[k]] == []


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_module_has_its_notebook(path):
    """A renamed notebook leaves no orphan module behind."""
    source = re.search(r'File to edit: (.*\.ipynb)', path.read_text())
    assert source, f'{path.name} was not exported from a notebook'
    assert (path.parent / source[1]).resolve().is_file(), f'{source[1]} is gone: delete {path.name}'


def test_one_notebook_per_module():
    """Two notebooks with one default_exp would overwrite each other without a word."""
    names = [
        m
        for p in LIBRARY
        for c in nbformat.read(p, 4).cells
        for m in re.findall(r'^#\|\s*default_exp (\S+)', c.source, flags=re.M)
    ]
    assert [n for n, k in Counter(names).items() if k > 1] == []
    assert sorted(names) == sorted(
        p.relative_to(ROOT / 'clear_nb').with_suffix('').as_posix().replace('/', '.')
        for p in MODULES
    )


def test_notebook_is_called_like_its_module():
    """nbs/<folder>/name.ipynb exports clear_nb/name.py."""
    for p in LIBRARY:
        assert re.search(
            rf'default_exp {p.stem}$',
            '\n'.join(c.source for c in nbformat.read(p, 4).cells),
            flags=re.M,
        ), p.name


def test_readme():
    """README.md is the index notebook."""
    assert (ROOT / 'README.md').read_text() == readme_text(), (
        'run python -m clear_nb.pipeline --readme'
    )


def test_readme_links():
    """Every linked file exists and every notebook is on the map."""
    links = re.findall(r'\]\((?![a-z]+:|#)([^)\s]+)\)', (ROOT / 'README.md').read_text())
    assert [l for l in links if not (ROOT / l).exists()] == []
    notebooks = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / 'nbs').rglob('*.ipynb')
        if p.stem != 'index' and '.ipynb_checkpoints' not in p.parts
    }
    assert notebooks - set(links) == set()


def test_no_machine_paths():
    """Nothing names a folder of one particular machine."""
    files = [
        *LIBRARY,
        *MODULES,
        *sorted((ROOT / 'nbs').glob('*.ipynb')),
        *sorted((ROOT / 'tests').glob('*.py')),
        ROOT / 'README.md',
        ROOT / 'Makefile',
    ]
    pattern = re.compile(
        '|'.join(['/wor' + 'k/', '/roo' + 't/', '/ho' + 'me/[a-z]', '/tm' + 'p/[a-z]'])
    )
    assert [(p.name, m[0]) for p in files for m in pattern.finditer(p.read_text())] == []


def test_contents():
    """The index names every chapter once, with its own claim, and every chapter links to its
    neighbours.
    """
    order = chapters(index_text())
    library = [p.relative_to(ROOT / 'nbs').as_posix() for p in LIBRARY]
    assert sorted(c for c in order if '/' in c) == sorted(library)
    assert with_claims(index_text()) == index_text(), 'run python -m clear_nb.contents'
    inside = [c for c in order if '/' in c]
    for k, name in enumerate(inside):
        last = nbformat.read(ROOT / 'nbs' / name, 4).cells[-1]
        assert last.id == LINKS and last.source == links_text(inside, k), (
            f'{name}: run python -m clear_nb.contents'
        )


def test_reading_order():
    """Inside a folder, a chapter only uses modules of chapters before it."""
    place = {c: k for k, c in enumerate(chapters(index_text())) if '/' in c}
    folder = {Path(c).stem: Path(c).parent.name for c in place}
    number = {Path(c).stem: k for c, k in place.items()}
    for module in MODULES:
        names = re.findall(r'^from \.(\w+) import', module.read_text(encoding='utf-8'), flags=re.M)
        for name in names:
            if folder[name] == folder[module.stem]:
                assert number[name] < number[module.stem], f'{module.stem} uses {name}'
