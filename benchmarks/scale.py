"""Measure memory and time of training steps on small shapes beside what `clear_nb.scale` says.

    .venv/bin/python benchmarks/scale.py --out results/paper

Each shape runs in processes of its own, with one CPU thread in fp32. Memory is the highest
resident set of the process over three updates, less what the process held before the model was
built. The allocator gives freed tensors back at once: its own reserve of freed memory, up to a
third more here, is no part of the estimate. Seconds are processor seconds of a second process
with the usual allocator; from them follows the share of matrix speed that training reaches.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from generation import SHAPES, build, prompt, small_config

from clear_nb.core import torch_rng
from clear_nb.model import freeze
from clear_nb.presets import load_preset
from clear_nb.ranks import ranks_of
from clear_nb.records import write_record
from clear_nb.scale import StagePlan, Tokens, training_flops, training_memory
from clear_nb.sft import sft_loss
from clear_nb.train import accelerator, optimizer, update
from clear_nb.trajectory import Gap, LatentSegment, TextSegment, VitSegment

QUESTION = 40  # tokens of the question


def resident(name='VmRSS') -> int:
    """Read how many bytes the process holds, or with VmHWM the most it ever held."""
    with open('/proc/self/status', encoding='utf-8') as status:
        line = next(line for line in status if line.startswith(name + ':'))
    return int(line.split()[1]) * 1024


def trajectory(model, z, generated, k):
    """Make a trajectory of stage 2: picture, question, thought, noised and clean latent, answer."""

    def words(n):
        return TextSegment(prompt(model, n, k)[0].ids, loss=True)

    def noise(i):
        return torch.randn(z.shape, generator=torch_rng('scale', k, i))

    side = z.shape[-1] // model.cfg.latent_patch * model.cfg.vit.patch
    image = torch.rand(3, side, side, generator=torch_rng('scale image', k)) * 2 - 1
    return [
        LatentSegment(noise(0)),
        VitSegment(image),
        *prompt(model, QUESTION, k),
        words(generated // 2 + 2),
        LatentSegment(noise(1), 0.5, noise(2)),
        LatentSegment(noise(1)),
        Gap(),
        words(generated - generated // 2 + 2),
    ]


def token_numbers(cells, generated):
    """Count the same trajectory, with two end tokens per segment; cells: of one picture."""
    return Tokens(cells + 2, cells + 2, QUESTION, generated + 4)


def matrix_speed() -> float:
    """Measure operations per second of a large matrix product."""
    ones, repeats = torch.ones(1024, 1024), 20
    start = time.process_time()
    for _ in range(repeats):
        ones @ ones
    return repeats * 2 * 1024**3 / (time.process_time() - start)


def run_updates(shape, rows, generated):
    """Train one shape for three updates and print what they took as JSON."""
    torch.set_num_threads(1)
    ranks = ranks_of(accelerator('no'))
    empty = resident()
    model, z = build(shape)
    freeze(model.requires_grad_(True).train(), 'vae.', 'vit_model.')
    batch = [trajectory(model, z, generated, k) for k in range(rows)]
    opt, seconds = optimizer(model, 1e-4), []
    for step in range(3):
        start = time.process_time()
        update(model, opt, sft_loss(model, batch, 0.5, 0.0)[0], ranks, f'step {step}')
        seconds.append(time.process_time() - start)
    speed = matrix_speed()
    tokens = token_numbers((z.shape[-1] // model.cfg.latent_patch) ** 2, generated)
    operations = rows * training_flops(model.cfg, tokens, False)
    measured = resident('VmHWM') - empty
    reached = operations / min(seconds) / speed
    print(json.dumps(dict(measured=measured, seconds=min(seconds), reached=reached)))


def in_own_process(shape, rows, generated, **environment):
    """Return what `run_updates` prints in a process of its own."""
    command = [sys.executable, __file__, '--child', shape]
    command += ['--rows', str(rows), '--generated', str(generated)]
    env = dict(os.environ, OMP_NUM_THREADS='1', **environment)
    done = subprocess.run(command, capture_output=True, encoding='utf-8', env=env)
    if done.returncode:
        raise RuntimeError(f'{shape}, {rows} rows:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape, rows, generated):
    """Measure and estimate one shape."""
    freeing = dict(MALLOC_MMAP_THRESHOLD_='65536')  # freed tensors go back at once
    memory = in_own_process(shape, rows, generated, **freeing)
    speed = in_own_process(shape, rows, generated)
    cfg, side = small_config(shape), SHAPES[shape][-1]
    tokens = token_numbers(side**2, generated)
    plan = StagePlan(micro=rows, checkpoint=False, foreach=False, dtype=torch.float32)
    estimated = training_memory(cfg, tokens.all, tokens.generated, plan)['total']
    found = dict(shape=shape, rows=rows, generated=generated, estimated=estimated)
    return found | speed | dict(measured=memory['measured'])


def line(found) -> str:
    """Describe one measurement in a line."""
    measured, estimated = found['measured'] / 2**20, found['estimated'] / 2**20
    return (
        f'{found["shape"]:>5}, {found["rows"]:2} rows: {measured:7.0f} MiB measured, '
        f'{estimated:7.0f} estimated, ratio {estimated / measured:.2f}; '
        f'{found["seconds"]:.2f} s, {100 * found["reached"]:.0f} % of matrix speed'
    )


def main(argv=None):
    """Measure the chosen shapes, print one line each, and write a record if asked to."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--shapes', nargs='+', default=list(SHAPES), choices=list(SHAPES))
    p.add_argument('--rows', type=int, nargs='+', default=[2, 8], help='trajectories per update')
    p.add_argument('--generated', type=int, default=64, help='trained tokens of a trajectory')
    p.add_argument('--child', choices=list(SHAPES), help='only this shape, in this process')
    p.add_argument('--out', type=Path, help='folder for the record; without it nothing is written')
    a = p.parse_args(argv)
    if a.child:
        return run_updates(a.child, a.rows[0], a.generated)
    found = [measure(shape, rows, a.generated) for shape in a.shapes for rows in a.rows]
    for measurement in found:
        print(line(measurement))
    if a.out:
        print(write_record('scale', dict(memory=found), load_preset('paper'), 0, root=a.out))
    return found


if __name__ == '__main__':
    main()
