"""Tables and pictures of other people: each cell has its right reading, or its row says why not."""

import ast
import base64
import io
import json
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builder_rows import good_row
from datasets import Dataset, Features, List, Value
from datasets import Image as Picture
from PIL import Image

from clear_nb import bench_files as bf
from clear_nb.candidates import SelectionLog, make_candidate, read_columns
from clear_nb.cli import rows_of_all
from clear_nb.core import ROOT, rng
from clear_nb.images import MAX_PIXELS, PICTURE_FORMATS, open_header, open_image
from clear_nb.rows import BenchmarkRow, Reject, encode_picture, from_scenes, read_datasets, read_tsv
from clear_nb.scenes import training_item
from clear_nb.sources import BuildRecipe, Unusable, read_picture, read_text

CASES = Path(__file__).parent / 'golden' / 'cases'
COLUMNS = ['index', 'image', 'question', 'A', 'B', 'C', 'D', 'answer']


def picture(k=0, side=24):
    return encode_picture(rng('hard rows', k).integers(0, 256, (side, side, 3), np.uint8))


CODE = base64.b64encode(picture()).decode()
GOOD = dict(index='7', image=CODE, question='Which?', A='cat', B='dog', answer='B')


def write(path, rows, columns=None):
    """A table as authors write it, without any quoting."""
    columns = columns or list(dict.fromkeys(c for row in rows for c in row))
    lines = ['\t'.join(columns), *('\t'.join(row.get(c, '') for c in columns) for row in rows)]
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return path


def read_one(tmp_path, **changes):
    """One row whose cells are changed; None drops a column."""
    row = {k: v for k, v in (GOOD | changes).items() if v is not None}
    [got] = read_tsv(write(tmp_path / 'toy.tsv', [row]))
    return got


# What a cell may hold, and what it is then

READ = {  # kind: changed cells, expected fields
    'float index': (dict(index='1000001.0'), dict(index='1000001')),
    'letter in brackets': (dict(answer='(B)'), dict(answer='B')),
    'small letter': (dict(answer='b'), dict(answer='B')),
    'full-width letter': (dict(answer='Ｂ.'), dict(answer='B')),
    'letter and text': (dict(answer='B. dog'), dict(answer='B')),
    'text of an option': (dict(answer='Dog '), dict(answer='B')),
    'a list of one answer': (dict(answer="['B']"), dict(answer='B')),
    'options as a list': (dict(A=None, B=None, options="['cat', 'dog']"), dict(answer='B')),
    'options as JSON': (
        dict(A=None, B=None, choices='["cat", "dog"]'),
        dict(options=dict(A='cat', B='dog')),
    ),
    'options as numpy prints them': (
        dict(A=None, B=None, options="['cat' 'dog']"),
        dict(options=dict(A='cat', B='dog')),
    ),
    'options in brackets': (
        dict(A=None, B=None, options='(a) cat (b) dog', answer='(b)'),
        dict(options=dict(A='cat', B='dog'), answer='B'),
    ),
    'options with their letters': (
        dict(A=None, B=None, options="['A. cat', 'B. dog']"),
        dict(options=dict(A='cat', B='dog')),
    ),
    'columns a and b': (
        dict(A=None, B=None, a='cat', b='dog'),
        dict(options=dict(A='cat', B='dog')),
    ),
    'options in the prompt': (
        dict(A=None, B=None, prompt='Which? A. cat B. dog'),
        dict(options=dict(A='cat', B='dog'), prompt='Which? A. cat B. dog'),
    ),
    'options in a list and in the question': (
        dict(A=None, B=None, choices="['cat', 'dog']", question='Which? Choices: (A) cat (B) dog'),
        dict(question='Which?', prompt='Which? Choices: (A) cat (B) dog', answer='B'),
    ),
    'options in columns and in the question': (
        dict(question='Which? (A) cat (B) dog'),
        dict(question='Which? (A) cat (B) dog', prompt=''),
    ),
    'None stays a word': (dict(A='None', B='NA'), dict(options=dict(A='None', B='NA'))),
    'nan is missing': (dict(C='nan', D='NaN', hint='nan'), dict(options=dict(A='cat', B='dog'))),
    'placeholder with a number': (dict(question='<image 1> Which?'), dict(question='Which?')),
    'words that name picture 1': (
        dict(question='In <image 1>, which?'),
        dict(question='In <image 1>, which?'),
    ),
    'address alphabet of base64': (
        dict(image=CODE.replace('+', '-').replace('/', '_')),
        dict(image=picture()),
    ),
    'base64 in a list': (dict(image=f"['{CODE}']"), dict(image=picture())),
    'blanks around a column name': ({'B': None, ' B ': 'dog'}, dict(answer='B')),
    'a path for a picture': (dict(image='pictures/7.png'), dict(image=picture())),
    'a path with backslashes': (dict(image='pictures\\7.png'), dict(image=picture())),
    'a column of paths': (dict(image='', image_path='pictures/7.png'), dict(image=picture())),
    'only a column of paths': (dict(image=None, image_path='pictures/7.png'), dict(picture='7')),
    'a list of one path': (dict(image="['pictures/7.png']"), dict(image=picture())),
}


