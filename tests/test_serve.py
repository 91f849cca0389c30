"""A CLEAR model behind an OpenAI-compatible address: a server in a process of its own, asked by the
`openai` client and by `clear-nb bench`, lives on whatever it is sent, and ends when it is told to.
"""

import base64
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx2
import openai
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip('starlette')
pytest.importorskip('uvicorn')

from clear_nb import cli
from clear_nb.adapters import ServerAdapter, open_adapter
from clear_nb.bench_files import build_files
from clear_nb.core import PATHS
from clear_nb.evaluate import read_replies
from clear_nb.rows import from_scenes
from clear_nb.serve import MAX_BODY, MAX_TEXT, RequestFault, WaitingRequests, open_port
from clear_nb.trajectory import MARKER

GRPO = PATHS.checkpoints / 'tiny' / 'grpo'


def run_server(log, arguments):
    """Be `clear-nb serve` in this process, with what it writes in a file."""
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1), os.dup2(written, 2)
    sys.stdout = sys.stderr = open(1, 'w', buffering=1, closefd=False, encoding='utf-8')
    sys.exit(cli.main(['serve', '--model', f'clear:{GRPO}', '--device', 'cpu', *arguments]))


class Served:
    """A server in a process that is forked from one that has imported everything."""

    def __init__(self, folder, *arguments):
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['clear_nb.serve', 'clear_nb.cli'])
        self.log = folder / 'server.log'
        self.process = context.Process(
            target=run_server, args=(self.log, ['--port', '0', *arguments])
        )
        self.process.start()
        self.url = self.wait_for(r'serving grpo at (\S+/v1);')
        self.client = openai.OpenAI(base_url=self.url, api_key='none', max_retries=0, timeout=60)

    def wait_for(self, pattern, seconds=120):
        """Wait until the server has written something; the first group of the pattern."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.is_alive():
            text = self.log.read_text() if self.log.exists() else ''
            if found := re.search(pattern, text):
                return found[1]
            time.sleep(0.02)
        raise AssertionError(f'{pattern!r} is not in the log: {self.log.read_text()}')

    def end(self, number):
        """Send a signal; the exit status and what was written."""
        os.kill(self.process.pid, number)
        self.process.join(60)
        late = self.process.is_alive()
        self.process.kill()
        self.process.join()
        return 'no end' if late else self.process.exitcode, self.log.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    """A server that every test of this module asks, so each test also shows that it lives on."""
    with Served(tmp_path_factory.mktemp('serve'), '--batch', '4') as server:
        yield server


@pytest.fixture(scope='module')
def adapter():
    """The same model in this process."""
    return open_adapter(f'clear:{GRPO}', device='cpu')


ROWS = list(from_scenes('mmstar', 8, seed=1))


def data_url(image, kind='PNG'):
    """A picture as a data URL."""
    image.save(file := io.BytesIO(), kind)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}'


def part(url):
    """A picture part of a message."""
    return dict(type='image_url', image_url=dict(url=url))


def asked(about=ROWS[0], pictures=None, text=None, **fields):
    """A request about a row."""
    own = [part(data_url(Image.fromarray(about.pixels())))]
    content = [*(own if pictures is None else pictures)]
    content.append(dict(type='text', text=about.prompt if text is None else text))
    return dict(model='grpo', messages=[dict(role='user', content=content)]) | fields


def complete(served, request, **more):
    """Ask through the client."""
    own = {k: request.pop(k) for k in ('content', 'row', 'what') if k in request}
    return served.client.chat.completions.create(**request, extra_body=own, **more)


def post(served, body, **headers):
    """Ask without the client, which would not send everything."""
    head = {'content-type': 'application/json'} | headers
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(f'{served.url}/chat/completions', content=data, headers=head, timeout=60)


def test_models(served):
    """One model, by its name; another one is not there."""
    assert [m.id for m in served.client.models.list()] == ['grpo']
    assert served.client.models.retrieve('grpo').owned_by == 'clear-nb'
    with pytest.raises(openai.NotFoundError, match="only 'grpo'"):
        served.client.models.retrieve('gpt-x')


def test_a_reply_carries_the_trajectory(served, adapter):
    """Thought and answer in the text, or the answer alone; usage and the end."""
    reply = complete(served, asked())
    text = reply.choices[0].message.content
    assert re.fullmatch(r'<think>.*</think>.*<answer>.*</answer>', text, re.S)
    assert reply.choices[0].finish_reason == 'stop' and reply.model == 'grpo'
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    answer = complete(served, asked(content='answer')).choices[0].message.content
    assert f'<answer> {answer}</answer>' in text and answer == adapter(ROWS[:1])[0].text
    own = Image.fromarray(ROWS[0].pixels())
    parts = [*(dict(type='text', text=t) for t in ('', '')), part(data_url(own))]
    apart = [dict(role='user', content=parts), dict(role='user', content=ROWS[0].prompt)]
    assert complete(served, asked(messages=apart)).choices[0].message.content  # one question


def test_a_restored_picture_is_a_data_url(tmp_path):
    """The extra field holds what stands at the marker, in a server that always restores."""
    with Served(tmp_path, '--set', 'policy=always') as server:
        message = complete(server, asked()).choices[0].message
        pictures = message.model_extra['restored_images']
        assert MARKER in message.content and len(pictures) == message.content.count(MARKER)
        data = base64.b64decode(pictures[0].removeprefix('data:image/png;base64,'))
        assert Image.open(io.BytesIO(data)).size == (64, 64)
        chunks = list(complete(server, asked(), stream=True))
        held = [c.choices[0].delta.model_extra or {} for c in chunks]
        assert sum(len(h.get('restored_images', [])) for h in held) == len(pictures)
        status, written = server.end(signal.SIGINT)
    assert status == 130 and 'clear-nb: the server has stopped.' in written
    assert 'Traceback' not in written and 'without' not in written


def test_a_stream(served):
    """The events hold the same text, the end, and usage where it is asked for."""
    whole = complete(served, asked())
    chunks = list(complete(served, asked(), stream=True, stream_options=dict(include_usage=True)))
    deltas = [c.choices[0] for c in chunks if c.choices]
    assert ''.join(d.delta.content or '' for d in deltas) == whole.choices[0].message.content
    assert deltas[0].delta.role == 'assistant' and deltas[-1].finish_reason == 'stop'
    assert chunks[-1].usage == whole.usage and len({c.id for c in chunks}) == 1


def test_settings_of_a_request(served):
    """A limit cuts and says so; a seed repeats; a temperature changes the text."""
    cut = complete(served, asked(max_tokens=3)).choices[0]
    assert cut.finish_reason == 'length' and '<answer>' not in cut.message.content
    assert complete(served, asked(max_tokens=4096)).choices[0].finish_reason == 'stop'
    hot = dict(temperature=2.0, top_p=0.99)
    texts = [
        complete(served, asked(**hot, seed=seed)).choices[0].message.content
        for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1] and len(set(texts)) > 1
    system = [dict(role='system', content='look'), *asked()['messages']]
    assert complete(served, asked(messages=system)).choices[0].message.content
    ignored = asked(user='me', metadata=dict(a='b'), n=1, frequency_penalty=0.0, stop=None)
    assert complete(served, ignored).choices[0].message.content


def test_many_at_once(served, adapter):
    """Sixteen threads: every one gets the answer to its own question, those with another setting
    as well, and a wrong request among them spoils none.
    """
    wanted = [r.text for r in adapter(ROWS)]

    def ask(k):
        row = ROWS[k % len(ROWS)]
        fields = dict(row=dict(benchmark=row.benchmark, index=row.index), content='answer')
        if k % 5 == 4:
            with pytest.raises(openai.BadRequestError):
                complete(served, asked(row, pictures=[]))
        top_p = 0.5 if k % 3 else 1.0  # greedy, so that it changes nothing but the batch
        return complete(served, asked(row, top_p=top_p, **fields)).choices[0].message.content

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(24))) == [wanted[k % len(ROWS)] for k in range(24)]


PIXEL = data_url(Image.new('RGB', (32, 32)))
LARGE = data_url(Image.new('1', (10_000, 10_000)))
BAD = {
    'no picture': (asked(pictures=[]), 400, 'one picture, found 0'),
    'two pictures': (asked(pictures=[part(PIXEL)] * 2), 400, 'one picture, found 2'),
    'broken base64': (asked(pictures=[part('data:image/png;base64,%%')]), 400, 'base64'),
    'cut base64': (asked(pictures=[part(PIXEL[:60])]), 400, 'picture'),
    'no base64': (asked(pictures=[part('data:image/svg+xml,<svg/>')]), 400, 'sent as data:'),
    'no comma': (asked(pictures=[part('data:image/png;base64')]), 400, 'sent as data:'),
    'no picture inside': (
        asked(pictures=[part('data:image/png;base64,aGVsbG8=')]),
        400,
        'cannot be read',
    ),
    'an empty picture': (asked(pictures=[part('data:image/png;base64,')]), 400, 'cannot be read'),
    'the web': (asked(pictures=[part('https://example.org/x.png')]), 400, 'fetches nothing'),
    'a file': (asked(pictures=[part('file:///etc/passwd')]), 400, 'fetches nothing'),
    'a path': (asked(pictures=[part('/etc/passwd')]), 400, 'fetches nothing'),
    '100 megapixels': (asked(pictures=[part(LARGE)]), 413, '10000 x 10000 pixels'),
    '10 MB of text': (asked(text='a' * 10_000_000), 413, f'{MAX_TEXT:,} characters'),
    'more than the context': (asked(text='what ' * 2000), 400, 'shorten the question'),
    'an empty text': (asked(text=' \n'), 400, 'the question is empty'),
    'half a character': (
        json.dumps(asked(text='what \ud83d')).encode(),
        400,
        'the body is no JSON',
    ),
    'another model': (asked(model='gpt-x'), 404, "only 'grpo'"),
    'a NaN temperature': (
        json.dumps(asked(temperature=float('nan'))).encode(),
        400,
        'temperature: input should be a finite number',
    ),
    'a huge temperature': (asked(temperature=1e9), 400, 'temperature: input should be less'),
    'infinite temperature': (
        b'{"model": "grpo", "messages": [], "temperature": 1e999}',
        400,
        'finite number',
    ),
    'a temperature of words': (asked(temperature='hot'), 400, 'temperature: input should be'),
    'a top_p of 0': (asked(top_p=0), 400, 'top_p'),
    'no tokens': (asked(max_tokens=0), 400, 'max_tokens: input should be greater'),
    'two choices': (asked(n=2), 400, 'n: input should be less than or equal to 1'),
    'a stop phrase': (asked(stop=['.']), 400, 'stop: '),
    'tools': (asked(tools=[dict(type='function')]), 400, 'tools: this server has no such field'),
    'a misspelled field': (asked(temprature=0), 400, "did you mean 'temperature'"),
    'a conversation': (
        asked(messages=[*asked()['messages'], dict(role='assistant', content='A')]),
        400,
        'messages.1.role',
    ),
    'a part of another kind': (
        asked(pictures=[part(PIXEL), dict(type='input_audio', input_audio={})]),
        400,
        'messages.0.content',
    ),
    'no messages': (dict(model='grpo'), 400, 'messages: field required'),
    'a list': (b'[]', 400, 'the request: '),
    'no JSON': (b'{"half":', 400, 'the body is no JSON'),
    'no UTF-8': (b'\xff\xfe{}', 400, 'the body is no JSON'),
    'a deep list': (b'[' * 200_000, 400, 'the body is no JSON'),
    'nothing': (b'', 400, 'the body is no JSON'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_requests(served, name):
    """One sentence in OpenAI's shape, with the status of its kind; the server lives on."""
    body, status, said = BAD[name]
    reply = post(served, body)
    error = reply.json()['error']
    assert reply.status_code == status and said in error['message'], error
    assert set(error) == {'message', 'type', 'param', 'code'} and '\n' not in error['message']
    assert len(error['message']) < 400 and error['type'] == 'invalid_request_error'
    assert served.process.is_alive()


