r"""Writes a checkpoint's policy as a Hugging Face directory, which transformers and serving engines load.

python -m searchr1_jax.export --workdir=runs/quickstart --output=runs/quickstart/export

It needs the workdir alone, where the run's config is too; --config stands in for that one. The directory appears when
it is whole; an existing one is replaced only with --overwrite.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags

from searchr1_jax.models import decoder
from searchr1_jax.run import command
from searchr1_jax.run import curves
from searchr1_jax.run import metrics
from searchr1_jax.run import run_directory
from searchr1_jax.run import setup

_CONFIG, _WORKDIR = command.define_flags()
_OUTPUT = flags.DEFINE_string("output", None, "directory to write", required=True)
_STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "of the files; default: the weights'")
_MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", 5.0, "10⁹ bytes of one file at most", lower_bound=1e-6)
_VALUE = flags.DEFINE_bool("value", False, "write the value model too, into <output>/value")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace what is there")


def main(argv):
    del argv
    output, home = pathlib.Path(_OUTPUT.value), pathlib.Path(_WORKDIR.value)
    if home.resolve().is_relative_to(output.resolve()) or output.is_file():
        raise ValueError(f"--output {output} is a file or holds the run itself; name a directory of its own")
    if output.exists() and not _OVERWRITE.value:
        raise ValueError(f"{output} exists; choose another --output or add --overwrite")
    if output.exists() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise ValueError(f"{output} exists and is no exported model, so it is not replaced; choose another --output")
    config = _CONFIG.value or run_directory.config_of(home)
    with (
        command.session(config, _WORKDIR.value, create=False) as workdir,
        metrics.verb(workdir, "export"),
    ):
        policy = setup.policy(config, workdir, step=_STEP.value)
        value = None
        if _VALUE.value:
            value = setup.restore(config, workdir, "value", decoder.Value, step=_STEP.value)[1]
        path = workdir / "config.json"
        run = json.loads(path.read_text()) if path.exists() else json.loads(config.to_json_best_effort())
        setup.save_model(
            output,
            policy.model,
            policy.tokens,
            policy.params,
            tools=policy.extra["tools"],
            value=value,
            dtype=setup.dtype(_DTYPE.value) if _DTYPE.value else None,
            max_shard_gb=_MAX_SHARD_GB.value,
            card=curves.model_card(workdir, run, name=output.name, **policy.extra),
        )
        metrics.say(f"wrote {policy.origin} as {output}")


if __name__ == "__main__":
    command.run(main, required=("workdir",))
