"""Perceptual metrics: the published numbers, what cannot run, and tables that show it."""

import csv
import socket

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from clear_nb import perceptual as pc
from clear_nb.artefacts import save_table
from clear_nb.base import load_stage
from clear_nb.core import ROOT, rng
from clear_nb.data import make_picture_set
from clear_nb.paper import paper_table
from clear_nb.presets import load_preset
from clear_nb.records import make_record
from clear_nb.stats import paired_difference

GOLDEN = ROOT / 'tests' / 'golden'
SCORES = list(csv.DictReader((GOLDEN / 'iqa' / 'scores_pyiqa0.1.16.csv').open()))


@pytest.fixture(scope='module')
def natural():
    return dict(brisque=pc.brisque('cpu'), niqe=pc.niqe('cpu'))


def photo(name, variant='clean'):
    x = (
        torch.from_numpy(
            np.array(Image.open(GOLDEN / 'degrade' / 'images' / f'{name}.png').convert('RGB'))
        ).permute(2, 0, 1)[None]
        / 255
    )
    return x if variant == 'clean' else F.avg_pool2d(F.pad(x, (2, 2, 2, 2), 'reflect'), 5, 1)


@pytest.mark.parametrize('row', SCORES, ids=lambda r: f'{r["image"]}-{r["variant"]}')
def test_published_scores(natural, row):
    """The shipped parameters give what pyiqa gives with the published ones, up to rounding in
    32 bits, which differs by processor (seen: BRISQUE 0.007, NIQE 0.0012).
    """
    x = photo(row['image'], row['variant'])
    assert natural['brisque'](x).item() == pytest.approx(float(row['brisque']), abs=2e-2)
    assert natural['niqe'](x).item() == pytest.approx(float(row['niqe']), abs=4e-3)


def test_notices_travel_with_the_numbers():
    """The publisher's notice and the provenance lie beside the files."""
    notice = (pc.IQA / 'LICENSE').read_text()
    assert (
        notice.count('COPYRIGHT NOTICE STARTS') == notice.count('COPYRIGHT NOTICE ENDS') == 2
        and 'LIVE' in notice
    )
    assert all(p.name in (pc.IQA / 'README.md').read_text() for p in pc.IQA.glob('*.safetensors'))
    assert {p.suffix for p in pc.IQA.iterdir()} == {'', '.md', '.safetensors'}


def test_batches_do_not_matter(natural):
    """In 64 bits the score of a picture does not depend on its neighbours."""
    images = np.stack([i.clean for i in pc.degraded_scenes(4, 'low')])
    for f in (natural['brisque'], lambda x: natural['niqe'](pc.enlarge(x))):
        one, all_ = (pc.score_pictures(lambda x, ref: f(x), images, images, b) for b in (1, 4))
        np.testing.assert_allclose(one, all_, atol=1e-6)


def test_refit_needs_enough_blocks():
    """A covariance of 36 features from a handful of pictures, or from flat ones, is refused."""
    clean = np.stack([i.clean for i in pc.degraded_scenes(3, 'low')])
    with pytest.raises(ValueError, match='refit: 3 blocks of 64 pixels'):
        pc.refit(clean)
    with pytest.raises(ValueError, match='refit: 0 blocks'):
        pc.refit(np.full((40, 64, 64, 3), 99, np.uint8))


@pytest.fixture(scope='module')
def weights():
    """Random weights of the right shapes."""
    return {
        k: v.clone()
        for k, v in pc._pyiqa('musiq', pretrained=False, device='cpu').net.state_dict().items()
    }


@pytest.mark.parametrize('name', ['m.pth', 'm.safetensors', 'parallel.pth'])
def test_musiq_file(tmp_path, weights, name):
    """Torch and safetensors files, also with the names of a parallel run, give the marks of
    their weights.
    """
    path, prefix = tmp_path / name, 'module.' if name.startswith('parallel') else ''
    (save_file if name.endswith('safetensors') else torch.save)(
        {prefix + k: v for k, v in weights.items()}, path
    )
    metric, x = (
        pc.musiq(path, 'cpu'),
        torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    )
    assert all(torch.equal(v, weights[k]) for k, v in metric.net.state_dict().items())
    marks = metric(x)
    assert marks.shape == (2, 1) and torch.isfinite(marks).all() and marks[0] != marks[1]


