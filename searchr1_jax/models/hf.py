"""Models in and out of the Hugging Face format: config.json and safetensors.

    directory ─ read_config ─▶ ModelConfig       directory ─ load ─▶ pure dict of sharded arrays
    pure dict ─ save ─▶ directory

Our parameters are those of the checkpoint, stacked over layers, with heads apart from their width: a tensor and its
parameter differ by a reshape, never by a transposition. The whole mapping is the family's `tensors`.
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.core import files, parallel
from searchr1_jax.models import catalog, config as model_config, decoder, tensor_files

_READERS = 4  # threads
_STACKED = "{layer}"  # in the name of a tensor that each layer has
_VALUE_HEAD = "value_head.weight"


Tensors = Mapping[str, tuple[str, int]]  # as `config.Family.tensors`


class _Stored(NamedTuple):
    """A checkpoint's tensor as our parameters see it."""

    path: str  # dotted
    layer: int | None  # None: not stacked
    shape: tuple[int, ...]  # in the file


def _path(key_path: Any) -> str:
    return ".".join(key.key for key in key_path)


def _tensors(config: model_config.ModelConfig, kind: type) -> Tensors:
    """The family's table; the head of a value model is a tensor of ours."""
    table = config.family.tensors
    return {**table, "head": (_VALUE_HEAD, 0)} if kind is decoder.Value else table


def _stored(params: decoder.Params, table: Tensors) -> dict[str, _Stored]:
    """Name → tensor for all parameters, in a fixed order."""
    tensors = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = _path(key_path)
        if path not in table:
            raise ValueError(f"the family has no tensor for {path}; add the row to its `tensors`")
        name, joined = table[path]
        stacked = _STACKED in name
        dims = leaf.shape[stacked:]
        shape = (math.prod(dims[:joined]),) + ((math.prod(dims[joined:]),) if dims[joined:] else ())
        for i in range(leaf.shape[0]) if stacked else [None]:
            tensors[name.format(layer=i)] = _Stored(path, i, shape)
    return tensors


def is_hub_id(name: str) -> bool:
    """Whether a name reads like a model of the Hugging Face hub: owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def directory(name: str) -> pathlib.Path:
    """A model's directory: the name itself, or fetched from the Hugging Face hub, once; ValueError for neither."""
    path = pathlib.Path(name)
    if path.is_dir():
        return path
    if not is_hub_id(name):
        raise ValueError(f"{name!r} is no directory, nor a model id of the hub (owner/name)")
    import huggingface_hub

    files = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub's client raises many kinds; each says why in its own words
        raise ValueError(f"{name!r} is no directory, and the hub did not give it: {error}") from error


