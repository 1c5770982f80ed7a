r"""Writes a model or two of each family of transformers' own making, with the logits that transformers gives them.

pip install torch==2.13.0 transformers
python tests/golden/make_hf_logits.py

    build(name, seed) ─ save_pretrained ─▶ <name>/config.json, model.safetensors
                      ─ forward ─────────▶ <name>/logits.npz: tokens int32[B, T], logits float32[B, T, V]

Every weight is random, biases and norms too, and large enough that each of them moves the logits.
"""

from __future__ import annotations

import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent

MODELS = {
    "qwen2_tied_grouped": dict(
        model_type="qwen2", vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    ),
    "qwen2_untied_long": dict(
        model_type="qwen2", vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=12, max_position_embeddings=512,
        tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
    "qwen3_grouped": dict(
        model_type="qwen3", vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
    "llama3_beyond_its_context": dict(  # frequencies on all three sides of the stretch, 5 times the old context
        model_type="llama", vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    ),
}  # fmt: skip
TOKENS = {  # B, T
    "qwen2_tied_grouped": (2, 16),
    "qwen2_untied_long": (1, 192),
    "qwen3_grouped": (2, 24),
    "llama3_beyond_its_context": (1, 160),
}


def build(name: str, seed: int) -> transformers.PreTrainedModel:
    """A model of `MODELS` in float32."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**MODELS[name])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith("norm.weight"):
                weight.normal_(1.0, 0.3)
            else:
                weight.normal_(0.0, 0.5 if path.endswith("bias") else weight.shape[-1] ** -0.5)
    return model


def tokens(name: str, seed: int) -> np.ndarray:
    """int32[B, T]"""
    rng = np.random.default_rng(seed)
    return rng.integers(MODELS[name]["vocab_size"], size=TOKENS[name], dtype=np.int32)


def logits(model: transformers.PreTrainedModel, tokens_BT: np.ndarray) -> np.ndarray:
    """float32[B, T, V], after each token."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT.astype(np.int64))).logits.float().numpy()


def main() -> None:
    for seed, name in enumerate(MODELS):
        model, tokens_BT = build(name, seed), tokens(name, seed)
        model.save_pretrained(HERE / name)
        np.savez_compressed(HERE / name / "logits.npz", tokens=tokens_BT, logits=logits(model, tokens_BT))


if __name__ == "__main__":
    main()
