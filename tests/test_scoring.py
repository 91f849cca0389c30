"""Scores: the published rules to the letter, ours beside them, and nothing unknown that is
counted as zero.
"""

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Space

import numpy as np
import pandas as pd
import pytest
from fake_server import FakeServer, Status, hasty

from clear_nb import degrade, scenes
from clear_nb import scoring as sc
from clear_nb.core import rng
from clear_nb.judge import LLMJudge
from clear_nb.reward import AnswerScore, Outage, RuleJudge, Unparsable, match_option
from clear_nb.rows import BenchmarkRow
from clear_nb.stats import scores_frame, share_interval

GOLDEN = Path(__file__).parent / 'golden' / 'scoring'
OPTIONS = [json.loads(line) for line in (GOLDEN / 'option_matching.jsonl').read_text().splitlines()]
PROTOCOL = json.loads((GOLDEN / 'protocol_cases.json').read_text())
PETS = dict(A='cat', B='dog', C='horse', D='bird')


def golden_rows(case, benchmark):
    """Samples and predictions of a golden table."""
    rows = PROTOCOL[case]['rows']
    samples = [
        BenchmarkRow(
            benchmark,
            str(r['index']),
            r['question'],
            r['answer'],
            options={c: r[c] for c in 'ABCD' if r.get(c) is not None},
            category=r['category'],
            l2_category=r.get('l2-category', ''),
            split=r.get('split', ''),
        )
        for r in rows
    ]
    return samples, [r['prediction'] for r in rows]


def same_report(got, want):
    """A report of ours against the golden one: splits × names, null where a split has no such
    name.
    """
    for row in want:
        values = got.loc[row['split']]
        assert set(values.index) == set(row) - {'split'}
        for k, v in values.items():
            assert (row[k] is None and np.isnan(v)) or abs(v - row[k]) < 1e-9, (row['split'], k)
    assert len(got) == len(want)


# The published rules


def test_golden_options():
    """Every stored case of letter matching, and of taking the answer out of a response."""
    raw = [c for c in OPTIONS if c['raw_response'] is not None]
    assert len(OPTIONS) == 220 and len(raw) == 24
    assert [c['id'] for c in raw if sc.kit_extract(c['raw_response']) != c['prediction']] == []
    assert [
        c['id']
        for c in OPTIONS
        if sc.KIT_RULES.option(c['prediction'], c['choices']) != c['expected']
    ] == []


def test_golden_options_as_rows():
    """The same cases through the table of rows, with the file in between: value 1 for the
    expected letter, 0 for every other.
    """
    samples, said, want = [], [], []
    for c in OPTIONS:
        expected = match_option(sc.kit_text(c['prediction']), sc.kit_options(c['choices']))
        for letter in sc.kit_options(c['choices']):
            samples.append(
                BenchmarkRow('MMStar', f'{c["id"]}{letter}', '?', letter, options=c['choices'])
            )
            said.append(c['prediction'])
            want.append(float(letter == expected))
        if c['prediction'] == sc.kit_text(c['prediction']) and c['choices'] == sc.kit_options(
            c['choices']
        ):
            assert expected == c['expected']
    assert (
        sc.score_rows(samples, said, compat='vlmevalkit').value.tolist() == want and len(want) > 600
    )


def test_golden_plain():
    """Hits, kinds and report of plain multiple choice; order of the rows does not matter."""
    samples, said = golden_rows('vanilla_with_split', 'MMStar')
    rows = sc.score_rows(samples, said, compat='vlmevalkit')
    assert (
        dict(zip(rows['index'], rows.value.astype(int))) == PROTOCOL['vanilla_with_split']['hits']
    )
    log = PROTOCOL['vanilla_with_split']['log']
    assert [
        i
        for i, k in zip(rows['index'], rows.kind)
        if (k == 'unparsable') != ('Failed in Prefetch' in log[i])
    ] == []
    same_report(sc.kit_report(sc.score_units(rows)), PROTOCOL['vanilla_with_split']['acc'])
    back = sc.score_rows(samples[::-1], said[::-1], compat='vlmevalkit')
    same_report(sc.kit_report(sc.score_units(back)), PROTOCOL['vanilla_with_split']['acc'])


@pytest.mark.parametrize('order', [1, -1])
def test_golden_circular(order):
    """Groups, the roll that settles them, and the report; a group without its first row is
    dropped.
    """
    samples, said = golden_rows('circular', 'MMBench_DEV_EN_V11')
    units = sc.score_units(sc.score_rows(samples[::order], said[::order], compat='vlmevalkit'))
    assert dict(zip(units.unit, units.value.astype(int))) == PROTOCOL['circular']['hits']
    same_report(sc.kit_report(units), PROTOCOL['circular']['acc'])
    for u in units.itertuples():
        log = PROTOCOL['circular']['log'][u.unit]
        if 'Rolling' in log:
            where, answer, read = (
                log.split('Rolling ')[1][0],
                log.split('Answer is ')[1][0],
                log.split('Pre-fetched is ')[1][0],
            )
            assert u.note == f'row {where}: answer {answer}, read {read}'
        elif u.value == 0:
            assert u.kind == 'unparsable'


