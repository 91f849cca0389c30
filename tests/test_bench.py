"""A run that is killed, split or half heard gives the same results as one that is not."""
import base64
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
from bench_rows import guess, picture, rows, slow
from clear_nb import bench_files
from clear_nb.adapters import CallableAdapter, Refused, ServerAdapter
from clear_nb.scoring import KINDS
from clear_nb.bench import _mine, accuracy_table, collect, main, read_results, report_bench, run_bench
from clear_nb.bench_files import Sample
from clear_nb.core import ROOT, rng
from local_server import serving


def results(out): return pd.read_parquet(collect(out)).drop(columns='seconds')


@pytest.fixture
def whole(tmp_path): return results(run_bench(CallableAdapter(guess), rows(), tmp_path/'whole', progress=False))


# ---------------------------------------------------------------- complete, once, in every way

def test_results(whole):
    "One row per key, sorted, with the reply of exactly that row."
    assert len(whole) == 24 and not whole.duplicated(['benchmark', 'index', 'corruption', 'severity']).any()
    for r in whole.itertuples():
        s = Sample(**json.loads(r.sample))
        assert s.key == (r.benchmark, r.index, r.corruption, r.severity) and r.reply == guess(None, s.question)


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_shards(whole, tmp_path, n):
    "Any number of shards gives the same file; rows of a group stay together."
    for i in range(n): run_bench(CallableAdapter(guess), iter(rows()), tmp_path/'s', batch=4, shard=(i, n), progress=False)
    assert results(tmp_path/'s').equals(whole)
    assert all(len({next(i for i in range(n) if _mine(s, (i, n))) for s in rows() if s.group == g}) == 1 for g in '012')


def test_batches(whole, tmp_path):
    for k in (1, 7, 100): assert results(run_bench(CallableAdapter(guess), rows(), tmp_path/str(k), batch=k, progress=False)).equals(whole)


def test_severities_and_limit(tmp_path):
    "A short run holds whole groups at each severity asked for; a later, longer run only asks the rest."
    calls = []
    def count(picture, prompt): calls.append(prompt); return 'A'
    run_bench(CallableAdapter(count), rows() + rows(benchmark='c'), tmp_path/'r', severities=['clean', 'hard'], limit=1, progress=False)
    assert Counter(zip(*(results(tmp_path/'r')[k] for k in ('benchmark', 'severity')))) == {(b, s): 2 for b in 'bc' for s in ('clean', 'hard')} and len(calls) == 8
    run_bench(CallableAdapter(count), rows() + rows(benchmark='c'), tmp_path/'r', progress=False)
    assert len(calls) == len(results(tmp_path/'r')) == 48


CHILD = '''
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from bench_rows import guess, rows, slow
from clear_nb.adapters import CallableAdapter
from clear_nb.bench import run_bench
run_bench(CallableAdapter({f}), rows(), {out!r}, batch=2, progress=False)
'''


def child(f, out): return CHILD.format(root=str(ROOT), tests=str(ROOT/'tests'), f=f, out=str(out))


def test_kill(whole, tmp_path, monkeypatch):
    "kill -9 in the middle of a batch; the run goes on behind the last whole batch and ends with the same results."
    out, log = tmp_path/'killed', tmp_path/'log'
    monkeypatch.setenv('ASKED', str(log))
    monkeypatch.setenv('PAUSE', '.15')
    first = subprocess.Popen([sys.executable, '-c', child('slow', out)])
    while first.poll() is None and len(list(out.glob('parts/part-*'))) < 3: time.sleep(.02)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    kept, asked = len(results(out)), len(log.read_text())
    assert 6 <= kept < 24 and asked <= kept + 2
    (out/'parts'/'.part-half.tmp.parquet').write_bytes(b'PAR1') # what a killed write leaves
    monkeypatch.setenv('PAUSE', '0')
    run_bench(CallableAdapter(slow), rows(), out, batch=2, progress=False)
    assert len(log.read_text()) - asked == 24 - kept
    assert results(out).equals(whole)


# ---------------------------------------------------------------- outages

