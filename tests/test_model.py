"""The model room: one forward pass for every mixture of tokens, and checkpoints that fit or say
why not.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clear_nb.core import rng, torch_rng
from clear_nb.decode import prefill
from clear_nb.model import ClearConfig, ClearModel, cache_layout, freeze, init_weights, meta_model
from clear_nb.mot import SPLIT_CAUSAL, SPLIT_FULL, SPLIT_NOISE, KVCache, visible, visible_naive
from clear_nb.presets import load_preset
from clear_nb.trajectory import (
    TAGS,
    Gap,
    LatentSegment,
    TextSegment,
    VitSegment,
    drop_conditions,
    pack,
)
from clear_nb.vae import VaeConfig, diffusers_to_flux
from clear_nb.vit import VitConfig

GOLDEN = Path(__file__).parent / 'golden' / 'bagel'
CONTROL = ['<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>']


def byte_tokenizer(tags=TAGS):
    "Four control tokens (0 to 3), every byte, and the tags as whole tokens."
    tok = Tokenizer(
        models.BPE(
            {c: i for i, c in enumerate(CONTROL + sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
        )
    )
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tok.add_special_tokens(CONTROL)
    tok.add_tokens(list(tags))
    return PreTrainedTokenizerFast(tokenizer_object=tok, clean_up_tokenization_spaces=False)


def tiny_config():
    "8 x 8 pixels per token in both encoders, tables of 4 x 4 tokens."
    llm = dict(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_theta=1e4,
    )
    return ClearConfig(
        llm,
        VitConfig(16, 1, 2, 32, patch=8, side=4),
        VaeConfig(ch=8, ch_mult=(1, 2), blocks=1, z=4, groups=4),
        latent_patch=4,
        latent_side=4,
        bos=0,
        eos=1,
        soi=2,
        eoi=3,
    )


def tiny_model(*seed, tokenizer=None):
    "Random weights everywhere, the velocity head and the biases included."
    model, g = (
        init_weights(ClearModel(tiny_config(), tokenizer), torch_rng('tiny', *seed)),
        torch_rng('tiny extra', *seed),
    )
    torch.nn.init.normal_(model.llm2vae.weight, std=32**-0.5, generator=g)
    for n, p in model.named_parameters():
        if n.endswith('bias') and not n.startswith('vae.'):
            torch.nn.init.normal_(p, std=0.1, generator=g)
    return model.eval().requires_grad_(False)


def picture(*key, h=2, w=2):
    "A latent and an image of h x w tokens."
    g = torch_rng('picture', *key)
    return torch.randn(4, 4 * h, 4 * w, generator=g), torch.randn(3, 8 * h, 8 * w, generator=g)


def story(key=0, n=5, t=0.5):
    "The stage-1 trajectory: picture, question of n tokens, text, generated triple, answer."
    (z, image), eps = picture(key), torch.randn(4, 8, 8, generator=torch_rng('eps', key))
    return [
        LatentSegment(z),
        VitSegment(image),
        TextSegment(tuple(range(20, 20 + n))),
        TextSegment((50, 51, 52), loss=True),
        LatentSegment(z, t, eps),
        LatentSegment(z + 0.1),
        VitSegment(image),
        TextSegment((60, 61), loss=True),
    ]


@pytest.fixture(scope='module')
def model():
    return tiny_model(0)


def outputs(model, samples, rows=None):
    "Text logits and velocities."
    h = model(pack(samples, model.shape, rows))
    return model.logits(h, h.packed.ce_at), model.velocity(h)


def close(a, b, tol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


# ---------------------------------------------------------------- one forward pass


@pytest.mark.parametrize(
    'keep',
    [[2, 3], [0, 3], [1, 3], [0, 1, 2, 3], [4], [0, 4], [1, 4], [0, 1], [5, 7], [4, 5, 6, 7]],
)
def test_any_mixture_of_tokens(model, keep):
    """A batch may lack text targets, ViT images, clean latents or noised latents; gradients
    then are zero or finite, never missing.
    """
    model = freeze(tiny_model(0), 'vae.')
    h = model(pack([[story()[k] for k in keep]], model.shape))
    (h.x.square().sum() + model.ce_terms(h).sum() + model.mse_terms(h).sum()).backward()
    decoder = [
        p.grad
        for n, p in model.named_parameters()
        if 'layers.' in n and n.startswith('language_model')
    ]
    assert all(g is not None and g.isfinite().all() for g in decoder)


def test_train_and_eval_are_one_path(model):
    "Nothing depends on `.training`; the release dispatches on it (hazard 13)."
    a = outputs(model.train(), [story()])
    b = outputs(model.eval(), [story()])
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_samples_share_a_row(model):
    "Three samples in one row, with a padded second row, equal three rows."
    samples = [story(0), story(1, n=9), story(2, n=1)]
    for a, b in zip(outputs(model, samples), outputs(model, samples, rows=[[0, 1], [2]])):
        close(a, b)
    for a, b in zip(outputs(model, samples), outputs(model, samples, rows=[[0, 1, 2]])):
        close(a, b)
    for a, *b in zip(outputs(model, samples), *(outputs(model, [s]) for s in samples)):
        close(a, torch.cat(b))


def test_branches_equal_rows(model):
    """Three questions about one picture as branches equal three rows, each with its own copy of
    the picture.
    """
    (z, image), asked = picture('trunk'), [(30, 31), (32,), (33, 34, 35)]

    def tail(q, b):
        return [
            TextSegment(q, branch=b),
            TextSegment((40, q[0]), loss=True, branch=b),
            LatentSegment(z, 0.3, z + 1, branch=b),
            LatentSegment(z, branch=b),
            Gap(b),
            TextSegment((41,), loss=True, branch=b),
        ]

    branched = [
        [
            LatentSegment(z),
            VitSegment(image),
            *(s for b, q in enumerate(asked, 1) for s in tail(q, b)),
        ]
    ]
    rows = [[LatentSegment(z), VitSegment(image), *tail(q, 0)] for q in asked]
    for a, b in zip(outputs(model, branched), outputs(model, rows)):
        close(a, b)


def test_trunk_ignores_branches(model):
    "What follows on the trunk after the branches does not see them."
    z, image = picture('trunk')
    end = TextSegment((44, 45), loss=True)
    a, b = (
        outputs(model, [[VitSegment(image), *mid, end]])[0]
        for mid in ([], [TextSegment((30,), branch=1), LatentSegment(z, branch=2)])
    )
    close(a, b)


def test_noised_latent_is_invisible(model):
    "Another x_t at another t changes its velocity and not one text logit (hazard 3)."
    (a, va), (b, vb) = (outputs(model, [story(t=t)]) for t in (0.5, 0.9))
    assert torch.equal(a, b) and (va - vb).abs().max() > 0.01
    without = [s for s in story() if not (isinstance(s, LatentSegment) and s.noised)]
    close(outputs(model, [without])[0], a)


def test_answer_sees_the_clean_latent(model):
    "The text before the image does not depend on the clean copy, the text behind it does."
    other = story()
    other[5] = LatentSegment(other[5].latent + 1)
    (a, _), (b, _) = outputs(model, [story()]), outputs(model, [other])
    assert torch.equal(a[:4], b[:4]) and (a[4:] - b[4:]).abs().max() > 0.01


# ---------------------------------------------------------------- other kernels


@pytest.fixture
def flex(model):
    "The model with flex attention."
    model.mot.attention = 'flex'
    yield model
    model.mot.attention = 'auto'


def as_sdpa(model, f):
    "The same with a dense mask."
    model.mot.attention = 'sdpa'
    try:
        return f()
    finally:
        model.mot.attention = 'flex'


@pytest.mark.filterwarnings('ignore:flex_attention called without')
@torch.no_grad()
def test_flex_attention(flex):
    """Several samples in a row, padding, branches and noised latents: the block mask hides what
    the dense mask hides.
    """
    samples = [
        [
            *story(0),
            TextSegment((44, 45), loss=True, branch=1),
            TextSegment((46,), loss=True, branch=2),
        ],
        story(1, n=9),
        story(2, n=1),
    ]
    for rows in (None, [[0, 1], [2]]):
        for a, b in zip(
            outputs(flex, samples, rows), as_sdpa(flex, lambda: outputs(flex, samples, rows))
        ):
            close(a, b, 1e-5)


@pytest.mark.filterwarnings('ignore:flex_attention called without')
@torch.no_grad()
def test_flex_attention_behind_a_cache(flex):
    "Rows of different length, continued: free slots stay hidden."

    def held():
        cache = KVCache(flex.mot.cfg, 2, 60)
        return [
            prefill(flex, cache, [s[:k] for s in (story(0), story(1, n=9))]).x for k in (1, 3, 2)
        ]

    for a, b in zip(held(), as_sdpa(flex, held)):
        close(a, b, 1e-5)


def test_unknown_attention(model):
    model.mot.attention = 'fast'
    try:
        with pytest.raises(ValueError, match="unknown attention 'fast'; use auto, sdpa, flex"):
            outputs(model, [story()])
    finally:
        model.mot.attention = 'auto'


def test_compiled_layers():
    """Outputs and gradients of compiled layers, for batches of two sizes, are those of the
    layers as written.
    """
    plain, quick = (freeze(tiny_model(0), 'vae.', 'vit_model.') for _ in range(2))
    quick.mot.compile_layers(backend='aot_eager')
    for samples in ([story()], [story(1, n=9), story(2, n=1)]):
        for m in (plain, quick):
            sum(o.square().sum() for o in outputs(m, samples)).backward()
        with torch.no_grad():
            for a, b in zip(outputs(plain, samples), outputs(quick, samples)):
                close(a, b, 1e-5)
    grads = [[p.grad for n, p in m.named_parameters() if p.requires_grad] for m in (plain, quick)]
    assert sum(g is not None for g in grads[0]) > 60
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- layout

DROPS = [dict(zip(('text', 'vit', 'vae'), [float(b) for b in f'{k:03b}'])) for k in range(8)]


@pytest.mark.parametrize('drop', DROPS, ids=str)
def test_layout_is_complete(model, drop):
    """For every combination of dropped conditions: one mode per split, each token sees itself,
    the mask is the naive one (hazard 1).
    """
    segments = drop_conditions(full := story(), rng('drop'), **drop)
    assert all(any(s is full[k] for s in segments) for k in (3, 4, 7))  # targets stay (hazard 20)
    p = pack([segments], model.shape)
    runs, n = torch.stack([p.layout.split[0], p.layout.mode[0]]).unique_consecutive(
        dim=1, return_counts=True
    )
    modes = [
        SPLIT_NOISE
        if isinstance(s, LatentSegment) and s.noised
        else SPLIT_CAUSAL
        if isinstance(s, TextSegment)
        else SPLIT_FULL
        for s in segments
        if not isinstance(s, Gap)
    ]
    assert runs[1].tolist() == modes and int(n.sum()) == p.layout.sample.numel()
    mask = visible(p.layout, p.layout)[0]
    assert mask.diagonal().all() and torch.equal(mask, visible_naive(n.tolist(), modes))


def test_mask_is_what_the_cache_shows(model):
    """Fed segment by segment, every token sees through the cache exactly the tokens it sees in
    the packed row (hazard 1).
    """
    segments = [s for s in story() if not (isinstance(s, LatentSegment) and s.noised)]
    whole = pack([segments], model.shape)
    mask, start, cache = visible(whole.layout, whole.layout)[0], 0, KVCache(model.mot.cfg, 1, 80)
    for s in segments:
        p = pack([[s]], model.shape, rope0=cache.rope)
        seen = model.mot.context(cache_layout(p.layout, cache), p.route, cache).mask[0]
        assert (
            torch.equal(seen, mask[start : start + len(seen), : seen.shape[1]])
            and not mask[start : start + len(seen), seen.shape[1] :].any()
        )
        prefill(model, cache, [[s]])
        start += len(seen)
    assert cache.rope.tolist() == whole.rope_end.tolist() and torch.equal(
        cache.layout.rope[0, :start], whole.layout.rope[0]
    )


def test_places_ascend(model):
    "Tokens of each kind lie in order, an image between its two end tokens (hazard 35)."
    p = pack([story()], model.shape)
    assert all((at.diff() > 0).all() for at in (p.vit_at, p.vae_at, p.text_at, p.mse_at))
    marks = p.text_at[(p.text_ids == 2) | (p.text_ids == 3)].view(-1, 2)
    inside = torch.cat([torch.arange(a + 1, b) for a, b in marks.tolist()])
    assert torch.equal(inside, torch.cat([p.vit_at, p.vae_at]).sort().values)


@pytest.mark.parametrize(
    'segment',
    [
        VitSegment(torch.zeros(3, 40, 8)),
        VitSegment(torch.zeros(3, 12, 8)),
        LatentSegment(torch.zeros(4, 8, 20)),
        LatentSegment(torch.zeros(4, 6, 8)),
        LatentSegment(torch.zeros(4, 2, 8)),
    ],
    ids=['vit high', 'vit odd', 'vae wide', 'vae odd', 'vae flat'],
)
def test_images_must_fit(model, segment):
    "A position beyond the table would silently read the next row (BAGEL pitfall 7)."
    with pytest.raises(ValueError, match='does not fit a 4×4 table of .* resize it'):
        pack([[segment]], model.shape)


def test_nothing_to_pack(model):
    with pytest.raises(ValueError, match='no sample to pack'):
        pack([], model.shape)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize('preset', ['paper', 'official'])
def test_bagel_names(preset):
    "All 1223 names and shapes of BAGEL-7B-MoT and the 244 of its VAE, on the meta device."
    golden = json.loads((GOLDEN / 'bagel7b_key_shapes.json').read_text())
    model = meta_model(ClearConfig.from_dict(load_preset(preset).model))
    found = {k: list(v.shape) for k, v in model.state_dict().items() if not k.startswith('vae.')}
    vae = {k: list(v.shape) for k, v in diffusers_to_flux(model.vae.net.state_dict()).items()}
    assert (
        found == golden['model']
        and len(found) == 1223
        and sum(torch.Size(s).numel() for s in found.values()) == 14_607_260_128
    )
    assert (
        vae == golden['ae']
        and len(vae) == 244
        and sum(torch.Size(s).numel() for s in vae.values()) == 83_819_683
    )
    assert '<image_restore>' in model.cfg.system  # stage 1 teaches with it
    assert replace(model.cfg, system='') == ClearConfig(
        model.cfg.llm, VitConfig(), VaeConfig(), text_ids=151665, think_prompt=''
    )  # the defaults are BAGEL's, but for the think prompt


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_save_and_load(tmp_path, dtype):
    "Bitwise in fp32, rounded once in bf16, and without touching the global random state."
    model = tiny_model(3, tokenizer=byte_tokenizer())
    model.save_pretrained(tmp_path / 'm', dtype)
    before = torch.get_rng_state()
    back = ClearModel.from_pretrained(tmp_path / 'm')
    assert torch.equal(before, torch.get_rng_state()) and back.cfg == model.cfg
    assert back.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    for (k, a), b in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        want = a if dtype is None or k.endswith('pos_embed') else a.to(dtype).float()
        assert torch.equal(b, want) and b.dtype == torch.float32, k
    if dtype is None:
        assert all(
            torch.equal(a, b) for a, b in zip(outputs(model, [story()]), outputs(back, [story()]))
        )


def test_loaded_model_trains(tmp_path):
    "Parameters of an opened checkpoint take gradients, position tables do not."
    back = ClearModel.from_pretrained(tiny_model(3).save_pretrained(tmp_path / 'm'))
    back.ce_terms(back(pack([story()], back.shape))).mean().backward()
    assert back.mot.embed_tokens.weight.grad is not None and back.tokenizer is None
    assert not back.latent_pos_embed.pos_embed.requires_grad


def test_every_wrong_tensor_is_named(tmp_path):
    "Missing, unexpected and misshaped tensors in one error."
    folder = tiny_model(3).save_pretrained(tmp_path / 'm')
    state = load_file(folder / 'model.safetensors')
    del state['llm2vae.bias']
    save_file(
        {**state, 'surplus': torch.ones(1), 'vae2llm.bias': torch.ones(7)},
        folder / 'model.safetensors',
    )
    with pytest.raises(ValueError) as e:
        ClearModel.from_pretrained(folder)
    assert all(
        w in str(e.value)
        for w in (
            'missing llm2vae.bias',
            'unexpected surplus',
            'vae2llm.bias is (7,), the model wants (32,)',
            'model.safetensors',
        )
    )


def test_wrong_configurations_are_named(tmp_path):
    "A misspelt field, a missing file, a missing folder."
    folder = tiny_model(3).save_pretrained(tmp_path / 'm')
    (folder / 'config.json').write_text(json.dumps({**asdict(tiny_config()), 'latent_sides': 4}))
    with pytest.raises(ValueError, match='unknown latent_sides'):
        ClearModel.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match='config.json is missing'):
        ClearModel.from_pretrained(tmp_path / 'none')
    with pytest.raises(
        FileNotFoundError, match='ema.safetensors, ae.safetensors, tokenizer.json missing'
    ):
        for k in ('llm', 'vit'):
            (tmp_path / f'{k}_config.json').write_text('{}')
        ClearModel.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_nothing(tmp_path):
    "A checkpoint is complete or not there."
    model = tiny_model(3)
    model.cfg = replace(model.cfg, llm={'hidden_size': object()})  # cannot be written as JSON
    with pytest.raises(TypeError):
        model.save_pretrained(tmp_path / 'm')
    assert list(tmp_path.iterdir()) == []


def test_load_bagel(tmp_path):
    """A folder in the published format, made of the golden weights: every tensor arrives,
    tables and token numbers are found.
    """
    c = json.loads((GOLDEN / 'config.json').read_text())
    v, a = c['vit_config'], c['vae_config']
    (tmp_path / 'llm_config.json').write_text(json.dumps(c['llm_config']))
    (tmp_path / 'vit_config.json').write_text(
        json.dumps({**v, 'num_hidden_layers': v['num_hidden_layers'] + 1})
    )  # the last layer is not in the weights
    tok = Tokenizer(
        models.WordLevel(
            {**{str(i): i for i in range(290)}, **{t: 290 + i for i, t in enumerate(CONTROL)}},
            unk_token='0',
        )
    )
    tok.save(str(tmp_path / 'tokenizer.json'))
    for old, new in (('model', 'ema'), ('ae', 'ae')):
        save_file(load_file(GOLDEN / f'{old}.safetensors'), tmp_path / f'{new}.safetensors')
    vae = VaeConfig(
        ch=a['ch'], ch_mult=tuple(a['ch_mult']), blocks=a['num_res_blocks'], z=a['z_channels']
    )
    model = ClearModel.from_pretrained(tmp_path, dtype=torch.float32, vae=vae, latent_side=8)
    assert (model.shape.bos, model.shape.eoi, model.cfg.vit.layers, model.cfg.text_ids) == (
        290,
        293,
        2,
        294,
    )
    golden = load_file(GOLDEN / 'model.safetensors')
    for k, t in model.state_dict().items():
        if not k.startswith('vae.'):
            close(t, golden[k], 1e-7)
    assert (
        ClearModel.from_pretrained(tmp_path, vae=vae, latent_side=8).mot.norm.weight.dtype
        == torch.bfloat16
    )
