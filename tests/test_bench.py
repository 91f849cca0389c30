"""A run that is killed, split or half heard gives the same results as one that is not."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny_hf
from bench_rows import guess, picture, rows, silly, slow
from fake_server import FAILURES, FakeServer, Hang, Status, hasty
from PIL import Image, ImageFilter

from clear_nb import bench_files, identity
from clear_nb.adapters import CallableAdapter, ServerAdapter
from clear_nb.bench import accuracy_table, read_results, report_bench
from clear_nb.cli import main
from clear_nb.core import ROOT, rng
from clear_nb.evaluate import finished_state, in_shard, merge_parts, run_rows
from clear_nb.rows import BenchmarkRow, from_scenes
from clear_nb.scenes import benchmark
from clear_nb.scoring import OUTCOME_KINDS
from clear_nb.server import Refused


def results(out):
    return pd.read_parquet(merge_parts(out)).drop(columns='seconds')


@pytest.fixture
def whole(tmp_path):
    return results(run_rows(CallableAdapter(guess), rows(), tmp_path / 'whole', progress=False))


# ---------------------------------------------------------------- complete, once, in every way


def test_results(whole):
    "One row per key, sorted, with the reply of exactly that row."
    assert (
        len(whole) == 24
        and not whole.duplicated(['benchmark', 'index', 'corruption', 'severity']).any()
    )
    for r in whole.itertuples():
        s = BenchmarkRow(**json.loads(r.sample))
        assert s.key == (r.benchmark, r.index, r.corruption, r.severity) and r.reply == guess(
            None, s.question
        )


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_shards(whole, tmp_path, n):
    "Any number of shards gives the same file; rows of a group stay together."
    for i in range(n):
        run_rows(
            CallableAdapter(guess),
            iter(rows()),
            tmp_path / 's',
            batch=4,
            shard=(i, n),
            progress=False,
        )
    assert results(tmp_path / 's').equals(whole)
    assert all(
        len({next(i for i in range(n) if in_shard(s, (i, n))) for s in rows() if s.group == g}) == 1
        for g in '012'
    )


def test_only_this_run_is_finished(tmp_path):
    """What another number of processes, or an earlier run with a limit, left behind finishes
    nothing.
    """

    def run(i, n, **kw):
        return run_rows(
            CallableAdapter(guess), rows(), tmp_path / 'r', shard=(i, n), progress=False, **kw
        )

    def heard():
        return finished_state(tmp_path / 'r')['rows'], len(
            list((tmp_path / 'r').glob('finished-*'))
        )

    run(0, 1, limit=1)
    assert heard() == (8, 1)
    run(0, 2, limit=1)
    assert heard() == (None, 1)
    run(1, 2, limit=1)
    assert heard() == (8, 2)
    run(0, 2)
    assert heard() == (None, 2)  # shard 1 has not begun
    run(1, 2)
    assert heard() == (24, 2)
    (tmp_path / 'r' / 'finished-0-of-1.json').write_text(
        '{"rows": 24}'
    )  # of a folder where nothing was cleared
    assert heard() == (None, 3)
    run(0, 1)
    assert heard() == (24, 1)


def test_batches(whole, tmp_path):
    for k in (1, 7, 100):
        assert results(
            run_rows(CallableAdapter(guess), rows(), tmp_path / str(k), batch=k, progress=False)
        ).equals(whole)


def test_severities_and_limit(tmp_path):
    """A short run holds whole groups at each severity asked for; a later, longer run only asks
    the rest.
    """
    calls = []

    def count(picture, prompt):
        calls.append(prompt)
        return 'A'

    run_rows(
        CallableAdapter(count),
        rows() + rows(benchmark='c'),
        tmp_path / 'r',
        severities=['clean', 'hard'],
        limit=1,
        progress=False,
    )
    assert (
        Counter(zip(*(results(tmp_path / 'r')[k] for k in ('benchmark', 'severity'))))
        == {(b, s): 2 for b in 'bc' for s in ('clean', 'hard')}
        and len(calls) == 8
    )
    run_rows(CallableAdapter(count), rows() + rows(benchmark='c'), tmp_path / 'r', progress=False)
    assert len(calls) == len(results(tmp_path / 'r')) == 48


CHILD = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from bench_rows import guess, rows, slow
from clear_nb.adapters import CallableAdapter
from clear_nb.evaluate import run_rows
run_rows(CallableAdapter({f}), rows(), {out!r}, batch=2, progress=False)
"""


def child(f, out):
    return CHILD.format(root=str(ROOT), tests=str(ROOT / 'tests'), f=f, out=str(out))


def kept_lines(out):
    "Count the lines of replies of a run, while it goes on."
    return sum(f.read_bytes().count(b'\n') for f in out.glob('parts/*.jsonl'))


def test_kill(whole, tmp_path, monkeypatch):
    """kill -9 in the middle of a batch; the run goes on behind the last whole batch and ends
    with the same results.
    """
    out, log = tmp_path / 'killed', tmp_path / 'log'
    monkeypatch.setenv('ASKED', str(log))
    monkeypatch.setenv('PAUSE', '.15')
    first = subprocess.Popen([sys.executable, '-c', child('slow', out)])
    while first.poll() is None and kept_lines(out) < 6:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    kept, asked = len(results(out)), len(log.read_text())
    assert 6 <= kept < 24 and asked <= kept + 2
    with (out / 'parts' / 'replies-0-of-1.jsonl').open('ab') as file:
        file.write(b'{"benchmark": "MMB')  # what a killed write leaves
    monkeypatch.setenv('PAUSE', '0')
    with pytest.warns(UserWarning, match='the last line is half written'):
        run_rows(CallableAdapter(slow), rows(), out, batch=2, progress=False)
    assert len(log.read_text()) - asked == 24 - kept
    assert results(out).equals(whole)


# ---------------------------------------------------------------- outages


def test_outages_are_asked_again(whole, tmp_path):
    "Half the rows fail at first; only they are asked again; none is counted twice."
    calls = Counter()

    def shaky(picture, prompt):
        calls[prompt] += 1
        if calls[prompt] < 3 and '1' in prompt:
            raise TimeoutError('no reply')
        return guess(picture, prompt)

    a = CallableAdapter(shaky)
    run_rows(a, rows(severities=['hard']), tmp_path / 'r', progress=False)
    frame, _ = read_results(tmp_path / 'r')
    assert (frame.kind == 'pending').sum() == 1 and frame.detail[
        frame.kind == 'pending'
    ].tolist() == ['TimeoutError: no reply']
    for _ in range(3):
        run_rows(a, rows(severities=['hard']), tmp_path / 'r', progress=False)
    assert results(tmp_path / 'r').reply.tolist() == whole[
        whole.severity == 'hard'
    ].reply.tolist() and sorted(calls.values()) == [1] * 5 + [3]


