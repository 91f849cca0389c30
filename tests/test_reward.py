"""Rewards: failures of the judge are no wrong answers, malformed trajectories earn no format
point, order does not matter.
"""

from types import SimpleNamespace as Space

import numpy as np
import pytest

from clear_nb import scenes
from clear_nb.core import load_preset
from clear_nb.paper import paper_table
from clear_nb.reward import (
    RULES_BY_NAME,
    AnswerScore,
    Outage,
    Reward,
    RewardWeights,
    RuleJudge,
    Unparsable,
    decision_reward,
    matches,
    read_score,
    score_rollout,
)
from clear_nb.trajectory import MARKER, parse

THINK, ANSWER = '<think>it is dark</think>', '<answer>red</answer>'
QUESTION = Space(prompt='which color', answer='red')


def rollout(*texts, restored=None):
    """A trajectory with as many executed restorations as texts allow."""
    return Space(
        parsed=parse(list(texts)),
        restorations=[None] * (max(0, len(texts) - 1) if restored is None else restored),
    )


def model_judge(reply):
    """A judge model behind a connection: `reply` is its text or the exception of the client."""

    def judge(question, said):
        if isinstance(reply, (TimeoutError, PermissionError)):
            return Outage(f'{type(reply).__name__}: {reply}')
        return read_score(reply)

    return judge


@pytest.mark.parametrize(
    'reply,kind',
    [
        ('0.85', AnswerScore),
        ('0.85.', AnswerScore),
        ('score: 0.85\n', AnswerScore),
        ('I cannot judge this', Unparsable),
        ('85%', Unparsable),
        ('1.5', Unparsable),
        ('', Unparsable),
        (TimeoutError('30 s'), Outage),
        (PermissionError('401'), Outage),
    ],
)
def test_judge_failures_are_typed(reply, kind):
    """Timeouts, refusals and garbage come back as themselves, never as the reward 0."""
    got = score_rollout(rollout(THINK + ANSWER), QUESTION, model_judge(reply))
    assert isinstance(got, Reward if kind is AnswerScore else kind)
    if kind is AnswerScore:
        assert got.acc == 0.85


MALFORMED = {
    'nothing': [''],
    'no text': [],
    'answer only': [ANSWER],
    'thought only': [THINK],
    'junk before': ['so ' + THINK + ANSWER],
    'junk after': [THINK + ANSWER + ' so'],
    'two answers': [THINK + ANSWER * 2],
    'two thoughts': [THINK * 2 + ANSWER],
    'answer first': [ANSWER + THINK],
    'empty answer': [THINK + '<answer></answer>'],
    'empty thought': ['<think></think>' + ANSWER],
    'blank answer': [THINK + '<answer> \n</answer>'],
    'blank thought': ['<think> </think>' + ANSWER],
    'all blank': ['<think> </think><answer> </answer>'],
    'blank thought before restoring': ['<think>\t</think>' + MARKER, THINK + ANSWER],
    'blank thought after it': [THINK + MARKER, '<think> </think>' + ANSWER],
    'open answer': [THINK + '<answer>red'],
    'nested': ['<think><answer>red</answer></think>' + ANSWER],
    'marker in thought': [f'<think>{MARKER}</think>' + ANSWER],
    'marker at the end': [THINK + MARKER],
    'marker after answer': [THINK + ANSWER + MARKER],
    'no second thought': [THINK + MARKER, ANSWER],
    'no first thought': [MARKER, THINK + ANSWER],
    'answer twice': [THINK + ANSWER + MARKER, THINK + ANSWER],
}


@pytest.mark.parametrize('name', MALFORMED)
def test_malformed(name):
    """No format point for anything but the two patterns."""
    got = score_rollout(rollout(*MALFORMED[name]), QUESTION)
    assert got.fmt == 0 and got.total <= 0.9


def test_well_formed():
    """The two patterns, with their rewards."""
    direct, restored = rollout(THINK + ANSWER), rollout(THINK + MARKER, THINK + ANSWER)
    assert score_rollout(direct, QUESTION) == Reward(1, 1, 0, 0.85)
    assert score_rollout(restored, QUESTION).total == pytest.approx(1.0)


def test_restored_means_executed():
    """The marker's text alone is no restoration; the decision reward reads what was carried out."""
    said = rollout(THINK + MARKER, restored=0)
    assert (
        score_rollout(said, QUESTION).dec == -1
        and score_rollout(rollout(THINK + MARKER, THINK), QUESTION).dec == 0
    )


def test_paper_tables():
    """Table 15 and the weights of eq. 5."""
    for r in paper_table(15).itertuples():
        assert decision_reward(bool(r.generated), bool(r.correct)) == r.reward
    w = RewardWeights()
    assert (w.acc, w.fmt, w.dec) == (0.75, 0.1, 0.15)


@pytest.mark.parametrize('rules', RULES_BY_NAME)
def test_cost_of_a_restoration(rules):
    """Ours: taken off once per restoration that was carried out, and off the total only; 0 is
    the paper's reward.
    """
    direct, once, said = [THINK + ANSWER], [THINK + MARKER, THINK + ANSWER], [THINK + MARKER]
    for texts, executed in ((direct, 0), (once, 1), ([THINK + MARKER] * 2 + direct, 2), (said, 0)):
        r = Space(texts=texts, parsed=parse(texts), restorations=[None] * executed)
        free, paid = (
            score_rollout(r, QUESTION, weights=RewardWeights(cost=c), rules=rules)
            for c in (0.0, 0.2)
        )
        assert free == score_rollout(r, QUESTION, rules=rules) and free.cost == 0
        assert (paid.acc, paid.fmt, paid.dec) == (free.acc, free.fmt, free.dec)
        assert paid.cost == 0.2 * executed and paid.total == pytest.approx(
            free.total - 0.2 * executed
        )


