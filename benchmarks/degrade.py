"""Time the 16 corruptions against their plain reference, and two workers against one.

    .venv/bin/python benchmarks/degrade.py --size 512 --out degrade.json

The picture is a synthetic photo. Fast and plain run in turns, in one process with one OpenCV
thread, and change places each round. Processor seconds are counted, without the first call, which
compiles mean shift. Workers are timed by the clock, so nothing else should run. Only ratios carry
over to other machines.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import cv2
import degrade_reference
import numpy as np

from clear_nb.core import rng
from clear_nb.degrade import CORRUPTIONS, SEVERITY, UnchangedWarning, degrade, degrade_many


def photo(size, key=0):
    "Make a seeded picture with shading, blotches of all sizes, hard edges and grain."
    g = rng('benchmark', 'photo', key)
    octaves = [
        cv2.resize(g.normal(0, 1, (n, n, 3)), (size, size), interpolation=cv2.INTER_CUBIC)
        * 60
        / n**0.5
        for n in (2, 4, 8, 16, 32, 64)
    ]
    x = 120 + sum(octaves)
    for cx, cy, r in g.integers(0, size, (12, 3)).tolist():
        cv2.ellipse(
            x, (cx, cy), (r // 4 + 1, r // 8 + 1), r, 0, 360, g.uniform(0, 255, 3).tolist(), -1
        )
    return np.clip(x + g.normal(0, 4, x.shape), 0, 255).astype(np.uint8)


def seconds(f, name, severity, x, seed, calls):
    "Measure the processor seconds of one call, a mean over several."
    keys = [rng('benchmark', name, severity, seed, k) for k in range(calls)]
    start = time.process_time()
    for g in keys:
        f(x, name, severity, g)
    return (time.process_time() - start) / calls


def in_turns(name, severity, x, repeats, at_least):
    "Measure the seconds of both in every round, after a first call that is not counted."
    both = {'fast': degrade, 'plain': degrade_reference.degrade}
    first = [seconds(f, name, severity, x, -1, 1) for f in both.values()]
    calls = max(1, int(at_least / max(min(first), 1e-6)))
    rounds = [
        {k: seconds(both[k], name, severity, x, n, calls) for k in (both, reversed(both))[n % 2]}
        for n in range(repeats)
    ]
    return {k: [r[k] for r in rounds] for k in both}


def difference(name, severity, x):
    "Compute the largest difference in grey levels for one draw."
    one, two = (
        f(x, name, severity, rng('benchmark', 'difference')).astype(int)
        for f in (degrade, degrade_reference.degrade)
    )
    return int(abs(one - two).max())


def cell(name, severity, x, repeats, at_least):
    "Collect the milliseconds of both, their ratio, and the difference of the pictures."
    t = in_turns(name, severity, x, repeats, at_least)
    each = [b / a for a, b in zip(t['fast'], t['plain'])]
    return dict(
        fast_ms=1e3 * statistics.median(t['fast']),
        plain_ms=1e3 * statistics.median(t['plain']),
        ratio=statistics.median(each),
        min=min(each),
        max=max(each),
        difference=difference(name, severity, x),
    )


def table(names, x, repeats, at_least):
    "Measure all cells, keyed by 'name severity', and print them row by row."
    print(f'{"plain ms / fast ms = ratio":24}' + ''.join(f'{s:>32}' for s in SEVERITY), flush=True)
    out = {}
    for name in names:
        row = {s: cell(name, s, x, repeats, at_least) for s in SEVERITY}
        print(
            f'{name:24}'
            + ''.join(
                f'{r["plain_ms"]:12.2f} /{r["fast_ms"]:9.2f} = {r["ratio"]:6.2f}'
                for r in row.values()
            ),
            flush=True,
        )
        out |= {f'{name} {s}': r for s, r in row.items()}
    return out


def scaling(cells, size, copies, repeats):
    "Compare the clock seconds of `degrade_many` with one worker and with two."
    names, severities = zip(*[c.split() for c in cells for _ in range(copies)])
    images = [photo(size, k) for k in range(4)]
    images = [images[k % 4] for k in range(len(names))]

    def clock(workers):
        start = time.perf_counter()
        degrade_many(images, names, severities, workers=workers)
        return time.perf_counter() - start

    rounds = [{w: clock(w) for w in ((1, 2), (2, 1))[n % 2]} for n in range(repeats + 1)][1:]
    each = [r[1] / r[2] for r in rounds]
    return dict(
        pictures=len(names),
        median=statistics.median(each),
        min=min(each),
        max=max(each),
        one_worker_s=statistics.median(r[1] for r in rounds),
    )


def batches(names, size, copies, repeats):
    "Measure the speed-up by a second worker; mean shift, the slowest, is a batch of its own."
    quick = [f'{n} {s}' for n in names if n != 'mean_shift' for s in SEVERITY]
    jobs = {'all but mean_shift': (quick, copies), 'mean_shift': (['mean_shift low'], 4 * copies)}
    wanted = {k: v for k, v in jobs.items() if v[0] and (k != 'mean_shift' or k in names)}
    return {k: scaling(cells, size, n, repeats) for k, (cells, n) in wanted.items()}


def report(out):
    "Add the sums below the table, and print them."
    ratios = {k: r['ratio'] for k, r in out['cells'].items()}
    out['geometric_mean'] = statistics.geometric_mean(ratios.values())
    out['slowest'] = min(ratios, key=ratios.get)
    out['largest_difference'] = max(r['difference'] for r in out['cells'].values())
    print(
        f'geometric mean of {len(ratios)} cells {out["geometric_mean"]:.2f} (goal >= 2), '
        f'slowest {out["slowest"]} {ratios[out["slowest"]]:.2f} (goal >= 0.9), '
        f'largest difference {out["largest_difference"]} grey level(s) (goal <= 1)'
    )
    for k, r in out['workers'].items():
        print(
            f'2 workers over 1, {k}, {r["pictures"]} pictures: {r["median"]:.2f} '
            f'({r["min"]:.2f} to {r["max"]:.2f}, goal >= 1.8)',
            flush=True,
        )


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--size', type=int, default=512, help='side of the picture')
    p.add_argument(
        '--only',
        nargs='+',
        default=list(CORRUPTIONS),
        choices=list(CORRUPTIONS),
        metavar='NAME',
        help='some corruptions',
    )
    p.add_argument('--repeats', type=int, default=5, help='rounds')
    p.add_argument(
        '--at-least',
        type=float,
        default=0.02,
        help='seconds that a quick cell is repeated for within a round',
    )
    p.add_argument(
        '--copies',
        type=int,
        default=4,
        help='pictures per cell in the batch for the workers; 0 skips it',
    )
    p.add_argument(
        '--out', type=Path, help='JSON file for the numbers; without it nothing is written'
    )
    a = p.parse_args(argv)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UnchangedWarning)
            out = dict(
                size=a.size,
                repeats=a.repeats,
                opencv=cv2.__version__,
                cells=table(a.only, photo(a.size), a.repeats, a.at_least),
            )
            out['workers'] = batches(a.only, a.size, a.copies, a.repeats) if a.copies else {}
    finally:
        cv2.setNumThreads(threads)
    report(out)
    if a.out:
        a.out.write_text(json.dumps(out, indent=1), encoding='utf-8')
    return out


if __name__ == '__main__':
    main()
