"""Every notebook runs from its first cell to its last: one test per notebook."""

import sys
from pathlib import Path

import pytest
from processes import python

from clear_nb.core import ROOT
from clear_nb.pipeline import library_notebooks

NOTEBOOKS = [
    p
    for p in sorted((ROOT / 'nbs').rglob('*.ipynb'))
    if not any(part[0] in '._' for part in p.relative_to(ROOT).parts)
]
LIB = library_notebooks()


def executed(path):
    """nbdev_test executes the notebook's cells with their defaults, which are the smoke values."""
    done = python(
        Path(sys.executable).with_name('nbdev_test'),
        '--path',
        path,
        '--n_workers',
        0,
        seconds=840,
        MPLBACKEND='agg',
    )
    assert done.returncode == 0 and 'Success' in done.stdout, (
        f'{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    )


@pytest.mark.parametrize('path', LIB, ids=lambda p: p.stem)
def test_notebook(path):
    executed(path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_pipeline_notebooks(subtests):
    """They share runs/smoke, and each needs what the one before it has made."""
    for path in NOTEBOOKS:
        if path not in LIB:
            with subtests.test(path.stem):
                executed(path)
