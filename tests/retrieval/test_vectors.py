"""The embedding job: killed anywhere and resumed by any number of processes, it writes the same bytes.

An encoder of a few lines stands in for a model: it makes its vectors from each text's own bytes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from searchr1_jax.retrieval import corpus as corpora, vectors

ROWS, D = 103, 5
COMMON = dict(block_rows=10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    pooling: str = "mean"


class Digest:
    """Vectors of the bytes of a text's SHA-256; from block number `limit` on it takes a minute."""

    dimensions = D
    fingerprint = "digest"
    settings = Settings()

    def __init__(self, pause_s=0.0, limit=10**9):
        self.pause_s, self.limit = pause_s, limit
        self.encoded = []

    def encode(self, texts, kind):
        assert kind == "passage"
        time.sleep(self.pause_s if len(self.encoded) < 10 * self.limit else 60)
        self.encoded += texts
        digests = [hashlib.sha256(text.encode()).digest()[: 4 * D] for text in texts]
        return np.array([np.frombuffer(digest, "<i4") / 2**31 for digest in digests]).astype(np.float32)


def write_corpus(path):
    path.write_text("".join(json.dumps({"id": str(i), "contents": f"passage {i}"}) + "\n" for i in range(ROWS)))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpora.Corpus(write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl"))


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def undisturbed(corpus, tmp_path, dtype):
    """The files of a job that nothing happened to."""
    vectors.embed_corpus(Digest(), corpus, tmp_path / "undisturbed", dtype=dtype, **COMMON)
    return files(tmp_path / "undisturbed")


def test_row_i_is_the_vector_of_corpus_row_i(corpus, tmp_path, dtype):
    vectors.embed_corpus(Digest(), corpus, tmp_path, dtype=dtype, **COMMON)
    expected = Digest().encode([f"passage {i}" for i in range(ROWS)], "passage")
    found = vectors.open_vectors(tmp_path)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    assert found.dtype == {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    np.testing.assert_array_equal(found, expected.astype(found.dtype))
    # By hand: the file is the rows' bits, one after another.
    bits = expected.view(np.uint32).astype(np.uint64)
    if dtype == "bfloat16":
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest, ties to even
    width = {"float32": "<u4", "bfloat16": "<u2"}[dtype]
    assert (tmp_path / "vectors.bin").read_bytes() == bits.astype(width).tobytes()


def test_the_header_says_what_the_vectors_are_of(corpus, tmp_path):
    vectors.embed_corpus(Digest(), corpus, tmp_path, dtype="bfloat16", **COMMON)
    assert json.loads((tmp_path / "vectors.json").read_text()) == {
        "rows": ROWS,
        "dimensions": D,
        "dtype": "bfloat16",
        "block_rows": 10,
        "corpus": corpus.sha256,
        "encoder": "digest",
        "settings": {"pooling": "mean"},
    }
    assert sorted(files(tmp_path)) == ["vectors.bin", "vectors.done", "vectors.json"]


class Killed(Exception):
    pass


def test_a_job_that_fails_at_any_system_call_is_resumed_to_the_same_bytes(
    corpus, tmp_path, monkeypatch, dtype, undisturbed
):
    """Before and after each write and flush, of the vectors and of the record."""
    left = [10**9]  # calls until one fails

    def failing(function, late):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0 and not late:
                raise Killed
            result = function(*arguments)
            if left[0] < 0:
                raise Killed
            return result

        return call

    few = COMMON | dict(block_rows=35)  # 3 blocks
    for late in (False, True):
        with monkeypatch.context() as patch:
            for name in ("pwrite", "fsync", "ftruncate", "link"):
                patch.setattr(os, name, failing(getattr(os, name), late))
            for point in range(200):
                directory, done = tmp_path / f"{late}{point}", 0
                left[0] = point
                try:
                    vectors.embed_corpus(Digest(), corpus, directory, dtype=dtype, **few)
                    break
                except Killed:
                    record = directory / "vectors.done"
                    done = sum(record.read_bytes()) if record.exists() else 0
                left[0] = 10**9
                again = Digest()
                vectors.embed_corpus(again, corpus, directory, dtype=dtype, **few)
                assert len(again.encoded) == max(0, ROWS - 35 * done)  # what was recorded is not done again
                assert (directory / "vectors.bin").read_bytes() == undisturbed["vectors.bin"]
        assert point > 3 * 4  # 3 blocks of two writes and two flushes


def test_a_block_is_recorded_after_its_vectors_are_on_the_disk(corpus, tmp_path, monkeypatch):
    log = []
    name_of = lambda descriptor: os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    pwrite, fsync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda d, *a: log.append(("write", name_of(d))) or pwrite(d, *a))
    monkeypatch.setattr(os, "fsync", lambda d: log.append(("flush", name_of(d))) or fsync(d))
    vectors.embed_corpus(Digest(), corpus, tmp_path, **COMMON)
    block = [(do, file) for file in ("vectors.bin", "vectors.done") for do in ("write", "flush")]
    assert log[log.index(("write", "vectors.bin")) :] == 11 * block


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import test_vectors
corpus = test_vectors.corpora.Corpus(sys.argv[1])
process, processes, limit = map(int, sys.argv[3:])
print("ready", flush=True)
encoder = test_vectors.Digest(0.02, limit)
share = dict(process=process, processes=processes)
test_vectors.vectors.embed_corpus(encoder, corpus, sys.argv[2], **share, **test_vectors.COMMON)
"""


def start(corpus, directory, process, processes, limit=100):
    code = CHILD.format(tests=str(pathlib.Path(__file__).parent))
    command = [sys.executable, "-c", code, corpus.path, directory, str(process), str(processes), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_processes_killed_at_random_and_restarted_in_other_numbers_write_the_same_bytes(corpus, tmp_path):
    vectors.embed_corpus(Digest(), corpus, tmp_path / "undisturbed", **COMMON)
    rng, directory = np.random.default_rng(0), tmp_path / "killed"
    for processes, limit in ((1, 3), (2, 2), (3, 1)):  # at most 10 of 11 blocks, however late the kill
        children = [start(corpus, directory, process, processes, limit) for process in range(processes)]
        for child in children:
            child.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        for child in children:
            child.send_signal(signal.SIGKILL)
            child.communicate()
    with pytest.raises(ValueError, match="are missing"):
        vectors.open_vectors(directory)
    children = [start(corpus, directory, process, 2) for process in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    for child in children:
        child.communicate()
    assert files(tmp_path / "undisturbed").items() <= files(directory).items()


def test_each_process_does_its_own_blocks(corpus, tmp_path):
    encoders = [Digest() for _ in range(3)]
    for process, encoder in enumerate(encoders):
        vectors.embed_corpus(encoder, corpus, tmp_path, process=process, processes=3, **COMMON)
        expected = [i for i in range(ROWS) if i // 10 % 3 == process]
        assert encoder.encoded == [f"passage {i}" for i in expected]
    assert len(vectors.open_vectors(tmp_path)) == ROWS


def test_a_finished_job_encodes_nothing_again(corpus, tmp_path):
    vectors.embed_corpus(Digest(), corpus, tmp_path, **COMMON)
    again, seen = Digest(), []
    vectors.embed_corpus(again, corpus, tmp_path, progress=seen.append, **COMMON)
    assert again.encoded == [] and seen == [ROWS]


def test_progress_counts_the_rows_of_all_processes(corpus, tmp_path):
    seen = []
    vectors.embed_corpus(Digest(), corpus, tmp_path, process=1, processes=2, progress=seen.append, **COMMON)
    assert seen == [0, 10, 20, 30, 40, 50]
    vectors.embed_corpus(Digest(), corpus, tmp_path, process=0, processes=2, progress=seen.append, **COMMON)
    assert seen[6:] == [50, 60, 70, 80, 90, 100, 103]


def test_unfinished_vectors_are_not_opened_and_the_missing_rows_counted(corpus, tmp_path):
    vectors.embed_corpus(Digest(), corpus, tmp_path, process=0, processes=2, **COMMON)
    with pytest.raises(ValueError, match=f"50 of 103 vectors are missing in {tmp_path}"):
        vectors.open_vectors(tmp_path)
    with pytest.raises(ValueError, match="holds no vectors"):
        vectors.open_vectors(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(dtype="bfloat16"), "dtype is 'float32' there and 'bfloat16' here"),
        (dict(block_rows=20), "block_rows is 10 there and 20 here"),
    ],
)
def test_a_directory_of_another_job_is_refused_with_both_values(corpus, tmp_path, change, complaint):
    vectors.embed_corpus(Digest(), corpus, tmp_path, **COMMON)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is of another job: {complaint}"):
        vectors.embed_corpus(Digest(), corpus, tmp_path, **COMMON | change)
    assert files(tmp_path) == before


def test_vectors_of_another_encoder_are_refused_with_both_values(corpus, tmp_path):
    vectors.embed_corpus(Digest(), corpus, tmp_path, **COMMON)
    other = Digest()
    other.fingerprint, other.settings = "other", Settings(pooling="cls")
    with pytest.raises(ValueError) as error:
        vectors.embed_corpus(other, corpus, tmp_path, **COMMON)
    assert "encoder is 'digest' there and 'other' here" in str(error.value)
    assert "settings is {'pooling': 'mean'} there and {'pooling': 'cls'} here" in str(error.value)


def test_vectors_of_another_corpus_are_refused_with_both_hashes(corpus, tmp_path):
    vectors.embed_corpus(Digest(), corpus, tmp_path, **COMMON)
    path = write_corpus(tmp_path / "other.jsonl")
    path.write_text(path.read_text().replace("passage 0", "passage o"))
    other = corpora.Corpus(path)
    with pytest.raises(ValueError, match=f"corpus is '{corpus.sha256}' there and '{other.sha256}' here"):
        vectors.embed_corpus(Digest(), other, tmp_path, **COMMON)


def test_what_a_lost_header_leaves_is_not_taken_for_this_job(corpus, tmp_path):
    vectors.embed_corpus(Digest(), corpus, tmp_path, **COMMON)
    (tmp_path / "vectors.json").unlink()
    with pytest.raises(ValueError, match=r"holds \['vectors.bin', 'vectors.done'\] without vectors.json"):
        vectors.embed_corpus(Digest(), corpus, tmp_path, **COMMON)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_vector_that_is_not_finite_is_refused_by_its_corpus_row(corpus, tmp_path, dtype, bad):
    class Broken(Digest):
        def encode(self, texts, kind):
            found = super().encode(texts, kind)
            found[[text in ("passage 57", "passage 59") for text in texts], 3] = bad
            return found

    with pytest.raises(ValueError, match="corpus row 57 is not finite, nor are 1 more of rows 50 to 59"):
        vectors.embed_corpus(Broken(), corpus, tmp_path, dtype=dtype, **COMMON)
    assert vectors.read_header(tmp_path).rows == ROWS and sum((tmp_path / "vectors.done").read_bytes()) == 5


def test_a_vector_that_bfloat16_rounds_to_infinity_is_refused(corpus, tmp_path):
    class Large(Digest):
        def encode(self, texts, kind):
            return np.full((len(texts), D), np.finfo(np.float32).max)

    with pytest.raises(ValueError, match="corpus row 0 is not finite"):
        vectors.embed_corpus(Large(), corpus, tmp_path, dtype="bfloat16", **COMMON)


def test_a_disk_without_room_is_found_before_any_work(corpus, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2059})
    monkeypatch.setattr(vectors.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"take 2,060 bytes, and .* has 2,059 left; make room or use dtype bfloat16"):
        vectors.embed_corpus(Digest(), corpus, tmp_path, **COMMON)
    assert files(tmp_path) == {}