class Evil:
    def __reduce__(self):
        return print, ('code ran',)


def test_musiq_wrong_files(tmp_path, weights, capsys):
    """A missing file, a file of other weights and a file with code are named; the code does not
    run.
    """
    with pytest.raises(FileNotFoundError, match='no weight file at .*gone.pth'):
        pc.musiq(tmp_path / 'gone.pth')
    torch.save(
        {k: v for k, v in weights.items() if not k.startswith('head')}, tmp_path / 'headless.pth'
    )
    with pytest.raises(ValueError, match='headless.pth is not a MUSIQ with one output'):
        pc.musiq(tmp_path / 'headless.pth')
    torch.save(Evil(), tmp_path / 'evil.pth')
    with pytest.raises(ValueError, match='evil.pth holds no weights'):
        pc.musiq(tmp_path / 'evil.pth')
    (tmp_path / 'text.safetensors').write_text('no weights')
    with pytest.raises(ValueError, match='text.safetensors holds no weights'):
        pc.musiq(tmp_path / 'text.safetensors')
    assert 'code ran' not in capsys.readouterr().out


def test_musiq_without_network(tmp_path, monkeypatch):
    """Neither file nor network: one sentence, and nothing is left in the cache."""
    from pyiqa.utils import download_util

    def refuse(*args, **kw):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(download_util, 'DEFAULT_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    for name in (
        'http_proxy',
        'https_proxy',
        'HTTP_PROXY',
        'HTTPS_PROXY',
        'all_proxy',
        'ALL_PROXY',
    ):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(pc.NotRun, match='fetching them failed .*Name or service not known'):
        pc.musiq()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(pc.NotRun, match='HF_HUB_OFFLINE forbids'):
        pc.musiq()
    assert list(tmp_path.iterdir()) == []


def test_musiq_fetched_file_has_the_pinned_hash(tmp_path, monkeypatch):
    """A file that the network gave in place of the weights is refused by its hash, and named;
    the true one passes.
    """
    from pyiqa.archs.musiq_arch import default_model_urls
    from pyiqa.utils import download_util

    monkeypatch.setattr(download_util, 'DEFAULT_CACHE_DIR', str(tmp_path))
    file = tmp_path / default_model_urls['koniq10k'].rpartition('/')[2]
    assert pc.MUSIQ_HASH in file.name  # the pin and pyiqa speak of the same file
    file.write_bytes(b'something else')
    with pytest.raises(ValueError, match=f'{file.name} has the SHA-256 .* delete it'):
        pc.musiq()
    monkeypatch.setattr(pc, 'MUSIQ_HASH', pc.file_hash(file)[:8])
    assert pc._musiq_file() == file


@pytest.fixture(scope='module')
def smoke():
    """The smallest preset with five pictures per severity, batches of two."""
    return load_preset('smoke', **{'eval.batch': 2})


def fresh(preset, seed, stage):
    return load_stage(preset, {'sft': 0, 'grpo': 1}[stage], stage, 'cpu')


@pytest.fixture(scope='module')
def analysis(smoke):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('HF_HUB_OFFLINE', '1')
        m.setattr(pc, '_musiq_file', lambda: (_ for _ in ()).throw(pc.NotRun('no weights here')))
        return pc.analyse(fresh, smoke, 0, 5, progress=False)


@pytest.fixture
def records(analysis, smoke):
    return [make_record('05_perceptual', analysis[0], smoke, 0)]


def test_noise_is_that_of_the_picture(smoke):
    """A state depends on its own picture and number, not on the batch it is in, nor on the
    stage.
    """
    model = fresh(smoke, 0, 'sft').eval()
    p = make_picture_set(model, pc.degraded_scenes(3, 'hard'))
    z, ended = pc.restoration_states(model, p, smoke.eval, ('perceptual', 0, 'hard'), 4)
    again, _ = pc.restoration_states(
        model, p, load_preset('smoke', **{'eval.batch': 8}).eval, ('perceptual', 0, 'hard'), 4
    )
    torch.testing.assert_close(z, again, atol=1e-4, rtol=1e-4)
    other, _ = pc.restoration_states(model, p, smoke.eval, ('perceptual', 1, 'hard'), 4)
    assert z.shape[0] == len(ended) == 3 and not torch.allclose(z, other)


