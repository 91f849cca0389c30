"""Every fault that is injected on purpose: what the user sees, and what is kept. `python tests/test_faults.py` prints the table.

A row of FAULTS names a function below. It injects the fault, yields what the user saw, and then checks what was kept; most of
them go on after the fault and compare with a run that nothing disturbed.
"""

import base64
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import warnings
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from types import SimpleNamespace as Space

import builder_rows as look
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bench_rows import guess
from bench_rows import rows as questions
from fake_server import Drop, FakeServer, Status, hasty  # noqa: F401 (a fixture)
from kill_resume import Trap
from processes import python, waited
from test_bench import code, over_server, report, results, write_tsv
from test_bench_files import build as build_bench
from test_bench_files import toy as pictures
from test_bench_files import tree
from test_grpo import preset
from test_images import photo
from test_judge import QUESTION
from test_model_files import byte_tokenizer, open32, same, tiny_model, truncate
from test_pipeline import HEAD, house, notebook, text  # noqa: F401 (a fixture)
from test_resume import flip, train
from test_train import toy

from clear_nb import bench_files as bf
from clear_nb import cli, core, evaluate, grpo, pipeline, records
from clear_nb.adapters import CallableAdapter
from clear_nb.base import new_model
from clear_nb.builder import build_summary, build_training
from clear_nb.candidates import candidate_files, read_columns
from clear_nb.core import PATHS, ROOT
from clear_nb.data import labelled_items, make_picture_set
from clear_nb.identity import made_from
from clear_nb.images import open_image
from clear_nb.judge import LLMJudge, judge_many
from clear_nb.model import ClearModel, export_bagel
from clear_nb.presets import load_preset
from clear_nb.records import find_stage, read_records, write_record
from clear_nb.reward import AnswerScore, Outage, Unparsable
from clear_nb.server import Server
from clear_nb.sources import BuildRecipe, open_folder
from clear_nb.stored import open_training, read_manifest
from clear_nb.train import accelerator, last_state, saved_states


@dataclass(frozen=True)
class Fault:
    room: str
    fault: str
    how: str  # it is injected
    sees: str  # regular expression: what the user reads
    kept: str
    inject: str  # name of a function below


