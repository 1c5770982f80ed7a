"""The policy and the value model: one decoder body, two heads.

    tokens, positions ─▶ embed ─▶ scan over L stacked layers ─▶ final norm ─▶ hidden[B, T, D]
                                                                    ├─▶ Policy: logits, log-probs, entropy
                                                                    └─▶ Value: one number before each token

Layers are stacked along a leading axis and run under `jax.lax.scan`. How a layer attends is the caller's:
`packed` here for rows of a batch, `rollout.kv_cache` for live caches. Each parameter is declared once, with
shape, logical axes and initialiser; `parallel` turns the axes into shardings. Outside this file weights
travel as pure dictionaries of arrays (`init`, `abstract`), and `bind` makes a model of them again.
"""

import dataclasses
import functools
from typing import Any, Callable, Self

from flax import nnx
import jax
import jax.numpy as jnp

from searchr1_jax.core import parallel, settings
from searchr1_jax.models import attention, config as model_config, layers

Params = dict[str, Any]
# (layer index, carry, q[B,T,N,H], k[B,T,K,H], v[B,T,K,H]) -> (attended[B,T,N,H], carry)
Attend = Callable[[jax.Array, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the arithmetic is done; none of it changes what is computed but for rounding."""

    dtype: jnp.dtype  # of weights in use and activations; norms, logits and softmaxes are float32
    remat: bool  # keep only the layers' inputs for the backward pass and compute the rest again
    attention: str  # over packed rows: "auto" or a key of `attention.KERNELS`

    @classmethod
    def of(cls, model: settings.Model) -> Self:
        """As the learner's settings say; ValueError for an attention that there is not."""
        dtype = jnp.dtype(model.compute_dtype)
        attention.choose(model.attention, dtype)  # now, before there is work to lose
        return cls(dtype=dtype, remat=model.remat, attention=model.attention)


def normal(fan_in: int):
    return nnx.initializers.normal(fan_in**-0.5)


class Weights(nnx.Module):
    """A group of parameters; `use` hands one out as the arithmetic wants it."""

    def declare(self, name, rngs, shape, axes, initialiser, dtype):
        setattr(self, name, nnx.Param(initialiser(rngs.params(), shape, dtype), axes=axes))

    def use(self, name: str, dtype=None) -> jax.Array:
        """The parameter gathered over fsdp and cast to the compute dtype."""
        parameter = getattr(self, name)
        weight = parameter.get_value()
        axes = parameter.axes[len(parameter.axes) - weight.ndim :]  # inside the layer scan the leading one is gone
        return parallel.gather_weight(weight if dtype is None else weight.astype(dtype), axes)


class Layers(Weights):
    """All decoder layers, stacked; called inside the scan, it is one of them."""

    def __init__(self, c: model_config.ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        n, d, heads, kv, h, f = c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.mlp_width
        self.config = c
        declare = functools.partial(self.declare, rngs=rngs, dtype=dtype)
        ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
        # As in checkpoints: what a projection makes comes first, what it reads last. So loading never transposes.
        declare("attention_norm", shape=(n, d), axes=("layers", "norm"), initialiser=ones)
        declare("wq", shape=(n, heads, h, d), axes=("layers", "heads", "head_dim", "embed"), initialiser=normal(d))
        declare("wk", shape=(n, kv, h, d), axes=("layers", "kv_heads", "head_dim", "embed"), initialiser=normal(d))
        declare("wv", shape=(n, kv, h, d), axes=("layers", "kv_heads", "head_dim", "embed"), initialiser=normal(d))
        declare("wo", shape=(n, d, heads, h), axes=("layers", "embed", "heads", "head_dim"), initialiser=normal(d))
        if c.family.attention_bias:
            declare("bq", shape=(n, heads, h), axes=("layers", "heads", "head_dim"), initialiser=zeros)
            declare("bk", shape=(n, kv, h), axes=("layers", "kv_heads", "head_dim"), initialiser=zeros)
            declare("bv", shape=(n, kv, h), axes=("layers", "kv_heads", "head_dim"), initialiser=zeros)
        if c.family.qk_norm:
            declare("q_norm", shape=(n, h), axes=("layers", "head_dim"), initialiser=ones)
            declare("k_norm", shape=(n, h), axes=("layers", "head_dim"), initialiser=ones)
        declare("mlp_norm", shape=(n, d), axes=("layers", "norm"), initialiser=ones)
        declare("gate", shape=(n, f, d), axes=("layers", "mlp", "embed"), initialiser=normal(d))
        declare("up", shape=(n, f, d), axes=("layers", "mlp", "embed"), initialiser=normal(d))
        declare("down", shape=(n, d, f), axes=("layers", "embed", "mlp"), initialiser=normal(f))

    def __call__(self, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array, attend) -> tuple[jax.Array, Any]:
        c, dtype = self.config, x_BTD.dtype
        rows = parallel.spec("batch", None, None)

        y = layers.rms_norm(x_BTD, self.use("attention_norm"), c.norm_eps)
        q = jnp.einsum("BTD,NHD->BTNH", y, self.use("wq", dtype))
        k = jnp.einsum("BTD,KHD->BTKH", y, self.use("wk", dtype))
        v = jnp.einsum("BTD,KHD->BTKH", y, self.use("wv", dtype))
        if c.family.attention_bias:
            q, k, v = q + self.use("bq", dtype), k + self.use("bk", dtype), v + self.use("bv", dtype)
        if c.family.qk_norm:
            q = layers.rms_norm(q, self.use("q_norm"), c.norm_eps)
            k = layers.rms_norm(k, self.use("k_norm"), c.norm_eps)
        attended, carry = attend(layers.rotate(q, cos, sin), layers.rotate(k, cos, sin), v)
        x_BTD = x_BTD + jnp.einsum("BTNH,DNH->BTD", attended, self.use("wo", dtype), out_sharding=rows)

        y = layers.rms_norm(x_BTD, self.use("mlp_norm"), c.norm_eps)
        gate = jnp.einsum("BTD,FD->BTF", y, self.use("gate", dtype))
        up = jnp.einsum("BTD,FD->BTF", y, self.use("up", dtype))
        gated = layers.ACTIVATIONS[c.activation](gate) * up
        return x_BTD + jnp.einsum("BTF,DF->BTD", gated, self.use("down", dtype), out_sharding=rows), carry


class Decoder(Weights):
    """Token ids to hidden states."""

    def __init__(self, c: model_config.ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = c
        self.declare("embedding", rngs, (c.vocab_size, c.width), ("vocab", "embed"), normal(c.width), dtype)
        self.layers = Layers(c, rngs, dtype)
        self.declare("norm", rngs, (c.width,), ("norm",), nnx.initializers.ones, dtype)

    def __call__(
        self, token_BT, position_BT, attend: Attend, carry: Any = None, *, dtype: jnp.dtype, remat: bool = False
    ) -> tuple[jax.Array, Any]:
        """Hidden states after each token, dtype[B, T, D], and what `attend` carried from layer to layer."""
        c = self.config
        x_BTD = layers.embed(self.use("embedding", dtype), token_BT)
        cos, sin = layers.rotary_tables(position_BT, c.head_dim, c.rope_theta, c.rope_scaling)
        graph, stacked = nnx.split(self.layers)

        def layer(state, index_and_weights):
            (x_BTD, carry), (index, weights) = state, index_and_weights
            block = nnx.merge(graph, weights)
            return block(x_BTD, cos, sin, lambda q, k, v: attend(index, carry, q, k, v)), None

        body = jax.checkpoint(layer) if remat else layer
        (x_BTD, carry), _ = jax.lax.scan(body, (x_BTD, carry), (jnp.arange(c.layers), stacked))
        return layers.rms_norm(x_BTD, self.use("norm"), c.norm_eps), carry

    def packed(self, token_BT, position_BT, segment_BT, compute: Compute) -> jax.Array:
        """Hidden states *before* each token of packed rows: entry t is what predicts token t.

        This is the one shift between predictions and tokens. The entry of a segment's first token holds another
        segment's state and is never used, since no policy writes a prompt's first token.
        """
        kernel = attention.choose(compute.attention, compute.dtype)

        def attend(index, carry, q, k, v):
            return layers.packed_attention(kernel, q, k, v, segment_BT), carry

        hidden, _ = self(token_BT, position_BT, attend, dtype=compute.dtype, remat=compute.remat)
        return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))


class Policy(Weights):
    """The language model."""

    def __init__(self, c: model_config.ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.decoder = Decoder(c, rngs, dtype)
        if not c.tied_embeddings:
            self.declare("head", rngs, (c.vocab_size, c.width), ("vocab", "embed"), normal(c.width), dtype)

    def output_embedding(self, dtype) -> jax.Array:
        """dtype[V, D], split over the vocabulary."""
        return self.decoder.use("embedding", dtype) if self.decoder.config.tied_embeddings else self.use("head", dtype)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32[B, T, V], split over the vocabulary."""
        head_VD = self.output_embedding(hidden_BTD.dtype)
        return jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)

    def token_statistics(
        self, token_BT, position_BT, segment_BT, compute: Compute, *, temperature, vocab_chunk
    ) -> tuple[jax.Array, jax.Array]:
        """Log-prob of each token given those before it, and entropy of the distribution it came from.

        The distribution is the tempered one. Logits are made `vocab_chunk` positions at a time and made again
        in the backward pass, so that [B, T, V] never exists at once.

        Returns: float32[B, T] and float32[B, T] (nats); a segment's first entry is meaningless.
        """
        before_BTD = self.decoder.packed(token_BT, position_BT, segment_BT, compute)
        batch, time, width = before_BTD.shape
        if time % vocab_chunk:
            raise ValueError(f"rows of {time} tokens are not whole chunks of {vocab_chunk}; set learner.vocab_chunk")
        head_VD = self.output_embedding(compute.dtype)
        chunked = (batch, time // vocab_chunk, vocab_chunk)

        @jax.checkpoint
        def chunk(hidden_BCD, token_BC):
            logits = jnp.einsum("BCD,VD->BCV", hidden_BCD, head_VD, preferred_element_type=jnp.float32)
            logits = logits / temperature
            normaliser = jax.nn.logsumexp(logits, axis=-1)
            # A mask instead of a gather: each shard of the vocabulary looks at its own part.
            chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2, out_sharding=jax.typeof(logits).sharding.spec)
            chosen = jnp.sum(jnp.where(chosen == token_BC[..., None], logits, 0.0), axis=-1)
            expected = jnp.sum(jnp.exp(logits - normaliser[..., None]) * logits, axis=-1)
            return chosen - normaliser, normaliser - expected

        hidden = jnp.moveaxis(before_BTD.reshape(*chunked, width), 1, 0)
        token = jnp.moveaxis(token_BT.reshape(chunked), 1, 0)
        logp, entropy = jax.lax.map(lambda args: chunk(*args), (hidden, token))
        return jnp.moveaxis(logp, 0, 1).reshape(batch, time), jnp.moveaxis(entropy, 0, 1).reshape(batch, time)


class Value(Weights):
    """Expected reward of a trajectory, judged before each of its tokens; a body of its own and a scalar head."""

    def __init__(self, c: model_config.ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.decoder = Decoder(c, rngs, dtype)
        self.declare("head", rngs, (c.width,), ("norm",), nnx.initializers.zeros, dtype)

    def __call__(self, token_BT, position_BT, segment_BT, compute: Compute) -> jax.Array:
        """float32[B, T]; a segment's first entry is meaningless."""
        before_BTD = self.decoder.packed(token_BT, position_BT, segment_BT, compute)
        return jnp.einsum("BTD,D->BT", before_BTD.astype(jnp.float32), self.use("head").astype(jnp.float32))


def abstract(
    kind: type, c: Any, dtype: jnp.dtype = jnp.float32, *, gathered: bool = False
) -> tuple[nnx.GraphDef, Params]:
    """The model's structure, and its weights as `ShapeDtypeStruct`s with their shardings on the mesh in use.

    `c` is the config that the kind takes. `gathered` weights are whole over fsdp, as acting keeps them. ValueError
    where the model does not divide over the mesh.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(c, nnx.Rngs(0), dtype)))
    mesh = jax.sharding.get_mesh()

    def leaf(parameter):
        value = parameter.get_value()
        layout = parallel.param_spec(parameter.axes, value.shape, gathered=gathered)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=jax.sharding.NamedSharding(mesh, layout))

    return graph, nnx.to_pure_dict(jax.tree.map(leaf, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def init(kind: type, c: model_config.ModelConfig, *, seed: int, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random weights, made where they live."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract(kind, c, dtype)[1])
    make = lambda key: nnx.to_pure_dict(nnx.state(kind(c, nnx.Rngs(key), dtype)))
    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))


def bind(graph: nnx.GraphDef, params: Params) -> Any:
    """The model with these weights, to be called inside a jitted function."""
    return nnx.merge(graph, params)
