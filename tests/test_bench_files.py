"""The builder of MMD-Bench: reading, faults, variants, files that survive a kill."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as Picture
from PIL import Image

from clear_nb import bench_files as bf
from clear_nb import degrade as dg
from clear_nb import scenes
from clear_nb.core import ROOT, rng
from clear_nb.rows import (
    BenchmarkRow,
    Reject,
    content_hash,
    encode_picture,
    file_name,
    from_scenes,
    group_of,
    read_datasets,
    read_tsv,
)
from clear_nb.variants import VariantPlan, _drawn_corruption

CHEAP = ('hsv_saturation', 'gaussian_noise', 'scan_lines', 'graffiti')


def picture(k=0, h=70, w=90):
    return encode_picture(rng('test', k).integers(0, 256, (h, w, 3), dtype=np.uint8))


def code(k=0, **kw):
    return base64.b64encode(picture(k, **kw)).decode()


def write_tsv(path, rows, columns=('index', 'image', 'question', 'A', 'B', 'answer')):
    """A TSV as pandas would write it."""
    pd.DataFrame(rows, columns=columns).to_csv(path, sep='\t', index=False)
    return path


def toy(n, **kw):
    return [
        BenchmarkRow(
            'toy', str(k), f'question {k}', 'B', picture(k, **kw), dict(A='x', B='y'), str(k)
        )
        for k in range(n)
    ]


def build(samples, out, **kw):
    return bf.build_files(samples, out, progress=False, **{'corruptions': CHEAP, **kw})


def tree(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


# Reading


def test_na_strings_survive_every_step(tmp_path):
    """Options that pandas would drop stay text in the reader, in parquet and in the TSV that is
    written."""
    words = ['None', 'NA', 'N/A', 'null', 'none', 'NULL', '#N/A', '-nan']
    columns = ['index', 'image', 'question', *'ABCDEFGH', 'answer']
    path = write_tsv(tmp_path / 'toy.tsv', [[1, code(), 'NA', *words, 'E']], columns)
    [one] = read_tsv(path)
    assert (
        list(one.options.values()) == words
        and one.question == 'NA'
        and one.options[one.answer] == 'none'
    )
    build(read_tsv(path), tmp_path / 'out', tsv=True)
    again = [
        *bf.read_files(tmp_path / 'out'),
        *(s for p in (tmp_path / 'out').glob('*.tsv') for s in read_tsv(p)),
    ]
    assert len(again) == 6 and all(s.options == one.options and s.question == 'NA' for s in again)


def test_reader_against_pandas(tmp_path):
    """Quotes, tabs, line breaks, other scripts and empty fields are read as pandas reads them
    without its list of missing values."""
    r, rows = rng('texts'), []
    bits = ['a', '"', '\n', '\r\n', '\t', "'", 'é', '図', ' ', '', '\\', ',', '""']
    for k in range(60):
        rows.append(
            [k, code(k % 3, h=8, w=8), *(''.join(r.choice(bits, 6)) for _ in range(3)), 'A']
        )
    path = write_tsv(tmp_path / 'toy.tsv', rows)
    wanted = pd.read_csv(path, sep='\t', dtype=str, keep_default_na=False)
    got = {s.index: s for s in read_tsv(path)}
    for w in wanted.to_dict('records'):
        if not w['A']:
            continue  # the answer is no option then
        s = got[w['index']]
        assert (s.question, s.options.get('A', ''), s.options.get('B', '')) == (
            w['question'],
            w['A'],
            w['B'],
        )
        assert s.image == base64.b64decode(w['image'])
    assert len(got) > 50


def test_all_columns(tmp_path):
    """hint, category, l2-category, split and prompt arrive; other columns do no harm; a byte order
    mark is skipped."""
    columns = [
        'index',
        'image',
        'question',
        'answer',
        'hint',
        'category',
        'l2-category',
        'split',
        'prompt',
        'image_path',
    ]
    path = write_tsv(
        tmp_path / 'CV-Bench-2D.tsv',
        [['7', code(), 'q', 'yes', 'h', 'c', 'l2', 'dev', 'p', 'x.jpg']],
        columns,
    )
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    [s] = read_tsv(path)
    assert (s.benchmark, s.index, s.hint, s.category, s.l2_category, s.split, s.prompt) == (
        'CV-Bench-2D',
        '7',
        'h',
        'c',
        'l2',
        'dev',
        'p',
    )
    assert s.options == {} and s.answer == 'yes' and s.key == ('CV-Bench-2D', '7', '', 'clean')


def test_pointers(tmp_path):
    """Rows that point backwards, forwards and past a row with line breaks show the same picture."""
    rows = [
        [2000005, '5', 'q', 'x', 'y', 'A'],
        [5, code(1), 'two\nlines', 'x', 'y', 'A'],
        [6, code(2), 'q\n"', 'x', 'y', 'B'],
        [1000005, ' 5', 'q', 'x', 'y', 'B'],
        [1000006, '6', 'q', 'x', 'y', 'B'],
    ]
    table = list(read_tsv(write_tsv(tmp_path / 'MMBench_toy.tsv', rows)))
    assert [s.picture for s in table] == ['5', '5', '6', '5', '6'] == [s.group for s in table]
    assert [s.image for s in table] == [picture(1), picture(1), picture(2), picture(1), picture(2)]


@pytest.mark.parametrize(
    'stem, wanted',
    [
        ('MMStar', ('MMStar', '', 'clean')),
        ('MMBench_DEV_EN_V11_LOW_LEVEL_LOW', ('MMBench_DEV_EN_V11', '', 'low')),
        ('MMVet_LOW_LEVEL_MID', ('MMVet', '', 'mid')),
        ('CV-Bench-2D_LOW_LEVEL_HIGH', ('CV-Bench-2D', '', 'hard')),
        *((f'RealWorldQA_{c}', ('RealWorldQA', c, 'hard')) for c in dg.CORRUPTIONS),
        ('MMVP_graffiti_LOW_LEVEL_LOW', ('MMVP', 'graffiti', 'low')),
    ],
)
def test_released_names(tmp_path, stem, wanted):
    """A released file loads as it is; the name tells what it is."""
    [s] = read_tsv(write_tsv(tmp_path / f'{stem}.tsv', [[3, code(), 'q', 'x', 'y', 'A']]))
    assert (s.benchmark, s.corruption, s.severity) == wanted and s.key == (
        wanted[0],
        '3',
        *wanted[1:],
    )
    if wanted[2] != 'clean':
        assert file_name(*wanted) == stem


def test_groups():
    """Rolls modulo a million, pairs counted from the first number, everything else alone."""
    assert (
        group_of('MMBench_DEV_EN_V11', '3000012') == '12'
        and group_of('MME', '3000012') == '3000012'
    )
    assert [group_of('MMVP', str(k)) for k in (1, 2, 299, 300)] == ['0', '0', '149', '149']
    assert group_of('MMVP', 'x7') == 'x7'


# Faults


def test_every_fault_is_listed(tmp_path):
    """Row, index and reason of each; the good rows go on, in the reader and through the builder."""
    cut = picture(3)[:-4000]
    rows = [
        [1, code(1), 'q', 'x', 'y', 'A'],
        [2, code(2)[:-3], 'q', 'x', 'y', 'A'],
        [3, base64.b64encode(cut).decode(), 'q', 'x', 'y', 'A'],
        [1, code(4), 'q', 'x', 'y', 'A'],
        [5, '99', 'q', 'x', 'y', 'A'],
        [6, code(6), 'q', 'x', 'y', 'C'],
        [7, code(7), 'q', 'x', 'y', ''],
        ['', code(8), 'q', 'x', 'y', 'A'],
        [9, '', 'q', 'x', 'y', 'A'],
        [10, '5', 'q', 'x', 'y', 'A'],
        [11, 'ä' * 70, 'q', 'x', 'y', 'A'],
        [12, base64.b64encode(b'no picture at all ' * 9).decode(), 'q', 'x', 'y', 'A'],
        [13, code(13, h=20, w=20), 'q', 'x', 'y', 'B'],
        [17, code(17), ' ', 'x', 'y', 'B'],
    ]
    path = write_tsv(tmp_path / 'toy.tsv', rows)
    with path.open('ab') as f:
        f.write(
            b'14\tonly three\tfields\n15\t'
            + code(15).encode()
            + b'\t\xff\xfe\tx\ty\tA\n16\t'
            + code(16).encode()
            + b'\tq\tx\ty\tA\n'
        )
    wanted = {
        2: 'unreadable base64',
        3: 'undecodable image',
        4: 'duplicate index',
        5: 'pointer to nothing',
        6: 'answer is no option',
        7: 'no answer',
        8: 'no index',
        9: 'no picture',
        10: 'pointer to nothing',
        11: 'unreadable base64',
        12: 'undecodable image',
        14: 'no question',
        15: 'malformed row',
        16: 'malformed row',
    }
    table = list(read_tsv(path))
    assert {r.row: r.reason for r in table if isinstance(r, Reject)} == wanted and len(table) == 17
    assert {r.row: r.index for r in table if isinstance(r, Reject)}[4] == '1'
    info = build(read_tsv(path), tmp_path / 'out', corruptions=['watermark_damage'])
    assert {r['row']: r['reason'] for r in info['rejects']} == wanted | {13: 'too small'}
    assert (
        info['rejected'] == dict(Counter((wanted | {13: 'too small'}).values()))
        and info['counts']['rows'] == 2 * 3
    )
    assert {s.index for s in bf.read_files(tmp_path / 'out')} == {'1', '16'}


@pytest.mark.parametrize(
    'text, match',
    [
        ('', 'is empty'),
        ('\n\n', 'is empty'),
        ('index\timage\tquestion\tanswer\n', 'no rows'),
        ('index\timage\tA\n1\tx\ty\n', r"lacks the columns \['question', 'answer'\]"),
        ('index\timage\tquestion\tanswer\timage\n', 'column twice'),
    ],
)
def test_faults_of_a_file(tmp_path, text, match):
    """One sentence, at once."""
    (tmp_path / 'toy.tsv').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match=match):
        read_tsv(tmp_path / 'toy.tsv')


@pytest.mark.parametrize(
    'name, match',
    [
        ('nosuch.tsv', r'^no file at .*nosuch\.tsv: a benchmark is a file'),
        ('', 'read_files reads a folder'),
    ],
)
def test_no_file(tmp_path, name, match):
    """One sentence as well."""
    with pytest.raises(FileNotFoundError, match=match):
        read_tsv(tmp_path / name)


def test_outline(tmp_path):
    """Keys and groups without a picture: of a file, faulty rows included, and of a folder."""
    path = write_tsv(
        tmp_path / 'MMVP_LOW_LEVEL_MID.tsv',
        [[k, code(k) if k != 3 else '!' * 80, 'q', 'x', 'y', 'A'] for k in range(1, 5)],
    )
    rows, named = (
        read_tsv(path),
        lambda samples: {(s.key, s.group) for s in samples if isinstance(s, BenchmarkRow)},
    )
    assert (
        named(rows) < named(rows.outline())
        and len(rows.outline()) == 4
        and not any(s.image for s in rows.outline())
    )
    build(toy(3), tmp_path / 'out', design='full')
    assert named(bf.read_outline(tmp_path / 'out')) == named(
        bf.read_files(tmp_path / 'out')
    ) and len(list(bf.read_outline(tmp_path / 'out'))) == 3 * 3 * len(CHEAP)


def test_nothing_is_replaced_by_the_clean_picture(tmp_path):
    """Too small in the mixed design: no severity; in the full one: only the possible variants.
    Nothing shows the clean pixels."""
    small = toy(2, h=15, w=40)
    mixed = build([*small, *toy(6)[2:]], tmp_path / 'm', corruptions=['block_exchange'])
    assert mixed['counts']['severity'] == dict(low=4, mid=4, hard=4) and mixed['rejected'] == {
        'too small': 2
    }
    full = build(
        small, tmp_path / 'f', design='full', corruptions=['block_exchange', 'hsv_saturation']
    )
    assert full['counts']['corruption'] == dict(block_exchange=2, hsv_saturation=6) and full[
        'rejected'
    ] == {'too small': 4}
    clean = {s.index: s.pixels() for s in small}
    assert not any(
        np.array_equal(s.pixels(), clean[s.index]) for s in bf.read_files(tmp_path / 'f')
    )
    with pytest.raises(ValueError, match='no row could be used'):
        build(small, tmp_path / 'n', corruptions=['watermark_damage'])


def test_no_ops_are_counted(tmp_path):
    """A grey picture has no saturation to lose: the row stays, and says so."""
    grey = encode_picture(np.full((64, 64, 3), 90, np.uint8))
    info = build(
        [replace(toy(1)[0], image=grey), *toy(3)[1:]],
        tmp_path / 'o',
        corruptions=['hsv_saturation'],
    )
    assert (
        info['counts']['unchanged'] == 3
        and sum(json.loads(s.params)['unchanged'] for s in bf.read_files(tmp_path / 'o')) == 3
    )


# Variants


def test_seed_workers_and_shards(tmp_path):
    """The seed decides the content; workers, order of work and size of the files do not."""
    clean = toy(20)
    one = build(clean, tmp_path / 'one')
    two = build(clean, tmp_path / 'two', workers=2)
    assert (
        tree(tmp_path / 'one') == tree(tmp_path / 'two')
        and one['content_hash'] == two['content_hash']
    )
    cut = build(clean, tmp_path / 'cut', shard=16)
    assert cut['content_hash'] == one['content_hash'] and len(cut['files']) == 6 > len(one['files'])
    assert build(clean, tmp_path / 'other', seed=1)['content_hash'] != one['content_hash']
    assert (
        content_hash(bf.read_files(tmp_path / 'cut'))
        == one['content_hash']
        == bf.verify(tmp_path / 'cut')
    )


def test_a_picture_does_not_depend_on_its_company(tmp_path):
    """Any part of a benchmark in any order has the same pictures."""
    clean = toy(20)
    build(clean, tmp_path / 'all'), build(clean[17:2:-3], tmp_path / 'part')
    everything = {s.key: s.image for s in bf.read_files(tmp_path / 'all')}
    part = {s.key: s.image for s in bf.read_files(tmp_path / 'part')}
    assert len(part) == 15 and part.items() <= everything.items()


def test_full_design(tmp_path):
    """48 variants of each picture, each once, drawn from its own generator, which params repeat."""
    clean = list(from_scenes('realworldqa', 2))
    info = build(clean, tmp_path / 'o', design='full', corruptions=None, relative=True)
    rows = list(bf.read_files(tmp_path / 'o'))
    assert (
        Counter(s.index for s in rows) == {'0': 48, '1': 48}
        and len({s.key for s in rows}) == 96 == info['counts']['rows']
    )
    assert {(s.corruption, s.severity) for s in rows} == {
        (c, v) for c in dg.CORRUPTIONS for v in dg.SEVERITY
    }
    for s in rows:
        p = json.loads(s.params)
        assert p['intensity'] == dg.SEVERITY[s.severity] and p['key'] == [
            'mmd',
            0,
            'realworldqa',
            s.index,
            s.corruption,
            s.severity,
        ]
        assert np.array_equal(
            dg.degrade(
                clean[int(s.index)].pixels(),
                s.corruption,
                p['intensity'],
                rng(*p['key']),
                relative=True,
            ),
            s.pixels(),
        )


def test_mixed_design(tmp_path):
    """One corruption per picture at all severities, with the weights of the release."""
    build(toy(20), tmp_path / 'o', corruptions=None, relative=True)
    rows = list(bf.read_files(tmp_path / 'o'))
    per = {k: [(s.corruption, s.severity) for s in rows if s.index == str(k)] for k in range(20)}
    assert (
        all(
            len({c for c, _ in v}) == 1 and [s for _, s in v] == list(dg.SEVERITY)
            for v in per.values()
        )
        and len({v[0] for v in per.values()}) > 5
    )
    one, total = toy(1)[0], sum(dg.BENCH_WEIGHTS.values())
    names = Counter(
        _drawn_corruption(VariantPlan(), replace(one, index=str(k))) for k in range(8000)
    )
    assert all(abs(names[c] / 8000 - w / total) < 0.012 for c, w in dg.BENCH_WEIGHTS.items())


def test_rolls_share_the_corrupted_picture(tmp_path):
    """By pointer: the same file, whether the rolls are neighbours or far apart; a repeated full
    picture draws for itself."""
    rows = (
        [[k, code(k), 'q', 'x', 'y', 'A'] for k in range(20)]
        + [[1_000_000 + k, str(k), 'q', 'y', 'x', 'B'] for k in range(20)]
        + [[2_000_003, code(3), 'q', 'x', 'y', 'A']]
    )
    build(
        read_tsv(write_tsv(tmp_path / 'MMBench_toy.tsv', rows)),
        tmp_path / 'o',
        corruptions=['gaussian_noise'],
        tsv=True,
    )
    shown = {s.index: s for s in bf.read_files(tmp_path / 'o', 'hard')}
    assert len(shown) == 41 and all(
        shown[str(1_000_000 + k)].image == shown[str(k)].image for k in range(20)
    )
    assert (
        len({s.image for s in shown.values()}) == 21 and shown['2000003'].image != shown['3'].image
    )
    lines = (
        (tmp_path / 'o' / 'MMBench_toy_LOW_LEVEL_HIGH.tsv').read_text(encoding='utf-8').splitlines()
    )
    assert sum(len(l) < 100 for l in lines[1:]) == 20  # pointers again
    assert {
        s.index: s.image for s in read_tsv(tmp_path / 'o' / 'MMBench_toy_LOW_LEVEL_HIGH.tsv')
    } == {k: s.image for k, s in shown.items()}


def test_groups_share_corruption_and_draws(tmp_path):
    """By group: both pictures of a pair get one corruption with the same numbers; by picture, each
    its own."""
    pairs = list(from_scenes('mmvp', 12))
    for by_group in (True, False):
        build(pairs, tmp_path / str(by_group), corruptions=None, relative=True, by_group=by_group)
        rows = list(bf.read_files(tmp_path / str(by_group), 'hard'))
        keys = [json.loads(s.params)['key'] for s in rows]
        assert [a == b for a, b in zip(keys[::2], keys[1::2])] == [by_group] * 6 and len(
            {s.image for s in rows}
        ) == 12
        for s, k, c in zip(rows, keys, pairs):
            assert np.array_equal(
                dg.degrade(c.pixels(), s.corruption, 'hard', rng(*k), relative=True), s.pixels()
            )
    with pytest.raises(ValueError, match='by_group'):
        build(pairs, tmp_path / 'True', corruptions=None, relative=True)


def test_jpeg_as_in_the_release(tmp_path):
    """OpenCV's JPEG of the lossless picture; the content hash is of the pixels that are shown."""
    build(toy(3), tmp_path / 'png'), build(toy(3), tmp_path / 'jpg', jpeg_quality=95)
    for a, b in zip(bf.read_files(tmp_path / 'png'), bf.read_files(tmp_path / 'jpg')):
        assert (
            b.image
            == cv2.imencode('.jpg', a.pixels()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[
                1
            ].tobytes()
        )
    assert bf.verify(tmp_path / 'png') != bf.verify(tmp_path / 'jpg')


# Other sources


def test_datasets():
    """Bytes of the files are kept; options as a list or as columns; letters, positions and words
    as answers; faults are Rejects."""
    rows = dict(
        id=[3, 4, 5, 6],
        img=[
            dict(bytes=x, path=None) for x in (picture(1), picture(2), picture(3)[:300], picture(4))
        ],
        q=['a', 'b', 'c', 'd'],
        opts=[['cat', 'None'], ['cat', 'dog'], ['x', 'y'], ['x', 'y']],
        gold=['(B)', 'dog', 'A', 'z'],
    )
    ds = Dataset.from_dict(
        rows,
        Features(
            id=Value('int64'),
            img=Picture(),
            q=Value('string'),
            opts=List(Value('string')),
            gold=Value('string'),
        ),
    )
    columns = dict(index='id', image='img', question='q', options='opts', answer='gold')
    for source in (ds, ds.to_iterable_dataset()):
        got = list(read_datasets(source, columns, 'toy'))
        assert [type(g).__name__ for g in got] == [
            'BenchmarkRow',
            'BenchmarkRow',
            'Reject',
            'Reject',
        ] and [g.index for g in got] == list('3456')
        assert (
            got[0].image == picture(1)
            and got[0].options == dict(A='cat', B='None')
            and [g.answer for g in got[:2]] == ['B', 'B']
        )
        assert [g.reason for g in got[2:]] == ['undecodable image', 'answer is no option']
    wide = Dataset.from_dict(
        dict(
            img=[Image.fromarray(np.zeros((5, 6, 3), np.uint8))],
            q=['a'],
            x=['cat'],
            y=[None],
            z=['dog'],
            gold=[2],
        )
    )
    [s] = read_datasets(
        wide, dict(image='img', question='q', options=['x', 'y', 'z'], answer='gold'), 'toy'
    )
    assert (
        s.pixels().shape == (5, 6, 3)
        and s.options == dict(A='cat', C='dog')
        and s.answer == 'C'
        and s.index == '1'
    )


@pytest.mark.parametrize(
    'columns, match',
    [
        (dict(image='img', question='q'), 'answer'),
        (dict(image='img', question='q', answer='gold', colour='q'), 'no field'),
        (dict(image='img', question='q', answer='right'), 'lacks the columns'),
    ],
)
def test_dataset_columns(columns, match):
    """Whole-source faults are ValueErrors."""
    ds = Dataset.from_dict(dict(img=['x'], q=['a'], gold=['b']))
    with pytest.raises(ValueError, match=match):
        read_datasets(ds, columns, 'toy')
    with pytest.raises(ValueError, match='no rows'):
        read_datasets(ds.select([]), dict(image='img', question='q', answer='gold'), 'toy')


@pytest.mark.parametrize('benchmark', [*scenes.FAMILIES, 'easyvqa'])
def test_scenes(benchmark):
    """Every question of the repository's own benchmarks is a good row; what the embedded model is
    asked is kept word for word."""
    rows = list(from_scenes(benchmark, 6, seed=2))
    items = (
        scenes.easy_vqa_benchmark(6, 2)
        if benchmark == 'easyvqa'
        else scenes.benchmark(benchmark, 3 if benchmark == 'mmvp' else 6, 2)
    )
    assert len(rows) == len(items) == len({s.key for s in rows}) and all(
        isinstance(s, BenchmarkRow) for s in rows
    )
    for s, item in zip(rows, items):
        assert (
            (s.prompt or s.question) == item.question.prompt
            and s.answer == item.question.answer
            and np.array_equal(s.pixels(), item.image)
        )
        assert (s.options.get(s.answer, s.answer)) == item.question.truth
    sizes = Counter(s.group for s in rows)
    assert set(sizes.values()) == {dict(mmbench=4, mmvp=2).get(benchmark, 1)} and len(
        {s.picture for s in rows}
    ) == (6 if benchmark == 'mmbench' else len(rows))


# Files


def test_reading_parts(tmp_path):
    """A filter gives what a filter over everything gives, and reads lazily."""
    build(toy(20), tmp_path / 'o', design='full')
    everything = list(bf.read_files(tmp_path / 'o'))
    for v in (None, 'low', 'hard'):
        for c in (None, *CHEAP):
            assert [s.key for s in bf.read_files(tmp_path / 'o', v, c)] == [
                s.key for s in everything if v in (None, s.severity) and c in (None, s.corruption)
            ]
    assert next(bf.read_files(tmp_path / 'o')) == everything[0]
    with pytest.raises(ValueError, match="holds no 'high'"):
        bf.read_files(tmp_path / 'o', 'high')
    with pytest.raises(ValueError, match='no finished benchmark'):
        bf.read_files(tmp_path / 'nothing')


def test_files_of_the_full_design(tmp_path):
    """Names of the release at hard, both suffixes elsewhere; they read back as what was written."""
    build(toy(3), tmp_path / 'o', design='full', severities=('mid', 'hard'), tsv=True)
    names = {p.stem for p in (tmp_path / 'o').glob('*.tsv')}
    assert names == {f'toy_{c}' for c in CHEAP} | {f'toy_{c}_LOW_LEVEL_MID' for c in CHEAP}
    again = {s.key: s.image for n in names for s in read_tsv(tmp_path / 'o' / f'{n}.tsv')}
    assert again == {s.key: s.image for s in bf.read_files(tmp_path / 'o')}


def flip(path):
    path.write_bytes(path.read_bytes()[:3000] + b'\0\1\2' + path.read_bytes()[3003:])


def shorten(path):
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    'damage, match',
    [
        (flip, 'rows-00001.parquet'),
        (shorten, 'rows-00001.parquet'),
        (Path.unlink, 'rows-00001.parquet is missing'),
        (
            lambda p: p.with_name('rows-00009.parquet').write_bytes(p.read_bytes()),
            'rows-00009.parquet',
        ),
    ],
)
def test_damage_is_found(tmp_path, damage, match):
    """The error names the file."""
    build(toy(20), tmp_path / 'o', shard=16)
    damage(tmp_path / 'o' / 'rows-00001.parquet')
    with pytest.raises(ValueError, match=match):
        bf.verify(tmp_path / 'o')


