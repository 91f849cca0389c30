"""pyproject.toml, environment.yml and settings.ini agree, and the benchmark needs no notebooks."""

import base64
import configparser
import re
import tomllib
from importlib import metadata
from itertools import chain

import cv2
import pytest
import yaml
from bench_rows import picture
from processes import python

import clear_nb
from clear_nb.core import ROOT

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']
STAND_IN = ROOT / 'packaging' / 'opencv-python'
CONDA = yaml.safe_load((ROOT / 'environment.yml').read_text())['dependencies']
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / 'settings.ini')


def test_conda_equals_pip():
    """The pip section of environment.yml repeats the dependencies and the extras that `make
    env` installs, in order.
    """
    own = f'{PROJECT["name"]}['
    extras = [d for d in EXTRAS['dev'] if d.startswith(own)]
    assert extras == [f'{own}notebooks,perceptual,kits,serve]']
    tests = [d for d in EXTRAS['dev'] if d not in extras]
    groups = [EXTRAS[name] for name in ('notebooks', 'perceptual', 'kits', 'serve')]
    everything = [*PROJECT['dependencies'], *chain(*groups), *tests]
    assert CONDA[-1]['pip'] == [f'./{STAND_IN.relative_to(ROOT)}', *everything]


def test_python_versions():
    """One range of Python versions everywhere."""
    assert f'python{PROJECT["requires-python"]}' == CONDA[0]
    assert (
        SETTINGS['DEFAULT']['min_python'] == re.match(r'>=([\d.]+)', PROJECT['requires-python'])[1]
    )


def test_every_dependency_is_bounded():
    """Each has a lower and an upper bound, or one exact version."""
    extras = [d for group in EXTRAS.values() for d in group]
    for d in [*PROJECT['dependencies'], *extras]:
        if d == f'{PROJECT["name"]}[notebooks,perceptual,kits,serve]':
            continue
        assert re.fullmatch(r'[A-Za-z0-9_.\[\]-]+(==[\d.]+|>=[\d.]+,<[\d.]+)', d), d


def test_nbdev_pins():
    """nbdev 2 only works with these (nbdev 3 refuses settings.ini)."""
    pins = {re.match('[a-z-]+', d)[0]: d for d in (*PROJECT['dependencies'], *EXTRAS['notebooks'])}
    assert pins['nbdev'] == 'nbdev==2.4.14'
    assert all(
        pins[n].endswith(upper)
        for n, upper in dict(execnb='<0.2', fastcore='<2', ghapi='<2').items()
    )


def test_one_version():
    """The version lives in clear_nb/__init__.py; settings.ini repeats it."""
    assert SETTINGS['DEFAULT']['version'] == clear_nb.__version__ and PROJECT['dynamic'] == [
        'version'
    ]


def test_settings_that_protect_the_notebooks():
    """Tags survive cleaning, outputs too, and nbdev leaves pyproject.toml alone."""
    s = SETTINGS['DEFAULT']
    assert (s['allowed_cell_metadata_keys'], s['clear_all'], s['update_pyproject']) == (
        'tags',
        'False',
        'False',
    )


HEAVY = (
    'jupyterlab jupyter_server nbdev execnb ghapi papermill nbclient nbconvert nbformat ipykernel '
    'IPython ipywidgets pyiqa facexlib pytest'
).split()
BLOCKED = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None  # an import of it fails, as where it is not installed
"""


def test_core_names_no_notebook_packages():
    """What `pip install clear-nb` brings along has none of them."""
    names = {re.match(r'[A-Za-z0-9_.-]+', d)[0] for d in PROJECT['dependencies']}
    assert not names & {*HEAVY, 'opencv-python'} and 'opencv-python-headless' in names


def test_benchmark_needs_no_notebooks(tmp_path):
    """`bench`, `answer` and `bench_files` work where JupyterLab, nbdev, papermill and pyiqa are
    not installed.
    """
    image = base64.b64encode(picture()).decode()
    lines = [f'{k}\tIs it {k}?\tno\tyes\t{"AB"[k % 2]}\t{image}' for k in range(6)]
    rows = tmp_path / 'MMStar.tsv'
    rows.write_text('\n'.join(['index\tquestion\tA\tB\tanswer\timage', *lines]) + '\n')
    (tmp_path / 'picture.png').write_bytes(picture())
    code = f"""
from pathlib import Path
from clear_nb import answer, bench_files, cli, rows
out = Path(sys.argv[1])
assert len(list(rows.read_tsv(out/'MMStar.tsv'))) == 6
asked = ['--model', 'python:bench_rows:guess', '--data', str(out/'MMStar.tsv'), '--out', str(out/'run')]
assert cli.main(['bench', *asked]) == 0
assert cli.main(['answer', '--image', str(out/'picture.png'), '--question', 'what is it?']) == 0
assert not [n for n in {HEAVY!r} if sys.modules.get(n)]
"""
    done = python('-c', BLOCKED + code, tmp_path, seconds=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / 'run').glob('*.md'))


@pytest.mark.parametrize('name', ['nbdev', 'papermill', 'pyiqa'])
def test_blocked_packages_are_missed(name):
    """The block above is a block: what needs such a package fails."""
    module = dict(nbdev='nbdev.export', papermill='clear_nb.pipeline', pyiqa='pyiqa')[name]
    done = python('-c', f'{BLOCKED}import {module}', seconds=200)
    assert done.returncode == 1 and 'ModuleNotFoundError' in done.stderr


def test_one_opencv():
    """One distribution brings cv2; the empty stand-in for the other has the version that
    facexlib may get.
    """
    stand_in = tomllib.loads((STAND_IN / 'pyproject.toml').read_text())
    bound = next(d for d in EXTRAS['perceptual'] if d.startswith('opencv-python'))
    assert bound == 'opencv-python>=4.14,<5' and stand_in['project']['version'] == '4.14'
    assert stand_in['project']['dependencies'] == [
        d for d in PROJECT['dependencies'] if 'opencv' in d
    ]
    assert stand_in['tool']['setuptools']['packages'] == []
    assert stand_in['project']['requires-python'] == PROJECT['requires-python']
    assert cv2.__version__.split('.')[0] == '4'


def test_one_opencv_is_installed():
    """In the environment that `make env` made, `opencv-python` is the empty stand-in."""
    owners = {
        d.metadata['Name']
        for d in metadata.distributions()
        if d.metadata['Name'].startswith('opencv')
        and any(str(f).startswith('cv2/') for f in d.files or [])
    }
    if 'opencv-python' in owners:
        pytest.skip('an environment from before the stand-in: run make env')
    assert owners == {'opencv-python-headless'}
