"""Core, presets and records: paths, generators, atomic files, bars, numbers of a run and what
it leaves.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from clear_nb import core, presets, records
from clear_nb.core import ROOT, atomic_path, file_hash, rng, torch_rng
from clear_nb.presets import load_preset
from clear_nb.records import (
    Clock,
    find_stage,
    git_state,
    make_record,
    read_records,
    results_dir,
    write_record,
)

SMOKE = (ROOT / 'params' / 'smoke.yaml').read_text()


@pytest.fixture
def preset(tmp_path):
    """A function that loads a preset from changed text."""

    def load(text, **overrides):
        (tmp_path / 'mine.yaml').write_text(text)
        return load_preset('mine', folder=tmp_path, **overrides)

    return load


def test_root_does_not_depend_on_cwd(tmp_path):
    """Another working folder, the same root."""
    code = 'from clear_nb.core import ROOT; print(ROOT)'
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(ROOT)


def test_generators_are_the_same_in_another_process():
    """Keys, not process state, decide the stream (Python's own hash of strings is salted)."""
    code = "from clear_nb.core import rng; print(rng('scenes', 'train', 0, 17).integers(10**9))"
    out = {
        subprocess.run(
            [sys.executable, '-c', code],
            cwd=ROOT,
            env=dict(os.environ, PYTHONHASHSEED=h),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for h in '01'
    }
    assert out == {f'{rng("scenes", "train", 0, 17).integers(10**9)}\n'}


def test_generators_are_pinned():
    """A changed stream would change every scene and every result."""
    assert rng('pin', 0).integers(10**6, size=3).tolist() == [2443, 751270, 654781]
    assert torch.randint(10**6, (3,), generator=torch_rng('pin', 0)).tolist() == [
        425447,
        357685,
        689287,
    ]


def test_torch_reads_32_bits_on_a_cpu():
    """What the text says of `torch_rng`: the low 32 bits of the hash decide on a CPU."""

    def draw(seed):
        return torch.randn(4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(12345), draw(12345 + 2**32)) and not torch.equal(
        draw(12345), draw(12345 + 2**31)
    )
    seed = torch_rng('pin', 0).initial_seed()
    assert seed >= 2**32 and torch.equal(draw(seed), draw(seed % 2**32))
    assert '32 bits of the hash decide on a CPU' in torch_rng.__doc__


def test_streams_differ():
    """1000 names, 1000 streams; concatenation cannot make two names equal."""
    assert len({rng('x', i).integers(2**62) for i in range(1000)}) == 1000
    assert rng('ab', 'c').random() != rng('a', 'bc').random()


@pytest.mark.parametrize('keys', [(), (1.5,), (None,), (('a', 1),)])
def test_bad_keys(keys):
    """A generator without a proper name is refused."""
    with pytest.raises(ValueError, match='key'):
        rng(*keys)


def test_atomic_path_survives_errors(tmp_path):
    """An error leaves the old file and nothing else."""
    with atomic_path(tmp_path / 'a.npy') as p:
        np.save(p, np.arange(3))
    with pytest.raises(ZeroDivisionError):
        with atomic_path(tmp_path / 'a.npy') as p:
            p.write_text('half')
            1 / 0
    assert np.load(tmp_path / 'a.npy').tolist() == [0, 1, 2] and os.listdir(tmp_path) == ['a.npy']


def test_atomic_path_replaces_folders(tmp_path):
    """A folder is swapped as a whole: no file of the old one stays."""
    for name in ('old', 'new'):
        with atomic_path(tmp_path / 'model') as p:
            p.mkdir()
            (p / name).write_text(name)
    assert os.listdir(tmp_path / 'model') == ['new'] and os.listdir(tmp_path) == ['model']


def test_atomic_path_without_a_file(tmp_path):
    """Writing nothing is an error, not an empty success."""
    with pytest.raises(FileNotFoundError, match='nothing was written'):
        with atomic_path(tmp_path / 'a'):
            pass


def test_preset_is_complete_and_frozen():
    """Every value is readable, none can be assigned."""
    p = load_preset('tiny')
    assert p.grpo.lambda_flow == 0.3 and p.eval.severities == ('clean', 'low', 'mid', 'hard')
    with pytest.raises(AttributeError):
        p.grpo.steps = 1


def test_overrides():
    """Dotted keys change values, open new ones only inside `model`, and are remembered."""
    p = load_preset(
        'smoke',
        **{'grpo.steps': 3, 'eval.seeds': [1, 2], 'sft.lr': 1, 'model.vit.layers': 2}
        if load_preset('smoke').model.get('vit')
        else {'grpo.steps': 3, 'eval.seeds': [1, 2], 'sft.lr': 1, 'model.layers': 2},
    )
    assert (p.grpo.steps, p.eval.seeds, p.sft.lr) == (3, (1, 2), 1.0) and len(p.overrides) == 4
    assert load_preset('smoke').grpo.steps != 3


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('grpo.stesp', 1, "params/smoke.yaml: grpo: unknown key 'stesp', did you mean 'steps'"),
        ('gpro.steps', 1, "no section 'gpro' .* did you mean 'grpo'"),
        ('grpo.steps', '3', 'params/smoke.yaml: grpo.steps must be int, got .3.'),
        ('grpo.steps', True, 'must be int'),
        ('grpo.steps', 1.5, 'must be int'),
        ('grpo.lr', 'fast', 'must be float'),
        ('grpo.lr', float('nan'), 'must be float'),
        ('eval.severities', 'hard', 'must be list of str'),
        ('eval.seeds', ['0'], 'must be int'),
        ('grpo', 3, 'must be a mapping'),
        ('nothing', 3, "unknown key 'nothing'"),
    ],
)
def test_bad_overrides(key, value, message):
    """The error names the file, the key and what would be right."""
    with pytest.raises(ValueError, match=message):
        load_preset('smoke', **{key: value})


