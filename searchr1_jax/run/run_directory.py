"""A run's directory: what is looked up in it, which run lives there, and whether another may go on in it."""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import json
import os
import pathlib
import re
import socket
import types
from typing import Any, NamedTuple

from searchr1_jax.core import files, parallel, settings as settings_lib
from searchr1_jax.learning import checks as learning_checks

CONFIG = "config.json"  # of a workdir: the settings of the run that lives there
TOKENIZER = "tokenizer"  # the files of its policy's tokenizer
QUESTIONS = "questions.json"  # the hash of each data set that it learns from
CHANGES = "changes.jsonl"  # what changed when it went on, and at which step


@contextlib.contextmanager
def locked(workdir: pathlib.Path, command: str) -> Iterator[None]:
    """Keeps a second job out while the block runs, also where the first is killed without a word.

    Raises:
      ValueError: on all processes, where another job is at work here.
    """
    path, held, file = workdir / f".{command.replace('/', '-')}.lock", "", None
    if parallel.is_first():
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except BlockingIOError:
            file.seek(0)
            held = file.read() or "another process"
    try:
        if held := parallel.gather(held)[0]:
            raise ValueError(f"{held} runs {command} in {workdir} already; wait for it, or choose another --workdir")
        yield
    finally:
        if file is not None:
            file.close()


def name_and_path(given: str) -> tuple[str, str]:
    """A data set's name and its file, of "nq=path/to/test.jsonl", or of a path alone: "test".

    What is sampled depends on the name and not on where the file lies.
    """
    if named := re.fullmatch(r"([\w.-]+)=(.+)", given):
        return named[1], named[2]
    return pathlib.PurePath(given).stem, given


def find(name: str, workdir: pathlib.Path, key: str) -> pathlib.Path:
    """A file or directory of the settings: in the workdir, else as it is.

    Raises:
      ValueError: naming the key and both places.
    """
    for path in (workdir / name, pathlib.Path(name)):
        if path.exists():
            return path
    raise ValueError(
        f"{key} is {name!r}, but neither {workdir / name} nor {pathlib.Path(name).absolute()} exists;"
        " set it, or make the files first (in the invented world: python -m searchr1_jax.prepare, then sft)"
    )