def test_every_input_has_both_states(analysis, smoke):
    """Also where a fresh model never asks; numbers in the record are those of the pictures."""
    metrics, shown = analysis
    assert (
        set(shown) == {'low', 'mid', 'hard'}
        and metrics['corruptions'].split() == shown['hard'].corruptions
    )
    for s, v in shown.items():
        assert {k: x.shape for k, x in v.pictures.items()} == dict.fromkeys(
            ['seen', 'clean', 'sft', 'codec', 'grpo'], (5, 64, 64, 3)
        )
        for k in ('seen', 'sft', 'grpo'):
            assert {n: len(t.split()) for n, t in metrics['scores'][k][s].items()} == dict.fromkeys(
                ['brisque', 'niqe', 'niqe_scenes', 'psnr', 'ssim'], 5
            )
    a, clean = (
        shown['mid'].pictures['grpo'].astype(float),
        shown['mid'].pictures['clean'].astype(float),
    )
    by_hand = 10 * np.log10(255**2 / ((a - clean) ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(
        pc._numbers(metrics['scores']['grpo']['mid']['psnr']), by_hand, rtol=1e-3
    )
    assert (
        metrics['columns']['musiq']['not_run'] == 'no weights here'
        and 'musiq' not in metrics['scores']['sft']['mid']
    )


def test_pairs(records):
    """The difference is the paired bootstrap of the stored numbers; a picture without a score
    leaves both sides.
    """
    cells = {k: records[0]['metrics']['scores'][k]['hard'] for k in pc.COMPARED_STATES}
    a, b = (pc._numbers(cells[k]['niqe_scenes']) for k in pc.COMPARED_STATES)
    assert pc.metric_difference(records, 'hard', 'niqe_scenes') == pytest.approx(
        paired_difference(b, a, rng('perceptual', 'hard', 'niqe_scenes'))
    )
    kept, cells['sft']['ssim'] = (
        cells['sft']['ssim'],
        'nan ' + cells['sft']['ssim'].split(' ', 1)[1],
    )
    assert (
        pc.metric_difference(records, 'hard', 'ssim').n
        == pc.metric_level(records, 'grpo', 'hard', 'ssim').n
        == 4
    )
    cells['sft']['ssim'] = kept


def test_directions(records):
    """Lower BRISQUE and higher PSNR both count as better."""
    cells = {k: records[0]['metrics']['scores'][k]['hard'] for k in pc.COMPARED_STATES}
    before = {k: dict(c) for k, c in cells.items()}
    for k in ('brisque', 'psnr'):
        cells['sft'][k], cells['grpo'][k] = (
            pc._text([9.0, 9.5, 9.1, 9.2, 9.3]),
            pc._text([1.0, 1.2, 1.5, 1.1, 1.3]),
        )
    said = pc.quality_scores(records, ['hard']).set_index('column')['RL is better']
    for k in cells:
        cells[k].update(before[k])
    assert (
        said['BRISQUE'] == 'shown'
        and said['PSNR (dB)'] == 'contradicted'
        and said['MUSIQ'] == 'not run: no weights here'
    )


def test_trust(records):
    """A metric must prefer the clean picture to the input and to both states."""
    scores = records[0]['metrics']['scores']
    cells = [scores['clean']['clean'], *(scores[k]['hard'] for k in ('seen', 'sft', 'grpo'))]

    def said(*means):
        for c, m in zip(cells, means):
            c['niqe'] = pc._text(m + 0.1 * np.arange(5))
        return pc.trusted(records, 'hard', 'niqe')

    before = [c['niqe'] for c in cells]
    assert (
        said(1.0, 9.0, 5.0, 4.0) == 'yes'
        and said(5.0, 9.0, 4.0, 3.0) == 'no, it prefers: SFT state, RL state'
        and said(9.0, 3.0, 20.0, 21.0) == 'no, it prefers: degraded input'
    )
    for c, text in zip(cells, before):
        c['niqe'] = text
    assert (
        pc.trusted(records, 'hard', 'psnr') == 'by construction'
        and pc.trusted(records, 'hard', 'musiq') == 'not run: no weights here'
    )


def test_seeds_are_averaged_by_picture(records, analysis, smoke):
    """Two records count their pictures once; other pictures are refused."""
    other = make_record('05_perceptual', analysis[0], smoke, 1)
    assert pc.metric_level([*records, other], 'sft', 'hard', 'psnr') == pc.metric_level(
        records, 'sft', 'hard', 'psnr'
    )
    other['metrics']['inputs']['hard'] = 'others'
    with pytest.raises(ValueError, match='different pictures'):
        pc.table4([*records, other])


def test_table4(records, tmp_path):
    """Ours beside the paper's; what was not run, not asked or not reported says so, also in the
    files.
    """
    table = pc.table4(records, scale='smoke').set_index('state')
    ours = {k: f'{m.head}, ours, smoke' for k, m in pc.METRICS.items()}
    paper = paper_table(4).set_index('state')
    for k in ('BRISQUE', 'NIQE', 'MUSIQ'):
        assert (table.loc[['SFT state', 'RL state'], f'{k}, paper, 7B'] == paper[k]).all()
    assert table.loc['RL state', 'accuracy on hard (%), paper, 7B'] == 64.96
    assert (table[ours['musiq']] == 'not run: no weights here').all()
    assert (
        table.loc['clean picture', ours['psnr']] == 'is the reference'
        and str(table.loc['SFT state', 'accuracy on hard (%), ours, smoke']) == 'unknown'
    )
    gap = table.loc['RL state', ours['niqe']].mean - table.loc['SFT state', ours['niqe']].mean
    assert (
        table.loc['RL − SFT, paired', ours['niqe']].mean == pytest.approx(gap)
        and table.loc['RL state', ours['niqe']].n == 5
    )
    assert (
        table.loc['does it prefer the clean picture?', ours['psnr']] == 'by construction'
        and table.loc['does it prefer the clean picture?', ours['brisque']]
        == pc.trusted(records, 'hard', 'brisque')
        != 'unknown'
    )
    files = save_table(table.reset_index(), 'table4', 'caption', records, root=tmp_path)
    assert (
        'not run: no weights here' in files['md'].read_text()
        and 'unknown' in files['csv'].read_text()
    )


def test_table4_without_records():
    """Everything of ours is unknown, nothing fails."""
    table = pc.table4([])
    assert all(str(v) == 'unknown' for v in table.filter(like='ours').iloc[:2].to_numpy().ravel())
    assert (
        pc.gain_by_corruption([]).empty
        and (
            pc.quality_scores([]).set_index('column').loc['NIQE', 'RL is better'] == 'unknown'
        ).all()
    )


def test_accuracy_column(records):
    """Accuracy comes from the benchmark's records, its difference is paired."""
    bits = {'clear_sft': [0.0, 100.0, 0.0, 100.0], 'clear_rl': [100.0, 100.0, 0.0, 100.0]}
    frame = pd.DataFrame(
        [
            dict(
                model=m,
                benchmark='mmvp',
                severity='hard',
                seed=0,
                n=4,
                item_ids='x',
                correct=np.array(v),
            )
            for m, v in bits.items()
        ]
    )
    table = pc.table4(records, frame, scale='smoke').set_index('state')[
        'accuracy on hard (%), ours, smoke'
    ]
    assert [table[k].mean for k in ('SFT state', 'RL state', 'RL − SFT, paired')] == [
        50,
        75,
        25,
    ] and table['clean picture'] == 'not asked'


def test_gain(records, analysis):
    """Gains by corruption are differences of PSNR against the clean picture."""
    gains, hard = pc.gain_by_corruption(records).set_index('corruption'), analysis[1]['hard']
    psnr = {
        k: 10
        * np.log10(
            255**2
            / ((hard.pictures[k].astype(float) - hard.pictures['clean']) ** 2).mean((1, 2, 3))
        )
        for k in ('seen', 'sft', 'grpo')
    }
    for k, name in enumerate(hard.corruptions):
        row = gains.loc[name.replace('_', ' ')]
        assert (
            row['SFT gain'].mean == pytest.approx(psnr['sft'][k] - psnr['seen'][k], abs=2e-3)
            and row['RL gain'].n == 1
        )
    assert gains.iloc[-1]['RL − SFT'].mean == pytest.approx(
        (psnr['grpo'] - psnr['sft']).mean(), abs=2e-3
    )


def test_notebook_reports_the_test_split():
    """What counts is measured on test scenes unless someone asks for another split."""
    cell = next(
        c
        for c in nbformat.read(ROOT / 'nbs' / '05_perceptual.ipynb', 4).cells
        if 'parameters' in c.metadata.get('tags', [])
    )
    assert "split: str = 'test'" in cell.source
