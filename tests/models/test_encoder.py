"""The encoder against transformers: golden files of `golden/make_encoders.py`, and live where PyTorch is installed."""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from searchr1_jax.core import parallel
from searchr1_jax.models import decoder, encoder
from searchr1_jax.text import tokenizer

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
POOLING = {"bert_mean": "mean", "bert_cls": "cls"}
PASSAGE_PREFIX = {"bert_mean": "passage: ", "bert_cls": ""}
MAX_TOKENS = {"bert_mean": 30, "bert_cls": 48, "bert_pairs": 48}
TIME = 48
TOLERANCE = 1e-5  # of float32 vectors of length 1


@pytest.fixture(params=list(POOLING))
def name(request):
    return request.param


@pytest.fixture
def make_encoders(monkeypatch):
    """The script of the golden files, where PyTorch is installed."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(GOLDEN)
    monkeypatch.delitem(sys.modules, "make_encoders", raising=False)
    import make_encoders

    return make_encoders


def framed(name, texts, *, filler=0):
    """token, type, length of all texts side by side, filled up to TIME."""
    framing = tokenizer.Tokenizer.load(GOLDEN / name).framing(MAX_TOKENS[name])
    token, kind = np.full((2, len(texts), TIME), filler, np.int32)
    length = np.zeros(len(texts), np.int32)
    for row, (ids, types) in enumerate(framing(texts)):
        token[row, : len(ids)], kind[row, : len(ids)], length[row] = ids, types, len(ids)
    return token, np.minimum(kind, 1), length


def run(directory, kind, arrays, *, dtype=jnp.float32, **options):
    """The model of a directory on the mesh in use."""
    return call(kind, encoder.read_config(directory), encoder.load(directory, kind=kind, dtype=dtype), arrays, options)


def call(kind, config, params, arrays, options):
    arrays = parallel.to_mesh(arrays, "batch", None)
    return np.asarray(_call(graph(kind, config), params, arrays, tuple(sorted(options.items()))))


@functools.cache
def graph(kind, config):
    return decoder.abstract(kind, config)[0]


@functools.partial(jax.jit, static_argnames=("graph", "options"))
def _call(graph, params, arrays, options):
    return decoder.bind(graph, params)(*arrays, dtype=jax.tree.leaves(params)[0].dtype, **dict(options))


def vectors(name, directory=None, *, normalize=True, dtype=jnp.float32, filler=0):
    """Of the golden texts as passages."""
    texts = [PASSAGE_PREFIX[name] + str(text) for text in np.load(GOLDEN / name / "expected.npz")["texts"]]
    texts = [text.lower() for text in texts] + [""]  # an even number, for meshes
    options = dict(pooling=POOLING[name], normalize=normalize)
    arrays = framed(name, texts, filler=filler)
    return run(directory or GOLDEN / name, encoder.TextModel, arrays, dtype=dtype, **options)[:-1]


def scores(directory, pairs, dtype=jnp.float32):
    pairs = [tuple(map(str, pair)) for pair in pairs]
    return run(directory, encoder.PairModel, framed("bert_pairs", pairs), dtype=dtype)


def altered(directory, name, change):
    """A golden model with other tensors."""
    (directory / "config.json").write_text((GOLDEN / name / "config.json").read_text())
    tensors = change(safetensors_numpy.load_file(GOLDEN / name / "model.safetensors"))
    safetensors_numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def test_vectors_of_golden_models_equal_those_of_transformers(laptop, name):
    expected = np.load(GOLDEN / name / "expected.npz")
    assert np.abs(vectors(name) - expected["passage"]).max() <= TOLERANCE
    pooled = vectors(name, normalize=False)
    assert 2 < np.abs(pooled).max() < 16 and np.abs(pooled - expected["pooled"]).max() <= 16 * TOLERANCE


def test_scores_of_a_golden_classifier_equal_those_of_transformers(laptop):
    expected = np.load(GOLDEN / "bert_pairs" / "expected.npz")
    difference = np.abs(scores(GOLDEN / "bert_pairs", expected["pairs"]) - expected["scores"])
    assert np.ptp(expected["scores"]) > 0.5 and difference.max() <= TOLERANCE


@pytest.mark.parametrize("live", ["bert_mean", "bert_cls", "bert_pairs"])
def test_live_models_equal_those_of_transformers(laptop, make_encoders, tmp_path, live):
    model = make_encoders.build(live, seed=11)
    make_encoders.save(live, model, tmp_path)
    expected = make_encoders.expected(live, model, tmp_path)
    if live == "bert_pairs":
        assert np.abs(scores(tmp_path, expected["pairs"]) - expected["scores"]).max() <= TOLERANCE
    else:
        assert np.abs(vectors(live, tmp_path) - expected["passage"]).max() <= TOLERANCE


def test_what_lies_beyond_a_text_changes_nothing(laptop, name):
    np.testing.assert_array_equal(vectors(name, filler=0), vectors(name, filler=7))


def test_the_second_text_of_a_pair_is_told_from_the_first(laptop):
    token, kind, length = framed("bert_pairs", [("emma", "kelu")])
    assert kind[0, :6].tolist() == [0, 0, 0, 1, 1, 0] and length == [5]  # [CLS] emma [SEP] kelu [SEP]
    both, one = (run(GOLDEN / "bert_pairs", encoder.PairModel, (token, types, length)) for types in (kind, 0 * kind))
    assert abs(both - one) > 100 * TOLERANCE


def test_bfloat16_is_float32_but_for_its_rounding(laptop, name):
    half, full = vectors(name, dtype=jnp.bfloat16), vectors(name)
    assert half.dtype == np.float32
    difference = np.abs(half - full).max()
    assert 1e-4 < difference < 2**-8 * 8  # some ten roundings of 8 bits, of entries below 1


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 1)])
def test_every_mesh_makes_the_same_vectors(laptop, name, shape):
    one = vectors(name)
    with jax.set_mesh(meshes.make(*shape)):
        np.testing.assert_allclose(vectors(name), one, atol=TOLERANCE, rtol=0)


def test_heads_may_be_split_over_devices(laptop):
    """Three heads, on three devices."""
    name = "bert_mean"
    arrays = framed(name, ["who wrote emma", "kelu"])
    options = dict(pooling="mean", normalize=True)
    config = encoder.EncoderConfig(
        vocab_size=90, width=24, layers=2, heads=3, mlp_width=42, max_positions=48, token_types=2, norm_eps=1e-12
    )
    rng, results = np.random.default_rng(0), []
    with jax.set_mesh(meshes.make()):
        _, target = decoder.abstract(encoder.TextModel, config)
    host = jax.tree.map(lambda t: rng.standard_normal(t.shape, np.float32), target)
    for mesh in (meshes.make(), meshes.make(1, 1, 3)):
        with jax.set_mesh(mesh):
            _, target = decoder.abstract(encoder.TextModel, config)
            params = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), host, target)
            results.append(call(encoder.TextModel, config, params, arrays, options))
    np.testing.assert_allclose(*results, atol=TOLERANCE, rtol=0)


def test_names_with_and_without_the_prefix_are_one_model(laptop, tmp_path):
    def change(tensors):
        assert any(key.startswith("bert.") for key in tensors)
        return {key.removeprefix("bert."): value for key, value in tensors.items()}

    np.testing.assert_array_equal(vectors("bert_mean", altered(tmp_path, "bert_mean", change)), vectors("bert_mean"))


def test_stored_position_ids_are_left_alone(laptop, tmp_path):
    change = lambda tensors: tensors | {"embeddings.position_ids": np.arange(48)[None]}
    np.testing.assert_array_equal(vectors("bert_cls", altered(tmp_path, "bert_cls", change)), vectors("bert_cls"))


def test_every_missing_unexpected_and_misshapen_tensor_is_listed_at_once(laptop, tmp_path):
    def change(tensors):
        del tensors["encoder.layer.1.output.dense.bias"]
        tensors["embeddings.word_embeddings.weight"] = np.zeros((5, 24), np.float32)
        tensors["visual.weight"] = np.zeros(1, np.float32)
        return tensors

    with pytest.raises(ValueError) as error:
        encoder.load(altered(tmp_path, "bert_cls", change))
    start, faults = str(error.value).split(": ", 1)
    vocabulary = encoder.read_config(tmp_path).vocab_size
    assert start == f"{tmp_path} does not hold the model of its config.json"
    assert sorted(faults.split("; ")) == [
        f"embeddings.word_embeddings.weight has shape [5, 24], the model needs [{vocabulary}, 24]",
        "missing encoder.layer.1.output.dense.bias",
        "unexpected visual.weight",
    ]


def test_a_classifier_needs_its_head_and_one_label(laptop, tmp_path):
    with pytest.raises(ValueError, match="missing classifier.weight; missing classifier.bias"):
        encoder.load(GOLDEN / "bert_cls", kind=encoder.PairModel)
    change = lambda tensors: tensors | {"classifier.weight": np.zeros((2, 24), np.float32)}
    directory = altered(tmp_path, "bert_pairs", change)
    with pytest.raises(ValueError, match=r"classifier.weight has shape \[2, 24\], the model needs \[1, 24\]"):
        encoder.load(directory, kind=encoder.PairModel)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"model_type": "roberta"}, "model_type 'roberta'"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not implemented, only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"num_attention_heads": 5}, "width of 24 does not divide over 5 heads"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, change, complaint):
    settings = json.loads((GOLDEN / "bert_cls" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=complaint):
        encoder.read_config(tmp_path)


def test_what_config_json_lacks_is_named():
    with pytest.raises(ValueError, match="no hidden_size; .*no layer_norm_eps"):
        encoder.from_hf({"model_type": "bert"})


def test_what_is_no_model_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} .* no config.json"):
        encoder.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        encoder.read_config(tmp_path)
