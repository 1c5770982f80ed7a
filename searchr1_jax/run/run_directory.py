"""A run's directory: what is looked up in it, which run lives there, and whether another may go on in it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_collections

from searchr1_jax.core import parallel

Config = ml_collections.ConfigDict
TOKENIZER = "tokenizer"  # of a workdir: the files of its policy's tokenizer


def find(name: str, workdir: pathlib.Path, key: str) -> pathlib.Path:
    """A file or directory of the config: in the workdir, else as it is.

    Raises:
      ValueError: naming the config key and both places.
    """
    for path in (workdir / name, pathlib.Path(name)):
        if path.exists():
            return path
    raise ValueError(
        f"{key} is {name!r}, but neither {workdir / name} nor {pathlib.Path(name).absolute()} exists;"
        " set it, or make the files first (in the invented world: python -m searchr1_jax.prepare, then sft)"
    )


def config_of(workdir: pathlib.Path) -> Config:
    """The config that a run wrote into its workdir.

    Raises:
      ValueError: where there is none.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the --workdir of a run, or its --config")
    return ml_collections.ConfigDict(json.loads(path.read_text())).lock()


# Keys that may change when a run goes on in its workdir: they do not change what is learned from a given step on,
# but for the last bits on another mesh.
_FREE = (
    "log.", "evaluation.", "checkpoint.", "mesh.", "learner.offload", "sft.", "data.test", "data.validation",
    "data.demonstrations",
    "retriever.url", "retriever.threads", "retriever.timeout_s", "retriever.attempts", "retriever.backoff_s",
)  # fmt: skip


def as_json(config: Config) -> dict[str, Any]:
    """The resolved config as JSON has it: tuples are lists."""
    return json.loads(config.to_json_best_effort())


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What differs between two JSON objects, by dotted key, in words."""
    before, now = flatten(before), flatten(now)
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return {key: f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in keys}


def check(config: Config, workdir: pathlib.Path) -> None:
    """Compares the config with that of the run that lives here, if one does.

    Raises:
      ValueError: naming the keys in which an earlier run in this workdir differs.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    free = _FREE
    if config.policy.final_lr_fraction == config.value.final_lr_fraction == 1:
        free += ("learner.steps",)  # else the learning rate of every step depends on their number
    found = differences(json.loads(path.read_text()), as_json(config))
    changed = [words for key, words in found.items() if not key.startswith(free)]
    if changed:
        raise ValueError(
            f"{workdir} holds a run with another config ({'; '.join(changed)}); go on with that config or choose"
            " another --workdir"
        )


def acting_differences(config: Config, workdir: pathlib.Path) -> list[str]:
    """In which keys that decide how a policy acts the config differs from that of the run in the workdir, in words."""
    path = workdir / "config.json"
    if not path.exists():
        return []
    found = differences(json.loads(path.read_text()), as_json(config))
    return [words for key, words in found.items() if key.startswith(("tools", "protocol.", "rollout.", "retriever."))]


def invented_world(config: Config) -> dict[str, Any]:
    """All that the files of the invented world depend on, as JSON."""
    return as_json(config)["world"] | {key: as_json(config)[key] for key in ("protocol", "tools")}


def claim(config: Config, workdir: pathlib.Path) -> None:
    """Writes config.json, the resolved config of the run that lives here from now on; the first process does."""
    if not parallel.is_first():
        return
    temporary = workdir / ".config.json"
    temporary.write_text(json.dumps(as_json(config), indent=2) + "\n")
    temporary.replace(workdir / "config.json")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
