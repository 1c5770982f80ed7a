"""The primed start does what its docstring draws, computed by the slow decoder."""

import jax
import numpy as np
import slow_decoder

from searchr1_jax.models import copying
from searchr1_jax.models import decoder

CONFIG = slow_decoder.tiny_config(head_dim=16, rope_theta=1000.0, layers=3)  # as the quickstart's, a vocabulary less
TOKENS = np.random.default_rng(0).permutation(CONFIG.vocab_size)[:40]


def fresh():
    return jax.device_get(decoder.init(decoder.Policy, CONFIG, seed=0))


def test_the_first_group_of_layer_0_looks_at_the_token_before(laptop):
    _, attention = slow_decoder.run(copying.prime(fresh(), CONFIG), CONFIG, TOKENS)
    group = CONFIG.heads // CONFIG.kv_heads
    expected = np.arange(len(TOKENS) - 1)
    for head in range(group):
        np.testing.assert_array_equal(attention[0, head, 1:].argmax(-1), expected)
    others = attention[0, group:, 1:].argmax(-1)
    assert (others == expected).mean() < 0.5
    _, unprimed = slow_decoder.run(fresh(), CONFIG, TOKENS)
    assert (unprimed[0, :group, 1:].argmax(-1) == expected).mean() < 0.5


def test_elsewhere_like_attends_to_like_and_heads_write_what_they_read(laptop):
    """A token seen before draws the attention of its repetition, and reading it moves the logits towards it."""
    params = copying.prime(fresh(), CONFIG)
    weights = params["decoder"]["layers"]
    for layer in range(CONFIG.layers):
        for head in range(CONFIG.heads):
            kv = head // 2
            np.testing.assert_array_equal(weights["wo"][layer, head], weights["wv"][layer, :, kv].T)
            if layer or kv:
                np.testing.assert_array_equal(weights["wq"][layer, :, head], weights["wk"][layer, :, kv])


def test_priming_changes_only_attention_and_not_its_argument(laptop):
    params = fresh()
    before = jax.tree.map(np.copy, params)
    primed = copying.prime(params, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    changed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(primed), strict=True
        )
        if not np.array_equal(old, new)
    ]
    assert changed == [f"decoder/layers/{name}" for name in ("bk", "bq", "wk", "wo", "wq")]
