"""The hashed n-gram encoder, against a slow one that sums n-gram by n-gram."""

import json
import math
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

from searchr1_jax.retrieval import corpus as corpora, embed

CONTENTS = [
    '"Mira Talon"\nMira Talon is a poet born in Kelu.',
    '"Doru Talon"\nDoru Talon is a baker born in Kelu.',
    '"Mira Fesu"\nMira Fesu is a poet born in Vano.',
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "contents": c}) + "\n" for i, c in enumerate(CONTENTS)))
    return corpora.Corpus(path)


def _slow_words(text):
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _slow_grams(word):
    marked = "<" + word + ">"
    return {marked} | {marked[i : i + n] for n in (3, 4) for i in range(len(marked)) if i + n <= len(marked)}


def _slow_code(gram):
    """slot, place and sign of an n-gram, in Python's own integers."""
    mixed = zlib.crc32(gram.encode()) * 0x9E3779B97F4A7C15 % 2**64
    return mixed >> 46, (mixed >> 25) % 2**20, -1 if (mixed >> 45) % 2 else 1


def _slow_vector(text, dimensions):
    """Independent of the encoder but for the hash: idf from counts of n-grams, one term at a time."""
    held = [{g for w in _slow_words(c) for g in _slow_grams(w)} for c in CONTENTS]
    vector = [0.0] * dimensions
    for word in _slow_words(text):
        for gram in _slow_grams(word):
            n = sum(gram in grams for grams in held)
            _, place, sign = _slow_code(gram)
            vector[place % dimensions] += sign * math.log(1 + (len(CONTENTS) - n + 0.5) / (n + 0.5))
    length = math.sqrt(sum(x * x for x in vector))
    return np.array(vector) / (length or 1)


def test_the_ngrams_of_the_test_texts_share_no_slot():
    """What lets the slow encoder count n-grams instead of slots."""
    grams = {g for c in CONTENTS for w in _slow_words(c) for g in _slow_grams(w)}
    assert len({_slow_code(g)[0] for g in grams}) == len(grams)


@pytest.mark.parametrize("dimensions", [64, 256])
def test_vectors_equal_the_slow_encoders(corpus, dimensions):
    encoder = embed.HashedNgramEncoder.fit(corpus, dimensions=dimensions)
    queries = ["Mira Talon", "where was mira born", "zzz"]
    vectors = encoder.encode(queries, "query")
    assert vectors.dtype == np.float32 and vectors.shape == (3, dimensions)
    np.testing.assert_allclose(vectors, [_slow_vector(q, dimensions) for q in queries], atol=1e-6)
    passages = embed.embed_corpus(encoder, corpus)
    twice = [_slow_vector(c.split("\n")[0] + " " + c, dimensions) for c in CONTENTS]
    np.testing.assert_allclose(passages, twice, atol=1e-6)


def test_case_quotes_and_punctuation_make_no_difference(corpus):
    encoder = embed.HashedNgramEncoder.fit(corpus, dimensions=64)
    plain, marked = encoder.encode(["mira talon", ' "MIRA" — Talon?!\n'], "query")
    np.testing.assert_array_equal(plain, marked)


def test_a_text_without_letters_is_a_zero_vector(corpus):
    encoder = embed.HashedNgramEncoder.fit(corpus, dimensions=64)
    vectors = encoder.encode(["", '?! "" \n', "mira"], "query")
    assert not vectors[:2].any()
    assert np.linalg.norm(vectors[2]) == pytest.approx(1, abs=1e-6)
    assert not encoder.encode(["\n", "--"], "passage").any()
    assert encoder.encode([], "query").shape == (0, 64)


def test_a_vector_does_not_depend_on_the_texts_beside_it(corpus):
    encoder = embed.HashedNgramEncoder.fit(corpus, dimensions=256)
    texts = [f"{c} {i}" for i in range(20) for c in CONTENTS]
    together = encoder.encode(texts, "query")
    alone = np.concatenate([encoder.encode([text], "query") for text in texts])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[::-1], encoder.encode(texts[::-1], "query"))


def test_another_process_makes_the_same_vectors(corpus):
    vectors = embed.embed_corpus(embed.HashedNgramEncoder.fit(corpus, dimensions=64), corpus)
    code = (
        "import sys; from searchr1_jax.retrieval import corpus, embed; c = corpus.Corpus(sys.argv[1]);"
        "print(embed.embed_corpus(embed.HashedNgramEncoder.fit(c, dimensions=64), c).tobytes().hex())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    other = subprocess.run(
        [sys.executable, "-c", code, corpus.path], env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == vectors.tobytes().hex()
