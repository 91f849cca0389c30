"""Every notebook runs from its first cell to its last: one test per notebook."""
import sys
from pathlib import Path

import pytest
from clear_nb.core import ROOT
from processes import python

NOTEBOOKS = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if not any(part[0] in '._' for part in p.relative_to(ROOT).parts)]


def item(path):
    """A test item; pipeline notebooks share runs/smoke, so one worker runs them one after the other."""
    name = path.relative_to(ROOT/'nbs').with_suffix('').as_posix()
    return pytest.param(path, id=name, marks=[] if name.startswith('lib/') else pytest.mark.xdist_group('pipeline'))


@pytest.mark.parametrize('path', [item(p) for p in NOTEBOOKS])
def test_notebook(path):
    """nbdev_test executes the notebook's cells with their defaults, which are the smoke values."""
    done = python(Path(sys.executable).with_name('nbdev_test'), '--path', path, '--n_workers', 0, seconds=840, MPLBACKEND='agg')
    assert done.returncode == 0 and 'Success' in done.stdout, f'{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
