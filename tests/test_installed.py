"""What `pip install` brings is enough: presets, the shipped model, and the commands, in any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from clear_nb.core import ROOT
from clear_nb.sources import write_scene_rows

WHEEL_LIMIT = 60 * 10**6  # bytes
NOBODY = """
import pwd


def getpwuid(uid):
    raise KeyError(f'getpwuid(): uid not found: {uid}')


pwd.getpwuid = getpwuid
"""
GUESS = """
def guess(image, prompt):
    return 'A'
"""


def pip(*args, cwd):
    """Run pip without network."""
    command = [sys.executable, '-m', 'pip', *args, '-q', '--no-deps', '--no-index']
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel, built from a copy, because a build writes beside its sources."""
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    leave = shutil.ignore_patterns('__pycache__', 'paper', 'official')
    shutil.copytree(ROOT / 'params', source / 'params')
    shutil.copytree(ROOT / 'checkpoints', source / 'checkpoints', ignore=leave)
    package = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / 'clear_nb', source / 'clear_nb', ignore=package)
    pip('wheel', '.', '--no-build-isolation', '-w', str(out), cwd=source)
    [path] = out.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """A folder with the installed package, where no user has a name."""
    folder = tmp_path_factory.mktemp('installed')
    pip('install', '--target', str(folder), str(wheel), cwd=folder)
    (folder / 'sitecustomize.py').write_text(NOBODY, encoding='utf-8')
    (folder / 'mymodel.py').write_text(GUESS, encoding='utf-8')
    return folder


def run(installed: Path, cwd: Path, *args, command=('-m', 'clear_nb.cli')):
    """Run the command of the installed package without a home, and as plain a locale as there is."""
    env = dict(
        PATH=os.environ['PATH'],
        PYTHONPATH=str(installed),
        OMP_NUM_THREADS='1',
        LC_ALL='C',
        PYTHONUTF8='0',
        PYTHONCOERCECLOCALE='0',
    )
    done = subprocess.run(
        [sys.executable, *command, *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode(errors='replace')[-3000:]
    return done.stdout.decode()


def test_wheel_holds_what_commands_need(wheel):
    """All presets, the four stages of the tiny model, and no more than 60 MB."""
    names = zipfile.ZipFile(wheel).namelist()
    presets = {p.name for p in (ROOT / 'params').glob('*.yaml')}
    assert presets == {
        n.rpartition('/')[2]
        for n in names
        if n.startswith('clear_nb/params/') and n.count('/') == 2
    }
    shipped = ROOT / 'checkpoints' / 'tiny'
    files = {f'clear_nb/checkpoints/tiny/{p.relative_to(shipped)}' for p in shipped.rglob('*.*')}
    assert files <= {*names}
    assert wheel.stat().st_size < WHEEL_LIMIT


def test_paths(installed, tmp_path):
    """Presets and weights lie in the package; what is written goes below the working folder."""
    code = 'from clear_nb.core import PATHS; from clear_nb.presets import preset_names; '
    code += 'print(PATHS.params, PATHS.checkpoints, PATHS.runs, *preset_names(), sep="\\n")'
    params, checkpoints, runs, *names = run(installed, tmp_path, code, command=('-c',)).splitlines()
    assert Path(params) == installed / 'clear_nb' / 'params'
    assert Path(checkpoints) == installed / 'clear_nb' / 'checkpoints'
    assert Path(runs) == tmp_path / 'clear-nb' / 'runs'
    assert names == sorted(p.stem for p in (ROOT / 'params').glob('*.yaml'))


def test_four_commands(installed, tmp_path):
    """`corrupt`, `bench`, `answer` with the shipped model and `build-data --estimate`."""
    scenes = run(installed, tmp_path, *'corrupt --scenes mmstar --n 2 --out scenes'.split())
    assert '2 clean, 2 low, 2 mid, 2 hard' in scenes
    asked = '--data scenes --model python:mymodel:guess --out run'.split()
    assert '| mymodel:guess | mmstar | clean | 2 |' in run(installed, tmp_path, 'bench', *asked)
    Image.new('RGB', (64, 64), (200, 40, 40)).save(tmp_path / 'picture.png')
    question = ['--question', 'what color?', '--image', 'picture.png', '--policy', 'never']
    assert 'answer: ' in run(installed, tmp_path, 'answer', *question)
    write_scene_rows(tmp_path / 'rows', 8)
    build = '--source rows --base python:mymodel:guess --annotator m --n 2 --out built --estimate'
    recipe = '--set share=1 spare=4 relative=true'
    assert 'traces' in run(installed, tmp_path, 'build-data', *build.split(), *recipe.split())
    assert not (tmp_path / '~').exists()
