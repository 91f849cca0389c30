"""What is saved for reading is what happened, and the numbers before and after are about the
same questions.
"""

from types import SimpleNamespace as Space

import numpy as np
import pytest
from PIL import Image

from clear_nb import ask, scenes
from clear_nb.base import new_model
from clear_nb.data import labelled_items, make_picture_set
from clear_nb.decode import Turn
from clear_nb.generate import Rollout
from clear_nb.presets import load_preset
from clear_nb.records import record_name
from clear_nb.restore import Restoration, decode_pixels
from clear_nb.reward import Outage, RewardWeights, score_rollout
from clear_nb.scenes import split_of
from clear_nb.traces import encode_text
from clear_nb.watch import (
    ask_held_out,
    by_family,
    changed_values,
    held_out,
    mean_change,
    pictures,
    save_trajectories,
    variant_name,
    watcher,
)

ASK, END = '<think>fog</think><image_restore>', '<think>now</think><answer>3</answer>'


@pytest.fixture(scope='module')
def toy():
    """A fresh model, a pool of labelled questions, a rollout without and one with two
    restorations.
    """
    model = new_model(load_preset('smoke'), 0, 50)
    p = make_picture_set(model, labelled_items(0, 4, 2, 'rl'))

    def roll(*texts):
        return Rollout(
            [],
            [Turn(list(encode_text(model.tokenizer, t)), [], True) for t in texts],
            [Restoration(p.clean_z[n]) for n in range(len(texts) - 1)],
            list(texts),
        )

    return Space(model=model, pool=p, rolls=[roll(END), roll(ASK, ASK, END)])


