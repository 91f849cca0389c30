"""Properties of what reads texts of models: the grammar of a trajectory, yes and no, and the replies of
a judge. Every example is drawn by hypothesis from a fixed seed.
"""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_nb import grammar, judge, reward, scoring
from clear_nb.reward import AnswerScore, Unparsable
from clear_nb.server import read_completion

EACH = settings(derandomize=True, deadline=None, max_examples=100)
ANY = st.text(max_size=60)
WORDS = st.text('abcdefg hijk.,!', min_size=1, max_size=20).filter(str.strip)
OPTIONS = st.lists(st.sampled_from('cat dog fox hen owl cow'.split()), min_size=2, unique=True)


# ---------------------------------------------------------------- grammar of a trajectory


@EACH
@given(WORDS, WORDS, st.lists(WORDS, max_size=2))
def test_a_well_formed_trajectory_gives_its_parts_back(thought, answer, restored):
    """Answer, restorations and form are read as they were written."""
    before = [f'<think>{t}</think>{grammar.MARKER}' for t in restored]
    found = grammar.parse([*before, f'<think>{thought}</think><answer>{answer}</answer>'])
    assert found == grammar.Parsed(answer.strip(), bool(restored), True)


@EACH
@given(WORDS, WORDS, st.data())
def test_a_cut_text_answers_nothing_else(thought, answer, data):
    """A text that ends early has the whole answer or none, and its form is not valid."""
    whole = f'<think>{thought}</think><answer>{answer}</answer>'
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    found = grammar.parse([cut])
    assert found.answer == '' and not found.valid


@EACH
@given(st.lists(ANY, max_size=3))
def test_any_texts_are_parsed(texts):
    """Whatever a model writes is read without an error, and the answer stands in its last text."""
    found = grammar.parse(texts)
    assert found.answer in (texts[-1] if texts else '')


@EACH
@given(st.text(st.characters(), max_size=40))
def test_storable_texts(text):
    """Half characters are replaced one by one; everything else stays."""
    stored = grammar.storable(text)
    stored.encode('utf-8')
    assert len(stored) == len(text) and grammar.half_characters(stored) == 0
    changed = sum(a != b for a, b in zip(text, stored))
    assert changed == grammar.half_characters(text)


# ---------------------------------------------------------------- yes and no


@EACH
@given(
    st.sampled_from(['yes', 'no']), WORDS, st.sampled_from(['{}', '{}, {w}', '{}. {w}', '**{}**'])
)
def test_yes_and_no_are_alike(word, words, form):
    """What is read as Yes is read as No when the word is exchanged."""
    other = {'yes': 'no', 'no': 'yes'}[word]
    one, two = (scoring.read_yesno(form.format(w, w=words)) for w in (word, other))
    assert (one, two) == (word.capitalize(), other.capitalize())


@EACH
@given(ANY)
def test_any_text_is_yes_no_or_neither(text):
    """Nothing else comes out, and case does not matter."""
    assert scoring.read_yesno(text) in ('Yes', 'No', None)
    ascii_only = text.encode('ascii', 'ignore').decode()
    assert scoring.read_yesno(ascii_only) == scoring.read_yesno(ascii_only.upper())


# ---------------------------------------------------------------- replies of a judge


@EACH
@given(
    OPTIONS, st.data(), st.sampled_from(['{}', '({})', '{}.', 'Answer: {}', 'option {}', '{} {t}'])
)
def test_a_letter_follows_its_option(texts, data, form):
    """The letter of an option is read wherever the option stands."""
    order = data.draw(st.permutations(texts))
    for options in (texts, order):
        named = dict(zip('ABCDEF', options))
        letter = next(c for c, t in named.items() if t == texts[0])
        assert judge.read_letter(form.format(letter, t=texts[0]), named) == letter


@EACH
@given(ANY)
def test_any_reply_of_a_judge_is_read_or_refused(reply):
    """A letter of the options or Z, a number from 0 to 1, yes or no; else a reason."""
    found = judge.read_letter(reply, dict(A='cat', B='dog'))
    assert found in ('A', 'B', 'Z') if isinstance(found, str) else isinstance(found, Unparsable)
    for outcome in (reward.read_score(reply), judge.read_same(reply, {})):
        assert isinstance(outcome, (AnswerScore, Unparsable))


@EACH
@given(st.floats(0, 1))
def test_a_mark_is_the_number(value):
    """A mark with three decimals is read as it is written."""
    mark = f'{value:.3f}'
    assert reward.read_score(mark) == AnswerScore(float(mark))
    assert reward.read_score(f' {mark}.\n') == AnswerScore(float(mark))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3),
    max_leaves=8,
)


@EACH
@given(JSON, st.sampled_from(['', 'choices', 'message', 'content']))
def test_any_json_is_a_completion_or_refused(value, place):
    """A body of another shape is refused by ValueError, wherever the shape changes."""
    body = value
    if place in ('choices', 'message', 'content'):
        body = dict(content=value) if place == 'content' else value
        body = dict(message=body, finish_reason='stop') if place != 'choices' else body
        body = dict(choices=[body])
    try:
        text, about = read_completion(body)
    except ValueError:
        return
    text.encode('utf-8')
    assert isinstance(text, str) and {'finish', 'model'} <= {*about}


# ---------------------------------------------------------------- time

SHAPES = (
    '<answer>',
    '</think>',
    '(A) ',
    'not B, ',
    'yes or no ',
    '\n',
    ' ',
    'B is correct. ',
    '1.',
)
READERS = {
    'grammar': lambda text: grammar.parse([text]),
    'answer_text': scoring.answer_text,
    'yes and no': scoring.read_yesno,
    'letter': lambda text: judge.read_letter(text, dict(A='cat', B='dog')),
    'mark': reward.read_score,
    'thoughts': grammar.after_thoughts,
}


def seconds(reader, text):
    begun = time.process_time()
    reader(text)
    return time.process_time() - begun


@pytest.mark.parametrize('name', READERS)
@pytest.mark.parametrize('shape', SHAPES, ids=[s.strip() or ascii(s) for s in SHAPES])
def test_time_is_linear(name, shape):
    """Sixteen times the text takes at most four times sixteen times as long."""
    short = shape * (16_000 // len(shape))
    one = min(seconds(READERS[name], short) for _ in range(3))
    many = min(seconds(READERS[name], short * 16) for _ in range(2))
    assert many <= 64 * one + 0.05
