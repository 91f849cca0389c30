"""Properties of the readers of tables: nothing is lost, nothing is guessed, nothing takes for ever."""

import base64
import csv
import io
import time
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from clear_nb import bench_files as bf
from clear_nb import rows as row_module
from clear_nb.cells import (
    CellFault,
    cell_picture,
    listed_options,
    option_letter,
    options_of_question,
    plain_index,
    single_answer,
    split_options,
    without_placeholder,
)
from clear_nb.core import rng
from clear_nb.rows import BenchmarkRow, Reject, encode_picture, read_datasets, read_tsv
from clear_nb.variants import VariantPlan, make_records, variant_groups

COLUMNS = ['index', 'image', 'question', 'hint', 'A', 'B', 'C', 'answer', 'category']
PICTURES = [
    encode_picture(rng('properties', k).integers(0, 256, (9, 9, 3), np.uint8)) for k in range(3)
]
CODES = [base64.b64encode(p).decode() for p in PICTURES]

# texts with everything that a table could trip over
TEXT = st.text(
    st.one_of(
        st.sampled_from('aB "\'\t\n\r,;:.()[]<>|\\/0é図\u200b'),
        st.characters(exclude_categories=['Cs']),
    ),
    max_size=12,
)
CELL = st.one_of(
    TEXT, st.sampled_from(['', 'nan', 'None', 'NA', '<image>', '"', 'A. x\nB. y', '-'])
)
ROW = st.fixed_dictionaries(
    dict(
        index=st.one_of(st.integers(0, 3_000_003).map(str), st.floats(0, 99).map(str), CELL),
        image=st.one_of(st.sampled_from([*CODES, CODES[0][:-3]]), st.integers(0, 9).map(str), CELL),
        question=CELL,
        hint=CELL,
        A=CELL,
        B=CELL,
        C=CELL,
        answer=st.one_of(st.sampled_from(['A', '(B)', 'c.', 'yes']), CELL),
        category=CELL,
    )
)
QUICK = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def quoted(rows, columns=COLUMNS):
    """A table as csv and pandas write it."""
    file = io.StringIO(newline='')
    writer = csv.DictWriter(
        file, columns, delimiter='\t', lineterminator='\n', quoting=csv.QUOTE_ALL
    )
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def written(folder, text, name='toy'):
    path = Path(folder) / f'{name}.tsv'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def plain_row(k, question='Which?'):
    """A good row without quotes."""
    texts = dict(A='cat', B='dog', C='', hint='', category='x')
    return texts | dict(index=str(k), image=CODES[k % 3], question=question, answer='B')


def used(rows):
    return [r for r in rows if isinstance(r, BenchmarkRow)]


# Nothing is lost


@QUICK
@given(
    rows=st.lists(ROW, min_size=1, max_size=6), name=st.sampled_from(['toy', 'MMBench_x', 'MMVP'])
)
def test_every_row_is_used_or_named(tmp_path, rows, name):
    """Rows used + rows rejected with a reason = rows in the file, as often as it is read."""
    source = read_tsv(written(tmp_path, quoted(rows), name))
    got = list(source)
    assert len(got) == len(rows) == source.total
    assert [r.row for r in got if isinstance(r, Reject)] == [
        k for k, r in enumerate(got, 1) if isinstance(r, Reject)
    ]
    assert got == list(source)
    keys = [r.key for r in used(got)]
    assert len(set(keys)) == len(keys)
    assert {k[1] for k in keys} <= {r.index for r in source.outline()}
    for r in used(got):
        assert r.answer in r.options or not r.options and r.answer


@QUICK
@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_a_dataset_is_read_like_a_table(rows):
    """Every row of a data set is used or named; what both readers use is the same."""
    columns = dict(index='index', image='image', question='question', hint='hint', answer='answer')
    columns |= dict(options=['A', 'B', 'C'], category='category')
    got = list(read_datasets(Dataset.from_list(rows), columns, 'toy'))
    assert len(got) == len(rows)
    for r, row in zip(got, rows):
        assert r.index == plain_index(row['index'])
        assert isinstance(r, Reject) or r.answer in r.options or not r.options and r.answer


