"""Text encoders of Hugging Face and sentence-transformers directories, behind the Encoder protocol.

    texts ─ prefix, tokenizer ─▶ ids ─ the shortest bucket that holds them ─▶ batches of fixed rows ─ model ─▶ vectors

A text's vector depends on nothing but the text: its bucket is decided by its own length, a bucket's batches always
have the same shape (missing rows are filled up), and no row of a batch looks at another. Rows are counted by device,
so that their number does not show either. The last bits may differ for another number of rows, backend or compiler.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import os
import pathlib
import threading
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.core import files, parallel
from searchr1_jax.models import decoder, encoder, hf
from searchr1_jax.retrieval import base
from searchr1_jax.text import tokenizer

DTYPES = ("float32", "bfloat16")
POOLINGS = ("mean", "cls")

_SHORTEST = 16  # tokens of the first bucket
_FRAMED_AT_ONCE = 1024  # texts; the next are tokenized while the devices work on these
_IN_FLIGHT = 2  # batches
_VOCABULARIES = ("tokenizer.json", "vocab.txt")
_HASHED_FILES = ("config.json", "*.safetensors", "tokenizer_config.json", *_VOCABULARIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What makes a text's vector, next to the weights; two that are equal make equal vectors."""

    pooling: str  # of POOLINGS: the mean of the tokens' states, or the first one's
    normalize: bool  # to length 1
    query_prefix: str
    passage_prefix: str
    max_tokens: int  # of a text with its prefix and frame; what is longer is cut
    lower_case: bool  # before the tokenizer, which may do so itself
    dtype: str  # of DTYPES, of weights and activations

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}; it is one of {POOLINGS}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it is one of {DTYPES}")


def read_settings(directory: str | os.PathLike, **given: Any) -> EncoderSettings:
    """The settings that a directory's sentence-transformers files state, and those given (and not None) instead.

    Pooling and normalisation are stated by modules.json, prefixes by the prompts "query" and "passage" (or
    "document") of config_sentence_transformers.json and else "", the length by sentence_bert_config.json and else
    the model's positions.

    Raises: ValueError for what is stated nowhere, or a module or pooling that is not implemented.
    """
    directory = pathlib.Path(directory)
    pooling, normalize = _read_modules(directory)
    prompts: dict[str, str] = _read_json(directory / "config_sentence_transformers.json").get("prompts", {})
    reading = _read_json(directory / "sentence_bert_config.json")
    stated = dict(
        pooling=pooling,
        normalize=normalize,
        query_prefix=prompts.get("query", ""),
        passage_prefix=prompts.get("passage", prompts.get("document", "")),
        max_tokens=reading.get("max_seq_length") or encoder.read_config(directory).max_positions,
        lower_case=bool(reading.get("do_lower_case")),
        dtype="float32",
    )
    settings: dict[str, Any] = stated | {name: value for name, value in given.items() if value is not None}
    if settings["pooling"] is None or settings["normalize"] is None:
        raise ValueError(f"{directory} has no modules.json; give pooling, one of {POOLINGS}, and normalize")
    return EncoderSettings(**settings)


def _read_json(path: pathlib.Path) -> Any:
    """The file's content, or {} where there is no such file."""
    return files.read_json(path, "fetch the encoder again") if path.is_file() else {}


def _read_modules(directory: pathlib.Path) -> tuple[str | None, bool | None]:
    """Pooling and normalisation as modules.json states them; None and None without one."""
    modules = _read_json(directory / "modules.json")
    if not modules:
        return None, None
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{directory}/modules.json lists {kinds}; only Transformer, Pooling and perhaps Normalize are implemented"
        )
    path = directory / modules[1]["path"] / "config.json"
    stated = _read_json(path)
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix).removesuffix("_token").removesuffix("_tokens") for key in stated
             if key.startswith(prefix) and stated[key]]  # fmt: skip
    modes = modes or [stated.get("pooling_mode")]  # since version 5.4
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{path} pools by {modes}; one of {POOLINGS} is implemented")
    if not stated.get("include_prompt", True):
        raise ValueError(f"{path} leaves the prefix out of the pooling, which is not implemented")
    return modes[0], len(kinds) == 3