@pytest.mark.parametrize(
    'old, new, message',
    [
        (
            '  steps: 1 ',
            '  stepz: 1 ',
            "mine.yaml: grpo: unknown key 'stepz', did you mean 'steps'",
        ),
        ('  prompts: 2 ', '  # gone ', r"grpo: missing \['prompts'\]"),
        ('  prompts: 2 ', '  steps: 2 ', "key 'steps' appears twice"),
        ('sft:', 'stf:', "unknown key 'stf', did you mean 'sft'"),
        ('data:', 'data: [', 'mine.yaml is not valid YAML'),
        ('  prompts: 2 ', '  prompts: two ', 'mine.yaml: grpo.prompts must be int'),
    ],
)
def test_bad_files(preset, old, new, message):
    """A mistake in the file is named, never skipped."""
    assert old in SMOKE
    with pytest.raises(ValueError, match=message):
        preset(SMOKE.replace(old, new, 1))


def test_file_that_is_not_a_mapping(preset):
    """An empty file or a list is refused."""
    for text in ('', '- 1\n'):
        with pytest.raises(ValueError, match='expected sections'):
            preset(text)


@pytest.mark.parametrize('name', ['tinny', '', '../params/tiny'])
def test_unknown_preset(name):
    """The error lists what exists."""
    with pytest.raises(ValueError, match='tiny'):
        load_preset(name)


@pytest.mark.parametrize(
    'text, value', [('1e-4', 1e-4), ('2.5E+3', 2500.0), ('1', 1.0), ('.5', 0.5)]
)
def test_numbers(preset, text, value):
    """YAML's own rule would read 1e-4 as text."""
    assert preset(SMOKE.replace('  lr: 1e-5 ', f'  lr: {text} ')).grpo.lr == value


def test_record_round_trip(tmp_path):
    """Everything needed to doubt a number is in the file."""
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'weights').write_bytes(b'w')
    path = write_record(
        '03_grpo',
        {'a': np.float32(0.5), 'bad': float('nan')},
        load_preset('smoke'),
        2,
        'x=1',
        {'base': tmp_path / 'in'},
        1.5,
        root=tmp_path / 'out',
    )
    [r] = read_records('smoke', '03_grpo', 'x=1', root=tmp_path / 'out')
    assert path.name == '03_grpo-x=1-seed2.json' and r['metrics'] == {'a': 0.5, 'bad': None}
    assert r['params'] == json.loads(json.dumps(asdict(load_preset('smoke')))) and r['inputs'] == {
        'base': file_hash(tmp_path / 'in')
    }
    assert (
        r['seconds'] == 1.5
        and r['peak_memory_mib']['cpu'] > 0
        and {'python', 'torch', 'numpy'} <= r['versions'].keys()
    )


def test_records_are_filtered(tmp_path):
    """By notebook and by variant; '' means unchanged runs."""
    for notebook, variant in [('a', ''), ('a', 'v'), ('b', '')]:
        write_record(notebook, {}, load_preset('smoke'), 0, variant, root=tmp_path)

    def names(**k):
        found = read_records('smoke', root=tmp_path, **k)
        return [(r['notebook'], r['variant']) for r in found]

    assert names(notebook='a') == [('a', 'v'), ('a', '')] or names(notebook='a') == [
        ('a', ''),
        ('a', 'v'),
    ]
    assert names(notebook='a', variant='') == [('a', '')] and len(names()) == 3
    assert read_records('smoke', root=tmp_path / 'nowhere') == []