@pytest.mark.parametrize('kind', READ)
def test_read(tmp_path, kind):
    """The one reading of the cell."""
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'pictures' / '7.png').write_bytes(picture())
    changes, wanted = READ[kind]
    row = read_one(tmp_path, **changes)
    assert isinstance(row, BenchmarkRow), row
    assert {k: getattr(row, k) for k in wanted} == wanted
    assert row.options in (dict(A='cat', B='dog'), wanted.get('options'))


FAULTS = {  # kind: changed cells, reason, words of the detail
    'an index of 4,400 digits': (dict(index='9' * 4400), 'unusable index', '4400 characters'),
    'an Arabic digit': (dict(index='٣'), 'unusable index', 'not 0 to 9'),
    'an index with an escape code': (dict(index='\x1b[31m7'), 'unusable index', 'cannot be shown'),
    'an index called nan': (dict(index='nan'), 'no index', ''),
    'a question called nan': (dict(question='nan'), 'no question', ''),
    'an answer called nan': (dict(answer='nan'), 'no answer', ''),
    'a picture called nan': (dict(image='nan'), 'no picture', ''),
    'two readings of an answer': (dict(A='b', B='a', answer='b'), 'answer is no option', ''),
    'letter and another text': (dict(answer='B. cat'), 'answer is no option', ''),
    'two letters': (dict(answer='A, B'), 'answer is no option', ''),
    'several answers': (
        dict(A=None, B=None, answer="['cat', 'kitten']"),
        'unreadable answer',
        '2 answers',
    ),
    'options that are no list': (
        dict(A=None, B=None, options='cat or dog'),
        'unreadable options',
        'cat or dog',
    ),
    '27 options': (
        dict(A=None, B=None, options=str([str(k) for k in range(27)])),
        'unreadable options',
        '27 options',
    ),
    'an option of the question is missing': (
        dict(A=None, B=None, question='Which? (A) cat (B) dog', answer='C'),
        'answer is no option',
        'A, B',
    ),
    'placeholder inside': (dict(question='Is <image> a cat?'), 'picture placeholder', '<image>'),
    'a token of a model inside': (
        dict(question='Is <|image_pad|> a cat?'),
        'picture placeholder',
        'image_pad',
    ),
    'two placeholders': (dict(question='<image><image>Same?'), 'several pictures', '2 times'),
    'a second picture': (dict(question='Is <image 2> a cat?'), 'several pictures', '<image 2>'),
    'placeholder in an option': (dict(A='<image>'), 'picture placeholder', '<image>'),
    'a web address': (dict(image='https://a.org/x.png'), 'no picture', 'on the web'),
    'a path that leaves the folder': (dict(image='../x.png'), 'no picture', 'not inside'),
    'an absolute path': (dict(image='/etc/x.png'), 'no picture', 'not inside'),
    'a file that is not there': (dict(image='', image_path='x.png'), 'no picture', 'no file x.png'),
    'a data URL without base64': (
        dict(image='data:image/svg+xml,' + '%3Csvg%3E' * 9),
        'unreadable base64',
        '',
    ),
    'too many fields': (dict(D='x\ty'), 'malformed row', 'fields under'),
}


