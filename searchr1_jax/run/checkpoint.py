"""Checkpoints with Orbax: saved while training goes on, restored onto whatever mesh is in use.

A checkpoint is a few named pytrees ("policy", "policy_optimizer", …), each an item of its own, so that export reads
the policy alone, and a small JSON object (data position and the like). Optimizer states are kept as flat dictionaries
of arrays: their Python types belong to a library version, not to a file.

Orbax restores a flipped byte without a word. So a manifest of sizes and checksums becomes part of each checkpoint
before it gets its name, and a checkpoint is compared with it before it is restored.
"""

from concurrent import futures
import itertools
import pathlib
import time
from typing import Any, Mapping, Self
import zlib

import jax
import orbax.checkpoint as ocp

from searchr1_jax.core import files, parallel
from searchr1_jax.run import metrics

_EXTRA = "extra"
_MANIFEST = "manifest.json"  # path below the checkpoint: bytes, CRC-32
_READ = 1 << 24  # bytes at once


def _flat(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _contents(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files of all items; those beside them are Orbax's books."""
    return sorted(path for path in directory.glob("*/**/*") if path.is_file())


def _sum(path: pathlib.Path) -> list[int]:
    size, checksum = 0, 0
    with open(path, "rb") as file:
        while part := file.read(_READ):
            size, checksum = size + len(part), zlib.crc32(part, checksum)
    return [size, checksum]


class Checkpoints:
    """The checkpoints of one directory, named by step; opened by all processes together.

    From the newest on, those that are damaged are set aside, under another name, until one is whole.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int):
        self._directory, self._saving, self._whole = directory.absolute(), 0, set[int]()
        self._saved_at = time.monotonic()
        finished = ocp.AsyncOptions(post_finalization_callback=self._add_manifest)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, async_options=finished)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        for step in reversed(self.steps):
            if (damage := self._damage(step)) is None:
                self._whole.add(step)
                break
            names = (self._directory / f"{step}.damaged{n or ''}" for n in itertools.count())
            aside = next(path for path in names if not path.exists())
            metrics.say(f"note: checkpoint {self._directory / str(step)} is damaged ({damage}); it is now {aside.name}")
            if parallel.is_first():
                (self._directory / str(step)).rename(aside)
            parallel.gather(None)  # all go on when it is done
            self._manager.reload()

    def older_than(self, seconds: float) -> bool:
        """Whether the last one was begun, or this was opened, so long ago; by the first process's clock, for all."""
        return parallel.gather(time.monotonic() - self._saved_at > seconds)[0]

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, trees: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Starts to save; the arrays may be donated as soon as this returns. None trees are left out."""
        items = {name: ocp.args.StandardSave(_flat(tree)) for name, tree in trees.items() if tree is not None}
        self.wait()
        self._saving, self._saved_at = step, time.monotonic()
        self._manager.save(step, args=ocp.args.Composite(**items, **{_EXTRA: ocp.args.JsonSave(dict(extra))}))

    def restore(self, step: int, like: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The trees named in `like`, in its shapes, dtypes and shardings, and the extra JSON."""
        wanted = {name: jax.tree.map(_abstract, _flat(tree)) for name, tree in like.items() if tree is not None}
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items, **{_EXTRA: ocp.args.JsonRestore()}))
        trees = dict(like)
        for name, flat in wanted.items():
            leaves = [restored[name][key] for key in flat]
            trees[name] = jax.tree.unflatten(jax.tree.structure(like[name]), leaves)
        return trees, restored[_EXTRA]

    def check(self, step: int) -> None:
        """Raises ValueError where a checkpoint is not what was saved; all processes together."""
        if step not in self._whole and (damage := self._damage(step)) is not None:
            raise ValueError(
                f"the checkpoint {self._directory / str(step)} is damaged ({damage}); choose another --step"
            )

    def _add_manifest(self) -> None:
        """Called in the background when everything is written, and the directory has not got its name yet."""
        if parallel.is_first():
            (directory,) = self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            with futures.ThreadPoolExecutor() as pool:
                sums = pool.map(_sum, paths := _contents(directory))
                found = {path.relative_to(directory).as_posix(): each for path, each in zip(paths, sums, strict=True)}
            files.write_json(directory / _MANIFEST, found)

    def _damage(self, step: int) -> str | None:
        """What differs from the manifest, each process having looked at a share of the files; None: nothing."""
        directory = self._directory / str(step)
        try:
            if (directory / _MANIFEST).exists():
                said = files.read_json(directory / _MANIFEST, "it is broken")
                with futures.ThreadPoolExecutor() as pool:
                    mine = list(parallel.mine(sorted(said)))
                    sums = dict(zip(mine, pool.map(lambda name: _sum(directory / name), mine), strict=True))
                wrong = [f"{name} is not what was saved" for name in mine if sums[name] != said[name]]
            else:  # of an earlier version, or an empty directory
                files.read_json(directory / _EXTRA / "metadata", "it is broken")
                wrong = []
        except (OSError, ValueError) as error:
            wrong = [str(error)]
        return next((each[0] for each in parallel.gather(wrong) if each), None)

    def wait(self) -> None:
        """Waits for what is being saved."""
        self._manager.wait_until_finished()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        """Waits for what is being saved, also when an error is on its way out."""
        self.close()

    def close(self) -> None:
        """Waits for what is being saved, and ends."""
        self.wait()
        self._manager.close()