@QUICK
@given(
    n=st.integers(2, 12),
    faults=st.dictionaries(
        st.integers(0, 11), st.sampled_from(['"open', '"', '"""', '"a\tb', 'x\ty', '"a" b"'])
    ),
)
def test_a_fault_stays_in_its_row(tmp_path, n, faults):
    """However a row is broken, the rows that are whole by themselves are read."""
    faults = {k: text for k, text in faults.items() if k < n}
    rows = [plain_row(k, faults.get(k, 'Which?')) for k in range(n)]
    lines = ['\t'.join(COLUMNS), *('\t'.join(row[c] for c in COLUMNS) for row in rows)]
    source = read_tsv(written(tmp_path, '\n'.join(lines)))
    got = list(source)
    assert len(got) == source.total == n
    assert {r.index for r in used(got)} >= {str(k) for k in range(n) if k not in faults}


@QUICK
@given(
    data=st.one_of(st.binary(max_size=300), st.lists(ROW, max_size=3).map(quoted)), cut=st.data()
)
def test_any_bytes(tmp_path, data, cut):
    """Arbitrary bytes, and a table with bytes replaced: rows, or a ValueError with the name."""
    data = bytearray(data if isinstance(data, bytes) else data.encode())
    for _ in range(cut.draw(st.integers(0, 3)) if data else 0):
        data[cut.draw(st.integers(0, len(data) - 1))] = cut.draw(st.sampled_from(b'"\t\n\r\0\xffA'))
    try:
        source = read_tsv(written(tmp_path, bytes(data)))
    except ValueError as e:
        assert 'toy.tsv' in str(e)
    else:
        assert len(list(source)) == source.total


# Order does not count


@QUICK
@given(rows=st.lists(ROW, min_size=2, max_size=6), order=st.randoms(use_true_random=False))
def test_order_of_the_lines(tmp_path, rows, order):
    """A permutation of the lines permutes the rows."""
    rows = [dict(row, index=str(k)) for k, row in enumerate(rows)]
    mixed = order.sample(rows, len(rows))

    def outcome(r):
        return replace(r, row=0) if isinstance(r, Reject) else r

    first = {r.index: outcome(r) for r in read_tsv(written(tmp_path, quoted(rows)))}
    second = {r.index: outcome(r) for r in read_tsv(written(tmp_path, quoted(mixed)))}
    assert first == second and len(first) == len(rows)


# What was written is read


@settings(QUICK, max_examples=15)
@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_written_and_read_again(tmp_path_factory, rows):
    """The rows of a built folder and of the TSV that is written from it."""
    folder = tmp_path_factory.mktemp('again')
    known = [dict(row, index=str(k), image=CODES[k % 3]) for k, row in enumerate(rows)]
    good = used(read_tsv(written(folder, quoted(known))))
    assume(good)
    plan = VariantPlan(severities=('low',), corruptions=('gaussian_noise',), relative=True)
    records = list(make_records(variant_groups(good, plan, []), plan, 1))
    assume(records)
    bf._write_shards(iter(records), folder / 'out', 0, 4)
    shards = sorted((folder / 'out').glob('*.parquet'))
    path = folder / 'toy_LOW_LEVEL_LOW.tsv'
    bf._write_one_tsv(path, shards, dict(benchmark='toy', severity='low'))
    names = ['index', 'question', 'options', 'answer', 'hint', 'category', 'prompt', 'image']
    again = [[getattr(r, n) for n in names] for r in read_tsv(path)]
    assert again == [[getattr(r, n) for n in names] for r in bf._selected(shards, {})]


# Options and answers

WORD = st.text('abcdefgh xyz', min_size=2, max_size=8).map(str.strip).filter(lambda t: len(t) > 1)
WORDS = st.lists(WORD, min_size=2, max_size=8, unique=True)
FORMS = [
    lambda pairs: 'Which?\n' + '\n'.join(f'{c}. {t}' for c, t in pairs) + '\nAnswer now.',
    lambda pairs: 'Which? ' + ' '.join(f'({c.lower()}) {t}' for c, t in pairs),
    lambda pairs: 'Which? Options: ' + ', '.join(f'{c}: {t}' for c, t in pairs),
    lambda pairs: 'Which? ' + ' '.join(f'{c}. {t}' for c, t in pairs),
]