def test_server_run(tmp_path, monkeypatch):
    """Against a failing server: 401 stops with the answers so far kept, failures are pending,
    then all are heard; the key is in no file.
    """
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-of-the-bench')

    def right(request):
        return f'{guess(None, request.text)}.'

    with FakeServer([right] * 5, default=Status(401)) as server:

        def run():
            run_rows(
                ServerAdapter('m', server.url, workers=1, tries=2),
                rows(),
                tmp_path / 'r',
                batch=8,
                progress=False,
            )

        with pytest.raises(Refused):
            run()
        assert results(tmp_path / 'r').kind.tolist() == ['answer'] * 5 and len(server.requests) == 6
        server.default = lambda request: Status(400) if len(server.requests) % 2 else right(request)
        run()
        half = results(tmp_path / 'r')
        assert len(half) == 24 and 5 < (half.kind == 'answer').sum() < 24
        server.default, before = right, len(server.requests)
        run()
        assert len(server.requests) - before == (half.kind == 'outage').sum()
    frame, run = read_results(tmp_path / 'r')
    assert len(frame) == run['rows'] == 24 and frame.value.notna().all()
    report_bench(tmp_path / 'r', tmp_path / 'r')
    assert not any(
        b'sk-of-the-bench' in p.read_bytes() for p in (tmp_path / 'r').rglob('*') if p.is_file()
    )


# ---------------------------------------------------------------- refusals


def test_another_run(tmp_path):
    "Settings, content, rows or keys that do not fit are refused, and the folder stays as it was."

    def run(**kw):
        return run_rows(
            **{
                **dict(
                    adapter=CallableAdapter(guess),
                    rows=rows(),
                    folder=tmp_path / 'r',
                    content='c1',
                    progress=False,
                ),
                **kw,
            }
        )

    run()
    before = results(tmp_path / 'r')
    for match, kw in {
        'instruction': dict(adapter=CallableAdapter(guess, instruction='x')),
        'name': dict(adapter=CallableAdapter(guess, name='x')),
        "'c1' there, 'c2' here": dict(content='c2'),
        'has changed': dict(rows=[replace(s, image=picture(7)) for s in rows()]),
        'two rows have the key': dict(rows=rows() + rows()),
        'shard': dict(shard=(-1, 2)),
    }.items():
        with pytest.raises(ValueError, match=match):
            run(**kw)
    assert results(tmp_path / 'r').equals(before)


def test_changed_code(data, tmp_path, monkeypatch, capsys):
    "Replies given before a change of code are refused by module, and kept when the user says so."
    source, changed = identity.module_source, []

    def change(m):
        return source(m) + '\nadded = 1' if m in changed else source(m)

    monkeypatch.setattr(identity, 'module_source', change)
    assert main(command(data, tmp_path)) == 0
    changed.append('scoring')  # decides no reply
    assert main(command(data, tmp_path)) == 0
    changed.append('wording')
    assert main(command(data, tmp_path)) == 2
    said = capsys.readouterr().err
    assert 'before a change (other code in wording)' in said and '--accept-code' in said
    before = results(tmp_path / 'run')
    for _ in range(2):
        assert main(command(data, tmp_path, '--accept-code')) == 0
    note = json.loads((tmp_path / 'run' / 'run.json').read_text(encoding='utf-8'))
    assert [c['found'] for c in note['code_changes']] == [['other code in wording']]
    assert main(command(data, tmp_path)) == 0 and results(tmp_path / 'run').equals(before)


def test_run_without_identity(tmp_path):
    "A run of an earlier version holds no identity: its replies are kept when the user says so."

    def run(**kw):
        return run_rows(CallableAdapter(guess), rows(), tmp_path / 'r', progress=False, **kw)

    note = json.loads((run() / 'run.json').read_text(encoding='utf-8'))
    del note['made_from']
    (tmp_path / 'r' / 'run.json').write_text(json.dumps(note), encoding='utf-8')
    with pytest.raises(ValueError, match='its identity is unknown'):
        run()
    run(accept_code=True)
    run()


def test_few_files(whole, tmp_path):
    "With a batch of one, as with any other, a process leaves one file, and the same results."
    run_rows(CallableAdapter(guess), rows(), tmp_path / 'r', batch=1, progress=False)
    assert [f.name for f in (tmp_path / 'r' / 'parts').iterdir()] == ['replies-0-of-1.jsonl']
    assert results(tmp_path / 'r').equals(whole)


def test_miscounted_replies(tmp_path):
    "An adapter that loses a reply is stopped before anything is written under the wrong key."

    class Lossy(CallableAdapter):
        def __call__(self, samples):
            return super().__call__(samples)[1:]

    with pytest.raises(ValueError, match='gave 15 replies to 16 rows'):
        run_rows(Lossy(guess), rows(), tmp_path / 'r', progress=False)
    assert len(results(tmp_path / 'r')) == 0


# ---------------------------------------------------------------- the report


def test_report_counts(tmp_path):
    "Every outcome is counted where it belongs, and accuracy is over the rows that were heard."
    says = {'0': 'A', '1': 'A', '2': "I can't process this file.", '3': 'hm', '4': None}

    def f(picture, prompt):
        return says.get(prompt.split('Is it ')[1][0], 'yes')

    run_rows(
        CallableAdapter(f), rows(severities=['hard']), tmp_path / 'r', progress=False, content='h'
    )
    table = report_bench(tmp_path / 'r', tmp_path / 'report')['accuracy']
    line = table[table.benchmark == 'b'].iloc[0]
    assert (
        [line[o] for o in OUTCOME_KINDS] == [2, 1, 1, 1, 1]
        and line.accuracy.mean == pytest.approx(100 * 2 / 5)
        and line.accuracy.n == 5
        and line.rows == 6
    )
    note = json.loads((tmp_path / 'report' / 'bench.json').read_text())
    assert (
        note['models'][0]['content'] == 'h'
        and note['models'][0]['pending'] == 1
        and note['models'][0]['complete'] is False
        and 'UNFINISHED: f: 6 replies of 6 rows, 1 pending' in note['caption']
    )
    wide = pd.read_csv(tmp_path / 'report' / 'bench.csv')
    assert (
        wide.accuracy.tolist() == [40, 40]
        and wide.pending.tolist() == [1, 1]
        and (wide.low <= wide.accuracy).all()
    )


