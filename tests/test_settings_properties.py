"""Properties of settings and presets: what is read is what was written, or it is refused by name."""

import copy
import math
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Literal, get_args, get_origin

import pytest
import yaml
from annotated_types import Interval, MinLen
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_nb import grpo, presets
from clear_nb.core import PATHS
from clear_nb.degrade import SEVERITY
from clear_nb.generate import POLICIES, Sampling
from clear_nb.presets import (
    Preset,
    cast_value,
    check_fields,
    checked,
    dataclass_from,
    load_preset,
    preset_names,
    read_settings,
    read_value,
)
from clear_nb.restore import RETURN_MODES
from clear_nb.reward import RULES_BY_NAME

NAMES = st.from_regex(r'[a-z_]{1,8}', fullmatch=True)
PLAIN = st.one_of(
    st.booleans(),
    st.none(),
    st.integers(-(10**18), 10**18),
    st.floats(allow_nan=False),
)
ODD_TEXTS = (
    '1:30',
    '0b1',
    '1_000',
    'no',
    'Yes',
    'on',
    '2026-12-01',
    '<<',
    '=',
    '0x',
    '1e',
    '①',
    '²',
)


def written(value) -> str:
    "Write a value as a person would on a command line."
    if value is None or isinstance(value, bool):
        return {None: 'null', True: 'true', False: 'false'}[value]
    if isinstance(value, float) and math.isinf(value):
        return '.inf' if value > 0 else '-.inf'
    return repr(value)


# ---------------------------------------------------------------- NAME=VALUE


@settings(max_examples=200)
@given(PLAIN)
def test_values_come_back(value):
    "A number, truth value or null keeps its value and its type."
    got = read_value(written(value))
    assert got == value and type(got) is type(value)


@settings(max_examples=100)
@given(st.text(max_size=40))
def test_a_text_is_itself_or_a_number(text):
    "Whatever is no number, truth value or null is the text as it stands; nothing else is raised."
    value = read_value(text)
    if isinstance(value, str):
        assert value == text
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        assert text.isascii() and set(text) <= set('0123456789+-.eExoabcdfABCDFinINaNF')


@pytest.mark.parametrize('text', ODD_TEXTS)
def test_no_surprising_values(text):
    "What YAML 1.1 took for numbers and truth values are texts."
    assert read_value(text) == text


@pytest.mark.parametrize(
    'text, value',
    [('010', 10), ('-010', -10), ('0o10', 8), ('0xF', 15), ('+3', 3), ('.5', 0.5), ('1.', 1.0)],
)
def test_numbers_of_yaml_12(text, value):
    "A leading zero changes nothing; eight and sixteen as a base are said."
    assert read_value(text) == value and type(read_value(text)) is type(value)


@settings(max_examples=100)
@given(st.dictionaries(NAMES, PLAIN | st.dictionaries(NAMES, PLAIN, min_size=1), max_size=5))
def test_settings_come_back(values):
    "Names with dots become mappings, in any number."
    texts = []
    for name, value in values.items():
        inner = value if isinstance(value, dict) else {'': value}
        texts += [f'{name}.{k}={written(v)}'.replace('.=', '=') for k, v in inner.items()]
    assert read_settings(texts) == values


@settings(max_examples=150)
@given(st.lists(st.text(max_size=12), max_size=4))
def test_settings_raise_only_value_errors(texts):
    "Any list of texts is read, or refused with a sentence that quotes one of them."
    try:
        got = read_settings(texts)
    except ValueError as e:
        assert 'cannot read' in str(e)
    else:
        assert all('=' in t for t in texts) and len(str(got)) >= 2


def test_a_setting_twice_is_refused():
    "One of two values would be lost."
    for texts in (['a=1', 'a=1'], ['a.b=1', 'a.b=2'], ['a.b=1', 'a=2'], ['=1'], ['a..b=1']):
        with pytest.raises(ValueError, match='each name once'):
            read_settings(texts)


# ---------------------------------------------------------------- types and ranges


@checked
def function(count: presets.Count = None, share: presets.Share = 0.5, word: str = ''):
    return count, share, word


@settings(max_examples=200)
@given(st.sampled_from(('count', 'share', 'word')), PLAIN | st.text(max_size=5))
def test_arguments(name, value):
    "A wrong type or a value out of range is refused with the argument's name."
    try:
        got = function(**{name: value})
    except ValueError as e:
        assert name in str(e) and 'must be' in str(e)
    else:
        assert value in got
        assert got[0] is None or got[0] >= 1
        assert 0 <= got[1] <= 1 and isinstance(got[2], str)


