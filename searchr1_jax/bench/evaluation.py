r"""What the books of a large evaluation take, and that a killed one ends as one that was not.

python -m searchr1_jax.bench.evaluation [--episodes=50000] [--tokens=1450] [--kills=5] [--json]

Synthetic episodes go through `run.evaluation` in a process of its own: undisturbed, then killed at random moments and
started again. No model answers, so the time is the books' alone.

    seconds        of the undisturbed evaluation
    peak_gb        memory of its process at most, the libraries (about 0.6) included
    written_gb     of the file of episodes
    same_figures   1 where the killed one's JSON and episodes are those of the undisturbed one, byte by byte
"""

from collections.abc import Iterator
import multiprocessing
import pathlib
import random
import resource
import tempfile
import time
from typing import Any

import numpy as np

from searchr1_jax.bench import measuring
from searchr1_jax.core import types
from searchr1_jax.rollout import episodes, sampling
from searchr1_jax.run import evaluation


class Synthetic:
    """A rollout that finishes each task at once, with tokens that depend on the question alone."""

    def __init__(self, tokens: int):
        self._tokens = tokens

    def run(self, tasks: list[episodes.Task], *_, **__) -> Iterator[types.Trajectory]:
        for task in tasks:
            rng = np.random.default_rng(int(task.example.id.rpartition("/")[2]))
            right, sampled = bool(rng.integers(2)), rng.random(self._tokens) < 0.5
            sampled[:100] = False
            yield types.Trajectory(
                example=task.example, sample=task.first_sample, sampled=sampled, prompt_tokens=100, tools=("search",),
                tokens=rng.integers(150_000, size=self._tokens, dtype=np.int32),
                behaviour_logp=np.where(sampled, -rng.random(self._tokens, np.float32), 0),
                turns=(types.Turn(text="", event="search", content="x", reply="y" * 2_000),) * int(rng.integers(4)),
                stop_reason="answered", answer="yes" if right else "no",
            )  # fmt: skip


def run(directory: pathlib.Path, count: int, tokens: int) -> tuple[float, float]:
    """The whole evaluation, or what is left of it: its seconds, and the peak memory of this process in 10⁹ bytes."""
    began = time.perf_counter()
    example = lambda i: types.QAExample(id=f"set{i % 7}/{i}", question="?", golden_answers=("yes",), hops=i % 3)
    tasks = [episodes.Task(example=example(i), prompt=(1,), samples=1) for i in range(count)]
    rollout: Any = Synthetic(tokens)
    arguments = {"split": "test", "name": "greedy", "seed": 0, "about": {}, "path": directory / "final-greedy.jsonl"}
    evaluation.evaluate(rollout, tasks, sampling.Decoding(), **arguments).save(directory / "final-greedy.json")
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(directory: pathlib.Path, count: int, tokens: int, kills: int) -> dict[str, float]:
    """All figures."""
    whole, killed = directory / "whole", directory / "killed"
    seconds, peak = measuring.apart(run, whole, count, tokens)
    rng = random.Random(0)
    for _ in range(kills):
        process = multiprocessing.get_context("spawn").Process(target=run, args=(killed, count, tokens))
        process.start()
        parts, there = killed / "final-greedy.parts", lambda: sum(p.stat().st_size for p in parts.glob("0*"))
        goal = there() + rng.random() * (whole / "final-greedy.jsonl").stat().st_size / (kills + 1)
        while there() < goal and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join()
    measuring.apart(run, killed, count, tokens)
    names = ("final-greedy.json", "final-greedy.jsonl")
    same = all((whole / name).read_bytes() == (killed / name).read_bytes() for name in names)
    size = (whole / names[1]).stat().st_size / 1e9
    return {"seconds": seconds, "peak_gb": peak, "written_gb": size, "same_figures": float(same)}


def main():
    given = measuring.flags(__doc__, episodes=50_000, tokens=1_450, kills=5)
    with tempfile.TemporaryDirectory(prefix="bench-evaluation-") as directory:
        figures = measure(pathlib.Path(directory), given.episodes, given.tokens, given.kills)
    asked = {"episodes": given.episodes, "tokens": given.tokens, "kills": given.kills}
    measuring.tell(asked, figures, as_json=given.json)


if __name__ == "__main__":
    main()