def test_circular_by_our_rules():
    """The same table: rolls that are missing are reported, and nothing else changes."""
    samples, said = golden_rows('circular', 'MMBench_DEV_EN_V11')
    units = sc.score_units(sc.score_rows(samples, said)).set_index('unit')
    want = {k: float(v) for k, v in PROTOCOL['circular']['hits'].items()}
    assert {k: units.value[k] for k in want if k != '8'} == {
        k: v for k, v in want.items() if k != '8'
    }
    assert units.loc['8', 'kind'] == units.loc['10', 'kind'] == 'pending' and (
        units.note['8'],
        units.note['10'],
    ) == ('2 of 4 rows missing', '3 of 4 rows missing')
    assert sc.score_table(units.reset_index()).missing.iloc[0] == 2


def test_golden_mmvet():
    """Capabilities and combinations from given scores."""
    case = PROTOCOL['mmvet_acc']
    samples = [
        BenchmarkRow('MMVet', str(r['index']), r['question'], r['answer'], category=r['category'])
        for r in case['rows']
    ]
    grades = {s.index: AnswerScore(r['score']) for s, r in zip(samples, case['rows'])}
    unique = [replace(s, question=s.index) for s in samples]
    rows = sc.score_rows(
        unique,
        ['p'] * 8,
        judge=lambda q, said: grades[q.question],
        compat='vlmevalkit',
        progress=False,
    )
    for got, want in (
        (sc.capability_table(rows), case['score']),
        (sc.combination_table(rows), case['score_fine']),
    ):
        assert list(got.index) == [r['Category'] for r in want] and got.n.tolist() == [
            r['tot'] for r in want
        ]
        assert np.allclose(got.score, [r['acc'] for r in want])
    ours = sc.combination_table(
        sc.score_rows(unique, ['p'] * 8, judge=lambda q, said: grades[q.question], progress=False)
    )
    assert ours.score['ocr_math'] == 50 and ours.n['ocr_math'] == 2 and 'math_ocr' not in ours.index


@pytest.mark.parametrize('case', PROTOCOL['yorn_extraction'], ids=lambda c: c['prediction'])
def test_golden_yesno(case):
    """Yes, no or unknown."""
    want = None if case['expected'] == 'Unknown' else case['expected']
    assert sc.kit_yesno(case['prediction']) == want
    o = sc.score_reply(
        BenchmarkRow('MME', '1', '?', 'Yes'), case['prediction'], compat='vlmevalkit'
    )
    assert (o.kind, o.value) == (
        ('unparsable', 0.0) if want is None else ('right', 1.0) if want == 'Yes' else ('wrong', 0.0)
    )


def test_excel():
    """What a spreadsheet does to a prediction, checked against pandas itself."""
    said = [
        'None',
        'NA',
        'N/A',
        'null',
        'NaN',
        'nan',
        '',
        'n/a',
        'B',
        ' ',
        'none',
        'nil',
        '-',
        '#N/A',
        '<NA>',
        'na',
    ]
    import io

    table = pd.read_csv(
        io.StringIO('\n'.join(['p'] + [f'"{s}"' for s in said])), skip_blank_lines=False
    )
    assert [sc._excel(s) for s in said] == [str(x) for x in table.p] and sc._excel('=B') == '0'


def test_nothing_is_random():
    """Two runs of the published rules agree, and what the kit would draw is counted as
    unparsable.
    """
    samples = [BenchmarkRow('MMStar', str(k), '?', 'A', options=PETS) for k in range(200)]
    one, two = (sc.score_rows(samples, ['no idea'] * 200, compat='vlmevalkit') for _ in range(2))
    assert one.equals(two) and (one.kind == 'unparsable').all() and one.value.sum() == 0


# Our reading

READ = [
    ('B', 'B'),
    ('b', 'B'),
    ('(b)', 'B'),
    ('b.', 'B'),
    ('B?', 'B'),
    ('"B"', 'B'),
    ('Ｂ．', 'B'),
    ('**B**', 'B'),
    ('B. dog', 'B'),
    ('b) dog', 'B'),
    ('Option B', 'B'),
    ('the answer is b.', 'B'),
    ('Answer: B', 'B'),
    ('A dog', 'B'),
    ('A dog is what I see', 'B'),
    ('The answer is a dog', 'B'),
    ('I think B because A is not here', None),
    ('A cat? No. The answer is B', 'B'),
    ('Dog.', 'B'),
    ('dogs', None),
    ('hotdog', None),
    ('A or B', None),
    ('cat and dog', None),
    ('', None),
    ('E', None),
    ('Z', 'Z'),
    ('The answer is Z', 'Z'),
    ("I'm sorry, but without the image provided I cannot tell", 'Z'),
    ('I can’t answer', 'Z'),
    ('A', 'A'),
    ('A is right', 'A'),
    ('A big fish', None),
]


@pytest.mark.parametrize('said, letter', READ)
def test_our_reading(said, letter):
    """What people and models write."""
    assert sc.read_option(said, PETS) == letter


