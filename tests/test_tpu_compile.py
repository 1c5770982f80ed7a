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

from searchr1_jax import parallel  # noqa: E402
from searchr1_jax.models import config as model_config  # noqa: E402
from searchr1_jax.models import decoder  # noqa: E402

COMPUTE = decoder.Compute(dtype=jnp.bfloat16, remat=True, attention="splash")
TOKENS = 4096  # of a row
GIGABYTE = 1e9


def compiled(size: str, *, rows: int, tensor: int):
    """Loss and gradient of a model on 16 chips of v5e, compiled; and what a chip would hold of each stacked
    parameter gathered whole, dimensions sorted."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=-1, tensor=tensor, devices=chips)):
        graph, params = decoder.abstract(decoder.Policy, model_config.SIZES[size])
        layout = jax.sharding.NamedSharding(jax.sharding.get_mesh(), parallel.spec("batch", None))
        ints, floats = (
            jax.ShapeDtypeStruct((rows, TOKENS), d, sharding=layout) for d in (jnp.int32, jnp.float32)
        )

        def loss(params, token, position, segment, weight):
            policy = decoder.bind(graph, params)
            logp, entropy = policy.token_statistics(
                token, position, segment, COMPUTE, temperature=1.0, vocab_chunk=256
            )
            return jnp.sum(weight * (logp + 0.001 * entropy))

        gradient = jax.jit(jax.value_and_grad(loss))
        _, used = decoder.abstract(decoder.Policy, model_config.SIZES[size], gathered=True)
        stacked = [leaf for leaf in jax.tree.leaves(used["decoder"]["layers"]) if len(leaf.shape) > 2]
        whole = {tuple(sorted(leaf.sharding.shard_shape(leaf.shape))) for leaf in stacked}
        return gradient.lower(params, ints, ints, ints, floats).compile(), whole


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
