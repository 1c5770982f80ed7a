"""The client of the wire protocol, against small servers that answer from a script."""

import concurrent.futures
import contextlib
import gzip
import http.server
import json
import math
import socket
import threading
import time

import http_servers
import pytest

from searchr1_jax.core import types
from searchr1_jax.retrieval import base, remote

MIRA = {"id": "7", "contents": '"Mira Talon"\nA poet\nborn in Kelu.'}
DORU = {"id": "8", "contents": '"Doru Fesu"\nA baker.'}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _client(url, *, timeout_s=5.0, attempts=3):
    return remote.RemoteRetriever(url, timeout_s=timeout_s, attempts=attempts, backoff_s=0.01)


def _echo(request):
    """One document a query, whose id is the query."""
    documents = [{"id": query, "contents": f"{query}\ntext"} for query in request["queries"]]
    return 200, {"result": [[{"document": document, "score": 1.0}] for document in documents]}


@pytest.mark.parametrize("end", ["", "/", "/retrieve", "/retrieve/"])
def test_the_request_and_the_answer_are_the_protocols(end):
    result = [[{"document": MIRA, "score": 0.75}, {"document": DORU, "score": 0.5}], []]
    with http_servers.scripted((200, {"result": result})) as (url, seen):
        found = _client(url + end).search(["mira", "nothing"], 2)
    expected = {"queries": ["mira", "nothing"], "topk": 2, "return_scores": True}
    assert [(request.path, request.body) for request in seen] == [("/retrieve", expected)]
    assert found == [
        [
            types.Passage(id="7", title='"Mira Talon"', text="A poet\nborn in Kelu.", score=0.75),
            types.Passage(id="8", title='"Doru Fesu"', text="A baker.", score=0.5),
        ],
        [],
    ]


def test_documents_without_scores_or_ids_are_taken_as_they_are():
    nameless = {"document": {"contents": DORU["contents"]}}
    with http_servers.scripted((200, {"result": [[MIRA, nameless, {"id": 9, "contents": "t"}]]})) as (url, _):
        [passages] = _client(url).search(["mira"], 3)
    assert [(p.id, p.title, p.score) for p in passages] == [
        ("7", '"Mira Talon"', 0.0), ("", '"Doru Fesu"', 0.0), ("9", "t", 0.0)
    ]  # fmt: skip


def test_at_most_k_passages_are_kept():
    with http_servers.scripted((200, {"result": [[MIRA, DORU, MIRA]]})) as (url, _):
        assert [p.id for p in _client(url).search(["mira"], 2)[0]] == ["7", "8"]


def test_no_queries_are_no_request():
    with http_servers.scripted((500, b"")) as (url, seen):
        assert _client(url).search([], 3) == []
    assert seen == []


def test_a_server_that_fails_twice_is_asked_a_third_time():
    with http_servers.scripted((500, b"boom"), (503, b"busy"), _echo) as (url, seen):
        assert _client(url).search(["mira"], 1)[0][0].id == "mira"
    assert len(seen) == 3


def test_the_pause_before_an_attempt_doubles(monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    with http_servers.scripted((500, b"boom")) as (url, _), pytest.raises(base.RetrievalError):
        _client(url, attempts=4).search(["mira"], 1)
    assert pauses == [0.01, 0.02, 0.04]


def test_a_server_that_keeps_failing_is_an_error_with_its_cause():
    with http_servers.scripted((500, b"out of memory")) as (url, seen):
        with pytest.raises(base.RetrievalError, match="'mira'.* 3 attempts.*500: out of memory") as error:
            _client(url).search(["mira", "doru"], 1)
    assert len(seen) == 3
    assert (error.value.query, error.value.attempts, error.value.batch) == ("mira", 3, 2)
    assert f"{url}/retrieve" in error.value.cause


def test_a_refusal_is_not_repeated():
    with http_servers.scripted((422, b"too large")) as (url, seen):
        with pytest.raises(base.RetrievalError, match="after 1 attempt: .*/retrieve: status 422: too large"):
            _client(url).search(["mira"], 1)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "reply, cause",
    [
        (b"<html>garbage", "not JSON.*<html>garbage"),
        ([], 'no list "result"'),
        ({"results": []}, 'no list "result"'),
        ({"result": [[MIRA]]}, "1 results for 2 queries"),
        ({"result": [[MIRA]] * 3}, "3 results for 2 queries"),
        ({"result": [[MIRA], None]}, "the result for 'doru' is not a list: None"),
        ({"result": [[MIRA], ["x"]]}, "for 'doru', an item is not an object: 'x'"),
        ({"result": [[MIRA], [{"id": "1"}]]}, "for 'doru', a document has no text \"contents\""),
        ({"result": [[MIRA], [{"document": {"contents": 3}}]]}, "for 'doru', a document has no text"),
        ({"result": [[MIRA], [{"document": "x"}]]}, "for 'doru', a document has no text"),
        ({"result": [[MIRA | {"score": "high"}], []]}, "for 'mira', a score is not a finite number: 'high'"),
        ({"result": [[{"document": MIRA, "score": math.nan}], []]}, "a score is not a finite number: nan"),
    ],
)
def test_an_answer_that_is_not_the_protocol_is_an_error_and_not_asked_for_again(reply, cause):
    with http_servers.scripted((200, reply)) as (url, seen):
        with pytest.raises(base.RetrievalError, match=cause) as error:
            _client(url).search(["mira", "doru"], 1)
        assert f"{url}/retrieve" in str(error.value)
    assert len(seen) == 1


