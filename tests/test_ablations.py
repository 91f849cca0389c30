"""Ablations at preset smoke: what makes a case, what is trained, what is skipped, what a kill
leaves.
"""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from clear_nb import ablations as ab
from clear_nb import mmd_bench, recipes
from clear_nb.base import new_model
from clear_nb.core import PATHS, ROOT
from clear_nb.data import TrainingSet, labelled_items
from clear_nb.presets import load_preset
from clear_nb.records import read_records, stage_folder

SMOKE = load_preset('smoke')
BENCHMARKS = 'mmbench', 'easyvqa'  # two are enough here
TODO = [
    *ab.cases(SMOKE, most=1),
    ab.lambda_cases(SMOKE, 2)[1],
]  # one of each kind, three for labels, and one that trains stage 3
NAMES = [
    'lambda_flow=0.3',
    'w_acc=0.75+w_fmt=0.1+w_dec=0.15+w_cost=0.0',
    'denoise_steps=2',
    *(f'labels=2+model={m}' for m in ('clear', 'always', 'matched')),
    'lambda_flow=0.0',
]


@lru_cache
def fresh():
    return new_model(SMOKE, 0, 50)


def load(preset, seed, stage):
    """Fresh weights, whatever a run has left behind."""
    return copy.deepcopy(fresh())


def nothing(*args, **kw):
    raise AssertionError('this should have been kept')


def run(todo, home, load=load):
    return ab.run_cases(
        todo, SMOKE, 0, load=load, progress=False, root=home / 'records', folder=home / 'cache'
    )


WATCHED = {
    n: c
    for n, c in zip(NAMES, TODO)
    if n
    in (
        'lambda_flow=0.3',
        'denoise_steps=2',
        'labels=2+model=clear',
        'labels=2+model=matched',
        'lambda_flow=0.0',
    )
}
ASKED, LABELS, RL = (
    list(WATCHED)[k : k + 2] for k in (0, 2, 4)
)  # nothing trained; stages 1 and 2; stage 3