def test_wrong_digests_are_found(tmp_path):
    """A row that was changed together with the hash of its file does not show what its digest
    says; nor does another content hash pass."""
    build(toy(4), tmp_path / 'o')
    path, info = tmp_path / 'o' / 'rows-00000.parquet', bf.read_info(tmp_path / 'o')
    rows = next(bf._scan([path]))
    rows[2]['answer'] = 'A'
    path.unlink()
    bf._write_shards(iter([rows]), tmp_path / 'o', 0, 16)
    info['files'][path.name] = bf.file_hash(path)
    (tmp_path / 'o' / 'info.json').write_text(json.dumps(info))
    with pytest.raises(ValueError, match='rows-00000.parquet: row'):
        bf.verify(tmp_path / 'o')
    build(toy(4), tmp_path / 'p')
    info = bf.read_info(tmp_path / 'p') | dict(content_hash='0' * 64)
    (tmp_path / 'p' / 'info.json').write_text(json.dumps(info))
    with pytest.raises(ValueError, match='info.json'):
        bf.verify(tmp_path / 'p')


CHILD = """
import sys
from clear_nb.bench_files import build_files
from clear_nb.rows import read_tsv

if __name__ == '__main__':
    names = ['lens_blur', 'gaussian_noise', 'graffiti']
    settings = dict(workers=int(sys.argv[3]), shard=16, progress=False, corruptions=names)
    build_files(read_tsv(sys.argv[1]), sys.argv[2], seed=5, **settings)
"""


