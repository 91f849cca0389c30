"""Memory and time of training steps on small shapes, each in a process of its own, beside what `clear_nb.scale` says.

    .venv/bin/python benchmarks/scale.py --out results/paper

One CPU thread in fp32. Memory is the highest resident set of the process over three updates, less what it held before the model was built, with an allocator
that gives freed tensors back at once; its own reserve of freed memory, up to a third more here, is no part of the estimate.
Seconds are processor seconds of a second process with the usual allocator; from them follows the share of matrix speed that training reaches.
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

from clear_nb.core import load_preset, torch_rng, write_record
from clear_nb.model import freeze
from clear_nb.ranks import ranks_of
from clear_nb.scale import StagePlan, Tokens, training_flops, training_memory
from clear_nb.sft import sft_loss
from clear_nb.train import accelerator, optimizer, update
from clear_nb.trajectory import Gap, LatentSegment, TextSegment, VitSegment


def resident(name='VmRSS') -> int:
    "Bytes that the process holds, or with VmHWM the most it ever held"
    line = next(l for l in open('/proc/self/status') if l.startswith(name + ':'))
    return int(line.split()[1]) * 1024


def row(model, z, said, k):
    "A trajectory of stage 2: degraded picture, question, thought, noised and clean latent, answer"
    side = z.shape[-1] // model.cfg.latent_patch * model.cfg.vit.patch
    words = lambda n: TextSegment(prompt(model, n, k)[0].ids, loss=True)
    noise = lambda i: torch.randn(z.shape, generator=torch_rng('scale', k, i))
    image = torch.rand(3, side, side, generator=torch_rng('scale image', k)) * 2 - 1
    return [
        LatentSegment(noise(0)),
        VitSegment(image),
        *prompt(model, 40, k),
        words(said // 2 + 2),
        LatentSegment(noise(1), 0.5, noise(2)),
        LatentSegment(noise(1)),
        Gap(),
        words(said - said // 2 + 2),
    ]


def tokens(model, z, said):
    "The same in numbers, two end tokens per segment"
    latent = (z.shape[-1] // model.cfg.latent_patch) ** 2 + 2
    return Tokens(latent, latent, 40, said + 4)


def child(shape, rows, said):
    "Three updates of one shape, printed as JSON"
    torch.set_num_threads(1)
    ranks = ranks_of(accelerator('no'))
    empty = resident()
    model, z = build(shape)
    freeze(model.requires_grad_(True).train(), 'vae.', 'vit_model.')
    batch, opt, seconds = [row(model, z, said, k) for k in range(rows)], optimizer(model, 1e-4), []
    for step in range(3):
        start = time.process_time()
        update(model, opt, sft_loss(model, batch, 0.5, 0.0)[0], ranks, f'step {step}')
        seconds.append(time.process_time() - start)
    n = torch.ones(1024, 1024)
    start = time.process_time()
    for _ in range(20):
        n @ n
    matrix = 20 * 2 * 1024**3 / (time.process_time() - start)
    t = tokens(model, z, said)
    print(
        json.dumps(
            dict(
                measured=resident('VmHWM') - empty,
                seconds=min(seconds),
                reached=rows * training_flops(model.cfg, t, False) / min(seconds) / matrix,
            )
        )
    )


def alone(shape, rows, said, **environment):
    "What `child` prints, from a process of its own"
    command = [sys.executable, __file__, '--child', shape, '--rows', str(rows), '--said', str(said)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1', **environment),
    )
    if done.returncode:
        raise RuntimeError(f'{shape}, {rows} rows:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape, rows, said):
    "Measured and estimated numbers of one shape"
    memory, speed = (
        alone(shape, rows, said, MALLOC_MMAP_THRESHOLD_='65536'),
        alone(shape, rows, said),
    )  # 65536: freed tensors go back at once
    cfg, side = small_config(shape), SHAPES[shape][-1]
    t = Tokens(side**2 + 2, side**2 + 2, 40, said + 4)
    plan = StagePlan(micro=rows, checkpoint=False, foreach=False, dtype=torch.float32)
    return dict(
        shape=shape,
        rows=rows,
        said=said,
        estimated=training_memory(cfg, t.all, t.said, plan)['total'],
        **speed | dict(measured=memory['measured']),
    )


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--shapes', nargs='+', default=list(SHAPES), choices=list(SHAPES))
    p.add_argument('--rows', type=int, nargs='+', default=[2, 8], help='trajectories per update')
    p.add_argument('--said', type=int, default=64, help='trained tokens of a trajectory')
    p.add_argument('--child', choices=list(SHAPES), help='only this shape, in this process')
    p.add_argument('--out', type=Path, help='folder for the record; without it nothing is written')
    a = p.parse_args(argv)
    if a.child:
        return child(a.child, a.rows[0], a.said)
    found = [measure(s, r, a.said) for s in a.shapes for r in a.rows]
    for f in found:
        print(
            f'{f["shape"]:>5}, {f["rows"]:2} rows: {f["measured"] / 2**20:7.0f} MiB measured, {f["estimated"] / 2**20:7.0f} estimated, ratio {f["estimated"] / f["measured"]:.2f}; {f["seconds"]:.2f} s, {100 * f["reached"]:.0f} % of matrix speed'
        )
    if a.out:
        print(write_record('scale', dict(memory=found), load_preset('paper'), 0, root=a.out))
    return found


if __name__ == '__main__':
    main()