@pytest.mark.parametrize('text', ['', '{"metrics": {}', '[]', '{"metrics": {}}'])
def test_corrupt_record(tmp_path, text):
    """The error names the file and how to mend it."""
    (tmp_path / 'x-seed0.json').write_text(text)
    with pytest.raises(ValueError, match='x-seed0.json .*run its notebook again'):
        read_records('smoke', root=tmp_path)


@pytest.mark.parametrize(
    'notebook, variant', [('../x', ''), ('03-grpo', ''), ('a', 'b/c'), ('a', 'b-seed1')]
)
def test_record_names(notebook, variant, tmp_path):
    """Names that would clash or leave the folder are refused."""
    with pytest.raises(ValueError, match='record name'):
        write_record(notebook, {}, load_preset('smoke'), 0, variant, root=tmp_path)


def test_changed_run_needs_a_variant(tmp_path):
    """A run with other numbers must not replace the preset's record."""
    changed = load_preset('smoke', **{'grpo.steps': 3})
    with pytest.raises(ValueError, match='variant'):
        write_record('a', {}, changed, 0, root=tmp_path)
    assert write_record('a', {}, changed, 0, 'steps=3', root=tmp_path).exists()


def test_missing_input(tmp_path):
    """A record never claims an input that is not there."""
    with pytest.raises(FileNotFoundError, match='no input'):
        write_record('a', {}, load_preset('smoke'), 0, inputs={'x': tmp_path / 'x'}, root=tmp_path)


def test_smoke_records_stay_out_of_git():
    """results/ holds results; smoke tests code."""
    assert (
        results_dir('smoke') == ROOT / 'runs' / 'smoke' / 'results'
        and results_dir('tiny') == ROOT / 'results' / 'tiny'
    )


def test_git_state(tmp_path, monkeypatch):
    """Commit and dirty flag; results do not count as changes; 'unknown' without git."""
    monkeypatch.setattr(records, 'ROOT', tmp_path)
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert git_state() == dict(commit='unknown', dirty='unknown')

    def git(*a):
        subprocess.run(
            ['git', '-c', 'user.name=t', '-c', 'user.email=t@t', *a],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    (tmp_path / 'a').write_text('1')
    git('init')
    git('add', '.')
    git('commit', '-m', 'x')
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'r.json').write_text('{}')
    assert git_state()['dirty'] is False and len(git_state()['commit']) == 40
    (tmp_path / 'a').write_text('2')
    assert git_state()['dirty'] is True
    monkeypatch.setenv('PATH', '')
    assert git_state() == dict(commit='unknown', dirty='unknown')


def test_file_hash(tmp_path):
    """Content and names count; an absent file is an error."""
    for name, text in [('a', '1'), ('b', '2')]:
        (tmp_path / name).write_text(text)
    first = file_hash(tmp_path)
    (tmp_path / 'b').rename(tmp_path / 'c')
    assert file_hash(tmp_path) != first
    with pytest.raises(FileNotFoundError):
        file_hash(tmp_path / 'b')


def test_find_stage(tmp_path, monkeypatch):
    """A run's own weights win over the shipped ones; what a stage keeps beside them does not
    count.
    """
    monkeypatch.setattr(core.PATHS, 'runs', tmp_path / 'runs')
    monkeypatch.setattr(core.PATHS, 'checkpoints', tmp_path / 'shipped')
    (tmp_path / 'runs' / 'tiny' / 'seed0' / 'sft_state.pt').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='run notebook 01_sft'):
        find_stage('tiny', 0, 'sft')
    (tmp_path / 'shipped' / 'tiny' / 'sft').mkdir(parents=True)
    assert find_stage('tiny', 0, 'sft') == tmp_path / 'shipped' / 'tiny' / 'sft'
    (tmp_path / 'runs' / 'tiny' / 'seed0' / 'sft').mkdir()
    assert find_stage('tiny', 0, 'sft') == tmp_path / 'runs' / 'tiny' / 'seed0' / 'sft'
    with pytest.raises(ValueError, match='sft'):
        find_stage('tiny', 0, 'stf')
    with pytest.raises(
        FileNotFoundError,
        match='put the folder of ByteDance-Seed/BAGEL-7B-MoT, or a link to it, at .*shipped/paper/base',
    ):
        find_stage('paper', 0, 'base')


def test_clock_stops():
    """After the block the seconds stay."""
    with Clock() as c:
        pass
    assert c.seconds == c.seconds < 1