@pytest.mark.parametrize('kind', FAULTS)
def test_fault(tmp_path, kind):
    """One reject with the reason; where nothing is wrong with the row, it stays."""
    changes, reason, words = FAULTS[kind]
    got = read_one(tmp_path, **changes)
    assert getattr(got, 'reason', '') == reason and words in getattr(got, 'detail', '')


def test_same_index_twice(tmp_path):
    """1 and 1.0 are one index."""
    rows = [dict(GOOD, index='1'), dict(GOOD, index='1.0'), dict(GOOD, index='2', image='1.0')]
    first, second, pointer = read_tsv(write(tmp_path / 'toy.tsv', rows))
    assert second.reason == 'duplicate index' and pointer.image == first.image


@pytest.mark.parametrize('closing', ['5" screen', 'a 5"', '"Stop" sign', '""'])
def test_quote_that_closes_in_another_row(tmp_path, closing):
    """The same column opens and closes: the record has the right number of fields, and is wrong."""
    rows = [dict(GOOD, index=str(k)) for k in range(6)]
    rows[1]['question'], rows[4]['question'] = '"Stop is written where?', closing
    got = list(read_tsv(write(tmp_path / 'toy.tsv', rows, COLUMNS)))
    lost = [r.index for r in got if isinstance(r, Reject)]
    assert lost == ['1'] or closing == '""' and lost == ['1', '4']
    assert {r.index for r in got if isinstance(r, BenchmarkRow)} >= {'0', '2', '3', '5'}


def test_many_open_quotes(tmp_path):
    """Every second row opens a quote; the others survive, and line breaks in quotes are kept."""
    rows = [dict(GOOD, index=str(k)) for k in range(40)]
    for row in rows[::2]:
        row['question'] = '"Which'
    rows[5]['question'] = '"two\nlines"'
    got = list(read_tsv(write(tmp_path / 'toy.tsv', rows, COLUMNS)))
    used = {r.index: r.question for r in got if isinstance(r, BenchmarkRow)}
    assert set(used) == {str(k) for k in range(1, 40, 2)} and used['5'] == 'two\nlines'


FILES = {  # bytes, words of the sentence
    'UTF-16': ('index\timage\tquestion\tanswer\n'.encode('utf-16'), 'it is UTF-16'),
    'commas': (b'index,image,question,answer\n', 'not separated by tabs'),
    'Excel': (b'PK\x03\x04' + bytes(40), 'an Excel or zip file'),
    'gzip': (b'\x1f\x8b\x08' + bytes(40), 'it is compressed'),
    'parquet': (b'PAR1' + bytes(40), 'a parquet file'),
    'noise': (bytes(range(256)) * 3, 'lacks the columns'),
    'old Mac': (b'index\timage\tquestion\tanswer\r1\tx\ty\tz\r', 'line of column names'),
    'quote in the header': (b'index\t"image\tquestion\n1\t2\t3\n', 'line of column names'),
    'escape codes': (b'\x1b[2Jindex\tx\n', "'\\x1b[2Jindex"),
    'only a header': (b'index\timage\tquestion\tanswer\n', 'no rows'),
}


