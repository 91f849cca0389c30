"""A model whose two encoders ask for other sizes than the pictures have, as at 7B, on pictures
of several sizes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clear_nb import mmd_bench as mb
from clear_nb.answer import build_prompt, check_token_budget, sampling_of
from clear_nb.base import load_stage, new_model
from clear_nb.bridge import train_bridge
from clear_nb.core import rng, torch_rng
from clear_nb.data import (
    TrainingSet,
    all_pairs,
    assign_pathways,
    decode_restorations,
    labelled_items,
    make_picture_set,
    prompts,
    restore_pictures,
)
from clear_nb.decode import Noise
from clear_nb.generate import Sampling, generate
from clear_nb.grpo import train_grpo
from clear_nb.model import ClearModel, export_bagel, init_weights
from clear_nb.presets import load_preset
from clear_nb.restore import decode_for_vit, vit_sides
from clear_nb.sft import sft_row, train_sft
from clear_nb.train import accelerator
from clear_nb.trajectory import MARKER, Gap, LatentSegment, TextSegment, VitSegment, pack

SMOKE = load_preset('smoke')


@pytest.fixture(scope='module')
def model():
    """16 pixels a latent token, 14 a ViT patch; no rule leaves the drawn scenes as they are."""
    plain = new_model(SMOKE, 0, 50)
    cfg = replace(
        plain.cfg,
        vit=replace(plain.cfg.vit, patch=14, side=8),
        latent_side=8,
        vae_rule=(128, 80, 16),
        vit_rule=(98, 56, 14),
        think_prompt='',
    )
    made = (
        init_weights(ClearModel(cfg, plain.tokenizer), torch_rng('sizes'))
        .eval()
        .requires_grad_(False)
    )
    made.language_model.lm_head.weight[plain.tokenizer.convert_tokens_to_ids(MARKER)] *= (
        12  # asks for a restoration now and then
    )
    return made


@pytest.fixture(scope='module')
def mixed(model):
    """Four pictures of four sizes, two questions each."""

    def cut(x, i):
        return np.ascontiguousarray(x[:, : 64 - 12 * i])

    return make_picture_set(
        model,
        [
            replace(it, clean=cut(it.clean, i), seen=cut(it.seen, i))
            for i, it in enumerate(labelled_items(0, 8, 2, 'sft'))
        ],
    )


def test_training_sees_what_inference_sees(model, mixed):
    """Latent and ViT patches of a degraded picture are those of a question about its file."""
    for i, it in enumerate(mixed.items):
        z, patches, _ = build_prompt(model, it.seen, 'what is it')
        assert torch.equal(patches.image, mixed.image('seen', i)) and torch.allclose(
            z.latent, mixed.seen_z[i], atol=1e-5
        )


def test_one_patch_per_latent_token(model, mixed):
    """The clean picture and a decoded one have the grid of the latent, as L_KL needs it."""
    for i in range(len(mixed)):
        tokens = [n // model.cfg.latent_patch for n in mixed.clean_z[i].shape[1:]]
        sides = [n * model.cfg.vit.patch for n in tokens]
        assert (
            list(mixed.clean[i].shape[1:])
            == sides
            == list(decode_for_vit(model, mixed.clean_z[i][None])[0].shape[1:])
        )
        assert vit_sides(model.cfg, [n * 16 for n in tokens]) == sides
    assert len({x.shape for x in mixed.clean}) > 1


def test_reread_keeps_grey_levels(model):
    """The resized picture is that of the 8-bit file."""
    x = decode_for_vit(model, torch.randn(1, model.cfg.vae.z, 20, 20, generator=torch_rng('grey')))[
        0
    ]
    assert (
        x.shape == (3, 70, 70) and ((x + 1) * 127.5 - ((x + 1) * 127.5).round()).abs().max() < 1e-3
    )


@pytest.mark.parametrize('mode', ['bridge', 'reencode', 'both'])
def test_every_way_back(model, mixed, mode):
    """A batch of pictures of several sizes restores and returns them; what is put back fits its
    slots, and rows are those asked alone.
    """
    starts = [build_prompt(model, it.seen, 'what is it') for it in mixed.items]
    s = Sampling(max_new=40, temperature=1.0, steps=3, mode=mode, record=True)
    rolls = generate(model, starts, s, Noise('way'))
    assert sum(bool(r.restorations) for r in rolls) > 1
    for i, (start, r) in enumerate(zip(starts, rolls)):
        check_token_budget(model, start, sampling_of(model, mode=mode))
        alone = generate(model, [start], s, Noise('way', first=i))[0]
        assert alone.texts == r.texts
        if not r.restorations:
            continue
        back = r.restorations[0].segments
        assert [type(x) for x in back] == dict(
            bridge=[LatentSegment, Gap],
            reencode=[Gap, VitSegment],
            both=[LatentSegment, VitSegment],
        )[mode]
        pack([back], model.shape)
        assert torch.allclose(alone.restorations[0].latent, r.restorations[0].latent, atol=1e-4)


def test_stages_train(model, mixed):
    """Stages 1 to 3 on pictures of several sizes, the model's own restorations included."""
    p = replace(SMOKE, sft=replace(SMOKE.sft, own=0.5))
    examples = assign_pathways(mixed, all_pairs(mixed), [i % 2 == 0 for i in range(8)], 0)
    own = restore_pictures(model, mixed, range(4), 3, progress=False)
    assert [own[i].shape[1:] for i in range(4)] == [mixed.clean_z[i].shape for i in range(4)]
    assert [x.shape[1:] for x in decode_restorations(model, own, False).values()] == [
        mixed.clean[i].shape for i in range(4)
    ]
    acc, own_model = (
        accelerator('no'),
        init_weights(ClearModel(model.cfg, model.tokenizer), torch_rng('sizes')),
    )
    history = [
        *train_sft(own_model, TrainingSet(mixed, examples), p, own=own, acc=acc),
        *train_bridge(own_model, TrainingSet(mixed, examples), p, own, acc=acc),
    ]
    assert np.isfinite([h['loss'] for h in history]).all() and max(h['kl'] for h in history) > 0
    assert len(train_grpo(own_model, mixed, p, acc=acc)) == p.grpo.steps


