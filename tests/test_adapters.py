"""Four adapters give one kind of reply; no row is lost or asked twice, and no key is shown."""

import copy
import io
import json
import logging
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import tiny_hf
import torch
from bench_rows import picture
from fake_server import FAILURES, FakeServer, Status, hasty  # noqa: F401, a fixture
from PIL import Image
from safetensors.torch import load_file, save_file
from test_generate import talker

from clear_nb.adapters import (
    CallableAdapter,
    ClearAdapter,
    HFAdapter,
    ServerAdapter,
    open_adapter,
    response,
)
from clear_nb.answer import build_prompt, sampling_of
from clear_nb.ask import RowNoises, row_noise
from clear_nb.decode import Noise
from clear_nb.flow import Guidance
from clear_nb.generate import generate
from clear_nb.rows import BenchmarkRow
from clear_nb.server import Refused
from clear_nb.wording import Reply, prompt_of

KEY = 'sk-secret-0123456789'


def rows(n=4):
    "Make rows with questions and pictures of different size."
    sizes = [(40, 30), (30, 64), (64, 64), (33, 47)]
    return [
        BenchmarkRow(
            'b',
            str(k),
            f'what is it {"now " * (3 * k % 7)}?',
            'A',
            picture(k, *sizes[k % 4]),
            group=str(k),
        )
        for k in range(n)
    ]


@pytest.fixture(autouse=True)
def key(monkeypatch, hasty):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)


# ---------------------------------------------------------------- prompts


def test_prompt_of_the_release():
    "The prompt has the wording of the release, with a blank and a line break at its end."
    s = BenchmarkRow('b', '1', 'Why?', 'C', options=dict(A='x', C='z'))
    request = 'Please select the correct answer from the options above. \n'
    assert prompt_of(s) == 'Question: Why?\nOptions:\nA. x\nC. z\n' + request
    assert prompt_of(replace(s, hint='h')).startswith('Hint: h\nQuestion: Why?\n')
    assert prompt_of(replace(s, prompt='as it is ')) == 'as it is '
    assert prompt_of(replace(s, options={}, hint='h')) == 'Why?'


def test_instruction_is_one_more_line():
    for s in (
        BenchmarkRow('b', '1', 'Why?', 'C', options=dict(A='x')),
        BenchmarkRow('b', '1', 'Why?', 'x'),
        BenchmarkRow('b', '1', '', '', prompt='p\n'),
    ):
        text = prompt_of(s, 'Letter only.')
        assert text.splitlines()[-1] == 'Letter only.' and text.startswith(
            prompt_of(s).rstrip('\n')
        )


@pytest.mark.parametrize(
    'texts, answer',
    [
        (['<answer>A</answer>'], 'A'),
        (['<answer>A</answer> no <answer>\nB\n</answer>'], 'B'),
        (['<answer>A</answer>', '<think>x</think>'], ''),
        (['<think>a</think> It is B.'], 'It is B.'),
        (['It is B.'], 'It is B.'),
        (['<think>A or B'], ''),
        ([''], ''),
    ],
)
def test_response(texts, answer):
    "The last answer block counts; without a block the text behind the thought counts."
    assert response(texts) == answer


# ---------------------------------------------------------------- our own model


@pytest.fixture(scope='module')
def model():
    m = talker('adapters', 0, marker=6.0)
    m.cfg = replace(m.cfg, vae_rule=(32, 32, 8), vit_rule=(32, 32, 8))
    return m


def test_clear_is_generate(model):
    "Each reply is what `generate` says about the row alone, in any batch and order."
    adapter = ClearAdapter(model, batch=3, max_new=5, steps=3, precision='no')
    samples = rows(5)
    replies = adapter(samples)
    for s, r in zip(samples, replies):
        image = Image.fromarray(s.pixels())
        alone = generate(
            model,
            [build_prompt(model, image, s.question)],
            sampling_of(model, max_new=5, steps=3),
            row_noise(0, s),
        )[0]
        detail = json.loads(r.detail)
        assert detail['texts'] == alone.texts and r.text == response(alone.texts)
        assert detail['restored'] == len(alone.restorations)
    assert {json.loads(r.detail)['restored'] for r in replies} - {0}  # at least one row restored
    assert [r.detail for r in adapter(samples[::-1])][::-1] == [r.detail for r in replies]


