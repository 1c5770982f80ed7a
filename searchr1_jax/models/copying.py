"""A start that makes copying easy, for models too small to find it by themselves in minutes.

Copying a name takes two heads in a row: one that looks at the token before, and one that finds where the
current token stood earlier and says what followed there (Olsson et al., 2022, "In-context learning and
induction heads"). Ordinary weights, nothing fixed: training changes them like any other.
"""

import numpy as np

from searchr1_jax.models import config as model_config, decoder

_ATTENTION = 2.0  # A: sharpness of the previous-token head
_QUIET = 0.1  # scale of that head's content weights


def prime(params: decoder.Params, config: model_config.ModelConfig) -> decoder.Params:
    """The host weights of a Qwen2-like policy with a previous-token head and matching heads.

    In layer 0 the first group attends to the token before: with biases bk = [A, 0] and
    bq = [A cos f, −A sin f] (f the rotary frequencies) the logit is Σ A² cos((i − j − 1) f), largest where
    j = i − 1. Elsewhere wq = wk within a group, so that like attends to like, and wo = wvᵀ, so that a head writes what
    it reads.
    """
    c, group = config, config.heads // config.kv_heads
    layers = {name: np.array(value) for name, value in params["decoder"]["layers"].items()}
    for head in range(c.heads):
        layers["wq"][:, head] = layers["wk"][:, head // group]
        layers["wo"][:, :, head] = np.swapaxes(layers["wv"][:, head // group], 1, 2)
    half = c.head_dim // 2
    frequency = c.rope_theta ** (-np.arange(half) / half)
    layers["bk"][0, 0] = _ATTENTION * np.concatenate([np.ones(half), np.zeros(half)])
    layers["bq"][0, :group] = _ATTENTION * np.concatenate([np.cos(frequency), -np.sin(frequency)])
    layers["wk"][0, 0] *= _QUIET
    layers["wq"][0, :group] *= _QUIET
    return params | {"decoder": params["decoder"] | {"layers": layers}}