SURE = [
    'The answer is {c} based on the sign.',
    'The correct answer is {c} due to the ears.',
    'Option {c} matches the picture best.',
    'I choose {c} over {d}.',
    'The answer is {c} rather than {d}.',
    'I select option {c} for it',
    'We go with {c} here',
    '{c} looks best.',
    '{c} is right, since {d} shows a cat',
    'Option {c} is wrong, {d} is right',
    'The answer is {c}. Not {d}, because it is red.',
    'Step 1: {d} or {e}? Step 2: {d} shows a bus. So the answer is {c}',
    'The answer is {c}. Wait, the answer is {d}.',
    'The answer is probably {c}, as {d} is too small',
    'The answer is {c}; {d} is wrong',
    'The answer is {c}, {d} and {e} are wrong',
    'The answer is {c}? Yes.',
    '{c}. A puppy sits there',
    'The answer is {c} most of all',
]
OPEN = [
    'The answer is {c} or {d}.',
    'Answer: {c}, {d}',
    'The answer is {c} and {d}',
    'Answer: {c}/{d}',
    'Answer: ({c}) or maybe ({d})',
    'The answer is {c}? No, it is {d}.',
    'The answer is {c}. No, wait, it is {d}.',
    'The answer is not {c}.',
    "The answer isn't {c}",
    'Not {c}.',
    '{c} is wrong',
    "I can't choose {c}",
    'Is it {c}? No.',
    'Either {c} or {d} is right',
    '{c} looks better than {d}',
    'A puppy is there, so {c}',
]
SECOND = ('Option {c} is wrong', 'The answer is {c}. Wait,')  # these name d


@pytest.mark.parametrize('said', SURE + OPEN)
def test_no_letter_is_worse_off(said):
    """Whatever the letter and wherever the options stand, a sentence names its letter, or none
    if it hedges, asks, corrects or denies.
    """
    texts = list(PETS.values())
    for k in range(4):
        options = dict(zip('ABCD', texts[k:] + texts[:k]))
        for c, d, e in ('ABC', 'BCD', 'CDA', 'DAB', 'BAC', 'CAB', 'DBA'):
            want = None if said in OPEN else d if said.startswith(SECOND) else c
            assert sc.read_option(said.format(c=c, d=d, e=e), options) == want, (c, d, options)


@pytest.mark.parametrize(
    'said, letter',
    [
        ('The answer is A dog', 'B'),
        ('Answer: A brown dog.', 'B'),
        ('I pick A dog', 'B'),
        ('A dog is there, so B', 'B'),
        ('A cat is there, so B', None),
        ('The answer is A, a cat', 'A'),
        ('The answer is B (dog) or C (horse)', None),
        ('answer: b, c', None),
        ('answer: b, a dog', 'B'),
        ('It is not a dog', None),
        ('The answer is not B, dog', None),
        ('B is right of C', None),
    ],
)
def test_letters_and_texts(said, letter):
    """Articles before an option, texts beside letters."""
    assert sc.read_option(said, PETS) == letter


def test_long_replies_are_read_at_once():
    """A model that repeats itself costs no minutes."""
    start = time.perf_counter()
    for said in (
        'answer: ' + '.' * 20_000,
        'The answer is ' + '!' * 20_000,
        'A dog ' * 3000,
        'answer is A dog ' * 1000,
        'answer: A, ' * 2000,
    ):
        sc.read_option(said, PETS)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    'options, said, letter',
    [
        (dict(A='None', B='NA', C='null', D='nan'), 'None', 'A'),
        (dict(A='None', B='NA', C='null'), 'na', 'B'),
        (dict(A='red', B='dark red'), 'It is dark red', 'B'),
        (dict(A='blue', B='blue and white', C='white'), 'blue and white', 'B'),
        (dict(A='Yes', B='No'), 'Not sure', None),
        (dict(A='Yes', B='No'), 'no.', 'B'),
        (dict(A=1, B=2, C=11), 'there are 11', 'C'),
        (dict(A=1, B=2, C=11), '2.0', 'B'),
        (dict(A='', B='dog'), 'cat', None),
        (dict(A='same', B='same'), 'same', None),
        (dict(A='B', B='A'), 'A', 'A'),
        (dict(A='红色', B='深红色'), '是深红色的', 'B'),
        (dict(A='3', B='5'), '3.5', None),
        (dict(A='3', B='5'), '-3', None),
        (dict(A='3', B='-3'), 'it is \u22123', 'B'),
        (dict(A='50', B='50%'), '50%', 'B'),
        (dict(A='3:4', B='3/4'), '3/4.', 'B'),
    ],
)
def test_our_reading_of_odd_options(options, said, letter):
    """Missing-looking texts, nested options, numbers, empty and equal options."""
    assert sc.read_option(said, options) == letter


