"""A family of one's own: shaped like Llama, with other names for the tensors of its MLP.

    python -m searchr1_jax.train --config=configs/search_r1.py --workdir=runs/mine \
        --config.model.path=mine-1b --config.model.family=examples.family:FAMILY

The config.json of mine-1b says "model_type": "mine". Checkpoints, evaluation and export go by these names too.
"""

import dataclasses

from searchr1_jax.models.families import llama

_MLP = llama.LAYER + "feed_forward."

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="mine",
    architecture="MineForCausalLM",
    tensors=llama.TENSORS
    | {
        "decoder.layers.gate": (_MLP + "w1.weight", 1),
        "decoder.layers.down": (_MLP + "w2.weight", 1),
        "decoder.layers.up": (_MLP + "w3.weight", 1),
    },
)