@pytest.mark.parametrize('kind', FILES)
def test_file(tmp_path, kind):
    """A sentence that says what the file is, with nothing that a terminal would obey."""
    data, words = FILES[kind]
    (tmp_path / 'toy.tsv').write_bytes(data)
    with pytest.raises(ValueError, match='toy.tsv') as e:
        read_tsv(tmp_path / 'toy.tsv')
    assert words in str(e.value) and str(e.value).isprintable()


def test_letters_without_options(tmp_path):
    """A file whose options are in columns that nobody knows says so when it is opened."""
    rows = [
        dict(index=str(k), image=CODE, question='Which?', opt1='cat', opt2='dog', answer='B')
        for k in range(3)
    ]
    [note] = read_tsv(write(tmp_path / 'toy.tsv', rows)).notes
    assert '3 of 3 answers are a letter and no options were found' in note
    assert read_tsv(write(tmp_path / 'toy.tsv', [GOOD])).notes == []


# Data sets

HELD = {  # kind: value of image, options, answer; field, expected value
    'an array': (
        np.full((5, 6, 3), 9, np.uint8).tolist(),
        None,
        'x',
        'image',
        encode_picture(np.full((5, 6, 3), 9, np.uint8)),
    ),
    'levels above 255': ([[300, 1], [2, 3]], None, 'x', 'reason', 'undecodable image'),
    'base64': (CODE, None, 'x', 'image', picture()),
    'bool': (picture(), ['no', 'yes'], True, 'reason', 'answer is no option'),
    'float position': (picture(), ['no', 'yes'], 1.0, 'answer', 'B'),
    'position behind the end': (picture(), ['no', 'yes'], 2, 'reason', 'answer is no option'),
    'NaN': (picture(), None, float('nan'), 'reason', 'no answer'),
    'several answers': (picture(), None, ['a', 'b'], 'reason', 'unreadable answer'),
    'options of ARC': (
        picture(),
        dict(label=['A', 'B'], text=['no', 'yes']),
        'B',
        'options',
        dict(A='no', B='yes'),
    ),
    'options as a struct': (picture(), dict(A='no', B='yes'), 'b', 'answer', 'B'),
}


@pytest.mark.parametrize('kind', HELD)
def test_dataset(kind):
    """Values as data sets hold them."""
    image, options, answer, field, wanted = HELD[kind]
    ds = Dataset.from_list([dict(image=image, question='q', options=options, answer=answer)])
    columns = dict(image='image', question='question', options='options', answer='answer')
    [got] = read_datasets(ds, columns, 'toy')
    assert getattr(got, field) == wanted


def test_pictures_of_a_dataset():
    """Lists are not decoded by `datasets`; the column that is not empty is the picture."""
    pics = [[dict(bytes=picture(1), path=None)], [dict(bytes=picture(1)[:99], path=None)], []]
    ds = Dataset.from_dict(
        dict(pics=pics, q=['q'] * 3, gold=['x'] * 3),
        Features(pics=List(Picture()), q=Value('string'), gold=Value('string')),
    )
    for source in (ds, ds.to_iterable_dataset()):
        got = list(read_datasets(source, dict(image='pics', question='q', answer='gold'), 'toy'))
        assert got[0].image == picture(1)
        assert [g.reason for g in got[1:]] == ['undecodable image', 'no picture']
    rows = [
        dict(image_1=None, image_2=picture(2), q='q', gold='x'),
        dict(image_1=picture(1), image_2=picture(2), q='q', gold='x'),
    ]
    columns = dict(image=['image_1', 'image_2'], question='q', answer='gold')
    one, two = read_datasets(Dataset.from_list(rows), columns, 'toy')
    assert one.image == picture(2) and two.reason == 'several pictures'
    with pytest.raises(ValueError, match='answer stands in one column'):
        read_datasets(Dataset.from_list(rows), dict(columns, answer=['q', 'gold']), 'toy')


# One reader of pictures


