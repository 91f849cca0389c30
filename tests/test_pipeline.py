"""The strict runner, on toy notebooks with real kernels."""

import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from processes import python

from clear_nb import pipeline, readme
from clear_nb.core import PATHS, ROOT
from clear_nb.identity import differences, identity_key, reached_modules
from clear_nb.pipeline import (
    NotebookFailed,
    main,
    reasons_to_run,
    run,
    stale_exports,
    stamp,
    steps,
)

CHAIN = steps('base', full=True)
HEAD = "preset:str = 'smoke' # numbers\nseed:int = 0 # run\nsteps:int = 2 # updates"


def notebook(path, *sources, tags=('parameters',)):
    """Write a notebook; the n-th tag goes to the n-th cell."""
    cells = [new_code_cell(s) for s in sources]
    for cell, tag in zip(cells, tags):
        cell.metadata['tags'] = [tag]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(
        new_notebook(
            cells=cells,
            metadata=dict(
                kernelspec=dict(display_name='python3', language='python', name='python3')
            ),
        ),
        path,
    )
    return path


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A project with an in-sync library whose runs and notebooks lie in a temporary folder."""
    monkeypatch.setattr(pipeline, 'check_export', lambda: None)
    monkeypatch.setattr(PATHS, 'runs', tmp_path / 'runs')
    monkeypatch.setattr(PATHS, 'checkpoints', tmp_path / 'shipped')
    monkeypatch.setattr(PATHS, 'figures', tmp_path / 'figures')
    monkeypatch.setattr(pipeline, 'ROOT', tmp_path)
    monkeypatch.setattr(readme, 'ROOT', tmp_path)
    find = pipeline.notebook_path
    monkeypatch.setattr(pipeline, 'notebook_path', lambda n: find(n, tmp_path / 'nbs'))
    monkeypatch.setattr(pipeline, 'NOTEBOOK_ORDER', ['01_sft', '02_bridge', '07_tables'])
    return tmp_path


def text(path):
    return ''.join(
        o.get('text', '') for c in nbformat.read(path, 4).cells for o in c.get('outputs', [])
    )


def test_values_arrive(house):
    """Preset, seed and extra values replace the defaults; the kernel works in the notebook's
    folder.
    """
    notebook(
        house / 'nbs' / '01_sft.ipynb',
        HEAD,
        'import os; print(preset, seed, steps, os.path.basename(os.getcwd()))',
    )
    out = run('01_sft', 'smoke', 3, steps=5)
    assert (
        out == house / 'runs' / 'smoke' / 'seed3' / '01_sft.ipynb'
        and text(out).strip() == 'smoke 3 5 nbs'
    )
    assert sorted(p.name for p in out.parent.iterdir()) == ['01_sft.ipynb', '01_sft.stamp.json']


@pytest.mark.parametrize('tags', [(), ('parameters', 'parameters')])
def test_needs_one_parameters_cell(house, tags):
    """papermill would run such a notebook with its defaults."""
    notebook(house / 'nbs' / '01_sft.ipynb', HEAD, 'steps = 3', tags=tags)
    with pytest.raises(ValueError, match='tagged `parameters`'):
        run('01_sft', 'smoke')
    assert not (house / 'runs').exists()


def test_unknown_names(house):
    """A misspelt parameter, notebook or preset is refused before anything runs."""
    notebook(house / 'nbs' / '01_sft.ipynb', HEAD)
    with pytest.raises(ValueError, match="no parameter 'step': did you mean 'steps'"):
        run('01_sft', 'smoke', step=5)
    with pytest.raises(ValueError, match="did you mean '01_sft'"):
        run('01_stf', 'smoke')
    with pytest.raises(ValueError, match="did you mean 'smoke'"):
        run('01_sft', 'smok')
    notebook(house / 'nbs' / '07_tables.ipynb', "preset = 'smoke'")
    with pytest.raises(ValueError, match="no parameter 'seed'"):
        run('07_tables', 'smoke', 0)
    assert not (house / 'runs').exists()


def test_failing_cell(house):
    """The final name stays free; the partial output is named and holds the traceback."""
    notebook(house / 'nbs' / '01_sft.ipynb', HEAD, "print('before')", "raise KeyError('inside')")
    with pytest.raises(
        NotebookFailed,
        match="01_sft failed in cell 3: KeyError: 'inside'\npartial output: .*01_sft.partial.ipynb",
    ):
        run('01_sft', 'smoke')
    folder = house / 'runs' / 'smoke' / 'seed0'
    assert [p.name for p in folder.iterdir()] == ['01_sft.partial.ipynb'] and 'before' in text(
        folder / '01_sft.partial.ipynb'
    )


def test_dead_kernel(house):
    """A kernel that dies (memory, a crash in C) is reported like an error."""
    notebook(
        house / 'nbs' / '01_sft.ipynb',
        HEAD,
        'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
    )
    with pytest.raises(NotebookFailed, match='01_sft failed in DeadKernelError'):
        run('01_sft', 'smoke')


def test_up_to_date(house, capfd):
    """Runs again only when something that goes in has changed, or on request."""
    path = notebook(house / 'nbs' / '01_sft.ipynb', HEAD, 'print(steps)')
    out = run('01_sft', 'smoke')

    def ran(**k):
        before = out.stat().st_mtime_ns
        run('01_sft', 'smoke', **k)
        return out.stat().st_mtime_ns > before

    def edit(more):
        nb = nbformat.read(path, 4)
        nb.cells[1].source += more
        nbformat.write(nb, path)

    assert not ran() and ran(steps=3) and ran() and ran(force=True)
    edit(' # a comment')
    assert not ran()
    capfd.readouterr()
    edit('\nprint(1)')
    assert ran() and not ran()
    assert '01_sft runs again: other code in 01_sft.ipynb\n' in capfd.readouterr().out
    assert ran(steps=4) and ran(steps=5)
    assert '01_sft runs again: parameters.steps: 4 there, 5 here\n' in capfd.readouterr().out
    run('01_sft', 'smoke', steps=5)
    out.unlink()
    run('01_sft', 'smoke', steps=5)
    assert out.exists() and '01_sft: up to date' in capfd.readouterr().out


def test_stamp_covers_what_goes_in(house):
    """Code, preset, seed, parameters and the products of earlier stages; not outputs or later
    stages.
    """
    path = notebook(house / 'nbs' / '02_bridge.ipynb', HEAD, 'from clear_nb.paper import audit')
    first = stamp(path, 'smoke', 0, {})
    others = [
        stamp(path, 'tiny', 0, {}),
        stamp(path, 'smoke', 1, {}),
        stamp(path, 'smoke', 0, {'steps': 3}),
    ]
    (house / 'shipped' / 'smoke' / 'sft').mkdir(parents=True)
    (house / 'shipped' / 'smoke' / 'sft' / 'w').write_text('shipped')
    others.append(stamp(path, 'smoke', 0, {}))
    model = house / 'runs' / 'smoke' / 'seed0' / 'sft'
    for weights in '12':
        model.mkdir(parents=True, exist_ok=True)
        (model / 'w').write_text(weights)
        others.append(stamp(path, 'smoke', 0, {}))
    assert len({identity_key(made) for made in (first, *others)}) == 1 + len(others)
    assert differences(*others[-2:]) == ['other content of runs/smoke/seed0/sft']
    assert differences(first, others[2]) == ['parameters.steps: None there, 3 here']
    (house / 'runs' / 'smoke' / 'seed0' / 'grpo').mkdir(parents=True)
    nb = nbformat.read(path, 4)
    nb.cells[1].outputs = [nbformat.v4.new_output('stream', text='x')]
    nbformat.write(nb, path)
    assert stamp(path, 'smoke', 0, {}) == others[-1]


def test_missing_product(house):
    """Somebody deleted the weights: the stage is not finished any more."""
    code = '\n'.join(
        [
            'from pathlib import Path',
            f"p = Path({str(house)!r})/'runs/smoke/seed0/sft/model'",
            "p.mkdir(parents=True, exist_ok=True); (p/'w').write_text('1')",
        ]
    )
    notebook(house / 'nbs' / '01_sft.ipynb', HEAD, code)
    out = run('01_sft', 'smoke')
    made = json.loads(out.with_suffix('.stamp.json').read_text())['made']
    assert reasons_to_run(out, made) == []
    weights = house / 'runs' / 'smoke' / 'seed0' / 'sft' / 'model' / 'w'
    weights.write_text('2')  # of another run
    assert reasons_to_run(out, made) == ['sft was altered']
    weights.write_text('1')
    assert reasons_to_run(out, made) == []
    shutil.rmtree(house / 'runs' / 'smoke' / 'seed0' / 'sft')
    assert reasons_to_run(out, made) == ['sft is gone']


def test_missing_figure(house, capfd):
    """A table that was removed or altered is drawn again; one that the notebook did not write
    is not its own.
    """
    table = house / 'figures' / 'smoke' / 't.md'
    code = f"from pathlib import Path\np = Path({str(table)!r}); p.parent.mkdir(parents=True, exist_ok=True); p.write_text('1')"
    notebook(house / 'nbs' / '07_tables.ipynb', "preset:str = 'smoke'", code)
    table.parent.mkdir(parents=True)
    (other := table.with_name('other.md')).write_text('x')
    os.utime(other, (1, 1))
    run('07_tables', 'smoke', None)
    for spoil in (lambda: table.unlink(), lambda: table.write_text('garbage')):
        spoil()
        run('07_tables', 'smoke', None)
        assert table.read_text() == '1'
    other.unlink()
    capfd.readouterr()
    run('07_tables', 'smoke', None)
    assert '07_tables: up to date' in capfd.readouterr().out


WATCHED = """
import sys
from pathlib import Path
from clear_nb import pipeline
from clear_nb.core import PATHS
house = Path(sys.argv[1])
PATHS.runs = house/'runs'; pipeline.check_export = lambda: None
pipeline.run(house/'nbs'/'01_sft.ipynb', 'smoke')
"""


@pytest.mark.parametrize('watched', [True, False])
def test_bars_are_seen_and_not_saved(house, watched):
    """A person at a terminal sees the bars of the notebook; a log and the saved notebook do not
    hold them.
    """
    code = "from clear_nb.core import progress_bar\nfor k in progress_bar(range(3), 'of the kernel'): pass\nprint(k)"
    notebook(house / 'nbs' / '01_sft.ipynb', HEAD, code)
    ours, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, '-c', WATCHED, str(house)]
    env = dict(os.environ, PYTHONPATH=str(ROOT), JPY_SESSION_NAME='of JupyterLab')
    err = terminal if watched else subprocess.PIPE
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=err, timeout=200
    )
    os.set_blocking(ours, False)
    try:
        seen = os.read(ours, 2**16).decode()
    except BlockingIOError:
        seen = done.stderr.decode()
    os.close(ours), os.close(terminal)
    out = house / 'runs' / 'smoke' / 'seed0' / '01_sft.ipynb'
    assert done.returncode == 0, seen
    outputs = [o for c in nbformat.read(out, 4).cells for o in c.get('outputs', [])]
    assert [o['text'].strip() for o in outputs] == ['2']
    assert ('of the kernel: 100%' in seen, 'Executing' in seen) == (watched, watched), repr(seen)


def test_chain_stops_at_a_failure(house, capfd):
    """Later notebooks do not run; the next call skips what is finished."""
    for name, body in [
        ('01_sft', 'print(1)'),
        ('02_bridge', "raise ValueError('no')"),
        ('07_tables', 'print(1)'),
    ]:
        head = HEAD if name != '07_tables' else "preset:str = 'smoke'"
        notebook(house / 'nbs' / f'{name}.ipynb', head, body)
    pipeline.NOTEBOOK_ORDER.insert(0, '00_base')
    assert main(['--preset', 'smoke']) == 1
    assert '02_bridge failed in cell 2: ValueError: no' in capfd.readouterr().err
    assert not (house / 'runs' / 'smoke' / '07_tables.ipynb').exists()
    notebook(house / 'nbs' / '02_bridge.ipynb', HEAD, 'print(2)')
    assert main(['--preset', 'smoke']) == 0
    assert (
        '01_sft: up to date' in capfd.readouterr().out
        and (house / 'runs' / 'smoke' / '07_tables.ipynb').exists()
    )


KILLED = """
import sys
from pathlib import Path
from clear_nb import pipeline, readme
from clear_nb.core import PATHS
house = Path(sys.argv[1]); find = pipeline.notebook_path
PATHS.runs = house/'runs'; pipeline.ROOT = readme.ROOT = house; pipeline.check_export = lambda: None
pipeline.notebook_path = lambda n: find(n, house/'nbs')
pipeline.NOTEBOOK_ORDER = ['00_base', '01_sft', '02_bridge']
pipeline.run_all('smoke')
"""


@pytest.mark.slow
def test_kill_and_resume(house):
    """kill -9 in the second stage: the first is skipped afterwards, the second runs to its end."""
    flag = house / 'go'
    notebook(house / 'nbs' / '01_sft.ipynb', HEAD, 'print(1)')
    notebook(
        house / 'nbs' / '02_bridge.ipynb',
        HEAD,
        f'import os, time\nfor _ in range(600):\n    if os.path.exists({str(flag)!r}): break\n    time.sleep(.05)',
    )
    folder = house / 'runs' / 'smoke' / 'seed0'
    child = subprocess.Popen(
        [sys.executable, '-c', KILLED, str(house)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.time() + 90
    while (
        not (folder / '02_bridge.partial.ipynb').exists()
        and time.time() < end
        and child.poll() is None
    ):
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (folder / '01_sft.stamp.json').exists() and not (folder / '02_bridge.ipynb').exists()
    before = (folder / '01_sft.ipynb').stat().st_mtime_ns
    flag.write_text('')
    subprocess.run(
        [sys.executable, '-c', KILLED, str(house)], cwd=ROOT, check=True, capture_output=True
    )
    assert (folder / '01_sft.ipynb').stat().st_mtime_ns == before
    assert sorted(p.name for p in folder.iterdir()) == [
        '01_sft.ipynb',
        '01_sft.stamp.json',
        '02_bridge.ipynb',
        '02_bridge.stamp.json',
    ]


def test_stale_export(tmp_path, monkeypatch):
    """An edited library notebook stops every run until it is exported."""
    cells = [
        '#| default_exp one',
        '#| export\nfrom clear_nb.core import rng\ndef f(): return rng(0)',
    ]
    path = notebook(tmp_path / 'nbs' / 'method' / 'one.ipynb', *cells, tags=())
    from nbdev.export import nb_export

    nb_export(path, lib_path=tmp_path / 'clear_nb')
    assert stale_exports(tmp_path / 'nbs', tmp_path / 'clear_nb') == []
    notebook(path, cells[0], cells[1].replace('rng(0)', 'rng(1)'), tags=())
    assert stale_exports(tmp_path / 'nbs', tmp_path / 'clear_nb') == ['one']
    monkeypatch.setattr(pipeline, '_stale', lambda key: ('one',))
    with pytest.raises(RuntimeError, match='older than one .*nbdev_export'):
        run(notebook(tmp_path / 'x.ipynb', HEAD), 'smoke', out=tmp_path / 'y.ipynb')


def test_modules_follow_imports():
    """A notebook is stale by what it reaches: claims reach paper, paper does not reach claims."""
    assert reached_modules('def f():\n    from clear_nb.paper import audit') == ['core', 'paper']
    assert {'core', 'paper', 'claims'} <= set(reached_modules('from clear_nb import claims as r'))
    path = PATHS.package / 'claims.py'
    assert 'claims' not in reached_modules((PATHS.package / 'paper.py').read_text())
    assert pipeline.made_from(path)['code'].keys() >= {'claims.py', 'core', 'paper'}


@pytest.mark.parametrize('start, seeds', [('sft', [0]), ('base', [0, 1])])
def test_order(start, seeds):
    """Training notebooks once per seed, in order; summaries once, at the end; no ablations."""
    got = steps(start, seeds)
    train = [
        s
        for s in pipeline.NOTEBOOK_ORDER[start == 'sft' :]
        if s not in pipeline.SUMMARY_NOTEBOOKS and s not in pipeline.FULL_CHAIN_ONLY
    ]
    assert got == [(s, k, {}) for k in seeds for s in train] + [
        ('07_tables', None, {}),
        ('08_figures', None, {}),
    ]


def test_full_order():
    """Variants follow their notebook and come before the evaluation; ablations only for the
    first seed, with all rows.
    """
    got = steps('sft', [3, 4], full=True)
    dec, control = (
        dict(mode='reencode', variant='dec'),
        dict(start='matched', policy='never', variant='matched'),
    )
    first = [
        ('01_sft', {}),
        ('02_bridge', {}),
        ('03_grpo', {}),
        ('03_grpo', dec),
        ('03_grpo', control),
        ('04_mmd_bench', {}),
        ('05_gallery', {}),
        ('05_perceptual', {}),
        ('06_ablations', dict(most=0)),
    ]
    assert got == [(s, 3, p) for s, p in first] + [
        (s, 4, p) for s, p in first if s not in pipeline.FULL_CHAIN_ONLY
    ] + [('07_tables', None, {}), ('08_figures', None, {})]


def test_every_step_can_run():
    """Each notebook of the full chain knows the parameters that the chain passes."""
    for name, seed, params in steps('base', [0], full=True):
        pipeline.check_parameters(
            pipeline.notebook_path(name), [*params, 'preset', *([] if seed is None else ['seed'])]
        )


def test_products_of_variants(house, monkeypatch):
    """A variant owns its folder and its record, the plain run the others."""
    results, seed0 = house / 'results', house / 'runs' / 'tiny' / 'seed0'
    monkeypatch.setattr(pipeline, 'results_dir', lambda preset: results)
    for p in (seed0 / 'grpo', seed0 / 'grpo-dec', results):
        p.mkdir(parents=True)
    for v in ('', '-dec', '-lambda_flow=0.1'):
        (results / f'03_grpo{v}-seed0.json').write_text('{}')

    def names(variant):
        found = pipeline._products(seed0 / 'x.ipynb', '03_grpo', 'tiny', 0, variant)
        return sorted(map(os.path.basename, found))

    assert names('dec') == ['03_grpo-dec-seed0.json', 'grpo-dec']
    assert names('') == ['03_grpo-lambda_flow=0.1-seed0.json', '03_grpo-seed0.json', 'grpo']


def test_seeds_side_by_side(house, monkeypatch):
    """Each seed once in a process of its own with one thread; a failure is named, and later
    seeds do not start.
    """
    calls = []

    def process(children, command, stdout, env, **kw):
        calls.append(command)
        stdout.write('05_perceptual failed in cell 3\n' if command[-1] == '1' else 'fine\n')
        stdout.flush()
        return int(command[-1] == '1')

    monkeypatch.setattr(pipeline.Children, 'run', process)
    monkeypatch.setattr(pipeline, 'run_steps', lambda todo, *a: calls.append(todo))
    monkeypatch.setattr(pipeline, 'write_readme', lambda: None)
    pipeline.run_all('smoke', seeds=(0, 2), full=True, jobs=2)
    assert sorted(c[-1] for c in calls[:2]) == ['0', '2'] and all('--all' in c for c in calls[:2])
    assert [s[0] for s in calls[2]] == ['07_tables']
    calls.clear()
    with pytest.raises(NotebookFailed, match='seed 1 failed:\n05_perceptual failed in cell 3'):
        pipeline.run_seeds('smoke', 'sft', [1, 2, 3, 4, 5, 6, 7, 8], False, False, 1)
    assert len(calls) < 8


def test_interrupt(house, monkeypatch, capsys):
    """Ctrl-C ends the whole chain: seeds that wait do not start, and the message says how to go
    on.
    """
    calls = []

    def process(children, command, **kw):
        calls.append(command[-1])
        time.sleep(0.2)
        return -signal.SIGINT

    def wait(running):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Children, 'run', process)
    monkeypatch.setattr(pipeline, 'as_completed', wait)
    assert main(['--preset', 'smoke', '--all', '--jobs', '2', '--seed', *map(str, range(8))]) == 130
    assert len(calls) <= 2
    assert 'goes on after the last finished step' in capsys.readouterr().err


def test_command_line(capsys):
    """A mistake is one sentence and status 1; an unknown option is argparse's own error."""
    assert main(['--preset', 'tinny']) == 1
    err = capsys.readouterr().err
    assert "did you mean 'tiny'" in err and 'Traceback' not in err
    with pytest.raises(SystemExit):
        main(['--from', 'grpo'])