def test_unheard_is_unknown(tmp_path):
    "A model that was never heard has no accuracy, not 0."

    def silent(picture, prompt):
        raise OSError('off')

    run_rows(CallableAdapter(silent), rows(), tmp_path / 'r', progress=False)
    table = report_bench(tmp_path / 'r', tmp_path / 'r')['accuracy']
    assert (
        table.accuracy.map(lambda e: np.isnan(e.mean)).all()
        and 'unknown' in (tmp_path / 'r' / 'bench.md').read_text()
        and '| 0.0' not in (tmp_path / 'r' / 'bench.md').read_text()
    )


def test_several_models(tmp_path):
    """Models stand one above the other; averages are over benchmarks, not rows; other
    benchmarks are refused.
    """
    data = rows(6) + rows(2, benchmark='c')

    def never(picture, prompt):
        return 'hm'

    a = run_rows(CallableAdapter(guess), data, tmp_path / 'a', progress=False, content='x')
    b = run_rows(CallableAdapter(never), data, tmp_path / 'b', progress=False, content='x')
    table = (
        report_bench([a, b], tmp_path / 'o')['accuracy']
        .set_index(['model', 'benchmark', 'severity'])
        .accuracy.map(lambda e: e.mean)
    )
    assert (
        table['guess', 'AVG', 'low']
        == pytest.approx((table['guess', 'b', 'low'] + table['guess', 'c', 'low']) / 2)
        and table['never', 'AVG', 'hard'] == 0
    )
    assert (
        table['guess', 'b', 'low'] == pytest.approx(100 * 5 / 6)
        and table['guess', 'c', 'low'] == 100
    )
    c = run_rows(CallableAdapter(never), data, tmp_path / 'c', progress=False, content='y')
    with pytest.raises(ValueError, match='different benchmarks'):
        report_bench([a, c], tmp_path / 'o')
    with pytest.raises(FileNotFoundError, match='holds no run'):
        report_bench(tmp_path / 'nothing', tmp_path / 'o')


def test_same_run_same_files(tmp_path):
    "Report files of the same replies are the same to the byte, the seconds of the summary aside."
    for k in 'ab':
        report_bench(
            run_rows(CallableAdapter(guess), rows(), tmp_path / k, progress=False), tmp_path / k
        )
    for suffix in ('csv', 'md', 'svg', 'png'):
        assert (tmp_path / 'a' / f'bench.{suffix}').read_bytes() == (
            tmp_path / 'b' / f'bench.{suffix}'
        ).read_bytes()


def test_intervals_cover():
    "The 95 % interval of a line holds the true rate about as often as it says."
    hits = 0
    for k in range(40):
        value = (rng('cover', k).random(120) < 0.6).astype(float)
        frame = pd.DataFrame(
            dict(
                model='m',
                benchmark=f'b{k}',
                severity='hard',
                group=range(120),
                value=value,
                kind=np.where(value, 'right', 'wrong'),
            )
        )
        e = accuracy_table(frame).accuracy[0]
        hits += e.low <= 60 <= e.high
    assert hits >= 34


# ---------------------------------------------------------------- command line


@pytest.fixture
def data(tmp_path, monkeypatch):
    "A benchmark folder, read by stand-ins of the reader's three functions."
    (tmp_path / 'data').mkdir()
    note = dict(content_hash='c1', severities=['clean', 'low', 'mid', 'hard'])
    (tmp_path / 'data' / 'info.json').write_text(json.dumps(note), encoding='utf-8')

    def read_files(folder, severity=None, corruption=None):
        return iter([s for s in rows() if severity in (None, s.severity)])

    monkeypatch.setattr(bench_files, 'read_files', read_files, raising=False)
    monkeypatch.setattr(bench_files, 'read_outline', lambda folder: iter(rows()))
    monkeypatch.setattr(bench_files, 'read_info', lambda folder: note, raising=False)
    return tmp_path / 'data'


def command(data, tmp_path, *more):
    return [
        'bench',
        '--model',
        'python:bench_rows:guess',
        '--data',
        str(data),
        '--out',
        str(tmp_path / 'run'),
        *more,
    ]


def test_command(data, tmp_path, capsys):
    "Table on standard output, status 0, files in the folder; a second call asks nothing."
    assert (
        main(
            command(
                data,
                tmp_path,
                '--severity',
                'low',
                'hard',
                '--limit',
                '2',
                '--batch',
                '3',
                '--instruction',
                'Letter.',
            )
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        '| python' not in said
        and '| bench_rows:guess | b | low | 4 |' in said
        and (tmp_path / 'run' / 'bench.png').exists()
    )
    frame, run = read_results(tmp_path / 'run')
    assert (
        len(frame) == 8 and run['content'] == 'c1' and run['settings']['instruction'] == 'Letter.'
    )


def test_command_file(tmp_path, capsys):
    "A file with tab-separated rows; a faulty row is named and not asked, the others are."
    picture = base64.b64encode(rows()[0].image).decode()
    lines = [
        'index\timage\tquestion\tA\tB\tanswer',
        *(f'{k}\t{picture}\tIs it {k}?\tred\tNone\tA' for k in range(3)),
        '9\tnot a picture at all, but longer than a pointer, which has at most 64 signs\tWhat?\tx\ty\tA',
    ]
    (tmp_path / 'MMStar.tsv').write_text('\n'.join(lines) + '\n')
    assert main(command(tmp_path / 'MMStar.tsv', tmp_path)) == 0
    frame, run = read_results(tmp_path / 'run')
    assert (
        len(frame) == 3
        and run['rows'] == 3
        and [r['row'] for r in run['rejects']] == [4]
        and set(frame.benchmark) == {'MMStar'}
        and len(run['content']) == 64
    )
    assert 'row 4 (index 9) left out: unreadable base64' in capsys.readouterr().err


def test_command_pending(data, tmp_path, capsys, monkeypatch):
    "Status 1 and one sentence while rows are pending."

    def silent(picture, prompt):
        raise TimeoutError('no reply')

    monkeypatch.setattr(sys.modules['bench_rows'], 'guess', silent)
    assert main(command(data, tmp_path, '--severity', 'hard')) == 1
    said = capsys.readouterr().err
    assert (
        '6 rows are pending; run the same command again' in said
        and 'the most frequent reason (6 rows): TimeoutError: no reply' in said
    )


def test_command_reasons(data, tmp_path, capsys, monkeypatch):
    "Of several reasons the one of most rows, in one line that is not long; a dead server as well."

    def moody(picture, prompt):
        rare, often = KeyError('rare'), ConnectionError('first line\n' + 'long ' * 99)
        raise rare if 'it 0' in prompt else often

    monkeypatch.setattr(sys.modules['bench_rows'], 'guess', moody)
    assert main(command(data, tmp_path, '--severity', 'hard')) == 1
    [line] = [l for l in capsys.readouterr().err.splitlines() if 'pending' in l]
    assert (
        'the most frequent reason (5 rows): ConnectionError: first line long' in line
        and line.endswith('…')
        and len(line) < 300
    )
    assert (
        main(
            command(
                data,
                tmp_path,
                '--out',
                str(tmp_path / 'dead'),
                '--limit',
                '1',
                '--severity',
                'low',
                '--model',
                'server:m@http://127.0.0.1:9/v1',
                '--set',
                'tries=1',
            )
        )
        == 1
    )
    assert 'the most frequent reason (2 rows): APIConnectionError' in capsys.readouterr().err


def test_edited_function(data, tmp_path, monkeypatch, capsys):
    "Replies of two versions of a function never mix."
    source = tmp_path / 'edited_of_tests.py'
    monkeypatch.syspath_prepend(tmp_path)
    for k, (answer, status) in enumerate((('A', 0), ('A', 0), ('B', 2))):
        source.write_text(f'def f(picture, prompt): return "{answer}"\n')
        sys.modules.pop('edited_of_tests', None)
        assert main(command(data, tmp_path, '--model', 'python:edited_of_tests:f')) == status, k
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        said.startswith(f'clear-nb: {tmp_path / "run"} was begun with other settings: source: ')
        and 'choose another folder' in said
    )