def test_a_body_without_end(served):
    """More than the server takes is refused while it is being sent."""

    def endless():
        for _ in range(MAX_BODY // 2**20 + 8):
            yield b' ' * 2**20

    head = {'content-type': 'application/json'}
    try:
        reply = httpx2.post(f'{served.url}/chat/completions', content=endless(), headers=head)
        assert reply.status_code == 413 and 'bytes; shrink it' in reply.json()['error']['message']
    except httpx2.TransportError:
        pass  # the server had closed before everything was sent
    assert complete(served, asked()).choices


def test_addresses(served):
    """Unknown paths and methods, another content type, and a request that a page could send."""
    for method, path, status in (
        ('GET', '/chat/completions', 405),
        ('POST', '/models', 405),
        ('POST', '/completions', 404),
        ('GET', '', 404),
    ):
        reply = httpx2.request(method, served.url + path)
        assert reply.status_code == status and reply.json()['error']['message'], path
    plain = post(served, asked(), **{'content-type': 'text/plain'})
    assert plain.status_code == 400 and 'application/json' in plain.json()['error']['message']
    assert post(served, asked(), host='page.example').status_code == 400
    assert post(served, asked(), host='localhost:1').status_code == 200


def test_a_client_that_leaves(served):
    """A broken connection in the middle of an answer."""
    with pytest.raises(httpx2.TimeoutException):
        head = {'content-type': 'application/json'}
        data = json.dumps(asked()).encode()
        httpx2.post(f'{served.url}/chat/completions', content=data, headers=head, timeout=0.001)
    assert complete(served, asked()).choices


def test_bench_through_the_server_equals_bench_on_the_folder(served, tmp_path, capsys):
    """`bench --model server:…` on scenes, clean and hard: the replies of `--model clear:…`."""
    build_files(ROWS, tmp_path / 'b', severities=['hard'], relative=True, progress=False)
    url = f'server:grpo@{served.url}'
    own = ['extra_body.content=answer', 'name_rows=true', 'workers=4']
    runs = {url: own, f'clear:{GRPO}': ['device=cpu']}
    found = []
    for k, (model, settings) in enumerate(runs.items()):
        ask = ['bench', '--model', model, '--set', *settings, '--data', str(tmp_path / 'b')]
        assert cli.main([*ask, '--out', str(tmp_path / f'{k}')]) == 0, capsys.readouterr().err
        found.append(read_replies(tmp_path / f'{k}'))
    columns = ['benchmark', 'index', 'corruption', 'severity', 'reply', 'kind', 'hash']
    assert found[0][columns].equals(found[1][columns]) and len(found[0]) == len(ROWS)
    detail = pd.DataFrame(map(json.loads, found[1].detail))
    assert detail.restored.sum() > 0  # pictures were restored, from the same noise
    assert (
        cli.main(['compare', *(str(tmp_path / k) for k in '01'), '--out', str(tmp_path / 'c')]) == 0
    )
    difference = pd.read_csv(tmp_path / 'c' / 'bench_difference.csv')
    assert (difference.difference == 0).all()


def test_name_rows_is_a_setting_of_the_run(served):
    """It decides the noise, so a run with it is another run; without it nothing changes."""
    plain, named = (ServerAdapter('grpo', served.url, name_rows=k) for k in (False, True))
    assert 'name_rows' not in plain.settings and named.settings['name_rows'] is True


def test_sigterm(served):
    """The last test of this server: it ends within the grace, with the status of its signal."""
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(complete, served, asked()) for _ in range(4)]
        time.sleep(0.05)
        status, written = served.end(signal.SIGTERM)
        [w.exception() for w in waiting]
    assert status == 143 and 'Traceback' not in written, written
    with pytest.raises(openai.APIConnectionError):
        served.client.models.list()


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['--model', 'hf:x'], 'write clear:FOLDER'),
        (['--model', 'clear:nowhere'], "no CLEAR model at 'clear:nowhere'"),
        (['--model', f'clear:{GRPO}', '--set', 'sed=1', '--port', '0'], 'sed'),
        (['--model', f'clear:{GRPO}', '--host', 'no.such.host.invalid'], 'cannot listen on'),
    ],
)
def test_what_cannot_be_served(arguments, said, capsys):
    """One sentence and status 2."""
    assert cli.main(['serve', *arguments]) == 2
    assert said in capsys.readouterr().err


