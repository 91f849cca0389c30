"""D2: two processes begin the same work at once; one goes on, the other ends with a sentence."""

import re
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from builder_rows import Misbehaving, write_source
from fake_server import FakeServer
from nbformat import read
from processes import python
from test_pipeline import HEAD, notebook

from clear_nb.core import file_hash
from clear_nb.stored import read_manifest


def at_once(start, go):
    """Start two processes; when one has ended, let the other go on. Both, the first to end first.

    What goes on waits for `go`, so the other one cannot have come too late.
    """
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(start) for _ in range(2)]
        done, still = wait(running, timeout=120, return_when=FIRST_COMPLETED)
        go()
    assert len(done) == len(still) == 1, [p.result() for p in running]
    return [p.result() for p in (*done, *still)]


def check_refusal(lost, status):
    """The process that lost has said one sentence, and no traceback."""
    assert lost.returncode == status, lost.stderr
    [sentence] = lost.stderr.strip().splitlines()
    form = r'(clear-nb: )?\S+ is being written by process \d+ on \S+'
    assert re.match(form, sentence) and sentence.endswith('choose another folder.')


# ----------------------------------------------------------------- build-data


def build(source, out, server):
    """Build training data in a process of its own."""
    command = ['build-data', '--source', source, '--base', 'python:builder_rows:base']
    command += ['--annotator', f'fake@{server.url}', '--out', out, '--n', '8', '--workers', '2']
    recipe = ['--set', 'share=1', 'spare=4', 'relative=true']
    return python('-m', 'clear_nb.cli', *command, *recipe, OPENAI_API_KEY='x')


def test_two_builds_in_one_folder(tmp_path):
    """One training set, as of one process, and no request is sent twice."""
    source, annotator = write_source(tmp_path / 'source', 60), Misbehaving(outages=False)
    with FakeServer(default=annotator) as server:
        alone = build(source, tmp_path / 'alone', server)
        asked = [Misbehaving.name(r) for r in server.requests]
    assert alone.returncode == 0, alone.stderr
    may_answer = threading.Event()

    def answer(request):
        may_answer.wait(180)
        return annotator(request)

    with FakeServer(default=answer) as server:
        lost, won = at_once(lambda: build(source, tmp_path / 'shared', server), may_answer.set)
        again = [Misbehaving.name(r) for r in server.requests]
    check_refusal(lost, 2)
    assert won.returncode == 0, won.stderr
    assert sorted(again) == sorted(asked)
    one, two = (read_manifest(tmp_path / name) for name in ('alone', 'shared'))
    assert one['files'] == two['files'] and one['accounts'] == two['accounts']
    assert {k: file_hash(tmp_path / 'shared' / k) for k in two['files']} == two['files']
    assert not list(tmp_path.glob('.*.lock'))


# ----------------------------------------------------------------- the pipeline

DRIVER = """
import sys
from pathlib import Path
from clear_nb import pipeline
from clear_nb.core import PATHS

house, find = Path(sys.argv[1]), pipeline.notebook_path
PATHS.runs, PATHS.checkpoints, PATHS.figures = house / 'runs', house / 'shipped', house / 'figures'
pipeline.ROOT, pipeline.NOTEBOOK_ORDER = house, ['00_base', '01_sft', '02_bridge', '07_tables']
pipeline.notebook_path = lambda name: find(name, house / 'nbs')
pipeline.check_export = pipeline.write_readme = lambda: None
sys.exit(pipeline.main(sys.argv[2:]))
"""
WORK = """
import time
from pathlib import Path

with open('../{name}.ran', 'a', encoding='utf-8') as f:
    print(seed, file=f)
while not Path('../go').exists():
    time.sleep(0.05)
print('{name} of', seed)
"""


def make_house(house):
    """A project of three notebooks that note that they run and wait for a file."""
    for name in ('01_sft', '02_bridge'):
        notebook(house / 'nbs' / f'{name}.ipynb', HEAD, WORK.format(name=name))
    notebook(
        house / 'nbs' / '07_tables.ipynb',
        "preset:str = 'smoke' # numbers",
        f"seed = 'all'\n{WORK.format(name='07_tables')}",
    )
    return house


def chain(house):
    """Run the chain in a process of its own."""
    return python('-c', DRIVER, house, '--preset', 'smoke')


def outcome(house):
    """What the notebooks printed, and how often each ran."""
    printed = {}
    for path in sorted((house / 'runs').rglob('*.ipynb')):
        outputs = [o for c in read(path, 4).cells for o in c.get('outputs', [])]
        text = ''.join(o.get('text', '') for o in outputs)
        printed[path.relative_to(house).as_posix()] = text
    return printed, {p.stem: p.read_text(encoding='utf-8') for p in sorted(house.glob('*.ran'))}


def test_two_chains_for_one_seed(tmp_path):
    """Each notebook runs once, and what is kept is what one process keeps."""
    alone, shared = (make_house(tmp_path / name) for name in ('alone', 'shared'))
    (alone / 'go').touch()
    assert chain(alone).returncode == 0
    lost, won = at_once(lambda: chain(shared), (shared / 'go').touch)
    check_refusal(lost, 1)
    assert won.returncode == 0, won.stderr
    printed, runs = outcome(shared)
    assert (printed, runs) == outcome(alone)
    assert runs == {'01_sft': '0\n', '02_bridge': '0\n', '07_tables': 'all\n'}
    assert len(printed) == 3 and not list(tmp_path.rglob('.*.lock'))
    again = chain(shared)
    assert again.returncode == 0 and again.stdout.count('up to date') == 3