def test_bar(data, tmp_path, capsys, monkeypatch):
    "It has a total, and a run that goes on begins at the rows that are answered."
    monkeypatch.setenv(*WATCHED)
    assert main(command(data, tmp_path, '--limit', '1', '--severity', 'low', 'hard')) == 0
    assert '0/4 ' in capsys.readouterr().err
    assert main(command(data, tmp_path, '--severity', 'low', 'hard')) == 0
    said = capsys.readouterr().err
    assert ' 4/12 ' in said and '12/12' in said and ' 0/12' not in said


WATCHED = 'JPY_SESSION_NAME', 'a person looks'  # progress bars are shown
INTERRUPTED = [sys.executable, '-m', 'clear_nb.cli', 'bench', '--data']


def stopped(args, ready, **env):  # status and standard error after Ctrl-C
    "Run a command until `ready` says so, then interrupt it."

    def listens():
        return signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # also where the tests were started in the background, which ignores it

    p = subprocess.Popen(
        args,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, WATCHED[0]: WATCHED[1], **env},
        preexec_fn=listens,
    )
    try:
        while p.poll() is None and not ready():
            time.sleep(0.02)
        p.send_signal(signal.SIGINT)
        return p.communicate(timeout=60)[1], p.returncode
    finally:
        p.kill()


def test_interrupted(tmp_path, capsys, monkeypatch):
    "Ctrl-C: one sentence, status 130; the replies are kept, and the same command asks the rest."
    lines = [
        dict(index=k, image=code(k), question=f'Is it {k}?', A='x', B='y', answer='A')
        for k in range(12)
    ]
    file, out, log = write_tsv(tmp_path / 'MMStar.tsv', lines), tmp_path / 'run', tmp_path / 'log'
    said, status = stopped(
        [
            *INTERRUPTED,
            file,
            '--model',
            'python:bench_rows:slow',
            '--batch',
            '2',
            '--out',
            str(out),
        ],
        lambda: kept_lines(out) > 2,
        PYTHONPATH=str(ROOT / 'tests'),
        ASKED=str(log),
        PAUSE='.2',
    )
    assert (
        status == 130
        and 'Traceback' not in said
        and said.splitlines()[-1]
        == f'clear-nb: stopped; the replies of finished batches are kept in {out}, and the same command goes on.'
    )
    kept = len(results(out))
    assert kept in (4, 6) and f' {kept}/12 ' in said
    monkeypatch.setenv('ASKED', str(log))
    monkeypatch.setenv('PAUSE', '0')
    monkeypatch.setenv(*WATCHED)
    assert (
        main(
            [
                'bench',
                '--data',
                file,
                '--model',
                'python:bench_rows:slow',
                '--batch',
                '2',
                '--out',
                str(out),
            ]
        )
        == 0
        and len(results(out)) == 12
    )
    assert f' {kept}/12 ' in capsys.readouterr().err


def test_interrupted_server(tmp_path):
    "Nobody waits for requests of a server that hangs."
    file, out = (
        write_tsv(
            tmp_path / 'MMStar.tsv',
            [
                dict(index=k, image=code(k), question='Why?', A='x', B='y', answer='A')
                for k in range(12)
            ],
        ),
        tmp_path / 'run',
    )
    with FakeServer(default=Hang(600)) as server:
        start = time.monotonic()
        said, status = stopped(
            [*INTERRUPTED, file, '--model', f'server:m@{server.url}', '--out', str(out)],
            lambda: len(server.requests) > 7,
        )
        assert (
            status == 130
            and 'Traceback' not in said
            and 'stopped; the replies' in said
            and time.monotonic() - start < 50
        )


@pytest.mark.parametrize(
    'more, sentence',
    [
        (['--model', 'gpt'], "cannot read model 'gpt'"),
        (['--model', 'hf:./nowhere'], "cannot open './nowhere'"),
        (['--model', 'clear:nowhere'], 'no checkpoint at nowhere'),
        (['--model', 'python:no.such:f'], 'cannot find the function'),
        (['--model', 'server:m@ftp://h'], 'must look like http'),
        (['--data', 'nowhere'], 'no benchmark at nowhere'),
        (['--set', 'heat=1'], "unexpected keyword argument 'heat'"),
        (['--set', 'heat'], 'write NAME=VALUE'),
        (['--batch', '-1'], 'batch must be at least 1, got -1'),
        (['--limit', '0'], 'limit must be at least 1, got 0'),
        (
            ['--model', f'clear:{ROOT / "checkpoints" / "tiny" / "grpo"}', '--set', 'device=foo'],
            "no device 'foo'; write cpu",
        ),
        (['--model', 'hf:./nowhere', '--set', 'device=foo'], "no device 'foo'"),
    ],
)
def test_command_refusals(data, tmp_path, more, sentence, capsys):
    "One sentence on standard error, status 2, nothing on standard output."
    assert main(command(data, tmp_path, *more)) == 2
    said = capsys.readouterr()
    assert (
        sentence in said.err
        and said.err.startswith('clear-nb: ')
        and said.err.count('\n') == 1
        and said.out == ''
    )


