"""The families of decoders and their published sizes, and which family a config.json is of.

What no family implements is refused by name, never approximated.
"""

from collections.abc import Mapping
from typing import Any

from searchr1_jax.core import names
from searchr1_jax.models import config as model_config
from searchr1_jax.models.families import llama, qwen2, qwen3

FAMILIES = {family.name: family for family in (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY)}
SIZES = {  # for planning, without files
    size: model_config.ModelConfig(family=family, **fields)
    for family in FAMILIES.values()
    for size, fields in family.sizes.items()
}


def from_hf(config: Mapping[str, Any], family: str = "") -> model_config.ModelConfig:
    """The model of a parsed config.json; ValueError names each thing in it that is not implemented, or what it lacks.

    Args:
      family: model.family of the settings, a user's own; empty: the family is that of config.json's model_type.
    """
    model_type = config.get("model_type")
    if not family and model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not implemented; choose from {list(FAMILIES)}, or name a family of your own"
            " in model.family"
        )
    chosen = names.resolve(family or str(model_type), FAMILIES, "model.family", model_config.Family)
    if chosen.name != model_type:
        raise ValueError(
            f"model.family is {family!r}, which reads model_type {chosen.name!r}, but config.json is of model_type"
            f" {model_type!r}; use a checkpoint of that family, or another model.family"
        )
    try:
        return chosen.read(chosen, config)
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}; fetch or export the model again") from error


def to_hf(config: model_config.ModelConfig, *, dtype: str, eos_token_id: int | None = None) -> dict[str, Any]:
    """config.json of a model; `from_hf` and, where it knows the architecture, transformers read it back."""
    return {
        "architectures": [config.family.architecture],
        "model_type": config.family.name,
        **config.family.write(config),
        **{"dtype": dtype, "torch_dtype": dtype, "bos_token_id": None, "eos_token_id": eos_token_id},
    }
