"""Building is faster than before and gives the same pixels: mean shift and PNG files."""

import importlib
import sys
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_nb import degrade, rows
from clear_nb.core import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))
building = importlib.import_module('building')
before = importlib.import_module('building_reference')

SHIFT = degrade.CORRUPTIONS['mean_shift'].function


@pytest.fixture
def one_thread():
    """Let OpenCV compute in one thread, as everything else here does."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(threads)


def opencv(image, i, s=1.0):
    """Apply mean shift as the release does."""
    radius = int(40 * i)
    return cv2.pyrMeanShiftFiltering(image, radius if s == 1 else max(1.0, radius * s), radius)


@pytest.mark.parametrize('block', [1, 7, 32, 512])
def test_blocks_change_nothing(monkeypatch, block):
    """The pixels do not depend on the size of a block, not even of a single point."""
    image = building.sample_photo('astronaut', 90)[:40, :60]
    monkeypatch.setattr(degrade, '_BLOCK', block)
    for i in (0.23, 0.9):
        assert np.array_equal(SHIFT(image, i, None, 1.0), opencv(image, i))


@pytest.mark.parametrize('s', [2.3, 8.0, 27.8])
def test_long_reach(s):
    """A relative radius of 80 to 1,000 pixels: short stretches, or OpenCV itself."""
    x = building.sample_photo('rocket', 120)[:50, :70]
    image = np.where(x > 128, 255, x // 9).astype(np.uint8)
    assert np.array_equal(SHIFT(image, 0.9, None, s), opencv(image, 0.9, s))


@pytest.mark.parametrize('shape', [(9, 33_000), (33_000, 9)])
def test_places_above_16_bits(shape, one_thread):
    """Rows and columns beyond 32,767 wrap in 16 bits; the means do not."""
    g = np.random.default_rng(3)
    image = np.zeros((*shape, 3), np.uint8)
    end = tuple(slice(-60, None) if n > 60 else slice(None) for n in shape)
    image[end] = g.integers(0, 40, image[end].shape)
    assert np.array_equal(SHIFT(image, 0.23, None, 1.0), opencv(image, 0.23))


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([2, 9, 40, 256]),
    st.sampled_from([0.13, 0.23, 0.45, 1.0]),
    st.integers(0, 99),
)
@settings(max_examples=40)
def test_mean_shift_equals_both_references(h, w, levels, i, seed):
    """Noise of few and of many levels: equal to OpenCV and to the loop of before."""
    image = np.random.default_rng(seed).integers(0, levels, (h, w, 3)).astype(np.uint8)
    now = SHIFT(image, i, None, 1.0)
    assert np.array_equal(now, opencv(image, i))
    assert np.array_equal(now, before.mean_shift(image, i, None, 1.0))


def test_memory_of_mean_shift(one_thread):
    """Less than half of the memory of before, as NumPy counts it."""
    image, peaks = building.large_photo(800, 1100), {}
    for name, function in (('now', SHIFT), ('before', before.mean_shift)):
        function(image[:64, :64], 0.23, None, 1.0)
        tracemalloc.start()
        function(image, 0.23, None, 1.0)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks['now'] < 0.5 * peaks['before'], peaks


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 2, 9, 256]), st.integers(0, 99))
@settings(max_examples=60)
def test_png_keeps_pixels(h, w, levels, seed):
    """Flat pictures, few colours and noise of any size come back as they were."""
    image = np.random.default_rng(seed).integers(0, levels, (h, w, 3)).astype(np.uint8)
    assert np.array_equal(rows.decode_picture(rows.encode_picture(image)), image)


def drawn(kind):
    """Make a picture that is no photo."""
    x = np.full((300, 400, 3), 255, np.uint8)
    if kind == 'page':
        for k in range(14):
            cv2.putText(x, f'line {k} of a page', (9, 20 + 20 * k), 0, 0.6, (0, 0, 0), 1)
    elif kind == 'chart':
        for k in range(8):
            cv2.rectangle(x, (30 + 40 * k, 290 - 30 * k), (60 + 40 * k, 290), (9 * k, 90, 200), -1)
    elif kind == 'grey':
        photo = building.sample_photo('astronaut', 300)
        x = np.repeat(photo[:, :, :1], 3, axis=2)
    return x


@pytest.mark.parametrize('kind', ['photo', 'noisy', 'page', 'chart', 'grey', 'flat'])
def test_size_of_png(kind):
    """Files are at most 8 % larger than before; those of photos are smaller."""
    photos = [building.sample_photo(n, 300) for n in building.PHOTOS]
    g = np.random.default_rng(0)
    noisy = [degrade.degrade(x, 'gaussian_noise', 'hard', g) for x in photos]
    images = dict(photo=photos, noisy=noisy).get(kind) or [drawn(kind)]
    now, old = (
        sum(len(encode(x)) for x in images)
        for encode in (rows.encode_picture, before.encode_picture)
    )
    assert now <= (1.0 if kind == 'photo' else 1.08) * old, now / old


def test_benchmark_runs(tmp_path, monkeypatch, capsys):
    """The measurement itself works at a small size; both ways give the same pixels."""
    monkeypatch.setattr(building, 'peak_memory', lambda way, *size: 1.0)
    out = tmp_path / 'building.json'
    threads = cv2.getNumThreads()
    found = building.main(
        [
            '--size',
            '90',
            '120',
            '--pictures',
            '6',
            '--sides',
            '64',
            '96',
            '--rounds',
            '1',
            '--out',
            str(out),
        ]
    )
    cv2.setNumThreads(threads)
    assert out.exists() and len(found) == 4
    assert all(v > 0 for part in found.values() for v in part.values() if isinstance(v, float))
    assert 'mixed' in capsys.readouterr().out
