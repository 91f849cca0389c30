"""pyproject.toml, environment.yml and settings.ini agree."""

import configparser
import re
import tomllib

import yaml

import clear_nb
from clear_nb.core import ROOT

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
CONDA = yaml.safe_load((ROOT / 'environment.yml').read_text())['dependencies']
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / 'settings.ini')


def test_conda_equals_pip():
    """The pip section of environment.yml repeats the dependencies, in order."""
    assert CONDA[-1]['pip'] == PROJECT['dependencies']


def test_python_versions():
    """One range of Python versions everywhere."""
    assert f'python{PROJECT["requires-python"]}' == CONDA[0]
    assert (
        SETTINGS['DEFAULT']['min_python'] == re.match(r'>=([\d.]+)', PROJECT['requires-python'])[1]
    )


def test_every_dependency_is_bounded():
    """Each has a lower and an upper bound, or one exact version."""
    extras = [d for group in PROJECT['optional-dependencies'].values() for d in group]
    for d in [*PROJECT['dependencies'], *extras]:
        assert re.fullmatch(r'[A-Za-z0-9_.\[\]-]+(==[\d.]+|>=[\d.]+,<[\d.]+)', d), d


def test_nbdev_pins():
    """nbdev 2 only works with these (nbdev 3 refuses settings.ini)."""
    pins = {re.match('[a-z-]+', d)[0]: d for d in PROJECT['dependencies']}
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
