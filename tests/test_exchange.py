"""Files of VLMEvalKit and lmms-eval: what goes out is read as the kit reads it, what comes in is
joined row by row, and nothing is lost or added in silence.
"""

import base64
import csv
import io
import json
import subprocess
import sys
from string import ascii_uppercase

import numpy as np
import pandas as pd
import pytest
from bench_rows import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_nb import cli
from clear_nb.adapters import CallableAdapter
from clear_nb.bench import left_out, read_results
from clear_nb.bench_files import build_files, read_files, read_outline
from clear_nb.evaluate import run_rows
from clear_nb.exchange import (
    CELL_LIMIT,
    import_run,
    read_lmms_eval,
    read_vlmevalkit,
    row_sets,
)
from clear_nb.rows import BenchmarkRow, decode_picture, read_tsv

ROLL = 1_000_000


def questions(n=5):
    """Questions of MMBench with every roll of two options; the second roll points to the picture
    of the first.
    """
    options = ['red', '3']
    for k in range(n):
        for roll in range(2):
            order = options[roll:] + options[:roll]
            yield BenchmarkRow(
                'MMBench',
                str(k + roll * ROLL),
                f'What is it,\t"{k}"?\nLook closely.',
                ascii_uppercase[order.index(options[0])],
                picture(k, 64, 64),
                dict(zip(ascii_uppercase, order)),
                group=str(k),
                hint='' if k % 2 else f'hint {k}',
                category=f'c{k % 2}',
                l2_category='l2',
                split='dev',
                picture=str(k),
            )


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """A benchmark at two severities with its TSVs."""
    out = tmp_path_factory.mktemp('kits') / 'mmbench'
    rows, levels = list(questions()), ['low', 'hard']
    build_files(
        rows, out, severities=levels, seed=3, tsv=True, progress=False, by_group=True, relative=True
    )
    return out


@pytest.fixture(scope='module')
def clean(tmp_path_factory):
    """The clean TSV."""
    path = tmp_path_factory.mktemp('clean') / 'MMBench.tsv'
    write_clean(path, questions())
    return path


def write_clean(path, rows):
    """Write rows as a TSV in which a picture stands once."""
    lines = []
    for row in rows:
        own = row.picture == row.index
        image = base64.b64encode(row.image).decode() if own else row.picture
        texts = dict(question=row.question, answer=row.answer, hint=row.hint or None)
        names = {'category': row.category, 'l2-category': row.l2_category}
        lines.append(dict(index=int(row.index), image=image) | texts | row.options | names)
    pd.DataFrame(lines).to_csv(path, sep='\t', index=False, quoting=csv.QUOTE_ALL)


def read_as_the_kit(path):
    """Read a TSV by the rules of VLMEvalKit's ImageBaseDataset: pandas, pictures by pointer,
    numbers for indices where all are numbers.
    """
    data = pd.read_csv(path, sep='\t')
    data = data[~data['image'].isna()]
    names, images = [str(x) for x in data['index']], [str(x) for x in data['image']]
    held = dict(zip(names, images))
    for name, image in held.items():
        if len(image) <= 64:
            assert image in held and len(held[image]) > 64
            held[name] = held[image]
    data['image'] = [held[name] for name in names]
    data['index'] = [int(x) for x in names]
    data['g_index'] = [int(x % 1e6) for x in data['index']]
    return data


def options_as_the_kit(line):
    """The options that the kit shows: the letters whose cell is filled."""
    return {c: str(line[c]) for c in ascii_uppercase if c in line and not pd.isna(line[c])}


@pytest.mark.parametrize('severity', ['low', 'hard'])
def test_the_kit_reads_what_we_write(built, severity):
    """Index, picture, question, hint, options, answer, categories and circular groups."""
    [path] = built.glob(f'*{dict(low="LOW", hard="HIGH")[severity]}.tsv')
    rows = {int(r.index): r for r in read_files(built, severity=severity)}
    data = read_as_the_kit(path)
    assert sorted(data['index']) == sorted(rows) and max(rows) >= ROLL
    for _, line in data.iterrows():
        row = rows[line['index']]
        assert line['question'] == row.question and line['answer'] == row.answer
        assert options_as_the_kit(line) == row.options
        assert ('' if pd.isna(line['hint']) else line['hint']) == row.hint
        assert (line['category'], line['l2-category']) == (row.category, row.l2_category)
        assert str(line['g_index']) == row.group
        shown = decode_picture(base64.b64decode(line['image']))
        assert np.array_equal(shown, row.pixels())


