r"""Faults put into small runs of one, two and four processes: what each did, and what became of the run.

python -m searchr1_jax.bench.faults [--processes=1,2,4] [--only=kill] [--json]

A run of three steps in a tiny invented world, on virtual devices, meets each fault once and is started again. Then
its figures and its last checkpoint are compared with those of a run that nothing happened to, bit by bit. A row says

    fault      process/moment: what was done there; or what was done to the workdir in between
    statuses   of the processes: -9 killed, 143 ended by SIGTERM with what was learned saved, 1 an error
    said       the line of the error, if there was one
    seconds    until all processes had ended; after LIMIT_S they are taken to hang
    outcome    equal: started again, it ended as the undisturbed run; refused: by a line of error, before any work
"""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from rich import console as rich_console

from searchr1_jax.bench import measuring
from searchr1_jax.run import command, metrics

LIMIT_S = 600.0  # on any machine; the promise is 60 s where the machine has nothing else to do
STEPS = 3
_TINY = {
    "world.persons": 120, "world.companies": 80, "world.vocab_size": 400, "world.width": 32, "world.layers": 1,
    "world.mlp_width": 48, "rollout.questions": 4, "rollout.samples": 2, "rollout.slots": 8, "rollout.extend_rows": 4,
    "rollout.extend_chunks": (32,), "rollout.context_tokens": 128, "rollout.max_turn_tokens": 12,
    "rollout.max_information_tokens": 24, "rollout.decode_tokens": 4, "learner.steps": STEPS,
    "learner.row_tokens": (128,), "learner.vocab_chunk": 128, "learner.micro_batch_rows": 4,
    "learner.updates_per_rollout": 2, "evaluation.questions": 4, "evaluation.every": 2, "evaluation.first": False,
    "checkpoint.every": 1, "sft.drill_steps": 60, "sft.mixture_steps": 60, "sft.batch": 16, "reward.name": "searches",
    "policy.learning_rate": 1e-5, "retriever.index": "exact", "cluster.heartbeat_s": 20, "cluster.stalled_s": 20.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What came of a fault."""

    fault: str
    processes: int
    statuses: list[int]
    said: str
    seconds: float
    outcome: str


class Drill:
    """A directory with the world, and for each number of processes a run that nothing happened to."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._flags = ["--config=configs/quickstart.py:algorithm=grpo"]
        self._flags += [f"--config.{key}={value}" for key, value in _TINY.items()]
        self._undisturbed: dict[int, pathlib.Path] = {}
        self._world = directory / "world"
        for name in ("prepare", "sft"):
            self._succeed(self.start(name, self._world, 1))

    def start(
        self, name: str, workdir: pathlib.Path, processes: int, *flags: str, fault: str = "", apart: bool = False
    ) -> list[subprocess.Popen]:
        """Starts a command; `apart`: the last process in a workdir of its own."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        devices = f"--xla_force_host_platform_device_count={4 // processes}"
        common = {
            "XLA_FLAGS": f"--xla_backend_optimization_level=0 {devices}", "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(self._directory / "cache"), "NO_PROXY": "127.0.0.1", "FAULT": fault,
            "FAULT_DONE": f"{workdir}.done", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(processes),
        }  # fmt: skip
        started = []
        for process in range(processes):
            place = f"{workdir}-apart" if apart and process == processes - 1 else workdir
            own = {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
            arguments = [name, f"--workdir={place}", *self._flags, *flags, *["--distributed"] * (processes > 1)]
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "searchr1_jax.bench.faulty", *arguments],
                    cwd=command.ROOT,
                    env=os.environ | common | own,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )  # fmt: skip
            )
        return started

    def ended(self, started: list[subprocess.Popen]) -> tuple[list[int], str, float]:
        """Statuses, the first line of error, seconds."""
        began, said = time.monotonic(), []
        for process in started:
            try:
                said.append(process.communicate(timeout=max(1.0, began + LIMIT_S - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                said.append(("", f"error: it hung for {LIMIT_S:.0f} s"))
        lines = [line for _, err in said for line in err.splitlines() if line.startswith("error: ")]
        return [process.wait() for process in started], (lines or [""])[0], time.monotonic() - began

    def _succeed(self, started: list[subprocess.Popen]) -> None:
        said = [process.communicate(timeout=LIMIT_S) for process in started]
        if any(process.returncode for process in started):
            raise RuntimeError(f"a run that nothing happened to failed: {said}")

    def workdir(self, name: str) -> pathlib.Path:
        """A copy of the world."""
        return shutil.copytree(self._world, self._directory / name.replace("/", "-").replace(" ", "_"))

    def undisturbed(self, processes: int) -> pathlib.Path:
        if processes not in self._undisturbed:
            workdir = self.workdir(f"undisturbed {processes}")
            self._succeed(self.start("train", workdir, processes))
            self._undisturbed[processes] = workdir
        return self._undisturbed[processes]

    def outcome(self, workdir: pathlib.Path, processes: int) -> str:
        """Starts the run again without a fault, and compares it."""
        statuses, said, _ = self.ended(self.start("train", workdir, processes))
        if any(statuses):
            return f"did not go on: {statuses} {said}"
        one, other = (_state(each) for each in (workdir, self.undisturbed(processes)))
        return "equal" if one == other else "differs"

    def fault(self, what: str, processes: int) -> Row:
        """A fault of `faulty`: moment:call:process:action."""
        moment, _, process, action = what.split(":")
        workdir = self.workdir(f"{what} {processes}")
        if moment == "restore":  # there has to be something to restore
            self.ended(self.start("train", workdir, processes, fault=f"update:3:{process}:term"))
            pathlib.Path(f"{workdir}.done").unlink()
        statuses, said, seconds = self.ended(self.start("train", workdir, processes, fault=what))
        happened = pathlib.Path(f"{workdir}.done").exists()
        outcome = self.outcome(workdir, processes) if happened else "the moment did not come"
        row: dict[str, Any] = dict(processes=processes, statuses=statuses, said=said, seconds=seconds, outcome=outcome)
        return Row(fault=f"{process}/{moment}: {action}", **row)

    def damage(self, name: str, do: Callable[[pathlib.Path], object]) -> Row:
        """Something is done to the newest checkpoint of a run that is half done."""
        workdir = self.workdir(name)
        statuses, _, _ = self.ended(self.start("train", workdir, 1, fault="update:5:0:kill"))
        steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
        do(workdir / "checkpoints" / str(steps[-1]))
        began = time.monotonic()
        outcome = self.outcome(workdir, 1)
        aside = ", ".join(path.name for path in (workdir / "checkpoints").glob("*.damaged*"))
        seconds = time.monotonic() - began
        return Row(fault=name, processes=1, statuses=statuses, said=aside, seconds=seconds, outcome=outcome)

    def refused(self, name: str, processes: int, workdir: pathlib.Path, *flags: str, **how) -> Row:
        """A start that has to be refused, before anything is written into the workdir."""
        statuses, said, seconds = self.ended(self.start("train", workdir, processes, *flags, **how))
        untouched = not (workdir / "metrics.jsonl").exists() or "runs train" in said
        outcome = "refused" if all(status == 1 for status in statuses) and untouched else "went on"
        return Row(fault=name, processes=processes, statuses=statuses, said=said, seconds=seconds, outcome=outcome)

    def export(self) -> Row:
        workdir = shutil.copytree(self.undisturbed(1), self._directory / "export")
        asked = ("export", workdir, 1, f"--output={workdir}/model")
        statuses, said, seconds = self.ended(self.start(*asked, fault="export:1:0:kill"))
        left, again = (workdir / "model").exists(), self.ended(self.start(*asked))[0]
        whole = again == [0] and (workdir / "model" / "model.safetensors").exists()
        outcome = "equal" if whole and not left else "differs"
        return Row(fault="0/export: kill", processes=1, statuses=statuses, said=said, seconds=seconds, outcome=outcome)

    def second_job(self) -> Row:
        workdir = self.workdir("second job")
        first = self.start("train", workdir, 1, fault="rollout:1:0:hang")
        while not pathlib.Path(f"{workdir}.done").exists():
            time.sleep(0.1)
        try:
            return self.refused("a second job in the workdir", 1, workdir)
        finally:
            first[0].kill()
            first[0].communicate()

    def no_room(self) -> Row | None:
        """A disk of a few MB; None where none may be mounted."""
        place = self._directory / "small"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True).returncode:
            return None
        try:
            workdir = shutil.copytree(self._world, place / "run", ignore=shutil.ignore_patterns("sft", "init"))
            statuses, said, seconds = self.ended(self.start("train", workdir, 1))
            moved = shutil.copytree(workdir, self._directory / "no room")  # onto a disk that has some
        finally:
            subprocess.run(["umount", place])
        outcome = self.outcome(moved, 1)
        return Row(fault="a full disk", processes=1, statuses=statuses, said=said, seconds=seconds, outcome=outcome)


def _state(workdir: pathlib.Path) -> tuple[list, dict[str, bytes]]:
    """metrics.jsonl without what a clock says, and the arrays of the last checkpoint."""
    timed = ("seconds/", "rollout/")
    rows = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in metrics.read(workdir)]
    arrays: dict[str, bytes] = {}
    for item in ("policy", "policy_optimizer"):
        place, reader = workdir.absolute() / "checkpoints" / str(STEPS) / item, ocp.PyTreeCheckpointer()
        metadata: Any = reader.metadata(place).item_metadata
        names = metadata.tree
        as_numpy = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))  # whatever devices wrote it
        tree = reader.restore(place, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        arrays |= {f"{item}/{name}": np.asarray(x).tobytes() for name, x in tree.items()}
    return rows, arrays


def _largest(directory: pathlib.Path) -> pathlib.Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip(directory: pathlib.Path) -> None:
    path = _largest(directory / "policy")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(directory: pathlib.Path) -> None:
    path = _largest(directory / "policy")
    path.write_bytes(path.read_bytes()[:-1])


def _empty(directory: pathlib.Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGE: dict[str, Callable[[pathlib.Path], object]] = {
    "a flipped byte": _flip,
    "a file cut short": _cut,
    "a missing item": lambda directory: shutil.rmtree(directory / "policy_optimizer"),
    "an empty step directory": _empty,
}
ALONE = (
    "rollout:3:0:kill", "rollout:20:0:term", "search:1:0:kill", "update:1:0:kill", "update:4:0:term",
    "update:2:0:error", "save:1:0:kill", "save:2:0:term", "restore:1:0:kill", "restore:1:0:term",
    "evaluation:2:0:kill", "evaluation:3:0:term",
)  # fmt: skip
TOGETHER = (
    "rollout:3:0:kill", "rollout:3:{last}:kill", "rollout:20:{last}:term", "update:3:{last}:kill",
    "update:4:{last}:term", "save:1:{last}:kill", "evaluation:1:{last}:kill", "rollout:2:{last}:error",
    "search:1:{last}:hang",
)  # fmt: skip


def rows(drill: Drill, processes: list[int], only: str):
    """Every fault's row, as it is known."""
    wanted = lambda name: only in name
    for count in processes:
        for what in ALONE if count == 1 else TOGETHER:
            if wanted(what):
                yield drill.fault(what.format(last=count - 1), count)
    if 1 in processes:
        for name, do in DAMAGE.items():
            if wanted(name):
                yield drill.damage(name, do)
        for name, row in {
            "export:kill": drill.export,
            "a second job": drill.second_job,
            "full disk": drill.no_room,
        }.items():
            if wanted(name) and (found := row()) is not None:
                yield found
    if 2 in processes:
        if wanted("a workdir that is not shared"):
            yield drill.refused("a workdir that is not shared", 2, drill.workdir("not shared"), apart=True)


def main():
    given = measuring.flags(__doc__, processes="1,2,4", only="")
    console = rich_console.Console(highlight=False, soft_wrap=True)
    command.quiet_libraries()
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-faults-", ignore_cleanup_errors=True) as directory:
        for row in rows(Drill(pathlib.Path(directory)), list(map(int, given.processes.split(","))), given.only):
            found.append(row)
            if not given.json:
                ended = " ".join(map(str, row.statuses))
                console.print(
                    f"{row.processes}  {row.fault:32} {ended:16} {row.seconds:5.0f} s  {row.outcome}  {row.said[:160]}"
                )
    good = sum(row.outcome in ("equal", "refused") for row in found)
    if given.json:
        print(
            json.dumps({"faults": len(found), "as_promised": good, "rows": [dataclasses.asdict(row) for row in found]})
        )
        return
    console.print(f"{good} of {len(found)} as promised")


if __name__ == "__main__":
    main()