def stale(home):
    """Names of the watched cases that would run again."""
    return [n for n, c in WATCHED.items() if not ab.is_recorded(c, SMOKE, 0, home / 'records')]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Every case once, in a folder of its own."""
    home = tmp_path_factory.mktemp('ablations')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PATHS, 'runs', home / 'runs')
        patch.setattr(mmd_bench, 'BENCHMARKS', BENCHMARKS)
        run(TODO, home)
    return home


@pytest.fixture
def home(finished, monkeypatch):
    """The finished cases, for reading."""
    monkeypatch.setattr(PATHS, 'runs', finished / 'runs')
    monkeypatch.setattr(mmd_bench, 'BENCHMARKS', BENCHMARKS)
    return finished


@pytest.fixture
def empty(finished, tmp_path, monkeypatch):
    """A folder without weights and records; the benchmarks are there."""
    monkeypatch.setattr(PATHS, 'runs', tmp_path / 'runs')
    monkeypatch.setattr(mmd_bench, 'BENCHMARKS', BENCHMARKS)
    (tmp_path / 'cache').symlink_to(finished / 'cache')
    return tmp_path


def test_every_kind_leaves_its_record(home):
    """One record per case, with outcomes of every benchmark, clean and hard, under a name made
    of its values.
    """
    found = {r['variant']: r['metrics'] for r in ab.ablation_records('smoke', home / 'records')}
    assert sorted(found) == sorted(NAMES) and {m['kind'] for m in found.values()} == set(
        ab.CASE_KINDS
    )
    for name, m in found.items():
        (cells,) = m['scores'].values()
        assert (
            tuple(cells) == BENCHMARKS
            and all(list(c) == ['clean', 'hard'] for c in cells.values())
            and ab.case_name(m['values']) == name
        )
    assert [n for n, m in found.items() if 'denoise_seconds' in m] == ['denoise_steps=2'] and found[
        'denoise_steps=2'
    ]['denoise_seconds'] > 0


def test_what_is_trained(home):
    """The preset's own values and the denoising steps use finished weights; CLEAR asked in two
    ways is trained once.
    """
    history = {
        r['variant']: r['metrics']['history'] for r in read_records('smoke', root=home / 'records')
    }
    assert [sorted(history[n]) for n in NAMES] == [
        [],
        [],
        [],
        ['bridge', 'sft'],
        ['bridge', 'sft'],
        ['matched'],
        ['grpo'],
    ]
    folders = [p for p in (stage_folder('smoke', 0, 'ablations')).iterdir() if p.is_dir()]
    assert sorted(re.sub(r'-\w{8}', '', p.name) for p in folders) == [
        'clear-data.labelled=2',
        'clear-data.labelled=2_sft',
        'matched-data.labelled=2',
        'rl-grpo.lambda_flow=0.0',
    ]


def test_control_has_as_many_updates(home):
    """The control trains as many updates as both stages of CLEAR together."""
    history = {
        r['variant']: r['metrics']['history'] for r in read_records('smoke', root=home / 'records')
    }
    clear, matched = history['labels=2+model=clear'], history['labels=2+model=matched']
    assert (
        len(matched['matched'])
        == len(clear['sft']) + len(clear['bridge'])
        == SMOKE.sft.steps + SMOKE.bridge.steps
    )


def test_skips_what_is_up_to_date(home, capsys):
    """A second call neither loads, trains nor writes."""
    assert run(TODO, home, nothing) == []
    assert capsys.readouterr().out.count('up to date') == len(TODO)


def test_weights_outlive_their_record(home, tmp_path):
    """A lost record is made again from the weights that are still there."""
    case = TODO[NAMES.index('labels=2+model=matched')]
    (out,) = ab.run_cases(
        [case], SMOKE, 0, load=nothing, progress=False, root=tmp_path, folder=home / 'cache'
    )

    def said(root):
        return {
            (b, s): (c['correct'], c['version'])
            for r in read_records('smoke', variant='labels=2+model=matched', root=root)
            for b, levels in r['metrics']['scores']['matched'].items()
            for s, c in levels.items()
        }

    assert len(said(tmp_path)) == 4 and said(tmp_path) == said(home / 'records')


CHANGES = [
    (dict(eval=dict(n=3)), list(WATCHED)),
    (dict(grpo=dict(lr=1e-3)), RL),
    (dict(sft=dict(steps=3)), LABELS),
    (dict(eval=dict(denoise_steps=3)), [n for n in WATCHED if n != 'denoise_steps=2']),
]  # that case sets the number itself


@pytest.mark.parametrize('change, want', CHANGES, ids=[str(c) for c, _ in CHANGES])
def test_a_changed_number_makes_stale(home, monkeypatch, change, want):
    """A number in params/ reaches exactly the records that rest on it."""

    def changed(name, **overrides):
        p = load_preset(name, **overrides)
        return replace(
            p,
            **{
                s: replace(
                    getattr(p, s),
                    **{k: v for k, v in values.items() if f'{s}.{k}' not in overrides},
                )
                for s, values in change.items()
            },
        )

    monkeypatch.setattr(ab, 'load_preset', changed)
    assert stale(home) == want


CODES = [
    ('grpo', '\ndef more(): return 1\n', LABELS + RL),
    ('mot', '\nmore = 1\n', list(WATCHED)),
    ('figures', '\nmore = 1\n', []),
    ('grpo', '\n# a remark\n', []),
]


@pytest.mark.parametrize(
    'module, more, want', CODES, ids=[f'{m}{t.strip()[:5]}' for m, t, _ in CODES]
)
def test_changed_code_makes_stale(home, monkeypatch, tmp_path, module, more, want):
    """Code that trains or asks makes its records stale; remarks and captions do not."""
    for p in PATHS.package.glob('*.py'):
        shutil.copy(p, tmp_path)
    monkeypatch.setattr(PATHS, 'package', tmp_path)
    path = tmp_path / f'{module}.py'
    path.write_text(path.read_text() + more)
    assert stale(home) == want


def test_a_changed_recipe_makes_stale(home, monkeypatch, tmp_path):
    """How this module trains counts too."""
    for p in PATHS.package.glob('*.py'):
        shutil.copy(p, tmp_path)
    path, line = tmp_path / 'recipes.py', "t, _labelled(t), 'matched', 'matched'"
    source = path.read_text(encoding='utf-8')
    assert source.count(line) == 1
    path.write_text(source.replace(line, line.replace("'matched'", "'text'", 1)), encoding='utf-8')
    monkeypatch.setattr(PATHS, 'package', tmp_path)
    assert stale(home) == LABELS + RL


@pytest.mark.parametrize('stage, want', [('grpo', ASKED), ('bridge', RL), ('base', LABELS)])
def test_new_weights_make_stale(finished, tmp_path, monkeypatch, stage, want):
    """Other weights at the start: what rests on them is asked again."""
    monkeypatch.setattr(PATHS, 'runs', tmp_path)
    folder = stage_folder('smoke', 0, stage)
    folder.mkdir(parents=True)
    (folder / 'w').write_text('other')
    assert stale(finished) == want


KILLED = """
import os, signal, sys
from pathlib import Path
from clear_nb import ablations as ab, mmd_bench
from clear_nb.base import new_model
from clear_nb.core import PATHS
from clear_nb.presets import load_preset
home, calls, smoke = Path(sys.argv[1]), [], load_preset('smoke')
PATHS.runs = home/'runs'
def load(preset, seed, stage):
    calls.append(stage)
    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
    return new_model(preset, seed, 50)