def test_an_option_is_no_refusal():
    """A phrase of refusal that an option or the reference holds; any other phrase refuses as
    before.
    """
    options = dict(A='Yes', B='No', C='Unable to Determine')
    for said in (
        'C. Unable to determine',
        '(C) Unable to determine.',
        'Unable to determine',
        'I am unable to determine it',
        'C',
    ):
        assert sc.read_option(said, options) == 'C'
    for said in ('I cannot answer, unable to determine', "I can't process this file."):
        assert sc.read_option(said, options) == 'Z'
    assert (
        sc.read_option('C. Unable to determine', dict(options, C='Blue')) == 'Z'
        and sc.read_option('A. Yes', options) == 'A'
    )
    frame = sc.score_rows(
        [
            BenchmarkRow('easy_vqa', str(k), '?', a)
            for k, a in enumerate(('unable to determine', 'red'))
        ],
        ['Unable to determine.'] * 2,
    )
    assert frame.kind.tolist() == ['right', 'refused']


def test_our_reading_of_the_world():
    """Of every multiple-choice question, every form of every option is read as that option."""
    seen = 0
    for k in range(40):
        for q in scenes.training_item(0, k)[1]:
            if q.answer not in tuple('ABCD') or not q.options:
                continue
            options, seen = dict(zip('ABCD', q.options)), seen + 1
            for letter, text in options.items():
                for said in (
                    letter,
                    letter.lower(),
                    f'({letter.lower()})',
                    text,
                    text.upper(),
                    f'{letter}. {text}',
                    f'<think>A or B</think><answer>\n{letter}\n</answer>',
                    f'The answer is {letter}.',
                ):
                    assert sc.read_option(sc.answer_text(said), options) == letter, (q, said)
    assert seen > 10


def test_where_the_rules_differ():
    """Most letters are read alike; more replies are read than before; what only the kit sees is
    an option inside another word, an article, a thought, or a letter that is denied.
    """
    ours = [
        sc.read_option(
            sc.answer_text(c['raw_response'] or c['prediction']), sc.OUR_RULES.options(c['choices'])
        )
        for c in OPTIONS
    ]
    same = sum(o == c['expected'] is not None for o, c in zip(ours, OPTIONS))
    more = sum(o is not None and c['expected'] is None for o, c in zip(ours, OPTIONS))
    lost = {
        c['prediction'] for o, c in zip(ours, OPTIONS) if o is None and c['expected'] is not None
    }
    assert (same, more, len(lost)) == (121, 32, 16)
    assert {
        'A is wrong',
        'Bdog',
        'horsemanship',
        'A big fish swims here',
        'nan',
        'Not sure',
        'noon',
        'reddish',
        'theta',
        '<think>no</think>',
    } <= lost


# Kinds and values


class Tasks:
    """A judge with tasks and a log."""

    def __init__(self, option='B', open=AnswerScore(0.5), short=AnswerScore(1.0)):
        self.replies, self.log = dict(option=option, open=open, short=short), []

    def _do(self, task, q, said):
        self.log.append((task, q.question, said))
        r = self.replies[task]
        return r(q, said) if callable(r) else r

    def option(self, q, said):
        return self._do('option', q, said)

    def open(self, q, said):
        return self._do('open', q, said)

    def short(self, q, said):
        return self._do('short', q, said)


def test_what_a_judge_is_asked():
    """Unread options, all of MM-Vet, short answers the rule does not accept; nothing else, and
    nothing without a reply.
    """
    samples = [BenchmarkRow('MMStar', str(k), f'q{k}', 'B', options=PETS) for k in range(4)] + [
        BenchmarkRow('MMVet', '1', 'v1', 'x'),
        BenchmarkRow('MMVet', '2', 'v2', 'x'),
    ]
    samples += [BenchmarkRow('easyvqa', str(k), f's{k}', 'circle') for k in range(3)] + [
        BenchmarkRow('MME', '1', 'm', 'Yes')
    ]
    said = ['B', 'a puppy', None, 'C', 'x', None, 'circle', 'round thing', None, 'perhaps']
    judge = Tasks()
    rows = sc.score_rows(samples, said, judge, progress=False)
    assert sorted(judge.log) == [
        ('open', 'v1', 'x'),
        ('option', 'q1', 'a puppy'),
        ('short', 's1', 'round thing'),
    ]
    assert rows.kind.tolist() == [
        'right',
        'right',
        'pending',
        'wrong',
        'wrong',
        'pending',
        'right',
        'right',
        'pending',
        'unparsable',
    ]
    assert rows.value.fillna(-1).tolist() == [1, 1, -1, 0, 0.5, -1, 1, 1, -1, 0]


@pytest.mark.parametrize(
    'reply, compat, kind, value',
    [
        ('B', None, 'right', 1),
        ('A', None, 'wrong', 0),
        ('Z', None, 'refused', 0),
        (Unparsable('?'), None, 'unparsable', None),
        (Outage('down'), None, 'pending', None),
        ('B', 'vlmevalkit', 'right', 1),
        ('Z', 'vlmevalkit', 'refused', 0),
        (Unparsable('?'), 'vlmevalkit', 'unparsable', 0),
        (Outage('down'), 'vlmevalkit', 'pending', None),
    ],
)
def test_judged_option(reply, compat, kind, value):
    """The letter decides; nonsense and silence of the judge are not the model's fault."""
    row = sc.score_rows(
        [BenchmarkRow('MMStar', '1', 'q', 'B', options=PETS)],
        ['a puppy'],
        Tasks(option=reply),
        compat=compat,
        progress=False,
    ).iloc[0]
    assert row.kind == kind and (np.isnan(row.value) if value is None else row.value == value)


