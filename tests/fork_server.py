"""A process that has the heavy imports already, and forks for each notebook and each kernel that is asked for.

Importing torch, transformers and diffusers takes ten seconds of a core, more than the lessons of most notebooks. A fork begins
where these imports end, and nothing that one notebook changes is seen by the next one. The package itself is imported
after the fork, so a kernel may use another copy of it.

`python tests/fork_server.py serve SOCKET` is the server, `python tests/fork_server.py kernel SOCKET -f FILE` stands in a
kernel specification in place of `python -m ipykernel_launcher -f FILE`.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = [
    *('numpy', 'pandas', 'scipy.stats', 'numba', 'cv2', 'PIL.Image', 'pyarrow.parquet', 'einops'),
    *('torch', 'torch.nn.attention.flex_attention', 'accelerate', 'safetensors.torch'),
    *('transformers.models.qwen2.modeling_qwen2', 'transformers.models.siglip.modeling_siglip'),
    *('diffusers.models.autoencoders.autoencoder_kl', 'datasets', 'openai', 'httpx2', 'jinja2'),
    *('matplotlib.pyplot', 'ipywidgets', 'nbdev.test', 'nbdev.export', 'ipykernel.kernelapp'),
]


def run_notebook(path: str):
    """Execute the cells of a notebook as `nbdev_test` does; SystemExit unless all of them pass."""
    from nbdev.config import get_config
    from nbdev.test import test_nb

    config = get_config(path=path)
    base = config.config_path
    if not test_nb(Path(path), skip_flags=config.tst_flags.split(), basepath=base)[0]:
        raise SystemExit(1)


def run_kernel(arguments: list):
    """Be a kernel until it is told to end; arguments: those of `ipykernel_launcher`."""
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(arguments)


def job(kind: str, what, cwd: str, env: dict, out: str):
    """Do what is asked for in this process, which then ends."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        written = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(written, 1), os.dup2(written, 2)
        os.environ.clear(), os.environ.update(env), os.chdir(cwd)
        # as Python would begin: the folders of PYTHONPATH first
        sys.path[:0] = [p for p in env.get('PYTHONPATH', '').split(os.pathsep) if p]
        dict(notebook=run_notebook, kernel=run_kernel)[kind](what)
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def supervise(connection: socket.socket):
    """Fork for one request, wait for its end, and end it when its time is over or nobody waits
    any more.
    """
    asked = json.loads(connection.makefile('r').readline())
    seconds = asked.pop('seconds')
    if not (pid := os.fork()):
        connection.close()
        job(**asked)
    until, code = time.monotonic() + seconds, f'no end within {seconds} s'
    connection.setblocking(False)
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        try:
            if connection.recv(1) == b'':
                break  # the other end is gone
        except BlockingIOError:
            time.sleep(0.02)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    connection.setblocking(True)
    connection.sendall((json.dumps(code) + '\n').encode())


def serve(place: str):
    """Import, then fork for each request."""
    sys.path.remove(str(Path(__file__).parent))  # no notebook may import a test
    for name in PRELOAD:
        importlib.import_module(name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f'{place}.tmp'), listening.listen()
    os.rename(f'{place}.tmp', place)
    listening.settimeout(2)
    children, parent = set(), os.getppid()
    while os.getppid() == parent:  # a test process that is gone asks for nothing more
        children = {pid for pid in children if not os.waitpid(pid, os.WNOHANG)[0]}
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            continue
        if not (pid := os.fork()):
            listening.close()
            try:
                supervise(connection)
            except OSError:
                pass  # the other end is gone
            finally:
                os._exit(0)
        connection.close()
        children.add(pid)


def ask(place: str, seconds: float, **asked):
    """Have something done; its exit status, or a text when it did not end in time."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(seconds + 60)
        s.connect(place)
        s.sendall((json.dumps(dict(asked, seconds=seconds)) + '\n').encode())
        return json.loads(s.makefile('r').readline())


class ForkServer:
    """A server in a folder of its own; `execute` runs a notebook, `kernels` is a folder for
    JUPYTER_PATH.
    """

    def __init__(self, folder: Path):
        self.place, self.log = str(folder / 's'), folder / 'log'
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONPATH': ''}
        with self.log.open('w') as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, 'serve', self.place],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                cwd=folder,
                start_new_session=True,
            )
        self.kernels = folder / 'jupyter'
        (self.kernels / 'kernels' / 'python3').mkdir(parents=True)
        argv = [sys.executable, __file__, 'kernel', self.place, '-f', '{connection_file}']
        spec = dict(argv=argv, display_name='python3', language='python')
        (self.kernels / 'kernels' / 'python3' / 'kernel.json').write_text(json.dumps(spec))

    def ready(self, seconds=300):
        """Wait until the imports are done."""
        until = time.monotonic() + seconds
        while not os.path.exists(self.place):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f'no server of forks: {self.log.read_text()[-3000:]}')
            time.sleep(0.05)
        return self

    def execute(self, path: Path, seconds=840, **env) -> tuple:
        """Execute a notebook; its exit status (a text when it did not end) and what it wrote."""
        with tempfile.NamedTemporaryFile('r', suffix='.out', errors='replace') as out:
            env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **env}
            asked = dict(kind='notebook', what=str(path), cwd=str(ROOT), env=env, out=out.name)
            return ask(self.ready().place, seconds, **asked), out.read()

    def close(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


if __name__ == '__main__':
    kind, place, *rest = sys.argv[1:]
    if kind == 'serve':
        serve(place)
    env = {
        k: v for k, v in os.environ.items() if k != 'JPY_PARENT_PID'
    }  # its parent is not Jupyter
    asked = dict(kind='kernel', what=rest, cwd=os.getcwd(), env=env, out=f'{place}.kernels')
    sys.exit(ask(place, 3600, **asked))
