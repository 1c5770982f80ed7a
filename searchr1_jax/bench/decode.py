r"""How fast tokens are sampled with their log-probs, in a cache that fits and in one that is far too long.

python -m searchr1_jax.bench.decode [--torch] [--json] [--repeats=5]

A random model of 48M parameters writes 128 tokens after 64 in each of 16 rows, at temperature 1; the prompts' share of
the time is included. Attention looks at what is in use only, so a cache of 1,024 places should cost what one of 192
does. Repeats are interleaved and figures are medians:

    tokens_per_s_192, tokens_per_s_1024   in caches of that length
    torch_tokens_per_s                    Hugging Face `generate` on the same weights, sampled, without log-probs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import console as rich_console

from searchr1_jax.bench import hugging_face
from searchr1_jax.core import parallel
from searchr1_jax.models import config as model_config
from searchr1_jax.models import decoder
from searchr1_jax.models.families import qwen2
from searchr1_jax.rollout import engine as engine_lib
from searchr1_jax.rollout import programs
from searchr1_jax.rollout import sampling
from searchr1_jax.text import protocol
from searchr1_jax.text import stop_table

MODEL = model_config.ModelConfig(
    family=qwen2.FAMILY, vocab_size=32_000, width=512, layers=8, heads=8, kv_heads=4, head_dim=64, mlp_width=2_048,
    rope_theta=1e6, norm_eps=1e-6, tied_embeddings=True, max_positions=4_096,
)  # fmt: skip
ROWS, PROMPT, NEW = 16, 64, 128
CONTEXTS = (192, 1_024)


def make_engine(
    model: model_config.ModelConfig, params: decoder.Params, *, context: int, rows: int, prompt: int, new: int
) -> engine_lib.Engine:
    """An engine that appends all prompts in one call and writes `new` tokens after each in another."""
    engine = engine_lib.Engine(
        model,
        programs.Shapes(
            slots=rows, context=context, decode_tokens=new, extend_rows=rows, extend_chunks=(prompt,), group=1
        ),
        # No token ends a text.
        stop_table.build([b"%d" % i for i in range(model.vocab_size)], protocol.stop_tags(("search",))),
        hosts=parallel.hosts_mesh(jax.sharding.get_mesh(), tensor=1),
        eos_ids=frozenset(),
        max_turn_tokens=new,
        dtype=jnp.float32,
    )
    engine.load(params)
    return engine


def write(engine: engine_lib.Engine, prompts: np.ndarray) -> programs.Written:
    """Everything from prompts, int[rows, T], to new tokens on the host."""
    engine.reset()
    rows = [
        engine_lib.Row(slots=(i,), tokens=known, start=0, pending=last, identities=((0, 0, 0, i),))
        for i, (*known, last) in enumerate(prompts.tolist())
    ]
    engine.extend(rows, engine.shapes.extend_chunks[0])
    return engine.read(engine.decode(sampling.Decoding(), leave_at=engine.shapes.slots))


def measure(repeats: int, *, torch: bool) -> dict[str, float]:
    """All figures."""
    params = decoder.init(decoder.Policy, MODEL, seed=0)
    prompts = np.random.default_rng(0).integers(MODEL.vocab_size, size=(ROWS, PROMPT))
    sizes = {"rows": ROWS, "prompt": PROMPT, "new": NEW}
    engines = {c: make_engine(MODEL, params, context=c, **sizes) for c in CONTEXTS}
    writers: dict[str, Callable[[], Any]] = {
        f"tokens_per_s_{context}": lambda engine=engine: write(engine, prompts) for context, engine in engines.items()
    }
    if torch:
        model = hugging_face.Model(MODEL, params)
        writers["torch_tokens_per_s"] = lambda: model.write(prompts.tolist(), [NEW] * ROWS)
    for writer in writers.values():
        writer()
    rates: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(repeats):
        for name, writer in writers.items():
            began = time.perf_counter()
            writer()
            rates[name].append(ROWS * NEW / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])):
        figures = measure(arguments.repeats, torch=arguments.torch)
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        rich_console.Console(highlight=False).print(f"{name:20} {value:.0f}")


if __name__ == "__main__":
    main()
