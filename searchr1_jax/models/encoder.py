"""Text encoders of the BERT family (Devlin et al., 2019), and the classifier that scores a pair of texts.

    tokens, types, lengths ─▶ word + position + type ─▶ norm ─▶ scan over L layers ─▶ hidden[B, T, D]
                                                                    ├─▶ TextModel: one vector a text
                                                                    └─▶ PairModel: one score a pair

E5, BGE and MiniLM are this model with different weights. As in `decoder`, layers are stacked and run under
`jax.lax.scan`, each parameter is declared once, and weights travel as pure dictionaries (`decoder.abstract`, `init`
and `bind` serve both). `read_config` and `load` read the Hugging Face directory; `_TENSORS` is the whole mapping.
"""

import dataclasses
import functools
import pathlib
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from searchr1_jax.core import parallel
from searchr1_jax.models import decoder, hf, layers, tensor_files

_LAYER = "encoder.layer.{layer}."
# Our parameter, dotted → the checkpoint's tensor, as a family's `tensors`.
_TENSORS = {
    "words": ("embeddings.word_embeddings.weight", 1),
    "positions": ("embeddings.position_embeddings.weight", 1),
    "types": ("embeddings.token_type_embeddings.weight", 1),
}
for _weight, _bias, _module, _joined in (
    ("norm", "norm_bias", "embeddings.LayerNorm", 1),
    ("layers.wq", "layers.bq", _LAYER + "attention.self.query", 2),
    ("layers.wk", "layers.bk", _LAYER + "attention.self.key", 2),
    ("layers.wv", "layers.bv", _LAYER + "attention.self.value", 2),
    ("layers.wo", "layers.bo", _LAYER + "attention.output.dense", 1),
    ("layers.attention_norm", "layers.attention_norm_bias", _LAYER + "attention.output.LayerNorm", 1),
    ("layers.up", "layers.up_bias", _LAYER + "intermediate.dense", 1),
    ("layers.down", "layers.down_bias", _LAYER + "output.dense", 1),
    ("layers.mlp_norm", "layers.mlp_norm_bias", _LAYER + "output.LayerNorm", 1),
    ("pooler", "pooler_bias", "pooler.dense", 1),
    ("classifier", "classifier_bias", "classifier", 1),
):
    _TENSORS |= {_weight: (_module + ".weight", _joined), _bias: (_module + ".bias", _joined)}
_PREFIX = "bert."  # of the body's tensors where a head was saved with it
_NO_WEIGHTS = ("embeddings.position_ids", "bert.embeddings.position_ids")  # 0, 1, 2, … in older checkpoints
_HEADS = ("pooler.", "classifier.", "cls.")  # of other purposes; a text's vector needs none


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape and constants of one encoder; the dimension letters are those of `types`."""

    vocab_size: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # N
    mlp_width: int  # F
    max_positions: int
    token_types: int  # 2 where pairs of texts were trained on
    norm_eps: float

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"an encoder's width of {self.width} does not divide over {self.heads} heads")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


# What config.json may ask for, and the one answer implemented; the first value stands where it says nothing.
_IMPLEMENTED = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
}
_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
}


def from_hf(config: dict[str, Any]) -> EncoderConfig:
    """`EncoderConfig` of a parsed config.json; ValueError names each thing that is not implemented or missing."""
    if config.get("model_type") != "bert":
        raise ValueError(
            f"model_type {config.get('model_type')!r} is not implemented as a text encoder;"
            " use one of model_type 'bert', as E5, BGE and MiniLM are"
        )
    faults = [
        f"{key} {config[key]!r} is not implemented, only {known[0]!r}"
        for key, known in _IMPLEMENTED.items()
        if config.get(key, known[0]) not in known
    ]
    faults += [f"no {key}" for key in _SIZES.values() if key not in config]
    if faults:
        raise ValueError("config.json of the text encoder: " + "; ".join(faults))
    return EncoderConfig(**{ours: config[theirs] for ours, theirs in _SIZES.items()})


def read_config(directory: str | pathlib.Path) -> EncoderConfig:
    """The `EncoderConfig` of a Hugging Face directory; errors as in `from_hf`."""
    return from_hf(hf.read_json(directory))


def layer_norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
    """(x − mean) / √(variance + ε) · scale + bias, in float32 whatever the dtype of x (Ba et al., 2016)."""
    x = x_BTD.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * scale_D.astype(jnp.float32) + bias_D.astype(jnp.float32)).astype(x_BTD.dtype)


def _einsum(equation: str, x: jax.Array, y: jax.Array, **options) -> jax.Array:
    """A product in the dtype of x; float32 stays float32 where accelerators would round it to TF32 or bfloat16."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, **options)