def alive(group):
    return subprocess.run(
        ['pgrep', '-r', 'D,R,S', '-g', str(group)], capture_output=True, text=True
    ).stdout.split()


@pytest.mark.parametrize('workers', [1, 2])
def test_killed_and_resumed(tmp_path, workers):
    """SIGKILL in the middle; the next call goes on and ends with the same bytes; no worker
    outlives its parent."""
    path = write_tsv(
        tmp_path / 'toy.tsv',
        [
            [k, '2' if k == 9 else code(k, h=160, w=160), 'q', 'x', 'y', 'AC'[k == 7]]
            for k in range(90)
        ],
    )
    script, out = tmp_path / 'child.py', tmp_path / 'killed'
    script.write_text(CHILD)
    child = subprocess.Popen(
        [sys.executable, str(script), str(path), str(out), str(workers)], start_new_session=True
    )
    try:
        end = time.time() + 120
        while (
            len(list(out.glob('rows-*.parquet'))) < 2 and child.poll() is None and time.time() < end
        ):
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = {p.name: p.stat().st_mtime_ns for p in out.glob('rows-*.parquet')}
    assert (
        2 <= len(done) < 18
        and (out / 'building.json').exists()
        and not (out / 'info.json').exists()
    )
    while alive(child.pid) and time.time() < end:
        time.sleep(0.1)
    assert not alive(child.pid)
    with pytest.raises(ValueError, match='no finished benchmark'):
        bf.read_files(out)
    kw = dict(shard=16, corruptions=['lens_blur', 'gaussian_noise', 'graffiti'])
    with pytest.raises(ValueError, match=r'seed: 5 there, 6 here'):
        build(read_tsv(path), out, seed=6, **kw)
    (out / '.rows-00099.abcd.tmp.parquet').write_bytes(b'half a file')
    build(read_tsv(path), out, seed=5, **kw)
    whole = build(read_tsv(path), tmp_path / 'whole', seed=5, **kw)
    assert (
        tree(out) == tree(tmp_path / 'whole')
        and whole['counts']['rows'] == 89 * 3
        and whole['rejected'] == {'answer is no option': 1}
    )
    assert all(
        (out / n).stat().st_mtime_ns == t for n, t in done.items()
    )  # finished files were kept