SAMPLING = ('max_new', 'temperature', 'top_p', 'vocab', 'steps', 'shift', 'sigma', 'max_restores')


@settings(max_examples=150)
@given(st.sampled_from(SAMPLING), st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=2))
def test_sampling(name, value):
    "The same for the settings of a generation."
    try:
        made = Sampling(**{name: value})
    except ValueError as e:
        assert f'Sampling.{name} must be' in str(e)
    else:
        check_fields(made)
        assert getattr(made, name) == value


def test_words_are_those_of_the_chapters():
    "The words that a preset may hold are the ones that the chapters know."
    hints = presets._hints_of(presets.GrpoParams)
    known = dict(
        norm=grpo.NORMS,
        mode=RETURN_MODES,
        policy=POLICIES,
        rules=RULES_BY_NAME,
        scale=('std', 'none'),
        reduction=('mean', 'sum'),
    )
    for name, words in known.items():
        assert {*get_args(hints[name])} == {*words}, name
    levels = get_args(get_args(get_args(presets._hints_of(presets.EvalParams)['severities'])[0])[0])
    assert {*levels} == {'clean', *SEVERITY}


def test_every_number_of_a_preset_has_a_range():
    "No field of a section is a bare int or float."
    for section in fields(Preset):
        kind = presets._hints_of(Preset)[section.name]
        if is_dataclass(kind):
            bare = [f for f, t in presets._hints_of(kind).items() if t in (int, float, str)]
            assert not bare, (section.name, bare)


# ---------------------------------------------------------------- preset files


@lru_cache
def plain_preset(name) -> dict:
    "Read a file of params/ as plain mappings."
    return presets._read_yaml(PATHS.params / f'{name}.yaml')


def places(values, path=()):
    "List the paths of all values."
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict) and path == ():
            yield from places(value, (*path, key))


PATHS_OF_VALUES = [
    (name, path) for name in preset_names() for path in places(plain_preset(name)) if len(path) == 2
]
MUTANTS = st.one_of(
    PLAIN,
    st.integers(-3, 3),
    st.floats(allow_nan=True),
    st.sampled_from((10**400, '010', '1:30', [], {}, [1], ['hard'], 'std', 'paper', [[]])),
    st.text(max_size=6),
)


@settings(max_examples=300)
@given(st.sampled_from(PATHS_OF_VALUES), MUTANTS)
def test_a_changed_value_is_taken_or_named(place, value):
    "Any change of one value is either taken with that value, or refused with file and key."
    name, (section, key) = place
    values = copy.deepcopy(plain_preset(name)) | dict(name=name, overrides={})
    values[section][key] = value
    try:
        made = dataclass_from(Preset, values, f'params/{name}.yaml: ')
    except ValueError as e:
        assert f'params/{name}.yaml: {section}.{key} must be' in str(e) and len(str(e)) < 400
        return
    part = getattr(made, section)
    got = part[key] if isinstance(part, dict) else getattr(part, key)
    assert got == (tuple(value) if isinstance(value, list) and section != 'model' else value)


@settings(max_examples=60)
@given(st.sampled_from(PATHS_OF_VALUES), NAMES)
def test_a_lost_or_misspelt_key_is_named(place, other):
    "A key that is missing has a default, or is named; a key that nobody knows is named."
    name, (section, key) = place
    values = copy.deepcopy(plain_preset(name)) | dict(name=name, overrides={})
    values[section][other] = values[section].pop(key)
    try:
        made = dataclass_from(Preset, values, 'x: ')
    except ValueError as e:
        assert other in str(e) or key in str(e)
    else:
        assert section == 'model' or other == key or hasattr(getattr(made, section), other)


@settings(max_examples=60)
@given(st.text(max_size=60))
def test_any_file_is_read_or_refused(tmp_path_factory, text):
    "A file of any text never raises anything but a ValueError that names it."
    folder = tmp_path_factory.getbasetemp() / 'params'
    folder.mkdir(exist_ok=True)
    (folder / 'own.yaml').write_text(text, encoding='utf-8', errors='replace')
    with pytest.raises(ValueError, match='own.yaml'):
        load_preset('own', folder)


