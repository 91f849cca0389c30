"""The training data builder at 5,000 look-alike rows: equal, resumable, disjoint, accounted for,
and flat in memory.

    .venv/bin/python benchmarks/builder.py --rows 2500 5000 --n 800

Writes a look-alike of LLaVA-OneVision with faults in it (tests/builder_rows.py) and builds from it
in fresh processes, with a local annotator that misbehaves. The peak resident memory of an
undisturbed build of each size is compared. A second build of the largest size is killed (SIGKILL)
at random moments until it gets through. Stops with an assertion where something does not hold.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

TESTS = Path(__file__).resolve().parents[1] / 'tests'
sys.path.insert(0, str(TESTS))
from builder_rows import Misbehaving, expected, write_source
from fake_server import FakeServer

from clear_nb.core import rng
from clear_nb.sources import TRAINING_PARTS, BuildRecipe, read_picture


def start(source, out, url, a):
    "A build in a process of its own"
    return subprocess.Popen(
        [
            sys.executable,
            'builder_rows.py',
            str(source),
            str(out),
            url,
            '--n',
            str(a.n),
            '--spare',
            str(a.spare),
            '--base',
            a.base,
            '--workers',
            str(a.workers),
        ],
        cwd=TESTS,
        stdout=subprocess.PIPE,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)])),
    )


def undisturbed(source, out, a):
    "Accounts, peak memory and seconds of one build"
    with FakeServer(default=Misbehaving()) as server:
        begun, p = time.perf_counter(), start(source, out, server.url, a)
        told = p.communicate()[0]
        assert p.returncode == 0
        return json.loads(told) | dict(
            seconds=round(time.perf_counter() - begun, 1),
            requests=len(server.requests),
            different=len(set(map(Misbehaving.name, server.requests))),
        )


def _bytes(out):
    return sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) if out.exists() else 0


def killed(source, out, a, size):
    """Kill at random amounts of written data; stages that were hit, and requests whose kept reply
    was asked for again"""
    hit, again, seen, known = Counter(), 0, 0, set()
    with FakeServer(default=Misbehaving()) as server:
        for k in range(a.kills + 1):
            p, goal = (
                start(source, out, server.url, a),
                _bytes(out) + rng('kill', k).uniform(0.02, 0.25) * size,
            )
            while (
                k < a.kills
                and p.poll() is None
                and _bytes(out) < goal
                and not (out / 'manifest.json').exists()
            ):
                time.sleep(0.003)
            if k < a.kills:
                p.kill()
            p.wait()
            hit[
                'finished'
                if p.returncode == 0
                else 'traces'
                if (out / 'annotator.jsonl').exists()
                else 'pathways'
                if (out / 'base.jsonl').exists()
                else 'rows'
            ] += 1
            time.sleep(0.5)
            asked = list(map(Misbehaving.name, server.requests[seen:]))
            again, seen, known = (
                again + len(known & set(asked)),
                seen + len(asked),
                known | set(asked),
            )
            if p.returncode == 0:
                return dict(hit), again
    raise AssertionError('the last run did not finish')


def check(source_rows, out, damaged=1):
    "Accounts add up, rejects are those that were put in, no picture is in both parts"
    m = json.loads((out / 'manifest.json').read_text(encoding='utf-8'))
    a = m['accounts']
    assert a['rows'] == sum(
        v for k, v in a.items() if k not in ('rows', 'examples', 'unreadable_shards')
    ) + sum(a['examples'].values())
    if a['rows'] == source_rows:
        assert m['rejected']['row'] == dict(
            sorted({**expected(source_rows), 'unreadable shard': damaged}.items())
        )
    held = {
        p: {
            hashlib.sha256(
                np.ascontiguousarray(read_picture(r['image'], BuildRecipe())[0])
            ).hexdigest()
            for f in out.glob(f'{p}-*.parquet')
            for r in pq.read_table(f, columns=['image']).to_pylist()
        }
        for p in TRAINING_PARTS
    }
    assert not held['sft'] & held['rl']
    return m


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rows', type=int, nargs='+', default=[2500, 5000])
    p.add_argument('--n', type=int, default=800, help='examples in each part')
    p.add_argument('--spare', type=float, default=100.0)
    p.add_argument(
        '--base', default='python:builder_rows:base', help='a model as `clear-nb bench` takes it'
    )
    p.add_argument('--workers', type=int, default=4)
    p.add_argument('--kills', type=int, default=8)
    p.add_argument('--folder', default=None, help='where the temporary files go')
    a = p.parse_args()
    found = []
    with tempfile.TemporaryDirectory(dir=a.folder) as tmp:
        for n in a.rows:
            source, out = write_source(Path(tmp) / f'in-{n}', n), Path(tmp) / f'out-{n}'
            found.append(
                dict(
                    source_rows=n,
                    **undisturbed(source, out, a),
                    written_mib=round(_bytes(out) / 2**20, 1),
                )
            )
            m = check(n, out)
            print(json.dumps(found[-1]), flush=True)
        print(
            json.dumps(
                dict(
                    rejected=m['rejected'],
                    faults=m['faults'],
                    statistics={k: v for k, v in m['statistics'].items() if k != 'shares'},
                )
            ),
            flush=True,
        )
        hit, again = killed(source, Path(tmp) / 'killed', a, _bytes(out))
        same = (Path(tmp) / 'killed' / 'manifest.json').read_bytes() == (
            out / 'manifest.json'
        ).read_bytes()
        print(json.dumps(dict(killed_in=hit, asked_again=again, manifests_equal=same)))
        assert same and again <= a.workers * sum(hit.values())
    print(f'peak memory, largest over smallest: {found[-1]["peak_mib"] / found[0]["peak_mib"]:.3f}')


if __name__ == '__main__':
    main()
