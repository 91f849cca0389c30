"""A look-alike of LLaVA-OneVision with faults in it, a base model that is often wrong, and an
annotator that misbehaves."""

import hashlib
import io
import json
import re
import threading
import time
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fake_server import Drop, Hang, Raw, Status
from PIL import Image

from clear_nb.core import rng
from clear_nb.scenes import training_item
from clear_nb.trajectory import MARKER

TURN = pa.struct({'from': pa.string(), 'value': pa.string()})
SCHEMA = pa.schema(
    dict(
        id=pa.string(),
        image=pa.struct(dict(bytes=pa.binary(), path=pa.string())),
        conversations=pa.list_(TURN),
        data_source=pa.string(),
    )
)


def encoded(image, kind='PNG', **how):
    """A picture as a file in memory."""
    f = io.BytesIO()
    image.save(f, kind, **how)
    return f.getvalue()


@lru_cache(maxsize=64)
def scene(k):
    """Picture, question and true answer number k; the question names k, so that a base model can
    look the truth up."""
    image, (q, *_), _ = training_item(0, k, n=1)
    stem = q.prompt
    for letter, text in zip('ABCD', q.options):
        stem = stem.replace(f' {letter} {text}', '')
    lines = [f'{c}. {o}' for c, o in zip('ABCD', q.options)] if q.answer in tuple('ABCD') else []
    return image, '\n'.join([f'(picture {k}) {stem}', *lines]), q.answer


def talk(question, answer):
    return [{'from': 'human', 'value': f'<image>\n{question}'}, {'from': 'gpt', 'value': answer}]


def good_row(k, kind='PNG', mode='RGB', **how):
    image, question, answer = scene(k)
    return dict(
        id=f'{k}',
        image=dict(bytes=encoded(Image.fromarray(image).convert(mode), kind, **how), path=None),
        conversations=talk(question, answer),
        data_source='scenes',
    )


def _liar():  # a PNG whose header claims 12,000 x 12,000 pixels
    data = bytearray(encoded(Image.fromarray(scene(0)[0])))
    data[16:24] = (12_000).to_bytes(4, 'big') * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    return bytes(data)


def _with(k, **changes):
    return good_row(k) | changes


def _shown(k, picture):
    return _with(k, image=dict(bytes=picture, path=None))


def _flat(w, h):
    return encoded(Image.fromarray(rng('flat', w, h).integers(0, 256, (h, w, 3), np.uint8)))


BAD = {  # reason: what is wrong with a row
    'missing field': lambda k: _with(k, conversations=None),
    'malformed conversation': lambda k: _with(k, conversations=talk('q', 'a')[::-1]),
    'several pictures': lambda k: _with(k, conversations=talk('<image> and this?', 'a cat')),
    'Chinese characters': lambda k: _with(k, conversations=talk('What?', '猫')),
    'no question': lambda k: _with(k, conversations=talk('', 'a cat')),
    'question too long': lambda k: _with(k, conversations=talk('why? ' * 500, 'a cat')),
    'no answer': lambda k: _with(k, conversations=talk('What?', ' \n')),
    'answer too long': lambda k: _with(
        k, conversations=talk('Describe the picture.', 'It shows ' + 'many ' * 20 + 'things.')
    ),
    'answer is no option': lambda k: _with(
        k, conversations=talk('Which?\nA. this\nB. that', 'neither')
    ),
    'no picture': lambda k: _with(k, image=None),
    'undecodable picture': lambda k: _shown(k, good_row(k)['image']['bytes'][:200]),
    'too large': lambda k: _shown(k, _liar()),
    'too small': lambda k: _shown(k, _flat(40, 64)),
    'too narrow': lambda k: _shown(k, _flat(400, 64)),
    'duplicate': lambda k: good_row(
        0, compress_level=k % 9
    ),  # the picture and question of row 0, in another file
}
ODD = {  # rows that look wrong and are not
    1: dict(mode='L'),
    2: dict(mode='RGBA'),
    3: dict(kind='TIFF', mode='CMYK'),
    4: dict(kind='JPEG', quality=95),
}


def rows(n, every=20):
    """n rows; one in `every` is bad, the reasons take turns."""
    reasons = list(BAD)
    for k in range(n):
        turn, bad = divmod(k, every)
        yield (
            BAD[reasons[turn % len(reasons)]](k)
            if bad == every - 1
            else good_row(k, **ODD.get(bad, {}))
        )


