"""The frame of every command: its flags, its errors in one line, and the mesh in use while it runs."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import sys
from typing import Any, Callable, Iterator, Sequence

from absl import app
from absl import flags
from absl import logging
import jax
import ml_collections
from ml_collections import config_flags

from searchr1_jax.core import parallel
from searchr1_jax.retrieval import base as retrieval
from searchr1_jax.run import checks

Config = ml_collections.ConfigDict


@functools.cache  # several verbs in one process share them
def define_flags() -> tuple[Any, Any]:
    """--config and --workdir; the config is locked, so a misspelt key fails by name."""
    config = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:key=value,…]", lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "directory of the run; what is missing is made")
    return config, workdir


# What a wrong input, a missing file or package, or a server out of reach raises. Anything else is a fault of ours.
_WRONG_INPUT = (ValueError, OSError, ImportError, FloatingPointError, retrieval.RetrievalError)

_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several processes, as the cluster's variables tell")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where an error came from")


def run(
    main: Callable[[list[str]], None],
    define: Callable[[], None] | None = None,
    *,
    required: Sequence[str] = ("config", "workdir"),
) -> None:
    """Runs a verb. A wrong input ends it with one line, "error: …", and status 1; Ctrl-C with status 130.

    Args:
      define: defines its flags.
      required: flags without which it does not start.
    """
    if define is not None:
        define()
    flags.mark_flags_as_required(required)

    def parsed(argv):
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:  # where a config file raised, the last line of a whole traceback
            sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
        except ModuleNotFoundError as error:  # config files import each other as `configs.…`
            sys.exit(f"error: {error}; start from the repository's root, or put it on PYTHONPATH")
        except (AttributeError, KeyError) as error:  # a key that the locked config lacks
            cause = error.args[0].args[0] if isinstance(error, AttributeError) else error.args[0]
            sys.exit("error: the config has no key " + " ".join(cause.split()))

    def told(argv):
        try:
            if _DISTRIBUTED.value:
                jax.distributed.initialize()
            main(argv)
        except _WRONG_INPUT as error:
            if _TRACEBACK.value:
                raise
            sys.exit(f"error: {error}\n(--traceback shows where it arose)")
        except KeyboardInterrupt:
            sys.stdout.flush()
            os._exit(130)  # at once: a search that hangs in a thread would hold up an ordinary exit

    for flag in flags.FLAGS.get_key_flags_for_module(__name__):  # so that a verb's --help shows them too
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(told, flags_parser=parsed)


@contextlib.contextmanager
def session(
    config: Config, workdir: str | os.PathLike, *, create: bool = True, alone: bool = False
) -> Iterator[pathlib.Path]:
    """Checks the config, makes the workdir, and puts the mesh in use. Yields the workdir.

    Args:
      alone: whether the command is for one process.
    Raises:
      ValueError: for a config that cannot work, or, without `create`, a workdir that does not exist.
    """
    quiet_libraries()
    checks.check(config)
    if not create and not os.path.isdir(workdir):
        raise ValueError(f"--workdir {workdir} does not exist; name the directory of a run, or train one first")
    if alone and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes are running, but this command is for one; start it once, on one host"
        )
    directory = pathlib.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    if config.log.compilation_cache:
        use_compilation_cache()
    mesh = parallel.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    with jax.set_mesh(mesh):
        yield directory


def quiet_libraries() -> None:
    """They tell of every file they touch; we have a voice of our own."""
    logging.set_verbosity(logging.WARNING)


def use_compilation_cache() -> None:
    """Compiled programs are kept in the user's cache directory."""
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(home / "searchr1_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
