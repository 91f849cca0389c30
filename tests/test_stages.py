"""Each training stage can learn eight examples by heart: no bug hides behind noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clear_nb.base import base_loss, new_model, restore_sample, train_vae, vqa_sample
from clear_nb.core import load_preset, rng, torch_rng
from clear_nb.data import (
    all_pairs,
    assign_pathways,
    corrupt,
    make_picture_set,
    restore_pictures,
    scene_items,
)
from clear_nb.model import freeze
from clear_nb.ranks import ranks_of
from clear_nb.sft import RowPlan, by_image, sft_loss, sft_row
from clear_nb.train import accelerator, fit


def preset(width=96):
    "Smoke with a decoder that is wide enough to memorise"
    llm = load_preset('smoke').model['llm']
    return load_preset(
        'smoke',
        **{
            'model.llm': {
                **llm,
                'hidden_size': width,
                'intermediate_size': 2 * width,
                'num_attention_heads': 4,
                'num_key_value_heads': 2,
            },
            'base.vae_steps': 30,
        },
    )


@pytest.fixture(scope='module')
def world():
    "A model whose autoencoder has seen its eight pictures, and the pool"
    p = preset()
    items = [
        corrupt(it, rng('eight', i)) for i, it in enumerate(scene_items(0, 8, 1, progress=False))
    ]
    model = new_model(p, 0, 50)
    train_vae(
        model,
        torch.from_numpy(np.stack([it.clean for it in items])).permute(0, 3, 1, 2),
        p,
        acc=accelerator('no'),
    )
    return p, model, make_picture_set(model, items)


def memorise(model, loss, steps=250, lr=4e-3):
    "Train on one fixed batch and return the last losses"
    freeze(model, 'vae.')
    return fit(model, lambda step: loss(), steps, lr, 10, ranks=ranks_of(accelerator('no')))[-1]


def test_base_learns_eight(world):
    "Stage 0: answers, captions and restorations of eight pictures"
    p, model, pl = world
    vqa = [vqa_sample(model.tokenizer, pl, i, 'both', 1, rng('q', i)) for i in range(8)]
    fix = [restore_sample(pl, i, 1, torch_rng('r', i)) for i in range(8)]
    last = memorise(model, lambda: base_loss(model, vqa, fix))
    assert last['ce'] < 0.02 and last['mse'] < 0.05, last


@pytest.mark.parametrize('stage', ['sft', 'bridge'])
def test_stages_learn_eight(world, stage):
    "Stages 1 and 2: eight trajectories, half direct and half with restoration"
    p, _, pl = world
    model = new_model(p, 1, 50)
    model.vae = world[1].vae
    examples = assign_pathways(pl, all_pairs(pl)[:8], [i % 2 == 0 for i in range(8)], 0)
    own = (
        {i: z for i, z in restore_pictures(model, pl, list(range(8)), 3, draws=1).items()}
        if stage == 'bridge'
        else None
    )
    cfg = replace(p.sft, drop_vit=0.0)
    rows = [
        sft_row(
            model.tokenizer,
            pl,
            g,
            rng('row', k),
            torch_rng('row', k),
            cfg,
            RowPlan('both', own, 1.0, stage == 'sft'),
        )
        for k, g in enumerate(by_image(examples))
    ]
    last = memorise(model, lambda: sft_loss(model, rows, 0.5, 0.1 if stage == 'sft' else 0.0))
    assert last['ce'] < 0.02 and last['mse'] < 0.05, last