def test_command_chooses(tmp_path, capsys):
    """A severity that no row has is refused with those that there are; a choice on a finished
    run is said, and the report stays whole.
    """
    file = write_tsv(
        tmp_path / 'MMStar.tsv', [dict(GOOD, index=k, image=code(k)) for k in range(4)]
    )
    assert bench(tmp_path, [file], '--severity', 'hard') == 2
    assert (
        capsys.readouterr().err
        == 'clear-nb: no row has the severity hard; those of this benchmark are clean.\n'
        and not (tmp_path / 'run').exists()
    )
    assert bench(tmp_path, [file]) == 0 and 'more than' not in capsys.readouterr().err
    assert bench(tmp_path, [file], '--limit', '3') == 0
    said = capsys.readouterr()
    assert (
        'run holds replies to 1 rows more than the last --severity and --limit name; the report has them all'
        in said.err
        and '| MMStar | clean | 4 |' in said.out
    )
    assert 'UNFINISHED' not in (tmp_path / 'run' / 'bench.md').read_text()


@pytest.mark.parametrize(
    'setting, sentence',
    [
        ('worker=16', "did you mean 'workers'"),
        ('api_key=sk-of-the-shell', 'environment variable OPENAI_API_KEY'),
        ('guidance=4', 'a server has no setting'),
        ('extra_headers.Authorization=sk-of-the-shell', 'environment variable OPENAI_API_KEY'),
        ('spec=x', 'multiple values'),
    ],
)
def test_command_settings_of_a_server(data, tmp_path, setting, sentence, capsys):
    """What the server would not take stops the command before the folder is made; the corrected
    command runs.
    """
    with FakeServer(default='A') as server:
        model = ['--model', f'server:m@{server.url}', '--limit', '1']
        assert main(command(data, tmp_path, *model, '--set', setting)) == 2
        said = capsys.readouterr().err
        assert (
            sentence in said
            and said.count('\n') == 1
            and 'sk-of-the-shell' not in said
            and not (tmp_path / 'run').exists()
            and not server.requests
        )
        assert (
            main(command(data, tmp_path, *model, '--set', 'workers=2', 'extra_body.top_k=5')) == 0
            and server.requests[0].body['top_k'] == 5
        )


def test_command_instruction(data, tmp_path):
    "Either way to give it reaches the prompts, as the text that was written."
    for k, (more, text) in enumerate(
        {
            ('--set', 'instruction=Role: a. #1'): 'Role: a. #1',
            ('--instruction', 'b', '--set', 'instruction=c'): 'b',
            (): '',
        }.items()
    ):
        assert (
            main(command(data, tmp_path, '--limit', '1', '--out', str(tmp_path / str(k)), *more))
            == 0
        )
        assert (
            json.loads((tmp_path / str(k) / 'run.json').read_text())['settings']['instruction']
            == text
        )


def test_entry_point_knows_both(capsys):
    "The console script explains both commands."
    for argv, words in {
        ('--help',): ('answer', 'bench', 'compare'),
        ('bench', '--help'): (
            '--model',
            '--data',
            '--severity',
            '--limit',
            '--instruction',
            'Exit status: 0',
        ),
        ('compare', '--help'): ('runs', '--out', 'Exit status: 0'),
        ('answer', '--help'): ('--image', '--question'),
    }.items():
        with pytest.raises(SystemExit) as e:
            main(list(argv))
        said = capsys.readouterr().out
        assert e.value.code == 0 and all(w in said for w in words)


# ---------------------------------------------------------------- files of others


def write_tsv(path, lines, columns='index image question A B C D answer category l2-category'):
    "Tab-separated rows; dicts of columns."
    columns = columns.split()
    path.write_text(
        '\n'.join(
            [
                '\t'.join(columns),
                *('\t'.join(str(line.get(c, '')) for c in columns) for line in lines),
            ]
        )
        + '\n'
    )
    return str(path)


def code(k):
    return base64.b64encode(picture(k, 24, 24)).decode()


def told(picture, prompt):
    return prompt.split('say ')[1].split('?')[0]  # what the question says


WORDS = ('None', 'NA', 'dog', 'cat')


def turned(index, k, say):  # a question about four options, rolled k times; the right one is None
    texts = np.roll(WORDS, k).tolist()
    return dict(
        zip('ABCD', texts),
        index=index + k * 1_000_000,
        image=code(index) if k == 0 else index,
        question=f'Please say {say}?',
        answer='ABCD'[texts.index('None')],
        category='mood',
        **{'l2-category': 'reasoning'},
    )


@pytest.fixture
def released(tmp_path):
    "Look-alikes of four released files; in each, half of the questions are answered right."
    (tmp_path / 'data').mkdir()
    rolled = [turned(1, k, 'None') for k in range(4)] + [
        turned(2, k, 'None' if k < 3 else 'NA') for k in range(4)
    ]
    pairs = [
        dict(
            index=k,
            image=code(k),
            question=f'Please say {"(b)" if k == 4 else "(a)"}?',
            A='Open',
            B='NA',
            answer='A',
        )
        for k in range(1, 5)
    ]
    star = [
        dict(
            index=k,
            image=code(k),
            question=f'Please say {"C" if k else "A"}?',
            A='x',
            B='y',
            C='null',
            answer='C',
            category='science',
        )
        for k in range(2)
    ]
    vet = [
        dict(
            index=f'v1_{k}',
            image=code(k),
            question=f'Please say {w}?',
            answer='truck <OR> lorry <AND> green',
            category='rec,ocr',
        )
        for k, w in enumerate(('green lorry', 'boat'))
    ]
    return [
        write_tsv(tmp_path / 'data' / f'{name}.tsv', lines)
        for name, lines in (
            ('MMBench_DEV_EN_V11_LOW_LEVEL_HIGH', rolled),
            ('MMVP_LOW_LEVEL_LOW', pairs),
            ('MMStar_motion_blur', star),
            ('MMVet_LOW_LEVEL_MID', vet),
        )
    ]


def bench(tmp_path, data, *more, model='python:test_bench:told', out='run'):
    return main(
        ['bench', '--model', model, '--data', *map(str, data), '--out', str(tmp_path / out), *more]
    )


def report(tmp_path, name='bench', out='run'):
    return pd.read_csv(
        tmp_path / out / f'{name}.csv', dtype={'row': str, 'index': str}, keep_default_na=False
    )


