"""The mesh and its table; eight devices compute what one does, in the layout that the table says."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.core import parallel, settings
from searchr1_jax.learning import optimizer
from searchr1_jax.models import config as model_config, decoder

CONFIG = slow_decoder.tiny_config()
F, X = "fsdp", "tensor"

# What each dimension of each parameter is split over, by hand, where K/V heads divide over the tensor axis.
COMMON = {
    "decoder/embedding": (X, F),
    "decoder/norm": (None,),
    "decoder/layers/attention_norm": (None, None),
    "decoder/layers/wq": (None, X, None, F),
    "decoder/layers/wk": (None, X, None, F),
    "decoder/layers/wv": (None, X, None, F),
    "decoder/layers/wo": (None, F, X, None),
    "decoder/layers/mlp_norm": (None, None),
    "decoder/layers/gate": (None, X, F),
    "decoder/layers/up": (None, X, F),
    "decoder/layers/down": (None, F, X),
}
BIASES = {f"decoder/layers/b{name}": (None, X, None) for name in "qkv"}
HEAD_NORMS = {f"decoder/layers/{name}_norm": (None, None) for name in "qk"}
LAYOUTS = {"qwen2": COMMON | BIASES, "qwen3": COMMON | HEAD_NORMS, "llama": COMMON}
HEADS = {"policy": {"head": (X, F)}, "value": {"head": (None,)}}

SCALING = model_config.RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16)
CONFIGS = {
    "qwen2": slow_decoder.tiny_config(tied_embeddings=False),
    "qwen3": slow_decoder.tiny_config(tied_embeddings=False, family="qwen3"),
    "llama": slow_decoder.tiny_config(tied_embeddings=False, family="llama", rope_scaling=SCALING),
}
MESHES = [(2, 2, 2), (1, 4, 2), (1, 2, 4)]  # in the last, two key/value heads for four tensor shards
on_meshes = pytest.mark.parametrize("family, shape", list(itertools.product(CONFIGS, MESHES)))


def layout_of(family, shape):
    layout = dict(LAYOUTS[family])
    if shape[2] > CONFIGS[family].kv_heads:  # a shard has less than a head of its own, and so all of them
        for name in layout.keys() & {f"decoder/layers/{name}" for name in ("wk", "wv", "bk", "bv")}:
            layout[name] = tuple(None if axis == X else axis for axis in layout[name])
    return layout


@functools.cache
def computed(family, shape):
    """Parameters, logits, loss and gradients of a policy and a value model on a mesh of this shape."""
    config, rng = CONFIGS[family], np.random.default_rng(0)
    tokens = rng.integers(config.vocab_size, size=(4, 16)).astype(np.int32)
    segment = np.repeat([[1] * 7 + [2] * 7 + [0] * 2], 4, 0).astype(np.int32)
    position = np.repeat([[*range(7), *range(7), 0, 0]], 4, 0).astype(np.int32)
    weight = rng.standard_normal((4, 16)).astype(np.float32) * (segment > 0)
    compute = dataclasses.replace(slow_decoder.COMPUTE, remat=True)
    with jax.set_mesh(meshes.make(*shape)):
        arrays = parallel.to_mesh((tokens, position, segment, weight), "batch", None)
        graph, _ = decoder.abstract(decoder.Policy, config)
        value_graph, _ = decoder.abstract(decoder.Value, config)
        value_host = slow_decoder.random_params(config, 2, decoder.Value)
        params = {
            "policy": slow_decoder.on_mesh(config, slow_decoder.random_params(config, 1)),
            "value": slow_decoder.on_mesh(config, value_host, decoder.Value),
        }

        @functools.partial(jax.jit, compiler_options=slow_decoder.COMPILER_OPTIONS)
        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss_and_gradient(params, tokens, position, segment, weight):
            rows = tokens, position, segment
            policy = decoder.bind(graph, params["policy"])
            logp, entropy = policy.token_statistics(*rows, compute, temperature=0.8, vocab_chunk=8)
            value = decoder.bind(value_graph, params["value"])(*rows, compute)
            logits = policy.logits(policy.decoder.packed(*rows, compute))
            return jnp.sum(weight * (logp + 0.3 * entropy + jnp.square(value))), logits

        (loss, logits), gradient = loss_and_gradient(params, *arrays)
        return params, parallel.to_host(logits), float(loss), gradient


@on_meshes
def test_eight_devices_compute_the_logits_and_the_loss_of_one(family, shape):
    _, logits, loss, _ = computed(family, shape)
    _, one, one_loss, _ = computed(family, (1, 1, 1))
    assert np.abs(one).max() > 1
    np.testing.assert_allclose(logits, one, atol=1e-5, rtol=0)
    assert loss == pytest.approx(one_loss, rel=1e-5)


@on_meshes
def test_eight_devices_compute_the_gradients_of_one(family, shape):
    gradient, one = jax.device_get((computed(family, shape)[3], computed(family, (1, 1, 1))[3]))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(one), strict=True):
        distance = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert distance <= 1e-5, (jax.tree_util.keystr(path), distance)


def assert_laid_out(tree, mesh, layout):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert names.keys() == layout.keys()
    for name, leaf in names.items():
        expected = jax.sharding.NamedSharding(mesh, jax.P(*layout[name]))
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (name, leaf.sharding)
        parts = [mesh.shape[axis] if axis else 1 for axis in layout[name]]
        held = tuple(size // n for size, n in zip(leaf.shape, parts, strict=True))
        assert all(shard.data.shape == held for shard in leaf.addressable_shards), name


@on_meshes
def test_parameters_gradients_and_moments_lie_where_the_table_says(family, shape):
    params, _, _, gradient = computed(family, shape)
    mesh, layout = meshes.make(*shape), layout_of(family, shape)
    adam = optimizer.AdamW(settings.Optimizer(), total_steps=1)
    with jax.set_mesh(mesh):
        for kind, head in HEADS.items():
            moments = jax.jit(adam.transformation().init)(params[kind])[1]
            for tree in (params[kind], gradient[kind], moments.mu, moments.nu):
                assert_laid_out(tree, mesh, layout | head)


def test_fresh_weights_are_made_where_the_table_says_and_are_those_of_one_device():
    mesh = meshes.make(2, 2, 2)
    with jax.set_mesh(mesh):
        params = decoder.init(decoder.Policy, CONFIG, seed=0)
        assert_laid_out(params, mesh, LAYOUTS["qwen2"])  # its head is the embedding
    with jax.set_mesh(meshes.make()):
        one = decoder.init(decoder.Policy, CONFIG, seed=0)
    # The same random bits; the inverse error function rounds by how many lanes a shard fills: an ulp or two.
    same = functools.partial(np.testing.assert_allclose, rtol=4e-7)
    jax.tree.map(same, jax.device_get(params), jax.device_get(one))


def test_gathered_weights_are_whole_over_fsdp():
    mesh = meshes.make(2, 2, 2)
    with jax.set_mesh(mesh):
        _, target = decoder.abstract(decoder.Policy, CONFIG, gathered=True)
        assert target["decoder"]["layers"]["down"].sharding.spec == jax.P(None, None, X)
        whole = jax.jit(lambda x: parallel.gather_weight(x, ("mlp", "embed")))(
            parallel.to_mesh(np.arange(16.0).reshape(4, 4), "mlp", "embed")
        )
        assert whole.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, jax.P(X, None)), 2)
        np.testing.assert_array_equal(whole, np.arange(16.0).reshape(4, 4))


def test_minus_one_takes_what_remains():
    assert dict(parallel.make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, F: 2, X: 2}


@pytest.mark.parametrize("shape", [(2, 2, 1), (3, -1, 1), (-1, -1, 2), (0, 1, 8), (16, -1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape):
    with pytest.raises(ValueError, match=f"data={shape[0]} fsdp={shape[1]} tensor={shape[2]} .* 8 devices"):
        parallel.make_mesh(data=shape[0], fsdp=shape[1], tensor=shape[2])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"vocab_size": 66}, "vocab of 66 does not divide over 4"),
        ({"mlp_width": 50}, "mlp of 50 does not divide over 4"),
        ({"width": 63}, "embed of 63 does not divide over 2"),
        ({"heads": 6}, "heads of 6 does not divide over 4"),
        ({"heads": 12, "kv_heads": 6}, "kv_heads of 6 does not divide over 4"),  # a shard would need two of them
        ({"heads": 12, "kv_heads": 3}, "kv_heads of 3 does not divide over 4"),
    ],
)
def test_a_model_that_does_not_divide_over_the_mesh_is_refused(changes, said):
    with jax.set_mesh(meshes.make(1, 2, 4)), pytest.raises(ValueError, match=said):
        decoder.abstract(decoder.Policy, slow_decoder.tiny_config(**changes))


def test_host_arrays_come_back_as_they_went_and_scalars_travel_along():
    mesh = meshes.make(2, 2, 2)
    with jax.set_mesh(mesh):
        tree = {"rows": np.arange(24, dtype=np.int32).reshape(8, 3), "step": np.float32(7)}
        placed = parallel.to_mesh(tree, "batch", None)
        rows = jax.sharding.NamedSharding(mesh, jax.P(("data", F), None))
        assert placed["rows"].sharding.is_equivalent_to(rows, 2)
        np.testing.assert_array_equal(placed["rows"].addressable_shards[-1].data, [[18, 19, 20], [21, 22, 23]])
        back = parallel.to_host(placed)
        np.testing.assert_array_equal(back["rows"], tree["rows"])
        assert back["step"] == 7 and back["rows"].dtype == np.int32


def test_arrays_go_to_the_memory_of_the_host_and_back():
    with jax.set_mesh(meshes.make(2, 2, 2)):
        rows = parallel.to_mesh({"x": np.arange(24.0).reshape(8, 3)}, "batch", None)
        away = parallel.in_host_memory(rows)
        assert (
            away["x"].sharding.memory_kind == parallel.HOST_MEMORY
            and away["x"].sharding.spec == rows["x"].sharding.spec
        )
        back = parallel.in_device_memory(away)
        assert back["x"].sharding == rows["x"].sharding
        np.testing.assert_array_equal(back["x"], np.arange(24.0).reshape(8, 3))


def test_devices_that_cannot_reach_a_host_memory_are_refused(monkeypatch):
    with jax.set_mesh(meshes.make()):
        monkeypatch.setattr(parallel, "HOST_MEMORY", "far_away")
        with pytest.raises(
            ValueError, match=r"learner.offload needs a far_away memory, and cpu has \['device', .*leave it"
        ):
            parallel.in_host_memory({})
