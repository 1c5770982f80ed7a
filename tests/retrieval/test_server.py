"""The retrieval server on real sockets: the protocol to the letter, bad requests, batches, load, start and end."""

import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import signal
import socket
import threading
import time

import http_servers
import pytest

from searchr1_jax.core import types
from searchr1_jax.retrieval import base, remote, server, text_encoder

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden_wire.json").read_text())
FULL_LOAD = "SEARCHR1_FULL_LOAD"  # set it to run 64 clients and 10,000 requests


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _settings(**changes):
    return server.Settings(**dict(topk=2, warm_queries=(1,)) | changes)


class _Golden:
    """Finds both documents of the golden corpus for "mira", and none for other queries."""

    def search(self, queries, k):
        found = [
            types.Passage(id=id_, title=contents.split("\n", 1)[0], text=contents.split("\n", 1)[1], score=score)
            for (id_, contents), score in zip(GOLDEN["corpus"].items(), (0.75, 0.1), strict=True)
        ]
        return [found[:k] if query == "mira" else [] for query in queries]


class _Gated:
    """Digests behind a gate: a search is noted, then waits until the gate opens. Raises for queries like "bad"."""

    def __init__(self, *, closed=True):
        self.calls = []
        self.at_once = self.most_at_once = 0
        self.gate = threading.Event()
        self._lock = threading.Lock()
        if not closed:
            self.gate.set()

    def search(self, queries, k):
        if queries[0] == "warm up":
            return [[]] * len(queries)
        with self._lock:
            self.calls.append((list(queries), k))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.gate.wait(10)
        with self._lock:
            self.at_once -= 1
        if any(query.startswith("bad") for query in queries):
            raise base.RetrievalError(next(q for q in queries if q.startswith("bad")), "no such luck", 1)
        return http_servers.Digests().search(queries, k)


def _right(answer, query, k):
    """Whether an answer of POST /retrieve, with scores, holds what Digests finds for one query."""
    expected = [
        {"document": {"id": p.id, "contents": f"{p.title}\n{p.text}"}, "score": p.score}
        for p in http_servers.Digests.passages(query, k)
    ]
    return answer == {"result": [expected]}


def _ask(url, query, k=2):
    return http_servers.post(url, {"queries": [query], "topk": k, "return_scores": True})


# The protocol.


@pytest.fixture(scope="module")
def golden_url():
    limits = dict(max_queries=4, max_query_chars=20, max_topk=10, max_body_bytes=200_000)
    with http_servers.serving(_Golden(), _settings(**limits), info={"index": "golden"}) as url:
        yield url


@pytest.mark.parametrize("exchange", GOLDEN["exchanges"], ids=lambda exchange: exchange["what"])
def test_requests_of_the_family_get_the_answers_of_the_family(golden_url, exchange):
    status, answer, headers = http_servers.post(golden_url, exchange["request"])
    assert (status, answer) == (200, exchange["answer"])
    assert headers["Content-Type"] == "application/json"


def test_our_client_and_our_server_understand_each_other(golden_url):
    client = remote.RemoteRetriever(golden_url, timeout_s=10, attempts=1, backoff_s=0)
    assert client.search(["nobody", "mira"], 2) == _Golden().search(["nobody", "mira"], 2)


HALF = b'{"queries": ["\\ud83e"]}'
BAD = [
    (b"", 400, "not JSON"),
    (b'{"queries": ["mira"', 400, "not JSON"),
    (b'{"queries": ["m\xff"]}', 400, "not JSON in UTF-8"),
    ('{"queries": ["mira"]}'.encode("utf-16"), 400, "not JSON in UTF-8"),
    (b"[" * 100_000, 400, "not JSON"),
    (b'{"queries": ["mira"], "topk": ' + b"1" * 5000 + b"}", 400, "not JSON"),
    (["mira"], 422, "not a JSON object"),
    ({}, 422, '"queries" is not a list'),
    ({"queries": "mira"}, 422, '"queries" is not a list'),
    ({"queries": []}, 422, "at least one text"),
    ({"queries": ["mira", ""]}, 422, "query 1 is not a text, or an empty one"),
    ({"queries": [" \n"]}, 422, "query 0 is not a text, or an empty one"),
    ({"queries": ["mira", 3]}, 422, "query 1 is not a text"),
    ({"queries": [None]}, 422, "query 0 is not a text"),
    ({"queries": ["a"] * 5}, 422, "5 queries; send at most 4"),
    ({"queries": ["a" * 21]}, 422, "query 0 has 21 characters; send at most 20"),
    ({"queries": ["x" * 100_000]}, 422, "query 0 has 100000 characters; send at most 20"),
    (HALF, 422, "query 0 has half of a surrogate pair"),
    ({"queries": ["mira"], "topk": 0}, 422, '"topk" is 0; send a whole number from 1 to 10'),
    ({"queries": ["mira"], "topk": 11}, 422, '"topk" is 11'),
    ({"queries": ["mira"], "topk": True}, 422, '"topk" is True'),
    ({"queries": ["mira"], "topk": "2"}, 422, "\"topk\" is '2'"),
    ({"queries": ["mira"], "topk": 2.0}, 422, '"topk" is 2.0'),
    (b'{"queries": ["mira"], "topk": NaN}', 422, '"topk" is nan'),
    ({"queries": ["mira"], "return_scores": 1}, 422, '"return_scores" is neither'),
    ({"queries": ["mira"], "return_scores": None}, 422, '"return_scores" is neither'),
    (b" " * 200_001, 413, "more than 200000 bytes"),
]


