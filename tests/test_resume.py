"""A killed run goes on exactly where it was; damaged and foreign states are named."""

import copy
import os
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from processes import python
from stage_toys import STAGES, smoke, world
from stage_toys import train as stage_train
from test_train import toy

from clear_nb import base
from clear_nb import train as loop
from clear_nb.core import ROOT, torch_rng
from clear_nb.data import TrainingSet, all_pairs, assign_pathways, labelled_items, make_picture_set
from clear_nb.identity import made_from
from clear_nb.presets import load_preset
from clear_nb.ranks import ranks_of
from clear_nb.reward import AnswerScore
from clear_nb.train import (
    accelerator,
    fit,
    last_state,
    read_state,
    save_state,
    saved_states,
    train_once,
)


def seen_files(folder):
    """List the names in a folder without hidden ones, which are locks."""
    return sorted(f.name for f in folder.iterdir() if not f.name.startswith('.'))


def test_kill():
    """Three kills with SIGKILL, in an update, in rollouts and while a state is written, end at the
    weights of an undisturbed run.
    """
    done = python(ROOT / 'tests' / 'kill_resume.py', 3, '--seed', 20)
    rows = [r.split() for r in done.stdout.splitlines()[1:]]
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert {r[0] for r in rows} == {'saving', 'update', 'rollouts'} and {r[-1] for r in rows} == {
        'yes'
    }, done.stdout


def alone():
    """The only process, without autocast."""
    return ranks_of(accelerator('no'))


def train(path, stop=None, **how):
    """The toy model, with a state after every step, and a stop."""
    net, loss = toy()
    torch.nn.init.zeros_(net.bias)

    def stopped(step):
        if step == stop:
            raise InterruptedError
        return loss(step)

    try:
        history = fit(
            net,
            stopped,
            8,
            0.1,
            ema=0.9,
            ranks=alone(),
            state=path,
            save_seconds=0.0,
            **how,
        )
    except InterruptedError:
        return None
    return net.weight.detach().clone(), history