ab.run_cases(ab.lambda_cases(smoke, 2), smoke, 0, load=load, progress=False, root=home/'records', folder=home/'cache')
"""


def test_kill_between_two_cases(empty):
    """kill -9 when the second case begins: the first is kept as it was, only the second runs
    afterwards.
    """
    todo = ab.lambda_cases(SMOKE, 2)
    done = subprocess.run(
        [sys.executable, '-c', KILLED, str(empty)],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (first,) = (empty / 'records').iterdir()
    before = first.read_bytes()
    assert [p.name for p in run(todo, empty)] == [
        '06_ablations-lambda_flow=0.0-seed0.json'
    ] and first.read_bytes() == before


def test_kill_between_two_stages(empty, monkeypatch):
    """A stop in stage 2: stage 1 is not trained again, and the result is that of an undisturbed
    run.
    """
    case = ab.label_cases(SMOKE, 1)[0]

    class Stopped(Exception):
        pass

    def stop(*args, **kw):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(recipes, 'train_bridge', stop)
        with pytest.raises(Stopped):
            run([case], empty)
    assert not (empty / 'records').exists()
    with monkeypatch.context() as patch:
        patch.setattr(recipes, 'train_sft', nothing)
        run([case], empty)

    def files(runs):
        return {
            p.relative_to(runs): p.read_bytes() for p in runs.rglob('clear-*/model.safetensors')
        }

    resumed = files(empty / 'runs')
    PATHS.runs = empty / 'again'
    ab.run_case(case, SMOKE, 0, load, progress=False, root=empty / 'other', folder=empty / 'cache')
    assert resumed and resumed == files(empty / 'again')


def test_budgets():
    """Ascending, the preset's own number among them, never less than one picture holds; a list
    in words is refused.
    """
    tiny = load_preset('tiny')
    assert (
        ab.budgets(tiny) == sorted(ab.budgets(tiny))
        and tiny.data.labelled in ab.budgets(tiny)
        and min(ab.budgets(SMOKE)) == SMOKE.data.questions_per_image
    )
    assert [c.values['labels'] for c in ab.label_cases(SMOKE, text='4, 8')] == [4, 4, 4, 8, 8, 8]
    for bad in ('4;8', 'many', '0', '-3', '4,'):
        with pytest.raises(ValueError, match='numbers with commas between'):
            ab.budgets(tiny, bad)


def test_budgets_are_nested():
    """A small budget is the beginning of a large one."""
    few, many = (labelled_items(0, n, 2, 'sft') for n in (4, 8))
    assert len(few) == 2 and all(
        np.array_equal(a.seen, b.seen) and a.questions == b.questions for a, b in zip(few, many)
    )


def test_too_few_labels(empty, monkeypatch):
    """Nothing left after balancing is an error that says what to do."""
    monkeypatch.setattr(recipes, 'labelled_set', lambda *a, **k: (TrainingSet(None), 0.0))
    with pytest.raises(ValueError, match='2 labelled questions.*use more'):
        run([ab.label_cases(SMOKE, 1)[2]], empty)


def test_values_by_hand_stay_out(home, tmp_path):
    """Another number of questions gets a name of its own, and no table reads it."""
    few = load_preset('smoke', **{'eval.n': 1})
    (out,) = ab.run_cases(
        [TODO[0]], few, 0, load=load, progress=False, root=tmp_path, folder=home / 'cache'
    )
    assert (
        out.name == '06_ablations-lambda_flow=0.3+eval.n=1-seed0.json'
        and ab.ablation_records('smoke', tmp_path) == []
    )
    assert ab.is_recorded(TODO[0], few, 0, tmp_path) and not ab.is_recorded(
        TODO[0], SMOKE, 0, tmp_path
    )
