"""What a sweep is to do: the entries of a config file, what each begins with, and its steps.

    sweep(add) ─ read ─▶ [Entry, …], each with the entry of its base, the same one for all that agree in it

A base is what `prepare` and `sft` make. It has the settings of get_config(""), but for the keys that decide what they
make (`base` in `core.settings`) and are no limits of the machine's: these are the run's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import fnmatch
import hashlib
import json
import pathlib
import re
import runpy
import types
from typing import Any

from searchr1_jax.core import files, settings as settings_lib
from searchr1_jax.run import checks, run_directory

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")  # no dots: <name>.log stands beside <name>/
DONE = "done"  # in an entry's directory: a stamp of each step that succeeded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Settings by name, and the flags that make them."""

    name: str
    flags: tuple[str, ...]
    settings: settings_lib.Settings
    base: Entry | None = None  # that a run begins with; None for a base

    @property
    def steps(self) -> tuple[Step, ...]:
        if self.base is None:
            return MAKE_BASE
        decoding, model = "--decoding=greedy,sampled", "--model={directory}/" + self.settings.sft.output
        return (
            Step(label="evaluate-base", command="evaluate", flags=(model, "--name=base", decoding)),
            Step(label="train", command="train"),
            Step(label="evaluate-final", command="evaluate", flags=("--name=final", decoding)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A command that an entry's directory is taken through."""

    label: str
    command: str
    flags: tuple[str, ...] = ()  # with {directory} for where that is

    def arguments(self, entry: Entry, directory: pathlib.Path) -> list[str]:
        """Those of Python."""
        own = (flag.replace("{directory}", str(directory)) for flag in self.flags)
        return ["-m", f"searchr1_jax.{self.command}", f"--workdir={directory}", *entry.flags, *own]

    def stamp(self, entry: Entry, directory: pathlib.Path) -> None:
        """Leaves in the directory that the step succeeded, and what it was asked."""
        files.write_json(directory / DONE / self.label, [self.command, self.flags, entry.settings.as_json()])

    def changes(self, entry: Entry, directory: pathlib.Path) -> list[str] | None:
        """How what is asked differs from what was done in a directory, in words; None where it was not done."""
        path = directory / DONE / self.label
        if not path.is_file():
            return None
        command, flags, config = json.loads(path.read_text())
        before = run_directory.written(settings_lib.flatten(config), str(path))
        found = [c for c in run_directory.changes(before, entry.settings) if c.rules["base"] or self not in MAKE_BASE]
        asked = [] if (command, *flags) == (self.command, *self.flags) else ["other flags"]
        return [*asked, *map(str, found)]

    def is_done(self, entry: Entry, directory: pathlib.Path) -> bool:
        return self.changes(entry, directory) == []


MAKE_BASE = (Step(label="prepare", command="prepare"), Step(label="sft", command="sft"))


def load(path: pathlib.Path, *names: str) -> Any:
    """What a config file defines; raises ValueError where one of these names is missing, or there is no such file."""
    if not path.is_file():
        raise ValueError(f"--config={path} does not exist; name a file as configs/study.py, without an argument")
    module = types.SimpleNamespace(**runpy.run_path(str(path)))
    if missing := [name for name in names if not hasattr(module, name)]:
        raise ValueError(f"{path} defines no {' and no '.join(missing)}; it needs {', '.join(names)}")
    return module


def read(path: pathlib.Path) -> list[Entry]:
    """The runs of a config file's sweep, all settings checked.

    Raises:
      ValueError: naming the entry, for a name that is taken or no safe name of a directory, an unknown key, a value of
        the wrong type, or settings that cannot work.
    """
    module, found = load(path, "get_config", "sweep"), {}

    def add(name: str, argument: str = "", /, **changes: Any) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"sweep entry {name!r} cannot name a directory; use at most 100 letters, digits, _ and -, and begin"
                " with a letter or digit"
            )
        if name.lower() in found:
            raise ValueError(f"sweep entry {name!r} is there twice; names differ in more than case")
        try:
            run = _entry(name, path, module.get_config, argument, settings_lib.flatten(changes))
            if (start := run.settings.model.path) != (made := run.settings.sft.output):
                raise ValueError(
                    f"model.path is {start!r}, but runs of a sweep start from the base that it makes, sft.output ="
                    f" {made!r}; leave model.path as it is"
                )
            found[name.lower()] = dataclasses.replace(run, base=_base(run, path, module.get_config))
        except ValueError as error:
            raise ValueError(f"sweep entry {name!r}: {error}") from error

    module.sweep(add)
    if not found:
        raise ValueError(f"sweep(add) of {path} adds nothing; call add(name, …) in it")
    return list(found.values())


def _entry(
    name: str, path: pathlib.Path, get_config: Callable[[str], Any], argument: str, changes: Mapping[str, Any]
) -> Entry:
    """An entry with changes by dotted key."""
    settings = settings_lib.Settings.of(get_config(argument)).replace(changes)
    checks.check(settings)
    values = {key.name: key.value for key in settings_lib.keys(settings)}
    config = f"--config={path}:{argument}" if argument else f"--config={path}"
    return Entry(name=name, flags=(config, *(f"--config.{k}={values[k]}" for k in changes)), settings=settings)


def _base(run: Entry, path: pathlib.Path, get_config: Callable[[str], Any]) -> Entry:
    """The entry of a run's base. Its name tells the keys that decide it and are not at their defaults."""
    plain = settings_lib.Settings.of(get_config(""))
    wanted = run_directory.changes(plain, run.settings)
    base = _entry("", path, get_config, "", {c.key: c.now for c in wanted if c.rules["base"] is True})
    chosen = run_directory.changes(settings_lib.Settings(), base.settings)
    decisive = json.dumps({change.key: change.now for change in chosen if change.rules["base"]}, sort_keys=True)
    return dataclasses.replace(base, name=f"_base-{hashlib.sha256(decisive.encode()).hexdigest()[:8]}")


def check(run: Entry, directory: pathlib.Path) -> None:
    """Raises ValueError where a run's directory holds another run, or one that began with another base."""
    run_directory.check(run.settings, directory, accept_changes=False)
    assert run.base is not None
    if changed := MAKE_BASE[-1].changes(run.base, directory):  # a copy of the base's, stamps too
        raise ValueError(
            f"{directory} began with another base ({'; '.join(changed)}); remove that directory, or choose another"
            " --workdir"
        )


def choose(runs: Sequence[Entry], patterns: Sequence[str]) -> list[Entry]:
    """The runs whose name a pattern matches, or all without patterns; raises ValueError for one that matches none."""
    names = [run.name for run in runs]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--only={pattern} matches none of the entries; they are {', '.join(names)}")
    return [run for run in runs if not patterns or any(fnmatch.fnmatchcase(run.name, p) for p in patterns)]
