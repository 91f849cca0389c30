"""The training data builder on a look-alike of LLaVA-OneVision with a misbehaving annotator."""

import hashlib
import json
import multiprocessing
import re
import shutil
import signal
import time
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builder_rows import (
    BAD,
    Misbehaving,
    base,
    build_here,
    expected,
    good_row,
    grade,
    talkative,
    write_source,
)
from fake_server import Drop, FakeServer, Status, hasty

from clear_nb import cli
from clear_nb.adapters import CallableAdapter, ServerAdapter
from clear_nb.annotate import TRACE_FAULTS, trace_fault
from clear_nb.builder import build_summary, build_training
from clear_nb.candidates import (
    TEXT_COLUMNS,
    SelectionLog,
    candidate_files,
    make_candidate,
    read_columns,
    select_questions,
)
from clear_nb.judge import LLMJudge, Replies
from clear_nb.pathways import (
    answer_questions,
    base_is_right,
    pathways_of,
    route_questions,
    row_of_candidate,
)
from clear_nb.records import read_records
from clear_nb.reward import rule_says_right
from clear_nb.rows import BenchmarkRow
from clear_nb.server import Server
from clear_nb.sources import (
    SOURCE_REJECT_REASONS,
    TRAINING_PARTS,
    BuildRecipe,
    open_folder,
    read_picture,
    read_recipe,
)
from clear_nb.stored import read_manifest
from clear_nb.tables import table8
from clear_nb.trajectory import parse
from clear_nb.wording import INSTRUCTION, Reply

N, ROWS = 60, 600
RECIPE = BuildRecipe(n=N, share=1.0, spare=100.0, relative=True)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp('look-alike'), ROWS)


def asks(url, **kw):
    return Server('fake', url, timeout=0.25, **kw)


def build(source, url, out, recipe=RECIPE, adapter=None, **kw):
    settings = dict(workers=4, progress=False) | kw
    return build_training(
        open_folder(source),
        adapter or CallableAdapter(base, 'base'),
        asks(url),
        out,
        recipe,
        **settings,
    )


@pytest.fixture(scope='module')
def built(source, tmp_path_factory):
    """Folder and manifest of an undisturbed build, and what was asked for it."""
    out, patch = tmp_path_factory.mktemp('built') / 'out', pytest.MonkeyPatch()
    patch.setattr('openai._base_client.INITIAL_RETRY_DELAY', 0.01)
    with FakeServer(default=Misbehaving()) as server:
        manifest = build(source, server.url, out)
    patch.undo()
    return out, manifest, server.requests


def examples(out, part):
    return [r for p in sorted(out.glob(f'{part}-*.parquet')) for r in pq.read_table(p).to_pylist()]


def test_every_row_is_accounted_for(built):
    """The accounts add up; each fault is rejected by its reason, with its place; the damaged shard
    is named."""
    out, m, _ = built
    a = m['accounts']
    assert (
        a['rows']
        == ROWS
        == sum(v for k, v in a.items() if k not in ('rows', 'examples', 'unreadable_shards'))
        + sum(a['examples'].values())
    )
    assert (
        m['rejected']['row'] == dict(sorted({**expected(ROWS), 'unreadable shard': 1}.items()))
        and a['no_reply'] == a['not_drawn'] == 0
    )
    lines = [json.loads(line) for line in (out / 'rejects.jsonl').open(encoding='utf-8')]
    assert Counter(r['reason'] for r in lines) == Counter(m['rejected']['row']) + Counter(
        m['rejected']['trace']
    ) and all(r['place'] for r in lines)
    assert [r['place'] for r in lines if r['reason'] == 'unreadable shard'] == [
        'two/train-damaged.parquet'
    ]
    (short,) = [r for r in lines if r['reason'] == 'too small'][:1]
    name, row = short['place'].split(':')
    assert (
        pq.read_table(next(out.parent.parent.glob(f'look-alike*/{name}'))).to_pylist()[int(row)][
            'image'
        ]['bytes'][:4]
        == b'\x89PNG'
    )


def test_the_look_alike_has_every_fault():
    """Each reason that a row can be rejected for is tried, but for one that no picture of the
    look-alike has."""
    assert set(SOURCE_REJECT_REASONS) - set(BAD) == {'unreadable shard', 'cannot be degraded'}