def test_module_runs_as_a_program():
    """`python -m clear_nb.pipeline` is what the Makefile calls."""
    done = subprocess.run(
        [sys.executable, '-m', 'clear_nb.pipeline', '--help'],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and '--preset' in done.stdout


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.timeout(1500)
@pytest.mark.skipif(
    any(not (ROOT / 'nbs' / f'{s}.ipynb').exists() for s, *_ in CHAIN),
    reason='a pipeline notebook is missing',
)
def test_smoke_chain(tmp_path, forks):
    """The full chain at preset smoke in a copy of the tree; a second call has nothing to do.

    It executes every notebook of the pipeline with its defaults, which are the smoke values (`test_params`). The kernels are
    forks of a process that has imported torch; the package is that of the copy.
    """
    assert {name for name, *_ in CHAIN} == set(pipeline.NOTEBOOK_ORDER)
    env = dict(PYTHONPATH=str(tmp_path), JUPYTER_PATH=str(forks.ready().kernels))
    for folder in ('nbs', 'clear_nb', 'params'):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'),
        )
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    command = [
        '-m',
        'clear_nb.pipeline',
        '--preset',
        'smoke',
        '--from',
        'base',
        '--all',
        '--seed',
        '0',
    ]
    first, second = (python(*command, seconds=700, cwd=tmp_path, **env) for _ in range(2))
    assert first.returncode == 0, (first.returncode, first.stderr[-3000:])
    assert second.stdout.count('up to date') == len(CHAIN), second.stdout
    assert list((tmp_path / 'runs' / 'smoke' / 'results').glob('04_mmd_bench-*-seed0.json'))