FAULTS = [
    Fault(*row)
    for row in [
        # room, fault, how it is injected, what the user sees, what is kept, function
        (
            'training',
            'disk full while a state is saved',
            'files may not grow beyond 2 kB',
            r'the disk is full; make room and start the same command again.*b-00000004',
            'the states before; the same weights after going on',
            'state_disk_full',
        ),
        (
            'training',
            'newest state cut short',
            'half of the file',
            r'b-00000005\.safetensors cannot be read.*going on from the state before it',
            'the state before; the same weights',
            'state_cut',
        ),
        (
            'training',
            'newest state changed',
            'one bit',
            r'b-00000005\.safetensors is damaged: its checksum is wrong; going on',
            'the state before; the same weights',
            'state_bit',
        ),
        (
            'training',
            'no state can be read',
            'all files empty',
            r'no state of b .* can be read; delete b-00000005\.safetensors, b-00000004\.safetensors to start again',
            'nothing is deleted or begun anew by itself',
            'state_none',
        ),
        (
            'training',
            'state of another run',
            'another warm-up',
            r'of another run .*loop.warmup: 0 there, 2 here.*delete them to start again',
            'the states',
            'state_foreign',
        ),
        (
            'training',
            'loss is no number',
            'NaN at step 5',
            r'^training, step 5: the loss is nan; lower the learning rate or look at the batch$',
            'the state before that step; the same weights once it is mended',
            'loss_nan',
        ),
        (
            'training',
            'stopped from outside',
            'SIGTERM in a step',
            r'^SIGTERM$',
            'the last state; the same weights',
            'state_sigterm',
        ),
        (
            'training',
            'killed while a state is written',
            'SIGKILL when half of it is on the disk',
            r'^SIGKILL$',
            'the state before; the same weights, and no half file stays',
            'state_sigkill',
        ),
        (
            'training',
            'a process of two is lost',
            'SIGKILL on the second at step 3',
            r'(?i)connection (closed|reset)|peer',
            'the last state; the same weights with two new processes',
            'process_lost',
        ),
        (
            'checkpoints',
            'file cut short',
            'its last byte is gone',
            r'ema\.safetensors is damaged or cut short .*download it again',
            'everything else; a whole copy gives the same model',
            'weights_cut',
        ),
        (
            'checkpoints',
            'a shard is missing',
            'one file of several is moved away',
            r'names ema-00001-of-\d+\.safetensors, missing in .*download the missing shards',
            'the other shards',
            'shard_missing',
        ),
        (
            'checkpoints',
            'folder copied half',
            'only its configuration is there',
            r'has no model\.safetensors; download the weights there',
            'nothing is loaded',
            'folder_half',
        ),
        (
            'checkpoints',
            'killed while a checkpoint is written',
            'SIGKILL between two files of the folder',
            r'^SIGKILL; no checkpoint of .sft. for preset .tiny., seed 1: run notebook 01_sft first',
            'no half checkpoint; the one that was there opens',
            'checkpoint_kill',
        ),
        (
            'checkpoints',
            'disk full while a checkpoint is written',
            'files may not grow beyond 2 kB',
            r"the disk is full; make room and start the same command again.*/m'",
            'the old checkpoint; no half one',
            'checkpoint_disk_full',
        ),
        (
            'checkpoints',
            'the old folder cannot be removed',
            'rmtree fails',
            r'Device or resource busy',
            'the new checkpoint is in place and whole',
            'checkpoint_busy',
        ),
        (
            'records',
            'damaged record',
            'cut in the middle',
            r'record .*01_sft-seed0\.json is not valid JSON .*delete it and run its notebook again',
            'the other records',
            'record_cut',
        ),
        (
            'records',
            'disk full while a record is written',
            'files may not grow beyond 100 bytes',
            r'the disk is full; make room.*01_sft-seed0\.json',
            'the old record, whole',
            'record_disk_full',
        ),
        (
            'presets',
            'unknown key',
            'stepz for steps',
            r"mine\.yaml: grpo: unknown key 'stepz', did you mean 'steps'",
            'nothing was guessed, nothing ran',
            'preset_unknown',
        ),
        (
            'presets',
            'a key twice',
            'two lines for one number',
            r"mine\.yaml is not valid YAML: .*'steps' appears twice",
            'nothing was guessed, nothing ran',
            'preset_twice',
        ),
        (
            'pictures',
            'file cut short',
            'half of a JPEG',
            r'open_image: cannot decode .*cut\.jpg: .*; replace or remove the file',
            'other pictures open',
            'picture_cut',
        ),
        (
            'pictures',
            'not a picture',
            'a text called .jpg',
            r'open_image: .*note\.jpg is not an image in a known format; replace or remove the file',
            'other pictures open',
            'picture_text',
        ),
        (
            'training data',
            'damaged shard',
            'zeros over the first half of a parquet file',
            r'unreadable shard 1\b',
            'every row of the other shards is accounted for',
            'source_shard',
        ),
        (
            'training data',
            'bad rows',
            'one of each of 15 kinds',
            r'answer is no option 1, .*undecodable picture 1',
            'the good rows; each reject has its place and reason',
            'source_rows',
        ),
        (
            'training data',
            'the same row twice',
            'a picture and question in another file',
            r'"stage": "row", "reason": "duplicate"',
            'the first of the two',
            'source_twice',
        ),
        (
            'training data',
            'annotator goes away',
            'connections end after 5 replies',
            r'^the annotator does not answer: APIConnectionError',
            'all replies; the same files later, and none of them asked twice',
            'annotator_down',
        ),
        (
            'training data',
            'annotator talks nonsense',
            'every reply about some rows',
            r'rejected traces: no trajectory \d',
            'other rows take their place; both parts are complete',
            'annotator_nonsense',
        ),
        (
            'training data',
            'key refused',
            'status 401',
            r'refused the key in OPENAI_API_KEY.*set a valid one and start again',
            'candidates and base replies; the same files later',
            'annotator_key',
        ),
        (
            'training data',
            'disk full',
            'no file may grow beyond 2 kB',
            r'the disk is full; make room and start the same command again, everything finished is kept',
            'replies written before; the same files later',
            'builder_disk_full',
        ),
        (
            'training data',
            'damaged examples',
            'half of a finished file',
            r'sft-00000\.parquet is damaged .*remove .*manifest\.json and start `clear-nb build-data` again',
            'all replies; the same bytes again, nothing asked',
            'examples_cut',
        ),
        (
            'training data',
            'damaged manifest',
            'empty after a power cut',
            r'manifest\.json is damaged .*remove it and start the same command again',
            'all replies; the same bytes again, nothing asked',
            'manifest_empty',
        ),
        (
            'benchmark',
            'damaged picture',
            'no picture in a row',
            r'row 4 \(index 9\) left out: undecodable image',
            'the other rows have their scores; the report counts the lost one',
            'row_picture',
        ),
        (
            'benchmark',
            'damaged shard',
            'bytes in the middle',
            r'rows-00001\.parquet does not hold what was written: delete the folder and build it again',
            'the other shards; the same content when built again',
            'bench_shard',
        ),
        (
            'benchmark',
            'disk full while it is built',
            'files may not grow beyond the first shard',
            r'the disk is full; make room.*rows-00001\.parquet',
            'finished shards; the same bytes after going on',
            'bench_disk_full',
        ),
        (
            'benchmark',
            'a worker dies',
            'SIGKILL on one of two processes',
            r'^a worker process died \(killed, or out of memory\); start again: finished files are kept',
            'finished shards; the same bytes after going on',
            'bench_worker',
        ),
        (
            'benchmark',
            'damaged settings of an unfinished build',
            'building.json cut short',
            r'building\.json is damaged .*delete the folder and build it again',
            'the folder is not continued with other settings',
            'bench_begun',
        ),
        (
            'benchmark run',
            'server down, then up',
            'connections end for a while',
            r'8 rows are pending; run the same command again to ask them',
            'no row is wrong for it; only what is pending is asked',
            'server_down',
        ),
        (
            'benchmark run',
            'killed',
            'SIGKILL at the tenth question',
            r'^SIGKILL$',
            'whole batches; the rest is asked once, the same results',
            'run_killed',
        ),
        (
            'benchmark run',
            'damaged part',
            'a damaged line in a file of replies',
            r'replies-0-of-1\.jsonl, line 5 cannot be read .*delete the line, its row is then asked',
            'the other lines; only its row is asked',
            'part_cut',
        ),
        (
            'benchmark run',
            'damaged note of the run',
            'run.json cut short',
            r'run\.json is damaged .*delete it and run the same command again',
            'all replies; nothing is asked again',
            'run_note',
        ),
        (
            'judge',
            'down for ten minutes',
            'status 503 until the clock says 600 s',
            r'the judge toy does not answer \(.*503.*\); asking on for 900 seconds',
            'every score; one reply is kept for each question',
            'judge_ten_minutes',
        ),
        (
            'judge',
            'down for good',
            'status 503 beyond the patience',
            r"Outage\(reason='InternalServerError",
            'no score of 0; asked again by the next run',
            'judge_gone',
        ),
        (
            'judge',
            'replies without a number',
            'a sentence',
            r'Unparsable\(reason=.*I like it',
            'the reply, so that nobody pays twice; no score of 0',
            'judge_words',
        ),
        (
            'judge',
            'disk full',
            'the file of replies may not grow',
            r'the disk is full; make room.*r\.jsonl',
            'earlier replies; only the rest is asked',
            'judge_disk_full',
        ),
        (
            'judge',
            'replies cut by a crash',
            'half of the last line is gone',
            r'r\.jsonl: 1 damaged line\(s\) left out; what they held is asked again',
            'all other lines',
            'judge_line',
        ),
        (
            'stage 3',
            'judge fails for some answers',
            'every third call',
            r'\d+ of 8 answers have no reward and are left out; the first: Outage',
            'the step, with the other members of each group',
            'group_outage',
        ),
        (
            'stage 3',
            'judge is gone at step 1',
            'outages only',
            r'the judge scored none of 8 answers; the first outcome is Outage',
            'the state before the step; the same weights later',
            'grpo_judge_gone',
        ),
        (
            'stage 3',
            'a gradient that is not finite',
            'NaN in the record of one trajectory',
            r'^grpo, step 0: the loss or its gradient is not finite because of trajectory 1 \(.*: its record is not finite\)$',
            'the weights before the step',
            'grpo_nan',
        ),
        (
            'pipeline',
            'kernel killed',
            'SIGKILL in a cell',
            r'01_sft failed in DeadKernelError',
            'the partial notebook; no output that looks finished',
            'kernel_killed',
        ),
        (
            'pipeline',
            'a notebook fails in the middle',
            'KeyError in a cell',
            r"02_bridge failed in cell 2: KeyError: 'inside'\npartial output: .*02_bridge\.partial\.ipynb",
            'the stages before, which do not run again',
            'notebook_fails',
        ),
        (
            'pipeline',
            'library older than its notebooks',
            'an edit without an export',
            r'clear_nb/ is older than one in nbs: run nbdev_export first',
            'nothing runs',
            'export_stale',
        ),
        (
            'pipeline',
            'damaged stamp',
            'cut short',
            r'01_sft\.stamp\.json is damaged .*: its notebook runs again',
            'the finished notebook stays until the new one is whole',
            'stamp_cut',
        ),
    ]
]