def test_pictures_are_those_of_the_trajectory(toy):
    """Every restoration in order between the degraded and the clean picture, decoded as the
    model would see it.
    """
    got = pictures(toy.rolls[1], toy.pool.items[0], toy.model)
    assert list(got) == ['degraded', 'restored', 'restored 2', 'clean'] and list(
        pictures(toy.rolls[0], toy.pool.items[0], toy.model)
    ) == ['degraded', 'clean']
    for name, z in zip(('restored', 'restored 2'), toy.pool.clean_z):
        want = (decode_pixels(toy.model, z[None])[0].permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(got[name] - want).max() <= 0.5
    assert np.array_equal(got['degraded'], toy.pool.items[0].seen) and np.array_equal(
        got['clean'], toy.pool.items[0].clean
    )


def test_watcher_finds_the_clean_picture(toy, tmp_path):
    """The callback of the loop: questions lead to their picture, only every n-th step is
    written, PNGs hold the pixels.
    """
    ask = [toy.pool.items[1].questions[0], toy.pool.items[0].questions[1]]
    outcomes = [score_rollout(toy.rolls[0], ask[0]), Outage('no reply')]
    watch = watcher(tmp_path, toy.model, toy.pool, every=5, k=2)
    for step in (4, 5, 6):
        watch(step, toy.rolls, ask, outcomes)
    assert [f.name for f in tmp_path.iterdir()] == ['step00005']
    for n, i in enumerate((1, 0)):
        assert np.array_equal(
            np.array(Image.open(tmp_path / 'step00005' / f'{n}-clean.png')), toy.pool.items[i].clean
        )
        assert np.array_equal(
            np.array(Image.open(tmp_path / 'step00005' / f'{n}-degraded.png')),
            toy.pool.items[i].seen,
        )
    page = (tmp_path / 'step00005' / 'index.html').read_text()
    assert (
        page.count('<img') == 6
        and 'no reward, Outage: no reply' in page
        and '&lt;answer&gt;3' in page
        and '<answer>' not in page
    )


def test_a_page_is_written_whole_or_not_at_all(toy, tmp_path):
    """An error halfway leaves no folder; a repeated step replaces its page."""
    row = [toy.rolls[:1], toy.pool.items[0].questions[:1], [Outage('first')], toy.pool.items[:1]]
    broken = [
        toy.rolls[:1] * 2,
        toy.pool.items[0].questions,
        [Outage('x'), None],
        toy.pool.items[:1] * 2,
    ]
    with pytest.raises(AttributeError):
        save_trajectories(tmp_path, 0, *broken, toy.model)
    assert list(tmp_path.iterdir()) == []
    for reason in ('first', 'second'):
        row[2] = [Outage(reason)]
        page = save_trajectories(tmp_path, 0, *row, toy.model)
    assert 'second' in page.read_text() and 'first' not in page.read_text()


def test_held_out_scenes_are_of_the_validation_split():
    """Every family, no picture twice, none of a training scene."""
    items = held_out(3)
    families = [i.questions[0].family for i in items]
    assert {f: families.count(f) for f in families} == dict.fromkeys(scenes.FAMILIES, 3)
    shown = {
        b.image.tobytes(): b.scene
        for f in scenes.FAMILIES
        for b in scenes.benchmark(f, 3, 0, 'val')
    }
    assert {split_of(shown[i.clean.tobytes()]) for i in items} == {'val'} and all(
        (i.seen != i.clean).any() for i in items
    )


def test_answers_do_not_depend_on_the_batch(toy):
    """Chunks of any size give the same rewards; each family keeps its questions in order."""
    items = held_out(1)
    a, b = (
        ask_held_out(toy.model, items, load_preset('smoke', **{'eval.batch': n})) for n in (2, 64)
    )
    kept = by_family(a, items)
    assert (
        a == b
        and list(kept) == list(scenes.FAMILIES)
        and all(
            len(v['correct']) == len(v['trigger']) == len(v['reward']) == 1 for v in kept.values()
        )
    )


@pytest.mark.parametrize(
    'options',
    [
        dict(mode='reencode', policy='always', max_restores=2, rules='release', w_cost=0.2),
        dict(policy='never', w_dec=0.0),
    ],
)
def test_held_out_answers_follow_the_preset(toy, monkeypatch, options):
    """Mode, policy, number of restorations, rules and weights of stage 3 decide how held-out
    questions are asked and paid; text is greedy, pictures are made by the ODE.
    """
    seen, plain = [], ask.generate
    p = load_preset('smoke', **{'eval.batch': 64, **{f'grpo.{k}': v for k, v in options.items()}})

    def spy(model, asked, sampling, noise, **kw):
        seen.append((sampling, rolls := plain(model, asked, sampling, noise, **kw)))
        return rolls

    monkeypatch.setattr(ask, 'generate', spy)
    items, g = held_out(1), p.grpo
    found = ask_held_out(toy.model, items, p)
    [(s, rolls)] = seen
    assert (s.mode, s.policy, s.max_restores) == (g.mode, g.policy, g.max_restores) and (
        s.temperature,
        s.sigma,
    ) == (0, 0)
    weights = RewardWeights(g.w_acc, g.w_fmt, g.w_dec, g.w_cost)
    assert found == [
        (score_rollout(r, i.questions[0], weights=weights, rules=g.rules), bool(r.restorations))
        for r, i in zip(rolls, items)
    ]
    assert found != [
        (score_rollout(r, i.questions[0]), bool(r.restorations)) for r, i in zip(rolls, items)
    ]


OWN = load_preset('tiny').grpo
NAMES = [
    (dict(), ''),
    (dict(mode='bridge', lr=OWN.lr, steps=OWN.steps), ''),
    (dict(mode='reencode'), 'dec'),
    (dict(mode='reencode', lr=1e-6), 'dec+lr=0.000001'),
    (dict(lambda_flow=0), 'noflow'),
    (dict(lambda_flow=0.0, w_dec=0.0), 'noflow+nodec'),
    (dict(lambda_flow=0.5), 'lambda_flow=0.5'),
    (dict(policy='never'), 'text'),
    (dict(w_cost=0.2, beta=0.0), 'w_cost=0.2+beta=0'),
    (dict(steps=5, w_dec=None), 'steps=5'),
]


@pytest.mark.parametrize('values,name', NAMES)
def test_names_of_runs(values, name):
    """Only what differs from the preset is named; every name is a file name and belongs to one
    set of values.
    """
    changed = changed_values(load_preset('tiny').grpo, **values)
    assert variant_name(changed) == name and record_name('03_grpo', 0, name).startswith('03_grpo-')
    assert variant_name({**changed, 'judge': 'org/gpt-4.1:mini'}) == '+'.join(
        filter(None, [name, 'judge=org_gpt_4.1_mini'])
    )
    assert load_preset('tiny', **{f'grpo.{k}': v for k, v in changed.items()}).overrides.keys() == {
        f'grpo.{k}' for k in changed
    }


def bits(text):
    return dict(correct=text, trigger=text, reward=[float(c) / 2 for c in text])


def test_change_by_hand():
    """Families count equally, whatever their size; the change is that of the means."""
    held = dict(before=dict(a=bits('0000'), b=bits('01')), after=dict(a=bits('0100'), b=bits('11')))
    got = mean_change([held])
    assert (got['before'].mean, got['after'].mean, got['change'].mean) == (25, 62.5, 37.5)
    assert mean_change([held], 'reward')['change'].mean == 18.75 and got['change'].n == 6


def test_change_is_paired():
    """The same questions right before and after: no uncertainty about the change, however
    uncertain the level.
    """
    got = mean_change([dict(before=dict(a=bits('01' * 20)), after=dict(a=bits('01' * 20)))])
    assert got['before'].low < 50 < got['before'].high and (
        got['change'].low,
        got['change'].high,
    ) == (0, 0)


def test_change_refuses_what_cannot_be_compared():
    """No seed at all, or seeds with different questions."""
    one, two = (dict(before=dict(a=bits(t)), after=dict(a=bits(t))) for t in ('01', '011'))
    with pytest.raises(ValueError, match='run 03_grpo first'):
        mean_change([])
    with pytest.raises(ValueError, match='different numbers of questions'):
        mean_change([one, two])