@contextlib.contextmanager
def _held():
    """Yields an answer that does not come before the end."""
    end = threading.Event()

    def answer(request):
        end.wait(60)
        return _echo(request)

    try:
        yield answer
    finally:
        end.set()


def test_a_slow_server_times_out_and_may_be_faster_the_next_time():
    with _held() as held:
        with http_servers.scripted(held, _echo) as (url, seen):
            assert _client(url, timeout_s=1.0).search(["mira"], 1)[0][0].id == "mira"
            assert len(seen) == 2
        with http_servers.scripted(held) as (url, _):
            with pytest.raises(base.RetrievalError, match="2 attempts: .*no answer within 0.1 s"):
                _client(url, timeout_s=0.1, attempts=2).search(["mira"], 1)


def test_an_answer_that_breaks_off_is_asked_for_again():
    def reply(answer):
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer

    whole = reply(json.dumps({"result": [[MIRA]]}).encode())
    with socket.create_server(("127.0.0.1", 0)) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        server.settimeout(5)

        def answer(*parts):
            for part in parts:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(part)

        served = pool.submit(answer, whole[:-20], b"", whole)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert _client(url).search(["mira"], 1)[0][0].id == "7"
        served.result()


@contextlib.contextmanager
def _dripping(head, piece, pause_s):
    """Sends a head at once and then a piece, 100 times; yields the url and the list of pieces sent."""
    sent = []
    with socket.create_server(("127.0.0.1", 0)) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        server.settimeout(5)

        def answer():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):  # until the client hangs up
                connection.recv(65536)
                connection.sendall(head)
                for _ in range(100):
                    time.sleep(pause_s)
                    connection.sendall(piece)
                    sent.append(piece)

        served = pool.submit(answer)
        yield f"http://127.0.0.1:{server.getsockname()[1]}", sent
        served.result()


@pytest.mark.parametrize(
    "head, piece",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
)
def test_an_answer_that_drips_is_given_up_at_the_deadline(head, piece):
    with _dripping(head, piece, 0.05) as (url, sent):
        with pytest.raises(base.RetrievalError, match="1 attempt: .*no answer within 0.3 s"):
            _client(url, timeout_s=0.3, attempts=1).search(["mira"], 1)
        assert len(sent) < 100  # which take 5 s