def test_prompt_is_verbatim(model):
    "The prompt keeps the blank and line break at its end; a think prompt comes behind them."
    s, tok = replace(rows(1)[0], options=dict(A='x', B='y')), model.tokenizer
    for words, end in (('', ''), ('think first', ' think first')):
        other = copy.copy(model)
        other.cfg = replace(model.cfg, think_prompt=words)
        _, prompt = ClearAdapter(other, max_new=5, steps=3)._segments(s)
        assert prompt[-1].ids == tuple(
            tok.encode(prompt_of(s) + end, add_special_tokens=False)
        ) and prompt_of(s).endswith('above. \n')


def test_row_noise_is_drawn_like_noise():
    "Row noises have the shapes of `Noise`, and another stream per seed, row and benchmark."
    x, y = (Namespace(benchmark='b', index=k) for k in 'xy')
    both, b = RowNoises([row_noise(0, x), row_noise(0, y)]), Noise(0)
    shape = 0, 3, (4, 8, 8), 4
    assert both.steps([0, 1], *shape).shape == b.steps([0, 1], *shape).shape
    assert torch.equal(both.uniform([1], 0, 4), RowNoises([row_noise(0, y)]).uniform([0], 0, 4))
    other = RowNoises([row_noise(1, x), row_noise(0, Namespace(benchmark='c', index='x'))])
    drawn = [*both.uniform([0, 1], 0, 4), *other.uniform([0, 1], 0, 4)]
    assert len({tuple(u.tolist()) for u in drawn}) == 4


def test_clear_from_a_folder(model, tmp_path):
    "A folder answers like the open model; other weights are another run."
    folder = model.save_pretrained(tmp_path / 'm')
    a, b = (
        ClearAdapter(folder, device='cpu', max_new=5, steps=3),
        ClearAdapter(model, max_new=5, steps=3),
    )
    assert [r.text for r in a(rows(2))] == [r.text for r in b(rows(2))] and a.name == 'm'
    assert open_adapter(f'clear:{folder}', max_new=5, steps=3).settings == a.settings
    other = ClearAdapter(
        talker('adapters', 1).save_pretrained(tmp_path / 'other' / 'm'),
        device='cpu',
        max_new=5,
        steps=3,
    )
    assert other.settings['weights'] != a.settings['weights'] and json.loads(json.dumps(a.settings))


def test_clear_guidance(model):
    "A mapping becomes guidance; wrong names and values are refused at once."
    guided = ClearAdapter(
        model, max_new=5, steps=3, policy='always', guidance=dict(text=4, image=2)
    )
    assert (
        guided.sampling.guidance == Guidance(4.0, 2.0)
        and guided(rows(1))[0].kind == 'answer'
        and json.loads(json.dumps(guided.settings))['sampling']['guidance']['image'] == 2
    )
    assert (
        ClearAdapter(model, guidance=Guidance(4.0, 2.0)).sampling.guidance
        == guided.sampling.guidance
        and ClearAdapter(model, guidance=None).sampling.guidance is None
    )
    for wrong, why in (
        (dict(pictures=2), "unknown key 'pictures'"),
        (dict(text='a lot'), 'guidance.text must be float'),
        ('4', 'must be a mapping'),
        (4, 'must be a mapping'),
    ):
        with pytest.raises(ValueError, match=why):
            ClearAdapter(model, guidance=wrong)


def test_clear_outages(model):
    "A question without room and a broken picture are outages; the neighbours answer."
    a, b, c = rows(3)
    replies = ClearAdapter(model, max_new=5, steps=3)(
        [a, replace(b, question='a' * 400), replace(c, image=b'x')]
    )
    assert (
        [r.kind for r in replies] == ['answer', 'outage', 'outage']
        and 'shorten the question' in replies[1].detail
        and 'cannot be decoded' in replies[2].detail
    )


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize(
    'make', [tiny_hf.llava, tiny_hf.plain_llava, tiny_hf.qwen, tiny_hf.idefics]
)
def test_hf_batches(make, tmp_path):
    "Padded batches say what single rows say, and replies depend on picture and text."
    adapter = HFAdapter(make(tmp_path / 'm'), batch=3, max_new_tokens=8, device='cpu')
    samples = rows(4)
    texts = [r.text for r in adapter(samples)]
    assert texts == [adapter([s])[0].text for s in samples]
    assert len(set(texts)) > 1 and all(len(t) <= 8 for t in texts)
    assert (
        adapter([replace(samples[0], image=picture(9, 64, 64))])[0].text
        != adapter([replace(samples[0], image=bytes(picture(1, 8, 8)))])[0].text
    )


