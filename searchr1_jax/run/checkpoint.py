"""Checkpoints with Orbax: saved while training goes on, restored onto whatever mesh is in use.

A checkpoint is a few named pytrees ("policy", "policy_optimizer", …), each an item of its own, so that export reads
the policy alone, and a small JSON object (data position and the like). Optimizer states are kept as flat dictionaries
of arrays: their Python types belong to a library version, not to a file.
"""

import pathlib
from typing import Any, Mapping, Self

import jax
import orbax.checkpoint as ocp

_EXTRA = "extra"


def _flat(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


class Checkpoints:
    """The checkpoints of one directory, named by step."""

    def __init__(self, directory: pathlib.Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

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