def files_of_one_picture(kind):
    """A picture in a form that readers like to treat differently."""
    r = rng('one reader', kind)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = 6
    noise = r.integers(0, 256, (70, 90, 3), np.uint8)
    if kind == 'depth':
        Image.fromarray(r.integers(0, 65536, (70, 90), dtype=np.uint16)).save(buffer, 'PNG')
    elif kind == 'palette':
        Image.fromarray(noise).quantize(16).save(buffer, 'PNG', transparency=3)
    elif kind == 'transparent':
        Image.fromarray(r.integers(0, 256, (70, 90, 4), np.uint8), 'RGBA').save(buffer, 'PNG')
    elif kind == 'lying':
        Image.fromarray(noise).save(buffer, 'JPEG', exif=exif)
    elif kind == 'animated':
        frames = [Image.fromarray(noise), Image.fromarray(255 - noise)]
        frames[0].save(buffer, 'GIF', save_all=True, append_images=frames[1:])
    else:
        Image.fromarray(noise).convert('CMYK').save(buffer, 'TIFF')
    return buffer.getvalue()


@pytest.mark.filterwarnings('ignore:open_image')
@pytest.mark.parametrize(
    'kind', ['depth', 'palette', 'transparent', 'lying', 'animated', 'four inks']
)
def test_every_command_sees_the_same_pixels(tmp_path, kind):
    """`answer`, a benchmark file, a data set and the builder of training data."""
    data = files_of_one_picture(kind)
    wanted = np.asarray(open_image(data))
    (tmp_path / 'x').write_bytes(data)
    assert np.array_equal(np.asarray(open_image(tmp_path / 'x')), wanted)  # `answer`
    row = read_one(tmp_path, image=base64.b64encode(data).decode())
    held = Dataset.from_list([dict(image=dict(bytes=data, path=None), question='q', answer='x')])
    columns = dict(image='image', question='question', answer='answer')
    [of_dataset] = read_datasets(held, columns, 'toy')
    assert np.array_equal(row.pixels(), wanted) and np.array_equal(of_dataset.pixels(), wanted)
    pixels, plain = read_picture(data, BuildRecipe())
    assert np.array_equal(pixels, wanted) and np.array_equal(np.asarray(open_image(plain)), wanted)


@pytest.mark.parametrize('kind', ['EPS', 'PSD', 'I', 'F', 'BUFR'])
def test_formats_that_are_refused(tmp_path, kind, monkeypatch):
    """An EPS called .png starts no Ghostscript; greys without a range are no picture."""
    monkeypatch.setattr(subprocess, 'check_call', lambda *a, **k: pytest.fail('a program ran'))
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **k: pytest.fail('a program ran'))
    data = dict(EPS=(CASES / 'faults' / 'evil.png').read_bytes(), PSD=b'8BPS' + bytes(60))
    data['BUFR'] = b'BUFR' + bytes(60)
    if kind in 'IF':
        Image.new(kind, (70, 70), 70_000).save(buffer := io.BytesIO(), 'TIFF')
        data[kind] = buffer.getvalue()
    (tmp_path / 'evil.png').write_bytes(data[kind])
    with pytest.raises(ValueError, match='evil.png'):
        open_image(tmp_path / 'evil.png')
    got = read_one(tmp_path, image=base64.b64encode(data[kind] + bytes(60)).decode())
    assert got.reason == 'undecodable image'
    with pytest.raises(Unusable, match='undecodable picture'):
        read_picture(data[kind], BuildRecipe())
    made = make_candidate(
        dict(good_row(0), image=dict(bytes=data[kind], path=None)), 'a:1', 's', BuildRecipe()
    )
    assert made[1] == 'undecodable picture'