def test_hf_is_the_model(tmp_path):
    "The adapter adds nothing to a forward pass by hand: argmax after argmax."
    a = HFAdapter(tiny_hf.llava(tmp_path / 'm'), max_new_tokens=5, device='cpu')
    s = rows(1)[0]
    given = a.processor(
        text=[f'<image>{s.question} Answer:'],
        images=[Image.fromarray(s.pixels())],
        return_tensors='pt',
    )
    ids, start = given['input_ids'], given['input_ids'].shape[1]
    for _ in range(5):
        logits = a.model(input_ids=ids, pixel_values=given['pixel_values']).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    new = ids[0, start:].tolist()
    new = new[: new.index(2)] if 2 in new else new  # id 2 ends a text
    assert a([s])[0].text == a.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_hf_refusals(tmp_path):
    "A missing folder, model or weight, and code in a folder, are refused with one sentence."
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'code').mkdir()
    (tmp_path / 'code' / 'config.json').write_text(
        json.dumps(
            dict(
                model_type='own',
                auto_map=dict(
                    AutoConfig='evil.C',
                    AutoProcessor='evil.P',
                    AutoModelForImageTextToText='evil.M',
                ),
            )
        ),
        encoding='utf-8',
    )
    (tmp_path / 'code' / 'evil.py').write_text('raise SystemExit("ran")', encoding='utf-8')
    for place in (tmp_path / 'empty', tmp_path / 'code', './nowhere', 'org/never-cached'):
        with pytest.raises(ValueError, match='as an image-text-to-text model') as e:
            HFAdapter(place)
        assert '\n' not in str(e.value)
    folder = tiny_hf.llava(tmp_path / 'm')
    weights = load_file(folder / 'model.safetensors')
    dropped = next(k for k in weights if 'q_proj' in k)
    save_file(
        {k: v for k, v in weights.items() if k != dropped},
        folder / 'model.safetensors',
        metadata=dict(format='pt'),
    )
    with pytest.raises(ValueError, match='lacks 1 weights'):
        HFAdapter(folder)


def test_hf_rows_that_fail(tmp_path):
    "A broken picture leaves the other rows alone; the picture's token in a question is a word."
    adapter, (a, b, c, d) = (
        HFAdapter(tiny_hf.llava(tmp_path / 'm'), max_new_tokens=4, device='cpu'),
        rows(4),
    )
    replies = adapter([a, replace(b, question='<image> what?'), replace(c, image=b''), d])
    assert [r.kind for r in replies] == ['answer', 'answer', 'outage', 'answer'] and replies[
        3
    ].text == adapter([d])[0].text


def test_hf_memory(tmp_path, monkeypatch):
    "Three rows that do not fit are asked one by one."
    adapter = HFAdapter(tiny_hf.llava(tmp_path / 'm'), max_new_tokens=4, device='cpu')
    wanted, inner, sizes = [r.text for r in adapter(rows(3))], HFAdapter._answers, []

    def narrow(self, items):
        sizes.append(len(items))
        if len(items) > 1:
            raise torch.OutOfMemoryError('full')
        return inner(self, items)

    monkeypatch.setattr(HFAdapter, '_answers', narrow)
    assert [r.text for r in adapter(rows(3))] == wanted and sizes == [3, 1, 2, 1, 1]


# ---------------------------------------------------------------- servers


def asks(server, **kw):
    return ServerAdapter('m', server.url, **{**dict(timeout=10, workers=4), **kw})


def test_server_gets_the_row():
    "The request holds the bytes of the file, prompt and model; the reply is stripped."
    with FakeServer(default=' B \n') as server:
        jpeg = replace(rows(1)[0], image=picture(0, kind='JPEG'))
        reply = asks(server, instruction='Letter.')([jpeg])[0]
        [r] = server.requests
    assert reply.text == 'B' and reply.seconds > 0
    assert json.loads(reply.detail) == dict(finish='stop', model='m')
    assert r.headers['authorization'] == f'Bearer {KEY}'
    assert r.body['model'] == 'm' and r.body['temperature'] == 0
    assert r.text == prompt_of(jpeg, 'Letter.') and r.images == [jpeg.image]
    assert r.parts[0]['image_url']['url'].startswith('data:image/jpeg;base64,')


def saved(kind, mode='RGB', **kw):
    "Write a picture as a file of this kind."
    Image.open(io.BytesIO(picture(0))).convert(mode).save(f := io.BytesIO(), kind, **kw)
    return f.getvalue()


