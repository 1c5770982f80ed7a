"""The primed start does what its docstring draws, computed by the slow decoder."""

import jax
import meshes
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.models import copying, decoder

CONFIG = slow_decoder.tiny_config(head_dim=16, rope_theta=1000.0, layers=3)  # the quickstart's, fewer tokens
TOKENS = np.random.default_rng(0).permutation(CONFIG.vocab_size)[:40]


@pytest.fixture(scope="module")
def fresh():
    """Host weights as `prepare` draws them."""
    with jax.set_mesh(meshes.make()):
        return jax.device_get(decoder.init(decoder.Policy, CONFIG, seed=0))


def test_the_first_group_of_layer_0_looks_at_the_token_before(fresh):
    _, attention = slow_decoder.run(copying.prime(fresh, CONFIG), CONFIG, TOKENS)
    group = CONFIG.heads // CONFIG.kv_heads
    expected = np.arange(len(TOKENS) - 1)
    for head in range(group):
        np.testing.assert_array_equal(attention[0, head, 1:].argmax(-1), expected)
    others = attention[0, group:, 1:].argmax(-1)
    assert (others == expected).mean() < 0.5
    _, unprimed = slow_decoder.run(fresh, CONFIG, TOKENS)
    assert (unprimed[0, :group, 1:].argmax(-1) == expected).mean() < 0.5


def test_a_token_attends_to_where_it_stood_before(fresh):
    """In the group that no bias turns to the token before: more than twice what an even share would be."""
    half = len(TOKENS) // 2
    again = np.arange(half, 2 * half)

    def share(params):
        """Attention to the first time, as a multiple of the average over all earlier tokens."""
        _, attention = slow_decoder.run(params, CONFIG, np.tile(TOKENS[:half], 2))
        earlier = 1 - attention[0, 2:, again, again]
        return (attention[0, 2:, again, again - half] / (earlier / again[:, None])).mean()

    assert share(copying.prime(fresh, CONFIG)) > 2
    assert share(fresh) < 1.5


def test_every_head_writes_what_it_reads(fresh):
    """wv wo is positive semidefinite, of rank H: what a head adds never points away from what it read."""
    weights = copying.prime(fresh, CONFIG)["decoder"]["layers"]
    for layer, head in np.ndindex(CONFIG.layers, CONFIG.heads):
        circuit = weights["wv"][layer, head // 2].T @ weights["wo"][layer, :, head].T
        eigenvalues = np.linalg.eigvalsh(circuit)
        np.testing.assert_allclose(circuit, circuit.T, atol=1e-5)
        assert eigenvalues.min() > -1e-5 and (eigenvalues > 0.1).sum() == CONFIG.head_dim


def test_priming_changes_only_attention_and_not_its_argument(fresh):
    before = jax.tree.map(np.copy, fresh)
    primed = copying.prime(fresh, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, fresh, before)
    changed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(primed), strict=True)
        if not np.array_equal(old, new)
    ]
    assert changed == [f"decoder/layers/{name}" for name in ("bk", "bq", "wk", "wo", "wq")]
