"""The memory that the chapter on scale estimates is what a process needs."""

import sys

import pytest
import torch

from clear_nb.core import ROOT, load_preset
from clear_nb.model import ClearConfig, qwen2
from clear_nb.mot import Layer
from clear_nb.scale import (
    StagePlan,
    copy_bytes,
    count_parameters,
    gradient_bytes,
    layer_bytes,
    lora_parameters,
    saved_bytes,
    stage_table,
    state_bytes,
    training_memory,
    trajectory_tokens,
)

sys.path.insert(0, str(ROOT / 'benchmarks'))
BIG = ClearConfig.from_dict(load_preset('paper').model)


def test_memory_of_the_100m_shape_is_estimated_within_15_percent():
    from scale import measure

    found = measure('100m', 2, 64)
    assert 0.85 < found['estimated'] / found['measured'] < 1.15, found


def test_saved_bytes_counts_each_tensor_once_and_no_weights():
    w, x = torch.ones(8, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    weights = {w.untyped_storage()._cdata}
    assert saved_bytes(lambda: x @ w, weights) == x.nbytes
    assert saved_bytes(lambda: (x @ w) + (x * 2) @ w, weights) == 2 * x.nbytes


def test_shards_divide_the_state_and_copies_add_to_it():
    own = sum(v for k, v in count_parameters(BIG).items() if k not in ('vit', 'vae'))
    assert state_bytes(BIG, StagePlan(8)) == state_bytes(BIG, StagePlan(1)) / 8
    assert state_bytes(BIG, StagePlan(8, ema=True)) - state_bytes(BIG, StagePlan(8)) == 4 * own / 8


def test_passes_or_gradients():
    """The larger of the two counts; gradients of earlier passes wait beside the next pass."""
    small = ClearConfig.from_dict(load_preset('tiny').model)
    copy, n, larger = copy_bytes(small, StagePlan(8)), count_parameters(small), []
    for tokens in (1, 6000):
        m, two = (training_memory(small, tokens, 1, StagePlan(8, pieces=k)) for k in (1, 2))
        larger.append(m['passes'] > m['gradients'] == 2 * copy)
        assert m['total'] == m['state'] + max(m['gradients'], m['passes']) and two['total'] == m[
            'state'
        ] + max(3 * copy, copy + m['passes'])
    fixed, lora = n['vit'] + n['vae'], StagePlan(lora=8)
    assert larger == [False, True] and gradient_bytes(small, StagePlan(8, foreach=False)) == copy
    assert (
        state_bytes(small, StagePlan()) + copy_bytes(small, StagePlan())
        == 16 * (sum(n.values()) - fixed) + 4 * fixed
    )
    assert state_bytes(small, lora) - 3 * copy_bytes(small, lora) == 2 * (
        sum(n.values()) - fixed
    ) + 4 * fixed and copy_bytes(small, lora) == 4 * lora_parameters(small, 8)


@pytest.mark.parametrize('name', ['paper', 'official'])
@pytest.mark.parametrize('w, h', [(640, 480), (1024, 1024)])
def test_published_presets_fit(name, w, h):
    """Every stage fits eight GPUs of 80 GB as the preset runs it, and not with all in one pass."""
    p = load_preset(name)
    assert all(r['gib'] < 0.9 * 80e9 / 2**30 for r in stage_table(p, 8, w, h, 80, 270))
    at_once = load_preset(name, **{'train.micro': 0, 'train.checkpointing': False})
    assert all(r['gib'] > 80e9 / 2**30 for r in stage_table(at_once, 8, w, h, 80, 270))


def test_lora_counts_rows_and_columns_of_every_matrix():
    with torch.device('meta'):
        layer = Layer(qwen2(BIG), 0)
    assert lora_parameters(BIG, 2) == 2 * lora_parameters(BIG, 1) and lora_parameters(
        BIG, 1
    ) == 28 * sum(sum(m.weight.shape) for m in layer.modules() if isinstance(m, torch.nn.Linear))


def test_mixed_precision_keeps_more_than_half_of_fp32():
    assert 0.5 < layer_bytes(BIG, torch.bfloat16) / layer_bytes(BIG, torch.float32) < 1


@pytest.mark.parametrize('stage, more', [('sft', 0.6), ('bridge', 0.0), ('grpo', 0.0)])
def test_only_stage_1_encodes_again(stage, more):
    t, once = (
        trajectory_tokens(load_preset('paper'), 640, 480, 80, 270, s) for s in (stage, 'bridge')
    )
    assert t.all - once.all == pytest.approx(more * t.vit)