@pytest.mark.parametrize(
    'kind, mode, turned, own',
    [
        ('PNG', 'RGB', 1, True),
        ('JPEG', 'RGB', 1, True),
        ('JPEG', 'RGB', 6, False),
        ('PNG', 'RGB', 3, False),
        ('WEBP', 'RGB', 1, False),
        ('TGA', 'RGB', None, False),
        ('PPM', 'RGB', None, False),
        ('MPO', 'RGB', 1, False),
        ('TIFF', 'RGB', 6, False),
        ('PNG', 'P', 1, False),
        ('PNG', 'RGBA', 1, False),
        ('JPEG', 'L', 1, False),
        ('JPEG', 'CMYK', 1, False),
    ],
)
def test_server_sees_what_the_others_see(kind, mode, turned, own):
    "A plain file is sent as it is, any other file as an upright PNG of the same pixels."
    exif = Image.Exif()
    exif[274] = turned
    more = (
        {}
        if turned is None
        else dict(exif=exif)
        | (dict(save_all=True, append_images=[Image.new('RGB', (40, 30))]) if kind == 'MPO' else {})
    )
    row = replace(rows(1)[0], image=saved(kind, mode, **more))
    with FakeServer(default='B') as server:
        assert asks(server)([row])[0].text == 'B'
        [r] = server.requests
    sent = Image.open(io.BytesIO(r.images[0]))
    assert (
        (r.images[0] == row.image) == own
        and np.array_equal(np.asarray(sent), row.pixels())
        and sent.getexif().get(274, 1) == 1
    )
    assert r.parts[0]['image_url']['url'].startswith(
        f'data:{Image.MIME[sent.format]};'
    ) and sent.format in ('PNG', 'JPEG')


def test_server_failures_pass():
    "Every row gets its own answer once, whatever failures come between."
    samples, script = (
        [replace(s, question=f'row {s.index}') for s in rows(16)],
        [x for f in FAILURES.values() for x in (f, lambda r: f'answer to {r.text}')],
    )
    with FakeServer(script, default=lambda r: f'answer to {r.text}') as server:
        replies = asks(server, timeout=0.6, tries=12)(samples)
        asked = Counter(r.text for r in server.requests)
    assert [r.text for r in replies] == [f'answer to row {k}' for k in range(16)]
    assert sum(asked.values()) == 16 + len(FAILURES) and set(asked) == {s.question for s in samples}


def test_server_outages():
    "A row that never gets through is an outage; a 400 is not repeated."
    a, b, c = rows(3)
    with FakeServer(
        default=lambda r: (
            Status(400) if 'bad' in r.text else Status(500) if 'down' in r.text else 'B'
        )
    ) as server:
        replies = asks(server, tries=3)(
            [a, replace(b, question='bad'), replace(c, question='down')]
        )
        asked = Counter(r.text for r in server.requests)
    assert (
        [r.text for r in replies] == ['B', None, None] and asked['bad'] == 1 and asked['down'] == 3
    )
    assert 'code: 400' in replies[1].detail and 'code: 500' in replies[2].detail


def test_server_absent():
    "An address without a server gives outages and no exception."
    replies = ServerAdapter('m', 'http://127.0.0.1:9/v1', tries=2)(rows(2))
    assert [r.kind for r in replies] == [
        'outage'
    ] * 2 and 'APIConnectionError: [Errno 111]' in replies[0].detail


@pytest.mark.parametrize(
    'status, what', [(401, 'refused the key in OPENAI_API_KEY'), (404, "knows no model 'm'")]
)
def test_server_refuses(status, what):
    "A refusal is one sentence and stops the run; earlier replies travel with the error."
    with FakeServer(['B'] * 3, default=Status(status)) as server:
        with pytest.raises(Refused, match=what) as e:
            asks(server, workers=1)(rows(8))
        assert len(server.requests) == 4
    assert (
        [r and r.text for r in e.value.replies] == ['B'] * 3 + [None] * 5
        and isinstance(e.value, PermissionError)
        and '\n' not in str(e.value)
    )


def test_retry_after_is_obeyed():
    "A server that says how long to wait is asked no sooner."
    with FakeServer([Status(429, headers={'Retry-After': '1'})], default='B') as server:
        assert asks(server)(rows(1))[0].text == 'B'
        assert server.requests[1].at - server.requests[0].at >= 1


def test_concurrency_and_rate():
    "Calls in flight are as many as workers, and all starts keep the rate."
    gate = threading.Barrier(4)
    with FakeServer(default=lambda r: gate.wait(10) and 'B' or 'B') as server:
        asks(server, workers=4)(rows(8))
        assert server.most == 4
    with FakeServer([Status(500)] * 2, default='B') as server:
        adapter, start = asks(server, workers=4, rpm=1200), time.monotonic()
        adapter(rows(5))
    assert adapter.server.pace.free >= start + 7 * 0.05  # where the next call may start