def test_released_files(released, tmp_path, capsys):
    """Name, rolls, pointers, pairs and missing-looking options; MM-Vet waits for a judge
    instead of being scored as 0.
    """
    assert bench(tmp_path, released) == 1
    t = report(tmp_path).set_index(['benchmark', 'severity'])
    assert set(t.index) == {
        (b, s)
        for x, s in (
            ('MMBench_DEV_EN_V11', 'hard'),
            ('MMVP', 'low'),
            ('MMStar', 'hard'),
            ('MMVet', 'mid'),
        )
        for b in (x, 'AVG')
    }
    assert {
        b: (float(t.accuracy[b, s]), t.n[b, s], t.rows[b, s])
        for b, s in (('MMBench_DEV_EN_V11', 'hard'), ('MMVP', 'low'), ('MMStar', 'hard'))
    } == {'MMBench_DEV_EN_V11': (50, 2, 2), 'MMVP': (75, 4, 4), 'MMStar': (50, 2, 2)}
    assert (
        t.accuracy['MMVet', 'mid'] == 'unknown'
        and t.pending['MMVet', 'mid'] == 2
        and float(t.accuracy['AVG', 'hard']) == 50
    )
    second = report(tmp_path, 'bench_second').set_index('second')
    assert (float(second.score['pairs']), second.n['pairs']) == (50, 2) and float(
        second.score['each roll alone']
    ) == 87.5
    assert set(
        report(tmp_path, 'bench_corruption')
        .query("benchmark != 'AVG'")[['benchmark', 'category', 'corruption']]
        .itertuples(index=False, name=None)
    ) == {
        ('MMStar', 'capture', 'motion_blur'),
        *((b, 'unknown', 'unknown') for b in ('MMBench_DEV_EN_V11', 'MMVP', 'MMVet')),
    }
    assert set(
        report(tmp_path, 'bench_category')
        .query("benchmark == 'MMBench_DEV_EN_V11'")[['kind', 'name']]
        .itertuples(index=False, name=None)
    ) == {('category', 'mood'), ('l2-category', 'reasoning')}
    frame, _ = read_results(tmp_path / 'run')
    assert (
        len(frame) == 16
        and not (tmp_path / 'run' / 'bench_drop.csv').exists()
        and 'no clean one' in (tmp_path / 'run' / 'bench.md').read_text()
    )
    assert '2 rows need a judge: add --judge' in capsys.readouterr().err


def test_judged_and_compared(released, tmp_path, monkeypatch, capsys):
    """With a judge MM-Vet has grades; comparing runs asks neither a model nor the judge again,
    and says how sure the difference is.
    """
    monkeypatch.setenv('OPENAI_API_KEY', 'x')
    vet = released[3:]
    with FakeServer(
        default=lambda r: (
            '0.8' if '"answer": "green lorry"' in r.text.rpartition('{"question"')[2] else '0.3'
        )
    ) as server:
        judge = ['--judge', f'j@{server.url}']
        assert (
            bench(tmp_path, vet, *judge) == 0
            and bench(tmp_path, vet, *judge, model='python:bench_rows:silly', out='other') == 0
        )
        asked = len(server.requests)
        assert asked == 4 and all('truck <OR> lorry <AND> green' in r.text for r in server.requests)
        assert (
            main(
                [
                    'compare',
                    str(tmp_path / 'run'),
                    str(tmp_path / 'other'),
                    '--out',
                    str(tmp_path / 'both'),
                    *judge,
                ]
            )
            == 0
            and len(server.requests) == asked
        )
    assert report(tmp_path).accuracy.astype(float).tolist() == [55, 55] and report(
        tmp_path, 'bench_category'
    ).query("kind == 'capability'").name.tolist() == ['rec', 'ocr', 'Overall']
    t = report(tmp_path, 'bench_difference', 'both').iloc[0]
    assert (t.models, t.benchmark, float(t.difference), t.n) == (
        'test_bench:told − bench_rows:silly',
        'MMVet',
        25,
        2,
    ) and float(t.low) <= 25 <= float(t.high)
    assert (
        '## Differences between models' in (tmp_path / 'both' / 'bench.md').read_text()
        and 'test_bench:told − bench_rows:silly' in capsys.readouterr().out
    )


def test_compared_in_order(tmp_path, capsys):
    """Pairs as the runs are named, each line once; a folder named twice, a report inside a run
    and other data are refused; compare says which command goes on.
    """

    def shy(picture, prompt):
        if 'it 1' in prompt:
            raise OSError('off')
        return guess(picture, prompt)

    for k, f in dict(z=guess, m=silly, a=shy).items():
        run_rows(
            CallableAdapter(f, k),
            rows(severities=['clean', 'low']),
            tmp_path / k,
            progress=False,
            content='c',
            data='x.tsv',
        )
    three, out = [str(tmp_path / k) for k in 'zma'], ['--out', str(tmp_path / 'o')]
    assert main(['compare', *three, *out]) == 1
    said = capsys.readouterr()
    assert [l.split(' | ')[0] for l in said.out.splitlines()[2:8]] == [
        f'| {p}' for p in ('z − m', 'z − a', 'm − a') for _ in 'cl'
    ]
    again = f'compare asks nothing, so run the command of {tmp_path / "a"} again'
    reason = 'the most frequent reason (2 rows): OSError: off'
    assert f'2 rows are pending; {again}; {reason}' in said.err
    assert 'AVG' not in said.out and 'same command' not in said.err
    assert (
        report(tmp_path, out='o').model.drop_duplicates().tolist() == ['z', 'm', 'a']
        and (tmp_path / 'o' / 'bench.md').read_text().count('AVG') == 1
    )  # in the caption
    run_rows(
        CallableAdapter(guess, 'y'),
        rows(),
        tmp_path / 'y',
        progress=False,
        content='d',
        data='y.tsv',
    )
    for argv, sentence in (
        ([*three, '--out', three[1]], f'{three[1]} is the folder of a run'),
        ([three[0], three[0] + '/', *out], 'z is named twice'),
        ([three[0], str(tmp_path / 'y'), *out], 'z x.tsv (content c); y y.tsv (content d)'),
    ):
        assert main(['compare', *argv]) == 2
        said = capsys.readouterr()
        assert (
            sentence in said.err
            and said.err.count('\n') == 1
            and said.out == ''
            and not (tmp_path / 'm' / 'bench.md').exists()
        )


def test_clean_and_corrupted_files(tmp_path):
    "With the clean file beside the corrupted ones the report has the drop, on the same questions."

    def lines(right):
        return [
            dict(
                index=k,
                image=code(k),
                question=f'Please say {"A" if k < right else "B"}?',
                A='x',
                B='y',
                answer='A',
            )
            for k in range(8)
        ]

    files = [
        write_tsv(tmp_path / f'MMStar{suffix}.tsv', lines(right))
        for suffix, right in (('', 6), ('_LOW_LEVEL_LOW', 5), ('_LOW_LEVEL_HIGH', 2))
    ]
    assert bench(tmp_path, files) == 0
    t = report(tmp_path, 'bench_drop').query("benchmark == 'MMStar'").set_index('severity')
    assert (
        t['drop'].astype(float).to_dict() == dict(low=12.5, hard=50)
        and t.n.tolist() == [8, 8]
        and (t.low.astype(float) < t['drop'].astype(float)).all()
    )
    assert main(['compare', str(tmp_path / 'run'), '--out', str(tmp_path / 'again')]) == 0
    for name in ('bench.csv', 'bench_drop.csv', 'bench.md', 'bench.svg'):
        assert (tmp_path / 'again' / name).read_bytes() == (tmp_path / 'run' / name).read_bytes()