@given(words=WORDS, form=st.sampled_from(FORMS), at=st.integers(0, 7))
def test_options_of_every_form(words, form, at):
    """What was listed is found, and no letter is better off than another."""
    options, letter = dict(zip(ascii_uppercase, words)), ascii_uppercase[at % len(words)]
    text = form(list(options.items()))
    assert split_options(text) == ('Which?', options)
    for answer in (letter, f'({letter})', letter.lower(), f'{letter}. {options[letter]}'):
        assert options_of_question(text, answer) == ('Which?', options, letter)
    assert options_of_question(text, options[letter])[2] == letter


@given(words=WORDS, order=st.randoms(use_true_random=False), at=st.integers(0, 7))
def test_permuted_options(words, order, at):
    """Permuting the options permutes the letter."""
    right, mixed = words[at % len(words)], order.sample(words, len(words))
    options = listed_options(mixed)
    assert options == listed_options(str(mixed)) == dict(zip(ascii_uppercase, mixed))
    letter = ascii_uppercase[mixed.index(right)]
    assert option_letter(right, options) == option_letter(mixed.index(right), options) == letter


@given(value=st.one_of(CELL, st.lists(st.one_of(CELL, st.none()), max_size=30), st.floats()))
def test_cells_are_read_or_refused(value):
    """Any cell has a reading or a CellFault."""
    readers = [listed_options, single_answer]
    readers += [without_placeholder, split_options] if isinstance(value, str) else []
    for read in [*readers, lambda v: cell_picture(v, encode_picture, Path('nowhere'))]:
        try:
            read(value)
        except CellFault as e:
            assert e.reason
    if isinstance(value, str):
        found = options_of_question(value, 'A')[1]
        assert list(found) == list(ascii_uppercase[: len(found)]) and all(found.values())


# Time


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def is_linear(call, make, n):
    """Eight times the input costs at most 24 times as much, or next to nothing."""
    call(make(n))
    small, large = (min(seconds(lambda: call(make(k))) for _ in range(2)) for k in (n, 8 * n))
    return large < 24 * small + 0.05


ENDLESS = {
    'blank lines': lambda n: '\n' * n,
    'blanks': lambda n: 'A.' + ' ' * n,
    'markers': lambda n: '(A) ' * n,
    'runs': lambda n: 'A. x B. y ' * n,
    'options': lambda n: 'Options: ' * n,
    'commas': lambda n: 'a, ' * n,
    'placeholders': lambda n: '<image' * n,
    'list': lambda n: '[' + "'a', " * n,
    'brackets': lambda n: '[' * n,
    'quotes in a list': lambda n: "['" + "\\'" * n,
}


@pytest.mark.parametrize('kind', ENDLESS)
def test_cells_in_linear_time(kind):
    """Reading a text takes time in proportion to its length."""

    def read(text):
        options_of_question(text, 'A')
        for reader in (listed_options, without_placeholder, single_answer, plain_index):
            try:
                reader(text)
            except CellFault:
                pass

    assert is_linear(read, ENDLESS[kind], 1500)


def lines_of(n, question):
    rows = [plain_row(k, question(k)) for k in range(n)]
    return '\n'.join(['\t'.join(COLUMNS), *('\t'.join(r[c] for c in COLUMNS) for r in rows)])


TABLES = {
    'whole': lambda k: 'Which?',
    'every row opens a quote': lambda k: '"Which?',
    'only the first': lambda k: '"Which?' if k == 0 else 'Which?',
    'doubled quotes': lambda k: '"""' if k % 2 else '""""',
    'open, and inches': lambda k: '"Which?' if k % 2 else '5" or 7"',
    'two open quotes': lambda k: '"a\t"b\t"c',
}


@pytest.mark.parametrize('kind', TABLES)
def test_tables_in_linear_work(tmp_path, kind, monkeypatch):
    """Eight times the rows take about eight times the lines, however the quotes stand."""
    looked, decoded = [0], row_module._decoded

    def counted(line):
        looked[0] += 1
        return decoded(line)

    monkeypatch.setattr(row_module, '_decoded', counted)
    work = []
    for n in (20, 160):
        path = written(tmp_path, lines_of(n, TABLES[kind]))
        looked[0] = 0
        assert len(list(row_module._records(path, 0, COLUMNS))) >= n
        work.append(looked[0])
    assert work[1] <= 12 * work[0]
