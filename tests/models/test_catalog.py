"""config.json in and out, the published sizes, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from searchr1_jax.models import catalog, config as model_config, decoder, layers
from searchr1_jax.models.families import llama

# Qwen/Qwen2.5-3B's config.json, as transformers 4 wrote it.
QWEN_3B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 32768, "max_window_layers": 36,
    "model_type": "qwen2", "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_3B_OURS = model_config.ModelConfig(
    family=catalog.FAMILIES["qwen2"], vocab_size=151936, width=2048, layers=36, heads=16, kv_heads=2, head_dim=128,
    mlp_width=11008, rope_theta=1e6, norm_eps=1e-6, tied_embeddings=True, max_positions=32768,
)  # fmt: skip


def test_a_published_config_is_read_field_by_field():
    assert catalog.from_hf(QWEN_3B) == QWEN_3B_OURS


def test_the_rope_parameters_of_transformers_5_mean_the_same():
    new = {k: v for k, v in QWEN_3B.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    assert catalog.from_hf(new) == QWEN_3B_OURS


@pytest.mark.parametrize("odd", [{}, {"head_dim": 96}, {"kv_heads": 16}, {"tied_embeddings": False, "rope_theta": 1e4}])
def test_what_is_written_reads_back_the_same(odd):
    config = dataclasses.replace(QWEN_3B_OURS, **odd)
    assert catalog.from_hf(catalog.to_hf(config, dtype="float32")) == config


# meta-llama/Llama-3.2-1B's config.json, as transformers 4 wrote it.
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
# Qwen/Qwen3-8B's.
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
    "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(
    "published, size", [(LLAMA_1B, "llama-3.2-1b"), (QWEN3_8B, "qwen3-8b"), (QWEN_3B, "qwen2.5-3b")]
)
def test_named_sizes_are_the_published_models(published, size):
    assert catalog.from_hf(published) == catalog.SIZES[size]
    written = catalog.to_hf(catalog.SIZES[size], dtype="bfloat16")
    assert catalog.from_hf(written) == catalog.SIZES[size]


@pytest.mark.parametrize(
    "size, billions",  # of parameters, as published
    [
        ("qwen2.5-0.5b", 0.49), ("qwen2.5-1.5b", 1.54), ("qwen2.5-3b", 3.09), ("qwen2.5-7b", 7.62),
        ("qwen2.5-14b", 14.77), ("qwen2.5-32b", 32.76), ("qwen2.5-72b", 72.71), ("qwen3-0.6b", 0.60),
        ("qwen3-1.7b", 1.72), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19), ("qwen3-14b", 14.77), ("qwen3-32b", 32.76),
        ("llama-3.2-1b", 1.24), ("llama-3.2-3b", 3.21), ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55),
    ],
)  # fmt: skip
def test_named_sizes_have_the_published_number_of_parameters(laptop, size, billions):
    _, abstract = decoder.abstract(decoder.Policy, catalog.SIZES[size])
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert count / 1e9 == pytest.approx(billions, abs=0.006)


def test_the_slow_frequencies_of_llama3_are_stretched_as_transformers_4_does():
    """By hand: C = 8192, factor 8, low 1, high 4; wavelengths 2π (kept), 2π·5000 (stretched), 4096 (in between)."""
    scaling = model_config.RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    # θ^(-2i/H) for H = 4 is 1 and θ^(-1/2); θ is chosen so that the second has the wanted wavelength.
    slow = layers.rotary_frequencies(4, 5000.0**2, scaling)
    np.testing.assert_allclose(slow, [1.0, 1 / 5000 / 8], rtol=1e-6)
    middle = layers.rotary_frequencies(4, (4096 / (2 * np.pi)) ** 2, scaling)
    smooth = (8192 / 4096 - 1) / 3
    np.testing.assert_allclose(middle[1], 2 * np.pi / 4096 * ((1 - smooth) / 8 + smooth), rtol=1e-6)


def test_a_config_that_lacks_a_key_names_it():
    with pytest.raises(ValueError, match="hidden_size"):
        catalog.from_hf({k: v for k, v in QWEN_3B.items() if k != "hidden_size"})


def test_qwen3_has_heads_of_128_where_its_config_states_no_width():
    stated = {k: v for k, v in QWEN3_8B.items() if k != "head_dim"} | {"num_attention_heads": 64}
    assert catalog.from_hf(stated).head_dim == catalog.from_hf(stated | {"head_dim": None}).head_dim == 128


def test_without_key_value_heads_each_query_head_has_its_own():
    plain = {k: v for k, v in QWEN_3B.items() if k != "num_key_value_heads"}
    assert catalog.from_hf(plain).kv_heads == 16


def test_what_is_left_out_has_the_value_that_transformers_gives_it():
    left_out = ("rope_theta", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "use_sliding_window")
    config = catalog.from_hf({k: v for k, v in QWEN_3B.items() if k not in left_out})
    assert (config.rope_theta, config.norm_eps, config.tied_embeddings) == (10_000.0, 1e-6, False)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": None}, "model_type None"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 5e5}}, "rope type 'longrope'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window 32768"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias True"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias True"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization"),
        ({"use_sliding_window": True}, "sliding window 32768"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        catalog.from_hf(QWEN_3B | changes)


def test_all_that_is_not_implemented_is_named_at_once():
    with pytest.raises(ValueError, match="rope type 'yarn'.*sliding window 32768"):
        catalog.from_hf(QWEN_3B | {"rope_scaling": {"type": "yarn"}, "use_sliding_window": True})


@pytest.mark.parametrize(
    "changes, said", [({"heads": 3}, "3 query heads do not divide over 2"), ({"head_dim": 5}, "head_dim 5 is odd")]
)
def test_impossible_shapes_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(QWEN_3B_OURS, **changes)


# A family of one's own.

MISTRAL = dataclasses.replace(llama.FAMILY, name="mistral", architecture="MistralForCausalLM")
OURS = f"{__name__}:MISTRAL"


def test_a_family_of_ones_own_reads_its_model_type_and_says_so_in_what_it_writes():
    config = catalog.from_hf(LLAMA_1B | {"model_type": "mistral"}, OURS)
    assert config == dataclasses.replace(catalog.SIZES["llama-3.2-1b"], family=MISTRAL)
    written = catalog.to_hf(config, dtype="float32")
    assert (written["model_type"], written["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert catalog.from_hf(written, OURS) == config


@pytest.mark.parametrize(
    "model_type, family, said",
    [
        ("mistral", "", "model_type 'mistral' is not implemented; choose from .*'llama'.*own in model.family"),
        ("llama", OURS, f"'{OURS}', which reads model_type 'mistral', but config.json is of model_type 'llama'"),
        ("mistral", "llama", "'llama', which reads model_type 'llama', but config.json is of model_type 'mistral'"),
        (
            "mistral",
            "mistral",
            "model.family names 'mistral'; make it one of qwen2, qwen3, llama, or package.module:name",
        ),
        (
            "mistral",
            f"{__name__}:NONE",
            "model.family names .*NONE', which could not be imported .*no attribute 'NONE'",
        ),
        ("mistral", "nowhere:MISTRAL", "could not be imported .No module named 'nowhere'"),
        (
            "mistral",
            f"{__name__}:LLAMA_1B",
            "model.family names .*LLAMA_1B', which is {.*; make it a searchr1_jax.models.config.Family",
        ),
    ],
)
def test_a_family_that_is_not_there_or_not_the_models_is_named(model_type, family, said):
    with pytest.raises(ValueError, match=said):
        catalog.from_hf(LLAMA_1B | {"model_type": model_type}, family)
