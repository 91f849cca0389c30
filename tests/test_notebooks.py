"""Every notebook runs from its first cell to its last: one test per notebook.

The notebooks of the pipeline share their folder of runs, and each needs what the one before it has made. They run in order
in `test_pipeline.test_smoke_chain`; here are the others.
"""

import pytest

from clear_nb.core import ROOT
from clear_nb.pipeline import NOTEBOOK_ORDER, library_notebooks

NOTEBOOKS = [
    p
    for p in sorted((ROOT / 'nbs').rglob('*.ipynb'))
    if not any(part[0] in '._' for part in p.relative_to(ROOT).parts)
]
LIB = library_notebooks()
FOR_PEOPLE = [p for p in NOTEBOOKS if p not in LIB and p.stem not in NOTEBOOK_ORDER]


@pytest.mark.parametrize('path', [*LIB, *FOR_PEOPLE], ids=lambda p: p.stem)
def test_notebook(path, forks):
    """The cells pass with their defaults, executed as `nbdev_test` does."""
    code, written = forks.execute(path)
    assert code == 0, f'{code}\n{written[-6000:]}'


def test_every_notebook_is_executed():
    """A notebook is a chapter of the library, a stage of the pipeline, or one of the two for
    people.
    """
    assert [p.stem for p in FOR_PEOPLE] == ['09_explore', 'index']
    chain = [ROOT / 'nbs' / f'{name}.ipynb' for name in NOTEBOOK_ORDER]
    assert sorted([*LIB, *FOR_PEOPLE, *chain]) == NOTEBOOKS


@pytest.mark.parametrize(
    'cell, said', [('1 / 0', 'ZeroDivisionError'), ('import os; os._exit(3)', '')]
)
def test_a_failing_notebook_fails(cell, said, forks, tmp_path):
    """An error in a cell, and a kernel that ends, are failures with what was written."""
    from nbformat.v4 import new_code_cell, new_notebook, writes

    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'settings.ini').write_text((ROOT / 'settings.ini').read_text())
    nb = new_notebook(cells=[new_code_cell("print('before')"), new_code_cell(cell)])
    nb.metadata['kernelspec'] = dict(display_name='python3', language='python', name='python3')
    (tmp_path / 'nbs' / 'x.ipynb').write_text(writes(nb))
    code, written = forks.execute(tmp_path / 'nbs' / 'x.ipynb')
    assert code == (3 if 'exit' in cell else 1) and said in written
    assert forks.execute(tmp_path / 'nbs' / 'x.ipynb', seconds=0)[0] == 'no end within 0 s'