def fingerprint(directory: str | os.PathLike) -> str:
    """16 hexadecimal digits that differ where the configuration, the weights or the tokenizer do."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _HASHED_FILES for file in pathlib.Path(directory).glob(pattern)}):
        with open(file, "rb") as opened:
            digest.update(f"{file.name}\0".encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def buckets(max_tokens: int) -> list[int]:
    """Lengths that texts are filled up to: 16, 24, 32, 48, 64, 96, … and `max_tokens` as the last."""
    lengths, power = [], _SHORTEST
    while power < max_tokens:
        lengths += [length for length in (power, power * 3 // 2) if length < max_tokens]
        power *= 2
    return [*lengths, max_tokens]


class BatchedModel:
    """A model of `models.encoder` over any number of texts; callable from any thread and under any mesh.

    Rows of a batch are split over the devices, each of which holds all weights; no device waits for another.

    Args:
      kind: `encoder.TextModel` or `encoder.PairModel`.
      max_tokens: of the longest text with its frame; what is longer is cut.
      options: more arguments of the model's call.
    Raises: ValueError for a length that the model has no positions for, or that has no room in its frame.
    """

    def __init__(
        self, directory: pathlib.Path, kind: type, *, max_tokens: int, dtype: str, devices: base.Devices, **options: Any
    ):
        self.config = encoder.read_config(directory)
        most = self.config.max_positions
        if not 4 <= max_tokens <= most:
            raise ValueError(f"max_tokens is {max_tokens}; the encoder has {most} positions, make it 4 to {most}")
        self.buckets = buckets(max_tokens)
        self._frame = load_framing(directory, max_tokens)
        self._mesh = parallel.make_mesh(data=-1, fsdp=1, tensor=1, devices=devices or jax.local_devices())
        self.programs: dict[tuple[int, int], Callable] = {}  # at most one a bucket, for each number of rows in use
        self._compiling = threading.Lock()
        with jax.set_mesh(self._mesh):
            graph, _ = decoder.abstract(kind, self.config, jnp.dtype(dtype))
            self._params = encoder.load(directory, kind=kind, dtype=jnp.dtype(dtype))

        def call(params, token_BT, type_BT, length_B):
            return decoder.bind(graph, params)(token_BT, type_BT, length_B, dtype=jnp.dtype(dtype), **options)

        self._jitted = jax.jit(call)

    def __call__(self, texts: Sequence[Any], rows: int, out: np.ndarray) -> np.ndarray:
        """Fills `out`, float32[N, …], with what the model makes of each text, `rows` at once on each device."""
        rows *= self._mesh.devices.size
        waiting: dict[int, list] = {bucket: [] for bucket in self.buckets}
        flying: collections.deque = collections.deque()

        def land():
            places, results = flying.popleft()
            out[places] = np.asarray(results)[: len(places)]

        def dispatch(bucket):
            places, ids, types = zip(*waiting[bucket], strict=True)
            waiting[bucket].clear()
            flying.append((list(places), self._dispatch(bucket, rows, ids, types)))
            if len(flying) > _IN_FLIGHT:
                land()

        with jax.set_mesh(self._mesh):
            for start in range(0, len(texts), _FRAMED_AT_ONCE):
                for place, (ids, types) in enumerate(self._frame(texts[start : start + _FRAMED_AT_ONCE]), start):
                    bucket = next(length for length in self.buckets if len(ids) <= length)
                    waiting[bucket].append((place, ids, types))
                    if len(waiting[bucket]) == rows:
                        dispatch(bucket)
            for bucket in self.buckets:
                if waiting[bucket]:
                    dispatch(bucket)
            while flying:
                land()
        return out

    def _dispatch(self, bucket: int, rows: int, ids: Sequence[list[int]], types: Sequence[list[int]]) -> jax.Array:
        token_BT, type_BT = np.zeros((2, rows, bucket), np.int32)
        length_B = np.ones(rows, np.int32)  # a filler is one token long, for a mean over no token is none
        for row, (text, kinds) in enumerate(zip(ids, types, strict=True)):
            token_BT[row, : len(text)] = text
            type_BT[row, : len(text)] = kinds
            length_B[row] = len(text)
        arrays = parallel.to_mesh((token_BT, type_BT, length_B), "batch", None)
        with self._compiling:
            if (bucket, rows) not in self.programs:
                self.programs[bucket, rows] = self._jitted.lower(self._params, *arrays).compile()
        return self.programs[bucket, rows](self._params, *arrays)


class TextEncoder:
    """An Encoder from a directory or the Hugging Face hub; callable from any thread and under any mesh.

    Args:
      name: a directory in Hugging Face format, or a model id of the hub (owner/name).
      rows: of a batch of queries and of passages, on each device; few answer sooner, many embed a corpus faster.
      settings: arguments of `read_settings`. E5 wants the prefixes "query: " and "passage: ", BGE an instruction before
        the query alone.
    Raises: ValueError for what is missing or not implemented, by name.
    """

    def __init__(
        self, name: str | os.PathLike, *, rows: tuple[int, int] = (8, 32), devices: base.Devices = None, **settings: Any
    ):
        self.directory = hf.directory(str(name))
        self.settings = read_settings(self.directory, **settings)
        s = self.settings
        self._prefixes = {"query": s.query_prefix, "passage": s.passage_prefix}
        self._rows = dict(zip(("query", "passage"), rows, strict=True))
        model, options = encoder.TextModel, dict(pooling=s.pooling, normalize=s.normalize)
        self._model = BatchedModel(
            self.directory, model, max_tokens=s.max_tokens, dtype=s.dtype, devices=devices, **options
        )
        self.dimensions = self._model.config.width
        self.fingerprint = fingerprint(self.directory)

    def encode(self, texts: list[str], kind: Literal["query", "passage"]) -> np.ndarray:
        """Returns float32[N, D]; a text's vector is the same, to the bit, whatever texts come with it."""
        texts = [self._prefixes[kind] + text for text in texts]
        if self.settings.lower_case:
            texts = [text.lower() for text in texts]
        return self._model(texts, self._rows[kind], np.empty((len(texts), self.dimensions), np.float32))


def load_framing(directory: pathlib.Path, max_tokens: int) -> Callable:
    """`Tokenizer.framing` of a directory.

    Raises: ValueError when there is no tokenizer, or it has ids that the model has no embedding for.
    """
    # Without them transformers makes one of no words, to which all texts are the same.
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise ValueError(f"{directory} holds none of {', '.join(_VOCABULARIES)}; fetch the encoder again")
    vocabulary = tokenizer.Tokenizer.load(directory)
    known = encoder.read_config(directory).vocab_size
    if vocabulary.vocab_size > known:
        raise ValueError(
            f"the tokenizer of {directory} has {vocabulary.vocab_size} ids, its model {known}; fetch both again"
        )
    return vocabulary.framing(max_tokens)
