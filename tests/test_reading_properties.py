"""Properties of what reads texts of models: the grammar of a trajectory, options, yes and no, the
replies of a judge, and configuration files. Every example is drawn by hypothesis from a fixed seed.
"""

import copy
import json
import time
from string import ascii_uppercase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import byte_tokenizer, tiny_model

from clear_nb import annotate, cells, grammar, judge, reward, scoring
from clear_nb.model import ClearModel, export_bagel
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


PIECES = st.lists(
    st.one_of(
        st.sampled_from([*grammar.TAGS, '<Answer>', '</ANSWER>', '\n', ' ', '<', '/']), WORDS
    ),
    max_size=12,
)


@EACH
@given(PIECES, st.integers(0, 200))
def test_a_cut_never_adds_an_answer(pieces, length):
    """Whatever a text is made of, a part of it from the start holds no block that it does not."""
    whole = ''.join(pieces)
    cut = whole[:length]
    for any_case in (False, True):
        blocks = grammar.answer_blocks(whole, any_case)
        ended = [b for b in blocks if b[1] + len('</answer>') <= len(cut)]
        assert grammar.answer_blocks(cut, any_case) == ended
    answers = {whole[a:b].strip() for a, b in grammar.answer_blocks(whole)}
    assert grammar.parse([cut]).answer in {*answers, ''}


@EACH
@given(WORDS, st.integers(0, 60))
def test_a_thought_that_is_cut_says_nothing(thought, length):
    """Nothing is read behind a thought before its end."""
    whole = f'<think>{thought}</think>B'
    cut = whole[: min(length, len(whole) - len('>B'))]
    assert grammar.after_thoughts(whole) == 'B'
    assert grammar.after_thoughts(cut) == (cut if length < len('<think>') else '')


# ---------------------------------------------------------------- options

# texts of options without words that mean something to the rules
NONSENSE = st.text('bdfgklmprtvz', min_size=3, max_size=7)
TEXTS = st.lists(NONSENSE, min_size=2, max_size=6, unique=True).filter(
    lambda texts: not any(a in b for a in texts for b in texts if a != b)
)
SAID = ('{c}', '({c})', '{c}.', '**{c}**', 'Answer: {c}', 'The answer is {c}.', 'option {c}')
SAID += ('{c}. {t}', '({c}) {t}', '{t}', 'The answer is {t}.', 'I think it is {t}.', '"{t}"')


@EACH
@given(TEXTS, st.data(), st.sampled_from(SAID))
def test_the_letter_follows_its_text(texts, data, said):
    """Permuting the options permutes the letter, and no letter is better off than another."""
    chosen = data.draw(st.sampled_from(texts))
    for order in (texts, data.draw(st.permutations(texts))):
        options = dict(zip(ascii_uppercase, order))
        letter = ascii_uppercase[order.index(chosen)]
        reply = said.format(c=letter, t=chosen)
        assert scoring.read_option(reply, options) == letter, (reply, options)


LETTERS = 'BCDE'  # A is an article as well
PHRASE = st.sampled_from(
    ['answer is', 'The answer is', 'not', 'or', 'and', 'so', ',', '.', '?', '(', ')', '\n', ':']
    + ['wait', 'is wrong', 'is correct', 'because', 'option', 'maybe', 'no', 'instead of', 'Z']
)
TALK = st.lists(st.one_of(PHRASE, st.sampled_from(LETTERS), st.sampled_from(range(4))), max_size=10)


@settings(EACH, max_examples=300)
@given(TALK, st.permutations(LETTERS), st.lists(NONSENSE, min_size=4, max_size=4, unique=True))
def test_letters_are_only_names(talk, order, texts):
    """Whatever a reply says: when all letters change their names, so does what is read."""
    new = dict(zip(LETTERS, order))

    def reply(rename):
        return ' '.join(texts[p] if isinstance(p, int) else rename.get(p, p) for p in talk)

    one = scoring.read_option(reply({}), dict(zip(LETTERS, texts)))
    two = scoring.read_option(reply(new), {new[c]: t for c, t in zip(LETTERS, texts)})
    assert new.get(one, one) == two, (reply({}), reply(new))


@EACH
@given(st.one_of(ANY, TALK.map(lambda talk: ' '.join(map(str, talk)))), TEXTS)
def test_what_is_read_is_an_option(said, texts):
    """A letter of the options, Z for a refusal, or nothing; and it is read as itself."""
    options = dict(zip(ascii_uppercase, texts))
    letter = scoring.read_option(said, options)
    assert letter in (*options, 'Z', None)
    if letter is not None:
        assert scoring.read_option(letter, options) == letter