def flip(path):
    """One bit of the last tensor."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    'spoil',
    [
        flip,
        lambda f: os.truncate(f, 100),
        lambda f: f.write_bytes(b''),
        lambda f: os.truncate(f, f.stat().st_size - 4),
    ],
)
def test_damaged_state(tmp_path, spoil):
    """The newest state cannot be used: it is named, and the one before it leads to the same weights
    and history.
    """
    want = train(tmp_path / 'a.pt')
    train(tmp_path / 'b.pt', stop=5)
    newest, before = saved_states(tmp_path / 'b.pt')
    spoil(newest)
    with pytest.warns(UserWarning, match=f'{newest.name}.*; going on from the state before it'):
        weights, history = train(tmp_path / 'b.pt')
    assert (
        before.name == 'b-00000004.safetensors'
        and torch.equal(weights, want[0])
        and history == want[1]
        and not seen_files(tmp_path)
    )


def test_no_state_left(tmp_path):
    """When none can be read the run stops and says what to delete."""
    train(tmp_path / 's.pt', stop=3)
    for f in saved_states(tmp_path / 's.pt'):
        f.write_bytes(b'')
    with (
        pytest.warns(UserWarning),
        pytest.raises(
            ValueError, match='delete s-00000003.safetensors, s-00000002.safetensors to start again'
        ),
    ):
        train(tmp_path / 's.pt')


def test_state_of_another_run(tmp_path):
    """Other numbers, other run."""
    train(tmp_path / 's.pt', stop=3)
    with pytest.raises(
        ValueError, match='of another run .*loop.warmup: 0 there, 2 here.*delete them'
    ):
        train(tmp_path / 's.pt', warmup=2)


def test_state_of_older_code(tmp_path):
    """A state without an identity, as older code wrote it, is refused in one sentence."""
    net, _ = toy()
    opt = torch.optim.AdamW(net.parameters())
    old = dict(history=[], plan=dict(steps=8), ema=0)
    save_state(tmp_path / 's.pt', 3, loop.state_tensors(net, opt, None), old)
    with pytest.raises(ValueError, match=r'another run \(its identity is unknown\); delete them'):
        train(tmp_path / 's.pt')


@pytest.mark.parametrize('stage', STAGES)
def test_state_of_other_data(tmp_path, stage):
    """As many questions, but others, or another judge: the run does not go on; with what it began
    with it does.
    """
    p, step, seen, how = (
        smoke(3),
        loop.training_step,
        [],
        dict(acc=accelerator('no'), state=tmp_path / 's.pt'),
    )
    model, items, examples, own = world(p, 4)
    other = make_picture_set(model, labelled_items(9, 4, 2, 'sft'))

    def begin(items, examples, **more):
        return stage_train(stage, p, (copy.deepcopy(model), items, examples, own), **how, **more)

    def stopped(*a):
        if len(seen) == 2:
            raise InterruptedError
        seen.append(1)
        return step(*a)

    with patch.object(loop, 'training_step', stopped), pytest.raises(InterruptedError):
        begin(items, examples)
    with pytest.raises(ValueError, match='of another run'):
        begin(other, assign_pathways(other, all_pairs(other), [i % 2 == 0 for i in range(4)], 0))
    if stage == 'grpo':
        with pytest.raises(ValueError, match='of another run'):
            begin(items, examples, judge=lambda q, said: AnswerScore(1.0))
    assert len(begin(items, examples)) == 3


def test_full_disk(tmp_path, monkeypatch):
    """A state that could not be written leaves no file behind and the older ones in place."""
    train(tmp_path / 's.pt', stop=3)

    def full(tensors, path, info):
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('clear_nb.train.save_file', full)
    with pytest.raises(OSError, match='the disk is full.*s-00000004'):
        train(tmp_path / 's.pt')
    assert [f.name for f in saved_states(tmp_path / 's.pt')] == [
        's-00000003.safetensors',
        's-00000002.safetensors',
    ] and len(seen_files(tmp_path)) == 2


def test_states_outlive_a_failed_save(tmp_path):
    """Only when the trained model has been handed over do its states go."""

    def fails(model, history):
        raise OSError('no room')

    with pytest.raises(OSError, match='no room'):
        train(tmp_path / 's.pt', done=fails)
    assert saved_states(tmp_path / 's.pt')[0].name == 's-00000008.safetensors'
    saved = []
    weights, history = train(
        tmp_path / 's.pt',
        done=lambda m, past: saved.append(m.weight.detach().clone()) or saved.append(len(past)),
    )
    assert (
        torch.equal(saved[0], weights)
        and saved[1] == len(history) == 8
        and not saved_states(tmp_path / 's.pt')
    )


def test_kept_states(tmp_path):
    """A new state replaces all but the one before it, also one that claims to be newer."""
    for step in (1, 2, 3, 9):
        save_state(tmp_path / 's.pt', step, dict(x=torch.tensor(float(step))), {})
    save_state(tmp_path / 's.pt', 4, dict(x=torch.tensor(4.0)), dict(note='kept'))
    assert [f.name[2:10] for f in saved_states(tmp_path / 's.pt')] == ['00000004', '00000003']
    tensors, info = read_state(saved_states(tmp_path / 's.pt')[0])
    assert (
        tensors['x'] == 4 and info['note'] == 'kept' and last_state(tmp_path / 'other.pt') is None
    )


def test_global_generator(tmp_path):
    """A loss that draws from torch's own generator goes on with the numbers it would have drawn."""

    def noisy(path, stop=None):
        net, _ = toy()

        def loss(step):
            if step == stop:
                raise InterruptedError
            return (net(torch.randn(4, 2)) - 1).square().mean(), {}

        try:
            fit(net, loss, 6, 0.1, ranks=alone(), state=path, save_seconds=0.0)
        except InterruptedError:
            pass
        return net.weight

    torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
    want = noisy(tmp_path / 'a.pt')
    torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
    noisy(tmp_path / 'b.pt', 3)
    torch.rand(7)
    assert torch.equal(noisy(tmp_path / 'b.pt'), want)


class Saved(torch.nn.Linear):
    """A model that can be saved."""

    def save_pretrained(self, folder, dtype):
        folder.mkdir(exist_ok=True)
        torch.save(self.state_dict(), folder / 'w.pt')


def staged(folder, plan='a', asked=None):
    """The toy under `train_once`; `asked` gets the steps that were computed."""
    net, asked = Saved(2, 1), [] if asked is None else asked
    with torch.no_grad():
        net.weight.zero_()
        net.bias.zero_()

    def loss(step):
        asked.append(step)
        return (net(torch.randn(4, 2, generator=torch_rng('staged', step))) - 1).square().mean(), {}

    return train_once(
        folder,
        made_from('train', params=dict(plan=plan)),
        lambda state, done: fit(
            net, loss, 6, 0.1, ranks=alone(), state=state, save_seconds=0.0, done=done
        ),
    )