# ---------------------------------------------------------------- bad input

GOOD = dict(question='Please say A?', A='x', B='y', answer='A')
FAULTS = {
    'unreadable base64': dict(image='?' * 80),
    'undecodable image': dict(image=base64.b64encode(b'no picture' * 9).decode()),
    'duplicate index': dict(index=1),
    'no index': dict(index=''),
    'answer is no option': dict(answer='C'),
    'no question': dict(question=' '),
    'no answer': dict(answer=''),
    'no picture': dict(image=''),
    'pointer to nothing': dict(image=77),
    'malformed row': dict(B='y\tz'),
}


@pytest.mark.parametrize('reason', FAULTS)
def test_faulty_row(tmp_path, reason, capsys):
    """Not asked, not replaced: row and reason in the report, counted in text and summary; the
    other rows have their scores.
    """
    lines = [dict(GOOD, index=k, image=code(k)) for k in range(3)] + [
        dict(GOOD, index=9, image=code(9)) | FAULTS[reason]
    ]
    assert bench(tmp_path, [write_tsv(tmp_path / 'MMStar.tsv', lines)]) == 0
    left, summary = (
        report(tmp_path, 'bench_left_out').iloc[0],
        json.loads((tmp_path / 'run' / 'bench.json').read_text()),
    )
    assert (left.kind, left.row, left.reason) == (
        'rejected',
        '4',
        reason,
    ) and left.detail.startswith('MMStar.tsv')
    assert (
        summary['models'][0]['rejected'] == {reason: 1}
        and f'NOT USABLE: test_bench:told: {reason} 1.' in summary['caption']
    )
    assert (
        f'| test_bench:told | rejected | {reason} | 1 |'
        in (tmp_path / 'run' / 'bench.md').read_text()
        and f'row 4 (index {left["index"]}) left out: {reason}' in capsys.readouterr().err
    )
    assert report(tmp_path).rows.tolist() == [3, 3] and report(tmp_path).accuracy.astype(
        float
    ).tolist() == [100, 100]


def test_no_usable_row(tmp_path, capsys):
    "Nothing that can be asked is an error with the reasons, not a success."
    assert (
        bench(
            tmp_path,
            [
                write_tsv(
                    tmp_path / 'MMStar.tsv',
                    [dict(GOOD, index=k, image=code(k), answer='C' if k else '') for k in range(3)],
                )
            ],
        )
        == 2
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        said.startswith(
            "clear-nb: no row can be used (no answer 1, answer is no option 2); the first is row 1, index '0': no answer: MMStar.tsv"
        )
        and not (tmp_path / 'run' / 'bench.md').exists()
    )


@pytest.mark.parametrize(
    'text, sentence',
    [
        ('', 'MMStar.tsv is empty'),
        ('index\timage\tquestion\tanswer\n', 'no rows'),
        ('index\timage\tA\n1\tx\ty\n', "lacks the columns ['question', 'answer']"),
    ],
)
def test_faulty_file(tmp_path, text, sentence, capsys):
    (tmp_path / 'MMStar.tsv').write_text(text)
    assert bench(tmp_path, [tmp_path / 'MMStar.tsv']) == 2
    said = capsys.readouterr().err
    assert (
        sentence in said and said.count('\n') == 1 and not (tmp_path / 'run' / 'bench.md').exists()
    )


def test_too_small_a_picture(tmp_path):
    "What the builder could not corrupt is in the report of every run on its folder."
    samples = [
        BenchmarkRow(
            'MMStar',
            str(k),
            'Please say A?',
            'A',
            picture(k, *((80, 80) if k else (12, 40))),
            dict(A='x', B='y'),
        )
        for k in range(3)
    ]
    bench_files.build_files(
        samples, tmp_path / 'built', corruptions=['block_exchange'], progress=False
    )
    assert bench(tmp_path, [tmp_path / 'built'], '--severity', 'hard', 'low') == 0
    left = report(tmp_path, 'bench_left_out')
    assert (
        left[['row', 'index', 'reason']].values.tolist() == [['1', '0', 'too small']]
        and 'needs' in left.detail[0]
    )
    assert report(tmp_path).query("benchmark != 'AVG'")[['severity', 'rows']].values.tolist() == [
        ['low', 2],
        ['hard', 2],
    ]


def over_server(tmp_path, server, *more):
    "A benchmark of eight rows through a server; the fourth row is called `bad`."
    lines = [
        dict(GOOD, index=k, image=code(k), question=f'Row {k}: {"bad" if k == 3 else "good"}')
        for k in range(8)
    ]
    return bench(
        tmp_path,
        [write_tsv(tmp_path / 'MMStar.tsv', lines)],
        '--set',
        'tries=2',
        'timeout=0.4',
        'workers=3',
        *more,
        model=f'server:m@{server.url}',
    )


@pytest.mark.parametrize(
    'name', list(FAILURES)[:7]
)  # two kinds of nonsense; the judge sees them all
def test_bad_server(tmp_path, name, hasty, monkeypatch, capsys):
    """The row that a server never answers is pending, with its reason in the report; the next
    call asks that row alone.
    """
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-of-the-bench')
    with FakeServer(default=lambda r: FAILURES[name] if 'bad' in r.text else 'A') as server:
        assert over_server(tmp_path, server) == 1 and Counter(
            'bad' in r.text for r in server.requests
        ) == {False: 7, True: 2}
        left = report(tmp_path, 'bench_left_out').iloc[0]
        assert (left.kind, left['index'], report(tmp_path).pending[0], report(tmp_path).n[0]) == (
            'pending',
            '3',
            1,
            7,
        ) and left.reason
        assert (
            left.reason in (tmp_path / 'run' / 'bench.md').read_text()
            and '1 rows are pending; run the same command again' in capsys.readouterr().err
        )
        server.default, asked = 'B', len(server.requests)
        assert over_server(tmp_path, server) == 0 and len(server.requests) == asked + 1
    assert report(tmp_path).loc[0, ['rows', 'right', 'wrong', 'pending']].tolist() == [8, 7, 1, 0]
    assert not any(
        b'sk-of-the-bench' in p.read_bytes() for p in (tmp_path / 'run').rglob('*') if p.is_file()
    )


