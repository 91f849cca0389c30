"""A judge with settings of its own, judges whose replies cannot be read, questions whose rolls are
missing, and the kit's reading of a judge: the value is right, or its absence is loud.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import bench_rows
import pandas as pd
import pytest
from fake_server import FakeServer, Raw, Status, hasty  # noqa: F401
from test_rows_hard import CASES

from clear_nb import scoring
from clear_nb.adapters import CallableAdapter, ServerAdapter
from clear_nb.bench import incomplete_questions, left_out, read_results
from clear_nb.cli import main
from clear_nb.evaluate import run_rows
from clear_nb.judge import LLMJudge, judge_fields, open_judge, read_letter
from clear_nb.reward import AnswerScore, Outage, Unparsable
from clear_nb.rows import BenchmarkRow
from clear_nb.server import Refused

PETS = dict(A='cat', B='dog', C='fox', D='hen')
VET = BenchmarkRow('MM-Vet', '0', 'What is parked here?', 'van <AND> blue', b'', {}, '0')
ANIMAL = BenchmarkRow('MMStar', '1', 'Which animal?', 'B', b'', PETS, '1')
THINKS = json.loads((CASES / 'bench' / 'H06_judge' / 'judge_replies.json').read_text())


@pytest.fixture(autouse=True)
def key(monkeypatch, hasty):  # noqa: F811
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-of-the-judge')


@pytest.fixture
def run(tmp_path):
    """A finished run about an MM-Vet file of three equal rows, which only a judge can grade."""

    file = CASES / 'bench' / 'H06_judge' / 'MM-Vet.tsv'
    model = 'python:bench_rows:silly'
    assert main(['bench', '--model', model, '--data', str(file), '--out', str(tmp_path / 'r')]) == 1
    return tmp_path / 'r'


def judged(run, server, *more):  # exit status
    out = ['--out', str(run.parent / 'report'), '--judge', f'm@{server.url}']
    return main(['compare', str(run), *out, *more])


# ------------------------------------------------------- settings of the judge (H06)


def test_settings_reach_the_request(run, capsys):
    """`--judge-set` changes, adds and removes fields of the requests."""
    with FakeServer(default='0.5') as server:
        more = ['max_tokens=null', 'max_completion_tokens=2048', 'temperature=1', 'tries=2']
        assert judged(run, server, '--judge-set', *more) == 0
        (asked,) = server.requests
    fields = {k: v for k, v in asked.body.items() if k not in ('messages', 'model')}
    assert fields == dict(max_completion_tokens=2048, temperature=1)
    scores = pd.read_csv(run.parent / 'report' / 'bench.csv')
    assert scores.accuracy.tolist() == [50.0] * 2  # and the average


@pytest.mark.parametrize(
    'given, sentence',
    [
        ('tries=0', 'tries must be at least 1'),
        ('timeout=-1', 'timeout must be more than 0'),
        ('rpm=0', 'rpm must be more than 0'),
        ('task=long', "task must be 'open' or 'short'"),
        ('timout=5', "did you mean 'timeout'"),
        ('max_token=5', "did you mean 'max_tokens'"),
        ('api_key=sk-of-the-judge', 'environment variable OPENAI_API_KEY'),
        ('extra_headers.Authorization=x', 'environment variable OPENAI_API_KEY'),
        ('tries', 'write NAME=VALUE'),
    ],
)
def test_settings_that_cannot_work(run, capsys, given, sentence):
    """One sentence, exit status 2, no request, and the key is not shown."""
    with FakeServer(default='0.5') as server:
        assert judged(run, server, '--judge-set', given) == 2
        assert server.requests == []
    said = capsys.readouterr().err.splitlines()[-1]
    assert sentence in said and 'sk-of-the-judge' not in said


def test_settings_without_a_judge(run, capsys):
    """Settings of a judge that nobody named are refused."""
    command = ['compare', str(run), '--out', str(run.parent / 'report')]
    assert main([*command, '--judge-set', 'tries=2']) == 2
    assert 'add --judge MODEL@URL' in capsys.readouterr().err


# ------------------------------------------------------- replies that cannot be read (H06)


def test_judge_that_is_cut_in_its_thought(run, capsys):
    """The row has no value, a line says so and how to mend it, the status is 1, nothing is kept."""
    body = json.dumps(dict(THINKS['reasoning_cut'], model='m'))
    with FakeServer(default=Raw(body)) as server:
        assert judged(run, server) == 1
        err = capsys.readouterr().err
        assert '3 replies of the judge could not be read' in err
        assert 'cut at its limit of tokens' in err and '--judge-set max_tokens=2048' in err
        assert not (run / 'judge.jsonl').exists()
        (frame, _) = read_results(run, LLMJudge('m', server.url))
    assert frame.kind.tolist() == ['unparsable'] * 3 and frame.value.isna().all()
    with FakeServer(default='<think>Both parts are there.</think>1.0') as server:
        assert judged(run, server, '--judge-set', 'max_tokens=2048') == 0
    assert 'could not be read' not in capsys.readouterr().err


def test_judge_without_words(run, capsys):
    """A hidden thought that used all tokens: the cause is in the line."""
    message = dict(role='assistant', content=None, reasoning_content='Let me see')
    body = json.dumps(dict(choices=[dict(index=0, finish_reason='stop', message=message)]))
    with FakeServer(default=Raw(body)) as server:
        assert judged(run, server) == 1
    assert 'a hidden thought of 10 characters came before' in capsys.readouterr().err


def test_judge_that_says_something_else(run, capsys):
    """A whole reply that is no mark is kept, is no zero, and is told."""
    with FakeServer(default='It is quite good.') as server:
        assert judged(run, server) == 1
        assert judged(run, server) == 1 and len(server.requests) == 1
    assert "no score in [0, 1]: 'It is quite good.'" in capsys.readouterr().err


# ------------------------------------------------------- fields that a server refuses (H06)

UNSUPPORTED = THINKS['new_openai_status_400']


def test_refused_field_ends_the_judging(run, capsys):
    """One request, one sentence that names the field, exit status 2; the mended command goes on."""
    with FakeServer(default=Status(400, UNSUPPORTED)) as server:
        assert judged(run, server) == 2
        assert len(server.requests) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert 'takes no request with the field max_tokens' in said and 'max_tokens=null' in said
    with FakeServer(default='1.0') as server:
        more = ['--judge-set', 'max_tokens=null', 'max_completion_tokens=64']
        assert judged(run, server, *more) == 0


def test_refused_field_ends_a_run():
    """The sibling: a model's server; four rows, and none of them is asked for ever."""
    rows = bench_rows.rows(2, severities=('clean', 'hard'))
    with FakeServer(default=Status(400, "Unknown parameter: 'temperature'")) as server:
        adapter = ServerAdapter('m', server.url, tries=2, workers=1)
        with pytest.raises(Refused, match='with the field temperature'):
            adapter(rows)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    'message',
    [
        "'max_tokens' is too large: 512. The maximum context length is 2048 tokens",
        'The picture is not supported.',  # no field of the request
        'content policy violation',
    ],
)
def test_one_declined_question_is_no_refusal(message):
    """A message about one question leaves the others alone."""
    replies = iter([Status(400, message), '1'])
    with FakeServer(default=lambda request: next(replies)) as server:
        judge = LLMJudge('m', server.url, tries=1)
        assert isinstance(judge(VET, 'a van'), Outage) and judge(VET, 'blue') == AnswerScore(1.0)


