"""config.json in and out, and what is refused."""

import dataclasses

import pytest

from searchr1_jax.models import config as model_config

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
    family="qwen2", vocab_size=151936, width=2048, layers=36, heads=16, kv_heads=2, head_dim=128,
    mlp_width=11008, rope_theta=1e6, norm_eps=1e-6, tied_embeddings=True, max_positions=32768,
)  # fmt: skip


def test_a_published_config_is_read_field_by_field():
    assert model_config.from_hf(QWEN_3B) == QWEN_3B_OURS


def test_the_rope_parameters_of_transformers_5_mean_the_same():
    new = {k: v for k, v in QWEN_3B.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    assert model_config.from_hf(new) == QWEN_3B_OURS


@pytest.mark.parametrize(
    "odd", [{}, {"head_dim": 96}, {"kv_heads": 16}, {"tied_embeddings": False, "rope_theta": 1e4}]
)
def test_what_is_written_reads_back_the_same(odd):
    config = dataclasses.replace(QWEN_3B_OURS, **odd)
    assert model_config.from_hf(model_config.to_hf(config, dtype="float32")) == config


def test_without_key_value_heads_each_query_head_has_its_own():
    plain = {k: v for k, v in QWEN_3B.items() if k != "num_key_value_heads"}
    assert model_config.from_hf(plain).kv_heads == 16


def test_what_is_left_out_has_the_value_that_transformers_gives_it():
    left_out = ("rope_theta", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "use_sliding_window")
    config = model_config.from_hf({k: v for k, v in QWEN_3B.items() if k not in left_out})
    assert (config.rope_theta, config.norm_eps, config.tied_embeddings) == (10_000.0, 1e-6, False)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": None}, "model_type None"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope type 'llama3'"),
        ({"use_sliding_window": True}, "sliding window 32768"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        model_config.from_hf(QWEN_3B | changes)


def test_all_that_is_not_implemented_is_named_at_once():
    with pytest.raises(ValueError, match="rope type 'yarn'.*sliding window 32768"):
        model_config.from_hf(QWEN_3B | {"rope_scaling": {"type": "yarn"}, "use_sliding_window": True})


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"family": "mamba"}, "'mamba'"),
        ({"heads": 3}, "3 query heads do not divide over 2"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
    ],
)
def test_impossible_shapes_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(QWEN_3B_OURS, **changes)
