"""Presets and the notebooks that take them."""

import re

import pytest

from clear_nb.core import PATHS, ROOT
from clear_nb.identity import notebook_code
from clear_nb.pipeline import SUMMARY_NOTEBOOKS, notebook_parameters
from clear_nb.presets import load_preset, preset_names

PIPELINE = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))
FOR_PEOPLE = {'09_explore'}  # opens the shipped model, which takes seconds as well


@pytest.mark.parametrize('name', preset_names())
def test_preset_loads(name):
    """Every file in params/ is complete and well typed."""
    assert load_preset(name).name == name


@pytest.mark.parametrize('name', preset_names())
def test_every_value_quotes_its_source(name):
    """Each line with a value has a comment that names the paper, the authors' script, BAGEL's
    release or our reason.
    """
    for line in (PATHS.params / f'{name}.yaml').read_text().splitlines():
        if re.match(r'\s*[\w-]+:\s*[^\s#]', line):
            assert re.search(r'# (paper|authors|ours|BAGEL)\b.*\w', line), (
                f'{name}.yaml: {line.strip()}'
            )


@pytest.mark.parametrize('path', PIPELINE, ids=lambda p: p.stem)
def test_parameters_cell(path):
    """One cell tagged `parameters`; its defaults are the smoke values."""
    known = notebook_parameters(path)
    assert known['preset'].strip('\'"') == ('tiny' if path.stem in FOR_PEOPLE else 'smoke')
    assert ('seed' in known) == (path.stem not in SUMMARY_NOTEBOOKS)


@pytest.mark.parametrize('path', PIPELINE, ids=lambda p: p.stem)
def test_pipeline_notebook_is_thin(path):
    """Pipeline notebooks call the library; they export nothing and never export the library."""
    assert not re.search(r'^#\|\s*(export|default_exp)', notebook_code(path), flags=re.M)
    assert 'nbdev_export' not in notebook_code(path)