def test_key_never_leaks(caplog, capsys, monkeypatch):
    "The key stands in no detail, setting, log or message, even when an error repeats it."
    caplog.set_level(logging.DEBUG)
    outputs = []
    with FakeServer(['B', Status(500, KEY), Status(400, KEY)], default=Status(401, KEY)) as server:
        adapter = asks(server, workers=1, tries=1)
        outputs += adapter(rows(3))
        try:
            adapter(rows(1))
        except Refused as e:
            outputs += [str(e), repr(e), traceback.format_exc(), repr(e.args)]
    outputs += [
        repr(adapter),
        adapter.settings,
        vars(adapter),
        vars(adapter.server),
        caplog.text,
        *capsys.readouterr(),
    ]
    assert outputs[0].text == 'B' and all(
        r.kind == 'outage' and '***' in r.detail for r in outputs[1:3]
    )
    assert KEY not in ' '.join(map(str, outputs)) and len(outputs) > 8
    monkeypatch.setenv('OTHER_KEY', 'sk-\nInjected: x')
    with pytest.raises(ValueError, match='OTHER_KEY does not hold a key') as e:
        ServerAdapter('m', 'http://h/v1', key_env='OTHER_KEY')
    assert 'Injected' not in traceback.format_exception(e.value)[-1]


def test_no_key(monkeypatch):
    "A local server needs no key."
    monkeypatch.delenv('OPENAI_API_KEY')
    with FakeServer(default='B') as server:
        assert (
            asks(server)(rows(1))[0].text == 'B'
            and server.requests[0].headers['authorization'] == 'Bearer none'
        )


# ---------------------------------------------------------------- functions and specs


def test_python_function_by_name(tmp_path, monkeypatch):
    "A module in the current folder; exceptions and other types are outages."
    source = [
        'def width(picture, prompt):',
        '    if "fail" in prompt: raise KeyError("gone")',
        '    return str(picture.width) if picture.width > 32 else None',
    ]
    (tmp_path / 'my_function_of_tests.py').write_text('\n'.join(source) + '\n', encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    a, b, c, d = rows(4)
    replies = open_adapter('python:my_function_of_tests:width')(
        [a, b, replace(c, question='fail'), replace(d, image=b'')]
    )
    assert (
        [r.text for r in replies] == ['40', None, None, None]
        and 'NoneType' in replies[1].detail
        and "KeyError: 'gone'" in replies[2].detail
    )


@pytest.mark.parametrize(
    'code, why',
    [
        ('def f(picture): return "A"', 'too many positional arguments'),
        ('def f(*, picture, prompt): return "A"', 'too many'),
        ('class f:\n    def __init__(self, a, b, c): pass', "missing a required argument: 'c'"),
    ],
)
def test_wrong_signature(tmp_path, monkeypatch, code, why):
    "A function that does not take two arguments is refused before a row is asked."
    name = f'signature_{abs(hash(code))}'
    (tmp_path / f'{name}.py').write_text(code + '\n', encoding='utf-8')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r'write a function \(PIL image, prompt\) -> text') as e:
        open_adapter(f'python:{name}:f')
    assert why in str(e.value)


def test_version_of_a_function(tmp_path, monkeypatch):
    "The hash is that of the file, also behind a decorator or a partial; an edit changes it."
    source = tmp_path / 'versioned_of_tests.py'
    lines = [
        'from functools import lru_cache, partial',
        '@lru_cache',
        'def f(picture, prompt): return "A"',
        'class C:',
        '    def __call__(self, picture, prompt): return "A"',
        'c, p = C(), partial(f)',
    ]
    source.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    monkeypatch.syspath_prepend(tmp_path)
    first = {open_adapter(f'python:versioned_of_tests:{n}').settings['source'] for n in 'fcp'}
    source.write_text(source.read_text(encoding='utf-8').replace('"A"', '"B"'), encoding='utf-8')
    assert (
        len(first) == 1
        and first != {CallableAdapter(sys.modules['versioned_of_tests'].f).settings['source']}
        and CallableAdapter(len).settings['source'] is None
    )


def test_keyboard_interrupt_passes():
    "A function that is interrupted is no outage."

    def stop(picture, prompt):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CallableAdapter(stop)(rows(1))


def test_reply_types():
    assert Reply('').text == '' and Reply(None, 'outage').text is None
    for wrong in ((None, 'answer'), ('x', 'outage'), ('x', 'other')):
        with pytest.raises(ValueError):
            Reply(*wrong)
