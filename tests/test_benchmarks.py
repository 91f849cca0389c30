"""The benchmark scripts run, and count bytes and operations correctly."""

import json
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clear_nb.core import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))
import floors  # noqa: E402
import generation  # noqa: E402
import packing  # noqa: E402


@pytest.fixture
def threads():
    "The scripts set the number of threads."
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


QUICK = [
    '--shape',
    'tiny',
    '--side',
    '64',
    '--tokens',
    '4',
    '--rows',
    '1',
    '3',
    '--steps',
    '3',
    '--repeats',
    '1',
]


def test_floors(threads, tmp_path):
    "Every phase has a time, a floor and their ratio, in a record."
    out = floors.main([*QUICK, '--out', str(tmp_path)])
    phases = {k: v for k, v in out.items() if k not in ('machine', 'settings', 'tokens')}
    assert set(phases) == {'prefill', 'decode, batch 1', 'decode, batch 3', 'denoising step'}
    assert all(
        p['seconds'] > 0 and p['ratio'] == p['seconds'] / p['floor'] for p in phases.values()
    )
    assert out['tokens'] == dict(latent=258, vit=66, text=64) and list(
        tmp_path.glob('floors-tiny-seed0.json')
    )


def counted(f):
    "Operations of the matrix products and attentions in a call."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as c:
        f()  # fused attention is not counted on a CPU
    return c.get_total_flops()


@torch.no_grad()
def test_operations_of_the_floors():
    """The formulas against PyTorch's count; what they leave out (connector, time embedding,
    text around a picture) is small.
    """
    a = floors.arguments(QUICK)
    model, one = floors.build('tiny', 'cpu', torch.float32), dict(matrix=1.0, bandwidth=1e30)
    z, ask, n, new = floors.context_of(model, a)
    cache = new()
    got = counted(lambda: floors.prefill(model, cache, [ask]))
    assert got == pytest.approx(floors.prefill_floor(model, n[0], sum(n[1:]), one), rel=0.1)
    got = counted(lambda: floors.restore(model, cache, torch.zeros(1, *z.shape), 2))
    assert got == pytest.approx(floors.denoise_floor(model, 1, n[0], sum(n), one), rel=0.15)


def test_bytes_of_the_floors():
    "Weights and cache entries counted by hand."
    model = floors.build('tiny', 'cpu', torch.float32)
    D, inner, layers, heads, kv, vocab, _ = generation.SHAPES['tiny']
    each = layers * (2 * D * D + 2 * D * D * kv // heads + 3 * D * inner)
    assert floors.weights(model, True) == each and floors.weights(model, False) == each + vocab * D
    assert floors.kv_bytes(model) == 2 * layers * kv * (D // heads) * 4
    assert floors.decode_floor(model, 1, 0, dict(bandwidth=1.0, matrix=1e30)) == 4 * (
        each + vocab * D
    )


def test_true_shape():
    """The shape '7b' is preset paper's: 7.6 billion numbers are read for a token, text head
    included, and 6.5 for a latent token.
    """
    model = floors.meta_model(floors.config('7b'), dtype=torch.bfloat16)
    assert floors.weights(model, True) / 1e9 == pytest.approx(6.525, abs=0.01) and floors.weights(
        model, False
    ) / 1e9 == pytest.approx(7.07, abs=0.01)
    assert floors.kv_bytes(model) == 57344


def test_generation(threads):
    "All comparisons, at the smallest settings."
    out = generation.main(
        '--shapes tiny --rows 1 2 --tokens 4 --few 2 --turn 2 --steps 3 --repeats 1'.split()
    )['tiny']
    assert set(out) == {'parameters', 'cache_1', 'cache_2', 'long', 'batch', 'guidance'}
    assert out['long']['median'] > 0 and out['guidance']['always']['median'] > 0


def test_packing(threads, tmp_path):
    """Shared rows have less padding and the same loss, which the benchmark checks itself;
    blocks hold at least what is visible.
    """
    found = packing.main(
        [
            '--shapes',
            'tiny',
            '--trajectories',
            '16',
            '--budgets',
            '1',
            '2',
            '--repeats',
            '1',
            '--out',
            str(tmp_path / 'p.json'),
        ]
    )
    assert found == json.loads((tmp_path / 'p.json').read_text()) and found[0]['rows'] == 16
    for f in found[1:]:
        assert f['rows'] < 16 and f['padding'] < found[0]['padding'] and f['visible'] <= f['blocks']
    assert {f['speed']['median'] > 0 for f in found} == {True}