def rolls(q, said, n=4):
    """A question with its rolls; the right text is always 'dog'."""
    texts = list(PETS.values())
    turned = [dict(zip('ABCD', np.roll(texts, -k).tolist())) for k in range(n)]
    return [
        (
            BenchmarkRow(
                'MMBench',
                str(q + 1_000_000 * k),
                f'q{q}',
                next(c for c in o if o[c] == 'dog'),
                options=o,
            ),
            s,
        )
        for k, (o, s) in enumerate(zip(turned, said))
    ]


@pytest.mark.parametrize('compat', [None, 'vlmevalkit'])
def test_circular_with_a_judge(compat):
    """The judge sees only rolls that can still save their question."""
    asked = (
        rolls(1, ['dog', 'hm', 'dog', 'hm'])
        + rolls(2, ['dog', 'hm', 'cat', 'hm'])
        + rolls(3, ['dog', 'um', 'dog', 'dog'])
    )
    judge = Tasks(option=lambda q, said: q.answer if said == 'hm' else Outage('down'))
    units = sc.score_units(
        sc.score_rows(*zip(*asked), judge, compat=compat, progress=False)
    ).set_index('unit')
    assert Counter(q for _, q, _ in judge.log) == {'q1': 2, 'q3': 1} and units.value.fillna(
        -1
    ).to_dict() == {'1': 1, '2': 0, '3': -1}
    none = sc.score_units(sc.score_rows(*zip(*asked), compat=compat)).set_index('unit')
    assert none.value.to_dict() == {'1': 0, '2': 0, '3': 0} and none.kind.to_dict() == {
        '1': 'unparsable',
        '2': 'wrong',
        '3': 'unparsable',
    }


def test_circular_against_a_plain_reference():
    """Random replies: all rolls right, else lost if one is wrong, else open."""
    r, asked = rng('test', 'circular'), []
    for q in range(1, 120):
        asked += rolls(
            q,
            [
                [('dog', 'cat', 'hm', None)[k] for k in r.choice(4, 4, p=[0.8, 0.1, 0.05, 0.05])],
                ['dog'] * 4,
            ][q % 3 == 0][: r.integers(1, 5)],
        )
    order = r.permutation(len(asked))
    units = sc.score_units(sc.score_rows(*zip(*[asked[k] for k in order]))).set_index('unit')
    by = {}
    for s, t in asked:
        by.setdefault(str(int(s.index) % 1_000_000), []).append(t)

    def naive(said):
        return 0.0 if {'cat', 'hm'} & set(said) else 1.0 if said == ['dog'] * 4 else -1.0

    assert units.value.fillna(-1).to_dict() == {k: naive(v) for k, v in by.items()} and set(
        units.value.fillna(-1)
    ) == {0.0, 1.0, -1.0}


