"""The TPU compiler accepts the models at their real sizes, for chips that need not be there.

Needs the TPU compiler (`pip install "jax[tpu]"`), not a TPU; skipped without. What it says of memory is exact, so
this is where a weight that is gathered whole, or a layout that is lost, shows up first.
"""

import os
import re

import pytest

pytest.importorskip("libtpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud machine to ask for its topology
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from configs import search_r1  # noqa: E402
from searchr1_jax.core import (
    parallel,  # noqa: E402
    settings,  # noqa: E402
    types,  # noqa: E402
)
from searchr1_jax.learning import update  # noqa: E402
from searchr1_jax.models import (
    catalog,  # noqa: E402
    decoder,  # noqa: E402
)
from searchr1_jax.rollout import (
    hand_over,  # noqa: E402
    programs,  # noqa: E402
)
from searchr1_jax.text import stop_table  # noqa: E402

COMPUTE = decoder.Compute(dtype=jnp.bfloat16, remat=True, attention="splash")
TOKENS = 4096  # of a row, and of a sequence that acts
GIGABYTE = 1e9
SEVEN_B = catalog.SIZES["qwen2.5-7b"]
SHAPES = programs.Shapes(slots=64, context=TOKENS, decode_tokens=32, extend_rows=8, extend_chunks=(64, 512), group=5)


def chips(topology: str):
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compiled(size: str, *, rows: int, tensor: int):
    """Loss and gradient of a model on 16 chips of v5e, compiled; and what a chip would hold of each stacked
    parameter gathered whole, dimensions sorted."""
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=-1, tensor=tensor, devices=chips("v5e:4x4"))):
        graph, params = decoder.abstract(decoder.Policy, catalog.SIZES[size])
        layout = jax.sharding.NamedSharding(jax.sharding.get_mesh(), parallel.spec("batch", None))
        ints, floats = (jax.ShapeDtypeStruct((rows, TOKENS), d, sharding=layout) for d in (jnp.int32, jnp.float32))

        def loss(params, token, position, segment, weight):
            policy = decoder.bind(graph, params)
            logp, entropy = policy.token_statistics(token, position, segment, COMPUTE, temperature=1.0, vocab_chunk=256)
            return jnp.sum(weight * (logp + 0.001 * entropy))

        gradient = jax.jit(jax.value_and_grad(loss))
        _, used = decoder.abstract(decoder.Policy, catalog.SIZES[size], gathered=True)
        stacked = [leaf for leaf in jax.tree.leaves(used["decoder"]["layers"]) if len(leaf.shape) > 2]
        whole = {tuple(sorted(leaf.sharding.shard_shape(leaf.shape))) for leaf in stacked}
        return gradient.lower(params, ints, ints, ints, floats).compile(), whole


def test_the_hand_over_of_a_7b_model_holds_little_more_than_what_it_hands_over():
    """From 16 chips, float32, to the actors of four hosts, bfloat16 over the four chips of each."""
    learner = parallel.make_mesh(data=1, fsdp=-1, tensor=1, devices=chips("v5e:4x4"))
    hosts = parallel.hosts_mesh(learner, tensor=4)
    over = hand_over.HandOver(SEVEN_B, hosts=hosts, actor=parallel.host_mesh(hosts, 0), dtype=jnp.bfloat16)
    with jax.set_mesh(learner):
        _, weights = decoder.abstract(decoder.Policy, SEVEN_B)
        exchange = over.exchange.lower(weights).compile().memory_analysis()
    parts = jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), over.params, over.parts
    )
    with jax.set_mesh(hosts):
        gather = over.gather.lower(parts).compile().memory_analysis()
    handed_over = parallel.device_bytes(over.params)
    assert handed_over == pytest.approx(7.6e9 * 2 / 4, rel=0.01)
    assert exchange.output_size_in_bytes == pytest.approx(handed_over / 4, rel=0.02)
    assert gather.output_size_in_bytes == pytest.approx(handed_over, rel=0.02)
    assert max(exchange.temp_size_in_bytes, gather.temp_size_in_bytes) < 0.2 * handed_over