@pytest.mark.parametrize("body, status, reason", BAD, ids=[f"{reason} ({status})" for _, status, reason in BAD])
def test_a_bad_request_is_refused_with_a_reason_and_the_server_lives(golden_url, body, status, reason):
    got, answer, _ = http_servers.post(golden_url, body)
    assert got == status and reason in answer["error"], answer
    assert http_servers.post(golden_url, {"queries": ["mira"], "topk": 1})[0] == 200


def test_wrong_paths_and_methods_are_refused_in_json(golden_url):
    for path, status in [("/nothing", 404), ("/retrieve", 405)]:
        got, body, _ = http_servers.get(golden_url, path)
        assert got == status and "error" in json.loads(body)


@contextlib.contextmanager
def _raw(url):
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 10) as connection:
        yield connection


def test_a_body_that_never_ends_is_read_no_further_than_its_limit(golden_url):
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    sent = 0
    with _raw(golden_url) as connection:
        connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # the server hangs up
            while sent < 1 << 30:
                connection.sendall(chunk)
                sent += len(chunk)
    assert sent < 64 << 20  # 1.6 MB and what fits in the sockets' buffers
    assert http_servers.post(golden_url, {"queries": ["mira"], "topk": 1})[0] == 200


def test_a_body_that_breaks_off_or_stalls_leaves_the_server_alive():
    with http_servers.serving(_Golden(), _settings(body_timeout_s=0.2)) as url:
        head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        with _raw(url) as connection:
            connection.sendall(head)
        with _raw(url) as connection:
            connection.sendall(head)
            assert b" 408 " in connection.recv(4096)
        assert http_servers.post(url, {"queries": ["mira"]})[0] == 200


# Searches: failures, batches, the queue.


def test_a_search_that_raises_is_a_500_with_its_reason_for_that_request_alone():
    with http_servers.serving(_Gated(closed=False), _settings()) as url:
        status, answer, _ = _ask(url, "bad luck")
        assert status == 500
        assert answer["error"] == "RetrievalError: the search for 'bad luck' failed after 1 attempt: no such luck"
        status, answer, _ = _ask(url, "good")
        assert status == 200 and _right(answer, "good", 2)


@pytest.mark.parametrize(
    "found, reason",
    [
        ([], "RuntimeError: the retriever gave 0 answers for 1 queries"),
        ([[types.Passage(id="1", title="t", text="t", score=math.nan)]], "ValueError: Out of range float"),
        ([[types.Passage(id="1", title="t", text="\ud800")]], "UnicodeEncodeError"),
    ],
)
def test_an_answer_that_the_protocol_cannot_carry_is_a_500(found, reason):
    class Wrong:
        def search(self, queries, k):
            return [[]] if queries == ["warm up"] else found

    with http_servers.serving(Wrong(), _settings()) as url:
        status, answer, _ = _ask(url, "x")
    assert status == 500 and reason in answer["error"]


@contextlib.contextmanager
def _asking(url, asked):
    """Sends (query, k) requests at once; yields the futures of their answers."""
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        yield [pool.submit(_ask, url, query, k) for query, k in asked]


def test_requests_of_one_k_are_searched_together():
    retriever = _Gated(closed=False)
    asked = [("a", 2), ("b", 3), ("c", 2), ("d", 3), ("e", 3), ("f", 2)]
    with http_servers.serving(retriever, _settings(batch_queries=3, batch_wait_ms=60_000)) as url:
        with _asking(url, asked) as answers:
            for (query, k), answer in zip(asked, answers, strict=True):
                status, found, _ = answer.result()
                assert status == 200 and _right(found, query, k)
    calls = sorted((sorted(queries), k) for queries, k in retriever.calls)
    assert calls == [(["a", "c", "f"], 2), (["b", "d", "e"], 3)]