def test_formats_are_named_everywhere():
    """No other `Image.open` in the package, and none without a list of formats."""
    calls = []
    for path in sorted((ROOT / 'clear_nb').glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            function = getattr(node, 'func', None)
            owner = getattr(getattr(function, 'value', None), 'id', '')
            if getattr(function, 'attr', '') == 'open' and owner == 'Image':
                calls.append((path.stem, [k.arg for k in node.keywords]))
    assert calls == [('images', ['formats']), ('scenes', ['formats'])]  # scenes: files of a package
    for name in PICTURE_FORMATS[:8]:
        mode = 'RGB' if name != 'ICO' else 'RGBA'
        Image.new(mode, (8, 8)).save(buffer := io.BytesIO(), name)
        assert open_header(buffer.getvalue()).size == (8, 8)


def test_frames_are_not_counted():
    """A TIFF of 30,000 frames costs no more than its first one."""
    n, entry = 30_000, struct.pack('<HHIHH', 256, 3, 1, 1, 0)
    tags = [
        (256, 1),
        (257, 1),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, 1),
    ]
    block = b''.join(struct.pack('<HHIHH', tag, 3, 1, value, 0) for tag, value in tags)
    first = struct.pack('<H', len(tags)) + block
    size, start = 2 + len(entry) + 4, 8 + len(first) + 4
    chain = b''.join(
        struct.pack('<H', 1) + entry + struct.pack('<I', start + (k + 1) * size if k < n - 1 else 0)
        for k in range(n)
    )
    data = b'II*\0' + struct.pack('<I', 8) + first + struct.pack('<I', start) + chain
    looked = [0]

    class Counted(io.BytesIO):
        def read(self, *args):
            looked[0] += 1
            return super().read(*args)

    with pytest.warns(UserWarning, match='has several frames'):
        open_image(Image.open(Counted(data), formats=['TIFF']))
    assert looked[0] < 200


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_large_pictures_are_refused_everywhere(tmp_path):
    """The same bound, before a pixel is decoded."""
    header = bytearray(picture())
    side = int(MAX_PIXELS**0.5) + 1
    header[16:24] = struct.pack('>II', side, side)
    header[29:33] = struct.pack('>I', zlib.crc32(bytes(header[12:29])))
    got = read_one(tmp_path, image=base64.b64encode(header).decode())
    assert got.reason == 'undecodable image' and f'{side} x {side} pixels' in got.detail


def test_rows_are_read_without_torch():
    """Whoever only reads a benchmark does not wait for torch."""
    code = 'import sys, clear_nb.rows, clear_nb.bench_files; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


# Built folders of others


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp('built') / 'toy'
    bf.build_files(from_scenes('mmstar', 2), out, relative=True, progress=False)
    return out


def copied(built, tmp_path, **changes):
    """The folder with other fields in its note."""
    out = tmp_path / 'copy'
    out.mkdir()
    for path in built.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    info = json.loads((out / 'info.json').read_text(encoding='utf-8')) | changes
    (out / 'info.json').write_text(json.dumps(info), encoding='utf-8')
    return out


NOTES = {
    'a newer format': (dict(format=2), 'has format 2, and this version reads 1'),
    'a format that is no number': (dict(format='1'), 'another form (format'),
    'a file outside': (dict(files={'../x.parquet': ''}), 'names a file'),
    'an absolute file': (dict(files={'/etc/rows-00000.parquet': ''}), 'names a file'),
    'no files': (dict(files=None), 'another form (files'),
    'severities as a text': (dict(severities='low'), 'another form (severities'),
    'rejects of another shape': (dict(rejects=[dict(row='1')]), 'another form (rejects'),
    'counts as a list': (dict(counts=[]), 'another form (counts'),
}


@pytest.mark.parametrize('kind', NOTES)
def test_note_of_a_folder(built, tmp_path, kind):
    """Whatever reads the folder says the same sentence."""
    changes, words = NOTES[kind]
    out = copied(built, tmp_path, **changes)
    for use in (bf.read_info, bf.read_files, lambda f: list(bf.read_outline(f)), bf.verify):
        with pytest.raises(ValueError, match='info.json') as e:
            use(out)
        assert words in str(e.value)


