"""Question files, prepared once as a TFDS data set and read by index.

    questions.jsonl ─▶ SearchQA (checked, ArrayRecord) ─▶ load(…)[i] ─▶ QAExample

A file holds one JSON object a line, as FlashRAG publishes them; other fields are ignored:

    {"id": "test_0", "question": "who …", "golden_answers": ["…", "…"], "metadata": {"hops": 2}}

`answer` may stand for `golden_answers` (NQ-open), one string for a list, and `hops` may stand at the top.
A row without an id gets "<file's stem>-<line number>".

This is the one file that knows tensorflow-datasets. It is used without TensorFlow and without the network.
"""

from collections.abc import Mapping, Sequence
import contextlib
import hashlib
import io
import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from searchr1_jax.core import files, types


class SearchQA(tfds.core.GeneratorBasedBuilder):
    """A question file as a TFDS data set with the one split "train", in the file's order."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; looking for them, TFDS imports a package it does not require

    def __init__(self, *, rows: Sequence[Mapping[str, Any]], data_dir: str | os.PathLike):
        self._rows = rows
        super().__init__(file_format="array_record", data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        text, hops = tfds.features.Text(), tfds.features.Scalar(dtype=np.int32)  # 0 where the file does not say
        row = {"id": text, "question": text, "golden_answers": tfds.features.Sequence(text), "hops": hops}
        features = tfds.features.FeaturesDict(row)
        about = "Questions and their golden answers."
        return tfds.core.DatasetInfo(builder=self, description=about, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self._rows)


class Questions(Sequence):
    """The questions of a prepared file, each read from disk when it is asked for; indices are from 0."""

    def __init__(self, records: Sequence[Mapping], name: str, digest: str):
        self._records, self.name, self.digest = records, name, digest

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> types.QAExample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} questions and none at {index}")
        record = self._records[index]  # texts are bytes
        return types.QAExample(
            id=f"{self.name}/{record['id'].decode()}",
            question=record["question"].decode(),
            golden_answers=tuple(answer.decode() for answer in record["golden_answers"]),
            hops=int(record["hops"]),
        )


def load(file: str | os.PathLike, *, name: str, cache_dir: str | os.PathLike) -> Questions:
    """The questions of a jsonl file, prepared under `cache_dir` on the first call and when the file changed.

    The prepared directory is named by the file's stem and a hash of its content, and appears whole or not at
    all, so an interrupted preparation is done again, and processes that prepare the same file don't disturb
    each other. ValueError names the file, the line and what is wrong with it, before anything is written.

    Args:
      name: put before each id ("nq" makes "test_0" into "nq/test_0"), so give each file of a run its own.
    """
    file = pathlib.Path(file)
    digest = hashlib.sha256(f"{SearchQA.VERSION} ".encode() + _content(file)).hexdigest()
    prepared = pathlib.Path(cache_dir, f"{file.stem}-{digest[:16]}")
    if not prepared.exists():
        _prepare(file, prepared)
    records = tfds.builder_from_directory(str(prepared)).as_data_source("train")  # pyright: ignore[reportCallIssue]
    return Questions(records, name, digest)


def _prepare(file: pathlib.Path, prepared: pathlib.Path) -> None:
    rows = _read(file)  # before anything is written
    tfds.disable_progress_bar()
    with files.whole(prepared, shared=True) as temporary, tempfile.TemporaryDirectory(dir=prepared.parent) as scratch:
        builder = SearchQA(rows=rows, data_dir=scratch)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces its download, and there is none
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        os.rename(builder.data_dir, temporary)


def _read(file: pathlib.Path) -> list[dict]:
    """All rows of a question file, checked, as SearchQA stores them."""
    rows, line_of = [], {}
    for number, line in enumerate(_content(file).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _row(line, default_id=f"{file.stem}-{number}")
            if row["id"] in line_of:
                raise ValueError(f"the id {row['id']!r} is that of line {line_of[row['id']]} already")
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        line_of[row["id"]] = number
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} holds no questions")
    return rows


def _row(line: bytes, *, default_id: str) -> dict:
    try:
        record = json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not {record!r}")
    answers = record.get("golden_answers", record.get("answer"))
    if not answers:
        raise ValueError("no golden answers; give them as a list under 'golden_answers' or 'answer'")
    if not isinstance(answers, list):
        answers = [answers]
    metadata = record.get("metadata")
    hops = record.get("hops", metadata.get("hops", 0) if isinstance(metadata, dict) else 0)
    if type(hops) is not int or hops < 0:
        raise ValueError(f"hops is {hops!r}; it counts searches: give an integer from 0 or leave it out")
    identity = record.get("id", default_id)
    return {
        "id": _text("id", str(identity) if type(identity) is int else identity),
        "question": _text("question", record.get("question")),
        "golden_answers": [_text("golden answer", answer) for answer in answers],
        "hops": hops,
    }


def _text(what: str, value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the {what} is {value!r}; it has to be a string")
    if not value.strip():
        raise ValueError(f"the {what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the {what} {value!r} holds half of a surrogate pair, which is no text") from error
    return value


def _content(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"the question file {file} cannot be read: {error.strerror}") from error
