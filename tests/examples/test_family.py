"""examples/family.py from end to end, and a family of transformers' that the package does not know."""

import dataclasses
import json

import bits
import jax
import miniature
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import slow_decoder

from examples import family
from searchr1_jax import evaluate, export, train
from searchr1_jax.core import parallel
from searchr1_jax.models import decoder, hf
from searchr1_jax.models.families import llama
from searchr1_jax.run import model_files, run_directory
from searchr1_jax.text import tokenizer

NAME = "examples.family:FAMILY"
RENAMED = {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}


@pytest.fixture
def checkpoints(laptop, tmp_path):
    """A random Llama, and the same with the tensors renamed by hand."""
    config = slow_decoder.tiny_config(family="llama", tied_embeddings=False)
    hf.save(tmp_path / "llama", config, slow_decoder.random_params(config, 0))
    (tmp_path / "mine").mkdir()
    described = json.loads((tmp_path / "llama" / "config.json").read_text()) | {"model_type": "mine"}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(described))
    tensors = {}
    for name, tensor in bits.stored(tmp_path / "llama").items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    safetensors_numpy.save_file(tensors, tmp_path / "mine" / "model.safetensors")
    return tmp_path / "llama", tmp_path / "mine"


def logits(directory, name, tokens_BT):
    """Before each token, on the mesh in use."""
    config = hf.read_config(directory, name)
    graph, _ = decoder.abstract(decoder.Policy, config)
    position = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    rows = parallel.to_mesh((tokens_BT, position, np.ones_like(tokens_BT)), "batch", None)

    @jax.jit
    def run(params, rows):
        policy = decoder.bind(graph, params)
        return policy.logits(policy.decoder.packed(*rows, slow_decoder.COMPUTE))

    return np.asarray(run(hf.load(directory, config), rows))


def test_renamed_tensors_give_the_logits_of_the_llama_they_were_to_the_last_bit(checkpoints):
    plain, mine = checkpoints
    tokens = np.random.default_rng(0).integers(64, size=(2, 12), dtype=np.int32)
    np.testing.assert_array_equal(logits(mine, NAME, tokens), logits(plain, "", tokens))


def test_renamed_tensors_are_written_as_they_were_read(checkpoints, tmp_path):
    _, mine = checkpoints
    config = hf.read_config(mine, NAME)
    hf.save(tmp_path / "again", config, hf.load(mine, config))
    bits.assert_equal(bits.stored(tmp_path / "again"), bits.stored(mine))
    assert hf.read_config(tmp_path / "again", NAME) == config
    described = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (described["model_type"], described["architectures"]) == ("mine", ["MineForCausalLM"])


@pytest.mark.slow
def test_a_family_of_ones_own_trains_and_is_exported_and_evaluated(laptop, tmp_path):
    workdir, output = tmp_path / "run", tmp_path / "model"
    c = miniature.settings(
        **{"model.family": NAME, "learner.steps": 1, "evaluation.every": 0, "evaluation.first": False}
        | {"algorithm.entropy_coefficient": 0.01}
    )
    miniature.world(workdir, c)
    tokens = tokenizer.Tokenizer.load(workdir / "base")
    shape = dataclasses.replace(hf.read_config(workdir / "base"), family=family.FAMILY)
    params = slow_decoder.random_params(shape, 0)
    model_files.save(workdir / "base", shape, tokens, params, tools=("search",))
    train.run(c, workdir)
    export.run(run_directory.settings_of(workdir), workdir, output)
    evaluate.run(c, workdir, model=str(output), questions=2, name="exported")
    assert (workdir / "eval" / "exported-greedy.json").exists()
    learned, base = bits.stored(output), bits.stored(workdir / "base")
    gate = "model.layers.0.feed_forward.w1.weight"
    assert learned.keys() == base.keys() and not np.array_equal(learned[gate], base[gate])


MISTRAL = dataclasses.replace(
    llama.FAMILY,
    name="mistral",
    architecture="MistralForCausalLM",
    write=lambda config: llama.write(config) | {"sliding_window": None},  # left out, it is 4096
)


def test_transformers_and_a_family_of_ones_own_read_each_others_checkpoints(laptop, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=64, sliding_window=None,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    name = f"{__name__}:MISTRAL"
    config = hf.read_config(tmp_path / "theirs", name)
    hf.save(tmp_path / "ours", config, hf.load(tmp_path / "theirs", config))
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert isinstance(again, transformers.MistralForCausalLM) and not any(loading.values())
    tokens = np.random.default_rng(0).integers(40, size=(2, 12), dtype=np.int32)
    with torch.no_grad():
        expected = [model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy() for model in (theirs, again)]
    np.testing.assert_array_equal(*expected)
    np.testing.assert_allclose(logits(tmp_path / "ours", name, tokens)[:, 1:], expected[0][:, :-1], atol=2e-5, rtol=0)
