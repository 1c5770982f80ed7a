r"""Writes a checkpoint's policy as a Hugging Face directory, which transformers and serving engines load.

python -m searchr1_jax.export --config=configs/quickstart.py --workdir=runs/quickstart --output=runs/quickstart/export

The directory appears when it is whole; an existing one is replaced only with --overwrite.
"""

from __future__ import annotations

import pathlib

from absl import flags

from searchr1_jax import metrics
from searchr1_jax import setup

_CONFIG, _WORKDIR = setup.define_flags()
_OUTPUT = flags.DEFINE_string("output", None, "directory to write", required=True)
_STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace what is there")


def main(argv):
    del argv
    config, output = _CONFIG.value, pathlib.Path(_OUTPUT.value)
    if output.exists() and not _OVERWRITE.value:
        raise ValueError(f"{output} exists; choose another --output or add --overwrite")
    with setup.session(config, _WORKDIR.value, create=False) as workdir, metrics.verb(workdir, "export"):
        model, tokens, params, origin = setup.policy(config, workdir, step=_STEP.value)
        setup.save_model(output, model, tokens, params)
        metrics.say(f"wrote {origin} as {output}")


if __name__ == "__main__":
    setup.run(main)
