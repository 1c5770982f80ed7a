"""What a decoder looks like: the family it is of, and the shape and constants of one model of it.

Families are in `families/`, a file each; `catalog` lists them and tells which of them a config.json is of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """What distinguishes one family of decoders from another. A family equals itself alone."""

    name: str  # model_type of config.json
    architecture: str  # class name in transformers
    # The model that a parsed config.json describes; raises ValueError for what is not implemented, KeyError for what
    # is missing. And the entries of config.json that describe a model, without those that are every family's.
    read: Callable[[Family, Mapping[str, Any]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    # Our parameter, dotted → the checkpoint's tensor, with {layer} where each layer has one, and how many of our
    # dimensions (layers aside) make its first.
    tensors: Mapping[str, tuple[str, int]]
    # The blocks.
    attention_bias: bool = False  # biases on the q, k and v projections
    qk_norm: bool = False  # RMS norm of every query and key head before the rotary turn
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # published: name → ModelConfig's


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretch of the slow rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one decoder; the dimension letters are those of `types`."""

    family: Family
    vocab_size: int  # V, rows of the embedding; the tokenizer may use fewer
    width: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    mlp_width: int  # F
    activation: str = "silu"  # of the MLP's gate: a key of `layers.ACTIVATIONS`
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    norm_eps: float
    tied_embeddings: bool  # the output head is the embedding
    max_positions: int

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide over {self.kv_heads} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs")
