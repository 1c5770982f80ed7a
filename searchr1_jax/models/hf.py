"""Weights in and out of the Hugging Face format: config.json and safetensors.

    directory ─ read_config ─▶ ModelConfig       directory ─ load ─▶ pure dict of sharded arrays
    pure dict ─ save ─▶ directory

Our parameters are stacked over layers and keep heads apart; Hugging Face's linear weights are [out, in], one
tensor a layer. `_TENSORS` is the whole mapping.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from searchr1_jax.models import config as model_config
from searchr1_jax.models import decoder


class _Tensor(NamedTuple):
    """One of our parameters: its name there, and how a tensor of that name (one layer's) is reshaped."""

    name: str
    to_ours: Callable[[np.ndarray, model_config.ModelConfig], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _same(name: str) -> _Tensor:
    return _Tensor(name, lambda x, c: x, lambda x: x)


def _linear(name: str) -> _Tensor:  # [out, in] <-> [in, out]
    return _Tensor(name, lambda x, c: x.T, lambda x: x.T)


def _heads(name: str) -> _Tensor:  # [heads * H, D] <-> [D, heads, H]
    return _Tensor(
        name, lambda x, c: x.T.reshape(c.width, -1, c.head_dim), lambda x: x.reshape(x.shape[0], -1).T
    )


def _head_bias(name: str) -> _Tensor:  # [heads * H] <-> [heads, H]
    return _Tensor(name, lambda x, c: x.reshape(-1, c.head_dim), lambda x: x.reshape(-1))


_LAYER = "model.layers.{layer}."
_TENSORS = {
    ("decoder", "embedding"): _same("model.embed_tokens.weight"),
    ("decoder", "norm"): _same("model.norm.weight"),
    ("head",): _same("lm_head.weight"),
    ("decoder", "layers", "attention_norm"): _same(_LAYER + "input_layernorm.weight"),
    ("decoder", "layers", "wq"): _heads(_LAYER + "self_attn.q_proj.weight"),
    ("decoder", "layers", "wk"): _heads(_LAYER + "self_attn.k_proj.weight"),
    ("decoder", "layers", "wv"): _heads(_LAYER + "self_attn.v_proj.weight"),
    ("decoder", "layers", "bq"): _head_bias(_LAYER + "self_attn.q_proj.bias"),
    ("decoder", "layers", "bk"): _head_bias(_LAYER + "self_attn.k_proj.bias"),
    ("decoder", "layers", "bv"): _head_bias(_LAYER + "self_attn.v_proj.bias"),
    ("decoder", "layers", "wo"): _Tensor(  # [D, N * H] <-> [N, H, D]
        _LAYER + "self_attn.o_proj.weight",
        lambda x, c: x.T.reshape(-1, c.head_dim, c.width),
        lambda x: x.reshape(-1, x.shape[-1]).T,
    ),
    ("decoder", "layers", "mlp_norm"): _same(_LAYER + "post_attention_layernorm.weight"),
    ("decoder", "layers", "gate"): _linear(_LAYER + "mlp.gate_proj.weight"),
    ("decoder", "layers", "up"): _linear(_LAYER + "mlp.up_proj.weight"),
    ("decoder", "layers", "down"): _linear(_LAYER + "mlp.down_proj.weight"),
}


def _path(key_path) -> tuple[str, ...]:
    return tuple(key.key for key in key_path)


def read_config(directory: str | pathlib.Path) -> model_config.ModelConfig:
    """The `ModelConfig` of a Hugging Face directory.

    Raises:
      ValueError: where there is no config.json, or it asks for what is not implemented.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} is no Hugging Face model directory: it has no config.json; set model.path"
        )
    return model_config.from_hf(json.loads(path.read_text()))


def _open_all(directory: pathlib.Path) -> dict[str, Any]:
    """Every tensor name of the directory and the open safetensors file that holds it."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{directory} holds no *.safetensors; set model.path to a Hugging Face model directory"
        )
    where = {}
    for file in files:
        try:
            opened = safetensors.safe_open(file, framework="numpy")
        except Exception as error:
            raise ValueError(
                f"{file} is truncated or no safetensors file: {error}; fetch or export it again"
            ) from error
        where |= {name: opened for name in opened.keys()}
    return where


def load(directory: str | pathlib.Path, *, dtype: jnp.dtype = jnp.float32) -> decoder.Params:
    """A policy's weights, each parameter straight into its shards on the mesh in use.

    Raises:
      ValueError: listing all missing, unexpected and wrongly shaped tensors before anything is allocated.
    """
    directory = pathlib.Path(directory)
    config = read_config(directory)
    where = _open_all(directory)
    _, abstract = decoder.abstract(decoder.Policy, config, dtype)
    _check_tensors(directory, config, abstract, where)

    def parameter(key_path, target):
        path = _path(key_path)
        tensor = _TENSORS[path]

        def read(name):
            return tensor.to_ours(where[name].get_tensor(name), config)

        def shard(index):
            if "layers" not in path:
                return read(tensor.name)[index].astype(dtype)
            chosen = range(config.layers)[index[0]]
            return np.stack([read(tensor.name.format(layer=i))[index[1:]] for i in chosen]).astype(dtype)

        return jax.make_array_from_callback(target.shape, target.sharding, shard)

    return jax.tree_util.tree_map_with_path(parameter, abstract)


def _check_tensors(directory, config, abstract, where) -> None:
    expected = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        path = _path(key_path)
        tensor, stacked = _TENSORS[path], "layers" in path
        one = jax.eval_shape(tensor.to_theirs, jax.ShapeDtypeStruct(leaf.shape[stacked:], leaf.dtype))
        for i in range(config.layers if stacked else 1):
            expected[tensor.name.format(layer=i)] = list(one.shape)
    # A tied head may be stored all the same; it is the embedding once more.
    surplus = set(where) - set(expected) - ({"lm_head.weight"} if config.tied_embeddings else set())
    faults = [f"missing {name}" for name in expected if name not in where]
    faults += [f"unexpected {name}" for name in sorted(surplus)]
    for name, shape in expected.items():
        if name in where and list(where[name].get_slice(name).get_shape()) != shape:
            faults.append(
                f"{name} has shape {where[name].get_slice(name).get_shape()}, config.json says {shape}"
            )
    if faults:
        raise ValueError(f"{directory} does not hold the model of its config.json: " + "; ".join(faults))


def save(
    directory: str | pathlib.Path,
    config: model_config.ModelConfig,
    params: decoder.Params,
    *,
    eos_ids: frozenset[int],
    stop_strings: list[str],
) -> None:
    """Writes host weights as a directory that `transformers.AutoModelForCausalLM` loads.

    Args:
      params: numpy arrays, whole.
      stop_strings: for generation_config.json; a policy that stops at tags never learned to write an EOS.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key_path, value in jax.tree_util.tree_leaves_with_path(params):
        path = _path(key_path)
        tensor = _TENSORS[path]
        if "layers" in path:
            for i, one in enumerate(value):
                tensors[tensor.name.format(layer=i)] = np.ascontiguousarray(tensor.to_theirs(one))
        else:
            tensors[tensor.name] = np.ascontiguousarray(tensor.to_theirs(value))
    dtype = str(next(iter(tensors.values())).dtype)
    eos = sorted(eos_ids)
    settings = model_config.to_hf(config, dtype=dtype, eos_token_id=eos[0] if eos else None)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"eos_token_id": eos, "stop_strings": stop_strings, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    safetensors_numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
