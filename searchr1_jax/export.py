r"""Writes a checkpoint's policy as a Hugging Face directory, which transformers and serving engines load.

python -m searchr1_jax.export --workdir=runs/quickstart --output=runs/quickstart/export

It needs the workdir alone, where the run's config is too; --config stands in for that one. The directory appears when
it is whole; an existing one is replaced only with --overwrite.
"""

import os
import pathlib

from absl import flags
import jax.numpy as jnp

from searchr1_jax.core import settings as settings_lib
from searchr1_jax.run import command, metrics, model_card, model_files, run_directory


def run(
    settings: settings_lib.Settings,
    workdir: str | os.PathLike,
    output: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_gb: float = 5.0,
    value: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes the directory `output`; the arguments are the flags of the same names.

    Raises:
      ValueError: where `output` is taken, or there is no such checkpoint.
    """
    home, output = pathlib.Path(workdir), pathlib.Path(output)
    if home.resolve().is_relative_to(output.resolve()) or output.is_file():
        raise ValueError(f"--output {output} is a file or holds the run itself; name a directory of its own")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; choose another --output or add --overwrite")
    if output.exists() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise ValueError(f"{output} exists and is no exported model, so it is not replaced; choose another --output")
    with command.session(settings, workdir, create=False, learns=False) as home, metrics.booked(home, "export"):
        policy = model_files.load(settings, home, step=step)
        critic = model_files.restore(settings, home, "value", step=step)[2] if value else None
        own = run_directory.settings_of(home) if (home / run_directory.CONFIG).exists() else settings
        assert policy.about is not None  # it is a checkpoint's
        model_files.save(
            output,
            policy.model,
            policy.tokens,
            policy.params,
            tools=policy.about.tools,
            value=critic,
            dtype=jnp.dtype(dtype) if dtype else None,
            max_shard_gb=max_shard_gb,
            card=model_card.text(home, own, policy.about, name=output.name),
        )
        metrics.say(f"wrote {policy.origin} as {output}")


def define() -> None:
    command.define_settings()
    flags.DEFINE_string("output", None, "directory to write", required=True)
    flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
    flags.DEFINE_enum("dtype", None, settings_lib.DTYPES, "of the files; default: the weights'")
    flags.DEFINE_float("max_shard_gb", 5.0, "10⁹ bytes of one file at most", lower_bound=1e-6)
    flags.DEFINE_bool("value", False, "write the value model too, into <output>/value")
    flags.DEFINE_bool("overwrite", False, "replace what is there")


def main() -> None:
    asked = command.values("step", "dtype", "max_shard_gb", "value", "overwrite")
    run(command.settings(), flags.FLAGS.workdir, flags.FLAGS.output, **asked)


if __name__ == "__main__":
    command.run(main, define)