def test_every_failure_at_once(tmp_path, hasty):
    """429, 500, time-outs, lost connections and nonsense between the answers: nothing lost,
    nothing counted twice.
    """
    script = [x for k, f in enumerate(FAILURES.values()) for x in ([f, 'A'] if k % 2 else [f])]
    with FakeServer(script, default='A') as server:
        assert over_server(tmp_path, server, '--set', 'tries=20', 'timeout=0.4', 'workers=3') == 0
        assert len(server.requests) == 8 + len(FAILURES) and {
            r.text.split('Row ')[1][0] for r in server.requests
        } == set('01234567')
    assert (
        report(tmp_path).loc[0, ['rows', 'right', 'pending']].tolist() == [8, 8, 0]
        and len(results(tmp_path / 'run')) == 8
    )


@pytest.mark.parametrize('status', [401, 404])
def test_refusing_server(tmp_path, status, monkeypatch, capsys):
    """One sentence, status 2; what was answered before is kept, and only the rest is asked when
    the key is right.
    """
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-of-the-bench')
    with FakeServer(['A'] * 4, default=Status(status, 'no sk-of-the-bench')) as server:
        assert over_server(tmp_path, server, '--set', 'workers=1') == 2
        said = capsys.readouterr()
        assert (
            said.err.splitlines()[-1].startswith('clear-nb: http')
            and 'start again' in said.err
            and 'sk-of-the-bench' not in said.err + said.out
        )
        assert len(results(tmp_path / 'run')) == 4 and len(server.requests) == 5
        server.default = 'A'
        assert over_server(tmp_path, server) == 0 and len(server.requests) == 9
    assert report(tmp_path).loc[0, ['rows', 'right']].tolist() == [8, 8]


# ---------------------------------------------------------------- real models


def test_tiny_model_on_scenes(tmp_path, capsys):
    """In the words of its own questions the tiny model answers, from a folder and from a TSV;
    in others the command says that it cannot be read.
    """
    bench_files.build_files(
        from_scenes('mmstar', 12),
        tmp_path / 'built',
        relative=True,
        severities=['low'],
        tsv=True,
        progress=False,
    )
    file = tmp_path / 'built' / 'mmstar_LOW_LEVEL_LOW.tsv'
    frame = pd.read_csv(file, sep='\t', dtype=str, keep_default_na=False)
    frame.drop(columns='prompt').to_csv(
        tmp_path / 'mmstar_LOW_LEVEL_LOW.tsv', sep='\t', index=False
    )
    for k, path in enumerate((tmp_path / 'built', file, tmp_path / 'mmstar_LOW_LEVEL_LOW.tsv')):
        assert (
            bench(
                tmp_path,
                [path],
                '--set',
                'device=cpu',
                'policy=never',
                model=f'clear:{ROOT / "checkpoints" / "tiny" / "grpo"}',
                out=str(k),
            )
            == 0
        )
        right, said = report(tmp_path, out=str(k)).right[0], capsys.readouterr().err
        assert (
            right >= 8 and 'could not be read' not in said
            if k < 2
            else right < 6
            and 'of 12 replies could not be read, for example' in said
            and '--instruction' in said
        )


def test_hugging_face_end_to_end(tmp_path, capsys):
    """A model that nobody here trained, offline: built benchmark, folder of the model, one
    command, report; again with nothing to ask.
    """
    bench_files.build_files(
        from_scenes('mmbench', 2),
        tmp_path / 'built',
        relative=True,
        severities=['low', 'hard'],
        progress=False,
    )
    model = f'hf:{tiny_hf.idefics(tmp_path / "SomeVLM")}'
    for _ in range(2):
        assert (
            bench(
                tmp_path,
                [tmp_path / 'built'],
                '--set',
                'device=cpu',
                'max_new_tokens=4',
                model=model,
            )
            == 1
        )
        told = capsys.readouterr()
        assert '16 of 16 replies were cut at the limit of 4 tokens' in told.err
    t = report(tmp_path).query("benchmark == 'mmbench'")
    assert (
        t.model.tolist() == ['SomeVLM'] * 2
        and t.severity.tolist() == ['low', 'hard']
        and t.rows.tolist() == [2, 2]
    )
    assert (t[['right', 'wrong', 'refused', 'unparsable']].sum(axis=1) == 2).all() and len(
        results(tmp_path / 'run')
    ) == 16
    assert (
        len(set(results(tmp_path / 'run').reply)) > 1
        and '| SomeVLM | mmbench | low | 2 |' in told.out
    )


def test_real_text_reader(tmp_path):
    """A published reader that brings its weights, on signs of the scene world: most words are
    read, hardly any behind heavy blur, and the report says how sure the drop is.
    """
    reader = pytest.importorskip(
        'rapidocr_onnxruntime', reason='optional: pip install rapidocr-onnxruntime'
    ).RapidOCR(intra_op_num_threads=1)

    def reads(picture, prompt):
        found, _ = reader(np.asarray(picture)[..., ::-1], use_cls=False)
        return ' '.join(t for _, t, _ in found or [] if t.isascii() and t.isalpha() and len(t) > 1)

    items = [i for i in benchmark('realworldqa', 36) if i.question.ability == 'word'][:6]
    large = [Image.fromarray(i.image).resize((512, 512), Image.Resampling.BICUBIC) for i in items]
    signs = [
        BenchmarkRow(
            'signs', str(k), i.question.prompt, i.question.truth, png(im), corruption=c, severity=s
        )
        for c, s, blur in (('', 'clean', 0), ('lens_blur', 'hard', 24))
        for k, (i, im) in enumerate(
            zip(items, (im.filter(ImageFilter.GaussianBlur(blur)) for im in large))
        )
    ]
    tables = report_bench(
        run_rows(CallableAdapter(reads), signs, tmp_path / 'r', progress=False), tmp_path / 'r'
    )
    clean, hard = tables['accuracy'].query("benchmark == 'signs'").accuracy
    assert (
        clean.n == hard.n == 6
        and clean.mean > 60 > 20 > hard.mean
        and tables['drop']['drop'][0].low > 0
    ), (clean, hard)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


@pytest.mark.slow
def test_launched(whole, tmp_path):
    "Two processes, started as `accelerate launch` starts them, share the rows by themselves."
    (tmp_path / 'job.py').write_text(child('guess', tmp_path / 'r'))
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            str(tmp_path / 'job.py'),
        ],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / 'r').glob('finished-*')) == [
        'finished-0-of-2.json',
        'finished-1-of-2.json',
    ]
    assert results(tmp_path / 'r').equals(whole)