@pytest.mark.parametrize('name', ['../../X', '/tmp/X', 'a/b', 'a\\b', '..', '', 'x\x1b[2J', 'C:x'])
def test_names_of_benchmarks(built, tmp_path, name):
    """Nothing is written outside the folder, whether the name comes from rows or from a note."""
    counts = json.loads((built / 'info.json').read_text(encoding='utf-8'))['counts']
    out = copied(built, tmp_path, counts=counts | dict(benchmark={name: 6}))
    before = {p for p in tmp_path.rglob('*')}
    with pytest.raises(ValueError, match='cannot be written'):
        bf.write_tsv(out)
    rows = [replace(r, benchmark=name) for r in from_scenes('mmstar', 1)]
    with pytest.raises(ValueError, match='cannot be written'):
        bf.build_files(rows, tmp_path / 'new', relative=True, progress=False)
    assert {p for p in tmp_path.rglob('*') if p.suffix in ('.tsv', '.parquet')} <= before


def test_names_of_corruptions(built, tmp_path):
    """The other parts of a file name come from the note as well."""
    for changes in (dict(corruptions=['x/../../y'], design='full'), dict(severities=['../low'])):
        (tmp_path / str(len(changes))).mkdir()
        out = copied(built, tmp_path / str(len(changes)), **changes)
        with pytest.raises(ValueError, match="cannot be written|severity '../low'"):
            bf.write_tsv(out)


def test_damaged_cells(built, tmp_path):
    """A file with our columns and cells that build_files never writes."""
    out = copied(built, tmp_path)
    path = out / 'rows-00000.parquet'
    table = pq.read_table(path)
    for column, value in (('options', '['), ('options', '[]'), ('question', None)):
        at = table.schema.get_field_index(column)
        cells = pa.array([value] * len(table), pa.string())
        pq.write_table(table.set_column(at, table.schema.field(at), cells), path)
        with pytest.raises(ValueError, match='rows-00000.parquet: row .* is damaged'):
            list(bf.read_files(out))


def test_foreign_parquet(built, tmp_path):
    """A file of another program under one of our names."""
    out = copied(built, tmp_path)
    pq.write_table(pa.table(dict(index=['1'], image=[b'x'])), out / 'rows-00000.parquet')
    for use in (lambda f: list(bf.read_files(f)), lambda f: list(bf.read_outline(f)), bf.write_tsv):
        with pytest.raises(ValueError, match='was not written by build_files'):
            use(out)
    path = tmp_path / 'part-00000.parquet'
    pq.write_table(pa.table(dict(x=[1])), path)
    with pytest.raises(ValueError, match=r'part-00000.parquet is damaged \(it has no column'):
        list(read_columns(path, ['key']))
    for note in ('{}', '[]', '{"at": [0, 0], "counts": [], "rejects": [], "done": false}'):
        table = pa.table(dict(x=[1])).replace_schema_metadata({'builder': note})
        pq.write_table(table, path)
        with pytest.raises(ValueError, match='part-00000.parquet is damaged'):
            SelectionLog.of(path)


# Training data


def test_options_in_one_line_of_training_data():
    """A list in one line counts where the answer names one of its options."""

    def talk(question, answer):
        turns = [('human', f'<image>\n{question}'), ('gpt', answer)]
        return dict(conversations=[{'from': s, 'value': t} for s, t in turns])

    listed = talk('What colour? Options: A: red, B: blue', 'B')
    assert read_text(listed, BuildRecipe())[1:] == ('B', dict(A='red', B='blue'))
    points = talk('How far is A: (1, 2) from B: (4, 6)?', '5')
    assert read_text(points, BuildRecipe())[1:] == ('5', {})


def test_scenes_keep_their_words():
    """Our own questions pass through the new reading unchanged."""
    for row in from_scenes('mmstar', 4):
        assert row.answer in row.options and row.prompt.startswith(row.question)
    assert training_item(0, 0)[0].dtype == np.uint8