def test_a_request_waits_for_others_no_longer_than_it_was_told():
    with http_servers.serving(_Gated(closed=False), _settings(batch_wait_ms=20)) as url:
        for _ in range(10):  # some event loops' timers are early by their own clock
            start = time.monotonic()
            assert _ask(url, "a")[0] == 200
            assert 0.015 <= time.monotonic() - start < 5


def test_a_batch_does_not_wait_once_it_is_full():
    with http_servers.serving(_Gated(closed=False), _settings(batch_queries=2, batch_wait_ms=60_000)) as url:
        start = time.monotonic()
        with _asking(url, [("a", 2), ("b", 2)]) as answers:
            assert [answer.result()[0] for answer in answers] == [200, 200]
        assert http_servers.post(url, {"queries": ["a", "b", "c"]})[0] == 200  # more than a batch: one of its own
        assert time.monotonic() - start < 10


def test_without_batching_every_request_is_a_search():
    retriever = _Gated(closed=False)
    with http_servers.serving(retriever, _settings()) as url:
        with _asking(url, [("a", 2), ("b", 2), ("c", 2)]) as answers:
            assert [answer.result()[0] for answer in answers] == [200] * 3
    assert sorted(retriever.calls) == [(["a"], 2), (["b"], 2), (["c"], 2)]


def test_one_bad_query_does_not_fail_its_batch():
    retriever = _Gated(closed=False)
    with http_servers.serving(retriever, _settings(batch_queries=3, batch_wait_ms=60_000)) as url:
        with _asking(url, [("a", 2), ("bad", 2), ("c", 2)]) as answers:
            statuses, found, _ = zip(*[answer.result() for answer in answers], strict=True)
    assert statuses == (200, 500, 200)
    assert _right(found[0], "a", 2) and _right(found[2], "c", 2) and "'bad'" in found[1]["error"]
    together, *alone = [queries for queries, _ in retriever.calls]
    assert sorted(together) == ["a", "bad", "c"] and alone == [[query] for query in together]


def test_a_full_queue_is_a_503_and_what_waits_is_answered():
    retriever = _Gated()
    with http_servers.serving(retriever, _settings(threads=2, max_waiting=1)) as url:
        with _asking(url, [("a", 2), ("b", 2), ("c", 2)]) as answers:
            http_servers.wait_for(lambda: b"searchr1_queue_depth 1" in http_servers.get(url, "/metrics")[1])
            status, answer, headers = _ask(url, "d")
            assert status == 503 and "1 requests are waiting" in answer["error"] and headers["Retry-After"] == "1"
            retriever.gate.set()
            for query, answer in zip("abc", answers, strict=True):
                status, found, _ = answer.result()
                assert status == 200 and _right(found, query, 2)
    assert retriever.most_at_once == 2 and len(retriever.calls) == 3


# Start, metrics, end.


def test_nothing_is_served_before_the_warm_up_is_over():
    sizes, gate = [], threading.Event()

    class Slow:
        def search(self, queries, k):
            sizes.append((len(queries), k))
            gate.wait(10)
            return [[]] * len(queries)

    info = {"index": "bm25", "rows": 3}
    with http_servers.serving(Slow(), _settings(warm_queries=(1, 4)), info=info, until_warm=False) as url:
        for status, body, headers in (http_servers.get(url, "/health"), http_servers.post(url, {"queries": ["a"]})):
            assert status == 503 and b"warming up" in json.dumps(str(body)).encode()
            assert headers["Retry-After"] == "1"
        gate.set()
        http_servers.wait_for(lambda: http_servers.get(url, "/health")[0] == 200)
        assert json.loads(http_servers.get(url, "/health")[1]) == info
        assert sizes == [(1, 2), (4, 2)]


def test_the_warm_up_has_queries_for_every_length_that_an_encoder_compiles():
    asked = []

    class Noting:
        def search(self, queries, k):
            asked.append(queries)
            return [[]] * len(queries)

    with http_servers.serving(Noting(), _settings(warm_queries=(1, 64))):
        pass
    assert asked[0] == ["warm up"] and len(asked[1]) == 64
    assert all(len(query) <= server.Settings().max_query_chars for query in asked[1])
    buckets = text_encoder.buckets(512)
    for frame in (2, 10):  # tokens beside the words': a prefix may be among them
        tokens = [len(query.split()) + frame for query in asked[1]]
        assert {next((b for b in buckets if n <= b), None) for n in tokens} == {*buckets, None}


def test_a_warm_up_that_fails_ends_serve_with_its_cause():
    class Broken:
        def search(self, queries, k):
            raise base.RetrievalError(queries[0], "no index", 1)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(base.RetrievalError, match="no index"):
        server.serve(Broken(), host="127.0.0.1", port=http_servers.free_port(), settings=_settings())
    assert signal.getsignal(signal.SIGTERM) is before