def test_what_we_write_comes_back(built):
    """`read_tsv` gives the rows of the folder, as far as a TSV holds them."""
    for severity, level in dict(low='LOW', hard='HIGH').items():
        [path] = built.glob(f'*{level}.tsv')
        back = {r.index: r for r in read_tsv(path)}
        for row in read_files(built, severity=severity):
            same = back.pop(row.index)
            for name in ('question', 'answer', 'options', 'group', 'hint', 'category', 'severity'):
                assert getattr(same, name) == getattr(row, name), name
            assert same.image == row.image
        assert not back


def says(row):
    """A reply that only the row decides; some are words that tables lose."""
    odd = {'1': 'None', '2': 'N/A', str(ROLL): '=B', '3': 'nan', '0': 'The answer is (A).\nSure?'}
    return odd.get(row.index, f'{row.answer if int(row.index) % 2 else "A"}. because "it" is\tso')


def predictions(path, say=says):
    """The kit's file: what its reader holds, without pictures, and what a model said."""
    data = read_as_the_kit(path).drop(columns=['image', 'g_index'])
    rows = {int(r.index): r for r in questions()}
    return data.assign(prediction=[say(rows[i]) for i in data['index']])


def written(data, path):
    """Write a table as the kit's `dump`."""
    if path.suffix == '.xlsx':
        data.to_excel(path, index=False)
    elif path.suffix == '.json':
        path.write_text(json.dumps(data.to_dict('records'), ensure_ascii=False), encoding='utf-8')
    else:
        sep = '\t' if path.suffix == '.tsv' else ','
        data.to_csv(path, sep=sep, index=False, quoting=csv.QUOTE_ALL)
    return path


def imported(adapter, data, folder, severity=None):
    """Run an import of a TSV or a built folder and read its results."""
    rows = read_tsv(data) if data.is_file() else read_files(data, severity=severity)
    return read_results(import_run(adapter, rows, folder, content='c', progress=False))


@pytest.mark.parametrize('suffix', ['.xlsx', '.tsv', '.csv', '.json'])
def test_replies_of_the_kit_equal_a_run_of_ours(clean, tmp_path, suffix):
    """The same replies give the same results, whichever file they come from."""
    pytest.importorskip('openpyxl') if suffix == '.xlsx' else None
    file = written(predictions(clean), tmp_path / f'Qwen-VL_MMBench{suffix}')
    adapter = read_vlmevalkit([file], read_tsv(clean).outline())
    frame, run = imported(adapter, clean, tmp_path / 'run')
    rows = {(r.question, *r.options.values()): r for r in questions()}

    def model(picture, prompt):
        found = [r for k, r in rows.items() if all(text in prompt for text in k[:1])]
        listed = [r for r in found if f'A. {r.options["A"]}' in prompt]
        return says(listed[0])

    ours = run_rows(CallableAdapter(model), read_tsv(clean), tmp_path / 'own', progress=False)
    own, _ = read_results(ours)
    columns = ['index', 'reply', 'kind', 'value', 'group']
    assert frame[columns].equals(own[columns]) and adapter.name == 'Qwen-VL'
    assert frame.reply.tolist().count('=B') == 1 and 'N/A' in set(frame.reply)
    assert run['rows'] == len(frame) == 10 and not adapter.unanswered


