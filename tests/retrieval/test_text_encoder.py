"""Text encoders from directories: transformers' vectors, and the same bits whoever asks, with whatever beside it."""

import dataclasses
import json
import pathlib
import shutil
import threading

import jax
import numpy as np
import pytest
import transformers

from searchr1_jax.core import parallel
from searchr1_jax.models import hf
from searchr1_jax.retrieval import text_encoder
from searchr1_jax.text import tokenizer

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NAMES = ["bert_mean", "bert_cls"]
TOLERANCE = 1e-5  # of float32 vectors of length 1
ROWS = dict(rows=(4, 4))
RNG = np.random.default_rng(0)
# Of all buckets, none of them a multiple of a batch.
TEXTS = [" ".join(RNG.choice(["emma", "kelu", "the", "of", "zoo"], 1 + i % 29)) for i in range(61)]


@pytest.fixture(scope="module")
def encoders():
    """One of each golden directory, on one device."""
    one = jax.devices()[:1]
    return {name: text_encoder.TextEncoder(GOLDEN / name, devices=one, **ROWS) for name in NAMES}


@pytest.fixture
def copy(tmp_path):
    """A golden directory, to be changed."""

    def make(name):
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return make


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["query", "passage"])
def test_vectors_of_golden_encoders_equal_those_of_transformers(encoders, name, kind):
    expected = np.load(GOLDEN / name / "expected.npz")
    found = encoders[name].encode(expected["texts"].tolist(), kind)
    assert found.dtype == np.float32 and np.abs(found - expected[kind]).max() <= TOLERANCE
    assert np.abs(expected["query"] - expected["passage"]).max() > 1000 * TOLERANCE  # the prefixes are seen


def test_settings_are_those_that_the_directory_states(encoders):
    assert encoders["bert_mean"].settings == text_encoder.EncoderSettings(
        pooling="mean",
        normalize=True,
        query_prefix="query: ",
        passage_prefix="passage: ",
        max_tokens=30,
        lower_case=False,
        dtype="float32",
    )
    cls = encoders["bert_cls"].settings
    assert (cls.pooling, cls.query_prefix, cls.passage_prefix) == ("cls", "Who of: ", "")
    assert (cls.max_tokens, cls.lower_case) == (48, True)


def test_arguments_come_before_what_the_directory_states():
    given = dict(pooling="cls", normalize=False, query_prefix="q: ", passage_prefix="", max_tokens=20, dtype="bfloat16")
    settings = text_encoder.read_settings(GOLDEN / "bert_mean", **given)
    assert dataclasses.asdict(settings) == given | {"lower_case": False}


def test_a_bare_model_takes_its_settings_from_the_arguments(copy):
    directory = copy("bert_mean")
    for file in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (directory / file).unlink()
    shutil.rmtree(directory / "1_Pooling")
    for given in ({}, {"pooling": "mean"}, {"normalize": True}):
        with pytest.raises(ValueError, match=f"{directory} has no modules.json; give pooling, .* and normalize"):
            text_encoder.TextEncoder(directory, **given)
    settings = text_encoder.read_settings(directory, pooling="mean", normalize=False)
    assert (settings.query_prefix, settings.passage_prefix, settings.max_tokens) == ("", "", 48)
    expected = np.load(GOLDEN / "bert_mean" / "expected.npz")
    bare = text_encoder.TextEncoder(
        directory, pooling="mean", normalize=False, passage_prefix="passage: ", max_tokens=30, **ROWS
    )
    found = bare.encode(expected["texts"][:2].tolist(), "passage")
    assert np.abs(found - expected["pooled"][:2]).max() <= 16 * TOLERANCE  # lengths of up to 16