@pytest.mark.parametrize(
    'benchmark', ['MMStar', 'MMVP', 'CV-Bench', 'MME', 'easyvqa', 'MMVet', 'MMBench']
)
def test_pending_is_never_zero(benchmark):
    """Taking replies away leaves the mean over the others, and counts what is missing."""
    r = rng('test', benchmark)
    make = dict(
        MME=lambda k: BenchmarkRow('MME', str(k), 'q', 'Yes', group=str(k // 2)),
        easyvqa=lambda k: BenchmarkRow('easyvqa', str(k), 'q', 'Yes'),
        MMVet=lambda k: BenchmarkRow('MMVet', str(k), 'q', 'Yes'),
    )
    samples = [
        make.get(
            benchmark,
            lambda k: BenchmarkRow(
                benchmark,
                str(k),
                'q',
                'A',
                options=dict(A='Yes', B='No'),
                group=str(k if benchmark == 'MMBench' else k // 2),
            ),
        )(k)
        for k in range(60)
    ]
    said = [('Yes', 'No')[k] for k in r.integers(0, 2, 60)]
    gone = r.random(60) < 0.4
    full = sc.score_rows(samples, said, RuleJudge())
    part = sc.score_rows(samples, [None if g else s for g, s in zip(gone, said)], RuleJudge())
    t = sc.score_table(sc.score_units(part.assign(rolls=1))).iloc[0]
    assert (t.n, t.scored, t.missing, t.pending) == (60, 60 - gone.sum(), gone.sum(), gone.sum())
    assert t.score == pytest.approx(100 * full.value[~gone].mean())
    none = sc.score_table(sc.score_units(sc.score_rows(samples, [None] * 60))).iloc[0]
    assert np.isnan(none.score) and none.scored == 0 and none.missing == 60


# Tables


def world(seed=0, n=40, levels=('clean', 'low', 'hard'), quality=(0.9, 0.7, 0.4)):
    """Samples of two benchmarks under drawn corruptions, with replies right at a given rate."""
    r, samples, said = rng('test', 'world', seed), [], []
    for b in ('MMStar', 'RealWorldQA'):
        for k in range(n):
            c = list(degrade.CORRUPTIONS)[int(rng('test', b, k).integers(16))]
            for s, p in zip(levels, quality):
                samples.append(
                    BenchmarkRow(
                        b,
                        str(k),
                        f'{b}{k}',
                        'B',
                        options=PETS,
                        category='xy'[k % 2],
                        corruption='' if s == 'clean' else c,
                        severity=s,
                    )
                )
                said.append('B' if r.random() < p else 'C' if r.random() < 0.8 else 'um')
    return sc.score_rows(samples, said)


def test_tables_against_loops():
    """Every table against means taken by hand."""
    rows = world()
    units = sc.score_units(rows)
    for by in (['benchmark', 'severity'], ['severity', 'corruption'], ['benchmark', 'category']):
        got = sc.score_table(units, by)
        for key in {tuple(x) for x in rows[by].astype(str).itertuples(index=False)}:
            mine = rows[(rows[by].astype(str) == list(key)).all(axis=1)]
            assert (
                got.loc[key].score == pytest.approx(100 * mine.value.mean())
                and got.loc[key].n == len(mine)
                and got.loc[key].unparsable == (mine.kind == 'unparsable').sum()
            )
    names = {c.name: c.category for c in degrade.CORRUPTIONS.values()}
    got = sc.score_table(units, 'corruption_category', categories=names)
    bad = rows[rows.severity != 'clean']
    for c in degrade.CATEGORIES:
        assert got.score[c] == pytest.approx(100 * bad.value[bad.corruption.map(names) == c].mean())
    assert got.n.sum() == len(bad)
    score = sc.score_table(units, average='benchmark').score
    assert list(dict.fromkeys(score.index.get_level_values('severity'))) == [
        'clean',
        'low',
        'hard',
    ] and list(score.index)[2] == ('AVG', 'clean')
    assert score['AVG', 'low'] == pytest.approx(
        (score['MMStar', 'low'] + score['RealWorldQA', 'low']) / 2
    )


def test_drop_is_paired():
    """Only rows with both values count; the others are named."""
    rows = world()
    hide = rng('test', 'hide').random(len(rows)) < 0.2
    rows.loc[hide, 'value'] = np.nan
    rows.loc[hide, 'kind'] = 'pending'
    lost = sc.paired_drops(sc.score_units(rows))
    got = sc.score_table(lost)
    for (b, s), d in got.iterrows():
        clean, other = (
            rows[(rows.benchmark == b) & (rows.severity == x)].set_index('index').value
            for x in ('clean', s)
        )
        both = clean.notna() & other.notna()
        assert (
            d.scored == both.sum()
            and d.missing == (~both).sum()
            and d.score == pytest.approx(100 * (clean - other)[both].mean())
            and d.low < d.score < d.high
        )
    assert (
        len(got) == 4
        and sc.score_table(lost, 'corruption').scored.sum() == got.scored.sum()
        and sc.score_table(lost, average='benchmark').score['AVG', 'hard']
        == pytest.approx(got.score[:, 'hard'].mean())
    )
    none = sc.score_table(sc.paired_drops(sc.score_units(rows.assign(value=np.nan))))
    assert (
        none.score.isna().all() and none.missing.sum() == 160
    )  # nothing known: no score, and every pair is counted


def test_second_scores():
    """Pairs, sources and MME by hand; a pair with one reply missing is open unless the other is
    wrong.
    """
    mmvp = [
        BenchmarkRow('MMVP', str(k), 'q', 'A', options=PETS, group=str(k // 2)) for k in range(8)
    ]
    said = ['A', 'A', 'A', 'B', 'A', None, 'B', None]
    got = sc.second_scores(sc.score_rows(mmvp, said)).iloc[0]
    assert (got.second, got.n, got.scored) == ('pairs', 4, 3) and got.score == pytest.approx(
        100 / 3
    )
    cv = [
        Space(
            **{
                **vars(BenchmarkRow('CV-Bench-2D', str(k), 'q', 'A', options=PETS)),
                'source': 'ADE20K' if k < 6 else 'COCO',
            }
        )
        for k in range(8)
    ]
    rows = sc.score_rows(cv, ['A'] * 3 + ['B'] * 3 + ['A'] * 2)
    assert (
        sc.second_scores(rows).score.iloc[0] == 75
        and sc.score_table(sc.score_units(rows)).score.iloc[0] == 62.5
    )
    mme = [
        BenchmarkRow(
            'MME', str(k), 'q', ('Yes', 'No')[k % 2], group=str(k // 2), category='ab'[k // 4]
        )
        for k in range(8)
    ]
    got = sc.mme_table(sc.score_rows(mme, ['yes', 'no', 'yes', 'yes', 'yes', 'maybe', 'No', 'No']))
    assert (
        got.accuracy.tolist() == [75, 50]
        and got.both.tolist() == [50, 0]
        and got.score.tolist() == [125, 50]
    )
    assert sc.second_scores(sc.score_rows(mme, ['yes', 'no'] * 4)).score.iloc[0] == 400


@pytest.mark.parametrize('design', ['mixed', 'full'])
def test_pairs_under_corruption(design):
    """The mixed design draws another corruption for each picture of a pair, the full one shows
    each pair under every corruption.
    """
    names = list(degrade.CORRUPTIONS)
    mmvp = [
        BenchmarkRow(
            'MMVP', str(k), 'q', 'A', options=PETS, group=str(k // 2), corruption=c, severity='hard'
        )
        for k in range(8)
        for c in (names[:3] if design == 'full' else [names[k]])
    ]
    said = ['B' if s.index == '3' and s.corruption in (names[1], names[3]) else 'A' for s in mmvp]
    got = sc.second_scores(sc.score_rows(mmvp, said)).iloc[0]
    assert (got.n, got.scored, got.score) == (
        (12, 12, pytest.approx(100 * 11 / 12)) if design == 'full' else (4, 4, 75)
    )
    as_rolls = sc.score_units(
        sc.score_rows(
            [replace(s, benchmark='MMBench', options=dict(A='cat', B='dog')) for s in mmvp], said
        )
    )
    assert (
        len(as_rolls) == got.n
        and set(as_rolls.kind) == {'right', 'wrong'}
        and set(as_rolls.corruption) == (set(names[:3]) if design == 'full' else {'several'})
    )


# Differences


def test_differences():
    """Antisymmetric, independent of row order, the same again with the same seed, and close to
    resampling by hand.
    """
    a, b = sc.score_units(world(1)), sc.score_units(world(2))
    d, again, other = (
        sc.score_table(sc.paired_differences(a, b).assign(all=1), 'all', seed=s).iloc[0]
        for s in (0, 0, 1)
    )
    back = sc.score_table(
        sc.paired_differences(b, a.sample(frac=1, random_state=0)).assign(all=1), 'all'
    ).iloc[0]
    assert d.n == d.scored == 240 and d.equals(again) and not d.equals(other)
    assert (
        back.score == pytest.approx(-d.score)
        and abs(back.low + d.high) < 2
        and abs(back.high + d.low) < 2
    )
    diff = 100 * (a.value.to_numpy() - b.value.to_numpy()).reshape(80, 3).mean(1)
    r = rng('test', 'bootstrap')
    low, high = np.percentile(
        [diff[r.integers(0, 80, 80)].mean() for _ in range(4000)], [2.5, 97.5]
    )
    assert abs(low - d.low) < 1.2 and abs(high - d.high) < 1.2


def test_average_of_benchmarks():
    """Its interval is that of the mean of independent benchmarks, of any size."""
    units = sc.score_units(world(1)).query(
        "benchmark == 'MMStar' or unit in ['1', '2', '3', '4', '5', '6', '7', '8']"
    )
    got, r = sc.score_table(units, average='benchmark').loc[('AVG', 'low')], rng('test', 'average')
    parts = [
        100 * p.value.to_numpy() for _, p in units[units.severity == 'low'].groupby('benchmark')
    ]
    means = [np.mean([r.choice(p, len(p)).mean() for p in parts]) for _ in range(4000)]
    assert [len(p) for p in parts] == [40, 8] and got.score == pytest.approx(
        np.mean([p.mean() for p in parts])
    )
    assert (
        abs(np.quantile(means, 0.025) - got.low) < 2
        and abs(np.quantile(means, 0.975) - got.high) < 2
    )


def test_groups_are_drawn_together():
    """Repeating each question ten times makes nobody surer."""

    def units(seed, times):
        r = rng('test', 'groups', seed)
        return pd.DataFrame(
            [
                dict(
                    benchmark='b',
                    unit=f'{k}-{j}',
                    group=str(k),
                    corruption='',
                    severity='clean',
                    value=v,
                )
                for k in range(60)
                for v in [float(r.random() < 0.5)]
                for j in range(times)
            ]
        )

    once, often = (
        sc.score_table(sc.paired_differences(units(0, t), units(1, t))).iloc[0] for t in (1, 10)
    )
    assert (
        (once.n, often.n) == (60, 600)
        and once.low == pytest.approx(often.low, abs=2)
        and once.high == pytest.approx(often.high, abs=2)
    )


def test_unpaired_units_are_counted():
    """Units that only one model saw are missing, not left out without a word."""
    a, b = sc.score_units(world(1)), sc.score_units(world(2))
    part = a[a.unit.isin(['1', '2', '3'])]
    got = sc.score_table(sc.paired_differences(part, b), 'benchmark')
    assert (
        got.n.tolist() == [120, 120]
        and got.scored.tolist() == [9, 9] == (got.n - got.missing).tolist()
    )


def test_nothing_to_resample():
    """One question has no interval, equal differences have one of length zero, other rows are
    an error.
    """
    units = sc.score_units(world(1))
    one = sc.score_table(sc.paired_differences(units[:1], units[:1])).iloc[0]
    assert one.n == 1 and one.score == 0 and np.isnan(one.low)
    assert (sc.score_table(sc.paired_differences(units, units))[['score', 'low', 'high']] == 0).all(
        axis=None
    )
    with pytest.raises(ValueError, match='share no unit'):
        sc.paired_differences(units, units.assign(benchmark=units.benchmark + ' of others'))


# Mistakes


@pytest.mark.parametrize(
    'kw, match',
    [
        (dict(said=['A']), '2 samples but 1'),
        (dict(protocol='circle'), 'circle'),
        (dict(compat='kit'), 'kit'),
        (dict(samples='twice'), 'twice'),
    ],
)
def test_bad_arguments(kw, match):
    """One sentence says what is wrong."""
    samples = [BenchmarkRow('MMStar', str(k), 'q', 'A', options=PETS) for k in range(2)]
    if kw.get('samples') == 'twice':
        kw = dict(samples=[samples[0]] * 2)
    with pytest.raises(ValueError, match=match):
        sc.score_rows(**{**dict(samples=samples, said=['A', 'B']), **kw})


def test_protocols():
    """The name decides; an override wins; an unknown name needs one."""
    with pytest.raises(ValueError, match='MMMU'):
        sc.score_rows([BenchmarkRow('MMMU', '1', 'q', 'A', options=PETS)], ['A'])
    assert (
        sc.score_rows(
            [BenchmarkRow('MMMU', '1', 'q', 'A', options=PETS)], ['a'], protocol={'MMMU': 'choice'}
        ).value[0]
        == 1
    )
    assert (
        sc.score_rows(
            [BenchmarkRow('mmvet', '1', 'q', 'seven')], ['Seven.'], protocol='short'
        ).value[0]
        == 1
    )
    for b in ('mmbench', 'mmvp', 'mmstar', 'mmvet', 'realworldqa', 'rbench', 'easyvqa'):
        assert sc.protocol_of(b) in sc.PROTOCOLS
    assert sc.protocol_of('MMStar_LOW_LEVEL_LOW') == 'choice' != sc.protocol_of('MME_LOW_LEVEL_LOW')
    assert sc.score_units(sc.score_rows([], [])).empty


# With a judge behind a server


def test_judge_behind_a_server(monkeypatch, tmp_path, hasty):
    """MM-Vet and free answers through HTTP: failures become pending, a second run asks only for
    those.
    """
    monkeypatch.setenv('OPENAI_API_KEY', 'x')
    samples = [
        BenchmarkRow('MMVet', str(k), f'q{k}', f'answer{k}', category='rec') for k in range(10)
    ] + [BenchmarkRow('MMStar', '1', 'animal?', 'B', options=PETS)]
    said = [f'said{k}' for k in range(10)] + ['some puppy']

    def behave(request):
        question = request.text[request.text.rindex('{"question": "') + 14 :].partition('"')[0]
        if question == 'animal?':
            return 'B'
        k = int(question[1:])
        return Status(503) if k in broken else 'who knows' if k == 5 else f'0.{k}'

    with FakeServer(default=behave) as server:
        broken = {2, 7}
        judge = LLMJudge('j', server.url, tries=2, cache=tmp_path / 'r.jsonl')
        rows = sc.score_rows(samples, said, judge, workers=4, progress=False)
        assert (
            rows.kind[[2, 5, 7, 10]].tolist() == ['pending', 'unparsable', 'pending', 'right']
            and len(server.requests) == 9 + 2 * 2
        )
        t = sc.score_table(sc.score_units(rows)).loc[('MMVet', 'clean')]
        assert (t.n, t.scored, t.missing, t.pending, t.unparsable) == (
            10,
            7,
            3,
            2,
            1,
        ) and t.score == pytest.approx(100 * np.mean([0, 0.1, 0.3, 0.4, 0.6, 0.8, 0.9]))
        broken = set()
        again = sc.score_rows(
            samples, said, LLMJudge('j', server.url, cache=tmp_path / 'r.jsonl'), progress=False
        )
        assert len(server.requests) == 13 + 2 and again.kind[[2, 5, 7]].tolist() == [
            'wrong',
            'unparsable',
            'right',
        ]


@pytest.mark.parametrize('right', [0, 24])
def test_one_interval_everywhere(right):
    """0 of 24, or 24 of 24, has one interval: in a table, in a record's table, and by the
    formula.
    """
    rows = sc.score_rows(
        [BenchmarkRow('MMStar', str(k), '?', 'A', options=PETS) for k in range(24)],
        ['A' if right else 'B'] * 24,
    )
    line = sc.score_table(sc.score_units(rows)).iloc[0]
    bits = ('1' if right else '0') * 24
    cell = dict(correct=bits, trigger=None, questions=24, unparsable=0)
    record = dict(seed=0, metrics=dict(scores=dict(m=dict(mmstar=dict(hard=cell)))))
    recorded = scores_frame([record]).iloc[0]
    low, high = (100 * end for end in share_interval(right, 24))
    for found in (line, recorded):
        assert abs(found.low - low) < 1e-9 and abs(found.high - high) < 1e-9
    assert high - low > 10