def test_refused_field_after_replies_is_an_outage():
    """A server that took the same fields before does not end the run."""
    replies = iter(['1', Status(400, UNSUPPORTED)])
    with FakeServer(default=lambda request: next(replies)) as server:
        judge = LLMJudge('m', server.url, tries=1)
        assert judge(VET, 'a van') == AnswerScore(1.0)
        assert isinstance(judge(VET, 'blue'), Outage)


def test_fields_of_a_judge():
    """Every setting of the class has its place; the rest are fields of a request."""
    fields = judge_fields(task='short', rpm=30, seed=3, temperature=None)
    assert fields.pop('request') == dict(max_tokens=16, seed=3)
    judge = open_judge('m@http://localhost:9/v1', Path('r.jsonl'), dict(seed=3))
    assert fields['rpm'] == 30 and {*fields} < {*vars(judge)} and judge.request['seed'] == 3


# ------------------------------------------------------- the kit's reading (H18)

LETTERS = {  # reply of a judge: as we read it, as the kit reads it
    'B': ('B', 'B'),
    'B.': ('B', 'B'),
    'Answer: B': ('B', 'B'),
    'B. dog': ('B', 'B'),
    'The dog': (None, 'B'),
    'Your output: B': (None, 'B'),
    'I would say B, clearly': (None, 'B'),
    'Z': ('Z', 'Z'),
    'A or B': (None, None),
    'neither': (None, None),
}
MARKS = {
    '0.5': (0.5, 0.5),
    ' 1\n': (1, 1),
    '1.': (1, 1),
    'Score: 0.5': (0.5, None),
    '5e-1': (None, 0.5),
    '+0.5': (None, 0.5),
    '0.5.': (0.5, None),
    'nan': (None, None),
    'inf': (None, None),
    '-0.0': (None, 0.0),
    '7': (None, None),
}


def readings(reply, task, question):
    """Read one reply of a judge as we do and as the kit does; None for one that cannot be read."""
    with FakeServer(default=reply) as server:
        judge = LLMJudge('m', server.url)
        found = [getattr(j, task)(question, 'some puppy') for j in (judge, judge.as_kit())]
        assert len(server.requests) == 1  # both read the same reply
    return tuple(None if isinstance(f, Unparsable) else getattr(f, 'value', f) for f in found)