def test_other_samples_do_not_continue_a_build(tmp_path):
    """Settings and source are compared; rows are compared where the source has no name; a foreign
    folder is left alone."""
    clean, out = toy(40), tmp_path / 'o'

    def broken():
        yield from clean[:34]
        raise RuntimeError('the source failed')

    with pytest.raises(RuntimeError):
        build(broken(), out, shard=16)
    assert len(list(out.glob('rows-*'))) > 0 and not list(out.glob('.*'))
    with pytest.raises(ValueError, match='holds other rows'):
        build(iter(clean[1:]), out, shard=16)
    for kw in (
        dict(shard=32),
        dict(shard=16, relative=True),
        dict(shard=16, design='full'),
        dict(shard=16, jpeg_quality=90),
        dict(shard=16, severities=['low']),
    ):
        with pytest.raises(ValueError, match='other settings'):
            build(iter(clean), out, **kw)
    info = build(iter(clean), out, shard=16)
    assert info['content_hash'] == build(clean, tmp_path / 'p')['content_hash']
    with pytest.raises(ValueError, match='other settings'):
        build(clean[:5], tmp_path / 'p')
    with pytest.raises(ValueError, match='no name'):
        build(iter(clean), out, shard=16)
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'thesis.txt').write_text('x')
    with pytest.raises(ValueError, match='other files'):
        build(clean, tmp_path / 'foreign')
    assert os.listdir(tmp_path / 'foreign') == ['thesis.txt']


