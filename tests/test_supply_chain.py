"""Nothing that is opened may run code, nothing that is kept may hold a secret."""

import ast
import json
import re
import subprocess

import nbformat
import pytest

from clear_nb.core import ROOT

TRACKED = [
    ROOT / f
    for f in subprocess.run(
        ['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if (ROOT / f).is_file()
]
PYTHON = [
    p
    for p in TRACKED
    if p.suffix == '.py' and p.parts[len(ROOT.parts)] in ('clear_nb', 'benchmarks')
]
NOTEBOOKS = [p for p in TRACKED if p.suffix == '.ipynb']
SECRET = re.compile(
    r'(?<![\w-])(sk-(?!secret-0123456789)[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{20,}'
    r'|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|xox[abp]-[\w-]{20,})'
    r'|-----BEGIN [A-Z ]*PRIVATE KEY'
)
PICKLES = {'.pkl', '.pickle', '.pt', '.pth', '.bin', '.ckpt', '.joblib', '.dill'}


def calls(tree):
    """(dotted name, call) of every call of a module."""
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def keyword(call, name):
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def dangers(source):
    """What in a source could run code out of data."""
    found = []
    for name, call in calls(ast.parse(source)):
        last = name.rpartition('.')[2]
        if name == 'torch.load' and keyword(call, 'weights_only') != 'True':
            found.append('torch.load without weights_only=True')
        if keyword(call, 'trust_remote_code') not in (None, 'False'):
            found.append('trust_remote_code')
        if last in ('loads', 'load') and name.split('.')[0] in (
            'pickle',
            'dill',
            'joblib',
            'cloudpickle',
            'marshal',
        ):
            found.append(name)
        if name in ('yaml.load', 'yaml.unsafe_load') and '_Loader' not in ast.unparse(call):
            found.append(name)
        if name in ('eval', 'exec') or name == 'os.system' or keyword(call, 'shell') == 'True':
            found.append(name)
        if name in ('np.load', 'numpy.load') and keyword(call, 'allow_pickle') not in (
            None,
            'False',
        ):
            found.append('np.load with pickles')
    return found


@pytest.mark.parametrize(
    'source',
    [
        'torch.load(p)',
        'torch.load(p, weights_only=False)',
        'M.from_pretrained(p, trust_remote_code=True)',
        'pickle.load(f)',
        'yaml.load(t)',
        'eval(t)',
        'subprocess.run(t, shell=True)',
        'np.load(p, allow_pickle=True)',
    ],
)
def test_dangers_are_recognised(source):
    assert dangers(source)


@pytest.mark.parametrize('path', PYTHON, ids=lambda p: p.stem)
def test_data_runs_no_code(path):
    assert dangers(path.read_text()) == []


def test_no_pickle_ships():
    """Weights are safetensors; arrays carry no objects."""
    assert [p.name for p in TRACKED if p.suffix in PICKLES] == []


@pytest.mark.parametrize(
    'text',
    [
        'sk-abcdEFGH12345678ijkl',
        'hf_' + 'a1' * 12,
        'ghp_' + 'b2' * 18,
        'AKIA' + 'Z9' * 8,
        '-----BEGIN RSA PRIVATE KEY',
    ],
)
def test_secrets_are_recognised(text):
    assert SECRET.search(f'key = "{text}"')


def test_no_secret_ships():
    """In code, records, notebooks with their outputs, and everything else that is text."""
    texts = [
        p
        for p in TRACKED
        if p.suffix
        in (
            '.py',
            '.ipynb',
            '.json',
            '.md',
            '.yaml',
            '.yml',
            '.toml',
            '.ini',
            '.csv',
            '.tex',
            '.svg',
            '',
        )
        and p.name != 'test_supply_chain.py'
    ]
    found = [
        (p.name, m.group()[:6])
        for p in texts
        if (m := SECRET.search(p.read_text(errors='replace')))
    ]
    assert found == []


def test_records_name_no_environment():
    """A record holds versions and parameters, not the variables, the user or the folders of the
    machine that wrote it.
    """
    for p in (p for p in TRACKED if p.suffix == '.json' and 'results' in p.parts):
        text = json.dumps(json.loads(p.read_text()))
        assert not re.search(r'"environ|"(?:user|home|hostname)"|/(home|root|tmp)/', text), p.name


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean(path):
    """No trust mark, and no output that a browser would run."""
    nb = nbformat.read(path, 4)
    assert 'signature' not in nb.metadata
    for c in (c for c in nb.cells if c.cell_type == 'code'):
        assert 'trusted' not in c.metadata
        for data in (o.get('data', {}) for o in c.outputs):
            assert 'application/javascript' not in data and not re.search(
                r'<script|<iframe|\bon(?:load|error|click)=', str(data.get('text/html', '')), re.I
            )
