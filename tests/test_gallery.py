"""The gallery at preset smoke: the rule decides, the record is enough to draw a page."""

import copy
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from clear_nb import gallery as ga
from clear_nb.artefacts import save_figure
from clear_nb.base import new_model
from clear_nb.generate import Rollout
from clear_nb.mmd_bench import SUBJECTS, benchmark_rows
from clear_nb.presets import load_preset
from clear_nb.records import read_records, write_record
from clear_nb.restore import Restoration
from clear_nb.scenes import FAMILIES

SMOKE = load_preset('smoke')


@pytest.fixture(scope='module')
def model():
    return new_model(SMOKE, 0, 50).eval()


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    return benchmark_rows('mmvp', 'hard', 4, tmp_path_factory.mktemp('benchmarks'))


def told(restored, right):
    """Made-up trajectories: did each restore, was each right?"""
    made = [
        Rollout(
            [],
            restorations=[Restoration(torch.full((4, 16, 16), k / 4))] * r,
            texts=['<think>a</think><image_restore>', f'<answer>{k}</answer>'],
        )
        for k, r in enumerate(restored)
    ]
    return ga.SubjectAnswers(made, [str(k) for k in range(len(made))], [bool(x) for x in right])


def answers(clear, base=(0, 0, 0, 0), never=(0, 0, 0, 0), restored=(1, 1, 1, 1)):
    return dict(clear=told(restored, clear), base=told([0] * 4, base), never=told([0] * 4, never))


def metrics(found):
    """The same choice for every family, as a record has it."""
    picked, counts = found
    return dict(
        rules={k: r.text for k, r in ga.PAGE_RULES.items()},
        scanned={f: 4 for f in FAMILIES},
        picked={f: picked for f in FAMILIES},
        counts={f: counts for f in FAMILIES},
    )


@pytest.mark.parametrize(
    'given, want',
    [
        (
            answers((0, 1, 0, 1), base=(0, 1, 0, 0), never=(0, 1, 1, 0)),
            dict(helped=3, lost=None, failed=0, harmed=2),
        ),
        (
            answers((1, 1, 1, 1), base=(1, 1, 1, 1)),
            dict(helped=None, lost=None, failed=None, harmed=None),
        ),
        (
            answers((0, 0, 1, 0), restored=(0, 0, 0, 1), never=(1, 1, 1, 1)),
            dict(helped=None, lost=None, failed=3, harmed=3),
        ),
    ],
)
def test_the_first_that_meets_the_rule(model, rows, given, want):
    """A question without a restoration meets none; of those that do, the first is shown."""
    picked, counts = ga.choose(rows, given, model)
    assert {k: e and e['place'] for k, e in picked.items()} == want
    assert (
        all((counts[k] > 0) == (want[k] is not None) for k in want)
        and counts['harmed'] <= counts['failed']
    )
    for e in filter(None, picked.values()):
        assert e['index'] == rows[e['place']].seen.index and e['said']['clear'] == str(e['place'])


def test_pictures_are_those_of_the_question(model, rows):
    """The stored degraded and clean pictures are the benchmark's, bit by bit; the restored one
    is the decoded latent.
    """
    picked, _ = ga.choose(rows, answers((0, 0, 0, 0), restored=(0, 0, 1, 1)), model)
    shown = {k: ga.text_picture(t) for k, t in picked['failed']['pictures'].items()}
    assert np.array_equal(shown['degraded'], rows[2].seen.pixels()) and np.array_equal(
        shown['clean'], rows[2].clean.pixels()
    )
    other = ga.entry(rows[2], 3, answers((0, 0, 0, 0)), model)
    assert not np.array_equal(shown['restored'], ga.text_picture(other['pictures']['restored']))


def test_a_page_needs_only_the_record(model, rows, tmp_path):
    """Drawn from what was written and read again, the page is the same file; small enough to
    commit.
    """
    found = metrics(ga.choose(rows, answers((1, 0, 0, 0), never=(0, 1, 0, 0)), model))
    path = write_record('05_gallery', found, SMOKE, 0, root=tmp_path)
    (record,) = read_records('smoke', '05_gallery', '', tmp_path)
    assert path.stat().st_size < 2**20 and record['metrics'] == json.loads(json.dumps(found))
    for rule in ga.PAGE_RULES:
        a, b = (
            save_figure(ga.page(m, rule), rule, 'made up', [record], '05_gallery', tmp_path / k)[
                'png'
            ].read_bytes()
            for k, m in dict(a=found, b=record['metrics']).items()
        )
        assert a == b
    plt.close('all')


def test_an_empty_rule_says_so(model, rows):
    """A family without such a question has a line of words and no picture."""
    fig = ga.page(
        metrics(ga.choose(rows, answers((1, 1, 1, 1), base=(1, 1, 1, 1)), model)), 'helped'
    )
    assert not any(ax.images for ax in fig.axes) and sum(
        'no such question among the first 4' in t.get_text() for ax in fig.axes for t in ax.texts
    ) == len(FAMILIES)
    plt.close(fig)


def test_search(model, tmp_path):
    """Every family is searched to the given number; each checkpoint is loaded once."""
    loaded = []
    found = ga.gallery(
        lambda p, seed, stage: loaded.append(stage) or copy.deepcopy(model), SMOKE, 0, tmp_path, 2
    )
    assert sorted(loaded) == ['base', 'grpo'] and found['scanned'] == {f: 2 for f in FAMILIES}
    assert found['rules'].keys() == ga.PAGE_RULES.keys() and all(
        set(c) == set(ga.PAGE_RULES) for c in found['counts'].values()
    )


def test_judged_by_the_benchmark(model, rows):
    """A subject that says the right thing is right."""
    direct = ga.ask_and_judge(model, rows, SUBJECTS['base'], SMOKE, 0)
    assert len(direct.right) == len(direct.answers) == len(direct.rollouts) == len(rows) and set(
        map(type, direct.right)
    ) == {bool}