def test_metrics_count_requests_queries_seconds_and_batches():
    with http_servers.serving(_Gated(closed=False), _settings()) as url:
        for queries in (["a"], ["b", "c", "d"], [], ["bad"]):
            http_servers.post(url, {"queries": queries})
        status, body, headers = http_servers.get(url, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    lines = body.decode().splitlines()
    for line in lines:
        assert re.fullmatch(r'# (HELP|TYPE) \S+ .+|[a-z0-9_]+(\{[a-z]+="[^"]+"\})? [-+.e0-9]+', line), line
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    expected = {
        'searchr1_requests_total{status="200"}': 2,
        'searchr1_requests_total{status="422"}': 1,
        'searchr1_requests_total{status="500"}': 1,
        "searchr1_queries_total": 4,
        "searchr1_queue_depth": 0,
        "searchr1_request_seconds_count": 4,
        'searchr1_request_seconds_bucket{le="+Inf"}': 4,
        'searchr1_batch_queries_bucket{le="1"}': 2,
        'searchr1_batch_queries_bucket{le="2"}': 2,
        'searchr1_batch_queries_bucket{le="4"}': 3,
        "searchr1_batch_queries_sum": 5,
        "searchr1_batch_queries_count": 3,
    }
    assert {name: float(samples[name]) for name in expected} == expected
    assert float(samples["searchr1_request_seconds_sum"]) > 0


SLOW = """
import time
class Slow(http_servers.Digests):
    def search(self, queries, k):
        if queries[0] == "slow":
            print("searching", flush=True)
            time.sleep(0.5)
        return super().search(queries, k)
"""


def test_a_server_told_to_stop_answers_what_is_under_way_and_returns():
    port = http_servers.free_port()
    url = f"http://127.0.0.1:{port}"
    with http_servers.process(port, code=SLOW, retriever="Slow()") as process:
        with _asking(url, [("slow", 2)]) as [answer]:
            assert process.stdout.readline() == "searching\n"
            process.send_signal(signal.SIGTERM)
            status, found, _ = answer.result()
        assert status == 200 and _right(found, "slow", 2)
        assert process.communicate(timeout=10)[0] == "served\n" and process.returncode == 0
    assert not http_servers.reachable(port)


# Load and loss.


def _load(client, clients, requests):
    """Searches from many threads at once; returns how many answers were not the right ones."""
    digests = http_servers.Digests()
    numbers = itertools.count()

    def run(_):
        wrong = 0
        while (number := next(numbers)) < requests:
            queries, k = [f"query {number} {i}" for i in range(1 + number % 3)], 1 + number % 4
            wrong += client.search(queries, k) != digests.search(queries, k)
        return wrong

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(run, range(clients)))


@pytest.mark.parametrize("batch_wait_ms", [0.0, 2.0])
def test_no_answer_is_wrong_or_lost_under_load(batch_wait_ms):
    clients, requests = (64, 10_000) if FULL_LOAD in os.environ else (16, 1000)
    settings = _settings(batch_wait_ms=batch_wait_ms)
    with http_servers.serving(http_servers.Digests(), settings) as url:
        client = remote.RemoteRetriever(url, timeout_s=30, attempts=1, backoff_s=0)
        start = time.monotonic()
        assert _load(client, clients, requests) == 0
        print(f"{clients} clients, {requests} requests, {time.monotonic() - start:.1f} s")
        [line] = [line for line in http_servers.get(url, "/metrics")[1].splitlines() if b'status="200"' in line]
    assert float(line.split()[-1]) == requests  # each was sent once


def test_a_server_that_is_killed_and_started_again_loses_no_answer():
    port = http_servers.free_port()
    client = remote.RemoteRetriever(f"http://127.0.0.1:{port}", timeout_s=10, attempts=10, backoff_s=0.05)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with http_servers.process(port) as first:
            load = pool.submit(_load, client, 4, 600)
            http_servers.wait_for(lambda: _answered(port) > 100)
            first.send_signal(signal.SIGKILL)
            first.wait()
            assert not load.done()
        with http_servers.process(port):
            assert load.result(30) == 0
            assert _answered(port) > 0


def _answered(port):
    body = http_servers.get(f"http://127.0.0.1:{port}", "/metrics")[1].decode()
    found = re.search(r'requests_total\{status="200"\} (\d+)', body)
    return int(found[1]) if found else 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(topk=0), "topk is 0; set it to at least 1"),
        (dict(topk=101), "topk is 101, above max_topk = 100"),
        (dict(threads=0), "threads is 0"),
        (dict(max_waiting=0), "max_waiting is 0"),
        (dict(batch_wait_ms=-1), "batch_wait_ms is -1"),
    ],
)
def test_wrong_settings_are_refused_by_value(wrong, message):
    with pytest.raises(ValueError, match=message):
        server.Settings(**wrong)