def test_weights_come_from_the_preset():
    """All four, from the section of stage 3; no preset has a cost by default."""
    cfg = load_preset(
        'smoke', **{f'grpo.w_{k}': v for k, v in dict(acc=0.1, fmt=0.2, dec=0.3, cost=0.4).items()}
    ).grpo
    assert (
        RewardWeights.of(cfg) == RewardWeights(0.1, 0.2, 0.3, 0.4)
        and RewardWeights.of(load_preset('paper').grpo) == RewardWeights()
    )


@pytest.mark.parametrize('cost', [0.0, 0.1, 0.15, 0.3])
def test_when_restoring_pays(cost):
    """Mean rewards of scored trajectories: restoring wins exactly above p_d − (w_dec −
    w_cost)/(w_acc + w_dec).
    """
    w, wrong = RewardWeights(cost=cost), THINK + '<answer>blue</answer>'
    pay = {
        (k, c): score_rollout(
            rollout(*([THINK + MARKER] if k else []), THINK + ANSWER if c else wrong),
            QUESTION,
            weights=w,
        ).total
        for k in (0, 1)
        for c in (0, 1)
    }

    def mean(k, p):
        return p * pay[k, 1] + (1 - p) * pay[k, 0]

    for direct in np.linspace(0, 1, 11):
        for restored in np.linspace(0, 1, 13):
            border = direct - (w.dec - cost) / (w.acc + w.dec)
            if abs(restored - border) > 1e-9:
                assert (mean(1, restored) > mean(0, direct)) == (restored > border)


def test_no_answer_needs_no_judge():
    """A trajectory without an answer is wrong even while the judge is down."""
    got = score_rollout(rollout(THINK), QUESTION, model_judge(TimeoutError()))
    assert got.acc == 0 and got.dec == -1


def test_order_and_company():
    """Rewards are a function of one trajectory: any order, any repetition."""
    rolls = [
        rollout(*t)
        for t in [[THINK + ANSWER], [THINK + MARKER, THINK + ANSWER], *MALFORMED.values()]
    ]
    alone = [score_rollout(r, QUESTION) for r in rolls]
    for seed in range(5):
        order = np.random.default_rng(seed).integers(len(rolls), size=60)
        assert [score_rollout(rolls[k], QUESTION) for k in order] == [alone[k] for k in order]


@pytest.mark.parametrize(
    'said,truth,right',
    [
        ('RED', 'red', True),
        (' the red ', 'red', True),
        ('red.', 'red', True),
        ('3', '3.0', True),
        ('1,000', '1000', True),
        ('-5', '5', False),
        ('3', '30', False),
        ('nan', '3', False),
        ('inf', 'infinity', False),
        ('dark red', 'red', False),
        ('ｒｅｄ', 'red', True),
        ('', '', True),
        ('!', '?', False),
    ],
)
def test_rule(said, truth, right):
    """Equal numbers, equal words."""
    assert matches(said, truth) == right


UNLIKE = [
    ('\u22125', '5'),
    ('-5%', '5%'),
    ('-5 cm', '5 cm'),
    ('x=-2', 'x=2'),
    ('x = - 2', 'x = 2'),
    ('y=-x', 'y=x'),
    ('-3°', '3°'),
    ('(-3, 4)', '(3, 4)'),
    ('-$5', '$5'),
    ('$-5$', '$5$'),
    ('-½', '½'),
    ('3:5', '3.5'),
    ('3/4', '3:4'),
    ('1,5', '1.5'),
    ('.5 m', '5 m'),
    ('50%', '50'),
    ('3°', '3'),
    ('$5', '€5'),
    ('it is -5', 'it is 5'),
]
ALIKE = [
    ('\u22125', '-5'),
    ('\u22125.0', '-5'),
    ('－5％', '-5 %'),
    ('\u2212 5', '-5'),
    ('x = \u2212 2', 'x=-2'),
    ('5℃', '5 °C'),
    ('½', '1/2'),
    ('3 : 5', '3:5'),
    ('3 / 4', '3/4'),
    ('well-known', 'well known'),
    ('red.', 'Red'),
    ('1,000', '1000'),
    ('12-14', '12 - 14'),
    ('12–14 cm', '12 - 14 cm'),
    ('2025-12-24', '2025/12/24'),
    ('24.12.2025', '24/12/2025'),
    ('May 5, 2020', 'may 5 2020'),
    ('(1, 2)', '1,2'),
    ('(100,200)', '100, 200'),
    ('$5$', '5'),
    ('5 cm.', '5 cm'),
    ('+5 cm', '5 cm'),
    ('covid-19', 'COVID 19'),
    ('"5"', '5'),
    ('- 5', '5'),
    ('km/h', 'km h'),
    ('**-5**', '-5'),
]


@pytest.mark.parametrize('said,truth', UNLIKE + ALIKE)
def test_signs_points_and_units(said, truth):
    """What belongs to a number is no punctuation, in any text and in any writing."""
    assert matches(said, truth) == matches(truth, said) == ((said, truth) in ALIKE)


def test_options_of_the_world():
    """On real multiple-choice questions: the letter and its option are right, every other letter
    and option is wrong.
    """
    judge, seen = RuleJudge(), 0
    for k in range(40):
        for q in scenes.training_item(0, k)[1]:
            if q.answer not in tuple('ABCD') or not q.options:
                continue
            seen += 1
            for letter, option in zip('ABCD', q.options):
                for said in (
                    letter,
                    letter.lower(),
                    f'({letter})',
                    option,
                    f'{letter} {option}',
                    f'{letter}. {option}',
                ):
                    assert judge(q, said).value == float(letter == q.answer), (q, said)
    assert seen > 10
