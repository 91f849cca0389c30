"""Time the building of benchmark pictures today against the way before, side by side.

    .venv/bin/python benchmarks/building.py --rounds 3 --out building.json

Three measurements: PNG files, mean shift of a picture of 12 megapixels, and a `mixed` benchmark of
photos whose long side is 512 to 1,024 pixels. Both ways run in turns in one process with one thread
and change places each round. Processor seconds are counted, without the first call, which compiles
mean shift. Memory is the peak of a fresh process for each way. Only ratios carry over to other
machines.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import building_reference as before
import cv2
import numpy as np
import skimage.data

from clear_nb import degrade as dg
from clear_nb import rows, variants
from clear_nb.rows import BenchmarkRow, encode_picture, pixel_hash

PHOTOS = ('astronaut', 'chelsea', 'coffee', 'rocket', 'motorcycle_left', 'retina')
WAYS = ('today', 'before')


def sample_photo(name, long_side):  # (H, W, 3) uint8
    "Read a photo of scikit-image, scaled to a long side."
    path = next(Path(skimage.data.__path__[0]).glob(f'{name}.*'))
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    scale = long_side / max(image.shape)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=how)


def large_photo(height, width):  # (H, W, 3) uint8
    "Cover an area with photos in their own size, mirrored at their borders."
    tiles = []
    for k in range(-(-height // 1000) * -(-width // 1000)):
        tile = sample_photo(PHOTOS[k % len(PHOTOS)], 700)
        bottom, right = 1000 - tile.shape[0], 1000 - tile.shape[1]
        tiles.append(cv2.copyMakeBorder(tile, 0, bottom, 0, right, cv2.BORDER_REFLECT))
    columns = -(-width // 1000)
    lines = [np.hstack(tiles[k : k + columns]) for k in range(0, len(tiles), columns)]
    return np.ascontiguousarray(np.vstack(lines)[:height, :width])


def photo_rows(n, sides):
    "Make n rows with photos of two long sides and all between, as JPEG like most benchmarks."
    sides = np.linspace(*sides, n).astype(int)
    files = [encode_picture(sample_photo(PHOTOS[k % 6], s), 95) for k, s in enumerate(sides)]
    row = BenchmarkRow('photos', '', 'What?', 'B', b'', dict(A='x', B='y'))
    return [replace(row, index=str(k), image=data) for k, data in enumerate(files)]


@contextmanager
def way_of_building(way):
    "Build as today or as before."
    if way == 'today':
        yield
        return
    old = replace(dg.CORRUPTIONS['mean_shift'], function=before.mean_shift)
    with (
        mock.patch.dict(dg.CORRUPTIONS, mean_shift=old),
        mock.patch.object(variants, 'encode_picture', before.encode_picture),
        mock.patch.object(rows, 'encode_picture', before.encode_picture),
    ):
        yield


def in_turns(work, rounds):
    "Measure the processor seconds of `work()` in both ways; each list has one number per round."
    spent = {way: [] for way in WAYS}
    for n in range(rounds):
        for way in (WAYS, WAYS[::-1])[n % 2]:
            with way_of_building(way):
                start = time.process_time()
                work()
                spent[way].append(time.process_time() - start)
    return spent


def compared(spent, unit=1.0, **more):
    "Summarise what `in_turns` measured; `unit` is what one run works through."
    ratios = [b / a for a, b in zip(spent['today'], spent['before'])]
    medians = {way: statistics.median(spent[way]) / unit for way in WAYS}
    return (
        medians | dict(ratio=statistics.median(ratios), least=min(ratios), most=max(ratios)) | more
    )


def png(images, rounds):
    "Compare seconds per megapixel and size of PNG files; the pixels are equal."

    def work():
        return [variants.encode_picture(x) for x in images]

    sizes = {}
    for way in WAYS:
        with way_of_building(way):
            files = work()
        sizes[way] = sum(map(len, files))
        assert all(np.array_equal(rows.decode_picture(f), x) for f, x in zip(files, images))
    megapixels = sum(x.shape[0] * x.shape[1] for x in images) / 1e6
    return compared(in_turns(work, rounds), megapixels, size=sizes['today'] / sizes['before'])


def mean_shift(image, severity, rounds):
    "Compare the seconds of mean shift; the pixels are equal."
    found = {}

    def work():
        out = dg.degrade(image, 'mean_shift', severity)
        assert found.setdefault('hash', pixel_hash(out)) == pixel_hash(out)

    small = image[:64, :64]
    for way in WAYS:  # compiles
        with way_of_building(way):
            dg.degrade(small, 'mean_shift', 'mid')
    return compared(in_turns(work, rounds))


def mixed(n, sides, rounds):
    "Compare the seconds per picture of a `mixed` benchmark; the digests are equal."
    plan, found, source = variants.VariantPlan(relative=min(sides) < 512), {}, photo_rows(n, sides)

    def work():
        groups = variants.variant_groups(source, plan, [])
        made = [r for group in variants.make_records(groups, plan, 1) for r in group]
        digests = [r['digest'] for r in made]
        assert found.setdefault('digests', digests) == digests
        found['pictures'], found['drawn'] = len(made), {r['corruption'] for r in made}

    work()
    drawn = sorted(found['drawn'])
    return compared(in_turns(work, rounds), found['pictures'], drawn=drawn)


def peak_memory(way, height, width):
    "Measure the peak MB of a fresh process that applies mean shift to a large picture."
    command = [sys.executable, __file__, '--memory-of', way, '--size', str(height), str(width)]
    done = subprocess.run(command, check=True, capture_output=True, encoding='utf-8')
    return float(done.stdout)


def memory_of(way, height, width):
    "Print the peak MB of this process."
    image = large_photo(height, width)
    with way_of_building(way):
        dg.degrade(image, 'mean_shift', 'low')
    status = Path('/proc/self/status').read_text(encoding='utf-8')
    print(int(status.split('VmHWM:')[1].split()[0]) * 1024 / 1e6)  # ru_maxrss counts the parent


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--size', type=int, nargs=2, default=[3000, 4000], help='of the large picture')
    p.add_argument('--severities', nargs='+', default=['low'], help='for the large picture')
    p.add_argument('--pictures', type=int, default=96, help='photos of the mixed benchmark')
    p.add_argument('--sides', type=int, nargs=2, default=[512, 1024], help='their long sides')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--out', type=Path, help='JSON file for the numbers')
    p.add_argument('--memory-of', choices=WAYS, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    cv2.setNumThreads(1)
    if a.memory_of:
        return memory_of(a.memory_of, *a.size)
    image, photos = large_photo(*a.size), [sample_photo(n, max(a.sides)) for n in PHOTOS]
    found = {'png, s a megapixel': png(photos, a.rounds)}
    for severity in a.severities:
        name = f'mean_shift {severity}, {image.size / 3e6:.1f} megapixels, s'
        found[name] = mean_shift(image, severity, a.rounds)
    found['mixed, s a picture'] = mixed(a.pictures, a.sides, a.rounds)
    found['peak memory of mean_shift, MB'] = {w: peak_memory(w, *a.size) for w in WAYS}
    for name, values in found.items():
        numbers = {k: round(v, 4) for k, v in values.items() if isinstance(v, float)}
        print(f'{name:40} {numbers}', flush=True)
    if a.out:
        a.out.write_text(json.dumps(found, indent=1), encoding='utf-8')
    return found


if __name__ == '__main__':
    main()