@pytest.mark.parametrize('where', ['model', 'history', 'states'])
def test_once(tmp_path, monkeypatch, where):
    """Killed while the model is written, while the history is, or before the states go: no step is
    computed twice, and the history is whole.
    """
    want, asked, again, write = staged(tmp_path / 'other'), [], [], loop.atomic_path

    def dies(first, *a):
        if where != 'history' or str(first).endswith('history.json'):
            raise InterruptedError
        return write(first)

    target = dict(
        model=(Saved, 'save_pretrained'),
        history=(loop, 'atomic_path'),
        states=(loop, 'drop_states'),
    )[where]
    with monkeypatch.context() as m:
        m.setattr(*target, dies)
        with pytest.raises(InterruptedError):
            staged(tmp_path / 's', asked=asked)
    assert staged(tmp_path / 's', asked=again) == want and asked == list(range(6)) and again == []
    assert seen_files(tmp_path) == [
        'other',
        'other_history.json',
        's',
        's_history.json',
    ]
    with pytest.raises(ValueError, match='another run .*delete it'):
        staged(tmp_path / 's', plan='b')


@pytest.mark.parametrize('moment', ['history', 'states'])
def test_parts_of_stage_0(tmp_path, monkeypatch, moment):
    """Killed when a part is trained and not yet written down, stage 0 goes on without computing it
    again.
    """
    p, write, steps, last = (
        load_preset('smoke'),
        loop.atomic_path,
        [],
        dict(history='pictures_history.json', states='pictures_state.pt')[moment],
    )
    drop = loop.drop_states

    def dies(path):
        if str(path).endswith(last):
            raise InterruptedError
        return (write if moment == 'history' else drop)(path)

    small = replace(p, base=replace(p.base, vae_steps=2, steps=2, more_steps=1, text_steps=1))
    counted, made, world = base.base_loss, base.new_model(p, 0, 50), base.base_items(p, 0)
    monkeypatch.setattr(base, 'new_model', lambda *a: copy.deepcopy(made))
    monkeypatch.setattr(base, 'base_items', lambda *a: world)
    monkeypatch.setattr(base, 'base_loss', lambda *a: (steps.append(1), counted(*a))[1])
    with monkeypatch.context() as m:
        m.setattr(loop, 'atomic_path' if moment == 'history' else 'drop_states', dies)
        with pytest.raises(InterruptedError):
            base.train_stage0(small, 0, tmp_path / 'parts')
    model, histories = base.train_stage0(small, 0, tmp_path / 'parts')
    assert len(steps) == 4 and {k: len(h) for k, h in histories.items()} == dict(
        vae=2, pictures=2, later=1, text=1
    )
    assert seen_files(tmp_path / 'parts') == sorted(
        f'{k}{end}' for k in histories for end in ('', '_history.json')
    )
    again, same = base.train_stage0(small, 0, tmp_path / 'parts')
    assert (
        same == histories
        and len(steps) == 4
        and torch.equal(again.vae2llm.weight, model.vae2llm.weight)
    )
    with pytest.raises(ValueError, match='another run .*delete it'):
        base.train_stage0(replace(small, base=replace(small.base, steps=3)), 0, tmp_path / 'parts')


@pytest.mark.parametrize('other', [dict(seed=1), dict(preset=dict(batch=3)), dict(weights=1)])
def test_a_state_belongs_to_its_run(tmp_path, other):
    """A stage that was killed does not go on with another seed, other numbers or from other
    weights.
    """
    from clear_nb.sft import train_sft

    p, state = load_preset('smoke'), tmp_path / 'sft_state.pt'
    p = replace(p, sft=replace(p.sft, steps=3), train=replace(p.train, save_seconds=0.0))
    made = [base.new_model(p, k, 50) for k in (0, 1)]
    toys = make_picture_set(made[0], labelled_items(0, 4, 2, 'sft'))
    examples = assign_pathways(toys, all_pairs(toys), [True, False] * 2, 0)

    def killed(m, _):
        raise InterruptedError

    def go(model, preset, seed, done=None):
        return train_sft(
            copy.deepcopy(model), TrainingSet(toys, examples), preset, seed, state=state, done=done
        )

    with pytest.raises(InterruptedError):
        go(made[0], p, 0, killed)
    changed = replace(p, sft=replace(p.sft, **other.get('preset', {})))
    with pytest.raises(ValueError, match='another run .*delete them to start again'):
        go(made[other.get('weights', 0)], changed, other.get('seed', 0))
    assert len(go(made[0], p, 0, lambda *a: None)) == 3