class Layers(decoder.Weights):
    """All encoder layers, stacked; called inside the scan, it is one of them."""

    def __init__(self, c: EncoderConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        n, d, heads, h, f = c.layers, c.width, c.heads, c.head_dim, c.mlp_width
        self.config = c
        declare = functools.partial(self.declare, rngs=rngs, dtype=dtype)
        ones, zeros, normal = nnx.initializers.ones, nnx.initializers.zeros, decoder.normal
        for name in ("wq", "wk", "wv"):
            declare(name, shape=(n, heads, h, d), axes=("layers", "heads", "head_dim", "embed"), initialiser=normal(d))
        declare("wo", shape=(n, d, heads, h), axes=("layers", "embed", "heads", "head_dim"), initialiser=normal(d))
        for name in ("bq", "bk", "bv"):
            declare(name, shape=(n, heads, h), axes=("layers", "heads", "head_dim"), initialiser=zeros)
        declare("bo", shape=(n, d), axes=("layers", "norm"), initialiser=zeros)
        declare("attention_norm", shape=(n, d), axes=("layers", "norm"), initialiser=ones)
        declare("attention_norm_bias", shape=(n, d), axes=("layers", "norm"), initialiser=zeros)
        declare("up", shape=(n, f, d), axes=("layers", "mlp", "embed"), initialiser=normal(d))
        declare("up_bias", shape=(n, f), axes=("layers", "mlp"), initialiser=zeros)
        declare("down", shape=(n, d, f), axes=("layers", "embed", "mlp"), initialiser=normal(f))
        declare("down_bias", shape=(n, d), axes=("layers", "norm"), initialiser=zeros)
        declare("mlp_norm", shape=(n, d), axes=("layers", "norm"), initialiser=ones)
        declare("mlp_norm_bias", shape=(n, d), axes=("layers", "norm"), initialiser=zeros)

    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        c, dtype = self.config, x_BTD.dtype
        rows = parallel.spec("batch", None, None)

        q = _einsum("BTD,NHD->BTNH", x_BTD, self.use("wq", dtype)) + self.use("bq", dtype)
        k = _einsum("BTD,NHD->BTNH", x_BTD, self.use("wk", dtype)) + self.use("bk", dtype)
        v = _einsum("BTD,NHD->BTNH", x_BTD, self.use("wv", dtype)) + self.use("bv", dtype)
        scores = _einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * c.head_dim**-0.5
        scores = jnp.where(mask_BT[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        attended = _einsum("BNTS,BSNH->BTNH", weights, v)
        y = _einsum("BTNH,DNH->BTD", attended, self.use("wo", dtype), out_sharding=rows) + self.use("bo", dtype)
        x_BTD = layer_norm(x_BTD + y, self.use("attention_norm"), self.use("attention_norm_bias"), c.norm_eps)

        up = _einsum("BTD,FD->BTF", x_BTD, self.use("up", dtype)) + self.use("up_bias", dtype)
        up = jax.nn.gelu(up, approximate=False)
        y = _einsum("BTF,DF->BTD", up, self.use("down", dtype), out_sharding=rows) + self.use("down_bias", dtype)
        return layer_norm(x_BTD + y, self.use("mlp_norm"), self.use("mlp_norm_bias"), c.norm_eps)


class Body(decoder.Weights):
    """Token ids to hidden states; what `TextModel` and `PairModel` share."""

    def __init__(self, c: EncoderConfig, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = c
        declare = functools.partial(self.declare, rngs=rngs, dtype=dtype)
        d, normal = c.width, decoder.normal(c.width)
        declare("words", shape=(c.vocab_size, d), axes=("vocab", "embed"), initialiser=normal)
        declare("positions", shape=(c.max_positions, d), axes=(None, "embed"), initialiser=normal)
        declare("types", shape=(c.token_types, d), axes=(None, "embed"), initialiser=normal)
        declare("norm", shape=(d,), axes=("norm",), initialiser=nnx.initializers.ones)
        declare("norm_bias", shape=(d,), axes=("norm",), initialiser=nnx.initializers.zeros)
        self.layers = Layers(c, rngs, dtype)

    def hidden(self, token_BT: jax.Array, type_BT: jax.Array, length_B: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The last layer's states, dtype[B, T, D]; those beyond a text's length, from 1 to T, are meaningless.

        Types are 0, or 1 in the second text of a pair.
        """
        c, time = self.config, token_BT.shape[1]
        rows, words_VD = parallel.spec("batch", None, None), self.use("words", dtype)
        if parallel.axis_size("vocab") == 1:  # without a sum over shards, so that no device waits for another
            x_BTD = words_VD.at[token_BT].get(out_sharding=rows)
        else:
            x_BTD = layers.embed(words_VD, token_BT)
        x_BTD = x_BTD + self.use("positions", dtype)[:time]
        x_BTD = x_BTD + self.use("types", dtype).at[type_BT].get(out_sharding=rows)
        x_BTD = layer_norm(x_BTD, self.use("norm"), self.use("norm_bias"), c.norm_eps)
        mask_BT = token_mask(time, length_B)
        graph, stacked = nnx.split(self.layers)
        layer = lambda x_BTD, weights: (nnx.merge(graph, weights)(x_BTD, mask_BT), None)
        return jax.lax.scan(layer, x_BTD, stacked)[0]


class TextModel(Body):
    """One vector a text."""

    def __call__(
        self, token_BT, type_BT, length_B, *, pooling: Literal["mean", "cls"], normalize: bool, dtype: jnp.dtype
    ) -> jax.Array:
        """float32[B, D]: the mean of the text's states, or the first token's; of length 1 where `normalize`."""
        hidden_BTD = self.hidden(token_BT, type_BT, length_B, dtype).astype(jnp.float32)
        vector_BD = hidden_BTD[:, 0]
        if pooling == "mean":
            mask_BT = token_mask(token_BT.shape[1], length_B)
            vector_BD = jnp.sum(jnp.where(mask_BT[..., None], hidden_BTD, 0.0), axis=1) / length_B[:, None]
        if normalize:
            vector_BD = vector_BD / jnp.maximum(jnp.linalg.norm(vector_BD, axis=-1, keepdims=True), 1e-12)
        return vector_BD


class PairModel(Body):
    """One score a pair of texts: classifier · tanh(pooler · first state), a classification with one label."""

    def __init__(self, c: EncoderConfig, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        super().__init__(c, rngs, dtype)
        declare = functools.partial(self.declare, rngs=rngs, dtype=dtype)
        d, zeros = c.width, nnx.initializers.zeros
        declare("pooler", shape=(d, d), axes=(None, "embed"), initialiser=decoder.normal(d))
        declare("pooler_bias", shape=(d,), axes=("norm",), initialiser=zeros)
        declare("classifier", shape=(1, d), axes=(None, "norm"), initialiser=zeros)
        declare("classifier_bias", shape=(1,), axes=("norm",), initialiser=zeros)

    def __call__(self, token_BT: jax.Array, type_BT: jax.Array, length_B: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
        """float32[B], the logit."""
        first_BD = self.hidden(token_BT, type_BT, length_B, dtype)[:, 0]
        pooled_BD = jnp.tanh(_einsum("BD,ED->BE", first_BD, self.use("pooler", dtype)) + self.use("pooler_bias", dtype))
        score_B1 = _einsum("BD,LD->BL", pooled_BD.astype(jnp.float32), self.use("classifier", jnp.float32))
        return (score_B1 + self.use("classifier_bias", jnp.float32))[:, 0]


def token_mask(time: int, length_B: jax.Array) -> jax.Array:
    """bool[B, T], True for the first `length` of each row."""
    return jnp.arange(time) < length_B[:, None]


def load(directory: str | pathlib.Path, *, kind: type = TextModel, dtype: jnp.dtype = jnp.float32) -> decoder.Params:
    """The weights of a directory, on the mesh in use; errors as in `hf.load_tensors`.

    Tensors are found with and without the prefix "bert."; heads that `kind` does not have are left alone.
    """
    directory = pathlib.Path(directory)
    _, abstract = decoder.abstract(kind, read_config(directory), dtype)
    stored = tensor_files.find(directory, without=_NO_WEIGHTS)
    where = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    return hf.load_tensors(directory, abstract, _TENSORS, where, _HEADS)
