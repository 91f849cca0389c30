"""Every notebook runs from its first cell to its last: one test per notebook."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from clear_nb.core import ROOT

NOTEBOOKS = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if not any(part[0] in '._' for part in p.relative_to(ROOT).parts)]


def item(path):
    """A test item; pipeline notebooks share runs/smoke, so one worker runs them one after the other."""
    name = path.relative_to(ROOT/'nbs').with_suffix('').as_posix()
    return pytest.param(path, id=name, marks=[] if name.startswith('lib/') else pytest.mark.xdist_group('pipeline'))


@pytest.mark.parametrize('path', [item(p) for p in NOTEBOOKS])
def test_notebook(path):
    """nbdev_test executes the notebook's cells with their defaults, which are the smoke values."""
    command = [str(Path(sys.executable).with_name('nbdev_test')), '--path', str(path), '--n_workers', '0']
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg')
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and 'Success' in done.stdout, f'{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