def test_outages_are_asked_again(whole, tmp_path):
    "Half the rows fail at first; only they are asked again; none is counted twice."
    calls = Counter()
    def shaky(picture, prompt):
        calls[prompt] += 1
        if calls[prompt] < 3 and '1' in prompt: raise TimeoutError('no reply')
        return guess(picture, prompt)
    a = CallableAdapter(shaky)
    run_bench(a, rows(severities=['hard']), tmp_path/'r', progress=False)
    frame, _ = read_results(tmp_path/'r')
    assert (frame.outcome == 'pending').sum() == 1 and frame.detail[frame.outcome == 'pending'].tolist() == ['TimeoutError: no reply']
    for _ in range(3): run_bench(a, rows(severities=['hard']), tmp_path/'r', progress=False)
    assert results(tmp_path/'r').reply.tolist() == whole[whole.severity == 'hard'].reply.tolist() and sorted(calls.values()) == [1]*5 + [3]


def test_server_run(tmp_path, monkeypatch):
    "Against a failing server: 401 stops with the answers so far kept, failures are pending, then all are heard; the key is in no file."
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-of-the-bench')
    mood = dict(fail=401, after=5)
    def plan(n, prompt): return mood['fail'] if n > mood['after'] and (n % 2 or mood['fail'] == 401) else f'{guess(None, prompt)}.'
    with serving(plan) as server:
        a = ServerAdapter('m', server.url, workers=1, tries=2, wait=.01)
        with pytest.raises(Refused): run_bench(a, rows(), tmp_path/'r', batch=8, progress=False)
        assert results(tmp_path/'r').kind.tolist() == ['answer']*5 and len(server.calls) == 6
        mood.update(fail=400)
        run_bench(a, rows(), tmp_path/'r', batch=8, progress=False)
        half = results(tmp_path/'r')
        assert len(half) == 24 and 5 < (half.kind == 'answer').sum() < 24
        mood.update(after=10**9)
        before = len(server.calls)
        run_bench(a, rows(), tmp_path/'r', batch=8, progress=False)
        assert len(server.calls) - before == (half.kind == 'outage').sum()
    frame, run = read_results(tmp_path/'r')
    assert len(frame) == run['rows'] == 24 and set(frame.kind) == {'answer'}
    report_bench(tmp_path/'r', tmp_path/'r')
    assert not any(b'sk-of-the-bench' in p.read_bytes() for p in (tmp_path/'r').rglob('*') if p.is_file())


# ---------------------------------------------------------------- refusals

def test_another_run(tmp_path):
    "Settings, content, rows or keys that do not fit are refused, and the folder stays as it was."
    run = lambda **kw: run_bench(**{**dict(adapter=CallableAdapter(guess), samples=rows(), out=tmp_path/'r', content='c1', progress=False), **kw})
    run()
    before = results(tmp_path/'r')
    for match, kw in {'instruction': dict(adapter=CallableAdapter(guess, instruction='x')), 'name': dict(adapter=CallableAdapter(guess, name='x')), "'c1' there, 'c2' here": dict(content='c2'),
                      'has changed': dict(samples=[replace(s, image=picture(7)) for s in rows()]), 'two rows have the key': dict(samples=rows() + rows()), 'shard': dict(shard=(-1, 2))}.items():
        with pytest.raises(ValueError, match=match): run(**kw)
    assert results(tmp_path/'r').equals(before)


def test_miscounted_replies(tmp_path):
    "An adapter that loses a reply is stopped before anything is written under the wrong key."
    class Lossy(CallableAdapter):
        def __call__(self, samples): return super().__call__(samples)[1:]
    with pytest.raises(ValueError, match='gave 15 replies to 16 rows'): run_bench(Lossy(guess), rows(), tmp_path/'r', progress=False)
    assert len(results(tmp_path/'r')) == 0


# ---------------------------------------------------------------- the report