@pytest.mark.parametrize(
    "file, change, complaint",
    [
        ("modules.json", [{"path": "", "type": "a.Transformer"}, {"path": "x", "type": "a.Dense"}], "'Dense'"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, r"pools by \['max'\]"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, r"pools by \['lasttoken'\]"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False}, "leaves the prefix"),
        ("sentence_bert_config.json", {"max_seq_length": 49}, "max_tokens is 49; the encoder has 48 positions"),
        ("config.json", {"model_type": "xlm-roberta"}, "model_type 'xlm-roberta'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(copy, file, change, complaint):
    directory = copy("bert_mean")
    (directory / file).write_text(json.dumps(change))
    with pytest.raises(ValueError, match=complaint):
        text_encoder.TextEncoder(directory)


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_the_newer_files_of_sentence_transformers_are_read_alike(copy, mode):
    directory = copy("bert_mean")
    kinds = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling"]
    modules = [{"path": f"{i}_Pooling" * i, "type": f"sentence_transformers.{kind}"} for i, kind in enumerate(kinds)]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    settings = text_encoder.read_settings(directory)
    assert (settings.pooling, settings.normalize) == (mode, False)


def test_wrong_arguments_are_refused_by_value():
    for given, complaint in [
        (dict(pooling="max"), "pooling is 'max'"),
        (dict(dtype="float16"), "dtype is 'float16'"),
        (dict(max_tokens=3), "max_tokens is 3"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            text_encoder.TextEncoder(GOLDEN / "bert_mean", **given)


def test_a_tokenizer_of_another_model_is_refused(copy):
    directory = copy("bert_mean")
    known = json.loads((directory / "config.json").read_text())
    size = known["vocab_size"]
    (directory / "config.json").write_text(json.dumps(known | {"vocab_size": size - 1}))
    with pytest.raises(ValueError, match=f"the tokenizer of .* has {size} ids, its model {size - 1}"):
        text_encoder.load_framing(directory, 48)


def test_an_encoder_without_its_words_is_refused(copy):
    directory = copy("bert_mean")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="holds none of tokenizer.json, vocab.txt; fetch the encoder again"):
        text_encoder.TextEncoder(directory)


# A text's vector is its own.


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_a_vector_is_the_same_bits_alone_and_in_any_company(encoders, kind):
    encoder = encoders["bert_mean"]
    together = encoder.encode(TEXTS, kind)
    alone = np.concatenate([encoder.encode([text], kind) for text in TEXTS[:31]])
    np.testing.assert_array_equal(together[:31], alone)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(TEXTS))[: 61 - 10 * seed]
        np.testing.assert_array_equal(encoder.encode([TEXTS[i] for i in order], kind), together[order])


def test_any_number_of_devices_makes_the_same_bits(encoders):
    several = text_encoder.TextEncoder(GOLDEN / "bert_mean", devices=jax.devices()[2:5], **ROWS)
    expected = encoders["bert_mean"].encode(TEXTS[:5], "passage")
    np.testing.assert_array_equal(several.encode(TEXTS[:5], "passage"), expected)
    (program,) = several._model.programs.values()
    waits = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
    assert "num_partitions=3" in program.as_text() and not any(word in program.as_text() for word in waits)


def test_threads_and_meshes_get_the_vectors_of_one_thread(encoders):
    encoder = encoders["bert_mean"]
    expected, results = encoder.encode(TEXTS, "query"), {}
    mesh = parallel.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[-4:])

    def encode(name, own):
        if own is None:
            results[name] = encoder.encode(TEXTS[::-1], "query")
        else:
            with jax.set_mesh(own):
                results[name] = encoder.encode(TEXTS[::-1], "query")

    threads = [threading.Thread(target=encode, args=(i, mesh if i % 2 else None)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    encode("under a mesh", mesh)
    with jax.set_mesh(mesh):
        made_there = text_encoder.TextEncoder(GOLDEN / "bert_mean", devices=jax.devices()[:1], **ROWS)
        np.testing.assert_array_equal(made_there.encode(TEXTS[:9], "query"), expected[:9])
        assert jax.sharding.get_mesh() == mesh
    assert len(results) == 5
    for name, found in results.items():
        np.testing.assert_array_equal(found, expected[::-1], err_msg=str(name))


def test_a_text_is_cut_to_its_own_length_whatever_follows(encoders):
    encoder = encoders["bert_mean"]
    long = "the city of kelu , " * 12
    long_vector, longer, shorter = encoder.encode([long, long + "zoo " * 100, "the city of kelu"], "passage")
    np.testing.assert_array_equal(long_vector, longer)
    assert np.abs(long_vector - shorter).max() > 0.01


def test_no_texts_make_no_vectors(encoders):
    assert encoders["bert_mean"].encode([], "query").shape == (0, 24)


# Programs.


def test_buckets_are_powers_of_two_and_the_lengths_between_them():
    assert text_encoder.buckets(512) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert text_encoder.buckets(200) == [16, 24, 32, 48, 64, 96, 128, 192, 200]
    assert text_encoder.buckets(24) == [16, 24] and text_encoder.buckets(8) == [8]


def test_a_program_is_compiled_once_a_bucket_and_number_of_rows():
    settings = dict(max_tokens=20, query_prefix="", passage_prefix="", rows=(1, 2))
    encoder = text_encoder.TextEncoder(GOLDEN / "bert_mean", devices=jax.devices()[:1], **settings)
    words = lambda count: " ".join(["emma"] * count)
    programs = encoder._model.programs
    assert not programs
    encoder.encode([words(14)], "query")  # 16 with its frame
    encoder.encode([words(n) for n in range(15)], "query")
    assert len(programs) == 1
    encoder.encode([words(15)], "query")
    encoder.encode([words(n) for n in range(40)], "query")
    assert len(programs) == 2
    encoder.encode([words(n) for n in range(9)], "passage")
    encoder.encode([words(n) for n in range(14)], "passage")
    assert len(programs) == 3


# What tells encoders apart.


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_the_fingerprint_is_of_configuration_weights_and_tokenizer(copy, file):
    directory = copy("bert_mean")
    before = text_encoder.fingerprint(directory)
    (directory / "README.md").write_text("read me")
    assert text_encoder.fingerprint(directory) == before == text_encoder.fingerprint(GOLDEN / "bert_mean")
    assert len(before) == 16 and int(before, 16) and before != text_encoder.fingerprint(GOLDEN / "bert_cls")
    data = bytearray((directory / file).read_bytes())
    data[-3] ^= 1
    (directory / file).write_bytes(data)
    assert text_encoder.fingerprint(directory) != before


def test_an_encoder_of_the_hub_is_fetched(monkeypatch, encoders):
    monkeypatch.setattr(hf, "directory", {"owner/encoder": GOLDEN / "bert_mean"}.__getitem__)
    encoder = text_encoder.TextEncoder("owner/encoder", devices=jax.devices()[:1], **ROWS)
    assert encoder.directory == GOLDEN / "bert_mean" and encoder.dimensions == 24
    assert encoder.fingerprint == text_encoder.fingerprint(GOLDEN / "bert_mean")


# The tokenizer's framing.


def test_texts_and_pairs_are_framed_and_cut_as_transformers_does():
    theirs = transformers.AutoTokenizer.from_pretrained(GOLDEN / "bert_pairs")
    ours = tokenizer.Tokenizer.load(GOLDEN / "bert_pairs")
    pairs = [tuple(map(str, pair)) for pair in np.load(GOLDEN / "bert_pairs" / "expected.npz")["pairs"]]
    for max_tokens in (10, 11, 48, 512):
        frame = ours.framing(max_tokens)
        options = dict(truncation=True, max_length=max_tokens)
        for texts in (pairs, [first for first, _ in pairs]):
            found = frame(texts)
            expected = [theirs(*(t if isinstance(t, tuple) else (t,)), **options) for t in texts]
            assert found == [(one["input_ids"], one["token_type_ids"]) for one in expected]


def test_special_tokens_inside_a_text_stay_text():
    ours = tokenizer.Tokenizer.load(GOLDEN / "bert_pairs")
    ((ids, _),) = ours.framing(48)(["emma [SEP] kelu"])
    assert ids.count(ids[-1]) == 1 and ids[1:-1] == ours.encode("emma [SEP] kelu")
