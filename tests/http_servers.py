"""Servers on localhost for the tests: one that answers from a script, and ours, in a thread or a process.

`Digests` is a retriever whose right answers anybody can compute: `Digests.passages(query, k)`.
"""

import collections
import contextlib
import hashlib
import http.client
import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import uvicorn

from searchr1_jax.core import types
from searchr1_jax.retrieval import server

ROOT = pathlib.Path(__file__).parents[1]
Seen = collections.namedtuple("Seen", "path body headers")  # body: the JSON of a POST, the parameters of a GET


@contextlib.contextmanager
def scripted(*answers):
    """Answers the n-th request with the n-th (status, body[, headers]) or function, then with the last for ever.

    Yields the server's url and the list of what it has seen.
    """
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self._answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def do_GET(self):
            path, _, query = self.path.partition("?")
            self._answer(path, dict(urllib.parse.parse_qsl(query, strict_parsing=True)))

        def _answer(self, path, body):
            seen.append(Seen(path, body, self.headers))
            answer = answers[min(len(seen), len(answers)) - 1]
            status, reply, *headers = answer(body) if callable(answer) else answer
            reply = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in dict(*headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            with contextlib.suppress(OSError):  # a client that has given up
                self.wfile.write(reply)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", seen
    finally:
        httpd.shutdown()
        httpd.server_close()


class Digests:
    """Answers from a hash of the query."""

    def search(self, queries, k):
        return [self.passages(query, k) for query in queries]

    @staticmethod
    def passages(query, k):
        digest = hashlib.sha256(query.encode()).hexdigest()
        return [
            types.Passage(id=f"{digest[:8]}-{i}", title=f'"{query}"', text=f"{digest}\n{k}", score=int(letter, 16) / 7)
            for i, letter in enumerate(digest[:k])
        ]


@contextlib.contextmanager
def serving(retriever, settings, *, info=None, until_warm=True):
    """Our server in a thread; yields its url."""
    app = server.app(retriever, settings, info)
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: running.started)
        url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
        if until_warm:
            wait_for(lambda: get(url, "/health")[0] == 200)
        yield url
    finally:
        running.should_exit = True
        thread.join(10)


SERVE = """
import sys
import http_servers
from searchr1_jax.retrieval import server
{code}
server.serve({retriever}, host="127.0.0.1", port=int(sys.argv[1]), settings=server.Settings(threads=2))
print("served")
"""


@contextlib.contextmanager
def process(port, *, code="", retriever="http_servers.Digests()"):
    """`server.serve` in a process of its own, once it is warm; yields the process."""
    path = os.pathsep.join([str(ROOT), str(pathlib.Path(__file__).parent)])
    running = subprocess.Popen(
        [sys.executable, "-c", SERVE.format(code=code, retriever=retriever), str(port)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: reachable(port) and get(f"http://127.0.0.1:{port}", "/health")[0] == 200, 60)
        yield running
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
        running.communicate()


def reachable(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def get(url, path):
    """Returns status, body and headers of GET."""
    return _asked(url, "GET", path, None, {})


def post(url, body, headers=()):
    """Returns status, JSON and headers of POST /retrieve; the body as bytes, or as what JSON is made of."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer, headers = _asked(url, "POST", "/retrieve", body, dict(headers))
    return status, json.loads(answer), headers


def _asked(url, method, path, body, headers):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers
