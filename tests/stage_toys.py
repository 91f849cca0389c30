"""Small stages for the tests of resuming and of several processes."""
from clear_nb.base import new_model
from clear_nb.bridge import train_bridge
from clear_nb.core import load_preset
from clear_nb.data import all_pairs, assign, labelled_items, own_restorations, pool
from clear_nb.grpo import train_grpo
from clear_nb.reward import Score
from clear_nb.sft import train_sft


def smoke(steps=6, **changes):
    """Preset smoke with a few more updates; a state after each of them."""
    return load_preset('smoke', **{**{f'{s}.steps': steps for s in ('sft', 'bridge', 'grpo')}, 'train.save_seconds': 0., 'sft.replay': 0., **changes})


def by_length(question, said):
    """A judge whose scores differ between random answers."""
    return Score(len(said) % 7/7)


def world(p, scenes=8):
    """A fresh model, a pool with its examples, and the model's own restorations."""
    model = new_model(p, 0, 50)
    items = pool(model, labelled_items(0, scenes, 2, 'sft'))
    examples = assign(items, all_pairs(items), [i % 2 == 0 for i in range(scenes)], 0)
    return model, items, examples, own_restorations(model, items, sorted({e.image for e in examples}), 2, draws=1)


def train(stage, p, made, **how):
    """One of the three stages, in place."""
    model, items, examples, own = made
    if stage == 'sft': return train_sft(model, items, examples, p, own=own, **how)
    if stage == 'bridge': return train_bridge(model, items, examples, p, own, **how)
    return train_grpo(model, items, p, judge=by_length, **how)
