"""One writer, one identity and sound notes for every folder that a command fills."""

import json
import subprocess
import sys

import pytest

from clear_nb import identity
from clear_nb.bench_files import build_files, read_info
from clear_nb.core import ROOT
from clear_nb.evaluate import run_rows
from clear_nb.folders import BEGUN, one_writer, read_json
from clear_nb.identity import module_source
from clear_nb.rows import from_scenes
from clear_nb.wording import Adapter, Reply

HOLD = """
import sys
from clear_nb.folders import one_writer
with one_writer(sys.argv[1], shard=(int(sys.argv[2]), int(sys.argv[3]))):
    print('held', flush=True)
    sys.stdin.read()
"""


class Counting(Adapter):
    """Answer A and count the rows."""

    asked = 0

    def __call__(self, rows):
        self.asked += len(rows)
        return [Reply('A') for _ in rows]


@pytest.fixture
def other_process(tmp_path):
    """Start processes that hold a folder; they end with the test."""
    held = []

    def hold(folder, part=0, parts=1):
        command = [sys.executable, '-c', HOLD, str(folder), str(part), str(parts)]
        held.append(
            subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        assert held[-1].stdout.readline() == 'held\n'
        return held[-1]

    yield hold
    for process in held:
        process.kill()
        process.wait()


def other_code(monkeypatch, module):
    """Let a module have one more statement, as far as identities can see."""

    def source(name):
        return module_source(name) + '\nadded = 1' * (name == module)

    monkeypatch.setattr(identity, 'module_source', source)


def test_second_run_pays_nothing(tmp_path, other_process):
    """While a process writes replies, another one asks nothing and says who is at work."""
    process = other_process(tmp_path / 'run')
    adapter = Counting('counting')
    with pytest.raises(ValueError, match=f'is being written by process {process.pid} on'):
        run_rows(adapter, from_scenes('mmvp', 2), tmp_path / 'run', progress=False)
    assert adapter.asked == 0 and not (tmp_path / 'run').exists()
    process.kill()
    process.wait()
    rows = list(from_scenes('mmvp', 2))
    run_rows(adapter, rows, tmp_path / 'run', progress=False)
    assert adapter.asked == len(rows)


@pytest.mark.parametrize(
    'mine, theirs, free',
    [
        ((0, 2), (1, 2), True),
        ((0, 2), (0, 2), False),
        ((0, 1), (1, 2), False),
        ((0, 2), (0, 1), False),
    ],
)
def test_shards(tmp_path, other_process, mine, theirs, free):
    """Shards are written side by side; a shard twice, and a whole run beside a shard, are not."""
    other_process(tmp_path / 'run', *theirs)
    if free:
        with one_writer(tmp_path / 'run', shard=mine):
            return
    with pytest.raises(ValueError, match='is being written by'):
        one_writer(tmp_path / 'run', shard=mine).__enter__()


def test_benchmark_of_other_code(tmp_path, monkeypatch):
    """A finished and an unfinished benchmark are refused after a change of code, or note it."""
    rows = from_scenes('mmvp', 2)
    info = build_files(rows, tmp_path / 'b', relative=True, progress=False)
    other_code(monkeypatch, 'degrade')
    with pytest.raises(ValueError, match='before a change .other code in degrade.'):
        build_files(rows, tmp_path / 'b', relative=True, progress=False)
    assert read_info(tmp_path / 'b') == info
    noted = build_files(rows, tmp_path / 'b', relative=True, progress=False, accept_code=True)
    assert noted['code_changes'][0]['found'] == ['other code in degrade']
    assert {k: noted[k] for k in info.keys() - {'made_from'}} == {
        k: info[k] for k in info.keys() - {'made_from'}
    }


def test_comments_keep_a_benchmark(tmp_path, monkeypatch):
    """A comment in the code that drew a benchmark changes nothing."""
    rows = from_scenes('mmvp', 2)
    info = build_files(rows, tmp_path / 'b', relative=True, progress=False)
    monkeypatch.setattr(identity, 'module_source', lambda m: module_source(m) + '\n# a comment')
    assert build_files(rows, tmp_path / 'b', relative=True, progress=False) == info


@pytest.mark.parametrize(
    'text', ['', '[]', 'null', '3', '{"a": 1', '[' * 200_000, '{"a": NaN', '"made_from"', '\x00']
)
def test_notes_of_another_form(tmp_path, text):
    """A note that holds anything else gets one sentence and stays as it is."""
    path = tmp_path / BEGUN
    path.write_text(text, encoding='utf-8')
    with pytest.raises(
        ValueError, match=r'building\.json (is damaged|has another form) .*: mend it'
    ):
        read_json(path, 'mend it')
    assert path.read_text(encoding='utf-8') == text


@pytest.mark.parametrize('field, value', [('name', 3), ('settings', []), ('content', None)])
def test_run_of_another_form(tmp_path, field, value):
    """A `run.json` with a field of another type is refused by the name of the field."""
    rows, run = from_scenes('mmvp', 2), tmp_path / 'run'
    run_rows(Counting('counting'), rows, run, progress=False)
    note = json.loads((run / 'run.json').read_text(encoding='utf-8')) | {field: value}
    (run / 'run.json').write_text(json.dumps(note), encoding='utf-8')
    with pytest.raises(ValueError, match=f'run.json has another form .{field}: '):
        run_rows(Counting('counting'), rows, run, progress=False)