def plain(sees):
    """A pattern as a reader would write it."""
    return (
        re.sub(r'\\d[+*]?', 'n', sees.replace('.*', '…'))
        .replace('\\n', ' ')
        .replace('(?i)', '')
        .replace('\\b', '')
        .replace('^', '')
        .replace('$', '')
        .replace('\\', '')
        .replace('|', ' or ')
    )


def table():
    """FAULTS for readers, as Markdown."""
    lines = [f'| {f.room} | {f.fault} | {f.how} | {plain(f.sees)} | {f.kept} |' for f in FAULTS]
    return '\n'.join(
        [
            '| room | fault | injected by | what the user sees | what is kept |',
            '|---|---|---|---|---|',
            *lines,
        ]
    )


@pytest.fixture
def s(tmp_path, monkeypatch, request, hasty, capfd):
    """What an injection may need: a folder, patches, fixtures, what was printed."""
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-of-the-faults')
    return Space(
        tmp=tmp_path,
        patch=monkeypatch,
        get=request.getfixturevalue,
        printed=lambda: ''.join(capfd.readouterr()),
    )


@pytest.mark.parametrize('f', FAULTS, ids=lambda f: f.inject)
def test_fault(f, s):
    """The user sees what the table says, and what it says is kept."""
    with closing(globals()[f.inject](s)) as steps:
        seen = next(steps)
        assert re.search(f.sees, seen, re.S) and 'sk-of-the-faults' not in seen, seen
        with pytest.raises(StopIteration):
            next(steps)


def test_table():
    """At least 25 faults, in ten rooms, each with a function of its own."""
    assert (
        len(FAULTS) >= 25
        and len({f.inject for f in FAULTS}) == len(FAULTS) == table().count('\n') - 1
        and len({f.room for f in FAULTS}) >= 10
    )


# ---------------------------------------------------------------- tools


def stopped(kind, f, *a, **k):
    """The message that ends a run."""
    with pytest.raises(kind) as e:
        f(*a, **k)
    return str(e.value)


def warned(f, *a, **k):
    """What comes back, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        out = f(*a, **k)
    return out, '\n'.join(str(w.message) for w in told)


@contextmanager
def small_disk(size):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    written, sys.dont_write_bytecode = (
        sys.dont_write_bytecode,
        True,
    )  # Python would keep half a .pyc and stumble over it later
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = written


def died(f):
    """Run in a child process; the name of the signal that ended it."""
    sys.stdout.flush()
    if not (pid := os.fork()):
        try:
            f()
        finally:
            os._exit(0)
    [status] = waited([pid])
    return (
        signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f'status {status}'
    )


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- training


def goes_on(s):
    """The run in b.pt ends as one that nothing disturbed, and leaves no state behind."""
    want, found = train(s.tmp / 'want.pt'), warned(train, s.tmp / 'b.pt')[0]
    assert torch.equal(found[0], want[0]) and found[1] == want[1] and names(s.tmp) == []


def state_disk_full(s):
    train(s.tmp / 'b.pt', stop=3)
    with small_disk(2000):
        yield stopped(OSError, train, s.tmp / 'b.pt')
    assert names(s.tmp) == ['b-00000002.safetensors', 'b-00000003.safetensors']
    goes_on(s)


def spoilt_state(s, spoil):
    """The newest state is spoilt; what is said when the run goes on."""
    train(s.tmp / 'b.pt', stop=5)
    spoil(saved_states(s.tmp / 'b.pt')[0])
    (_, info), said = warned(last_state, s.tmp / 'b.pt')
    yield said
    assert info['step'] == 4
    goes_on(s)


def state_cut(s):
    yield from spoilt_state(s, halve)


def state_bit(s):
    yield from spoilt_state(s, flip)


def state_none(s):
    train(s.tmp / 'b.pt', stop=5)
    for f in saved_states(s.tmp / 'b.pt'):
        f.write_bytes(b'')
    yield warned(stopped, ValueError, train, s.tmp / 'b.pt')[0]
    assert names(s.tmp) == ['b-00000004.safetensors', 'b-00000005.safetensors']


def state_foreign(s):
    train(s.tmp / 'b.pt', stop=5)
    yield stopped(ValueError, train, s.tmp / 'b.pt', warmup=2)
    goes_on(s)


def loss_nan(s):
    plain = toy

    def spoilt():
        net, loss = plain()
        return net, lambda step: (loss(step)[0] * (float('nan') if step == 5 else 1.0), {})

    with s.patch.context() as m:
        m.setattr('test_resume.toy', spoilt)
        yield stopped(FloatingPointError, train, s.tmp / 'b.pt')
    assert names(s.tmp)[-1] == 'b-00000005.safetensors'
    s.patch.setattr(
        'test_resume.toy',
        lambda: (lambda net, loss: (net, lambda step: (loss(step)[0], {})))(*plain()),
    )
    goes_on(s)


def state_sigterm(s):
    def run():
        plain = toy

        def spoilt():
            net, loss = plain()
            return net, lambda step: (
                os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None,
                loss(step),
            )[1]

        s.patch.setattr('test_resume.toy', spoilt)
        train(s.tmp / 'b.pt')

    yield died(run)
    assert names(s.tmp)[-1] == 'b-00000005.safetensors'
    goes_on(s)


def state_sigkill(s):
    def run():
        Trap('saving', 4, 0.5).__enter__()
        train(s.tmp / 'b.pt')

    yield died(run)
    assert [n for n in names(s.tmp) if n[0] != '.'] == [
        'b-00000003.safetensors',
        'b-00000004.safetensors',
    ] and len(names(s.tmp)) == 4  # also the half state and the lock
    goes_on(s)


LOST = """
import os, signal, sys
from pathlib import Path
import torch
from clear_nb.ranks import ranks_of
from clear_nb.train import accelerator, fit
from processes import waited
from safetensors.torch import save_file
from test_train import toy

