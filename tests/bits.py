"""Weights to the last bit: compared, and read from files with the safetensors library."""

import pathlib

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy


def stored(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of all files of a directory."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: x for file in files for name, x in safetensors_numpy.load_file(file).items()}


def assert_equal(actual, expected):
    """Two trees of arrays: the same structure, shapes, dtypes and bits, those of NaN and -0 too."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = jax.tree_util.tree_leaves_with_path(actual)
    for (path, a), e in zip(leaves, jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (e.dtype, e.shape), name
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes(), name
