"""A server on this machine that speaks as much of the OpenAI protocol as a chat completion needs, and fails on request."""
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NONSENSE = ['<html>gateway</html>', '[]', 'null', '{"choices": []}', '{"choices": {}}', '{"choices": ["B"]}', '{"choices": [{"message": null}]}',
            '{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}', '{"choices": [{"message": {"content": 3}}]}', '{"half":']


class Server(ThreadingHTTPServer):
    "`plan(n, prompt)` says what happens to call n: text to answer with, or a failure: 429, 500, 400, 401, 404, 'hang', 'drop', or a body as bytes."
    daemon_threads = True

    def __init__(self, plan):
        super().__init__(('127.0.0.1', 0), Handler)
        self.plan, self.lock, self.calls, self.now, self.most, self.headers = plan, threading.Lock(), [], 0, 0, {}

    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/v1'

    def handle_error(self, *_): pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def reply(self, status, body, kind='application/json'):
        self.send_response(status)
        for k, v in {'content-type': kind, 'content-length': len(body), **(self.server.headers if status == 429 else {})}.items(): self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body, key, s = json.loads(self.rfile.read(int(self.headers['content-length']))), self.headers.get('authorization', ''), self.server
        prompt = body['messages'][0]['content'][1]['text']
        with s.lock:
            s.calls.append(dict(body=body, prompt=prompt, key=key, path=self.path, at=time.monotonic()))
            n, s.now = len(s.calls), s.now + 1
            s.most = max(s.most, s.now)
        try: self.act(s.plan(n, prompt), key, prompt)
        finally:
            with s.lock: s.now -= 1

    def act(self, what, key, prompt):
        if what == 'drop': self.connection.close(); return
        if what == 'hang': time.sleep(1.5); return
        if isinstance(what, bytes): return self.reply(200, what, 'text/html' if what[:1] == b'<' else 'application/json')
        if isinstance(what, int): return self.reply(what, json.dumps(dict(error=dict(message=f'status {what}, you sent {key}', code=None))).encode())
        said = dict(id='1', object='chat.completion', created=0, model='served', choices=[dict(index=0, message=dict(role='assistant', content=what), finish_reason='stop')])
        self.reply(200, json.dumps(said).encode())


@contextmanager
def serving(plan):
    "A running server."
    server = Server(plan)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield server
    finally:
        server.shutdown()
        server.server_close()