def child(rank, name, die, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    ranks, (net, loss) = ranks_of(accelerator('no')), toy()
    torch.nn.init.zeros_(net.bias)
    ranks.wrap(net)
    def losses(step):
        if step == die and rank: os.kill(os.getpid(), signal.SIGKILL)
        return ranks.run(net, lambda m: loss(step)[0]), {}
    done = lambda m, past: save_file({k: v.clone() for k, v in m.state_dict().items()}, out/f'{name}.safetensors')
    try: fit(net, losses, 6, .1, ranks=ranks, state=out/f'{name}.pt', save_seconds=0., done=done)
    except RuntimeError as e: (out/'said').write_text(str(e))

out = Path(sys.argv[1])
for (name, die), port in zip((('want', None), ('b', 3), ('b', None)), sys.argv[2:]):
    pids = []
    for rank in range(2):
        if not (pid := os.fork()):
            try: child(rank, name, die, port)
            finally: os._exit(0)
        pids.append(pid)
    print(*waited(pids), *sorted(p.name for p in out.glob('b-*')))
"""


def free_ports(n):
    """Ports of this machine that nobody uses."""
    held = [socket.create_server(('127.0.0.1', 0)) for _ in range(n)]
    ports = [str(h.getsockname()[1]) for h in held]
    for h in held:
        h.close()
    return ports


def process_lost(s):
    done = python('-c', LOST, s.tmp, *free_ports(3), seconds=200)
    assert done.returncode == 0 and (s.tmp / 'said').exists(), (
        done.returncode,
        done.stderr[-3000:],
    )
    yield (s.tmp / 'said').read_text()
    assert done.stdout.splitlines() == [
        '0 0',
        '0 9 b-00000002.safetensors b-00000003.safetensors',
        '0 0',
    ], done.stdout
    assert (s.tmp / 'b.safetensors').read_bytes() == (s.tmp / 'want.safetensors').read_bytes()


# ---------------------------------------------------------------- checkpoints


def weights_cut(s):
    model = tiny_model(5, tokenizer=byte_tokenizer())
    folder = export_bagel(model, s.tmp / 'm')
    whole = (folder / 'ema.safetensors').read_bytes()
    truncate(folder / 'ema.safetensors')
    yield stopped(ValueError, open32, folder)
    (folder / 'ema.safetensors').write_bytes(whole)
    same(open32(folder), model)


def shard_missing(s):
    model = tiny_model(5, tokenizer=byte_tokenizer())
    folder = export_bagel(model, s.tmp / 'm', '60KB')
    first = sorted(folder.glob('ema-*'))[0]
    first.rename(s.tmp / 'away')
    yield stopped(FileNotFoundError, open32, folder)
    (s.tmp / 'away').rename(first)
    same(open32(folder), model)


def folder_half(s):
    model = tiny_model(5)
    model.save_pretrained(s.tmp / 'whole')
    (s.tmp / 'half').mkdir()
    shutil.copy(s.tmp / 'whole' / 'config.json', s.tmp / 'half')
    yield stopped(FileNotFoundError, ClearModel.from_pretrained, s.tmp / 'half')
    same(ClearModel.from_pretrained(s.tmp / 'whole'), model)


def checkpoint_kill(s):
    for name in ('runs', 'checkpoints'):
        s.patch.setattr(PATHS, name, s.tmp / name)
    old, new = tiny_model(5), tiny_model(6)
    folders = [records.stage_folder('tiny', k, 'sft') for k in range(2)]
    old.save_pretrained(folders[0])

    def run(folder):
        from clear_nb import model as m

        plain = m.save_file
        s.patch.setattr(
            m,
            'save_file',
            lambda t, path: (
                plain(t, path) if path.stem == 'model' else os.kill(os.getpid(), signal.SIGKILL)
            ),
        )
        new.save_pretrained(folder)

    said = [died(lambda f=f: run(f)) for f in folders]
    assert said == ['SIGKILL'] * 2
    yield f'{said[1]}; {stopped(FileNotFoundError, find_stage, "tiny", 1, "sft")}'
    same(ClearModel.from_pretrained(find_stage('tiny', 0, 'sft')), old)


def checkpoint_disk_full(s):
    old = tiny_model(5)
    old.save_pretrained(s.tmp / 'm')
    with small_disk(2000):
        yield stopped(OSError, tiny_model(6).save_pretrained, s.tmp / 'm')
    assert names(s.tmp) == ['m']
    same(ClearModel.from_pretrained(s.tmp / 'm'), old)


def checkpoint_busy(s):
    tiny_model(5).save_pretrained(s.tmp / 'm')
    new = tiny_model(6)

    def busy(path):
        (path / 'config.json').unlink()
        raise OSError(16, 'Device or resource busy')

    with s.patch.context() as m:
        m.setattr(core.shutil, 'rmtree', busy)
        yield stopped(OSError, new.save_pretrained, s.tmp / 'm')
    same(ClearModel.from_pretrained(s.tmp / 'm'), new)


# ---------------------------------------------------------------- records, presets, pictures


def record(s, seed, **metrics):
    return write_record('01_sft', metrics, load_preset('smoke'), seed, root=s.tmp)


def record_cut(s):
    path, other = record(s, 0, x=1), record(s, 1, x=2)
    halve(path)
    yield stopped(ValueError, read_records, 'smoke', root=s.tmp)
    path.unlink()
    assert [r['metrics'] for r in read_records('smoke', root=s.tmp)] == [
        dict(x=2)
    ] and other.exists()


def record_disk_full(s):
    record(s, 0, x=1)
    with small_disk(100):
        yield stopped(OSError, record, s, 0, x=2)
    assert [r['metrics'] for r in read_records('smoke', root=s.tmp)] == [dict(x=1)] and len(
        names(s.tmp)
    ) == 1


def bad_preset(s, old, new):
    """A preset with a line changed, and the whole one."""
    whole = (ROOT / 'params' / 'smoke.yaml').read_text()
    assert old in whole
    (s.tmp / 'mine.yaml').write_text(whole.replace(old, new, 1))
    yield stopped(ValueError, load_preset, 'mine', s.tmp)
    (s.tmp / 'mine.yaml').write_text(whole)
    assert load_preset('mine', s.tmp).grpo == load_preset('smoke').grpo and names(s.tmp) == [
        'mine.yaml'
    ]


def preset_unknown(s):
    yield from bad_preset(s, '  steps: 1 ', '  stepz: 1 ')


def preset_twice(s):
    yield from bad_preset(s, '  prompts: 2 ', '  steps: 2 ')


def picture_cut(s):
    photo(200, 200).save(s.tmp / 'good.jpg')
    shutil.copy(s.tmp / 'good.jpg', s.tmp / 'cut.jpg')
    halve(s.tmp / 'cut.jpg')
    yield stopped(ValueError, open_image, s.tmp / 'cut.jpg')
    assert open_image(s.tmp / 'good.jpg').size == (200, 200)


def picture_text(s):
    photo(200, 200).save(s.tmp / 'good.jpg')
    (s.tmp / 'note.jpg').write_text('this is a note')
    yield stopped(ValueError, open_image, s.tmp / 'note.jpg')
    assert (
        open_image(s.tmp / 'good.jpg').size == (200, 200)
        and (s.tmp / 'note.jpg').read_text() == 'this is a note'
    )


# ---------------------------------------------------------------- training data

ROWS, RECIPE = 60, BuildRecipe(n=8, share=1.0, spare=100.0, relative=True)


class Base(CallableAdapter):
    """The base model of the look-alike; counts what it is asked."""

    asked = 0

    def __call__(self, samples):
        self.asked += len(samples)
        return super().__call__(samples)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """45 good rows, one bad row of each kind, and a shard that is damaged."""
    folder = tmp_path_factory.mktemp('source')
    pq.write_table(
        pa.Table.from_pylist(list(look.rows(ROWS, every=4)), look.SCHEMA), folder / 'good.parquet'
    )
    data = bytearray((folder / 'good.parquet').read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    (folder / 'damaged.parquet').write_bytes(data)
    return folder


def make(source, annotator, out, base=None, r=RECIPE, **kw):
    """A build; it ends at the first long silence."""
    server = annotator and Server('fake', annotator.url, timeout=5.0, tries=2)
    return build_training(
        open_folder(source),
        base or Base(look.base, 'base'),
        server,
        out,
        r,
        **{'workers': 1, 'progress': False, 'patience': 0.0, 'model': 'fake'} | kw,
    )


def quick():
    return look.Misbehaving(outages=False)


@pytest.fixture(scope='module')
def built(source, tmp_path_factory):
    """An undisturbed build; folder, manifest, number of requests."""
    out, patch = tmp_path_factory.mktemp('built') / 'out', pytest.MonkeyPatch()
    patch.setenv('OPENAI_API_KEY', 'sk-of-the-faults')
    with FakeServer(default=quick()) as annotator:
        m = make(source, annotator, out)
    patch.undo()
    return Space(out=out, m=m, requests=len(annotator.requests))


def equal(built, out):
    """The same bytes as the undisturbed build."""
    return all(
        (built.out / n).read_bytes() == (out / n).read_bytes()
        for n in ('manifest.json', *built.m['files'])
    )


def goes_on_building(s, out, before=0):
    """Build again in peace: the same files, and no reply that is kept is asked for; `before`:
    replies there.
    """
    built = s.get('built')
    with FakeServer(default=quick()) as annotator:
        make(s.get('source'), annotator, out)
    assert equal(built, out) and len(annotator.requests) == built.requests - before


def lines(path):
    return path.read_bytes().count(b'\n') if path.exists() else 0


def rejects(built):
    return [json.loads(line) for line in (built.out / 'rejects.jsonl').open()]


def source_shard(s):
    built = s.get('built')
    yield build_summary(built.m)[1]
    a = built.m['accounts']
    assert (
        a['rows']
        == ROWS
        == sum(v for k, v in a.items() if k not in ('rows', 'examples', 'unreadable_shards'))
        + sum(a['examples'].values())
    )
    assert [r['place'] for r in rejects(built) if r['reason'] == 'unreadable shard'] == [
        'damaged.parquet'
    ]


def source_rows(s):
    built = s.get('built')
    yield build_summary(built.m)[1]
    assert built.m['rejected']['row'] == dict(
        sorted({**look.expected(ROWS, 4), 'unreadable shard': 1}.items())
    ) and built.m['accounts']['examples'] == dict(sft=8, rl=8)
    assert {r['place'] for r in rejects(built) if r['stage'] == 'row'} == {
        'damaged.parquet',
        *(f'good.parquet:{k}' for k in range(3, ROWS, 4)),
    }


def source_twice(s):
    built = s.get('built')
    yield (built.out / 'rejects.jsonl').read_text()
    (twice,) = [r for r in rejects(built) if r['reason'] == 'duplicate']
    held = [c for f in candidate_files(built.out) for c in read_columns(f, ['id', 'place'])]
    assert (
        twice['place'] == f'good.parquet:{ROWS - 1}'
        and dict(id='0', place='good.parquet:0') in held
    )


def annotator_down(s):
    inner, out, source = quick(), s.tmp / 'out', s.get('source')
    with FakeServer(
        default=lambda r: inner(r) if len(annotator.requests) <= 5 else Drop()
    ) as annotator:
        yield stopped(ConnectionError, make, source, annotator, out)
    assert lines(out / 'annotator.jsonl') == 5 and not (out / 'manifest.json').exists()
    goes_on_building(s, out, 5)


def annotator_nonsense(s):
    inner = quick()

    def talks(request):
        number = int(re.search(r'\(picture (\d+)\)', request.text)[1])
        return 'Sure! Here is the trace.' if number % 5 == 0 else inner(request)

    with FakeServer(default=talks) as annotator:
        m = make(s.get('source'), annotator, s.tmp / 'out')
    yield build_summary(m)[2]
    lost = m['rejected']['trace']['no trajectory']
    assert (
        m['accounts']['examples'] == dict(sft=8, rl=8)
        and m['accounts']['rejected_traces'] == sum(m['rejected']['trace'].values())
        and m['faults']['no trajectory'] >= 4 * lost
    )


def annotator_key(s):
    out, base = s.tmp / 'out', Base(look.base, 'base')
    with FakeServer(default=Status(401, 'bad key sk-of-the-faults')) as annotator:
        yield stopped(PermissionError, make, s.get('source'), annotator, out, base)
    asked = base.asked
    with FakeServer(default=quick()) as annotator:
        make(s.get('source'), annotator, out, base)
    assert asked == base.asked > 40 and equal(s.get('built'), out)


def builder_disk_full(s):
    out = s.tmp / 'out'
    make(s.get('source'), None, out)  # candidates and the base model's replies
    with FakeServer(default=quick()) as annotator, small_disk(2000):
        yield stopped(OSError, make, s.get('source'), annotator, out)
    before = lines(out / 'annotator.jsonl')
    assert before > 0 and not list(out.rglob('*.tmp*'))
    goes_on_building(s, out, before)


def copied(s):
    """A finished build to damage."""
    shutil.copytree(s.get('built').out, s.tmp / 'out')
    return s.tmp / 'out', s.get('built').requests


def examples_cut(s):
    out, asked = copied(s)
    halve(out / 'sft-00000.parquet')
    yield stopped(ValueError, open_training, out, 'sft', None)
    (out / 'manifest.json').unlink()
    goes_on_building(s, out, asked)


def manifest_empty(s):
    out, asked = copied(s)
    (out / 'manifest.json').write_text('')
    yield stopped(ValueError, read_manifest, out)
    (out / 'manifest.json').unlink()
    goes_on_building(s, out, asked)


# ---------------------------------------------------------------- benchmark files and runs


def row_picture(s):
    good = dict(question='Please say A?', A='x', B='y', answer='A')
    rows = [dict(good, index=k, image=code(k)) for k in range(3)] + [
        dict(good, index=9, image=base64.b64encode(b'no picture' * 9).decode())
    ]
    done = cli.main(
        [
            'bench',
            '--model',
            'python:test_bench:told',
            '--data',
            write_tsv(s.tmp / 'MMStar.tsv', rows),
            '--out',
            str(s.tmp / 'run'),
        ]
    )
    yield s.printed()
    assert (
        done == 0
        and report(s.tmp).rows.tolist() == [3, 3]
        and report(s.tmp).accuracy.astype(float).tolist() == [100, 100]
    )
    assert json.loads((s.tmp / 'run' / 'bench.json').read_text())['models'][0]['rejected'] == {
        'undecodable image': 1
    }


def small_bench(s, out='o', rows=None, **kw):
    return build_bench(
        iter(pictures(100)) if rows is None else rows,
        s.tmp / out,
        shard=16,
        corruptions=['hsv_saturation'],
        severities=['low'],
        **kw,
    )


def bench_shard(s):
    info = small_bench(s)
    data = bytearray((s.tmp / 'o' / 'rows-00001.parquet').read_bytes())
    data[3000:3003] = b'\0\1\2'
    (s.tmp / 'o' / 'rows-00001.parquet').write_bytes(data)
    yield stopped(ValueError, bf.verify, s.tmp / 'o')
    shutil.rmtree(s.tmp / 'o')
    assert small_bench(s)['content_hash'] == info['content_hash'] == bf.verify(s.tmp / 'o')


def bench_disk_full(s):
    uneven = [*pictures(16, h=20, w=20), *pictures(48)[16:]]  # a small first shard
    small_bench(s, 'want', iter(uneven))
    with small_disk((s.tmp / 'want' / 'rows-00000.parquet').stat().st_size + 100):
        yield stopped(OSError, small_bench, s, rows=iter(uneven))
    kept = (s.tmp / 'o' / 'rows-00000.parquet').stat().st_mtime_ns
    assert names(s.tmp / 'o') == ['building.json', 'rows-00000.parquet']
    small_bench(s, rows=iter(uneven))
    assert (
        tree(s.tmp / 'o') == tree(s.tmp / 'want')
        and (s.tmp / 'o' / 'rows-00000.parquet').stat().st_mtime_ns == kept
    )


def bench_worker(s):
    import multiprocessing

    def rows():
        for k, row in enumerate(pictures(100)):
            if k == 90:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            yield row

    yield stopped(ChildProcessError, small_bench, s, rows=rows(), workers=2)
    assert (
        'rows-00000.parquet' in names(s.tmp / 'o')
        and 'info.json' not in names(s.tmp / 'o')
        and not multiprocessing.active_children()
    )
    small_bench(s), small_bench(s, 'want')
    assert tree(s.tmp / 'o') == tree(s.tmp / 'want')


def bench_begun(s):
    def broken():
        yield from pictures(90)
        raise InterruptedError

    stopped(InterruptedError, small_bench, s, rows=broken())
    halve(s.tmp / 'o' / 'building.json')
    yield stopped(ValueError, small_bench, s)
    assert names(s.tmp / 'o')[:2] == [
        'building.json',
        'rows-00000.parquet',
    ] and 'info.json' not in names(s.tmp / 'o')


def server_down(s):
    with FakeServer(default=Drop()) as server:
        first = over_server(s.tmp, server)
        yield s.printed()
        assert (
            first == 1 and report(s.tmp).accuracy[0] == 'unknown' and report(s.tmp).pending[0] == 8
        )
        server.default, asked = 'A', len(server.requests)
        assert over_server(s.tmp, server) == 0 and len(server.requests) - asked == 8
    assert report(s.tmp).loc[0, ['rows', 'right', 'pending']].tolist() == [8, 8, 0]


def ask(s, name, f=guess):
    return evaluate.run_rows(
        CallableAdapter(f, 'guess'), questions(), s.tmp / name, batch=4, progress=False
    )


@contextmanager
def counted(s):
    """Questions asked while the block lasts."""
    asked = []
    import bench_rows

    plain = bench_rows.guess

    @wraps(plain)
    def f(picture, prompt):
        asked.append(prompt)
        return plain(picture, prompt)

    yield f, asked


def run_killed(s):
    with counted(s) as (f, asked):

        @wraps(f)
        def deadly(picture, prompt):
            if len(asked) == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return f(picture, prompt)

        yield died(lambda: ask(s, 'r', deadly))
        assert len(results(s.tmp / 'r')) == 8 and asked == []
        ask(s, 'r', f)
        assert len(asked) == 24 - 8 and results(s.tmp / 'r').equals(results(ask(s, 'want')))


def part_cut(s):
    ask(s, 'r')
    want, path = results(s.tmp / 'r'), s.tmp / 'r' / 'parts' / 'replies-0-of-1.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join([*lines[:4], lines[4][:50] + b'\n', *lines[5:]]))
    yield stopped(ValueError, ask, s, 'r')
    path.write_bytes(b''.join([*lines[:4], *lines[5:]]))
    with counted(s) as (f, asked):
        ask(s, 'r', f)
    assert len(asked) == 1 and results(s.tmp / 'r').equals(want)


def run_note(s):
    ask(s, 'r')
    want = results(s.tmp / 'r')
    halve(s.tmp / 'r' / 'run.json')
    yield stopped(ValueError, ask, s, 'r')
    (s.tmp / 'r' / 'run.json').unlink()
    with counted(s) as (f, asked):
        ask(s, 'r', f)
    assert asked == [] and results(s.tmp / 'r').equals(want)


# ---------------------------------------------------------------- judge

ASKED = [(QUESTION, f'answer {k}') for k in range(4)]


def judge_of(server, s, **kw):
    return LLMJudge('toy', server.url, cache=s.tmp / 'r.jsonl', **{'tries': 1} | kw)


class FakeTime:
    """A clock that only moves when somebody sleeps."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def judge_ten_minutes(s):
    clock = FakeTime()
    s.patch.setattr('clear_nb.judge.time', clock)
    with FakeServer(
        default=lambda r: (
            '0.5' if clock.now >= 600 or len(server.requests) == 1 else Status(503, 'restarting')
        )
    ) as server:
        got, said = warned(
            judge_many, judge_of(server, s, patience=900.0), ASKED, workers=1, progress=False
        )
        yield said
        assert (
            got == [AnswerScore(0.5)] * 4
            and 600 <= clock.now < 700
            and lines(s.tmp / 'r.jsonl') == 4
        )
        asked = Counter(r.text for r in server.requests)
        assert [asked[t] for t in dict.fromkeys(r.text for r in server.requests)] == [
            1,
            len(server.requests) - 3,
            1,
            1,
        ]


def judge_gone(s):
    clock = FakeTime()
    s.patch.setattr('clear_nb.judge.time', clock)
    with FakeServer(default=Status(503)) as server:
        got, _ = warned(
            judge_many, judge_of(server, s, patience=900.0), ASKED, workers=1, progress=False
        )
        yield str(got[0])
        assert (
            {type(g) for g in got} == {Outage}
            and 900 <= clock.now < 1000
            and lines(s.tmp / 'r.jsonl') == 0
        )  # waited once, not for each question
        server.default = '1'
        assert judge_many(judge_of(server, s), ASKED, progress=False) == [AnswerScore(1.0)] * 4


def judge_words(s):
    with FakeServer(default='I like it') as server:
        judge = judge_of(server, s)
        got = judge(*ASKED[0])
        yield str(got)
        assert (
            isinstance(got, Unparsable)
            and judge_of(server, s)(*ASKED[0]) == got
            and len(server.requests) == 1
        )


def judge_disk_full(s):
    with FakeServer(default='1') as server:
        judge_of(server, s)(*ASKED[0])
        with small_disk((s.tmp / 'r.jsonl').stat().st_size + 10):
            yield stopped(OSError, judge_of(server, s), *ASKED[1])
        got, said = warned(
            lambda: judge_many(judge_of(server, s), ASKED, workers=1, progress=False)
        )
        assert (
            got == [AnswerScore(1.0)] * 4
            and len(server.requests) == 1 + 1 + 3
            and '1 damaged' in said
        )


def judge_line(s):
    with FakeServer(default='1') as server:
        judge_many(judge_of(server, s), ASKED, workers=1, progress=False)
        os.truncate(s.tmp / 'r.jsonl', (s.tmp / 'r.jsonl').stat().st_size - 20)
        judge, said = warned(judge_of, server, s)
        yield said
        assert (
            judge_many(judge, ASKED, progress=False) == [AnswerScore(1.0)] * 4
            and len(server.requests) == 5
        )


# ---------------------------------------------------------------- stage 3


@lru_cache
def stage3():
    """A fresh model with questions, its weights, and a preset of 2 questions with 4
    trajectories.
    """
    p = preset(prompts=2, steps=2, max_new_tokens=4, denoise_steps=3, policy='always')
    model = new_model(p, 0, 50)
    return (
        p,
        model,
        make_picture_set(model, labelled_items(0, 4, 2, 'rl')),
        {k: v.clone() for k, v in model.state_dict().items()},
    )


def fresh():
    """The model as it was, with its preset and questions."""
    p, model, items, weights = stage3()
    model.load_state_dict(weights)
    return p, model, items


def speak(s):
    """An untrained model says nothing that could be judged; now its trajectories say a number
    that depends on their tokens.
    """
    plain = grpo.rewards_of_rollouts

    def judged(rolls, ask, judge, *a):
        said = [
            Space(
                parsed=Space(answer=f'{sum(i for t in r.turns for i in t.ids) % 10}', valid=True),
                restorations=r.restorations,
            )
            for r in rolls
        ]
        return plain(
            said,
            [
                Space(prompt=f'{k}: {q.prompt}', answer=q.answer, options=())
                for k, q in enumerate(ask)
            ],
            judge,
            *a,
        )

    s.patch.setattr(grpo, 'rewards_of_rollouts', judged)


def score(request):
    return '0.' + re.findall('"answer": "([0-9])"', request.text)[-1]


def learn(server, **how):
    """Stage 3 from the start or from its state, with a judge behind a server; the weights at
    the end.
    """
    p, model, items = fresh()
    p = load_preset('smoke', **{**p.overrides, 'train.save_seconds': 0.0})
    grpo.train_grpo(
        model, items, p, acc=accelerator('no'), judge=LLMJudge('toy', server.url, tries=1), **how
    )
    return {k: v.clone() for k, v in model.state_dict().items()}


def group_outage(s):
    speak(s)
    p, model, items = fresh()
    with FakeServer(
        default=lambda r: Status(503) if len(server.requests) % 3 == 0 else score(r)
    ) as server:
        (loss, logs), said = warned(
            grpo.grpo_step,
            grpo.GrpoRun(model, items, p.grpo, judge=LLMJudge('toy', server.url, tries=1)),
            0,
        )
        yield said
        assert (
            logs['outages'] == logs['missing'] == 2
            and len(server.requests) == 8
            and torch.isfinite(loss)
        )
        given = [float(score(r)) for k, r in enumerate(server.requests, 1) if k % 3]
        assert logs['acc'] == pytest.approx(sum(given) / 6)  # an outage is no zero


def grpo_judge_gone(s):
    speak(s)
    with FakeServer(
        default=lambda r: score(r) if len(server.requests) <= 8 else Status(503)
    ) as server:
        yield stopped(RuntimeError, learn, server, state=s.tmp / 'g.pt')
        assert names(s.tmp) == ['g-00000001.safetensors']
        server.default = score
        want, found = learn(server), learn(server, state=s.tmp / 'g.pt')
    start = stage3()[3]
    assert all(torch.equal(v, found[k]) for k, v in want.items()) and not all(
        torch.equal(v, start[k]) for k, v in want.items()
    )


def grpo_nan(s):
    plain, (_, model, _, weights) = grpo.rollout_batch, stage3()

    def spoilt(*a, **k):
        rolls = plain(*a, **k)
        rolls[1].turns[0].logp[0] = float('nan')
        return rolls

    s.patch.setattr(grpo, 'rollout_batch', spoilt)
    with FakeServer() as server:
        yield stopped(FloatingPointError, learn, server)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------- pipeline


def kernel_killed(s):
    place = s.get('house')
    notebook(
        place / 'nbs' / '01_sft.ipynb',
        HEAD,
        "print('before')",
        'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
    )
    yield stopped(pipeline.NotebookFailed, pipeline.run, '01_sft', 'smoke')
    assert names(place / 'runs' / 'smoke' / 'seed0') == [
        '01_sft.partial.ipynb'
    ] and 'before' in text(place / 'runs' / 'smoke' / 'seed0' / '01_sft.partial.ipynb')


def notebook_fails(s):
    place = s.get('house')
    for name, body in (('01_sft', 'print(1)'), ('02_bridge', "raise KeyError('inside')")):
        notebook(place / 'nbs' / f'{name}.ipynb', HEAD, body)
    yield stopped(
        pipeline.NotebookFailed,
        pipeline.run_steps,
        [('01_sft', 0, {}), ('02_bridge', 0, {})],
        'smoke',
    )
    done = place / 'runs' / 'smoke' / 'seed0' / '01_sft.ipynb'
    before = done.stat().st_mtime_ns
    pipeline.run('01_sft', 'smoke')
    assert done.stat().st_mtime_ns == before and '01_sft: up to date' in s.printed()


def export_stale(s):
    from nbdev.export import nb_export

    cells = ['#| default_exp one', '#| export\nx = 1']
    path = notebook(s.tmp / 'nbs' / 'method' / 'one.ipynb', *cells, tags=())
    nb_export(path, lib_path=s.tmp / 'clear_nb')
    notebook(path, cells[0], cells[1].replace('1', '2'), tags=())
    s.patch.setattr(
        pipeline,
        '_stale',
        lambda key: tuple(pipeline.stale_exports(s.tmp / 'nbs', s.tmp / 'clear_nb')),
    )
    notebook(s.tmp / 'x.ipynb', HEAD)
    yield stopped(RuntimeError, pipeline.run, s.tmp / 'x.ipynb', 'smoke', out=s.tmp / 'y.ipynb')
    assert not (s.tmp / 'y.ipynb').exists()


def stamp_cut(s):
    out = s.tmp / '01_sft.ipynb'
    out.write_text('{}')
    out.with_suffix('.stamp.json').write_text('{"made": {"code')
    made = made_from('core', params=dict(k=1))
    yield ' '.join(pipeline.reasons_to_run(out, made))
    assert out.read_text() == '{}'
    out.with_suffix('.stamp.json').write_text(json.dumps(dict(made=made, products={})))
    assert pipeline.reasons_to_run(out, made) == []


if __name__ == '__main__':
    print(table())
