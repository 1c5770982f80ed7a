"""Hugging Face directories in and out: what transformers wrote is read alike, what we write transformers reads.

`golden/make_hf_logits.py` wrote models and logits with transformers; where PyTorch is installed the same is
compared live, and what `save` writes is loaded by transformers.
"""

import dataclasses
import fnmatch
import json
import pathlib
import sys

import bits
import huggingface_hub
import jax
import jax.numpy as jnp
import meshes
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import slow_decoder

from searchr1_jax.core import parallel
from searchr1_jax.models import decoder, hf, tensor_files
from searchr1_jax.text import protocol, tokenizer

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NAMES = ("qwen2_tied_grouped", "qwen2_untied_long", "qwen3_grouped", "llama3_beyond_its_context")
TOLERANCE = 2e-5  # of float32 logits of a few units


@pytest.fixture(params=NAMES)
def golden(request):
    return GOLDEN / request.param


@pytest.fixture
def make_hf_logits(monkeypatch):
    """The script of the golden files, where PyTorch is installed."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(GOLDEN)
    monkeypatch.delitem(sys.modules, "make_hf_logits", raising=False)
    import make_hf_logits

    return make_hf_logits


def our_logits(directory, tokens_BT):
    """After each token; `load` and `Policy` on the mesh in use."""
    config, rows = hf.read_config(directory), parallel.to_mesh(tokens_BT, "batch", None)
    graph, _ = decoder.abstract(decoder.Policy, config)
    position = parallel.to_mesh(np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape), "batch", None)

    @jax.jit
    def logits(params, rows, position):
        policy = decoder.bind(graph, params)
        # One more token moves the hidden states "before each" to "after each".
        rows, position, segment = (jnp.pad(x, ((0, 0), (0, 1))) for x in (rows, position, jnp.ones_like(rows)))
        hidden = policy.decoder.packed(rows, position, segment, slow_decoder.COMPUTE)
        return policy.logits(hidden[:, 1:])

    return np.asarray(logits(hf.load(directory), rows, position))


def saved(directory, config, params, **options):
    stops = protocol.stop_tags(("search",))
    hf.save(directory, config, params, eos_ids=frozenset({0}), stop_strings=stops, **options)
    return directory


def test_logits_of_golden_models_equal_those_of_transformers(laptop, golden):
    stored = np.load(golden / "logits.npz")
    difference = np.abs(our_logits(golden, stored["tokens"]) - stored["logits"])
    assert np.abs(stored["logits"]).max() > 1 and difference.max() <= TOLERANCE


def test_the_slow_decoder_of_the_other_tests_equals_transformers_too(laptop, golden):
    stored, config = np.load(golden / "logits.npz"), hf.read_config(golden)
    for tokens, expected in zip(stored["tokens"], stored["logits"], strict=True):
        got = slow_decoder.logits(jax.device_get(hf.load(golden)), config, tokens)
        assert np.abs(got - expected).max() <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_live_models_equal_those_of_transformers(laptop, make_hf_logits, tmp_path, name):
    model, tokens = make_hf_logits.build(name, seed=11), make_hf_logits.tokens(name, seed=12)
    model.save_pretrained(tmp_path)
    expected = make_hf_logits.logits(model, tokens)
    assert np.abs(our_logits(tmp_path, tokens) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_save_writes_tokenizer_included(laptop, make_hf_logits, tmp_path, tied):
    import torch
    import transformers

    arguments = dict(vocab_size=270, added_tokens=protocol.tags(("search",)), directory=tmp_path / "tokenizer")
    vocabulary = tokenizer.train(["Where was Ada born?"] * 3, **arguments)
    config = slow_decoder.tiny_config(vocab_size=320, tied_embeddings=tied, head_dim=8, rope_theta=5000.0)
    directory = tmp_path / "model"
    vocabulary.save(directory)
    saved(directory, config, slow_decoder.random_params(config, 0))

    model, loading = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()) and model.dtype == torch.float32
    text = "Where was Ada born? <search> Ada </search>"
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ids = theirs(text)["input_ids"]
    assert ids == vocabulary.encode(text) and theirs.decode(ids) == text
    rows = np.array([ids], np.int32)
    assert np.abs(make_hf_logits.logits(model, rows) - our_logits(directory, rows)).max() <= TOLERANCE

    # Generation stops where our episodes do: a model that writes nothing but </search> writes it once.
    assert model.generation_config.eos_token_id == [0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(0.0)
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(320))
        model.lm_head.bias[vocabulary.encode("</search>")] = 9.0
        written = model.generate(torch.tensor([ids]), max_new_tokens=5, tokenizer=theirs)
    assert theirs.decode(written[0][len(ids) :]) == "</search>"


@pytest.mark.parametrize("max_shard_bytes, several", [(5 * 10**9, False), (5_000, True)])
def test_load_save_load_is_bit_identical(laptop, golden, tmp_path, max_shard_bytes, several):
    first, config = jax.device_get(hf.load(golden)), hf.read_config(golden)
    saved(tmp_path, config, first, max_shard_bytes=max_shard_bytes)
    files = list(tmp_path.glob("*.safetensors"))
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(files) > 3) == several
    assert hf.read_config(tmp_path) == config
    bits.assert_equal(jax.device_get(hf.load(tmp_path)), first)
    bits.assert_equal(bits.stored(tmp_path), bits.stored(golden))


def test_an_exported_model_has_its_logits_in_transformers(laptop, golden, make_hf_logits, tmp_path):
    import transformers

    config, stored = hf.read_config(golden), np.load(golden / "logits.npz")
    saved(tmp_path, config, hf.load(golden), max_shard_bytes=5_000)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()) and type(model).__name__.lower().startswith(config.family.name)
    difference = np.abs(make_hf_logits.logits(model, stored["tokens"]) - stored["logits"])
    assert difference.max() <= TOLERANCE


def test_weights_are_rounded_to_the_nearest_bfloat16_where_it_is_asked_for(laptop, golden, tmp_path):
    config = hf.read_config(golden)
    saved(tmp_path, config, jax.device_get(hf.load(golden)), dtype=jnp.bfloat16)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"
    rounded = bits.stored(tmp_path)
    for name, value in bits.stored(golden).items():
        exact = value.view(np.uint32)
        # Half of the last place that stays is added, less one bit where that place is even: ties go to even.
        expected = ((exact + 0x7FFF + (exact >> 16 & 1)) >> 16).astype(np.uint16)
        assert rounded[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(rounded[name].view(np.uint16), expected, err_msg=name)


def test_bfloat16_checkpoints_load_and_save_bit_by_bit(laptop, golden, tmp_path):
    """As published: every bfloat16 is a float32 whose lower half is zero."""
    config = hf.read_config(golden)
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), jax.device_get(hf.load(golden)))
    saved(tmp_path, config, half)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    wide = jax.device_get(hf.load(tmp_path))
    jax.tree.map(lambda w, h: np.testing.assert_array_equal(w, h.astype(np.float32)), wide, half)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(wide))
    again = jax.device_get(hf.load(tmp_path, dtype=jnp.bfloat16))
    bits.assert_equal(again, half)


# The value model.


def test_a_value_model_starts_with_the_body_of_the_policy_and_expects_nothing(laptop, golden):
    policy, value = jax.device_get((hf.load(golden), hf.load(golden, kind=decoder.Value)))
    assert value.keys() == {"decoder", "head"}
    bits.assert_equal(value["decoder"], policy["decoder"])
    np.testing.assert_array_equal(value["head"], np.zeros(hf.read_config(golden).width, np.float32))


def test_a_value_model_comes_back_with_its_head(laptop, golden, tmp_path):
    config = hf.read_config(golden)
    value = slow_decoder.random_params(config, 5, decoder.Value)
    saved(tmp_path, config, value, kind=decoder.Value, max_shard_bytes=5_000)
    bits.assert_equal(jax.device_get(hf.load(tmp_path, kind=decoder.Value)), value)
    stored = bits.stored(tmp_path)
    np.testing.assert_array_equal(stored["value_head.weight"], value["head"][None])
    assert "lm_head.weight" not in stored


def test_a_value_head_of_another_width_is_refused(laptop, tmp_path):
    directory = altered(tmp_path, lambda t: t | {"value_head.weight": np.zeros((1, 23), np.float32)})
    with pytest.raises(ValueError, match=r"value_head.weight has shape \[1, 23\], the model needs \[1, 24\]"):
        hf.load(directory, kind=decoder.Value)


def test_a_value_model_is_no_policy(laptop, tmp_path):
    config = slow_decoder.tiny_config(tied_embeddings=False)
    value = slow_decoder.random_params(config, 0, decoder.Value)
    saved(tmp_path, config, value, kind=decoder.Value)
    with pytest.raises(ValueError, match="missing lm_head.weight; unexpected value_head.weight"):
        hf.load(tmp_path)


# Meshes.


def test_weights_come_straight_into_the_shards_of_a_larger_mesh(tmp_path, laptop):
    config = slow_decoder.tiny_config()
    params = slow_decoder.random_params(config, 0)
    saved(tmp_path, config, params)
    with jax.set_mesh(meshes.make(1, 2, 4)):
        loaded, (_, target) = hf.load(tmp_path), decoder.abstract(decoder.Policy, config)
        bits.assert_equal(jax.device_get(loaded), params)
        assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding, loaded, target))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_mesh_reads_no_more_than_its_devices_hold_and_gets_what_one_device_gets(
    laptop, tmp_path, monkeypatch, family
):
    config = slow_decoder.tiny_config(family=family, tied_embeddings=False)
    saved(tmp_path, config, slow_decoder.random_params(config, 0))
    one = jax.device_get(hf.load(tmp_path))
    reads = {}  # (file, offset of the tensor) → entries of each read
    read_into = tensor_files.StoredTensor.read_into

    def recorded(self, out, shape, index):
        reads.setdefault(self, []).append(out.size)
        return read_into(self, out, shape, index)

    monkeypatch.setattr(tensor_files.StoredTensor, "read_into", recorded)
    with jax.set_mesh(meshes.make(2, 2, 2)):
        bits.assert_equal(jax.device_get(hf.load(tmp_path)), one)
    stored = tensor_files.find(tmp_path)
    assert set(reads) == set(stored.values())
    # Every entry is read once, though two replicas hold it: a shard at a time, 2 (fsdp) x 2 (tensor) of a projection,
    # 2 (tensor) of a bias.
    split = {name: 1 if "norm" in name else 2 if name.endswith("bias") else 4 for name in stored}
    for name, tensor in stored.items():
        size = int(np.prod(tensor.shape))
        assert reads[tensor] == [size // split[name]] * split[name], name


def test_replicas_that_were_read_once_may_be_donated_all_the_same(tmp_path):
    config = slow_decoder.tiny_config()
    with jax.set_mesh(meshes.make(8)):
        params = slow_decoder.random_params(config, 0)
        saved(tmp_path, config, params)
        double = jax.jit(lambda x: 2 * x, donate_argnums=0)
        for shard in double(hf.load(tmp_path)["decoder"]["norm"]).addressable_shards:
            np.testing.assert_array_equal(shard.data, 2 * params["decoder"]["norm"])


def test_a_mesh_writes_the_bytes_that_one_device_writes(laptop, golden, tmp_path):
    config = hf.read_config(golden)
    with jax.set_mesh(meshes.make(1, 4, 1)):
        saved(tmp_path, config, hf.load(golden))
    bits.assert_equal(bits.stored(tmp_path), bits.stored(golden))


def test_a_checkpoint_in_several_files_is_one(laptop, golden, tmp_path):
    tensors = safetensors_numpy.load_file(golden / "model.safetensors")
    (tmp_path / "config.json").write_text((golden / "config.json").read_text())
    for part in (0, 1):
        some = {name: tensors[name] for name in sorted(tensors)[part::2]}
        safetensors_numpy.save_file(some, tmp_path / f"model-0000{part + 1}-of-00002.safetensors")
    bits.assert_equal(*jax.device_get((hf.load(tmp_path), hf.load(golden))))


def test_a_tied_head_that_is_stored_all_the_same_is_the_embedding_once_more(laptop, tmp_path):
    directory = altered(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    bits.assert_equal(*jax.device_get((hf.load(directory), hf.load(GOLDEN / NAMES[0]))))


def altered(directory, change):
    """The first golden model with other tensors."""
    golden = GOLDEN / NAMES[0]
    (directory / "config.json").write_text((golden / "config.json").read_text())
    tensors = change(safetensors_numpy.load_file(golden / "model.safetensors"))
    safetensors_numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def test_every_missing_unexpected_and_misshapen_tensor_is_listed_at_once(laptop, tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 24), np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 40), np.float32)
        tensors["visual.weight"] = np.zeros(1, np.float32)
        return tensors

    with pytest.raises(ValueError) as error:
        hf.load(altered(tmp_path, change))
    _, faults = str(error.value).split(": ", 1)
    assert sorted(faults.split("; ")) == [
        "missing model.layers.1.self_attn.k_proj.bias",
        "missing model.norm.weight",
        "model.layers.0.mlp.up_proj.weight has shape [24, 40], the model needs [40, 24]",
        "unexpected model.layers.2.mlp.up_proj.weight",
        "unexpected visual.weight",
    ]
    assert str(tmp_path) in str(error.value)


def test_a_parameter_that_the_family_has_no_tensor_for_is_named(laptop, tmp_path):
    config = slow_decoder.tiny_config()
    tensors = {path: tensor for path, tensor in config.family.tensors.items() if path != "decoder.layers.bk"}
    config = dataclasses.replace(config, family=dataclasses.replace(config.family, tensors=tensors))
    with pytest.raises(ValueError, match="the family has no tensor for decoder.layers.bk; add the row"):
        saved(tmp_path, config, slow_decoder.random_params(config, 0))


@pytest.mark.parametrize("left", [0, 5, 1000, -1])
def test_a_truncated_file_is_named(laptop, tmp_path, left):
    file = altered(tmp_path, lambda tensors: tensors) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"{file}.*truncated"):
        hf.load(tmp_path)


def test_what_is_no_model_directory_is_refused(laptop, golden, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} .* no config.json"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text((golden / "config.json").read_text())
    with pytest.raises(ValueError, match=f"{tmp_path} holds no .*safetensors"):
        hf.load(tmp_path)


def test_a_directory_of_another_architecture_is_refused_before_its_weights_are_read(laptop, golden, tmp_path):
    settings = json.loads((golden / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        hf.load(tmp_path)


# The hub.


def test_a_hub_id_is_fetched_without_the_weights_of_other_frameworks(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hf.directory("Qwen/Qwen2.5-0.5B") == tmp_path
    ((name, patterns),) = asked
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "merges.txt"]
    others = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"]
    fetched = [file for file in wanted + others if any(fnmatch.fnmatch(file, p) for p in patterns)]
    assert name == "Qwen/Qwen2.5-0.5B" and fetched == wanted


def test_a_directory_is_taken_before_the_hub_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "mine").mkdir(parents=True)
    assert hf.directory("Qwen/mine") == pathlib.Path("Qwen/mine")


def test_an_id_that_the_hub_does_not_give_is_named_with_its_reason(monkeypatch):
    def snapshot_download(name, **_):
        raise OSError("401 Client Error")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="'nobody/nothing' is no directory, and the hub .*: 401 Client Error"):
        hf.directory("nobody/nothing")


@pytest.mark.parametrize("name", ["nothing", "/absent/model", "a/b/c", "gs://bucket/model"])
def test_what_is_neither_a_directory_nor_an_id_is_refused(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ValueError, match=f"'{name}' is no directory, nor a model id of the hub"):
        hf.directory(name)


def test_the_generation_settings_stop_where_episodes_do(laptop, tmp_path):
    config = slow_decoder.tiny_config()
    saved(tmp_path, config, slow_decoder.random_params(config, 0))
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "eos_token_id": [0],
        "stop_strings": ["</search>", "</answer>"],
        "do_sample": False,
    }
