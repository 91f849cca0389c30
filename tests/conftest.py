"""Shared by all tests: one thread per worker, no window, offline; long tests first; one server
of forks per worker.
"""

import os

import hypothesis
import pytest
from fork_server import ForkServer

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

# property tests draw the same examples on every machine, and a slow machine fails none of them
hypothesis.settings.register_profile('suite', derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile('suite')


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Begin with the longest test, so that no worker waits for it at the end."""
    items.sort(key=lambda item: item.get_closest_marker('longest') is None)


@pytest.fixture(scope='session')
def forks(tmp_path_factory):
    """A process that has the heavy imports already and forks for notebooks and kernels."""
    server = ForkServer(tmp_path_factory.mktemp('forks'))
    yield server
    server.close()
