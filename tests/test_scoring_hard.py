"""Replies that are easily read wrong: cut ones, other scripts, no answer at all, endless ones."""

import json
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_nb.bench import cut_remark, limit_of_cut, read_results
from clear_nb.core import ROOT
from clear_nb.evaluate import run_rows
from clear_nb.rows import from_scenes
from clear_nb.scoring import (
    READ_LIMIT,
    answer_text,
    protocol_of,
    read_option,
    read_yesno,
    score_reply,
    whole_answer,
)
from clear_nb.server import read_completion
from clear_nb.wording import Adapter, Reply

CASES = ROOT / 'tests' / 'golden' / 'cases'
OPTIONS = dict(A='Left', B='Right', C='Above', D='Below')


def case(name):
    return json.loads((CASES / name / 'replies.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize(
    'reply', [*case('H02_truncated'), *case('H08_cjk')], ids=lambda r: r['reply']
)
def test_letters(reply):
    """A thought without an end holds no answer; a letter beside another script is a letter."""
    assert read_option(answer_text(reply['reply']), reply['options']) == reply['wanted']


@pytest.mark.parametrize(
    'said, wanted',
    [
        ('<think>maybe A</think> B', 'B'),
        ('<think>maybe A</think> B <think>or C', 'B'),
        ('B <think>is it', 'B'),
        ('maybe A</think>B', 'B'),
        ('<think>A<think>C</think>B', 'B'),
        ('<THINK>A</THINK><Answer>B</ANSWER>', 'B'),
        ('<answer>A</answer><answer>B</answer>', 'B'),
        ('<think><answer>A</answer> no</think><answer>B</answer>', 'B'),
        ('<think>', None),
        ('</think>', None),
        ('<answer></answer>', None),
        ('<think>A</think>', None),
    ],
)
def test_tags(said, wanted):
    """The last block answers, else what stands outside the thoughts."""
    assert read_option(answer_text(said), OPTIONS) == wanted


@pytest.mark.parametrize(
    'said', ['N/A', 'n/a', 'N.A.', 'N/A.', 'Not applicable (N/A)', 'The answer is N/A.', '"N / A"']
)
def test_no_answer(said):
    """N/A names no option, whatever the options are called."""
    assert read_option(said, OPTIONS) is None
    assert read_option(said, dict(N='x', A='y')) is None


def test_not_applicable_as_an_option():
    """An option that is called N/A can be chosen."""
    assert read_option('N/A', dict(A='Left', B='N/A')) == 'B'
    assert read_option('N/A', dict(A='N/A', B='Left')) == 'A'


@pytest.mark.parametrize('reply', case('H03_yes_no'), ids=lambda r: r['reply'])
def test_yes_no_sets(reply):
    """A set is one of yes-or-no questions when all its answers are; sentences are read."""
    rows = [
        SimpleNamespace(benchmark='POPE', options={}, answer=a, index=str(k))
        for k, a in enumerate(('Yes', 'no', reply['answer']))
    ]
    assert protocol_of('POPE', rows) == 'yesno'
    assert score_reply(rows[2], reply['reply'], 'yesno').value == reply['wanted']


@pytest.mark.parametrize('answers', [('Yes', 'No', 'two'), ('Yes', ''), ()])
def test_other_sets_are_not_guessed(answers):
    """One other answer, and the set is not known."""
    rows = [SimpleNamespace(options={}, answer=a) for a in answers]
    with pytest.raises(ValueError, match='no protocol is known'):
        protocol_of('unheard-of', rows)


ENDLESS = [
    ('B is correct. ', 'B'),
    ('<answer>', None),
    ('<think>', None),
    ('</think>', None),
    ('not B, ', None),
    ('答案是', None),
]


@pytest.mark.parametrize('piece, wanted', ENDLESS)
def test_endless_replies(piece, wanted):
    """A reply that repeats itself for 320,000 characters takes no longer than a short one."""
    said = piece * (320_000 // len(piece))
    begin = time.process_time()
    assert read_option(answer_text(said), OPTIONS) == wanted
    assert time.process_time() - begin < 10  # quadratic patterns took minutes


def test_long_answers_are_marked():
    """What is read of a long answer is noted, and begin and end are read."""
    row = SimpleNamespace(benchmark='MMStar', index='1', options=OPTIONS, answer='B')
    out = score_reply(row, 'word ' * READ_LIMIT + 'The answer is B.')
    assert out.value == 1 and out.note == 'cut'
    assert score_reply(row, 'The answer is B.').note == ''


@settings(max_examples=60)
@given(st.text(max_size=300))
def test_any_text_is_read(said):
    """Arbitrary text is read or not; nothing is raised, and the part that answers is a part."""
    assert read_option(answer_text(said), OPTIONS) in {*OPTIONS, 'Z', None}
    assert read_yesno(answer_text(said)) in ('Yes', 'No', None)
    assert whole_answer(said) in said


@settings(max_examples=40)
@given(st.permutations(list(OPTIONS.values())), st.sampled_from(list(OPTIONS.values())))
def test_options_in_another_order(texts, chosen):
    """A reply with an option's text is read as that option, wherever the option stands."""
    options = dict(zip('ABCD', texts))
    letter = next(c for c, t in options.items() if t == chosen)
    for said in (chosen, f'The answer is {chosen}.', f'{letter}', f'({letter}) {chosen}'):
        assert read_option(said, options) == letter, said


@settings(max_examples=40)
@given(
    st.sampled_from('ABCD'),
    st.sampled_from(
        ['{}', '({})', 'Answer: {}', 'option {}', '{}.', '**{}**', '选{}', '답은 {}입니다']
    ),
)
def test_no_letter_is_better_off(letter, form):
    """Each form is read for every letter."""
    assert read_option(form.format(letter), OPTIONS) == letter


def completion(content, finish='stop', **more):
    return dict(choices=[dict(finish_reason=finish, message=dict(content=content, **more))])


def test_no_content():
    """A reply without content is an empty answer with its cause, and is not asked again."""
    reply = json.loads(
        (CASES / 'H12_null_content' / 'server_reply.json').read_text(encoding='utf-8')
    )
    text, about = read_completion(reply)
    assert text == '' and 'a hidden thought of 19 characters came before' in about['cause']
    assert (
        read_completion(completion(None))[1]['cause'] == "the reply is empty (finish reason 'stop')"
    )


@pytest.mark.parametrize('half', ['\ud83d', '\udc00', 'B \ud83d right', '\udcff' * 9])
def test_halves_of_characters(half):
    """Half a surrogate pair is replaced and counted, so that every file can hold the reply."""
    text, about = read_completion(completion(half))
    text.encode('utf-8')
    assert about['replaced'] == sum('\ud800' <= c <= '\udfff' for c in half)


@pytest.mark.parametrize(
    'detail, limit',
    [
        ('{"finish": "length", "limit": 32}', '32'),
        ('{"finish": "length"}', '?'),
        ('{"finish": "stop", "limit": 32}', None),
        ('', None),
        ('no JSON', None),
        ('[1]', None),
        ('3', None),
    ],
)
def test_limit_of_cut(detail, limit):
    """Whether a reply was cut, and at which limit, is read from its detail."""
    assert limit_of_cut(detail) == limit


class Cut(Adapter):
    """Answer every second row with a thought that was cut."""

    def __call__(self, rows):
        ends = [dict(finish='length' if int(r.index) % 2 else 'stop', limit=16) for r in rows]
        return [Reply('<think>It is (A)', 'answer', json.dumps(e)) for e in ends]


def test_cut_replies_are_counted(tmp_path):
    """The report names how many replies were cut, and at which limit."""
    rows = list(from_scenes('mmstar', 6))
    run_rows(Cut('cut'), rows, tmp_path, progress=False)
    frame, _ = read_results(tmp_path)
    cut = sum(int(r.index) % 2 for r in rows)
    assert f'{cut} of 6 replies were cut at the limit of 16 tokens' in cut_remark(frame)
    assert set(frame.kind) == {'unparsable'} and set(frame.value) == {0.0}
