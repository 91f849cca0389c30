"""SigLIP at native resolution against the official code, transformers, and itself one image at a
time.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import SiglipVisionModel

from clear_nb.core import torch_rng
from clear_nb.vit import (
    Vit,
    VitConfig,
    conv_to_linear,
    patch_vectors,
    position_ids,
    siglip_to_bagel,
    sincos_table,
)

GOLDEN = Path(__file__).parent / 'golden' / 'bagel'
SMALL = VitConfig(
    hidden=48, layers=2, heads=4, intermediate=80, patch=14, side=10
)  # the golden shape


@pytest.fixture(scope='module')
def golden():
    "Weights, training batch and sampling runs of the official code."
    return {
        k: load_file(GOLDEN / f'{k}.safetensors')
        for k in ('model', 'train_inputs', 'train_outputs', 'infer_inputs')
    }


@pytest.fixture(scope='module')
def vit(golden):
    "Our module with the golden weights; every key must fit."
    vit, prefix = Vit(SMALL), 'vit_model.'
    vit.load_state_dict(
        {k.removeprefix(prefix): v for k, v in golden['model'].items() if k.startswith(prefix)}
    )
    return vit.eval().requires_grad_(False)


def sizes(*hw):
    "Random images of the given patch grids."
    g = torch_rng('test', 'images')
    return [torch.randn(3, 14 * h, 14 * w, generator=g) for h, w in hw]


# the official numbers


def test_features_match_the_official_code(vit, golden):
    "Three images of different sizes, padded and masked here, packed there."
    i = golden['train_inputs']
    lens = i['vit_token_seqlens'].tolist()
    patches, ids = i['packed_vit_tokens'].split(lens), i['packed_vit_position_ids'].split(lens)
    for p, n, ref in zip(patches, ids, golden['train_outputs']['vit_out'].split(lens)):
        out = vit.tokens(p[None], n)[0]
        assert ((out - ref).norm() / ref.norm()).item() < 1e-5
    keep = torch.arange(max(lens)) < torch.tensor(lens)[:, None]
    pad = torch.nn.utils.rnn.pad_sequence
    out = vit.tokens(pad(patches, batch_first=True), pad(ids, batch_first=True), keep)[keep]
    assert (
        (out - golden['train_outputs']['vit_out']).abs().max()
        / golden['train_outputs']['vit_out'].abs().max()
    ).item() < 1e-5


def test_patches_rebuild_to_images_and_back(vit, golden):
    """The official patch vectors, put back into pixels, give the same features through `forward`
    as a list of images.
    """
    i = golden['train_inputs']
    lens = i['vit_token_seqlens'].tolist()
    images = []
    for p, n in zip(i['packed_vit_tokens'].split(lens), i['packed_vit_position_ids'].split(lens)):
        h, w = n.max().item() // 10 + 1, n.max().item() % 10 + 1
        assert torch.equal(n, position_ids(h, w, 10))
        images.append(p.reshape(h, w, 14, 14, 3).permute(4, 0, 2, 1, 3).reshape(3, 14 * h, 14 * w))
        assert torch.equal(patch_vectors(images[-1], 14), p)
    out = torch.cat(vit(images))
    assert (
        (out - golden['train_outputs']['vit_out']).norm()
        / golden['train_outputs']['vit_out'].norm()
    ).item() < 1e-5


def test_position_ids_match_the_official_code():
    "Extrapolated and interpolated numbers of every golden grid."
    for c in json.loads((GOLDEN / 'helper_cases.json').read_text(encoding='utf-8'))['position_ids']:
        assert position_ids(c['h'], c['w'], c['side']).tolist() == c['extrapolate']
        assert (
            position_ids(c['h'], c['w'], c['side'], interpolate=True).tolist() == c['interpolate']
        )


def test_interpolated_ties():
    "With side 70, single precision departs from floor(i*S/n) exactly at n = 25, 49, 50 and 55."

    def exact(n):
        return [i * 70 // n for i in range(n)]

    assert [n for n in range(1, 71) if position_ids(1, n, 70, True).tolist() != exact(n)] == [
        25,
        49,
        50,
        55,
    ]


def test_tables_match_the_official_code(golden):
    "Both position tables of the golden checkpoint, to single precision."
    for key, side in (('vit_pos_embed.pos_embed', 10), ('latent_pos_embed.pos_embed', 8)):
        torch.testing.assert_close(sincos_table(side, 64), golden['model'][key], rtol=0, atol=1e-7)


def test_so400m_names_and_shapes():
    "All keys below `vit_model.` of the 7B checkpoint, with 26 layers, on the meta device."
    expected = json.loads((GOLDEN / 'bagel7b_key_shapes.json').read_text(encoding='utf-8'))['model']
    with torch.device('meta'):
        state = Vit().state_dict()
    assert {f'vit_model.{k}': list(v.shape) for k, v in state.items()} == {
        k: v for k, v in expected.items() if k.startswith('vit_model.')
    }
    assert len(state) == 26 * 16 + 5


# batching


def test_mixed_sizes_equal_one_by_one(vit):
    "Padding is invisible."
    images = sizes((3, 5), (10, 10), (1, 1), (3, 5), (10, 1))
    for a, b in zip(vit(images), (vit([x])[0] for x in images)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_padding_content_cannot_leak(vit):
    "NaN-free proof: changing the padded patches leaves the real rows bit-equal."
    g = torch_rng('test', 'leak')
    p, ids = torch.randn(2, 6, 588, generator=g), position_ids(2, 3, 10).expand(2, -1)
    keep = torch.arange(6) < torch.tensor([[6], [4]])
    a = vit.tokens(p, ids, keep)
    p2 = p.clone()
    p2[1, 4:] = 100.0
    assert torch.equal(a[keep], vit.tokens(p2, ids, keep)[keep])


def test_equal_sizes_use_no_mask(vit, monkeypatch):
    "The fast path: a batch tensor and an equal-size list never build a key mask."
    seen, inner = [], vit.vision_model.forward
    monkeypatch.setattr(
        vit.vision_model, 'forward', lambda p, i, m=None: seen.append(m) or inner(p, i, m)
    )
    images = sizes((2, 3), (2, 3))
    a, b = vit(torch.stack(images)), vit(images)
    assert seen == [None, None] and torch.equal(a, torch.stack(b))
    vit(sizes((2, 3), (3, 2)))
    assert seen[-1] is not None


def test_gradients_with_padding(golden):
    "Gradients of a mixed list equal the sum of the single ones."
    vit = Vit(SMALL, torch_rng('test', 'grad'))
    images = sizes((2, 3), (4, 4), (1, 5))

    def grads(batches):
        vit.zero_grad()
        for b in batches:
            sum(f.square().sum() for f in vit(b)).backward()
        return [p.grad.clone() for p in vit.parameters()]

    for a, b in zip(grads([images]), grads([[x] for x in images])):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('mixed', [False, True])
def test_bf16(vit, mixed):
    "Autocast and bf16 weights stay near full precision, with and without a mask."
    images = sizes((2, 3), (4, 4) if mixed else (2, 3))
    ref = torch.cat(vit(images))
    with torch.autocast('cpu', torch.bfloat16):
        auto = torch.cat(vit(images))
    cast = torch.cat(copy.deepcopy(vit).bfloat16()(images))
    for out in (auto, cast):
        assert ((out.float() - ref).norm() / ref.norm()).item() < 0.03


# conversion, initialisation, errors


def test_matches_transformers_after_conversion():
    """A Hugging Face SigLIP tower, converted, gives the same features; one layer more is dropped
    as BAGEL does.
    """
    hf, ours = SiglipVisionModel(SMALL.siglip()).eval(), Vit(SMALL).eval()
    state = {
        f'vision_model.{k.removeprefix("vision_model.")}': v for k, v in hf.state_dict().items()
    }
    ours.load_state_dict(
        siglip_to_bagel(
            state | {'vision_model.encoder.layers.2.mlp.fc1.bias': torch.zeros(80)}, SMALL
        )
    )
    x = torch.randn(2, 3, 140, 140, generator=torch_rng('test', 'hf'))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), hf(x).last_hidden_state, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='lacks'):
        siglip_to_bagel({}, SMALL)


def test_position_table_is_resized():
    "A smaller pretrained grid is stretched; a constant table stays constant."
    state = SiglipVisionModel(
        VitConfig(hidden=48, layers=2, heads=4, intermediate=80, patch=14, side=5).siglip()
    ).state_dict()
    key = next(k for k in state if k.endswith('position_embedding.weight'))
    state[key] = torch.ones_like(state[key])
    table = siglip_to_bagel(state, SMALL)['vision_model.embeddings.position_embedding.weight']
    assert table.shape == (100, 48) and torch.allclose(table, torch.ones(100, 48))


def test_conv_to_linear_order():
    "weight[o, c, p, q] lands at column (p*Q + q)*C + c."
    w = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert conv_to_linear(w)[1, (2 * 5 + 3) * 3 + 1] == w[1, 1, 2, 3]


def test_fresh_weights_come_from_the_generator():
    "Same stream, same weights; another stream, others."
    a, b, c = (Vit(SMALL, torch_rng('test', k)).state_dict() for k in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


def test_bad_arguments_raise(vit):
    "Sizes that do not divide, grids beyond the table, odd dimensions."
    assert vit([]) == []
    with pytest.raises(ValueError, match='patches of 14'):
        vit(torch.zeros(1, 3, 15, 28))
    with pytest.raises(ValueError, match='side 10'):
        vit(torch.zeros(1, 3, 14 * 11, 14))
    with pytest.raises(ValueError, match='side 10'):
        vit([torch.zeros(3, 14, 14 * 11), torch.zeros(3, 14, 14)])
    with pytest.raises(ValueError, match='multiple of 4'):
        sincos_table(4, 6)
    with pytest.raises(ValueError, match='heads'):
        VitConfig(hidden=50, heads=4)
    with pytest.raises(ValueError, match='and of 4'):
        VitConfig(hidden=6, heads=3)