def test_a_row_without_a_prediction_is_pending_and_named(clean, tmp_path):
    """An empty cell, the kit's words for a failure, and a row that the file lacks."""
    data = predictions(clean).set_index('index')
    data.loc[1, 'prediction'] = None
    data.loc[2, 'prediction'] = 'Failed to obtain answer via API. '
    data.loc[4, 'prediction'] = "Failed to obtain answer: <class 'RuntimeError'> out of memory"
    file = written(data.drop(index=3).reset_index(), tmp_path / 'm_MMBench.tsv')
    adapter = read_vlmevalkit([file], read_tsv(clean).outline())
    frame, run = imported(adapter, clean, tmp_path / 'run')
    table = left_out(frame, run).set_index('index')
    assert set(table.index) == {'1', '2', '3', '4'} and set(table.kind) == {'pending'}
    assert table.reason['1'] == 'no prediction' and 'files' in table.reason['3']
    assert {k[1] for k in adapter.unanswered} == {'1', '2', '3', '4'}
    [remark] = adapter.remarks
    assert remark.startswith('4 rows have no reply') and 'MMBench 3 clean' in remark


def test_a_file_of_main_rolls_leaves_the_others_pending(clean, tmp_path):
    """After circular scoring the kit keeps the first roll of every question only."""
    data = predictions(clean)
    main = data[data['index'] < ROLL].assign(hit=1, log='')
    file = written(main, tmp_path / 'm_MMBench_gpt-4-0125_result.csv')
    adapter = read_vlmevalkit([file], read_tsv(clean).outline())
    assert len(adapter.unanswered) == 5 and all(int(k[1]) >= ROLL for k in adapter.unanswered)


def changed(data, **columns):
    """A table whose first line has other cells."""
    data = data.astype(object)
    for name, value in columns.items():
        data.loc[data.index[0], name] = value
    return data