def test_examples(built):
    """Half and half; every trace follows the grammar of its pathway and ends with the true answer;
    RL has no traces."""
    out, m, _ = built
    sft, rl = examples(out, 'sft'), examples(out, 'rl')
    assert (
        Counter(r['restore'] for r in sft)
        == Counter(r['restore'] for r in rl)
        == {True: N // 2, False: N // 2}
    )
    for r in sft:
        said = parse(r['texts'])
        assert (
            said.valid
            and said.restored == r['restore']
            and rule_says_right(row_of_candidate(r), said.answer)
        )
    assert not any(r['texts'] for r in rl)
    for r in sft + rl:  # the pathway is the base model's failure
        said = base(None, r['question'])
        assert r['restore'] == (not rule_says_right(row_of_candidate(r), said))


def test_splits_are_disjoint(built):
    """No picture is in both parts, however it is encoded; nothing is in a part twice."""
    out, _, _ = built
    pixels = {
        p: [
            hashlib.sha256(np.asarray(read_picture(r['image'], RECIPE)[0]).tobytes()).hexdigest()
            for r in examples(out, p)
        ]
        for p in TRAINING_PARTS
    }
    assert not set(pixels['sft']) & set(pixels['rl'])
    keys = [r['key'] for p in TRAINING_PARTS for r in examples(out, p)]
    assert len(keys) == len(set(keys)) == 2 * N
    png, jpeg = (
        make_candidate(good_row(5, **how), '', '', RECIPE)
        for how in (dict(compress_level=0), dict(compress_level=9))
    )
    assert png['image'] != jpeg['image'] and (png['part'], png['key']) == (
        jpeg['part'],
        jpeg['key'],
    )


def test_replies(built):
    """Nothing that was answered is asked twice; every reply is kept; at most three regenerations;
    faults are counted."""
    out, m, requests = built
    kept = [json.loads(line) for line in (out / 'annotator.jsonl').open(encoding='utf-8')]
    assert (
        len({k['key'] for k in kept}) == len(kept)
        and max(Counter(k['row'] for k in kept).values()) <= 4
    )
    asked = Counter(map(Misbehaving.name, requests))
    assert len(asked) == len(kept) and len(requests) > len(
        kept
    )  # some had to be asked again, for they were not answered
    usable = len(kept) - sum(m['faults'].values())
    assert usable == N and set(m['faults']) == set(TRACE_FAULTS) - {'answer revealed'}
    assert set(m['rejected']['trace']) <= set(TRACE_FAULTS) and 0 < m['accounts'][
        'rejected_traces'
    ] == sum(m['rejected']['trace'].values())


def test_blank_thoughts_are_no_trace():
    """An annotator that leaves a thought or the answer blank has not followed the form."""
    row = dict(
        source='s',
        key='0',
        question='Which animal?',
        answer='zebra',
        options='{}',
        corruption='',
        severity='clean',
    )
    assert trace_fault('<think>stripes</think><answer>zebra</answer>', row, False) == ''
    for first in ('', '<think> </think><image_restore>'):
        for rest in (
            '<think> \n</think><answer>zebra</answer>',
            '<think>stripes</think><answer> </answer>',
        ):
            assert trace_fault(first + rest, row, bool(first)) == 'no trajectory'
    assert (
        trace_fault(
            '<think> </think><image_restore><think>stripes</think><answer>zebra</answer>', row, True
        )
        == 'no trajectory'
    )


def test_two_builds_are_equal(built, source, tmp_path, hasty):
    """Another number of workers and threads, an annotator without outages: the same bytes."""
    out, _, _ = built
    with FakeServer(default=Misbehaving(outages=False)) as server:
        build(source, server.url, tmp_path / 'again', workers=1, threads=2)
    names = ['manifest.json', *json.loads((out / 'manifest.json').read_text())['files']]
    assert all((out / n).read_bytes() == (tmp_path / 'again' / n).read_bytes() for n in names)


@pytest.fixture(scope='module')
def start():
    """Start a build in a process of its own, which is forked from a small one that has imported
    everything; process, end of a pipe."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(
        ['builder_rows', 'clear_nb.builder', 'clear_nb.adapters', 'datasets']
    )

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
    p.kill()
    p.join()
    return f'no end within {seconds} s' if late else p.exitcode


def lines(path):
    return path.read_bytes().count(b'\n') if path.exists() else 0


def test_killed_and_resumed(built, source, tmp_path, start):
    """kill -9 while the base answers and while traces are written; the result is the undisturbed
    one, and no answered request comes twice."""
    out = tmp_path / 'killed'
    with FakeServer(default=Misbehaving(pause=0.01)) as server:
        for path, least in (('base.jsonl', 100), ('annotator.jsonl', 30)):
            p, _ = start(source, out, server.url)
            until = time.monotonic() + 240
            while lines(out / path) < least and p.is_alive() and time.monotonic() < until:
                time.sleep(0.002)
            p.kill()
            p.join()
            assert (
                p.exitcode == -signal.SIGKILL
                and lines(out / path) >= least
                and not (out / 'manifest.json').exists()
            )
        time.sleep(0.5)  # what was on its way has arrived
        answered, before = lines(out / 'annotator.jsonl'), list(server.requests)
        first = {
            k['key']
            for k in map(json.loads, (out / 'annotator.jsonl').read_text().splitlines()[:answered])
        }
        p, _ = start(source, out, server.url)
        assert ended(p) == 0
        names, later = (
            set(map(Misbehaving.name, before)),
            Counter(map(Misbehaving.name, server.requests[len(before) :])),
        )
        repeated = len(names & set(later))
    assert len(names) - len(first) <= 4 and repeated <= 4  # the four that were on their way
    assert (out / 'manifest.json').read_bytes() == (built[0] / 'manifest.json').read_bytes()
    assert (
        len(set(map(Misbehaving.name, server.requests)))
        == lines(out / 'annotator.jsonl')
        == lines(built[0] / 'annotator.jsonl')
    )


def test_annotator_goes_away(built, source, tmp_path, hasty):
    """A server that dies ends the build with one sentence; no row is rejected for it, and the rest
    is asked later."""
    inner, down = Misbehaving(outages=False), []

    def dies(request):
        return Drop() if down else inner(request)

    with FakeServer(default=dies) as server:

        def stop(request):
            if len(server.requests) > 25:
                down.append(1)
            return dies(request)

        server.default = stop
        with pytest.raises(
            ConnectionError, match='the annotator does not answer: APIConnectionError'
        ):
            build(source, server.url, tmp_path / 'out', patience=0)
        kept = lines(tmp_path / 'out' / 'annotator.jsonl')
        assert 20 <= kept <= 26 and not (tmp_path / 'out' / 'manifest.json').exists()
        server.default = inner
        m = build(source, server.url, tmp_path / 'out')
    assert m == built[1]


def test_pause(source, tmp_path, hasty):
    """A silent server is waited for."""
    script = [Status(503)] * 16
    with FakeServer(script, default=Misbehaving(outages=False)) as server:
        m = build(
            source,
            server.url,
            tmp_path / 'out',
            BuildRecipe(n=4, share=1.0, spare=2.0, relative=True),
            patience=30,
        )
    assert m['accounts']['examples'] == dict(sft=4, rl=4)


def test_wrong_settings_stop_at_once(source, tmp_path, hasty):
    """A key that is refused and a request that no server takes end the build before anything is
    rejected."""
    small = BuildRecipe(n=4, share=1.0, spare=2.0, relative=True)
    with FakeServer(default=Status(401, 'bad key sk-secret')) as server:
        with pytest.raises(PermissionError, match='refused the key'):
            build(source, server.url, tmp_path / 'out', small)
    with FakeServer(default=Status(400, 'unknown field')) as server:
        with pytest.raises(ValueError, match='declines every request.*unknown field'):
            build(source, server.url, tmp_path / 'out', small)
    assert lines(tmp_path / 'out' / 'annotator.jsonl') == 0


@pytest.mark.parametrize(
    'setting, why',
    [
        ('share=abc', "share must be float, got 'abc'"),
        ('n=1.5', 'n must be int'),
        ('spare=[1', 'spare must be float'),
        ('relative=1', 'relative must be bool'),
        ('shares=1', "did you mean 'share'"),
    ],
)
def test_recipe_of_the_command_line(setting, why):
    """Another type than that of the recipe, another name."""
    with pytest.raises(ValueError, match=re.escape(why)):
        read_recipe([setting])


class Moody(CallableAdapter):
    """Gives no reply to some rows."""

    def __call__(self, samples):
        return [
            Reply(None, 'outage', 'too long') if '3)' in s.question else r
            for s, r in zip(samples, super().__call__(samples))
        ]


def test_base_without_a_reply(source, tmp_path, hasty):
    """The run stops at the end of the stage, or leaves the rows out when told to; they are counted
    apart."""
    small = BuildRecipe(n=4, share=1.0, spare=10.0, relative=True, drop_silent=False)
    with FakeServer(default=Misbehaving(outages=False)) as server:
        with pytest.raises(
            ConnectionError, match=r'no reply to \d+ of 80 rows \(first: too long\)'
        ):
            build(source, server.url, tmp_path / 'a', small, Moody(base, 'base'))
        assert server.requests == []
        m = build(
            source,
            server.url,
            tmp_path / 'b',
            BuildRecipe(n=4, share=1.0, spare=10.0, relative=True, drop_silent=True),
            Moody(base, 'base'),
        )
    assert m['accounts']['no_reply'] > 0 and m['accounts']['examples'] == dict(sft=4, rl=4)


def test_base_server_refuses(source, tmp_path, hasty):
    """What the server of the base model said before it refused is kept; only the rest is asked
    when it takes requests again."""
    small = BuildRecipe(n=4, share=1.0, spare=10.0, relative=True)
    select_questions(open_folder(source), tmp_path, small, progress=False)
    with FakeServer(['yes'] * 5, default=Status(401)) as server:

        def ask():
            return answer_questions(
                ServerAdapter('m', server.url, workers=1), tmp_path, small, progress=False
            )

        with pytest.raises(PermissionError, match='refused the key'):
            ask()
        assert lines(tmp_path / 'base.jsonl') == 5 and len(server.requests) == 6
        server.default = 'no'
        assert len(ask()) == 80 == len(server.requests) - 1


# ---------------------------------------------------------------- was the base model right?


@pytest.mark.parametrize(
    'truth, said, right',
    [
        ('Yes', 'Yes, it is raining.', True),
        ('no', 'No.', True),
        ('yes', 'No, it is dry.', False),
        ('No', 'yes or no', False),
        ('yes', 'It rains.', False),
        ('2', '<think>one, or 2</think>2', True),
        ('2', '<think>2</think>one', False),
        ('black cat', 'A black cat.', True),
        ('black', 'The cat is black.', False),
    ],
)
def test_reading(truth, said, right):
    """Without its thoughts; yes and no out of a sentence, other words only where nothing else is
    said."""
    assert base_is_right(BenchmarkRow('x', '1', 'What?', truth, b''), said) == right


def test_reading_options():
    s = BenchmarkRow('x', '1', 'Is it?', 'B', b'', dict(A='yes', B='no'))
    assert all(
        base_is_right(s, said) for said in ('B', 'b', '(B) no', 'It is B.', 'no')
    ) and not any(base_is_right(s, said) for said in ('A', 'yes', 'A or B'))


JUDGED = BuildRecipe(n=8, share=1.0, spare=6.0, relative=True)


def asked_base(source, out, adapter, judge=None):
    """Stages A and B; by key: is the row on the restore pathway?, and should it be?"""
    select_questions(open_folder(source), out, JUDGED, progress=False)
    said = answer_questions(adapter, out, JUDGED, progress=False)
    rows = {r['key']: r for f in candidate_files(out) for r in read_columns(f, TEXT_COLUMNS)}
    truth = {
        k: not rule_says_right(row_of_candidate(r), base(None, r['question']))
        for k, r in rows.items()
    }
    return {
        c.key: c.restore for c in route_questions(out, said, JUDGED, judge, progress=False)
    }, truth


def judge_at(url, out, **kw):
    return LLMJudge('toy-judge', url, cache=out / 'judge.jsonl', **dict(timeout=5.0, tries=1) | kw)


def test_instruction(source, tmp_path, hasty, capsys):
    """A base model that talks is told to be short, and its right answers count; the instruction is
    a setting of the build."""

    def ask(out, *more):
        return cli.main(
            [
                'build-data',
                '--source',
                str(source),
                '--base',
                'python:builder_rows:obedient',
                '--annotator',
                'm',
                '--out',
                str(out),
                '--n',
                '8',
                '--set',
                'share=1',
                'spare=6',
                'relative=true',
                '--estimate',
                *more,
            ]
        )

    def ways(out):
        return asked_base(source, out, CallableAdapter(base, 'base'))

    assert ask(tmp_path / 'a') == ask(tmp_path / 'b', '--instruction', '') == 0
    (told, truth), (bare, _) = ways(tmp_path / 'a'), ways(tmp_path / 'b')
    assert told == truth and sum(bare.values()) > sum(truth.values()) + 10
    settings = [
        json.loads((tmp_path / n / 'building.json').read_text())['base']['instruction']
        for n in 'ab'
    ]
    assert settings == [INSTRUCTION, '']
    assert (
        ask(tmp_path / 'a', '--instruction', '') == 2
        and 'begun with other settings: base' in capsys.readouterr().err
    )


def test_judge(source, tmp_path, hasty):
    """A judge reads the sentences that the rule cannot; nothing is asked twice."""
    with FakeServer(default=grade) as server:
        by_rule, truth = asked_base(source, tmp_path, CallableAdapter(talkative, 'base'))
        assert sum(by_rule.values()) > sum(truth.values()) + 10
        assert (
            asked_base(
                source, tmp_path, CallableAdapter(talkative, 'base'), judge_at(server.url, tmp_path)
            )[0]
            == truth
        )
        n = len(server.requests)
        assert n == lines(tmp_path / 'judge.jsonl') <= len(truth)
        assert (
            asked_base(
                source, tmp_path, CallableAdapter(talkative, 'base'), judge_at(server.url, tmp_path)
            )[0]
            == truth
            and len(server.requests) == n
        )


def test_judge_reads_no_plain_answers(source, tmp_path, hasty):
    """What equals the truth is right without asking."""
    with FakeServer(default=grade) as server:
        ways, truth = asked_base(
            source, tmp_path, CallableAdapter(base, 'base'), judge_at(server.url, tmp_path)
        )
    assert ways == truth and len(server.requests) <= sum(truth.values())


def test_judge_goes_away(source, tmp_path, hasty):
    """Silence is no wrong answer: the run stops with one sentence and goes on where it was, or
    leaves the rows out when told to."""

    def ask():
        judge = judge_at(server.url, tmp_path)
        return asked_base(source, tmp_path, CallableAdapter(talkative, 'base'), judge)

    def some(request):
        return Status(503) if zlib.crc32(request.text.encode()) % 4 == 0 else grade(request)

    with FakeServer(default=grade) as server:
        server.default = some
        with pytest.raises(
            ConnectionError,
            match=r'the judge gave no reply about \d+ of \d+ answers \(first: .*\); start again',
        ):
            ask()
        kept = lines(tmp_path / 'judge.jsonl')
        said, light = Replies(tmp_path / 'base.jsonl'), replace(JUDGED, drop_silent=True)
        ways = [
            c.restore
            for c in route_questions(
                tmp_path, said, light, judge_at(server.url, tmp_path), progress=False
            )
        ]
        assert kept > 20 and ways.count(None) > 5 and True in ways and False in ways
        server.default = Status(503)
        with pytest.raises(ConnectionError, match='the judge'):
            ask()
        server.default, before = grade, len(server.requests)
        ways, truth = ask()
        assert (
            ways == truth
            and len(server.requests) - before == lines(tmp_path / 'judge.jsonl') - kept
        )
        server.default = Status(401, 'bad key')
        with pytest.raises(PermissionError, match='refused the key'):
            asked_base(
                source,
                tmp_path,
                CallableAdapter(talkative, 'base'),
                judge_at(server.url, tmp_path / 'other'),
            )


def test_silent_judge_ends_early(tmp_path, hasty):
    """A judge that answers nobody is not asked about everything."""
    asked = [(BenchmarkRow('x', '1', f'What is {k}?', 'a', b''), 'some b') for k in range(200)]
    with FakeServer(default=Status(503)) as server:
        with pytest.raises(ConnectionError, match='the judge does not answer'):
            pathways_of(asked, JUDGED, judge_at(server.url, tmp_path), 2, False)
        assert len(server.requests) == 16


def test_judge_talks_nonsense(source, tmp_path, hasty):
    """Rows that the judge says nothing of use about are in neither pathway, and counted; a judge
    that never does ends the build."""

    def odd(request):
        is_odd = zlib.crc32(request.text.encode()) % 5 == 0
        return 'Well, that depends.' if is_odd else grade(request)

    with (
        FakeServer(default=Misbehaving(outages=False)) as annotator,
        FakeServer(default=odd) as server,
    ):
        m = build(
            source,
            annotator.url,
            tmp_path / 'a',
            JUDGED,
            CallableAdapter(talkative, 'base'),
            judge=judge_at(server.url, tmp_path / 'a'),
        )
        a = m['accounts']
        assert a['unjudged'] > 5 and a['rows'] == sum(
            v for k, v in a.items() if k not in ('rows', 'examples', 'unreadable_shards')
        ) + sum(a['examples'].values())
        assert (
            a['examples'] == dict(sft=8, rl=8)
            and m['reading']['judge']['model'] == 'toy-judge'
            and f'{a["unjudged"]} unjudged' in build_summary(m)[0]
        )
        for r in examples(tmp_path / 'a', 'sft') + examples(tmp_path / 'a', 'rl'):
            assert r['restore'] == (
                not rule_says_right(row_of_candidate(r), base(None, r['question']))
            )
        with pytest.raises(ValueError, match='begun with other settings: reading'):
            build(source, annotator.url, tmp_path / 'a', JUDGED, CallableAdapter(talkative, 'base'))
        server.default = 'Well, that depends.'
        with pytest.raises(ValueError, match=r'the judge scored none of \d+ answers'):
            build(
                source,
                annotator.url,
                tmp_path / 'b',
                JUDGED,
                CallableAdapter(talkative, 'base'),
                judge=judge_at(server.url, tmp_path / 'b'),
            )


def test_judge_of_the_command(source, tmp_path, hasty, capsys):
    """`--estimate` asks nobody and says what the judge would have to read; the build asks exactly
    that."""
    common = [
        'build-data',
        '--source',
        str(source),
        '--base',
        'python:builder_rows:talkative',
        '--out',
        str(tmp_path / 'out'),
        '--n',
        '8',
        '--set',
        'share=1',
        'spare=6',
        'relative=true',
    ]
    with (
        FakeServer(default=Misbehaving(outages=False)) as annotator,
        FakeServer(default=grade) as server,
    ):
        ask = [
            *common,
            '--annotator',
            f'fake@{annotator.url}',
            '--judge',
            f'toy-judge@{server.url}',
            '--workers',
            '2',
        ]
        assert cli.main([*ask, '--estimate']) == 0 and annotator.requests == server.requests == []
        told = re.search(
            r'before that the judge has (\d+) answers to read \([\d,]+ tokens in\)',
            capsys.readouterr().out,
        )
        assert cli.main(ask) == 0 and len(server.requests) == int(told[1]) == lines(
            tmp_path / 'out' / 'judge.jsonl'
        )
    assert 'examples: sft 8, rl 8' in capsys.readouterr().out


def test_full_disk(built, source, tmp_path, start):
    """A file that cannot grow ends the build with one sentence; with room it goes on to the same
    result."""
    out = tmp_path / 'out'
    with FakeServer(default=Misbehaving(outages=False)) as server:
        for limit in (200_000, 10_000):  # a file of candidates, the replies of the base model
            if limit == 10_000:
                select_questions(open_folder(source), out, RECIPE, progress=False)
            p, pipe = start(source, out, server.url, limit)
            said = pipe.recv() if pipe.poll(240) else 'nothing said'
            ended(p)
            assert 'the disk is full; make room and start' in said and not list(out.rglob('*.tmp*'))
        p, _ = start(source, out, server.url)
        assert ended(p) == 0
    assert (out / 'manifest.json').read_bytes() == (built[0] / 'manifest.json').read_bytes()


def test_damaged_candidates(source, tmp_path, hasty):
    """A file of the build that was damaged is named."""

    def select():
        select_questions(open_folder(source), tmp_path, RECIPE, progress=False)

    select()
    first = sorted(tmp_path.glob('candidates/*.parquet'))[0]
    first.write_bytes(first.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=f'{first.name} is damaged.*delete it and the files behind it'
    ):
        select()


def test_share(source, tmp_path):
    """Rows are drawn by content: about the share, the same ones whatever else there is."""
    select_questions(
        open_folder(source),
        tmp_path / 'a',
        BuildRecipe(n=N, share=0.3, spare=100.0, relative=True),
        progress=False,
    )
    (path,) = candidate_files(tmp_path / 'a')
    found = SelectionLog.of(path)
    assert 0.6 * ROWS < found.counts['not drawn'] < 0.8 * ROWS
    half = tmp_path / 'half'
    write_source(half, ROWS, shards=2)
    select_questions(
        open_folder(half),
        tmp_path / 'b',
        BuildRecipe(n=N, share=0.3, spare=100.0, relative=True),
        progress=False,
    )

    def keys(out):
        return {c['key'] for f in candidate_files(out) for c in read_columns(f, ['key'])}

    assert keys(tmp_path / 'a') == keys(tmp_path / 'b')


def test_written_by_datasets(tmp_path):
    """Shards with the picture type of `datasets`, as on the hub; a broken picture does not end the
    shard."""
    from datasets import Dataset, Features, Image, List, Value

    kinds = Features(
        id=Value('string'),
        image=Image(),
        conversations=List({'from': Value('string'), 'value': Value('string')}),
        data_source=Value('string'),
    )
    made = [good_row(0), BAD['undecodable picture'](1), good_row(2)]
    Dataset.from_list(made, features=kinds).to_parquet(tmp_path / 'in' / 'x.parquet') if (
        tmp_path / 'in'
    ).mkdir() is None else None
    select_questions(open_folder(tmp_path / 'in'), tmp_path / 'out', RECIPE, progress=False)
    (path,) = candidate_files(tmp_path / 'out')
    assert [c['id'] for c in read_columns(path, ['id'])] == ['0', '2'] and SelectionLog.of(
        path
    ).rejects[0][1] == 'undecodable picture'


def test_rows_train(built, tmp_path, monkeypatch):
    """A finished build feeds all three stages, by the commands that run them at 7B."""
    from clear_nb import bridge, grpo, sft
    from clear_nb.core import PATHS, ROOT
    from clear_nb.model import ClearModel
    from clear_nb.presets import load_preset
    from clear_nb.stored import open_training

    monkeypatch.setattr(PATHS, 'runs', tmp_path)
    seen = []
    monkeypatch.setattr(
        sft,
        'open_training',
        lambda folder, part, model: (
            seen.append((folder, part)) or open_training(folder, part, model)
        ),
    )
    monkeypatch.setattr(grpo, 'open_training', sft.open_training)

    def judge(spec, cache, settings):
        seen.append((spec, settings))

    monkeypatch.setattr(grpo, 'open_judge', judge)
    set_judge = ['--judge', 'judge@http://localhost/v1', '--judge-set', 'tries=2']
    for stage in (sft, bridge, grpo):
        stage.main(
            [
                str(ROOT / 'params' / 'smoke.yaml'),
                '--source',
                str(built[0]),
                *(set_judge if stage is grpo else []),
            ]
        )
    assert seen.pop(2) == ('judge@http://localhost/v1', dict(patience=900.0, tries=2))
    assert seen == [(str(built[0]), p) for p in ('sft', 'sft', 'rl')]
    before, after = (
        ClearModel.from_pretrained(tmp_path / 'smoke' / 'seed0' / n) for n in ('sft', 'grpo')
    )
    assert (
        load_preset('smoke').grpo.steps
        and not torch.equal(before.vae2llm.weight, after.vae2llm.weight)
        and torch.isfinite(after.vae2llm.weight).all()
    )


def test_command(built, source, tmp_path, hasty, capsys):
    """`clear-nb build-data`: an estimate, a build with its Table 8, a sentence for what is
    wrong."""
    common = [
        'build-data',
        '--source',
        str(source),
        '--base',
        'python:builder_rows:base',
        '--out',
        str(tmp_path / 'out'),
        '--n',
        '20',
        '--set',
        'share=1',
        'spare=4',
        'relative=true',
    ]
    with FakeServer(default=Misbehaving(outages=False)) as server:
        ask = ['--annotator', f'fake@{server.url}']
        assert (
            cli.main([*common, *ask, '--estimate', '--prices', '2', '8']) == 0
            and server.requests == []
        )
        assert capsys.readouterr().out.startswith('20 traces: 20 to 80 requests')
        assert cli.main([*common, *ask]) == 0
    told = capsys.readouterr().out
    assert 'examples: sft 20, rl 20' in told and 'average trace length generate' in told
    (record,) = read_records('paper', root=tmp_path / 'out' / 'record')
    t = table8([record], scale='x').set_index('property')['ours, x']
    assert (t['total samples'], t['direct answer samples'], t['grpo set']) == (20, 10, 20) and t[
        'average trace length generate'
    ] > t['average trace length direct']
    assert cli.main([*common, '--annotator', 'fake@http://127.0.0.1:9/v1', '--seed', '3']) == 2
    assert 'begun with other settings: recipe' in capsys.readouterr().err
    assert (
        cli.main([*common[:2], 'nowhere', *common[3:], '--annotator', 'fake@http://127.0.0.1:9/v1'])
        == 2
    )
    assert (
        capsys.readouterr().err
        == 'clear-nb: no parquet file in nowhere: there is no such folder.\n'
    )


def test_short_source(source, tmp_path, hasty, capsys):
    """A source that holds too few rows gives fewer examples, balanced, and says so."""
    with FakeServer(default=Misbehaving(outages=False)) as server:
        args = [
            'build-data',
            '--source',
            str(source),
            '--base',
            'python:builder_rows:base',
            '--out',
            str(tmp_path / 'out'),
            '--n',
            '2000',
            '--set',
            'share=1',
            'relative=true',
        ]
        assert cli.main([*args, '--annotator', f'fake@{server.url}', '--workers', '2']) == 1
        out = capsys.readouterr()
        assert (
            cli.main(
                [
                    *args[:6],
                    str(tmp_path / 'new'),
                    *args[7:],
                    '--annotator',
                    'fake@http://127.0.0.1:9/v1',
                    '--estimate',
                ]
            )
            == 0
        )
    assert (
        'fewer examples than the 2,000 wanted' in out.err
        and 'traces (of 2,000 wanted: the source holds no more' in capsys.readouterr().out
    )
    m = read_manifest(tmp_path / 'out')['statistics']
    assert m['direct'] == m['restore'] > 50


def test_foreign_source(source, tmp_path, hasty, capsys):
    """Parquet files of something else: the columns are named; beside good shards they are
    rejects."""
    foreign = tmp_path / 'foreign'
    foreign.mkdir()
    pq.write_table(
        pa.Table.from_pylist([dict(index=1, reply='A')] * 300), foreign / 'results.parquet'
    )
    args = [
        'build-data',
        '--base',
        'python:builder_rows:base',
        '--n',
        '20',
        '--set',
        'share=1',
        'relative=true',
        '--annotator',
        'fake@http://127.0.0.1:9/v1',
        '--estimate',
    ]
    assert cli.main([*args, '--source', str(foreign), '--out', str(tmp_path / 'out')]) == 2
    err = capsys.readouterr().err
    assert (
        "no columns 'image' and 'conversations', but index, reply" in err
        and 'no row of' in err
        and 'Traceback' not in err
    )
    shutil.copytree(source, foreign / 'good')
    assert (
        cli.main([*args, '--source', str(foreign), '--out', str(tmp_path / 'both'), '--n', '2000'])
        == 0
    )
    assert (
        sum(
            r[1] == 'unreadable shard' and 'index, reply' in r[2]
            for f in candidate_files(tmp_path / 'both')
            for r in SelectionLog.of(f).rejects
        )
        == 1
    )


def test_nothing_drawn(source, tmp_path, hasty, capsys):
    """A share so small that no row is looked at is an error, and not an estimate of 0 traces."""
    args = [
        'build-data',
        '--base',
        'python:builder_rows:base',
        '--source',
        str(source),
        '--out',
        str(tmp_path / 'out'),
        '--n',
        '20',
        '--set',
        'share=1e-9',
        '--annotator',
        'm@http://127.0.0.1:9/v1',
        '--estimate',
    ]
    assert cli.main(args) == 2
    assert (
        'of which a share of 1e-09 is looked at; rejected: 1 x unreadable shard'
        in capsys.readouterr().err
    )
