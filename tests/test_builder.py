"""The training data builder on a look-alike of LLaVA-OneVision with a misbehaving annotator."""
import hashlib
import json
import multiprocessing
import re
import signal
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builder_rows import BAD, Misbehaving, base, build_here, expected, good_row, write_source
from clear_nb import bench, builder as bd
from clear_nb.adapters import CallableAdapter, Reply, ServerAdapter
from clear_nb.core import read_records
from clear_nb.report import table8
from clear_nb.reward import right
from clear_nb.server import Server
from clear_nb.trajectory import parse
from fake_server import Drop, FakeServer, Status, hasty

N, ROWS = 60, 600
RECIPE = bd.Recipe(n=N, share=1., spare=100., relative=True)


@pytest.fixture(scope='module')
def source(tmp_path_factory): return write_source(tmp_path_factory.mktemp('look-alike'), ROWS)


def asks(url, **kw): return Server('fake', url, timeout=.25, **kw)


def build(source, url, out, recipe=RECIPE, adapter=None, **kw):
    settings = dict(workers=4, progress=False) | kw
    return bd.build_training(bd.open_folder(source), adapter or CallableAdapter(base, 'base'), asks(url), out, recipe, **settings)


@pytest.fixture(scope='module')
def built(source, tmp_path_factory):
    """Folder and manifest of an undisturbed build, and what was asked for it."""
    out, patch = tmp_path_factory.mktemp('built')/'out', pytest.MonkeyPatch()
    patch.setattr('openai._base_client.INITIAL_RETRY_DELAY', .01)
    with FakeServer(default=Misbehaving()) as server: manifest = build(source, server.url, out)
    patch.undo()
    return out, manifest, server.requests


def examples(out, part): return [r for p in sorted(out.glob(f'{part}-*.parquet')) for r in pq.read_table(p).to_pylist()]


def test_every_row_is_accounted_for(built):
    """The accounts add up; each fault is rejected by its reason, with its place; the damaged shard is named."""
    out, m, _ = built
    a = m['accounts']
    assert a['rows'] == ROWS == sum(v for k, v in a.items() if k not in ('rows', 'examples', 'unreadable_shards')) + sum(a['examples'].values())
    assert m['rejected']['row'] == dict(sorted({**expected(ROWS), 'unreadable shard': 1}.items())) and a['no_reply'] == a['not_drawn'] == 0
    lines = [json.loads(line) for line in (out/'rejects.jsonl').open()]
    assert Counter(r['reason'] for r in lines) == Counter(m['rejected']['row']) + Counter(m['rejected']['trace']) and all(r['place'] for r in lines)
    assert [r['place'] for r in lines if r['reason'] == 'unreadable shard'] == ['two/train-damaged.parquet']
    (short,) = [r for r in lines if r['reason'] == 'too small'][:1]
    name, row = short['place'].split(':')
    assert pq.read_table(next(out.parent.parent.glob(f'look-alike*/{name}'))).to_pylist()[int(row)]['image']['bytes'][:4] == b'\x89PNG'


def test_the_look_alike_has_every_fault():
    """Each reason that a row can be rejected for is tried, but for one that no picture of the look-alike has."""
    assert set(bd.REASONS) - set(BAD) == {'unreadable shard', 'cannot be degraded'}


