"""Kill a stage at random moments with SIGKILL and start it again.

Its weights are compared with those of an undisturbed run.

python tests/kill_resume.py 20          # 20 kills over SFT, bridge and GRPO at preset smoke
"""

import argparse
import copy
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from processes import waited
from safetensors.torch import load_file, save_file
from stage_toys import STAGES, smoke, train, world

from clear_nb import grpo
from clear_nb import train as loop
from clear_nb.core import rng
from clear_nb.train import accelerator, saved_states

MOMENTS = dict(
    sft=('update', 'saving'), bridge=('update', 'saving'), grpo=('rollouts', 'update', 'saving')
)
CHANGES = {
    'sft.ema': 0.9,
    'grpo.beta': 0.04,
    'grpo.lr': 1e-3,
    'grpo.max_new_tokens': 5,
    'grpo.policy': 'always',
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Trap:
    """Wrap what happens at a moment, so that the process dies in the middle of it at a step."""

    def __init__(self, moment, step, after):
        self.moment, self.left, self.after = (
            moment,
            step,
            after,
        )  # after: share of the moment's work that is done first

    def rollouts(self, plain):
        def f(*a, **k):
            if self.left == 0:
                plain(*a[:2], a[2][:1], *a[3:], **k)
                die()
            self.left -= 1
            return plain(*a, **k)

        return f

    def update(self, plain):
        def f(*a):
            if self.left == 0:
                a[2].requires_grad and self.after > 0.5 and a[2].backward(retain_graph=True)
                die()
            self.left -= 1
            return plain(*a)

        return f

    def saving(self, plain):
        def f(tensors, path, info):
            plain(tensors, path, info)
            if self.left == 0:
                if self.after < 0.7:
                    os.truncate(path, int(os.path.getsize(path) * self.after))  # half written
                die()
            self.left -= 1

        return f

    def __enter__(self):
        where, name = dict(
            rollouts=(grpo, 'rollout_batch'), update=(loop, 'update'), saving=(loop, 'save_file')
        )[self.moment]
        self.patch = patch.object(where, name, getattr(self, self.moment)(getattr(where, name)))
        self.patch.start()


def run(stage, made, out, name, trap=None):
    """Train a stage to its end, or to its death; the weights go to a file."""
    if trap:
        trap.__enter__()
    model = copy.deepcopy(made[0])

    def save(m, history):
        return save_file(
            {k: v.clone() for k, v in m.state_dict().items()}, out / f'{name}.safetensors'
        )

    train(
        stage,
        smoke(6, **CHANGES),
        (model, *made[1:]),
        acc=accelerator('no'),
        state=out / f'{name}_state.pt',
        done=save,
    )


def forked(*args):
    """Run in a child process; its wait status."""
    if not (pid := os.fork()):
        code = 1
        try:
            run(*args)
            code = 0
        finally:
            os._exit(code)
    return waited([pid])[0]


def timed_kill(stage, made, out, name, seconds):
    """Run in a child and kill it from outside after a while; True if it was still alive."""
    if not (pid := os.fork()):
        code = 1
        try:
            run(stage, made, out, name)
            code = 0
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(waited([pid])[0])


def main(kills, seed=0):
    """Print a table; the number of runs that ended at other weights."""
    made, wrong, took = world(smoke(6, **CHANGES)), 0, {}
    print(f'{"moment":<10}{"stage":<8}{"step":<14}{"states left":<12}equal')
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for stage in STAGES:
            start = time.monotonic()
            assert forked(stage, made, out, stage) == 0, f'{stage} failed undisturbed'
            took[stage] = time.monotonic() - start
        for n in range(kills):
            g, stage, name = rng('kill', seed, n), STAGES[n % 3], f'kill{n}'
            moment = (*MOMENTS[stage], 'any')[g.integers(len(MOMENTS[stage]) + 1)]
            if moment == 'any':
                at = g.random() * took[stage]
                while not timed_kill(stage, made, out, name, at):
                    at /= 2  # it was done already
                died, when = True, f'{at:.2f} s'
            else:
                step = int(g.integers(6))
                status = forked(stage, made, out, name, Trap(moment, step, g.random()))
                died, when = (
                    os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
                    str(step),
                )
            left = len(saved_states(out / f'{name}_state.pt'))
            again = forked(stage, made, out, name) if died else 0
            want, found = (
                (load_file(out / f'{k}.safetensors') for k in (stage, name))
                if not again
                else ({}, {})
            )
            equal = (
                died
                and not again
                and want.keys() == found.keys()
                and all(torch.equal(v, found[k]) for k, v in want.items())
                and not saved_states(out / f'{name}_state.pt')
            )
            print(
                f'{moment:<10}{stage:<8}{when:<14}{left:<12}{"yes" if equal else "NO"}', flush=True
            )
            wrong += not equal
    return wrong


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('kills', type=int, nargs='?', default=20)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.kills, options.seed))
