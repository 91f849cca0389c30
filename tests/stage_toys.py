"""Small stages for the tests of resuming and of several processes."""

from unittest.mock import patch

from clear_nb import bridge, grpo, sft
from clear_nb.base import new_model
from clear_nb.core import load_preset
from clear_nb.data import (
    TrainingSet,
    all_pairs,
    assign_pathways,
    labelled_items,
    make_picture_set,
    restore_pictures,
)
from clear_nb.reward import Reward
from clear_nb.trajectory import TextSegment

STAGES = ('sft', 'bridge', 'grpo')
rows_of, rollouts_of = sft.stage_rows, grpo.rollout_batch


def smoke(steps=6, **changes):
    """Preset smoke with a few more updates; a state after each of them."""
    return load_preset(
        'smoke',
        **{
            **{f'{s}.steps': steps for s in STAGES},
            'train.save_seconds': 0.0,
            'sft.replay': 0.0,
            **changes,
        },
    )


def world(p, scenes=8):
    """A fresh model, a pool with its examples, and the model's own restorations."""
    model = new_model(p, 0, 50)
    items = make_picture_set(model, labelled_items(0, scenes, 2, 'sft'))
    examples = assign_pathways(items, all_pairs(items), [i % 2 == 0 for i in range(scenes)], 0)
    return (
        model,
        items,
        examples,
        restore_pictures(model, items, sorted({e.image for e in examples}), 2, draws=1),
    )


def half_without_images(*args):
    """The rows of a step; the second half of them has text only."""
    rows = rows_of(*args)
    cut = len(rows) // 2
    return rows[:cut] + [[s for s in r if isinstance(s, TextSegment)] for r in rows[cut:]]


def half_restoring(model, items, pairs, cfg, seed, step, chunk=0, first=0):
    """Rollouts that all restore in the first half of the groups, and never in the second."""
    out = []
    for k, pair in enumerate(pairs, first // cfg.group):
        policy = 'always' if k < cfg.prompts // 2 else 'never'
        out += rollouts_of(
            model, items, [pair], grpo.replace(cfg, policy=policy), seed, step, 0, k * cfg.group
        )
    return out


def by_tokens(rollouts, *args):
    """Rewards that depend on every token, since an untrained model gives no answer that could be
    judged.
    """

    def value(r):
        return sum(i * (k + 1) for t in r.turns for k, i in enumerate(t.ids)) % 11 / 11

    return [Reward(value(r), 0.0, 0.0, value(r)) for r in rollouts]


def train(stage, p, made, **how):
    """One of the three stages, in place."""
    model, items, examples, own = made
    with patch.object(grpo, 'rewards_of_rollouts', by_tokens):
        if stage == 'sft':
            return sft.train_sft(model, TrainingSet(items, examples), p, own=own, **how)
        if stage == 'bridge':
            return bridge.train_bridge(model, TrainingSet(items, examples), p, own, **how)
        return grpo.train_grpo(model, items, p, **how)


def train_by_halves(stage, p, made, **how):
    """The same with images in the first half of every batch only."""
    with (
        patch.object(sft, 'stage_rows', half_without_images),
        patch.object(bridge, 'stage_rows', half_without_images),
        patch.object(grpo, 'rollout_batch', half_restoring),
    ):
        return train(stage, p, made, **how)
