"""The comparison of the corruptions with their plain reference runs and counts."""

import json
import sys

import cv2
import numpy as np
import pytest

from clear_nb.core import ROOT
from clear_nb.degrade import SEVERITY

sys.path.insert(0, str(ROOT / 'benchmarks'))
import degrade as bench  # noqa: E402

QUICK = ['--size', '64', '--repeats', '1', '--at-least', '0', '--copies', '1']


def test_smallest_run(tmp_path, capsys):
    """Every cell has times, a ratio and a difference; the sums agree with them; the file holds
    what was returned.
    """
    threads = cv2.getNumThreads()
    out = bench.main(
        [*QUICK, '--only', 'graffiti', 'mean_shift', '--out', str(tmp_path / 'd.json')]
    )
    assert (
        json.loads((tmp_path / 'd.json').read_text(encoding='utf-8')) == out
        and cv2.getNumThreads() == threads
    )
    assert list(out['cells']) == [f'{n} {s}' for n in ('graffiti', 'mean_shift') for s in SEVERITY]
    for c in out['cells'].values():
        assert (
            c['fast_ms'] > 0
            and c['ratio'] == pytest.approx(c['plain_ms'] / c['fast_ms'])
            and c['difference'] <= 1
        )
    ratios = [c['ratio'] for c in out['cells'].values()]
    assert out['geometric_mean'] == pytest.approx(np.exp(np.mean(np.log(ratios)))) and out['cells'][
        out['slowest']
    ]['ratio'] == min(ratios)
    assert {k: w['pictures'] for k, w in out['workers'].items()} == {
        'all but mean_shift': 3,
        'mean_shift': 4,
    }
    said = capsys.readouterr().out
    assert 'geometric mean of 6 cells' in said and '2 workers over 1' in said


def test_nothing_asked_nothing_done():
    """Without copies no batch is timed; an unknown name is refused."""
    assert bench.main([*QUICK[:-1], '0', '--only', 'dark_illumination'])['workers'] == {}
    with pytest.raises(SystemExit):
        bench.main(['--only', 'blur'])


def test_photo():
    """The picture is seeded, differs by key, and has shadows, lights and detail."""
    x = bench.photo(128)
    assert (
        x.shape == (128, 128, 3)
        and x.dtype == np.uint8
        and (x == bench.photo(128)).all()
        and (x != bench.photo(128, 1)).any()
    )
    assert 30 < x.std() < 90 and len(np.unique(x)) > 200


def test_in_turns(monkeypatch):
    """Both see the same draws, and each starts every other round."""
    seen = []

    def note(who):
        return lambda x, name, severity, g: seen.append((who, g.integers(1 << 30)))

    monkeypatch.setattr(bench, 'degrade', note('fast'))
    monkeypatch.setattr(bench.degrade_reference, 'degrade', note('plain'))
    t = bench.in_turns('graffiti', 'low', None, 3, 0)
    assert [w for w, _ in seen[2:]] == ['fast', 'plain', 'plain', 'fast', 'fast', 'plain'] and len(
        t['fast']
    ) == 3
    assert all(a == b for (_, a), (_, b) in zip(seen[::2], seen[1::2]))
