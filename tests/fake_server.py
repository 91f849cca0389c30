"""A local server that speaks the chat-completions protocol and misbehaves on request.

    script = ['0.5', Status(429, headers={'Retry-After': '0.01'}), Hang()]
    with FakeServer(script, default='1') as server:
        client = openai.OpenAI(base_url=server.url, api_key='x')

Each request takes the next behaviour of the script, then `default` for ever. A behaviour is a text
(the reply), a `Status`, `Raw`, `Hang` or `Drop`, or a function from the `Request` to one of these.
`server.requests` logs what was asked.
"""

import base64
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@pytest.fixture
def hasty(monkeypatch):
    """The client of openai starts with waits of a hundredth of a second instead of half a
    second."""
    monkeypatch.setattr('openai._base_client.INITIAL_RETRY_DELAY', 0.01)


@dataclass(frozen=True)
class Status:
    """An error status; the body is what the server says about it."""

    code: int
    message: str = 'scripted failure'
    headers: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """Any body: broken JSON, JSON of another shape, an error page."""

    body: str
    content_type: str = 'application/json'
    status: int = 200


@dataclass(frozen=True)
class Hang:
    """No reply for so many seconds (or until the server closes), then the connection ends."""

    seconds: float = 60.0


@dataclass(frozen=True)
class Drop:
    """The connection ends without a reply."""


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    path: str
    headers: dict  # names in lower case
    body: dict
    at: float  # seconds on the clock of `time.monotonic`

    @property
    def parts(self):  # content parts of all messages; a plain string is one text part
        contents = [m.get('content') or '' for m in self.body['messages']]
        return [
            p
            for c in contents
            for p in ([{'type': 'text', 'text': c}] if isinstance(c, str) else c)
        ]

    @property
    def text(self):
        return '\n'.join(p['text'] for p in self.parts if p['type'] == 'text')

    @property
    def images(self):  # bytes of the pictures sent as data URLs
        urls = [p['image_url']['url'] for p in self.parts if p['type'] == 'image_url']
        return [base64.b64decode(u.partition('base64,')[2]) for u in urls]


def completion(text, model):  # body of a good reply
    return dict(
        id='fake',
        object='chat.completion',
        created=0,
        model=model,
        usage=dict(prompt_tokens=1, completion_tokens=1, total_tokens=2),
        choices=[dict(index=0, finish_reason='stop', message=dict(role='assistant', content=text))],
    )


NONSENSE = [
    Raw('<html>gateway</html>', 'text/html'),
    *map(
        Raw,
        (
            '[]',
            'null',
            '{"half":',
            '{"hello": 1}',
            '{"choices": []}',
            '{"choices": {}}',
            '{"choices": ["B"]}',
            '{"choices": [{"message": null}]}',
            '{"choices": [{"message": {"content": 3}}]}',
        ),
    ),
]  # no completions
FAILURES = {
    'too many requests': Status(429, headers={'Retry-After': '0.02'}),
    'server error': Status(500),
    'bad gateway': Status(502, '<html>'),
    'time-out': Hang(),
    'broken connection': Drop(),
    **{b.body: b for b in NONSENSE},
}  # may pass


class FakeServer:
    """Serves on a free port of this machine while the `with` block lasts."""

    def __init__(self, script=(), default='1'):
        self.script, self.default = list(script), default
        self.requests, self.errors, self.most, self._now = (
            [],
            [],
            0,
            0,
        )  # log, exceptions of the script, most requests served at the same time
        self._lock, self._closing = threading.Lock(), threading.Event()

    @property
    def url(self):
        return f'http://127.0.0.1:{self._http.server_port}/v1'

    def __enter__(self):
        self._http = ThreadingHTTPServer(('127.0.0.1', 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, kind, *_):
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        if self.errors and kind is None:
            raise self.errors[0]

    def take(self, request):  # log a request and choose what happens to it
        with self._lock:
            self.requests.append(request)
            behaviour = self.script.pop(0) if self.script else self.default
        try:
            return behaviour(request) if callable(behaviour) else behaviour
        except Exception as e:  # a mistake in a test: raised when the block ends
            self.errors.append(e)
            return Status(500, repr(e))

    def busy(self, step):  # one request more or less is being served
        with self._lock:
            self._now += step
            self.most = max(self.most, self._now)

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                request = Request(
                    self.path,
                    {k.lower(): v for k, v in self.headers.items()},
                    body,
                    time.monotonic(),
                )
                if not self.path.endswith('/chat/completions'):
                    return self.send(404, '{"error": {"message": "no such path"}}')
                server.busy(1)
                try:
                    self.act(server.take(request), request)
                finally:
                    server.busy(-1)

            def act(self, b, request):
                if isinstance(b, str):
                    self.send(200, json.dumps(completion(b, request.body.get('model', ''))))
                elif isinstance(b, Status):
                    self.send(
                        b.code, json.dumps({'error': {'message': b.message}}), headers=b.headers
                    )
                elif isinstance(b, Raw):
                    self.send(b.status, b.body, b.content_type)
                elif isinstance(b, (Hang, Drop)):
                    if isinstance(b, Hang):
                        server._closing.wait(b.seconds)
                    self.close_connection = True
                else:
                    raise TypeError(f'not a behaviour: {b!r}')

            def send(self, code, text, content_type='application/json', headers=None):
                data = text.encode()
                self.send_response(code)
                for k, v in {
                    'Content-Type': content_type,
                    'Content-Length': str(len(data)),
                    **(headers or {}),
                }.items():
                    self.send_header(k, v)
                self.end_headers()
                self.wfile.write(data)

        return Handler