@pytest.mark.parametrize('reply', LETTERS)
def test_letters_of_the_kit(reply):
    assert readings(reply, 'option', ANIMAL) == LETTERS[reply]


@pytest.mark.parametrize('reply', MARKS)
def test_marks_of_the_kit(reply):
    assert readings(reply, 'open', VET) == MARKS[reply]


@pytest.mark.parametrize('compat, value', [(None, math.nan), ('vlmevalkit', 1.0)])
def test_compat_chooses_the_reading(compat, value):
    """`score_rows` takes the kit's reading under its rules only; a reply that the kit cannot read
    is worth 0 there, and unknown here.
    """
    with FakeServer(default='Your output: B') as server:
        judge = LLMJudge('m', server.url)
        rows = scoring.score_rows([ANIMAL], ['some puppy'], judge, compat=compat, progress=False)
    assert rows.value[0] == value or math.isnan(value) and math.isnan(rows.value[0])
    with FakeServer(default='no idea') as server:
        judge = LLMJudge('m', server.url)
        rows = scoring.score_rows([ANIMAL], ['some puppy'], judge, compat=compat, progress=False)
    assert rows.kind[0] == 'unparsable'
    assert rows.value[0] == 0 if compat else math.isnan(rows.value[0])


@pytest.mark.parametrize('letter', 'ABCD')
def test_no_letter_is_better_off_with_a_judge(letter):
    """The judge's reading treats every letter alike, also in front of its text."""
    assert read_letter(letter, PETS) == read_letter(f'({letter.lower()})', PETS) == letter
    assert read_letter(f'{letter}. {PETS[letter]}', PETS) == letter
    wrong = PETS['B' if letter == 'A' else 'A']
    assert isinstance(read_letter(f'{letter}. {wrong}', PETS), Unparsable)


# ------------------------------------------------------- missing rolls (H07)


def rolled(indices, severity='clean', benchmark='MMBench'):
    row = replace(bench_rows.rows(1)[0], benchmark=benchmark, severity=severity, corruption='')
    return [replace(row, index=str(k), group='', options=PETS, answer='B') for k in indices]


def asked(rows, out, reply='B'):
    run_rows(CallableAdapter(lambda picture, prompt: reply, 'm'), rows, out, progress=False)
    return read_results(out)


WHOLE = [3, 1000003, 2000003, 3000003]


def test_missing_roll_is_named(tmp_path):
    """A question with three of its four rolls has no score, and the report lists it."""
    frame, run = asked(rolled(WHOLE + [4, 1000004, 3000004]), tmp_path / 'r')
    (line,) = incomplete_questions(frame).to_dict('records')
    assert (line['index'], line['reason']) == ('4', '1 of 4 rolls missing')
    listed = left_out(frame, run)
    assert listed[['kind', 'index']].values.tolist() == [['incomplete', '4']]
    units = scoring.score_units(frame)
    assert units.set_index('unit').value.to_dict()['3'] == 1.0
    assert math.isnan(units.set_index('unit').value['4'])


def test_missing_roll_of_a_wrong_question_is_a_zero(tmp_path):
    """A roll that is wrong decides; the missing ones could not change it."""
    frame, _ = asked(rolled(WHOLE + [4, 1000004]), tmp_path / 'r', reply='A')
    assert scoring.score_units(frame).value.tolist() == [0.0, 0.0]
    assert incomplete_questions(frame).empty


def test_file_without_rolls_is_scored_row_by_row(tmp_path):
    """A finished benchmark of that name without a single roll is plain multiple choice."""
    frame, run = asked(rolled(range(5)), tmp_path / 'r')
    assert set(frame.protocol) == {'choice'} and frame.value.tolist() == [1.0] * 5
    assert left_out(frame, run).empty
    frame, _ = read_results(tmp_path / 'r', protocol='circular')
    assert len(incomplete_questions(frame)) == 5
    two = rolled(range(5)) + rolled(range(5), 'hard')  # versions of a question are no rolls
    frame, _ = asked(two, tmp_path / 'two')
    assert set(frame.protocol) == {'choice'}


def test_the_command_tells_of_missing_rolls(tmp_path, capsys, monkeypatch):
    """A line, status 1, and the advice works."""
    run = tmp_path / 'r'
    asked(rolled(WHOLE + [4, 1000004, 3000004]), run)
    command = ['compare', str(run), '--out', str(tmp_path / 'report')]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert '1 questions lack rolls and have no score' in err and '--protocol choice' in err
    assert '1 of 4 rolls missing' in err
    page = (tmp_path / 'report' / 'bench.md').read_text()
    assert '1 questions lack rolls' in page and '1 of 4 rolls missing' in page
    assert json.loads((tmp_path / 'report' / 'bench.json').read_text())['models'][0]['incomplete']
    assert main([*command, '--protocol', 'choice']) == 0