@pytest.mark.parametrize("chunk", [None, *SHAPES.extend_chunks], ids=["decode", "extend 64", "extend 512"])
def test_acting_with_a_7b_model_on_one_host_copies_no_cache(chunk):
    """64 sequences of 4096 tokens on four chips: the caches are updated in place."""
    actor = parallel.make_mesh(data=1, fsdp=1, tensor=4, devices=chips("v5e:2x2"))
    with jax.set_mesh(actor):
        acting = programs.Programs(
            SEVEN_B, SHAPES, stop_table.build([b"x"] * SEVEN_B.vocab_size, ["</search>", "</answer>"]),
            max_turn_tokens=500, dtype=jnp.bfloat16,
        )  # fmt: skip
        state = acting.abstract_state()
        _, params = decoder.abstract(decoder.Policy, SEVEN_B, jnp.bfloat16, gathered=True)

        def array(*shape, dtype=jnp.int32, axes=()):
            layout = jax.sharding.NamedSharding(actor, parallel.spec(*axes))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

        if chunk is None:
            stops = programs.Stops(array(16, SEVEN_B.vocab_size), array(SEVEN_B.vocab_size, dtype=bool))
            scalars = [array(dtype=dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.int32)]
            program = acting.decode.lower(state, params, stops, *scalars).compile()
        else:
            r, g = SHAPES.extend_rows, SHAPES.group
            shapes = [(r, chunk), (r,), (r,), (r,), (r, g), (r, g)]
            rows = [array(*shape, axes=["batch"] + [None] * (len(shape) - 1)) for shape in shapes]
            identity = array(r, g, 4, dtype=jnp.uint32, axes=("batch", None, None))
            program = acting.extend.lower(state, params, programs.Append(*rows, identity)).compile()
    memory = program.memory_analysis()
    caches = parallel.device_bytes(state.cache)
    assert memory.alias_size_in_bytes > caches  # donated, and taken
    assert memory.temp_size_in_bytes < 0.05 * caches


def test_the_update_of_a_7b_policy_and_value_model_fits_v5e_8x8():
    """The published PPO in bfloat16 over float32 weights, one row of 4096 tokens a chip at once."""
    config = search_r1.get_config("algorithm=ppo")
    config.model.attention = "splash"  # "auto" looks at the machine that compiles
    config.learner.update(micro_batch_rows=64, row_tokens=(TOKENS,))
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=-1, tensor=1, devices=chips("v5e:8x8"))):
        learner = update.Learner(SEVEN_B, settings.Settings.of(config))
        models = [decoder.abstract(kind, SEVEN_B)[1] for kind in (decoder.Policy, decoder.Value)]
        optimizers = [
            jax.eval_shape(optimizer.transformation().init, params)
            for optimizer, params in zip((learner.policy_optimizer, learner.value_optimizer), models, strict=True)
        ]
        state = update.TrainState(models[0], optimizers[0], models[1], optimizers[1])

        def array(dtype, shape=(2, 64, TOKENS), axes=(None, "batch", None)):
            layout = jax.sharding.NamedSharding(jax.sharding.get_mesh(), parallel.spec(*axes[: len(shape)]))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

        ints, bools, floats = map(array, (jnp.int32, bool, jnp.float32))
        number = lambda dtype: array(dtype, shape=())
        batch = types.Batch(
            tokens=ints, segment=ints, position=ints, policy_mask=bools, sampled=bools, response=bools,
            behaviour_logp=floats, turn=ints, reward=floats, weight=floats, trajectory=ints,
            micro_batches=number(jnp.int32),
        )  # fmt: skip
        scores, targets = update.Scores(floats, floats, floats), update.Targets(floats, floats)
        scalars = [number(dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
        memory = learner._update.lower(state, batch, scores, targets, *scalars).compile().memory_analysis()
    weights = sum(parallel.device_bytes(params) for params in models)
    assert weights == pytest.approx((7.6e9 + 7.1e9) * 4 / 64, rel=0.01)
    assert memory.argument_size_in_bytes == pytest.approx(3 * weights, rel=0.01)  # and two moments of each
    assert memory.alias_size_in_bytes == pytest.approx(3 * weights, rel=0.01)  # the state is updated in place
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 10.5 * GIGABYTE  # of 16


def gathered(program) -> list[tuple[int, ...]]:
    """Shapes of what the program's all-gathers make, on each chip."""
    lines = [line for line in program.as_text().splitlines() if re.search(r"= .*\ball-gather(-start)?\(", line)]
    results = (line.split("= ", 1)[1].split("all-gather")[0] for line in lines)
    return [tuple(map(int, dims.split(","))) for text in results for dims in re.findall(r"\[([\d,]+)\]", text)]


@pytest.mark.parametrize(
    "size, rows, tensor, weights_gb, temporaries_gb",
    [
        ("qwen2.5-0.5b", 16, 2, 0.13, 4.0),  # 494M float32 weights over 16 chips
        ("qwen2.5-7b", 16, 1, 2.0, 6.5),  # 7.6B
    ],
)
def test_a_gradient_fits_a_v5e_slice_and_gathers_one_layer_at_a_time(size, rows, tensor, weights_gb, temporaries_gb):
    program, whole = compiled(size, rows=rows, tensor=tensor)
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes < weights_gb * GIGABYTE
    assert memory.output_size_in_bytes < weights_gb * GIGABYTE  # the gradient is split as the weights are
    assert memory.temp_size_in_bytes < temporaries_gb * GIGABYTE

    shapes = {tuple(sorted(shape)) for shape in gathered(program)}
    assert shapes  # weights are gathered at all
    assert not shapes & whole, "a parameter of all layers is gathered at once"