REFUSED = {
    'a stranger': (lambda d: changed(d, index=77), 'does not hold: index 77'),
    'no index': (lambda d: changed(d, index=None), 'index none (m_MMBench.tsv, line'),
    'a row twice': (
        lambda d: pd.concat([d, d[:1].assign(prediction='C')]),
        'index 0 has two replies, in m_MMBench.tsv, line',
    ),
    'no predictions': (lambda d: d.drop(columns='prediction'), 'Is it a table of scores?'),
    'no column index': (lambda d: d.drop(columns='index'), 'has no column index'),
    'no rows': (lambda d: d[:0], 'has no rows'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_does_not_fit_is_refused_by_name(clean, tmp_path, name):
    """One sentence with the row; nothing is written."""
    change, said = REFUSED[name]
    file = written(change(predictions(clean)), tmp_path / 'm_MMBench.tsv')
    with pytest.raises(ValueError) as e:
        read_vlmevalkit([file], read_tsv(clean).outline())
    assert said in str(e.value) and '\n' not in str(e.value)


OTHERS = {
    'another question': (dict(question='Who is it?'), 'the question there is'),
    'another option': (dict(A='green'), 'option A there is'),
    'another answer': (dict(answer='B'), 'the right answer there is B and here A'),
}


@pytest.mark.parametrize('name', OTHERS)
def test_a_reply_to_another_row_stops_the_import(clean, tmp_path, name):
    """The same index in another version of a benchmark: refused, and the folder is not there."""
    change, said = OTHERS[name]
    file = written(changed(predictions(clean), **change), tmp_path / 'm_MMBench.tsv')
    adapter = read_vlmevalkit([file], read_tsv(clean).outline())
    with pytest.raises(ValueError, match='is not about row 0 of MMBench') as e:
        imported(adapter, clean, tmp_path / 'run')
    assert said in str(e.value)
    assert not [p for p in tmp_path.iterdir() if p.name != file.name and p.suffix != '.lock']


def test_cells_that_pandas_changed_fit(clean, tmp_path):
    """An option 3 that is 3.0 now, another case, spaces, and an empty cell."""
    data = predictions(clean)
    data['B'] = [f'{x}.0' if x == '3' else str(x).upper() for x in data['B']]
    data = changed(
        data.assign(index=data['index'].astype(float)), question='  '.join(data.question[0].split())
    )
    file = written(data, tmp_path / 'm_MMBench.csv')
    adapter = read_vlmevalkit([file], read_tsv(clean).outline())
    assert len(imported(adapter, clean, tmp_path / 'run')[0]) == 10 and not adapter.unanswered


FILES = {
    'm_MMBench.pkl': (b'\x80\x04N.', 'can run code'),
    'm_MMBench.txt': (b'A', 'no file of a kit'),
    'm_MMBench.json': (b'{"0": "A"}', 'not a list of records'),
    'm_MMBench.jsonl': (b'{"index": 0, "prediction": "A"}\n{"index":', 'cannot be read'),
    'n_MMBench.json': (b'[' * 100_000, 'cannot be read'),
    'o_MMBench.json': (b'[1]', 'record 1 is a int'),
    'p_MMBench.json': (b'[{"index": 0, "prediction": {"a": 1}}]', 'is a dict, not a text'),
    'm_MMBench.tsv': (b'index\tprediction\n0\tA\tB\n', 'line 2 has 3 fields under 2 columns'),
    'n_MMBench.tsv': (b'index\tprediction\n0\t\xff\n', 'cannot be read'),
    'o_MMBench.tsv': (b'index\tprediction\n0\t"A\n1\tB\n', 'cannot be read'),
    'p_MMBench.tsv': (b'', 'has no rows'),
}


@pytest.mark.parametrize('name', FILES)
def test_files_that_cannot_be_read(clean, tmp_path, name):
    """One sentence that names the file."""
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as e:
        read_vlmevalkit([tmp_path / name], read_tsv(clean).outline())
    assert said in str(e.value) and name in str(e.value)


def test_a_spreadsheet_that_is_none(clean, tmp_path):
    """A file with another content, and one that was cut."""
    pytest.importorskip('openpyxl')
    file = written(predictions(clean), tmp_path / 'm_MMBench.xlsx')
    whole = file.read_bytes()
    for content in (b'index\tprediction\n', whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match='m_MMBench.xlsx cannot be read'):
            read_vlmevalkit([file], read_tsv(clean).outline())


def test_spreadsheets(clean, tmp_path):
    """Formulas, escaped characters, numbers for texts, a reply that fills its cell."""
    pytest.importorskip('openpyxl')
    data = predictions(clean).set_index('index').astype(object)
    data.loc[0, 'prediction'] = '=SUM(1;2)'
    data.loc[1, 'prediction'] = 'A_x000D_\nB'
    data.loc[2, 'prediction'] = 3.0
    data.loc[3, 'prediction'] = 'A' * CELL_LIMIT
    file = written(data.reset_index(), tmp_path / 'm_MMBench.xlsx')
    adapter = read_vlmevalkit([file], read_tsv(clean).outline())
    frame = imported(adapter, clean, tmp_path / 'run')[0].set_index('index')
    assert frame.reply['0'] == '=SUM(1;2)' and frame.reply['1'] == 'A\r\nB'
    assert frame.reply['2'] == '3' and len(frame.reply['3']) == CELL_LIMIT
    assert json.loads(frame.detail['3'])['finish'] == 'length'
    assert json.loads(frame.detail['0'])['finish'] is None


def test_a_missing_package_is_named(clean, tmp_path, monkeypatch):
    """Without openpyxl a spreadsheet is refused with what helps; tables need nothing."""
    monkeypatch.setitem(sys.modules, 'openpyxl', None)
    (tmp_path / 'm_MMBench.xlsx').write_bytes(b'')
    with pytest.raises(ValueError, match=r'clear-nb\[kits\].*PRED_FORMAT=tsv'):
        read_vlmevalkit([tmp_path / 'm_MMBench.xlsx'], read_tsv(clean).outline())
    file = written(predictions(clean), tmp_path / 'm_MMBench.tsv')
    assert not read_vlmevalkit([file], read_tsv(clean).outline()).unanswered


def test_the_name_of_a_file_decides_its_rows(built, clean, tmp_path):
    """The questions of a severity are those of the clean file: a wrong name is never guessed."""
    outline = [*read_tsv(clean).outline(), *read_outline(built)]
    assert sorted(row_sets(outline)) == [
        'MMBench',
        'MMBench_LOW_LEVEL_HIGH',
        'MMBench_LOW_LEVEL_LOW',
    ]
    data = predictions(clean)
    low = written(data, tmp_path / 'm_MMBench_LOW_LEVEL_LOW.tsv')
    found = read_vlmevalkit([low], outline)
    assert {k[3] for k in found.replies} == {'low'} and len(found.replies) == 10
    for stem in ('m_MMBench_LOW_LEVEL_MID', 'm_MMBench_graffiti', 'm_MMBench_V11', 'other'):
        with pytest.raises(ValueError, match='does not say which rows'):
            read_vlmevalkit([written(data, tmp_path / f'{stem}.tsv')], outline)
    said = read_vlmevalkit([f'MMBench={tmp_path / "other.tsv"}'], outline, name='m')
    assert {k[3] for k in said.replies} == {'clean'}


def test_several_files(built, clean, tmp_path):
    """Two sets of one model; two models, one set twice, and no model are refused."""
    outline, data = [*read_tsv(clean).outline(), *read_outline(built)], predictions(clean)
    low = written(data, tmp_path / 'm_MMBench_LOW_LEVEL_LOW.tsv')
    both = [written(data, tmp_path / 'm_MMBench.tsv'), low]
    assert len(read_vlmevalkit(both, outline).replies) == 20
    other = written(data, tmp_path / 'n_MMBench.tsv')
    for files, said in (
        ([low, other], 'files of several models'),
        ([*both, other], 'both about MMBench'),
        ([written(data, tmp_path / 'MMBench.tsv')], 'names no model'),
    ):
        with pytest.raises(ValueError, match=said):
            read_vlmevalkit(files, outline)
    with pytest.raises(FileNotFoundError, match='no file at'):
        read_vlmevalkit([tmp_path / 'z_MMBench.tsv'], outline)


def test_an_import_needs_a_new_folder(clean, tmp_path):
    """A second import into the same folder is refused, and the first one stays."""
    file = written(predictions(clean), tmp_path / 'm_MMBench.tsv')
    adapter = read_vlmevalkit([file], read_tsv(clean).outline())
    imported(adapter, clean, tmp_path / 'run')
    before = sorted(p.name for p in (tmp_path / 'run').iterdir())
    with pytest.raises(ValueError, match='needs a new folder'):
        imported(adapter, clean, tmp_path / 'run')
    assert sorted(p.name for p in (tmp_path / 'run').iterdir()) == before


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs'])), min_size=1, max_size=5))
def test_any_text_comes_through_a_table(tmp_path_factory, texts):
    """Whatever a model wrote: the same text, as TSV and as JSON, or a pending row when empty."""
    folder = tmp_path_factory.mktemp('t')
    outline = [BenchmarkRow('b', str(k), 'q', 'a') for k in range(len(texts))]
    data = pd.DataFrame(dict(index=range(len(texts)), prediction=texts, question='q'))
    for suffix in ('.tsv', '.json', '.jsonl'):
        path = folder / f'm_b{suffix}'
        if suffix == '.jsonl':
            lines = [json.dumps(r, ensure_ascii=False) for r in data.to_dict('records')]
            path.write_bytes('\n'.join(lines).encode())
        else:
            written(data, path)
        adapter = read_vlmevalkit([path], outline)
        assert [r.text for r in adapter.replies.values()] == texts, suffix
        assert len(adapter.unanswered) == sum(not t.strip() for t in texts)


def test_half_characters(tmp_path):
    """A lone surrogate, which no file can hold, becomes a question mark; the run is whole."""
    rows = [BenchmarkRow('b', '0', 'q', 'yes', picture(), group='0')]
    (tmp_path / 'm_b.json').write_text('[{"index": 0, "prediction": "yes \\ud83d"}]')
    adapter = read_vlmevalkit([tmp_path / 'm_b.json'], rows)
    assert adapter(rows)[0].text == 'yes ?'
    assert adapter.remarks == ['m_b.json has no questions: its rows are joined by index alone.']


def test_a_thought_apart(tmp_path):
    """With SPLIT_THINK the thought stands in a column of its own; it is kept beside the reply."""
    rows = [BenchmarkRow('b', '0', 'q', 'yes', picture(), group='0')]
    record = dict(index=0, question='q', prediction='yes', thinking='I see it.')
    (tmp_path / 'm_b.json').write_text(json.dumps([record]))
    [reply] = read_vlmevalkit([tmp_path / 'm_b.json'], rows)(rows)
    assert reply.text == 'yes' and json.loads(reply.detail)['thinking'] == 'I see it.'


# lmms-eval


def samples(rows, **changes):
    """Logged samples of the present version: place, prompt, target, reply."""
    return [
        dict(
            doc_id=n,
            target=row.answer,
            input=f'{row.hint}\n{row.question}\n{row.options}\nAnswer with the letter.',
            filtered_resps=[says(row)],
            doc_hash='0',
        )
        | changes
        for n, row in enumerate(rows)
    ]


def logged(folder, records, task='mmbench', model='Qwen__Qwen2-VL'):
    """Write a log."""
    (folder / model).mkdir(exist_ok=True)
    path = folder / model / f'20260101_000000_samples_{task}.jsonl'
    path.write_text(
        ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records), encoding='utf-8'
    )
    return path


def test_logged_samples_equal_predictions(clean, tmp_path):
    """The same replies in both kits' files give the same results."""
    file = written(predictions(clean), tmp_path / 'm_MMBench.tsv')
    outline = read_tsv(clean).outline()
    kit, _ = imported(read_vlmevalkit([file], outline), clean, tmp_path / 'kit')
    log = logged(tmp_path, samples(questions()))
    adapter = read_lmms_eval([log], outline)
    frame, run = imported(adapter, clean, tmp_path / 'run')
    assert frame.drop(columns=['model', 'detail', 'seconds']).equals(
        kit.drop(columns=['model', 'detail', 'seconds'])
    )
    assert adapter.name == run['name'] == 'Qwen__Qwen2-VL' and not adapter.unanswered


def test_a_part_of_the_samples(clean, tmp_path):
    """`--limit 4`: the other rows are pending."""
    log = logged(tmp_path, samples(questions())[:4])
    adapter = read_lmms_eval([log], read_tsv(clean).outline())
    assert len(adapter.unanswered) == 6 and len(adapter.replies) == 4


def test_older_logs_name_their_rows(clean, tmp_path):
    """A log with `doc` is joined by its index, in any order; `resps` is what the model wrote."""
    records = [
        dict(
            doc_id=99 - n,
            doc=dict(index=float(row.index), question=row.question, **row.options),
            target=row.answer,
            resps=[[says(row)]],
            filtered_resps=['[invalid]'],
        )
        for n, row in enumerate(reversed(list(questions())))
    ]
    adapter = read_lmms_eval([logged(tmp_path, records)], read_tsv(clean).outline())
    frame, _ = imported(adapter, clean, tmp_path / 'run')
    rows = {r.index: r for r in questions()}
    assert all(reply == says(rows[i]) for i, reply in zip(frame['index'], frame.reply))


def test_one_sample_for_each_filter(clean, tmp_path):
    """The same reply twice is one reply; two replies are refused."""
    records, outline = samples(questions()), read_tsv(clean).outline()
    twice = [r for r in records for _ in range(2)]
    assert len(read_lmms_eval([logged(tmp_path, twice)], outline).replies) == 10
    twice[1] = twice[1] | dict(filtered_resps=['another'])
    with pytest.raises(ValueError, match='index 0 has two replies'):
        read_lmms_eval([logged(tmp_path, twice)], outline)


LOGS = {
    'several responses': (dict(filtered_resps=['A', 'B']), 'holds 2 responses'),
    'log-likelihoods': (dict(resps=[[['-1.5', 'False'], ['-0.5', 'True']]]), 'holds 2 responses'),
    'no text': (dict(filtered_resps=[1.5]), 'holds 1.5 where the reply should be'),
    'no responses': (dict(filtered_resps=[]), 'holds 0 responses'),
    'no prompt': (dict(input=''), 'no prompt that proves it'),
    'a prompt of parts': (dict(input=[dict(role='user')]), 'no prompt that proves it'),
    'a place beyond': (dict(doc_id=10), r'does not hold: index \(doc_id 10\)'),
    'a place of words': (dict(doc_id='zero'), r'index \(doc_id zero\)'),
}


@pytest.mark.parametrize('name', LOGS)
def test_logs_that_are_refused(clean, tmp_path, name):
    """One sentence each."""
    change, said = LOGS[name]
    log = logged(tmp_path, [samples(questions())[0] | change])
    with pytest.raises(ValueError, match=said):
        read_lmms_eval([log], read_tsv(clean).outline())


@pytest.mark.parametrize('change', ['moved', 'rolled'])
def test_a_sample_at_another_place_is_refused(clean, tmp_path, change):
    """The prompt holds another question; or the same question with its options rolled, which
    only the right answer tells.
    """
    records = samples(questions())
    step = 2 if change == 'moved' else 1
    records = [r | dict(doc_id=(r['doc_id'] + step) % 10) for r in records]
    adapter = read_lmms_eval([logged(tmp_path, records)], read_tsv(clean).outline())
    with pytest.raises(ValueError, match='is not about row'):
        imported(adapter, clean, tmp_path / 'run')


def test_a_task_of_another_name(clean, tmp_path):
    """The set is said when the name of the task is not that of the file."""
    log = logged(tmp_path, samples(questions()), task='mmbench_en_dev')
    outline = read_tsv(clean).outline()
    with pytest.raises(ValueError, match='write for example MMBench='):
        read_lmms_eval([log], outline)
    assert not read_lmms_eval([f'MMBench={log}'], outline).unanswered


# the command


def run_cli(*args):
    """Run `clear-nb` in this process; its status and what it wrote to standard error."""
    from contextlib import redirect_stderr, redirect_stdout

    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
        status = cli.main([*map(str, args)])
    return status, err.getvalue()


def test_import_and_compare(built, clean, tmp_path):
    """A model that was run in a kit, clean and corrupted: intervals, drops, and a comparison with
    a run of ours.
    """
    low = written(predictions(clean), tmp_path / 'm_MMBench_LOW_LEVEL_LOW.tsv')
    right = predictions(clean, lambda row: row.answer)
    files = [written(right, tmp_path / 'm_MMBench.tsv'), low]
    files.append(written(predictions(clean), tmp_path / 'm_MMBench_LOW_LEVEL_HIGH.tsv'))
    data = ['--data', clean, built]
    ask = ['import', '--from', 'vlmevalkit', *files, *data, '--out', tmp_path / 'kit']
    status, said = run_cli(*ask)
    assert status == 0, said
    drop = pd.read_csv(tmp_path / 'kit' / 'bench_drop.csv')
    assert (drop['drop'] > 0).all() and (drop.low <= drop['drop']).all()
    own = ['bench', '--model', 'python:bench_rows:silly', *data, '--out', tmp_path / 'own']
    run_cli(*own)
    status, said = run_cli(
        'compare', tmp_path / 'kit', tmp_path / 'own', '--out', tmp_path / 'both'
    )
    assert status == 0, said
    difference = pd.read_csv(tmp_path / 'both' / 'bench_difference.csv')
    assert (difference.models == 'm − python:bench_rows:silly').all() or len(difference)


def test_the_status_of_an_import(built, clean, tmp_path):
    """1 with the pending rows named, 2 with a sentence; nothing is written for the latter."""
    file = written(predictions(clean)[:-1], tmp_path / 'm_MMBench.tsv')
    ask = ['import', '--from', 'vlmevalkit', file, '--data', clean, '--out']
    status, said = run_cli(*ask, tmp_path / 'run')
    assert status == 1 and '1 rows have no reply in the files: MMBench' in said
    assert 'import into another folder' in said
    status, said = run_cli(*ask, tmp_path / 'run')
    assert status == 2 and 'needs a new folder' in said
    file = written(changed(predictions(clean), index=77), file)
    status, said = run_cli(*ask, tmp_path / 'other')
    assert status == 2 and 'index 77' in said and not (tmp_path / 'other').exists()
    status, said = run_cli(*ask[:3], tmp_path / 'nowhere.tsv', '--data', clean, '--out', tmp_path)
    assert status == 2 and 'nowhere.tsv' in said
