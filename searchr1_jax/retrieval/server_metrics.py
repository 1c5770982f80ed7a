"""What the retrieval server tells of itself, in the text format of Prometheus.

POST /retrieve ─ status, queries, seconds ─▶ ServerMetrics ─ text ─▶ GET /metrics
batches        ─ queries ─────────────────▶
"""

from __future__ import annotations

import collections
from collections.abc import Sequence


class ServerMetrics:
    """What /metrics shows, of POST /retrieve only; counted on the event loop."""

    def __init__(self):
        self._requests: collections.Counter[int] = collections.Counter()
        self._queries = 0
        self._seconds = Histogram((0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30))
        self._batches = Histogram((1, 2, 4, 8, 16, 32, 64, 128, 256))

    def count_request(self, status: int, queries: int, seconds: float) -> None:
        self._requests[status] += 1
        self._queries += queries
        self._seconds.count(seconds)

    def count_batch(self, queries: int) -> None:
        self._batches.count(queries)

    def text(self, waiting: int) -> str:
        statuses = [(f'_total{{status="{status}"}}', n) for status, n in sorted(self._requests.items())]
        families = [
            ("requests", "counter", "Requests answered, by status", statuses),
            ("queries", "counter", "Queries answered", [("_total", self._queries)]),
            ("queue_depth", "gauge", "Requests that wait for a search", [("", waiting)]),
            ("request_seconds", "histogram", "Time from a request's head to its answer", self._seconds.samples()),
            ("batch_queries", "histogram", "Queries that were searched together", self._batches.samples()),
        ]
        lines = []
        for name, kind, help_, samples in families:
            whole = f"searchr1_{name}{'_total' if kind == 'counter' else ''}"
            lines += [f"# HELP {whole} {help_}", f"# TYPE {whole} {kind}"]
            lines += [f"searchr1_{name}{end} {value}" for end, value in samples]
        return "\n".join(lines) + "\n"


class Histogram:
    """Counts of values up to each bound, as Prometheus has them."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts = [0] * len(bounds)
        self._count, self._sum = 0, 0.0

    def count(self, value: float) -> None:
        self._count += 1
        self._sum += value
        for i, bound in enumerate(self._bounds):
            self._counts[i] += value <= bound

    def samples(self) -> list[tuple[str, float]]:
        buckets = [(f'_bucket{{le="{b:g}"}}', n) for b, n in zip(self._bounds, self._counts, strict=True)]
        return [*buckets, ('_bucket{le="+Inf"}', self._count), ("_sum", self._sum), ("_count", self._count)]