def expected(n, every=20):
    """How many rows are bad, by reason."""
    reasons = list(BAD)
    return dict(sorted(Counter(reasons[t % len(reasons)] for t in range(n // every)).items()))


def write_source(folder, n, shards=5, group=50):
    """Parquet files in two subsets; one more is damaged in its middle, before its first row."""
    folder, per = Path(folder), -(-n // shards)
    rest = iter(rows(n))
    for s in range(shards):
        path = folder / ('one', 'two')[s % 2] / f'train-{s:05}.parquet'
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, SCHEMA) as f:
            for first in range(s * per, min(n, s * per + per), group):
                f.write_table(
                    pa.Table.from_pylist(
                        [next(rest) for _ in range(min(group, n - first, s * per + per - first))],
                        SCHEMA,
                    )
                )
    data = bytearray(path.read_bytes())  # a copy of the last one whose first pages are overwritten
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    (folder / 'two' / 'train-damaged.parquet').write_bytes(data)
    return folder


def base(picture, prompt):
    """The base model: right for three questions in five."""
    k = int(re.search(r'\(picture (\d+)\)', prompt)[1])
    return scene(k)[2] if rng('look-alike base', k).random() < 0.6 else 'I cannot tell.'


def talkative(picture, prompt):
    return f'I would say that it is {base(picture, prompt)}, as far as I can see.'


def obedient(picture, prompt):
    """Talkative, unless it is told to say nothing else."""
    return (base if 'nothing else' in prompt else talkative)(picture, prompt)


def grade(request):
    """A judge, for FakeServer: finds the true answer, or the letter, in a sentence of
    `talkative`."""
    told = json.loads(re.findall(r'^\{.*\}$', request.text, re.M)[-1])
    said = (
        told['answer']
        .removeprefix('I would say that it is ')
        .removesuffix(', as far as I can see.')
    )
    if 'options' in told:
        return said if said in told['options'] else 'Z'
    return str(float(said == told['reference']))


class Misbehaving:
    """The annotator, for FakeServer: what it says depends on the request; the first time it may
    not come through."""

    def __init__(
        self, outages=True, hang=0.3, pause=0.0
    ):  # hang: seconds without a reply; pause: before each reply
        self.outages, self.hang, self.pause, self.seen, self.lock = (
            outages,
            hang,
            pause,
            Counter(),
            threading.Lock(),
        )

    @staticmethod
    def name(request):
        return hashlib.sha256(repr((request.text, request.images)).encode()).hexdigest()

    def __call__(self, request):
        if self.pause:
            time.sleep(self.pause)
        name = self.name(request)
        with self.lock:
            self.seen[name] += 1
            times = self.seen[name]
        g = rng('misbehaving', name)
        fails = g.choice(['', *'abcdef'], p=[0.88] + [0.02] * 6)
        if self.outages and fails and times == 1:
            return dict(
                a=Status(429, headers={'Retry-After': '0.01'}),
                b=Status(500),
                c=Hang(self.hang),
                d=Drop(),
                e=Raw('<html>', 'text/html'),
                f=Raw('{"choices": []}'),
            )[fails]
        return self.words(request, g)

    @staticmethod
    def words(request, g):
        truth, restore = (
            re.search('True answer: (.*)', request.text)[1],
            'asks for a restored one' in request.text,
        )
        head = (
            f'<think>the picture is noisy and the place is hidden</think>\n{MARKER}\n'
            if restore
            else ''
        )
        right = f'{head}<think>now I see it well</think>\n<answer>{truth}</answer>'
        never = rng('never', request.text.partition('Attempt ')[0]).random() < 0.05
        kind = g.choice(
            ['good', 'nonsense', 'wrong', 'tags', 'empty', 'other', 'declined'],
            p=[0.7, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05],
        )
        if never:
            kind = 'wrong'
        return dict(
            good=right,
            nonsense='Sure! Here is the trace you wanted.',
            wrong=right.replace(f'<answer>{truth}', '<answer>a submarine'),
            tags=right.replace('</think>', '<think>'),
            empty='',
            declined=Status(400, 'flagged by the content policy'),
            other=f'<think>clear</think><answer>{truth}</answer>'
            if restore
            else f'<think>hm</think>{MARKER}<think>clear</think><answer>{truth}</answer>',
        )[kind]


def build_here(source, out, url, n, limit, pipe):
    """A build in this process; limit: bytes of its largest file. Sends the end of an error through
    the pipe."""
    import resource

    import openai._base_client

    from clear_nb.adapters import CallableAdapter
    from clear_nb.builder import build_training
    from clear_nb.server import Server
    from clear_nb.sources import BuildRecipe, open_folder

    openai._base_client.INITIAL_RETRY_DELAY = 0.01
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    server, recipe = (
        Server('fake', url, timeout=0.25),
        BuildRecipe(n=n, share=1.0, spare=100.0, relative=True),
    )
    try:
        build_training(
            open_folder(source),
            CallableAdapter(base, 'base'),
            server,
            out,
            recipe,
            workers=4,
            progress=False,
        )
    except OSError as e:
        pipe.send(str(e))


if __name__ == '__main__':  # a build in a process of its own; prints accounts and peak memory
    import argparse

    from clear_nb.adapters import open_adapter
    from clear_nb.builder import build_training
    from clear_nb.records import peak_memory
    from clear_nb.server import Server
    from clear_nb.sources import BuildRecipe, open_folder

    p = argparse.ArgumentParser()
    for name in ('source', 'out', 'url'):
        p.add_argument(name)
    p.add_argument('--n', type=int, default=100)
    p.add_argument('--spare', type=float, default=100.0)
    p.add_argument('--base', default='python:builder_rows:base')
    p.add_argument('--workers', type=int, default=4)
    a = p.parse_args()
    server, recipe = (
        Server('fake', a.url, timeout=0.25),
        BuildRecipe(n=a.n, share=1.0, spare=a.spare, relative=True),
    )
    m = build_training(
        open_folder(a.source),
        open_adapter(a.base),
        server,
        a.out,
        recipe,
        workers=a.workers,
        progress=False,
    )
    print(json.dumps(dict(m['accounts'], peak_mib=peak_memory()['cpu'])))