def read_json(directory: str | pathlib.Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory; ValueError where there is none."""
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no Hugging Face model directory: it has no config.json; name one that has")
    return files.read_json(path, "fetch or export the model again")


def read_config(directory: str | pathlib.Path, family: str = "") -> model_config.ModelConfig:
    """The model of a Hugging Face directory; family and errors as in `catalog.from_hf`."""
    return catalog.from_hf(read_json(directory), family)


def load(
    directory: str | pathlib.Path,
    config: model_config.ModelConfig | None = None,
    *,
    kind: type = decoder.Policy,
    dtype: jnp.dtype = jnp.float32,
) -> decoder.Params:
    """A model's weights, read as `load_tensors` does.

    A value model takes its body from a policy's checkpoint, and its head too where the checkpoint has one; else the
    head is zero. `config` is what `read_config` gave; None reads it.
    """
    directory = pathlib.Path(directory)
    config = config or read_config(directory)
    where = tensor_files.find(directory)
    _, abstract = decoder.abstract(kind, config, dtype)
    fresh = abstract.pop("head") if kind is decoder.Value and _VALUE_HEAD not in where else None
    # A head that is stored and not read: beside a tied embedding it is that once more, and no value model's.
    tied = kind is decoder.Value or config.tied_embeddings
    unread = tuple(name for path, (name, _) in config.family.tensors.items() if tied and path == "head")
    params = load_tensors(directory, abstract, _tensors(config, kind), where, unread)
    if fresh is not None:
        params["head"] = jax.device_put(np.zeros(fresh.shape, fresh.dtype), fresh.sharding)
    return params


def load_tensors(
    directory: pathlib.Path,
    abstract: decoder.Params,
    table: Tensors,
    where: Mapping[str, tensor_files.StoredTensor],
    unread: tuple[str, ...],
) -> decoder.Params:
    """Each parameter of `abstract` straight into its shards on the mesh in use, one at a time.

    Each process reads the slices that its own devices hold.

    Args:
      where: the tensors of the directory, by the table's names.
      unread: how names begin that may be there besides.
    Raises:
      ValueError: listing all missing, unexpected and wrongly shaped tensors before anything is allocated.
    """
    expected = _stored(abstract, table)
    faults = [f"missing {name}" for name in expected if name not in where]
    unexpected = sorted(set(where) - set(expected))
    faults += [f"unexpected {name}" for name in unexpected if not name.startswith(unread)]
    for name, tensor in expected.items():
        if name in where and where[name].shape != tensor.shape:
            faults.append(f"{name} has shape {list(where[name].shape)}, the model needs {list(tensor.shape)}")
    if faults:
        raise ValueError(f"{directory} does not hold the model of its config.json: " + "; ".join(faults))

    def parameter(key_path, target):
        name, _ = table[_path(key_path)]
        shards: dict[tuple, np.ndarray] = {}  # replicas share what was read

        def shard(index):
            key = tuple((s.start, s.stop) for s in index)
            if key not in shards:
                shards[key] = _read(where, name, target, index)
            return shards[key]

        return jax.block_until_ready(jax.make_array_from_callback(target.shape, target.sharding, shard))

    return jax.tree_util.tree_map_with_path(parameter, abstract)


def _read(where, name: str, target: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> np.ndarray:
    """The slice of a parameter, layer by layer in a few threads: reading lets go of the interpreter."""
    stacked = _STACKED in name
    dims, part = target.shape[stacked:], index[stacked:]
    layers = range(target.shape[0])[index[0]] if stacked else range(1)
    shape = [len(range(size)[cut]) for size, cut in zip(dims, part, strict=True)]
    out = _aligned([len(layers), *shape], target.dtype)

    def read(row):
        where[name.format(layer=layers[row])].read_into(out[row], dims, part)

    with futures.ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read, range(len(layers))))
    return out if stacked else out[0]


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address that JAX's CPU backend takes as it is; elsewhere it would copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)


def save(
    directory: str | pathlib.Path,
    config: model_config.ModelConfig,
    params: decoder.Params,
    *,
    kind: type = decoder.Policy,
    dtype: jnp.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    eos_ids: frozenset[int] = frozenset(),
    stop_strings: tuple[str, ...] = (),
) -> None:
    """Writes weights as a directory that `transformers.AutoModelForCausalLM` loads; `dtype` None keeps their own.

    Tensors are gathered, cast and written one at a time. With several processes all call this with the same
    arguments: everyone takes part in the gathers, the first writes. The stop strings go into generation_config.json, as
    a policy that stops at tags never learned to write an EOS.
    """
    directory = pathlib.Path(directory)
    leaves = {_path(key_path): leaf for key_path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    dtype = np.dtype(dtype or next(iter(leaves.values())).dtype)
    tensors = _stored(params, _tensors(config, kind))

    def gather(name: str) -> np.ndarray:
        tensor, leaf = tensors[name], leaves[tensors[name].path]
        return parallel.to_host(leaf if tensor.layer is None else leaf[tensor.layer]).reshape(tensor.shape)

    if jax.process_index() != 0:
        for name in tensors:
            gather(name)
        return
    directory.mkdir(parents=True, exist_ok=True)
    eos = sorted(eos_ids)
    settings = catalog.to_hf(config, dtype=str(dtype), eos_token_id=eos[0] if eos else None)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"eos_token_id": eos, "stop_strings": list(stop_strings), "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    promised = [(name, tensor.shape, dtype) for name, tensor in tensors.items()]
    tensor_files.write(directory, promised, gather, max_shard_bytes=max_shard_bytes)