def test_ports(capsys):
    """A port in use, and ports that do not exist."""
    with open_port('127.0.0.1', 0) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(['serve', '--model', f'clear:{GRPO}', '--port', port]) == 2
    assert 'choose another --port' in capsys.readouterr().err
    for port in ('65536', '-1', 'x'):
        with pytest.raises(SystemExit) as e:
            cli.main(['serve', '--model', f'clear:{GRPO}', f'--port={port}'])
        assert e.value.code == 2 and 'from 0 to 65535' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['starlette', 'uvicorn'])
def test_a_missing_library_is_named(name, capsys, monkeypatch):
    """Without the extra: what to install."""
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, 'clear_nb.serve')
    for loaded in [m for m in sys.modules if m.startswith(f'{name}.')]:
        monkeypatch.delitem(sys.modules, loaded)
    assert cli.main(['serve', '--model', f'clear:{GRPO}', '--port', '0']) == 2
    assert f"serve needs {name}: pip install 'clear-nb[serve]'" in capsys.readouterr().err


def test_an_open_host_is_warned_about(monkeypatch, capsys):
    """Only the loopback address needs no warning; there is no password."""
    started = []
    monkeypatch.setattr(
        'clear_nb.serve.web_server',
        lambda app: type('W', (), dict(run=lambda s, sockets: started.append(app)))(),
    )
    monkeypatch.setattr(
        'clear_nb.serve.open_adapter', lambda *a, **k: type('A', (), dict(name='x', batch=1))
    )
    monkeypatch.setattr('signal.getsignal', lambda number: None)
    for host, warned in (('0.0.0.0', True), ('127.0.0.1', False), ('localhost', False)):
        assert cli.main(['serve', '--model', f'clear:{GRPO}', '--port', '0', '--host', host]) == 0
        assert ('no password' in capsys.readouterr().err) == warned
    assert len(started) == 3


