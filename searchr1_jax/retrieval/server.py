"""Serves a Retriever over the wire protocol of the Search-R1 family, on Starlette and uvicorn.

    POST /retrieve   {"queries": [str], "topk": int, "return_scores": bool}   the last two may be left out
    answer           {"result": [[{"document": {"id": str, "contents": str}, "score": float}, …], …]},
                     without return_scores the documents themselves
    GET /health      200 and what is served, once it has been warmed up; 503 before
    GET /metrics     counters, in Prometheus' text format

    requests ─▶ checks ─▶ queue ─▶ batches of one k ─▶ worker threads ─▶ Retriever
                  4xx      503                              500

A refusal is `{"error": str}`: 4xx for what is wrong with a request, 503 with Retry-After when the queue is full,
500 for the requests, and only those, whose search raised. The Retriever is called from up to
`Settings.threads` threads at once.
"""

import asyncio
import collections
from collections.abc import AsyncIterator, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import signal
import time
from typing import Any

from starlette import applications, exceptions, requests, responses, routing
import uvicorn

from searchr1_jax.core import types
from searchr1_jax.retrieval import base, server_metrics

_WARM = "warm up"
RETRY_AFTER_S = 1
DRAINED = 8  # times the limit of a request that are read, and forgotten, before the server hangs up
HANG_UP = {"Connection": "close"}
SHUTDOWN_S = 30  # for requests under way when the server is told to stop
KEEP_ALIVE_S = 75  # longer than a client's pauses, so that it is not the server that hangs up under a request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits, and how searches are run. Raises: ValueError for one that leaves nothing to serve."""

    topk: int = 3  # passages a query, where a request does not say
    max_topk: int = 100
    max_queries: int = 1024  # of one request
    max_query_chars: int = 32_768  # a policy's whole turn of the longest tokens; refusing one would end its training
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0  # for a client to send its request
    threads: int = 4  # searches at once
    max_waiting: int = 1024  # requests in the queue; the next one is refused
    batch_queries: int = 64  # of requests that are searched together
    batch_wait_ms: float = 0.0  # how long a request waits for others to be searched with; 0: never batched
    # Sizes of the searches before the first answer; their queries are longer and longer, as far as the size goes.
    warm_queries: tuple[int, ...] = (1, 8, 64)

    def __post_init__(self):
        for name in ("topk", "max_topk", "max_queries", "threads", "max_waiting", "batch_queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to at least 1")
        if self.topk > self.max_topk:
            raise ValueError(f"topk is {self.topk}, above max_topk = {self.max_topk}; lower one or raise the other")
        if self.batch_wait_ms < 0:
            raise ValueError(f"batch_wait_ms is {self.batch_wait_ms}; set it to 0 (no batching) or more")


