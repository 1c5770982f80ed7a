"""A second, closer look: a cross-encoder reads the query and a passage together and says how well they fit.

queries ─ ranker ─▶ its best candidates ─ corpus ─▶ (query, passage) pairs ─ CrossEncoder ─▶ the best k of them
"""

from collections.abc import Sequence
import dataclasses
import os

import numpy as np

from searchr1_jax.models import encoder, hf
from searchr1_jax.retrieval import base, corpus as corpora, text_encoder


class CrossEncoder:
    """Scores pairs of texts by a BERT classifier with one label; callable from any thread and under any mesh.

    A pair's score is the same, to the bit, whatever pairs come with it (see `text_encoder`). The longer text of a pair
    that the model has no positions for is cut first.

    Args:
      name: a directory in Hugging Face format, or a model id of the hub (owner/name).
      rows: of a batch, on each device.
    Raises: ValueError for what is missing or not implemented, by name.
    """

    def __init__(self, name: str | os.PathLike, *, rows: int = 16, devices: base.Devices = None):
        directory = hf.directory(str(name))
        config = encoder.read_config(directory)
        if config.token_types < 2:
            raise ValueError(f"{name} knows {config.token_types} token type; a cross-encoder tells 2 texts apart by it")
        self._rows = rows
        self._model = text_encoder.BatchedModel(
            directory, encoder.PairModel, max_tokens=config.max_positions, dtype="float32", devices=devices
        )

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Returns float32[N], the logit of each (query, passage); higher fits better."""
        return self._model(pairs, self._rows, np.empty(len(pairs), np.float32))


@dataclasses.dataclass(frozen=True)
class Reranked:
    """A Ranker that scores another's best rows anew; as thread-safe as that one."""

    ranker: base.Ranker  # finds the candidates
    cross_encoder: CrossEncoder  # its scores are the result's
    corpus: corpora.Corpus  # of the ranker's rows; a passage is read with its title line
    candidates: int  # that are read for a query, or k where more are asked for

    def rank(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `base.Ranker`; equal scores keep the ranker's order. Raises: ValueError for a score that is no number."""
        base.check_k(k)
        rows, _ = self.ranker.rank(queries, max(k, self.candidates))
        found = rows != -1
        pairs = [(queries[query], self.corpus.contents(int(rows[query, i]))) for query, i in np.argwhere(found)]
        scores = np.full(rows.shape, -np.inf, np.float32)
        scores[found] = self.cross_encoder.score(pairs)
        if not np.isfinite(scores[found]).all():
            raise ValueError("a score of the cross-encoder is not finite; mend its weights")
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
