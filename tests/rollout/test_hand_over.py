"""The actor's weights are the learner's, whatever the two meshes are."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.core import parallel
from searchr1_jax.models import decoder
from searchr1_jax.rollout import engine as engine_lib, hand_over

CONFIG = slow_decoder.tiny_config(tied_embeddings=False)  # 4 heads over 2 K/V heads


@pytest.fixture(scope="module")
def host_params():
    with jax.set_mesh(meshes.make()):
        return slow_decoder.random_params(CONFIG, 0)


def over(learner, tensor, host_params, dtype=jnp.float32):
    hosts = parallel.hosts_mesh(learner, tensor=tensor)
    actor = parallel.host_mesh(hosts, 0)
    with jax.set_mesh(learner):
        handing = hand_over.HandOver(CONFIG, hosts=hosts, actor=actor, dtype=dtype)
        return handing, handing(slow_decoder.on_mesh(CONFIG, host_params))


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 1, 4), (2, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_the_actor_gets_the_learners_weights_in_its_own_layout(host_params, shape, tensor):
    handing, params = over(meshes.make(*shape), tensor, host_params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), host_params)
    for array, target in zip(jax.tree.leaves(params), jax.tree.leaves(handing.params), strict=True):
        assert array.sharding == target.sharding and array.dtype == jnp.float32
    heads = params["decoder"]["layers"]["wq"]
    assert heads.sharding.shard_shape(heads.shape)[1] == 4 // tensor
    assert len(heads.addressable_shards) == 8  # every device has its part of one of the copies


def test_weights_are_cast_as_they_are_handed_over(host_params):
    _, params = over(meshes.make(2, 2, 2), 2, host_params, jnp.bfloat16)
    expected = jax.tree.map(lambda x: np.asarray(jnp.asarray(x).astype(jnp.bfloat16)), host_params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected)


def test_the_learner_may_donate_its_weights_afterwards(host_params):
    mesh = meshes.make()
    hosts = parallel.hosts_mesh(mesh, tensor=1)
    with jax.set_mesh(mesh):
        handing = hand_over.HandOver(CONFIG, hosts=hosts, actor=parallel.host_mesh(hosts, 0), dtype=jnp.float32)
        learners = slow_decoder.on_mesh(CONFIG, host_params)
        params = handing(learners)
        jax.tree.map(lambda x: x.delete(), learners)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), host_params)


def test_a_tensor_axis_that_does_not_divide_a_hosts_devices_is_refused():
    with pytest.raises(ValueError, match="mesh.actor_tensor of 3 does not divide the 8 devices of a host; use a div"):
        parallel.hosts_mesh(meshes.make(2, 2, 2), tensor=3)


def test_what_is_split_over_fsdp_is_split_over_the_replicas_on_the_way():
    hosts = parallel.hosts_mesh(meshes.make(2, 2, 2), tensor=2)
    assert parallel.replicas(hosts) == 4
    _, split = abstract(hosts)
    spec = lambda name: parallel.over_hosts(split[name].sharding.spec, split[name].shape, hosts)
    assert spec("gate") == jax.P(None, "tensor", ("hosts", "data"))  # [layers, mlp, embed]
    assert spec("attention_norm") == jax.P(None, None)
    assert parallel.over_hosts(jax.P("fsdp"), (6,), hosts) == jax.P(None)  # six do not divide by four


def abstract(hosts):
    with jax.set_mesh(parallel.host_mesh(hosts, 0)):
        graph, params = decoder.abstract(decoder.Policy, CONFIG)
    return graph, params["decoder"]["layers"]


def test_an_actor_that_does_not_fit_its_devices_is_refused_with_the_figures():
    told = (
        r"acting with qwen2 3584x28 in bfloat16 takes 15.23 GB of weights and 3.76 GB of KV caches on each device,"
        r" which has 16.00 GB; raise mesh.actor_tensor"
    )
    with pytest.raises(ValueError, match=told):
        engine_lib.check_memory(15_230_000_000, 3_760_000_000, 16_000_000_000, what="qwen2 3584x28 in bfloat16")
    engine_lib.check_memory(12_000_000_000, 3_760_000_000, 16_000_000_000, what="")
    beside = r"KV caches on each device beside 9.90 GB of the learner, which has 15.75 GB; .* in learner.offload"
    with pytest.raises(ValueError, match=beside):
        engine_lib.check_memory(3_800_000_000, 3_760_000_000, 15_750_000_000, beside=9_900_000_000, what="")
    engine_lib.check_memory(10**15, 10**15, None, what="")  # a backend that does not tell


def test_bytes_are_counted_for_each_device(host_params):
    """A copy over two devices: each holds half of what is split, and all of the norms."""
    handing, params = over(meshes.make(2, 2, 2), 2, host_params)
    on_first = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )
    assert parallel.device_bytes(handing.params) == on_first < sum(x.nbytes for x in jax.tree.leaves(host_params))