def test_a_failing_model_spoils_one_request_only():
    """An error of any kind reaches the one that asked, and the thread works on."""

    def answer(numbers):
        if 0 in numbers:
            raise RuntimeError('out of\nmemory')
        return [RequestFault('no') if k < 0 else k for k in numbers]

    waiting = WaitingRequests(answer, batch=1)
    futures = [waiting.submit(k) for k in (1, 0, -1, 2)]
    assert futures[0].result(10) == 1 and futures[3].result(10) == 2
    with pytest.raises(
        RequestFault, match=r'the model failed \(RuntimeError: out of memory\)'
    ) as e:
        futures[1].result(10)
    assert e.value.status == 500 and e.value.body()['error']['type'] == 'server_error'
    with pytest.raises(RequestFault, match='no'):
        futures[2].result(10)


def test_a_request_that_was_taken_back():
    """It costs nothing, and the others are answered."""
    seen, go = [], Event()

    def answer(numbers):
        go.wait(10)
        seen.extend(numbers)
        return numbers

    waiting = WaitingRequests(answer, batch=8)
    first, second, third = (waiting.submit(k) for k in (1, 2, 3))
    second.cancel()
    go.set()
    assert first.result(10) == 1 and third.result(10) == 3 and 2 not in seen or second.cancelled()