@pytest.mark.parametrize(
    'kw, match',
    [
        (dict(design='half'), 'design'),
        (dict(severities=('high',)), 'severities'),
        (dict(corruptions=('rain',)), 'corruptions'),
        (dict(severities=()), 'at least one'),
        (dict(jpeg_quality=0), 'jpeg_quality'),
        (dict(shard=20), 'multiple of 16'),
        (dict(workers=0), 'workers'),
    ],
)
def test_bad_settings(tmp_path, kw, match):
    """One sentence says what is wrong."""
    with pytest.raises(ValueError, match=match):
        build(toy(1), tmp_path / 'o', **kw)


def test_corrupted_samples_are_no_source(tmp_path):
    """Corrupting twice is refused."""
    with pytest.raises(ValueError, match='already corrupted'):
        build([replace(toy(1)[0], severity='hard')], tmp_path / 'o')


def test_pixels_like_the_release():
    """Upright, 16-bit greys cut to 8: as OpenCV decodes. Transparency is on white, as everywhere."""
    r = rng('pixels')
    clear, grey16, lying = (io.BytesIO() for _ in range(3))
    Image.fromarray(r.integers(0, 256, (9, 7, 4), dtype=np.uint8), 'RGBA').save(clear, 'PNG')
    Image.fromarray(r.integers(0, 65536, (9, 7), dtype=np.uint16)).save(grey16, 'PNG')
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(r.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(
        lying, 'JPEG', exif=exif, quality=95, subsampling=0
    )
    for data in (clear, grey16, lying):
        wanted = cv2.imdecode(np.frombuffer(data.getvalue(), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        if data is clear:
            pixels = np.asarray(Image.open(data)).astype(float)
            alpha = pixels[..., 3:] / 255
            wanted = (alpha * pixels[..., :3] + (1 - alpha) * 255).round().astype(np.uint8)
        got = BenchmarkRow('b', '1', 'q', 'a', data.getvalue()).pixels()
        assert got.shape == wanted.shape and abs(got.astype(int) - wanted).max() <= 1


def test_two_processes_build_the_same_folder(tmp_path):
    """Seeds side by side share their benchmarks: one builds, the other waits and finds it
    finished."""
    code = (
        'import sys; from clear_nb.mmd_bench import corrupted_files; '
        "corrupted_files('mmstar', 12, sys.argv[1])"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, '-c', code, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [p.communicate(timeout=300)[1] for p in runs]
    assert [p.returncode for p in runs] == [0, 0], said
    assert not list(tmp_path.rglob('.*.tmp*'))
