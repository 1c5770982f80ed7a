r"""How fast episodes are played: ours against turns in lockstep, same weights, same work, one run.

python -m searchr1_jax.bench.rollout [--torch] [--json] [--repeats=3] [--seed=0]

    ours       `rollout.episodes`: nobody waits for the slowest, caches live on, searches run in threads
    rerun      turns in lockstep that run the whole prefix again, but stop at the tag
    cached     turns in lockstep over live caches, where only the passages are appended
    reference  as `rerun`, but every turn decodes to its budget and the rest is thrown away; for information, on the
               first batch only, its seconds scaled to all
    torch      Hugging Face `generate`, turn by turn, one batch of episodes a repeat (with --torch)

Turn lengths are given, so that all decode the same tokens; see `workload`. The lockstep schedules decode a turn in one
call and never wait for the host; rows and chunks of `extend` are those that were fastest, for all. Repeats are
interleaved, and every ratio is the median of the repeats' ratios of wall times:

    over_lockstep_rerun, over_lockstep_cached   seconds of that schedule / ours
    tokens_per_s     that the policy writes, of ours
    occupancy        share of ours' slots x decode steps that wrote a token
    host_overhead    what ours spends outside waiting for the device / waiting for it; waiting for a retriever while no
                     sequence decodes counts as well
    wasted_tokens    decoded after the tag, of ours
    new_programs     compiled after the warm-up
    over_torch_decode    seconds of a decoded token at full slots, prompts not counted, torch's / ours
    over_torch_episodes  seconds of a token of whole episodes, torch's / ours
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable
import dataclasses
import json
import statistics
import time
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from rich import console as rich_console
from rich import table as rich_table

from searchr1_jax.bench import hugging_face
from searchr1_jax.bench import lockstep
from searchr1_jax.bench import workload as workload_lib
from searchr1_jax.core import parallel
from searchr1_jax.models import config as model_config
from searchr1_jax.models import decoder
from searchr1_jax.models.families import qwen2
from searchr1_jax.rollout import episodes
from searchr1_jax.rollout import programs
from searchr1_jax.rollout import sampling
from searchr1_jax.text import protocol
from searchr1_jax.text import stop_table

# 20.4M parameters, 12.3M of them in the embedding; the ratios of widths and heads are near those of Qwen2.5-1.5B.
MODEL = model_config.ModelConfig(
    family=qwen2.FAMILY, vocab_size=32_000, width=384, layers=3, heads=6, kv_heads=1, head_dim=64, mlp_width=2_048,
    rope_theta=1e6, norm_eps=1e-6, tied_embeddings=True, max_positions=4_096,
)  # fmt: skip
MAX_TURN_TOKENS = 500  # the budget that the reference decodes
WARM_UP = 4  # trajectories
DECODED = 64  # tokens a slot of the comparison of plain decoding

OURS = programs.Shapes(slots=16, context=2_048, decode_tokens=4, extend_rows=1, extend_chunks=(64, 128), group=1)
LOCKSTEP = dataclasses.replace(OURS, decode_tokens=256)


class Played(NamedTuple):
    """One run of a schedule."""

    seconds: float
    tokens: int  # that the policy wrote
    occupancy: float
    host_overhead: float
    wasted: int


class Bench:
    """The engines of one model and workload, on the mesh in use.

    Args:
      ours, lockstep: shapes of the engine that each kind of schedule runs on.
    """

    def __init__(
        self,
        model: model_config.ModelConfig,
        workload: workload_lib.Workload,
        *,
        ours: programs.Shapes,
        lockstep: programs.Shapes,
        max_turn_tokens: int,
    ):
        self.workload = workload
        self.params = decoder.init(decoder.Policy, model, seed=workload.settings.seed)
        # No token ends a turn of itself.
        stops = stop_table.build([b"%d" % i for i in range(model.vocab_size)], protocol.stop_tags(("search",)))
        hosts = parallel.hosts_mesh(jax.sharding.get_mesh(), tensor=1)

        def engine(shapes):
            made = workload_lib.Engine(
                model, shapes, stops, hosts=hosts, eos_ids=frozenset(), max_turn_tokens=max_turn_tokens,
                dtype=jnp.float32, workload=workload,
            )  # fmt: skip
            made.load(self.params)
            return made

        self.ours, self.lockstep = engine(ours), engine(lockstep)

    @property
    def compiled(self) -> int:
        """Programs so far."""
        return self.ours.compiled + self.lockstep.compiled

    def play(self, kind: type[episodes.Rollout], *, share: slice = slice(None), budget: int | None = None) -> Played:
        """Runs a schedule over a share of the trajectories.

        Raises:
          ValueError: where it wrote other tokens or turns than the workload's.
        """
        engine = self.ours if kind is episodes.Rollout else self.lockstep
        engine.reset()
        engine.budget = budget
        rollout = kind(
            engine, workload_lib.Environment(self.workload), cast(Any, workload_lib.Words()), self.workload.limits()
        )
        began = time.perf_counter()
        running = rollout.run(self.workload.tasks()[share], sampling.Decoding(), seed=0, step=0)
        trajectories = list(running)
        seconds = time.perf_counter() - began
        tokens = sum(int(trajectory.sampled.sum()) for trajectory in trajectories)
        turns = sum(len(trajectory.turns) for trajectory in trajectories)
        numbers = range(len(self.workload.prompts))[share]
        given = [turn.tokens for number in numbers for turn in self.workload.turns_of(number)]
        if (tokens, turns) != (sum(given), len(given)):
            raise ValueError(
                f"{kind.__name__} wrote {tokens} tokens in {turns} turns, the workload has {sum(given)} in {len(given)}"
            )
        return Played(
            seconds=seconds,
            tokens=tokens,
            occupancy=rollout.counts.written / rollout.counts.slot_steps,
            host_overhead=(seconds - engine.waited_s) / engine.waited_s,
            wasted=engine.wasted,
        )

    def decode_seconds(self, tokens: int) -> float:
        """Seconds of a decoded token, of all slots together, after the first prompts."""
        engine = self.lockstep
        engine.reset()
        engine.budget = tokens
        run = lockstep.Cached.schedule(
            engine, None, cast(Any, workload_lib.Words()), self.workload.limits(), sampling.Decoding(), (0, 0)
        )
        run.admit(collections.deque((task, 0) for task in self.workload.tasks()))
        run.extend()
        engine.settle()
        began = time.perf_counter()
        engine.decode(sampling.Decoding(), leave_at=engine.shapes.slots)
        engine.settle()
        return (time.perf_counter() - began) / (tokens * engine.shapes.slots)


class Torch:
    """Hugging Face on the same weights."""

    def __init__(self, model: model_config.ModelConfig, bench: Bench, *, decoded: int):
        self._model, self._decoded = hugging_face.Model(model, bench.params), decoded
        self._model.write([[1, 2]], [2])  # what is made at the first call

    def over(self, bench: Bench, ours: Played, *, batch: int) -> tuple[float, float]:
        """Its seconds over ours of a decoded token, and of a token of whole episodes.

        Args:
          ours: a run of all episodes.
          batch: number of the batch of episodes that it plays.
        """
        workload, slots = bench.workload, bench.ours.shapes.slots
        theirs = hugging_face.decode_seconds(self._model, workload, slots=slots, tokens=self._decoded)
        decode = theirs / bench.decode_seconds(self._decoded)
        first = batch * slots % len(workload.prompts)
        seconds, tokens = hugging_face.play(self._model, workload, share=slice(first, first + slots))
        return decode, seconds / tokens * ours.tokens / ours.seconds


SCHEDULES = {"ours": episodes.Rollout, "rerun": lockstep.Rerun, "cached": lockstep.Cached}


def measure(
    bench: Bench, *, repeats: int, budget: int, torch: Torch | None, say: Callable[[str], None]
) -> tuple[dict[str, list[Played]], dict[str, float]]:
    """The runs of each schedule, and the figures.

    Args:
      budget: tokens of a turn of the reference.
      torch: to be compared with, if any.
      say: told what was run.
    """
    for kind in (episodes.Rollout, lockstep.Cached):  # one on each engine
        bench.play(kind, share=slice(WARM_UP))
    compiled = bench.compiled
    runs: dict[str, list[Played]] = {name: [] for name in SCHEDULES}
    over_torch = []
    for repeat in range(repeats):
        for name, kind in SCHEDULES.items():
            played = bench.play(kind)
            say(f"repeat {repeat + 1} of {repeats}: {name} {played.seconds:.1f} s")
            runs[name].append(played)
        if torch is not None:
            over_torch.append(torch.over(bench, runs["ours"][-1], batch=repeat))
            say(f"repeat {repeat + 1} of {repeats}: torch, one batch")
    batch = bench.play(lockstep.Rerun, share=slice(bench.ours.shapes.slots), budget=budget)
    say(f"reference, one batch: {batch.seconds:.1f} s")
    tokens = bench.workload.sampled_tokens
    reference = batch._replace(seconds=batch.seconds * tokens / batch.tokens, tokens=tokens)

    ours = runs["ours"]
    over = lambda theirs: statistics.median(b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True))
    figures = {
        "over_lockstep_rerun": over(runs["rerun"]),
        "over_lockstep_cached": over(runs["cached"]),
        "over_reference": over([reference] * repeats),
        "tokens_per_s": statistics.median(played.tokens / played.seconds for played in ours),
        "occupancy": statistics.median(played.occupancy for played in ours),
        "host_overhead": statistics.median(played.host_overhead for played in ours),
        "wasted_tokens": sum(played.wasted for played in ours),
        "new_programs": bench.compiled - compiled,
    }
    if torch is not None:
        decode, whole = zip(*over_torch, strict=True)
        figures |= {"over_torch_decode": statistics.median(decode), "over_torch_episodes": statistics.median(whole)}
    return runs | {"reference": [reference]}, figures


def _table(runs: dict[str, list[Played]]) -> rich_table.Table:
    table = rich_table.Table(title="median of the repeats; the reference scaled from its first batch")
    for name in ("schedule", "seconds", "tokens/s", "occupancy", "tokens after the tag"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    for name, repeats in runs.items():
        seconds = statistics.median(played.seconds for played in repeats)
        played = repeats[0]
        rate, occupancy = played.tokens / seconds, f"{played.occupancy:.2f}"
        table.add_row(name, f"{seconds:.1f}", f"{rate:.0f}", occupancy, f"{played.wasted}")
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    settings = workload_lib.Settings(seed=arguments.seed)
    workload = workload_lib.make(settings, MODEL.vocab_size)
    console = rich_console.Console(stderr=arguments.json, highlight=False, soft_wrap=True)
    console.print(workload.describe())
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])):
        bench = Bench(MODEL, workload, ours=OURS, lockstep=LOCKSTEP, max_turn_tokens=MAX_TURN_TOKENS)
        torch = Torch(MODEL, bench, decoded=DECODED) if arguments.torch else None
        runs, figures = measure(
            bench, repeats=arguments.repeats, budget=MAX_TURN_TOKENS, torch=torch, say=console.print
        )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(settings) | figures))
        return
    console.print(_table(runs))
    for name, value in figures.items():
        console.print(f"{name:22} {value:.2f}")


if __name__ == "__main__":
    main()