def test_examples(built):
    """Half and half; every trace follows the grammar of its pathway and ends with the true answer; RL has no traces."""
    out, m, _ = built
    sft, rl = examples(out, 'sft'), examples(out, 'rl')
    assert Counter(r['restore'] for r in sft) == Counter(r['restore'] for r in rl) == {True: N//2, False: N//2}
    for r in sft:
        said = parse(r['texts'])
        assert said.valid and said.restored == r['restore'] and right(bd.sample_of(r), said.answer)
    assert not any(r['texts'] for r in rl)
    for r in sft + rl: # the pathway is the base model's failure
        said = base(None, r['question'])
        assert r['restore'] == (not right(bd.sample_of(r), said))


def test_splits_are_disjoint(built):
    """No picture is in both parts, however it is encoded; nothing is in a part twice."""
    out, _, _ = built
    pixels = {p: [hashlib.sha256(np.asarray(bd.read_picture(r['image'], RECIPE)[0]).tobytes()).hexdigest() for r in examples(out, p)] for p in bd.PARTS}
    assert not set(pixels['sft']) & set(pixels['rl'])
    keys = [r['key'] for p in bd.PARTS for r in examples(out, p)]
    assert len(keys) == len(set(keys)) == 2*N
    png, jpeg = (bd.candidate(good_row(5, **how), '', '', RECIPE) for how in (dict(compress_level=0), dict(compress_level=9)))
    assert png['image'] != jpeg['image'] and (png['part'], png['key']) == (jpeg['part'], jpeg['key'])


def test_replies(built):
    """Nothing that was answered is asked twice; every reply is kept; at most three regenerations; faults are counted."""
    out, m, requests = built
    kept = [json.loads(line) for line in (out/'annotator.jsonl').open()]
    assert len({k['key'] for k in kept}) == len(kept) and max(Counter(k['row'] for k in kept).values()) <= 4
    asked = Counter(map(Misbehaving.name, requests))
    assert len(asked) == len(kept) and len(requests) > len(kept) # some had to be asked again, for they were not answered
    usable = len(kept) - sum(m['faults'].values())
    assert usable == N and set(m['faults']) == set(bd.FAULTS) - {'answer revealed'}
    assert set(m['rejected']['trace']) <= set(bd.FAULTS) and 0 < m['accounts']['rejected_traces'] == sum(m['rejected']['trace'].values())


def test_blank_thoughts_are_no_trace():
    """An annotator that leaves a thought or the answer blank has not followed the form."""
    row = dict(source='s', key='0', question='Which animal?', answer='zebra', options='{}', corruption='', severity='clean')
    assert bd.trace_fault('<think>stripes</think><answer>zebra</answer>', row, False) == ''
    for first in ('', '<think> </think><image_restore>'):
        for rest in ('<think> \n</think><answer>zebra</answer>', '<think>stripes</think><answer> </answer>'):
            assert bd.trace_fault(first + rest, row, bool(first)) == 'no trajectory'
    assert bd.trace_fault('<think> </think><image_restore><think>stripes</think><answer>zebra</answer>', row, True) == 'no trajectory'


def test_two_builds_are_equal(built, source, tmp_path, hasty):
    """Another number of workers and threads, an annotator without outages: the same bytes."""
    out, _, _ = built
    with FakeServer(default=Misbehaving(outages=False)) as server: build(source, server.url, tmp_path/'again', workers=1, threads=2)
    names = ['manifest.json', *json.loads((out/'manifest.json').read_text())['files']]
    assert all((out/n).read_bytes() == (tmp_path/'again'/n).read_bytes() for n in names)


@pytest.fixture(scope='module')
def start():
    """Start a build in a process of its own, which is forked from a small one that has imported everything; process, end of a pipe."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['builder_rows', 'clear_nb.builder', 'clear_nb.adapters', 'datasets'])
    def begin(source, out, url, limit=None):
        here, there = context.Pipe(False)
        p = context.Process(target=build_here, args=(source, out, url, N, limit, there))
        p.start()
        there.close()
        return p, here
    return begin


def ended(p, seconds=240):
    """The exit status of a process; one that has not ended by then is killed."""
    p.join(seconds)
    late = p.is_alive()
    p.kill(); p.join()
    return f'no end within {seconds} s' if late else p.exitcode


def lines(path): return path.read_bytes().count(b'\n') if path.exists() else 0


def test_killed_and_resumed(built, source, tmp_path, start):
    """kill -9 while the base answers and while traces are written; the result is the undisturbed one, and no answered request comes twice."""
    out = tmp_path/'killed'
    with FakeServer(default=Misbehaving(pause=.01)) as server:
        for path, least in (('base.jsonl', 100), ('annotator.jsonl', 30)):
            p, _ = start(source, out, server.url)
            until = time.monotonic() + 240
            while lines(out/path) < least and p.is_alive() and time.monotonic() < until: time.sleep(.002)
            p.kill()
            p.join()
            assert p.exitcode == -signal.SIGKILL and lines(out/path) >= least and not (out/'manifest.json').exists()
        time.sleep(.5) # what was on its way has arrived
        answered, before = lines(out/'annotator.jsonl'), list(server.requests)
        first = {k['key'] for k in map(json.loads, (out/'annotator.jsonl').read_text().splitlines()[:answered])}
        p, _ = start(source, out, server.url)
        assert ended(p) == 0
        names, later = set(map(Misbehaving.name, before)), Counter(map(Misbehaving.name, server.requests[len(before):]))
        repeated = len(names & set(later))
    assert len(names) - len(first) <= 4 and repeated <= 4 # the four that were on their way
    assert (out/'manifest.json').read_bytes() == (built[0]/'manifest.json').read_bytes()
    assert len(set(map(Misbehaving.name, server.requests))) == lines(out/'annotator.jsonl') == lines(built[0]/'annotator.jsonl')


def test_annotator_goes_away(built, source, tmp_path, hasty):
    """A server that dies ends the build with one sentence; no row is rejected for it, and the rest is asked later."""
    inner, down = Misbehaving(outages=False), []
    def dies(request): return Drop() if down else inner(request)
    with FakeServer(default=dies) as server:
        def stop(request):
            if len(server.requests) > 25: down.append(1)
            return dies(request)
        server.default = stop
        with pytest.raises(ConnectionError, match='the annotator does not answer: APIConnectionError'): build(source, server.url, tmp_path/'out', patience=0)
        kept = lines(tmp_path/'out'/'annotator.jsonl')
        assert 20 <= kept <= 26 and not (tmp_path/'out'/'manifest.json').exists()
        server.default = inner
        m = build(source, server.url, tmp_path/'out')
    assert m == built[1]


def test_pause(source, tmp_path, hasty):
    """A silent server is waited for."""
    script = [Status(503)]*16
    with FakeServer(script, default=Misbehaving(outages=False)) as server: m = build(source, server.url, tmp_path/'out', bd.Recipe(n=4, share=1., spare=2., relative=True), patience=30)
    assert m['accounts']['examples'] == dict(sft=4, rl=4)


def test_wrong_settings_stop_at_once(source, tmp_path, hasty):
    """A key that is refused and a request that no server takes end the build before anything is rejected."""
    small = bd.Recipe(n=4, share=1., spare=2., relative=True)
    with FakeServer(default=Status(401, 'bad key sk-secret')) as server:
        with pytest.raises(PermissionError, match='refused the key'): build(source, server.url, tmp_path/'out', small)
    with FakeServer(default=Status(400, 'unknown field')) as server:
        with pytest.raises(ValueError, match='declines every request.*unknown field'): build(source, server.url, tmp_path/'out', small)
    assert lines(tmp_path/'out'/'annotator.jsonl') == 0


@pytest.mark.parametrize('setting, why', [('share=abc', "share must be float, got 'abc'"), ('n=1.5', 'n must be int'), ('spare=[1', 'spare must be float'), ('relative=1', 'relative must be bool'), ('shares=1', "did you mean 'share'")])
def test_recipe_of_the_command_line(setting, why):
    """Another type than that of the recipe, another name."""
    with pytest.raises(ValueError, match=re.escape(why)): bd.recipe_of([setting])


class Moody(CallableAdapter):
    """Gives no reply to some rows."""
    def __call__(self, samples): return [Reply(None, 'outage', 'too long') if '3)' in s.question else r for s, r in zip(samples, super().__call__(samples))]


def test_base_without_a_reply(source, tmp_path, hasty):
    """The run stops at the end of the stage, or leaves the rows out when told to; they are counted apart."""
    small = bd.Recipe(n=4, share=1., spare=10., relative=True, drop_silent=False)
    with FakeServer(default=Misbehaving(outages=False)) as server:
        with pytest.raises(ConnectionError, match=r'no reply to \d+ of 80 rows \(first: too long\)'): build(source, server.url, tmp_path/'a', small, Moody(base, 'base'))
        assert server.requests == []
        m = build(source, server.url, tmp_path/'b', bd.Recipe(n=4, share=1., spare=10., relative=True, drop_silent=True), Moody(base, 'base'))
    assert m['accounts']['no_reply'] > 0 and m['accounts']['examples'] == dict(sft=4, rl=4)


def test_base_server_refuses(source, tmp_path, hasty):
    """What the server of the base model said before it refused is kept; only the rest is asked when it takes requests again."""
    small = bd.Recipe(n=4, share=1., spare=10., relative=True)
    bd.select(bd.open_folder(source), tmp_path, small, progress=False)
    with FakeServer(['yes']*5, default=Status(401)) as server:
        def ask(): return bd.answer_all(ServerAdapter('m', server.url, workers=1), tmp_path, small, progress=False)
        with pytest.raises(PermissionError, match='refused the key'): ask()
        assert lines(tmp_path/'base.jsonl') == 5 and len(server.requests) == 6
        server.default = 'no'
        assert len(ask()) == 80 == len(server.requests) - 1


def test_full_disk(built, source, tmp_path, start):
    """A file that cannot grow ends the build with one sentence; with room it goes on to the same result."""
    out = tmp_path/'out'
    with FakeServer(default=Misbehaving(outages=False)) as server:
        for limit in (200_000, 10_000): # a file of candidates, the replies of the base model
            if limit == 10_000: bd.select(bd.open_folder(source), out, RECIPE, progress=False)
            p, pipe = start(source, out, server.url, limit)
            said = pipe.recv() if pipe.poll(240) else 'nothing said'
            ended(p)
            assert 'the disk is full; make room and start' in said and not list(out.rglob('*.tmp*'))
        p, _ = start(source, out, server.url)
        assert ended(p) == 0
    assert (out/'manifest.json').read_bytes() == (built[0]/'manifest.json').read_bytes()


def test_damaged_candidates(source, tmp_path, hasty):
    """A file of the build that was damaged is named."""
    select = lambda: bd.select(bd.open_folder(source), tmp_path, RECIPE, progress=False)
    select()
    first = sorted(tmp_path.glob('candidates/*.parquet'))[0]
    first.write_bytes(first.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f'{first.name} is damaged.*delete it and the files behind it'): select()


def test_share(source, tmp_path):
    """Rows are drawn by content: about the share, the same ones whatever else there is."""
    bd.select(bd.open_folder(source), tmp_path/'a', bd.Recipe(n=N, share=.3, spare=100., relative=True), progress=False)
    (path,) = bd._candidate_files(tmp_path/'a')
    found = bd.Found.of(path)
    assert .6*ROWS < found.counts['not drawn'] < .8*ROWS
    half = tmp_path/'half'
    write_source(half, ROWS, shards=2)
    bd.select(bd.open_folder(half), tmp_path/'b', bd.Recipe(n=N, share=.3, spare=100., relative=True), progress=False)
    keys = lambda out: {c['key'] for f in bd._candidate_files(out) for c in bd._columns(f, ['key'])}
    assert keys(tmp_path/'a') == keys(tmp_path/'b')


def test_written_by_datasets(tmp_path):
    """Shards with the picture type of `datasets`, as on the hub; a broken picture does not end the shard."""
    from datasets import Dataset, Features, Image, List, Value
    kinds = Features(id=Value('string'), image=Image(), conversations=List({'from': Value('string'), 'value': Value('string')}), data_source=Value('string'))
    made = [good_row(0), BAD['undecodable picture'](1), good_row(2)]
    Dataset.from_list(made, features=kinds).to_parquet(tmp_path/'in'/'x.parquet') if (tmp_path/'in').mkdir() is None else None
    bd.select(bd.open_folder(tmp_path/'in'), tmp_path/'out', RECIPE, progress=False)
    (path,) = bd._candidate_files(tmp_path/'out')
    assert [c['id'] for c in bd._columns(path, ['id'])] == ['0', '2'] and bd.Found.of(path).rejects[0][1] == 'undecodable picture'


def test_rows_train(built, tmp_path, monkeypatch):
    """A finished build feeds all three stages, by the commands that run them at 7B."""
    from clear_nb import bridge, grpo, sft
    from clear_nb.core import PATHS, ROOT, load_preset
    from clear_nb.data import open_training
    from clear_nb.model import ClearModel
    monkeypatch.setattr(PATHS, 'runs', tmp_path)
    seen = []
    monkeypatch.setattr(sft, 'open_training', lambda folder, part, model: seen.append((folder, part)) or open_training(folder, part, model))
    monkeypatch.setattr(grpo, 'open_training', sft.open_training)
    monkeypatch.setattr(grpo, 'LLMJudge', lambda *a, **k: seen.append(a) or grpo.RuleJudge())
    for stage in (sft, bridge, grpo): stage.main([str(ROOT/'params'/'smoke.yaml'), '--source', str(built[0]), *(['--judge', 'judge@http://localhost/v1'] if stage is grpo else [])])
    assert seen.pop(2) == ('judge', 'http://localhost/v1')
    assert seen == [(str(built[0]), p) for p in ('sft', 'sft', 'rl')]
    before, after = (ClearModel.from_pretrained(tmp_path/'smoke'/'seed0'/n) for n in ('sft', 'grpo'))
    assert load_preset('smoke').grpo.steps and not torch.equal(before.vae2llm.weight, after.vae2llm.weight) and torch.isfinite(after.vae2llm.weight).all()


def test_command(built, source, tmp_path, hasty, capsys):
    """`clear-nb build-data`: an estimate, a build with its Table 8, a sentence for what is wrong."""
    common = ['build-data', '--source', str(source), '--base', 'python:builder_rows:base', '--out', str(tmp_path/'out'), '--n', '20', '--set', 'share=1', 'spare=4', 'relative=true']
    with FakeServer(default=Misbehaving(outages=False)) as server:
        ask = ['--annotator', f'fake@{server.url}']
        assert bench.main([*common, *ask, '--estimate', '--prices', '2', '8']) == 0 and server.requests == []
        assert capsys.readouterr().out.startswith('20 traces: 20 to 80 requests')
        assert bench.main([*common, *ask]) == 0
    told = capsys.readouterr().out
    assert 'examples: sft 20, rl 20' in told and 'average trace length generate' in told
    (record,) = read_records('paper', root=tmp_path/'out'/'record')
    t = table8([record], scale='x').set_index('property')['ours, x']
    assert (t['total samples'], t['direct answer samples'], t['grpo set']) == (20, 10, 20) and t['average trace length generate'] > t['average trace length direct']
    assert bench.main([*common, '--annotator', 'fake@http://127.0.0.1:9/v1', '--seed', '3']) == 2
    assert 'begun with other settings: recipe' in capsys.readouterr().err
    assert bench.main([*common[:2], 'nowhere', *common[3:], '--annotator', 'fake@http://127.0.0.1:9/v1']) == 2
    assert capsys.readouterr().err == 'clear-nb: no parquet file in nowhere: name the folder that holds the data set.\n'


def test_short_source(source, tmp_path, hasty, capsys):
    """A source that holds too few rows gives fewer examples, balanced, and says so."""
    with FakeServer(default=Misbehaving(outages=False)) as server:
        args = ['build-data', '--source', str(source), '--base', 'python:builder_rows:base', '--out', str(tmp_path/'out'), '--n', '2000', '--set', 'share=1', 'relative=true']
        assert bench.main([*args, '--annotator', f'fake@{server.url}', '--workers', '2']) == 1
    out = capsys.readouterr()
    assert 'fewer examples than the 2,000 wanted' in out.err
    m = bd.read_manifest(tmp_path/'out')['statistics']
    assert m['direct'] == m['restore'] > 50