@EACH
@given(TEXTS, st.data(), st.text(' \t\n\u3000', max_size=4))
def test_case_and_blanks_of_a_letter(texts, data, blanks):
    """A letter alone is read in both cases, between any blanks."""
    options = dict(zip(ascii_uppercase, texts))
    letter = data.draw(st.sampled_from([*options]))
    for form in ('{}', '({})', '{}.', '{})'):
        for c in (letter, letter.lower()):
            assert scoring.read_option(blanks + form.format(c) + blanks, options) == letter


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


# ---------------------------------------------------------------- configuration files


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A checkpoint folder of ours and one as BAGEL publishes it."""
    place, model = tmp_path_factory.mktemp('models'), tiny_model('o', tokenizer=byte_tokenizer())
    return model.save_pretrained(place / 'own'), export_bagel(model, place / 'bagel')


CONFIGS = [(0, 'config.json'), (1, 'llm_config.json'), (1, 'vit_config.json')]
CONFIGS += [(1, 'clear_config.json')]
WRONG = [None, 'x', '7', [], [1], {}, True, -1, 0, 0.5, 10**30, 1e308, float('nan')]


def places(values, *path):
    """Every key of nested mappings, as a path."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, *path, key)


def changed(values, path, wrong):
    """The values with one of them changed."""
    values = copy.deepcopy(values)
    part = values
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = wrong
    return values


@pytest.mark.parametrize('which, name', CONFIGS, ids=[name for _, name in CONFIGS])
def test_a_wrong_value_is_taken_or_named(folders, which, name):
    """Any single value of another type or size either works or is named with its folder."""
    folder, file = folders[which], folders[which] / name
    text = file.read_text(encoding='utf-8')
    refused = 0
    for path in places(json.loads(text)):
        for wrong in WRONG:
            file.write_text(json.dumps(changed(json.loads(text), path, wrong)), encoding='utf-8')
            try:
                ClearModel.from_pretrained(folder, dtype=torch.float32)
            except ValueError as e:
                refused += 1
                assert '\n' not in str(e) and str(folder) in str(e), (path, wrong)
                named = path[-1] in str(e) or name in str(e)
                assert named or 'does not fit the configuration' in str(e), e
            finally:
                file.write_text(text, encoding='utf-8')
    assert refused > 5 * len([*places(json.loads(text))])


# ---------------------------------------------------------------- time

PETS = dict(A='cat', B='dog')
SHAPES = [
    '<answer>',
    '</think>',
    '<think><answer>',
    '(A) ',
    'not B, ',
    'yes or no ',
    '\n',
    ' ',
    '1.',
]
SHAPES += ['B is correct. ', '[', '(', '"', "'a' ", 'A. ', 'A: x, ', '$', '-', '<image>', ',', '**']
READERS = {
    'grammar': lambda text: grammar.parse([text]),
    'thoughts': grammar.after_thoughts,
    'trace': annotate.read_trace,
    'answer_text': scoring.answer_text,
    'option': lambda text: scoring.read_option(scoring.answer_text(text), PETS),
    'option of the kit': lambda text: reward.match_option(scoring.kit_extract(text), PETS),
    'yes and no': scoring.read_yesno,
    'yes and no of the kit': scoring.kit_yesno,
    'same words': lambda text: reward.matches(text, f'{text}x'),
    'letter of a judge': lambda text: judge.read_letter(text, PETS),
    'mark of a judge': reward.read_score,
    'yes of a judge': lambda text: judge.read_same(text, {}),
    'options of a question': lambda text: cells.options_of_question(text, 'B'),
    'listed options': lambda text: cells.listed_options(f'[{text}]'),
    'single answer': lambda text: cells.single_answer(f"['{text}']"),
    'placeholder': cells.without_placeholder,
    'base64': cells.decode_base64,
}


def seconds(reader, text):
    """CPU seconds of reading a text, which may be refused."""
    begun = time.process_time()
    try:
        reader(text)
    except ValueError:
        pass
    return time.process_time() - begun


@pytest.mark.parametrize('name', READERS)
@pytest.mark.filterwarnings('ignore::SyntaxWarning')
def test_time_is_linear(name):
    """Sixty-four times a bad text takes at most four times sixty-four times as long."""
    for shape in SHAPES:
        short = shape * (4_000 // len(shape))
        one = min(seconds(READERS[name], short) for _ in range(3))
        many = seconds(READERS[name], short * 64)
        assert many <= 64 * 4 * one + 0.5, (shape, one, many)
