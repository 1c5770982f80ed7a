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

import collections
import dataclasses
import statistics
import time
from typing import Any, NamedTuple, cast

from searchr1_jax.bench import decode, hugging_face, lockstep, measuring, workload as workload_lib
from searchr1_jax.models import config as model_config, decoder
from searchr1_jax.rollout import episodes, programs, sampling

# 20.4M parameters, 12.3M of them in the embedding; the ratios of widths and heads are near those of Qwen2.5-1.5B.
MODEL = dataclasses.replace(decode.MODEL, width=384, layers=3, heads=6, kv_heads=1)
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
    """The engines of one model and workload, on the mesh in use: one for each kind of schedule, of these shapes."""

    def __init__(
        self,
        model: model_config.ModelConfig,
        workload: workload_lib.Workload,
        *,
        ours: programs.Shapes,
        lockstep: programs.Shapes,
        max_turn_tokens: int,
    ):
        self.workload, options = workload, {"workload": workload, "max_turn_tokens": max_turn_tokens}
        self.params = decoder.init(decoder.Policy, model, seed=workload.settings.seed)
        self.ours, self.lockstep = (
            decode.make_engine(workload_lib.Engine, model, shapes, self.params, **options)
            for shapes in (ours, lockstep)
        )

    @property
    def compiled(self) -> int:
        """Programs so far."""
        return self.ours.compiled + self.lockstep.compiled

    def play(self, kind: type[episodes.Run], *, share: slice = slice(None), budget: int | None = None) -> Played:
        """Runs a schedule over a share of the trajectories; raises ValueError where it wrote others than were drawn."""
        engine, workload = self.ours if kind is episodes.Run else self.lockstep, self.workload
        engine.reset()
        engine.budget = budget
        words = cast(Any, workload_lib.Words())
        rollout = episodes.Rollout(engine, workload_lib.Environment(workload), words, workload.limits())
        rollout.schedule = kind
        began = time.perf_counter()
        trajectories = list(rollout.run(workload.tasks()[share], sampling.Decoding(), seed=0, step=0))
        seconds = time.perf_counter() - began
        tokens = sum(int(trajectory.sampled.sum()) for trajectory in trajectories)
        turns = sum(len(trajectory.turns) for trajectory in trajectories)
        given = [turn.tokens for i in range(len(workload.prompts))[share] for turn in workload.turns_of(i)]
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
        decoding = sampling.Decoding()
        run = lockstep.Cached(engine, None, workload_lib.Words(), self.workload.limits(), decoding, (0, 0))
        run.admit(collections.deque((task, 0) for task in self.workload.tasks()))
        run.extend()
        engine.settle()

        def written():
            engine.decode(decoding, leave_at=engine.shapes.slots)
            engine.settle()

        return measuring.seconds(written) / (tokens * engine.shapes.slots)


def over_torch(
    bench: Bench, torch: hugging_face.Model, ours: Played, *, batch: int, decoded: int = DECODED
) -> tuple[float, float]:
    """Hugging Face's seconds over ours of a decoded token, and of a token of whole episodes.

    It plays the batch of episodes of this number; `ours` is a run of all.
    """
    workload, slots = bench.workload, bench.ours.shapes.slots
    theirs = hugging_face.decode_seconds(torch, workload, slots=slots, tokens=decoded)
    first = batch * slots % len(workload.prompts)
    seconds, tokens = hugging_face.play(torch, workload, share=slice(first, first + slots))
    return theirs / bench.decode_seconds(decoded), seconds / tokens * ours.tokens / ours.seconds


SCHEDULES: dict[str, type[episodes.Run]] = {"ours": episodes.Run, "rerun": lockstep.Rerun, "cached": lockstep.Cached}


def measure(
    bench: Bench, *, repeats: int, torch: hugging_face.Model | None
) -> tuple[dict[str, list[Played]], dict[str, float]]:
    """The runs of each schedule, and the figures."""
    for kind in (episodes.Run, lockstep.Cached):  # one on each engine
        bench.play(kind, share=slice(WARM_UP))
    compiled = bench.compiled
    runs: dict[str, list[Played]] = {name: [] for name in SCHEDULES}
    compared = []
    for repeat in range(repeats):
        for name, kind in SCHEDULES.items():
            runs[name].append(bench.play(kind))
        if torch is not None:
            compared.append(over_torch(bench, torch, runs["ours"][-1], batch=repeat))
    batch = bench.play(lockstep.Rerun, share=slice(bench.ours.shapes.slots), budget=MAX_TURN_TOKENS)
    tokens = bench.workload.sampled_tokens
    runs["reference"] = [batch._replace(seconds=batch.seconds * tokens / batch.tokens, tokens=tokens)] * repeats

    ours, seconds = runs["ours"], {name: [played.seconds for played in some] for name, some in runs.items()}
    over = lambda theirs: measuring.median_ratio(seconds[theirs], seconds["ours"])
    figures = {
        "over_lockstep_rerun": over("rerun"),
        "over_lockstep_cached": over("cached"),
        "over_reference": over("reference"),
        "tokens_per_s": statistics.median(played.tokens / played.seconds for played in ours),
        "occupancy": statistics.median(played.occupancy for played in ours),
        "host_overhead": statistics.median(played.host_overhead for played in ours),
        "wasted_tokens": sum(played.wasted for played in ours),
        "new_programs": bench.compiled - compiled,
    }
    if torch is not None:
        names = ("over_torch_decode", "over_torch_episodes")
        figures |= dict(zip(names, map(statistics.median, zip(*compared, strict=True)), strict=True))
    return runs, figures


def _row(name: str, repeats: list[Played]) -> tuple[str | float, ...]:
    seconds = statistics.median(played.seconds for played in repeats)
    return name, seconds, repeats[0].tokens / seconds, repeats[0].occupancy, repeats[0].wasted


def main():
    given = measuring.flags(__doc__, repeats=3, seed=0, torch=False)
    settings = workload_lib.Settings(seed=given.seed)
    workload, shapes = workload_lib.make(settings, MODEL.vocab_size), {"ours": OURS, "lockstep": LOCKSTEP}
    with measuring.one_device():
        bench = Bench(MODEL, workload, **shapes, max_turn_tokens=MAX_TURN_TOKENS)
        torch = hugging_face.Model(MODEL, bench.params) if given.torch else None
        runs, figures = measure(bench, repeats=given.repeats, torch=torch)
    if not given.json:
        head = ("schedule", "seconds", "tokens/s", "occupancy", "tokens after the tag")
        measuring.table(head, [_row(name, repeats) for name, repeats in runs.items()])
    measuring.tell(dataclasses.asdict(settings), figures, as_json=given.json)


if __name__ == "__main__":
    main()