def test_report_counts(tmp_path):
    "Every outcome is counted where it belongs, and accuracy is over the rows that were heard."
    says = {'0': 'A', '1': 'A', '2': "I can't process this file.", '3': 'hm', '4': None}
    def f(picture, prompt): return says.get(prompt.split('Is it ')[1][0], 'yes')
    run_bench(CallableAdapter(f), rows(severities=['hard']), tmp_path/'r', progress=False, content='h')
    table = report_bench(tmp_path/'r', tmp_path/'report')
    line = table[table.benchmark == 'b'].iloc[0]
    assert [line[o] for o in KINDS] == [2, 1, 1, 1, 1] and line.accuracy.mean == pytest.approx(100*2/5) and line.accuracy.n == 5 and line.rows == 6
    note = json.loads((tmp_path/'report'/'bench.json').read_text())
    assert note['models'][0]['content'] == 'h' and note['models'][0]['pending'] == 1 and note['models'][0]['complete'] is False and 'UNFINISHED: f: 6 replies of 6 rows, 1 pending' in note['caption']
    wide = pd.read_csv(tmp_path/'report'/'bench.csv')
    assert wide.accuracy.tolist() == [40, 40] and wide.pending.tolist() == [1, 1] and (wide.low <= wide.accuracy).all()


def test_unheard_is_unknown(tmp_path):
    "A model that was never heard has no accuracy, not 0."
    def silent(picture, prompt): raise OSError('off')
    run_bench(CallableAdapter(silent), rows(), tmp_path/'r', progress=False)
    table = report_bench(tmp_path/'r', tmp_path/'r')
    assert table.accuracy.map(lambda e: np.isnan(e.mean)).all() and 'unknown' in (tmp_path/'r'/'bench.md').read_text() and '| 0.0' not in (tmp_path/'r'/'bench.md').read_text()


def test_several_models(tmp_path):
    "Models stand one above the other; averages are over benchmarks, not rows; other benchmarks are refused."
    data = rows(6) + rows(2, benchmark='c')
    def never(picture, prompt): return 'hm'
    a = run_bench(CallableAdapter(guess), data, tmp_path/'a', progress=False, content='x')
    b = run_bench(CallableAdapter(never), data, tmp_path/'b', progress=False, content='x')
    table = report_bench([a, b], tmp_path/'o').set_index(['model', 'benchmark', 'severity']).accuracy.map(lambda e: e.mean)
    assert table['guess', 'AVG', 'low'] == pytest.approx((table['guess', 'b', 'low'] + table['guess', 'c', 'low'])/2) and table['never', 'AVG', 'hard'] == 0
    assert table['guess', 'b', 'low'] == pytest.approx(100*5/6) and table['guess', 'c', 'low'] == 100
    c = run_bench(CallableAdapter(never), data, tmp_path/'c', progress=False, content='y')
    with pytest.raises(ValueError, match='different benchmarks'): report_bench([a, c], tmp_path/'o')
    with pytest.raises(FileNotFoundError, match='holds no run'): report_bench(tmp_path/'nothing', tmp_path/'o')


def test_same_run_same_files(tmp_path):
    "Report files of the same replies are the same to the byte, the seconds of the summary aside."
    for k in 'ab': report_bench(run_bench(CallableAdapter(guess), rows(), tmp_path/k, progress=False), tmp_path/k)
    for suffix in ('csv', 'md', 'svg', 'png'): assert (tmp_path/'a'/f'bench.{suffix}').read_bytes() == (tmp_path/'b'/f'bench.{suffix}').read_bytes()


def test_intervals_cover():
    "The 95 % interval of a line holds the true rate about as often as it says."
    hits = 0
    for k in range(40):
        outcome = np.where(rng('cover', k).random(120) < .6, 'right', 'wrong')
        frame = pd.DataFrame(dict(model='m', benchmark=f'b{k}', severity='hard', outcome=outcome))
        e = accuracy_table(frame).accuracy[0]
        hits += e.low <= 60 <= e.high
    assert hits >= 34


# ---------------------------------------------------------------- command line

@pytest.fixture
def data(tmp_path, monkeypatch):
    "A benchmark folder, read by stand-ins of the reader's two functions."
    (tmp_path/'data').mkdir()
    def read_files(folder, severity=None, corruption=None): return iter([s for s in rows() if severity in (None, s.severity)])
    monkeypatch.setattr(bench_files, 'read_files', read_files, raising=False)
    monkeypatch.setattr(bench_files, 'read_info', lambda folder: dict(content_hash='c1'), raising=False)
    return tmp_path/'data'


