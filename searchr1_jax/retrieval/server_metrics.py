"""What the retrieval server tells of itself, in the text format of Prometheus.

POST /retrieve ─ status, queries, seconds ─▶ ServerMetrics ─ text ─▶ GET /metrics
batches        ─ queries ─────────────────▶
"""

import collections
from collections.abc import Sequence


class ServerMetrics:
    """What /metrics shows, of POST /retrieve only; counted on the event loop."""

    def __init__(self):
        self.requests: collections.Counter[int] = collections.Counter()  # by status
        self.queries = 0  # answered
        self.seconds = Histogram((0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30))
        self.batches = Histogram((1, 2, 4, 8, 16, 32, 64, 128, 256))  # in queries

    def text(self, waiting: int) -> str:
        statuses = [(f'_total{{status="{status}"}}', n) for status, n in sorted(self.requests.items())]
        families = [
            ("requests", "counter", "Requests answered, by status", statuses),
            ("queries", "counter", "Queries answered", [("_total", self.queries)]),
            ("queue_depth", "gauge", "Requests that wait for a search", [("", waiting)]),
            ("request_seconds", "histogram", "Time from a request's head to its answer", self.seconds.samples()),
            ("batch_queries", "histogram", "Queries that were searched together", self.batches.samples()),
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
        self._counts = dict.fromkeys(bounds, 0)
        self._count, self._sum = 0, 0.0

    def count(self, value: float) -> None:
        self._count += 1
        self._sum += value
        self._counts = {bound: n + (value <= bound) for bound, n in self._counts.items()}

    def samples(self) -> list[tuple[str, float]]:
        buckets = [(f'_bucket{{le="{bound:g}"}}', n) for bound, n in self._counts.items()]
        return [*buckets, ('_bucket{le="+Inf"}', self._count), ("_sum", self._sum), ("_count", self._count)]
