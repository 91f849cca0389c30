"""Compare trajectories in shared rows with one row each: padding, pairs of attention, seconds.

    .venv/bin/python benchmarks/packing.py --shapes tiny 100m --out packing.json

The weights are random and the batch is as in stage 1: half of the trajectories restore, half answer
at once; pictures and texts differ in size. All budgets are run in turns in one process and must
give the same loss; on a CPU one thread and processor seconds are counted. Linear layers never see
padding, so only attention can gain or lose. With the dense mask a row of L places costs L² pairs,
whatever the places hold; on a GPU flex attention skips the blocks of 128 x 128 pairs in which
nothing is visible.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from generation import SHAPES, build, in_turns, prompt, ratio

from clear_nb.core import rng, torch_rng
from clear_nb.model import freeze
from clear_nb.mot import block_mask, visible
from clear_nb.sft import sft_loss
from clear_nb.trajectory import (
    Gap,
    LatentSegment,
    TextSegment,
    VitSegment,
    pack,
    to_device,
    tokens_of,
)


def trajectory(model, side, k):
    """A direct (odd `k`) or restoring (even `k`) trajectory about a picture of up to side x side
    tokens
    """
    g, cfg = rng('packing', side, k), model.cfg
    h, w = (int(n) for n in g.integers(side // 2, side + 1, 2))

    def noise(i):
        return torch.randn(
            cfg.vae.z,
            h * cfg.latent_patch,
            w * cfg.latent_patch,
            generator=torch_rng('packing', k, i),
        )

    def words(low, high):
        return TextSegment(prompt(model, int(g.integers(low, high)), k)[0].ids, loss=True)

    seen = [
        LatentSegment(noise(0)),
        VitSegment(
            torch.rand(3, h * cfg.vit.patch, w * cfg.vit.patch, generator=torch_rng('image', k)) * 2
            - 1
        ),
        *prompt(model, int(g.integers(20, 60)), k),
    ]
    if k % 2:
        return [*seen, words(20, 60)]
    return [
        *seen,
        words(20, 40),
        LatentSegment(noise(1), float(g.uniform(0.05, 1.0)), noise(2)),
        LatentSegment(noise(1)),
        Gap(),
        words(20, 60),
    ]


def used(layout):
    """Share of padding, pairs of attention that are computed with the dense mask, and those in
    blocks that flex attention does not skip
    """
    R, L = layout.sample.shape
    kept = sum(
        int(n.sum())
        for n in (
            block_mask(layout, layout).kv_num_blocks,
            block_mask(layout, layout).full_kv_num_blocks,
        )
        if n is not None
    )
    return dict(
        rows=R,
        length=L,
        padding=(layout.sample == 0).double().mean().item(),
        pairs=R * L * L,
        visible=int(visible(layout, layout).sum()),
        blocks=kept * 128 * 128,
    )


def measure(shape, n, budgets, repeats, device):
    "Numbers of one shape; the first budget is 0, one row each"
    model, _ = build(shape, device)
    freeze(model.requires_grad_(True).train(), 'vae.', 'vit_model.')
    batch = [trajectory(model, SHAPES[shape][-1], k) for k in range(n)]
    longest = max(sum(tokens_of(s, model.shape) for s in t) for t in batch)
    out, losses = [], {}

    def job(budget):
        def run():
            model.row_tokens = budget
            loss = sft_loss(model, batch, 0.5, 0.0)[0]
            losses[budget] = loss.item()
            loss.backward()
            model.zero_grad()

        return lambda: run

    sizes = [int(longest * b) for b in budgets]
    times = in_turns({b: job(b) for b in sizes}, repeats, device)
    for b in sizes:
        assert abs(losses[b] - losses[0]) < 1e-5 * losses[0], (b, losses)
        layout = to_device(pack(batch, model.shape, row_tokens=b), device).layout
        out.append(
            dict(
                shape=shape,
                device=device,
                trajectories=n,
                budget=b,
                **used(layout),
                seconds=statistics.median(times[b]),
                speed=ratio(times, 0, b),
            )
        )
    return out


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--shapes', nargs='+', default=['tiny', '100m'], choices=list(SHAPES))
    p.add_argument('--trajectories', type=int, default=16)
    p.add_argument(
        '--budgets',
        type=float,
        nargs='+',
        default=[1, 2, 4],
        help='tokens of a shared row, in lengths of the longest trajectory',
    )
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--device', default='cpu')
    p.add_argument('--out', type=Path, help='file for the numbers; without it nothing is written')
    a = p.parse_args(argv)
    if a.device == 'cpu':
        torch.set_num_threads(1)
    found = [
        row
        for s in a.shapes
        for row in measure(s, a.trajectories, [0, *a.budgets], a.repeats, a.device)
    ]
    print(
        'shape  budget  rows x length  padding  pairs/visible  blocks/visible  '
        'seconds  faster than one row each'
    )
    for f in found:
        print(
            f'{f["shape"]:>5}  {f["budget"]:6}  {f["rows"]:4} x {f["length"]:<6}  '
            f'{f["padding"]:7.0%}  {f["pairs"] / f["visible"]:13.1f}  '
            f'{f["blocks"] / f["visible"]:14.1f}  {f["seconds"]:7.2f}  '
            f'{f["speed"]["median"]:.2f} ({f["speed"]["min"]:.2f} to {f["speed"]["max"]:.2f})'
        )
    if a.out:
        a.out.write_text(json.dumps(found, indent=1), encoding='utf-8')
    return found


if __name__ == '__main__':
    main()