def test_connections_are_kept_and_compressed_answers_read():
    ports = set()

    class Keeping(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            ports.add(self.client_address[1])
            _, answer = _echo(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = gzip.compress(json.dumps(answer).encode())
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Keeping) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        client = _client(f"http://127.0.0.1:{server.server_port}")
        for query in ("mira" * 9999, "doru", "kelu"):
            assert client.search([query], 1)[0][0].id == query
        server.shutdown()
        remote._session().close()
    assert len(ports) == 1


def test_a_redirection_is_a_refusal():
    with http_servers.scripted(_echo) as (other, asked):
        with http_servers.scripted((307, b"", {"Location": f"{other}/retrieve"})) as (url, seen):
            with pytest.raises(base.RetrievalError, match="after 1 attempt: .*status 307"):
                _client(url).search(["mira"], 1)
    assert len(seen) == 1 and asked == []


def test_a_server_may_ask_for_a_longer_pause_up_to_the_longest(monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    wishes = (503, "0"), (429, "0.03"), (503, "3600"), (503, "1"), (503, "Fri, 31 Dec 1999 23:59:59 GMT")
    answers = [(status, b"busy", {"Retry-After": wish}) for status, wish in wishes]
    with http_servers.scripted(*answers, _echo) as (url, _):
        client = remote.RemoteRetriever(url, timeout_s=5, attempts=6, backoff_s=0.25)
        assert client.search(["mira"], 1)[0][0].id == "mira"
    # By doubling: 0.25, 0.5, 1, 2, 4. A fraction and a date are not asked for in whole seconds, and not heard.
    assert pauses == [0.25, 0.5, 4.0, 2.0, 4.0]


# Several servers.


def _refusing():
    return f"http://127.0.0.1:{http_servers.free_port()}"


def test_a_failing_server_is_passed_over_and_the_next_search_starts_at_the_one_that_answered():
    with http_servers.scripted((500, b"boom")) as (bad, failed), http_servers.scripted(_echo) as (good, seen):
        client = _client([_refusing(), bad, good])
        for query in ("mira", "doru", "kelu"):
            assert client.search([query], 1)[0][0].id == query
    assert (len(failed), len(seen)) == (1, 3)


def test_when_the_server_that_answered_fails_the_others_are_asked_in_turn():
    answers = _echo, (500, b"boom"), _echo
    with http_servers.scripted(*answers) as (a, seen_a), http_servers.scripted(_echo) as (b, seen_b):
        client = _client(f"{a}, {b}/retrieve")
        assert client.endpoints == (f"{a}/retrieve", f"{b}/retrieve")
        for query in ("mira", "doru", "kelu"):
            assert client.search([query], 1)[0][0].id == query
    assert [request.body["queries"] for request in seen_a] == [["mira"], ["doru"]]
    assert [request.body["queries"] for request in seen_b] == [["doru"], ["kelu"]]


def test_a_server_that_times_out_is_passed_over():
    with _held() as held, http_servers.scripted(held) as (bad, _), http_servers.scripted(_echo) as (good, _):
        assert _client([bad, good], timeout_s=1.0).search(["mira"], 1)[0][0].id == "mira"


def test_attempts_are_counted_over_all_servers_and_pauses_stand_between_rounds(monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    with http_servers.scripted((500, b"boom")) as (a, seen_a), http_servers.scripted((502, b"bang")) as (b, seen_b):
        with pytest.raises(base.RetrievalError, match="after 5 attempts") as error:
            _client([a, b], attempts=5).search(["mira"], 1)
        assert error.value.cause == f"{a}/retrieve: status 500: boom; {b}/retrieve: status 502: bang"
    assert (len(seen_a), len(seen_b)) == (3, 2) and pauses == [0.01, 0.02]


@pytest.mark.parametrize(
    "answer, cause", [((422, b"no"), "status 422: no"), ((200, {"result": []}), "0 results for 1 queries")]
)
def test_a_refusal_is_not_taken_to_the_next_server(answer, cause):
    with http_servers.scripted(answer) as (bad, _), http_servers.scripted(_echo) as (good, seen):
        with pytest.raises(base.RetrievalError, match=f"after 1 attempt: {bad}/retrieve: {cause}"):
            _client([bad, good]).search(["mira"], 1)
    assert seen == []


def test_a_port_nobody_listens_on_is_an_error_that_names_it():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(base.RetrievalError, match=f"after 3 attempts: {url}/retrieve: .*refused"):
            _client(url).search(["mira"], 1)


def test_each_thread_has_its_own_session_and_its_own_answer():
    sessions = set()
    with http_servers.scripted(_echo) as (url, _):
        client = _client(url)
        barrier = threading.Barrier(4)

        def search(i):
            barrier.wait()
            sessions.add(id(remote._session()))
            return client.search([f"q{i}"], 1)[0][0].id

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(search, range(4))) == ["q0", "q1", "q2", "q3"]
    assert len(sessions) == 4


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(url="localhost:8000"), "start it with http://"),
        (dict(url="http://a,"), "retriever url is ''; start it with http://"),
        (dict(url=["http://a", "http://b"]), "attempts is 1 for 2 retriever urls"),
    ],
)
def test_wrong_settings_are_refused_by_value(wrong, message):
    right = dict(url="http://localhost:8000", timeout_s=1.0, attempts=1, backoff_s=0.01)
    with pytest.raises(ValueError, match=message):
        remote.RemoteRetriever(**right | wrong)
