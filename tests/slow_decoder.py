"""The decoder once more, as slowly as it reads: numpy, float64, one sequence, one head at a time.

What the models and the engine compute is compared with it. It shares with them the names and layouts of the
weights, which `models/test_hf.py` compares with transformers', and nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.models import catalog, config as model_config, decoder

COMPUTE = decoder.Compute(dtype=jnp.float32, remat=False, attention="xla")
# For programs that run once: LLVM would take longer to make them fast than to compile them.
COMPILER_OPTIONS = {"xla_backend_optimization_level": "0"}


def tiny_config(**changes) -> model_config.ModelConfig:
    """Four query heads over two key/value heads; `changes` replace fields, the family by its name."""
    fields = dict(
        family="qwen2", vocab_size=64, width=64, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48,
        rope_theta=100.0, norm_eps=1e-6, tied_embeddings=True, max_positions=64,
    )  # fmt: skip
    fields |= changes
    return model_config.ModelConfig(**fields | {"family": catalog.FAMILIES[fields["family"]]})


def random_params(config: model_config.ModelConfig, seed: int, kind: type = decoder.Policy) -> decoder.Params:
    """Host weights, all random: biases and norms too, so that none of them can be forgotten unnoticed."""
    rng = np.random.default_rng(seed)

    def draw(key_path, leaf):
        name = key_path[-1].key
        noise = rng.standard_normal(leaf.shape)
        if name.endswith("norm"):
            return (1 + 0.3 * noise).astype(np.float32)
        return (noise * (0.2 if name.startswith("b") else config.width**-0.5)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, decoder.abstract(kind, config)[1])


def leaning(params: decoder.Params, logits: dict[int, float]) -> decoder.Params:
    """The policy with about these logits for some tokens, whatever came before."""
    params = jax.tree.map(np.copy, params)
    params["decoder"]["embedding"][:, 0] = 5.0  # after every token; about 3 of it reach the head
    params["decoder"]["norm"][0] = 1.0
    for token, logit in logits.items():
        params["head"][token] = 0.0
        params["head"][token, 0] = logit / 3
    return params


def on_mesh(config: model_config.ModelConfig, params: decoder.Params, kind: type = decoder.Policy):
    """The host weights as the mesh in use lays them out."""
    _, target = decoder.abstract(kind, config)
    return jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), params, target)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


GATES = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_pytorch_tanh": lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


def _frequencies(c):
    """θ^(-2i/H), with Llama 3's three cases told apart one by one."""
    plain = c.rope_theta ** (-2 * np.arange(c.head_dim // 2) / c.head_dim)
    if (s := c.rope_scaling) is None:
        return plain
    stretched = []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        if wavelength < s.original_max_positions / s.high_freq_factor:
            stretched.append(frequency)
        elif wavelength > s.original_max_positions / s.low_freq_factor:
            stretched.append(frequency / s.factor)
        else:
            share = s.original_max_positions / wavelength - s.low_freq_factor
            share /= s.high_freq_factor - s.low_freq_factor
            stretched.append((1 - share) * frequency / s.factor + share * frequency)
    return np.array(stretched)


def _turn(x_TH, frequencies):
    """Pair (i, i + H/2) is a complex number, turned by the angle position · frequency i."""
    time, width = x_TH.shape
    angle = np.arange(time)[:, None] * frequencies
    turned = (x_TH[:, : width // 2] + 1j * x_TH[:, width // 2 :]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def run(params: decoder.Params, c: model_config.ModelConfig, tokens) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [T, D] after the final norm, and attention weights [L, N, T, T]."""
    body = jax.tree.map(lambda x: np.asarray(x, np.float64), params["decoder"])
    x = body["embedding"][np.asarray(tokens)]
    seen = np.tril(np.ones((len(x), len(x)), bool))
    frequencies = _frequencies(c)
    attention = np.zeros((c.layers, c.heads, len(x), len(x)))
    for layer in range(c.layers):
        w = {name: value[layer] for name, value in body["layers"].items()}
        y = _norm(x, w["attention_norm"], c.norm_eps)
        for head in range(c.heads):
            kv = head // (c.heads // c.kv_heads)
            q, k, v = y @ w["wq"][head].T, y @ w["wk"][kv].T, y @ w["wv"][kv].T
            if "bq" in w:
                q, k, v = q + w["bq"][head], k + w["bk"][kv], v + w["bv"][kv]
            if "q_norm" in w:
                q, k = _norm(q, w["q_norm"], c.norm_eps), _norm(k, w["k_norm"], c.norm_eps)
            q, k = _turn(q, frequencies), _turn(k, frequencies)
            scores = np.where(seen, q @ k.T / np.sqrt(c.head_dim), -np.inf)
            attention[layer, head] = np.exp(log_softmax(scores))
            x = x + attention[layer, head] @ v @ w["wo"][:, head].T
        y = _norm(x, w["mlp_norm"], c.norm_eps)
        x = x + (GATES[c.activation](y @ w["gate"].T) * (y @ w["up"].T)) @ w["down"].T
    return _norm(x, body["norm"], c.norm_eps), attention


def logits(params: decoder.Params, c: model_config.ModelConfig, tokens) -> np.ndarray:
    """[T, V], after each token."""
    head = params["decoder"]["embedding"] if c.tied_embeddings else params["head"]
    return run(params, c, tokens)[0] @ np.asarray(head, np.float64).T


def token_logp(params, c, tokens, temperature=1.0) -> np.ndarray:
    """[T], log-prob of each token given those before it; NaN for the first."""
    logp = log_softmax(logits(params, c, tokens)[:-1] / temperature)
    return np.append(np.nan, logp[np.arange(len(tokens) - 1), tokens[1:]])