def test_import_is_light():
    """core does not import torch: command line and reports start quickly."""
    code = 'import sys, clear_nb.core; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_make_record_is_json():
    """No value needs a special reader."""
    json.dumps(
        make_record('a', {'x': torch.tensor([1, 2]), 'y': ROOT}, load_preset('tiny'), 0),
        allow_nan=False,
    )


@pytest.mark.parametrize(
    'text, value',
    [
        ('16', 16),
        ('-1', -1),
        ('1e-4', 1e-4),
        ('0.5', 0.5),
        ('true', True),
        ('no', 'no'),
        ('null', None),
        *(
            (t, t)
            for t in (
                'Role: assistant',
                'Role: a. Then: b',
                'use tag #1',
                '#1',
                '[1',
                '[1, 2]',
                '{a: 1}',
                '- x',
                '*x',
                '!x',
                '&x',
                '%',
                '@',
                '`',
                '"5"',
                '=',
                '<<',
                '2026-11-26',
                'x\ty',
                'a=b',
            )
        ),
    ],
)
def test_settings_of_a_command_line(text, value):
    """Numbers, truth values and null; everything else is the text."""
    got = presets.read_settings([f'a={text}', f'b.c={text}'])
    assert got == dict(a=value, b=dict(c=value)) and type(got['a']) is type(value)


def test_settings_that_cannot_be_read():
    for bad in (['a'], ['a=1', 'a.b=2']):
        with pytest.raises(ValueError, match='cannot read'):
            presets.read_settings(bad)


def test_unfinished_records_are_not_read(tmp_path):
    """A record that another process is writing, or that a killed one left, is none."""
    path = write_record('01_sft', dict(a=1), load_preset('smoke'), 0, root=tmp_path)
    (tmp_path / f'.{path.stem}.abc.tmp.json').write_text(path.read_text())
    (tmp_path / f'.{path.stem}.abd.tmp.json').write_text('{')
    assert len(read_records('smoke', root=tmp_path)) == 1


def test_shipped_stages_are_those_of_one_seed(tmp_path, monkeypatch):
    """The shipped base serves every seed; the trained stages that ship are seed 0's, and
    another seed does not borrow them.
    """
    monkeypatch.setattr(core.PATHS, 'runs', tmp_path / 'runs')
    for stage in ('base', 'sft'):
        assert find_stage('tiny', 0, stage) == ROOT / 'checkpoints' / 'tiny' / stage
    assert find_stage('tiny', 3, 'base') == ROOT / 'checkpoints' / 'tiny' / 'base'
    with pytest.raises(
        FileNotFoundError, match="'sft' for preset 'tiny', seed 3: run notebook 01_sft"
    ):
        find_stage('tiny', 3, 'sft')


@pytest.fixture
def unwatched(monkeypatch):
    """Neither a terminal, nor JupyterLab, nor the pipeline."""
    for name in ('JPY_SESSION_NAME', core.BARS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_bars_are_silent_where_nobody_watches(unwatched, capfd):
    """Values pass, nothing is written, and a damaged name of a terminal is no error."""
    for name in (None, '', 'gone', __file__):
        if name is not None:
            unwatched.setenv(core.BARS_VARIABLE, name)
        assert list(core.progress_bar(range(3), 'bar')) == [0, 1, 2] and not core.bars_are_shown()
    assert ''.join(capfd.readouterr()) == ''


def test_bars_in_jupyterlab(unwatched, capfd):
    """A kernel of JupyterLab shows bars, unless the caller wants none."""
    unwatched.setenv('JPY_SESSION_NAME', 'x.ipynb')
    assert core.bars_are_shown()
    list(core.progress_bar(range(3), 'silent', show=False))
    list(core.progress_bar(range(3), 'shown'))
    seen = capfd.readouterr().err
    assert 'shown: 100%' in seen and 'silent' not in seen


def _read(terminal):
    try:
        return os.read(terminal, 2**16)
    except BlockingIOError:
        return b''


def test_bars_at_the_terminal_of_the_pipeline(unwatched, capfd):
    """The bar goes to the named terminal and not to standard error."""
    ours, terminal = os.openpty()
    unwatched.setenv(core.BARS_VARIABLE, os.ttyname(terminal))
    assert list(core.progress_bar(range(3), 'far')) == [0, 1, 2] and core.bars_are_shown()
    os.set_blocking(ours, False)
    seen = b''.join(iter(lambda: _read(ours), b''))
    assert b'far: 100%' in seen and capfd.readouterr().err == ''
    core._open_terminal(os.ttyname(terminal)).close()
    core._open_terminal.cache_clear()
    os.close(ours), os.close(terminal)