def test_small_batches_restore_the_same(model, mixed, monkeypatch):
    """Large pictures are restored in smaller batches."""
    whole = restore_pictures(model, mixed, range(4), 3, progress=False)
    monkeypatch.setattr('clear_nb.data.CACHE_TOKENS', 100)
    apart = restore_pictures(model, mixed, range(4), 3, progress=False)
    assert all(torch.allclose(whole[i], apart[i], atol=1e-4) for i in whole)


@pytest.mark.parametrize(
    'name', ['base', 'restored_base', 'self_restored_base', 'oracle', 'dec_rl']
)
def test_drawn_benchmarks(model, tmp_path, name):
    """The drawn benchmarks are resized for such a model; restored pictures too."""
    rows = mb.benchmark_rows('mmvp', 'hard', 1, tmp_path)
    got = mb.subject_cell(model, rows, mb.SUBJECTS[name], SMOKE.eval, max_new=4)
    assert len(got['correct']) == len(rows)


def test_cue(model):
    """A model without a think prompt is asked the bare question, in training and afterwards."""
    bare, told = model.cfg, replace(model.cfg, think_prompt='think first')

    def said(cfg):
        return model.tokenizer.decode(
            build_prompt(
                init_weights(ClearModel(cfg, model.tokenizer), torch_rng('cue')),
                np.zeros((64, 64, 3), np.uint8),
                'what is it',
            )[-1].ids
        ).strip()

    assert [said(c) for c in (bare, told)] == ['what is it', 'what is it think first']


def test_system_prompt(model, mixed):
    """The system prompt stands before the picture in training, in later questions and in stage
    3; a direct answer goes without.
    """
    told = init_weights(
        ClearModel(replace(model.cfg, system='look twice'), model.tokenizer), torch_rng('sizes')
    )

    def said(segments):
        return [
            told.tokenizer.decode(s.ids).strip() for s in segments if isinstance(s, TextSegment)
        ]

    p = make_picture_set(told, mixed.items)
    row = sft_row(
        told.tokenizer,
        p,
        assign_pathways(p, [(0, 0), (0, 1)], [True, False], 0),
        rng('system'),
        torch_rng('system'),
        replace(SMOKE.sft, drop_text=0.0),
    )
    plain, (direct,) = (
        prompts(told.tokenizer, p, [(0, 0)])[0],
        prompts(told.tokenizer, p, [(0, 0)], think=False),
    )
    asked = build_prompt(told, mixed.items[0].seen, 'what is it')
    assert said(row)[0] == said(plain)[0] == said(asked)[0] == 'look twice' and isinstance(
        row[1], (LatentSegment, Gap)
    )
    assert said(direct) == said(plain)[1:] and said(
        build_prompt(told, mixed.items[0].seen, 'what is it', '')
    ) == ['what is it']


def test_a_published_base_gets_the_presets_system_prompt(model, tmp_path, monkeypatch):
    """Stage 1 gives it the prompt; later stages keep what their folder says."""
    folder = export_bagel(model, tmp_path / 'base')
    monkeypatch.setattr('clear_nb.base.find_stage', lambda *_: folder)
    p = replace(SMOKE, model=dict(SMOKE.model, system='look twice'))
    opened = {s: load_stage(p, 0, s).cfg.system for s in ('base', 'sft')}
    assert opened == dict(base='look twice', sft='')
