r"""How fast tokens are sampled with their log-probs, in a cache that fits and in one that is far too long.

python -m searchr1_jax.bench.decode [--json] [--repeats=5]

A random model of 48M parameters writes 128 tokens after 64 in each of 16 rows, at temperature 1; the prompts' share of
the time is included. Attention looks at what is in use only, so a cache of 1,024 places should cost what one of 192
does. Repeats are interleaved and figures are medians:

    tokens_per_s_192, tokens_per_s_1024   in caches of that length
"""

from collections.abc import Callable
import functools
import statistics
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.bench import measuring
from searchr1_jax.core import parallel
from searchr1_jax.models import config as model_config, decoder
from searchr1_jax.models.families import qwen2
from searchr1_jax.rollout import engine as engine_lib, programs, sampling
from searchr1_jax.text import protocol, stop_table

MODEL = model_config.ModelConfig(
    family=qwen2.FAMILY, vocab_size=32_000, width=512, layers=8, heads=8, kv_heads=4, head_dim=64, mlp_width=2_048,
    rope_theta=1e6, norm_eps=1e-6, tied_embeddings=True, max_positions=4_096,
)  # fmt: skip
ROWS, PROMPT, NEW = 16, 64, 128
CONTEXTS = (192, 1_024)

E = TypeVar("E", bound=engine_lib.Engine)


def make_engine(
    kind: Callable[..., E], model: model_config.ModelConfig, shapes: programs.Shapes, params: decoder.Params, **options
) -> E:
    """An engine of that kind in float32, with weights, in which no token ends a text."""
    stops = stop_table.build([b"%d" % i for i in range(model.vocab_size)], protocol.stop_tags(("search",)))
    hosts = parallel.hosts_mesh(jax.sharding.get_mesh(), tensor=1)
    engine = kind(model, shapes, stops, hosts=hosts, eos_ids=frozenset(), dtype=jnp.float32, **options)
    engine.load(params)
    return engine


def writer(
    model: model_config.ModelConfig, params: decoder.Params, *, prompt: int, new: int, questions: int, samples: int = 1,
    context: int | None = None,
) -> engine_lib.Engine:  # fmt: skip
    """An engine that appends all prompts in one call and writes `new` tokens after each in another."""
    shapes = programs.Shapes(
        slots=questions * samples, context=context or prompt + new, decode_tokens=new,
        extend_rows=questions, extend_chunks=(prompt,), group=samples,
    )  # fmt: skip
    return make_engine(engine_lib.Engine, model, shapes, params, max_turn_tokens=new)


def write(engine: engine_lib.Engine, prompts: np.ndarray) -> programs.Written:
    """Everything from prompts, int[questions, T], to new tokens on the host, a row a sample."""
    engine.reset()
    rows, samples = [], range(engine.shapes.group)
    for question, (*known, last) in enumerate(prompts.tolist()):
        slots = tuple(question * len(samples) + sample for sample in samples)
        identities = tuple((0, 0, question, sample) for sample in samples)
        rows.append(engine_lib.Row(slots=slots, tokens=known, start=0, pending=last, identities=identities))
    engine.extend(rows, engine.shapes.extend_chunks[0])
    return engine.read(engine.decode(sampling.Decoding(), leave_at=engine.shapes.slots))


def measure(repeats: int) -> dict[str, float]:
    """All figures."""
    params = decoder.init(decoder.Policy, MODEL, seed=0)
    prompts = np.random.default_rng(0).integers(MODEL.vocab_size, size=(ROWS, PROMPT))
    engines = [writer(MODEL, params, prompt=PROMPT, new=NEW, questions=ROWS, context=c) for c in CONTEXTS]
    runs = {f"tokens_per_s_{e.shapes.context}": functools.partial(write, e, prompts) for e in engines}
    measuring.interleaved(1, runs)  # compiles
    return {name: ROWS * NEW / statistics.median(s) for name, s in measuring.interleaved(repeats, runs).items()}


def main():
    given = measuring.flags(__doc__, repeats=5)
    with measuring.one_device():
        figures = measure(given.repeats)
    measuring.tell({}, figures, as_json=given.json)


if __name__ == "__main__":
    main()