def serve(
    retriever: base.Retriever, *, host: str, port: int, settings: Settings, info: Mapping[str, Any] | None = None
) -> None:
    """Serves until SIGTERM or SIGINT; then takes no more requests, answers those under way, and returns.

    Args:
      info: what /health tells of the server; JSON.
    Raises: what the warm-up raised; SystemExit when the address is taken.
    """
    application = app(retriever, settings, info)
    config = uvicorn.Config(
        application,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    server = uvicorn.Server(config)
    application.state.stop = lambda: setattr(server, "should_exit", True)
    with _signals_end_quietly():
        server.run()
    if application.state.broken is not None:
        raise application.state.broken


def app(retriever: base.Retriever, settings: Settings, info: Mapping[str, Any] | None = None) -> applications.Starlette:
    """Returns the application, which warms the retriever up when it starts; see `serve`."""
    service = _Service(retriever, settings, dict(info or {}))
    refusals: dict[Any, Any] = {exceptions.HTTPException: _refusal}
    routes = [
        routing.Route("/retrieve", service.retrieve, methods=["POST"]),
        routing.Route("/health", service.health),
        routing.Route("/metrics", service.show_metrics),
    ]
    application = applications.Starlette(routes=routes, exception_handlers=refusals, lifespan=service.lifespan)
    application.state.broken = None  # what the warm-up raised
    application.state.stop = lambda: None
    return application


@contextlib.contextmanager
def _signals_end_quietly():
    """Lets `serve` return: once uvicorn has stopped, it sends itself the signal again that stopped it."""
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Service:
    """The three routes over one retriever."""

    def __init__(self, retriever: base.Retriever, settings: Settings, info: dict[str, Any]):
        self._retriever, self._settings, self._info = retriever, settings, info
        self._metrics = server_metrics.ServerMetrics()
        self._searches = _Searches(retriever, settings, self._metrics)
        self._warm = False

    @contextlib.asynccontextmanager
    async def lifespan(self, application: applications.Starlette) -> AsyncIterator[None]:
        warming = asyncio.create_task(self._warm_up(application))
        yield
        warming.cancel()
        self._searches.pool.shutdown(wait=False, cancel_futures=True)

    async def _warm_up(self, application: applications.Starlette) -> None:
        try:
            for size in self._settings.warm_queries:
                queries = _warm_queries(size, self._settings.max_query_chars)
                await asyncio.to_thread(_passages, self._retriever, queries, self._settings.topk)
            self._warm = True
        except Exception as error:
            application.state.broken = error
            application.state.stop()

    async def retrieve(self, request: requests.Request) -> responses.Response:
        start = time.monotonic()
        try:
            response, queries = await self._answer(request)
        except exceptions.HTTPException as refusal:
            response, queries = await _refusal(request, refusal), 0
        self._metrics.requests[response.status_code] += 1
        self._metrics.queries += queries
        self._metrics.seconds.count(time.monotonic() - start)
        return response

    async def _answer(self, request: requests.Request) -> tuple[responses.Response, int]:
        if not self._warm:
            raise _busy("warming up")
        queries, k, with_scores = _checked(await self._body(request), self._settings)
        outcome = await self._searches.search(queries, k)
        try:
            if isinstance(outcome, Exception):
                raise outcome
            items = [[_item(passage, with_scores) for passage in passages] for passages in outcome]
            return responses.JSONResponse({"result": items}), len(queries)
        except Exception as error:  # the search's, or of a passage that is no JSON: a score of NaN
            raise exceptions.HTTPException(500, f"{type(error).__name__}: {error}") from error

    async def _body(self, request: requests.Request) -> bytes:
        """Reads a body, and keeps no more of it than the limit, whatever its length is said to be.

        What is a little too long is read to its end, so that the client listens; on longer ones the server hangs up.
        """
        pieces, size, limit = [], 0, self._settings.max_body_bytes
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                async for piece in request.stream():
                    size += len(piece)
                    if size <= limit:
                        pieces.append(piece)
                    elif size > DRAINED * limit:
                        break
        except TimeoutError:
            reason = f"the request took longer than {self._settings.body_timeout_s} s to arrive"
            raise exceptions.HTTPException(408, reason, HANG_UP) from None
        except requests.ClientDisconnect:
            raise exceptions.HTTPException(400, "the request broke off", HANG_UP) from None
        if size > limit:
            reason = f"the request has more than {limit} bytes; send fewer queries"
            raise exceptions.HTTPException(413, reason, HANG_UP if size > DRAINED * limit else None)
        return b"".join(pieces)

    async def health(self, request: requests.Request) -> responses.Response:
        if self._warm:
            return responses.JSONResponse(self._info)
        broken = request.app.state.broken
        raise _busy("warming up" if broken is None else f"the warm-up failed: {broken}")

    async def show_metrics(self, request: requests.Request) -> responses.Response:
        text = self._metrics.text(len(self._searches.waiting))
        return responses.Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _warm_queries(size: int, max_chars: int) -> list[str]:
    """So many queries, each a quarter longer than the one before it up to the limit: an encoder compiles by length."""
    texts, words = [_WARM], 1.0
    while len(text := " ".join([_WARM] * math.ceil(words := words * 1.25))) <= max_chars:
        texts.append(text)
    return [*texts, *[_WARM] * size][:size]


def _checked(body: bytes, settings: Settings) -> tuple[list[str], int, bool]:
    """Returns queries, k and whether scores are wanted; raises HTTPException for what is not the protocol.

    Names it does not know are let through: clients of the family send more.
    """
    try:
        request = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise exceptions.HTTPException(400, f"the request is not JSON in UTF-8: {error}") from error
    if not isinstance(request, dict):
        raise _wrong("the request is not a JSON object")
    queries, k, with_scores = request.get("queries"), request.get("topk"), request.get("return_scores", False)
    k = settings.topk if k is None else k
    if not isinstance(queries, list) or not queries:
        raise _wrong('"queries" is not a list of at least one text')
    if len(queries) > settings.max_queries:
        raise _wrong(f"{len(queries)} queries; send at most {settings.max_queries} a request")
    for i, query in enumerate(queries):
        if not isinstance(query, str) or not query.strip():
            raise _wrong(f"query {i} is not a text, or an empty one")
        if len(query) > settings.max_query_chars:
            raise _wrong(f"query {i} has {len(query)} characters; send at most {settings.max_query_chars}")
        if any("\ud800" <= character <= "\udfff" for character in query):
            raise _wrong(f"query {i} has half of a surrogate pair, which is no character")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= settings.max_topk:
        raise _wrong(f'"topk" is {k!r:.50}; send a whole number from 1 to {settings.max_topk}')
    if not isinstance(with_scores, bool):
        raise _wrong('"return_scores" is neither true nor false')
    return queries, k, with_scores


def _item(passage: types.Passage, with_score: bool) -> dict[str, Any]:
    document = {"id": passage.id, "contents": f"{passage.title}\n{passage.text}"}
    return {"document": document, "score": passage.score} if with_score else document


def _wrong(reason: str) -> exceptions.HTTPException:
    return exceptions.HTTPException(422, reason)


def _busy(reason: str) -> exceptions.HTTPException:
    return exceptions.HTTPException(503, reason, {"Retry-After": str(RETRY_AFTER_S)})


async def _refusal(request: requests.Request, refusal: exceptions.HTTPException) -> responses.Response:
    return responses.JSONResponse({"error": refusal.detail}, refusal.status_code, refusal.headers)


@dataclasses.dataclass(eq=False, kw_only=True)
class _Search:
    """One request in the queue."""

    queries: Sequence[str]
    k: int
    due: bool = False  # whether it has waited long enough for others
    outcome: asyncio.Future  # of passages for each query, or of the exception of its search


class _Searches:
    """The queue and the threads behind it. All but the retriever's calls runs on the event loop, without locks.

    waiting   a k=3  b k=3  c k=5  d k=3   ─▶  batches   [a b d]  [c]
    """

    def __init__(self, retriever: base.Retriever, settings: Settings, metrics: server_metrics.ServerMetrics):
        self._retriever, self._settings, self._metrics = retriever, settings, metrics
        self.waiting: collections.deque[_Search] = collections.deque()
        self._running: set[asyncio.Task] = set()
        self.pool = concurrent.futures.ThreadPoolExecutor(settings.threads, "search")

    async def search(self, queries: list[str], k: int) -> list[list[types.Passage]] | Exception:
        """Returns the passages for each query, or what the search raised; HTTPException when too many wait."""
        if len(self.waiting) >= self._settings.max_waiting:
            raise _busy(f"{len(self.waiting)} requests are waiting already; try again later")
        loop = asyncio.get_running_loop()
        search = _Search(queries=queries, k=k, outcome=loop.create_future())
        self.waiting.append(search)
        self._start()
        # The timer says what is due: a clock read when it fires may be a little behind it (uvloop's is).
        timer = loop.call_later(self._settings.batch_wait_ms / 1000, self._is_due, search)
        try:
            return await search.outcome
        finally:
            timer.cancel()

    def _is_due(self, search: _Search) -> None:
        search.due = True
        self._start()

    def _start(self) -> None:
        """Starts the batches that are due, as far as there are threads for them."""
        while self.waiting and len(self._running) < self._settings.threads and (batch := self._due()):
            self._running.add(asyncio.create_task(self._run(batch)))

    def _due(self) -> list[_Search]:
        """Takes a batch out of the queue: the oldest and others of its k, if it is full or has waited enough."""
        oldest = self.waiting[0]
        if not self._settings.batch_wait_ms:
            return [self.waiting.popleft()]
        batch, size, full = [], 0, False
        for search in self.waiting:
            if search.k == oldest.k:
                full = bool(batch) and size + len(search.queries) > self._settings.batch_queries
                if full:
                    break
                batch.append(search)
                size += len(search.queries)
        if not (full or oldest.due or size >= self._settings.batch_queries):
            return []
        for search in batch:
            self.waiting.remove(search)
        return batch

    async def _run(self, batch: list[_Search]) -> None:
        self._metrics.batches.count(sum(len(search.queries) for search in batch))
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(self.pool, _outcomes, self._retriever, batch)
        for search, outcome in zip(batch, outcomes, strict=True):
            if not search.outcome.done():  # its request may have been cancelled
                search.outcome.set_result(outcome)
        self._running.discard(asyncio.current_task())  # a set, because the loop does not keep tasks alive
        self._start()


def _outcomes(retriever: base.Retriever, batch: Sequence[_Search]) -> list[list[list[types.Passage]] | Exception]:
    """Searches for a batch; when that raises, for each request alone, so that a bad one fails alone."""
    queries = [query for search in batch for query in search.queries]
    try:
        found = iter(_passages(retriever, queries, batch[0].k))
        return [[next(found) for _ in search.queries] for search in batch]
    except Exception as error:
        if len(batch) == 1:
            return [error]
    return [_outcomes(retriever, [search])[0] for search in batch]


def _passages(retriever: base.Retriever, queries: list[str], k: int) -> list[list[types.Passage]]:
    found = retriever.search(queries, k)
    if len(found) != len(queries):
        raise RuntimeError(f"the retriever gave {len(found)} answers for {len(queries)} queries")
    return found