def command(data, tmp_path, *more): return ['bench', '--model', 'python:bench_rows:guess', '--data', str(data), '--out', str(tmp_path/'run'), *more]


def test_command(data, tmp_path, capsys):
    "Table on standard output, status 0, files in the folder; a second call asks nothing."
    assert main(command(data, tmp_path, '--severity', 'low', 'hard', '--limit', '2', '--batch', '3', '--instruction', 'Letter.')) == 0
    said = capsys.readouterr().out
    assert '| python' not in said and '| bench_rows:guess | b | low | 4 |' in said and (tmp_path/'run'/'bench.png').exists()
    frame, run = read_results(tmp_path/'run')
    assert len(frame) == 8 and run['content'] == 'c1' and run['settings']['instruction'] == 'Letter.'


def test_command_file(tmp_path, capsys):
    "A file with tab-separated rows; a faulty row is named and not asked, the others are."
    picture = base64.b64encode(rows()[0].image).decode()
    lines = ['index\timage\tquestion\tA\tB\tanswer', *(f'{k}\t{picture}\tIs it {k}?\tred\tNone\tA' for k in range(3)), '9\tnot a picture at all, but longer than a pointer, which has at most 64 signs\tWhat?\tx\ty\tA']
    (tmp_path/'MMStar.tsv').write_text('\n'.join(lines) + '\n')
    assert main(command(tmp_path/'MMStar.tsv', tmp_path)) == 0
    frame, run = read_results(tmp_path/'run')
    assert len(frame) == 3 and run['rows'] == 3 and set(frame.benchmark) == {'MMStar'} and len(run['content']) == 64
    assert 'row 4 (index 9) left out: unreadable base64' in capsys.readouterr().err


def test_command_pending(data, tmp_path, capsys, monkeypatch):
    "Status 1 and one sentence while rows are pending."
    monkeypatch.setattr(sys.modules['bench_rows'], 'guess', lambda picture, prompt: None, raising=False)
    assert main(command(data, tmp_path, '--severity', 'hard')) == 1
    assert '6 of 6 rows are pending; run the same command again' in capsys.readouterr().err


@pytest.mark.parametrize('more, sentence', [
    (['--model', 'gpt'], "cannot read model 'gpt'"), (['--model', 'hf:./nowhere'], "cannot open './nowhere'"), (['--model', 'clear:nowhere'], 'no checkpoint at nowhere'),
    (['--model', 'python:no.such:f'], 'cannot find the function'), (['--model', 'server:m@ftp://h'], 'must look like http'), (['--data', 'nowhere'], 'no benchmark at nowhere'),
    (['--set', 'heat=1'], "unexpected keyword argument 'heat'"), (['--set', 'heat'], 'write NAME=VALUE'), (['--batch', '-1'], 'at least one sample')])
def test_command_refusals(data, tmp_path, more, sentence, capsys):
    "One sentence on standard error, status 2, nothing on standard output."
    assert main(command(data, tmp_path, *more)) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.startswith('clear-nb: ') and said.err.count('\n') == 1 and said.out == ''


def test_entry_point_knows_both(capsys):
    "The console script explains both commands."
    for argv, words in {('--help',): ('answer', 'bench'), ('bench', '--help'): ('--model', '--data', '--severity', '--limit', '--instruction'), ('answer', '--help'): ('--image', '--question')}.items():
        with pytest.raises(SystemExit) as e: main(list(argv))
        said = capsys.readouterr().out
        assert e.value.code == 0 and all(w in said for w in words)


@pytest.mark.slow
def test_launched(whole, tmp_path):
    "Two processes, started as `accelerate launch` starts them, share the rows by themselves."
    (tmp_path/'job.py').write_text(child('guess', tmp_path/'r'))
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(tmp_path/'job.py')], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path/'r').glob('finished-*')) == ['finished-0-of-2.json', 'finished-1-of-2.json']
    assert results(tmp_path/'r').equals(whole)