BAD_FILES = {
    'negative': ('steps: 4000', 'steps: -5', 'base.steps must be at least 0, got -5'),
    'no batch': ('batch: 32 ', 'batch: 0 ', 'base.batch must be at least 1, got 0'),
    'base 60': ('steps: 4000', 'steps: 1:30', "base.steps must be int, got '1:30'"),
    'infinite': ('lr: 2e-3', 'lr: .inf', 'base.lr must be float, got inf'),
    'long': ('steps: 4000', 'steps: ' + '9' * 5000, 'is no number, or too long'),
    'tag': ('steps: 4000', 'steps: !!int many', 'is no number, or too long'),
    'code': ('steps: 4000', 'steps: !!python/name:os.system', 'is not valid YAML'),
    'share': ('drop_vit: 0.4', 'drop_vit: 1.4', 'drop_vit must be at least 0 and at most 1'),
    'mode': ('scale: none', 'scale: nine', 'scale must be one of std, none, got'),
    'severity': ('[clean, low, mid, hard]', '[clean, hardest]', "got 'hardest'"),
    'no severity': ('[clean, low, mid, hard]', '[]', 'a list of at least 1'),
    'name': ('data:', 'name: other\ndata:', "unknown key 'name'"),
    'loop': ('[clean, low, mid, hard]', '&a [*a]', 'severities must be one of'),
}


@pytest.mark.parametrize('case', BAD_FILES)
def test_bad_preset_files(tmp_path, case):
    "One sentence with file, key, value and range."
    old, new, sentence = BAD_FILES[case]
    text = (PATHS.params / 'tiny.yaml').read_text(encoding='utf-8')
    assert old in text
    (tmp_path / 'tiny.yaml').write_text(text.replace(old, new, 1), encoding='utf-8')
    with pytest.raises(ValueError, match='tiny.yaml') as e:
        load_preset('tiny', tmp_path)
    assert sentence in str(e.value) and len(str(e.value)) < 500


def test_a_leading_zero_is_ten(tmp_path):
    "010 is ten, as in YAML 1.2."
    text = (PATHS.params / 'tiny.yaml').read_text(encoding='utf-8')
    (tmp_path / 'tiny.yaml').write_text(text.replace('steps: 4000', 'steps: 010', 1), 'utf-8')
    assert load_preset('tiny', tmp_path).base.steps == 10


def test_shared_references_are_shown_short(tmp_path):
    "Lists that hold each other many times do not fill the memory of a message."
    lines = ['a0: &a0 [x, x, x, x, x, x, x, x, x]']
    lines += [f'a{k}: &a{k} [{", ".join([f"*a{k - 1}"] * 9)}]' for k in range(1, 30)]
    (tmp_path / 'own.yaml').write_text('\n'.join([*lines, 'base: *a29']), encoding='utf-8')
    with pytest.raises(ValueError, match='own.yaml') as e:
        load_preset('own', tmp_path)
    assert len(str(e.value)) < 1000


@settings(max_examples=100)
@given(st.integers(-3, 3), st.floats(-3, 3), st.booleans())
def test_ranges_are_what_they_say(low, value, strict):
    "A value passes a range exactly when it lies in it."
    bound = Interval(gt=low, le=low + 2) if strict else Interval(ge=low, lt=low + 2)
    inside = low < value <= low + 2 if strict else low <= value < low + 2
    try:
        assert cast_value(value, Annotated[float, bound], 'x') == value and inside
    except ValueError as e:
        assert not inside and str(low) in str(e)


def test_kinds_are_told_apart():
    "Lists, words and lengths, alone and together."
    kind = Annotated[tuple[Literal['a', 'b'], ...], MinLen(2)]
    assert cast_value(['a', 'b'], kind, 'x') == ('a', 'b') and get_origin(kind) is Annotated
    for bad in (['a'], ['a', 'c'], 'ab', None, [['a'], 'b']):
        with pytest.raises(ValueError, match='x must be'):
            cast_value(bad, kind, 'x')


def test_yaml_is_what_a_reader_of_version_12_gives():
    "Dumped values come back, whatever their form."
    values = dict(a=1, b=-1.5e-7, c=True, d=None, e='010', f='no', g=[1, '1:30'], h=1e22)
    assert yaml.load(yaml.safe_dump(values), presets._Loader) == values
