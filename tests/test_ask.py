"""One function asks CLEAR models for the evaluation, and it asks the same whatever the batch."""

import ast

import pytest
import torch

from clear_nb import ask
from clear_nb.base import new_model
from clear_nb.core import PATHS
from clear_nb.data import all_pairs, direct_answers, labelled_items, make_picture_set, prompts
from clear_nb.decode import Noise
from clear_nb.generate import Sampling
from clear_nb.presets import load_preset

# Rooms that call `generate` for another purpose: one question of a person, rollouts of training.
OTHER_PURPOSES = {'answer', 'explore', 'grpo'}
METHOD = {'decode', 'restore', 'generate'}


def calls_of_generate(path):
    """List the functions of a module that call the package's `generate`."""
    tree, found = ast.parse(path.read_text(encoding='utf-8')), []
    for f in ast.walk(tree):
        if isinstance(f, ast.FunctionDef):
            calls = [n.func for n in ast.walk(f) if isinstance(n, ast.Call)]
            named = [getattr(c, 'id', '') == 'generate' for c in calls]
            through = [
                isinstance(c, ast.Attribute)
                and c.attr == 'generate'
                and getattr(c.value, 'id', '') in ('generate', 'gen', 'clear_nb')
                for c in calls
            ]
            found += [f.name] * any(named + through)
    return found


def test_one_function_asks():
    """Only `ask.ask_model` calls `generate` for the evaluation."""
    paths = [p for p in PATHS.package.glob('*.py') if p.stem not in OTHER_PURPOSES | METHOD]
    found = {p.stem: names for p in paths if (names := calls_of_generate(p))}
    assert found == dict(ask=['ask_model'])


@pytest.fixture(scope='module')
def model():
    return new_model(load_preset('smoke'), 0, 50).eval()


@pytest.mark.parametrize('batch', [1, 3, 64])
def test_batches_change_nothing(model, batch):
    """Any batch gives the trajectories of single questions, with the noise that was named."""
    pictures = make_picture_set(model, labelled_items(0, 6, 2, 'rl'))
    pairs, how = all_pairs(pictures), Sampling(max_new=4, steps=2, policy='always', max_restores=1)
    noises = [Noise('test', k) for k in range(len(pairs))]

    def build(part):
        return prompts(model.tokenizer, pictures, part)

    made = ask.ask_model(model, pairs, build, how, batch, noises)
    for pair, noise, got in zip(pairs, noises, made):
        (alone,) = ask.ask_model(model, [pair], build, how, 1, [noise])
        assert got.texts == alone.texts and len(got.restorations) == len(alone.restorations)
        for a, b in zip(got.restorations, alone.restorations):
            assert torch.allclose(a.latent, b.latent, atol=1e-4)


def test_direct_answers_go_through_it(model, monkeypatch):
    """Labelled questions before stage 1 are asked by the same function."""
    seen, real = [], ask.generate
    monkeypatch.setattr(ask, 'generate', lambda *a, **k: seen.append(len(a[1])) or real(*a, **k))
    pictures = make_picture_set(model, labelled_items(0, 6, 2, 'rl'))
    assert len(direct_answers(model, pictures, all_pairs(pictures), batch=4, max_new=2)) == 6
    assert seen == [4, 2]


def test_names_of_rows():
    """Every row of a drawn benchmark has its place as number; other indexes keep theirs."""
    from clear_nb.mmd_bench import BENCHMARKS, clean_samples

    for b in BENCHMARKS:
        numbers = [ask.row_number(s.benchmark, s.index) for s in clean_samples(b, 6)]
        assert numbers == list(range(len(numbers)))
    assert ask.row_number('MMBench_DEV_EN_V11', '1000007') == 1000007
