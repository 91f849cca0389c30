"""Ctrl-C, SIGTERM and SIGHUP end a command and all its children with status 128 + the signal; what was
finished is kept, and the same command goes on.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from clear_nb.cli import main
from clear_nb.core import ROOT
from clear_nb.evaluate import read_replies

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def names_of(numbers):
    return [signal.Signals(n).name for n in numbers]


def start(arguments, **env):
    """Start a command as a shell does, in a group of its own and with no signal ignored."""

    def plain():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, '-m', 'clear_nb.cli', *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT / 'tests'), **env},
        preexec_fn=plain,
    )


def stop(process, ready, number):
    """Send a signal once `ready` says so; return status, standard error and children before."""
    try:
        end = time.monotonic() + 90
        while process.poll() is None and not ready() and time.monotonic() < end:
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        gone, alive = psutil.wait_procs(children, timeout=10)
        return process.returncode, said, children, alive
    finally:
        process.kill()


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Twelve rows about drawn scenes."""
    out = tmp_path_factory.mktemp('signals') / 'built'
    scenes = ['corrupt', '--scenes', 'mmstar', '--n', '6', '--severity', 'low', '--out', str(out)]
    assert main(scenes) == 0
    return out


@pytest.mark.parametrize('number', SIGNALS, ids=names_of(SIGNALS))
def test_bench(built, tmp_path, number, monkeypatch):
    """Replies of finished batches are kept; the same command asks the others only."""
    (tmp_path / 'log').touch()
    (tmp_path / 'waits.py').write_text(
        'import os, time\n'
        'def waits(picture, prompt):\n'
        '    with open(os.environ["ASKED"], "a", encoding="utf-8") as f: f.write("x")\n'
        '    time.sleep(float(os.environ["PAUSE"]))\n'
        '    return "B"\n',
        encoding='utf-8',
    )
    out, log = tmp_path / 'run', tmp_path / 'log'
    command = ['bench', '--model', 'python:waits:waits', '--data', built, '--out', out]
    command += ['--batch', '1']
    path = f'{tmp_path}{os.pathsep}{ROOT / "tests"}'
    process = start(command, ASKED=str(log), PAUSE='0.3', PYTHONPATH=path)
    status, said, _, alive = stop(process, lambda: log.stat().st_size > 3, number)
    assert (status, alive) == (128 + number, []), said
    assert 'Traceback' not in said and 'the same command goes on' in said.splitlines()[-1]
    kept, asked = len(read_replies(out)), log.stat().st_size
    assert 3 <= kept <= asked < 12
    again = start(command, ASKED=str(log), PAUSE='0', PYTHONPATH=path)
    assert again.wait(90) == 0 and log.stat().st_size - asked == 12 - kept


@pytest.mark.parametrize('number', SIGNALS, ids=names_of(SIGNALS))
def test_corrupt(tmp_path, number):
    """Workers end with the command, and the folder is finished by the same command."""
    out = tmp_path / 'built'
    command = ['corrupt', '--scenes', 'mmstar', '--n', '150', '--design', 'full', '--out', out]
    command += ['--workers', '2', '--severity', 'low']

    def is_writing():
        return any(Path(out).rglob('*')) and len(psutil.Process(process.pid).children()) > 1

    process = start(command)
    status, said, children, alive = stop(process, is_writing, number)
    assert (status, alive) == (128 + number, []), said
    assert len(children) >= 2 and 'Traceback' not in said
    assert 'finished files are kept' in said.splitlines()[-1]
    assert not (out / 'info.json').exists()
