"""Processes that tests start: none of them can outlive its time or keep a test waiting for ever."""

import os
import signal
import subprocess
import sys
import tempfile
import time

from clear_nb.core import ROOT


def waited(pids, seconds=120):
    """Wait statuses of forked children in their order; those that are alive after `seconds` are
    killed and TimeoutError names them.
    """
    left, status, until = set(pids), {}, time.monotonic() + seconds
    while left and time.monotonic() < until:
        for pid in sorted(left):
            done, how = os.waitpid(pid, os.WNOHANG)
            if done:
                status[pid] = how
                left.discard(pid)
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if left:
        raise TimeoutError(
            f'child {[list(pids).index(k) for k in sorted(left)]} of {len(pids)} '
            f'did not end within {seconds} s'
        )
    return [status[pid] for pid in pids]


def python(*args, seconds=300, cwd=ROOT, **env):
    """Run this Python with a package path and one thread, in a process group that ends with it;
    returns a CompletedProcess with text.
    """
    env = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')]),
        'OMP_NUM_THREADS': '1',
        'PYTHONUNBUFFERED': '1',
        **env,
    }  # unbuffered: a forked child would print again what its parent still holds
    text = dict(mode='w+', encoding='utf-8', errors='backslashreplace')
    with (
        tempfile.TemporaryFile(**text) as out,
        tempfile.TemporaryFile(**text) as err,
    ):  # files: a grandchild that holds a pipe would keep the reader waiting
        p = subprocess.Popen(
            [sys.executable, *map(str, args)],
            env=env,
            stdout=out,
            stderr=err,
            cwd=cwd,
            start_new_session=True,
        )
        try:
            code = p.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f'no end within {seconds} s'
        finally:
            try:
                os.killpg(p.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            p.wait()
        for f in (out, err):
            f.seek(0)
        return subprocess.CompletedProcess(p.args, code, out.read(), err.read())
