"""Peak memory of building MMD-Bench files from a TSV: it should not grow with the number of rows.

    .venv/bin/python benchmarks/build_memory.py --rows 2000 4000 --corruptions scan_lines

Writes a TSV of 512-pixel JPEG pictures and builds from it in a fresh process with worker processes
below it. Prints the peak resident memory of the process that reads and writes, that of the largest
worker, and their sum, reader + workers x largest worker. The sum is an upper bound: the peaks need
not fall together, and shared libraries are counted in each process.
"""

import argparse
import base64
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from clear_nb.bench_files import build_files
from clear_nb.core import rng
from clear_nb.records import peak_memory
from clear_nb.rows import read_tsv


def photos(n, side):
    "Smooth colours with grain, as JPEG files"
    for k in range(n):
        r = rng('build memory', k)
        smooth = cv2.resize(
            r.integers(0, 256, (24, 24, 3), dtype=np.uint8),
            (side, side),
            interpolation=cv2.INTER_CUBIC,
        )
        grain = r.integers(-6, 7, (side, side, 3), dtype=np.int16)
        yield cv2.imencode(
            '.jpg', np.clip(smooth + grain, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90]
        )[1].tobytes()


def write_tsv(path, rows, side):
    "A benchmark of `rows` questions, each with a picture of its own"
    with path.open('w', encoding='utf-8') as f:
        f.write('index\timage\tquestion\tA\tB\tanswer\n')
        for k, data in enumerate(photos(rows, side)):
            f.write(f'{k}\t{base64.b64encode(data).decode()}\twhich?\tred\tblue\tA\n')


def child(tsv, out, settings):
    "Build and print what it took"
    start = time.perf_counter()
    info = build_files(read_tsv(tsv), out, progress=False, **settings)
    unit = 2**20 if sys.platform == 'darwin' else 2**10
    worker = (
        round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit)
        if settings['workers'] > 1
        else 0
    )
    reader = peak_memory()['cpu']
    print(
        json.dumps(
            dict(
                pictures=info['counts']['rows'],
                reader_mib=reader,
                largest_worker_mib=worker,
                sum_mib=reader + worker * settings['workers'] * (settings['workers'] > 1),
                seconds=round(time.perf_counter() - start, 1),
            )
        )
    )


def measure(rows, side, settings, folder):
    "One line for a number of rows"
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        tsv, out = Path(tmp) / 'synthetic.tsv', Path(tmp) / 'out'
        write_tsv(tsv, rows, side)
        size = tsv.stat().st_size / 2**20
        done = subprocess.run(
            [sys.executable, __file__, '--child', str(tsv), str(out), json.dumps(settings)],
            check=True,
            capture_output=True,
            encoding='utf-8',
        )
        return dict(
            rows=rows,
            tsv_mib=round(size),
            **json.loads(done.stdout.splitlines()[-1]),
            written_mib=round(sum(p.stat().st_size for p in out.iterdir()) / 2**20),
        )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rows', type=int, nargs='+', default=[2000, 4000])
    p.add_argument('--side', type=int, default=512, help='pixels')
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--corruptions', nargs='+', default=None, help='all 16 if not given')
    p.add_argument('--severities', nargs='+', default=['low', 'mid', 'hard'])
    p.add_argument('--jpeg-quality', type=int, default=None, help='PNG if not given')
    p.add_argument('--folder', default=None, help='where the temporary files go')
    a = p.parse_args()
    settings = dict(
        workers=a.workers,
        corruptions=a.corruptions,
        severities=a.severities,
        jpeg_quality=a.jpeg_quality,
    )
    print(settings)
    found = []
    for n in a.rows:
        found.append(measure(n, a.side, settings, a.folder))
        print(found[-1], flush=True)
    sums = [f['sum_mib'] for f in found]
    print(f'largest over smallest: {max(sums) / min(sums):.3f}')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']:
        child(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
    else:
        main()