def settings_of(workdir: pathlib.Path) -> settings_lib.Settings:
    """The settings that a run wrote into its workdir.

    Raises:
      ValueError: where there are none, or they are not of this version.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the --workdir of a run, or its --config")
    return written(settings_lib.flatten(json.loads(path.read_text())), str(path))


def written(flat: Mapping[str, Any], where: str) -> settings_lib.Settings:
    """Settings as they were written, by dotted key.

    A key that has a new name since is read under that; one that was not there yet has its default, and so has one that
    had no effect, which was not refused always.

    Raises:
      ValueError: for a key that this version does not know, or a value that it refuses.
    """
    plain = settings_lib.Settings()
    try:
        found = plain.replace({settings_lib.RENAMED.get(k, k): v for k, v in flat.items()})
    except ValueError as error:
        raise ValueError(f"{where} is of another version: {error}; go on with the version that wrote it") from error
    try:
        ignored = learning_checks.without_effect(found)
    except ValueError:  # an advantage or a loss of the user's own, which is not at hand here
        return found
    return found.replace({key.name: key.value for key in settings_lib.keys(plain) if key.name in ignored})


class Change(NamedTuple):
    """A key in which settings differ from those of a run."""

    key: str
    before: Any
    now: Any
    rules: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} there, {self.now!r} now"


def changes(before: settings_lib.Settings, now: settings_lib.Settings) -> list[Change]:
    """The keys in which the two differ."""
    pairs = zip(settings_lib.keys(before), settings_lib.keys(now), strict=True)
    return [Change(old.name, old.value, new.value, new.rules) for old, new in pairs if old.value != new.value]


def check(settings: settings_lib.Settings, workdir: pathlib.Path, *, accept_changes: bool) -> list[Change]:
    """What has changed since the run that lives here, if one does, and has to be said: see `settings` on `resume`.

    Raises:
      ValueError: naming the keys that may not change, or not unasked.
    """
    if not (workdir / CONFIG).exists():
        return []
    found = [change for change in changes(settings_of(workdir), settings) if not _moved(change)]
    if settings.policy.final_lr_fraction == settings.value.final_lr_fraction == 1:
        # Only where it decays does the learning rate of a step depend on how many there will be.
        found = [change for change in found if change.key != "learner.steps"]
    of = lambda *kinds: [change for change in found if change.rules["resume"] in kinds]
    refused = of(settings_lib.FIXED) or ([] if accept_changes else of(settings_lib.ACCEPTED))
    if refused:
        allowed = "" if of(settings_lib.FIXED) else "add --accept_changes, "
        raise ValueError(
            f"{workdir} holds a run with another config ({'; '.join(map(str, refused))}); go on with that config,"
            f" {allowed}or choose another --workdir"
        )
    return of(settings_lib.ACCEPTED, settings_lib.LAST_BITS)


def _moved(change: Change) -> bool:
    """Whether the same data sets, by name, are read from elsewhere; `check_questions` looks into them."""
    names = lambda given: [name_and_path(each)[0] for each in given]
    return change.key == "data.train" and names(change.before) == names(change.now)


def check_questions(digests: Mapping[str, str], workdir: pathlib.Path) -> None:
    """Raises ValueError where a data set, by its name, holds other questions than when the run here began."""
    if not (workdir / QUESTIONS).exists():
        return
    begun = files.read_json(workdir / QUESTIONS, "choose another --workdir")
    if changed := [name for name, digest in digests.items() if begun.get(name) != digest]:
        raise ValueError(
            f"the questions of {', '.join(changed)} are not those with which the run in {workdir} began; give it the"
            " same files, or choose another --workdir"
        )


def record(workdir: pathlib.Path, found: list[Change], step: int) -> None:
    """Notes changes with which a run goes on after a step; the first process does."""
    if parallel.is_first() and found:
        rows = [{"step": step, "key": change.key, "before": change.before, "now": change.now} for change in found]
        with open(workdir / CHANGES, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def acting_differences(settings: settings_lib.Settings, workdir: pathlib.Path) -> list[str]:
    """Describes how what decides a policy's acting (protocol, rollout, retriever) differs from the run's own config."""
    if not (workdir / CONFIG).exists():
        return []
    return [str(change) for change in changes(settings_of(workdir), settings) if change.rules["acting"]]


def acting_settings(settings: settings_lib.Settings) -> dict[str, Any]:
    """What decides a policy's acting, by dotted key."""
    return {key.name: key.value for key in settings_lib.keys(settings) if key.rules["acting"]}


def world_differences(settings: settings_lib.Settings, workdir: pathlib.Path) -> list[str] | None:
    """How the invented world of the settings differs from the one whose files are here; None where none is."""
    path = workdir / "world.json"
    if not path.exists():
        return None
    plain, there, now = (  # what files of an earlier version don't say was as it is by default
        settings_lib.flatten(world)
        for world in (invented_world(settings_lib.Settings()), json.loads(path.read_text()), invented_world(settings))
    )
    there = plain | there
    keys = sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key))
    return [f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in keys]


def invented_world(settings: settings_lib.Settings) -> dict[str, Any]:
    """All that the files of the invented world depend on, as JSON."""
    whole = settings.as_json()
    return whole["world"] | {key: whole[key] for key in ("protocol", "tools")}


def claim(
    settings: settings_lib.Settings, workdir: pathlib.Path, digests: Mapping[str, str] = types.MappingProxyType({})
) -> None:
    """Writes the settings of the run that lives here from now on, and its questions' hashes; the first process does."""
    if parallel.is_first():
        files.write_json(workdir / QUESTIONS, dict(digests))
        files.write_json(workdir / CONFIG, settings.as_json())
