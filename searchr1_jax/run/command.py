"""The frame of every command: its flags, its errors in one line, and the mesh in use while it runs.

A command is a module of the package's root: `run` is a function of plain arguments, `define` defines the flags, and
`main` calls `run` with them. Importing it defines nothing, so that all can be used in one process.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import pathlib
import re
import sys
import traceback
from typing import Any
import uuid

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from searchr1_jax.core import cluster, files, parallel, settings as settings_lib
from searchr1_jax.retrieval import base as retrieval
from searchr1_jax.run import acting, checks, run_directory, workdir_config

ROOT = pathlib.Path(__file__).resolve().parents[2]  # of the repository: configs/ stands there

# What a wrong input, a missing file or package, or a server out of reach raises. Anything else is a fault of ours.
_WRONG_INPUT = (ValueError, OSError, ImportError, FloatingPointError, retrieval.RetrievalError, *acting.FAILURES)


def define_settings() -> None:
    """Defines --config and --workdir. Without --config a run's own is taken, where --workdir holds a run."""
    config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:key=value,…]; default: the run's own")
    flags.DEFINE_string("workdir", None, "directory of the run; what is missing is made")


def define_policy() -> None:
    """Defines --model, --step and --retriever: which policy acts, and what answers its searches."""
    flags.DEFINE_string("model", None, "Hugging Face directory; default: the newest checkpoint of the workdir")
    flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
    flags.DEFINE_string("retriever", None, "http://… of a retrieval server; default: the config's")


def values(*names: str) -> dict[str, Any]:
    """Of flags, by their names."""
    return {name: flags.FLAGS[name].value for name in names}


def settings() -> settings_lib.Settings:
    """What --config and --retriever say. Raises ValueError for a key that there is not, or a value it cannot have."""
    if flags.FLAGS.config is None:
        raise ValueError(
            f"--config is missing, and --workdir {flags.FLAGS.workdir} holds no run whose own could be taken; name a"
            " config, as --config=configs/quickstart.py"
        )
    url = flags.FLAGS.retriever if "retriever" in flags.FLAGS else None
    return settings_lib.Settings.of(flags.FLAGS.config).replace({"retriever.url": url} if url else {})


def run(
    main: Callable[..., None],
    define: Callable[[], None],
    *,
    required: Sequence[str] = ("workdir",),
    words: bool = False,
) -> None:
    """Runs a command. A wrong input ends it with one line, "error: …", and status 1; Ctrl-C with status 130.

    Args:
      define: defines its flags.
      required: flags without which it does not start.
      words: whether `main` takes words that stand beside the flags; otherwise they are refused.
    """
    define()
    flags.DEFINE_bool("distributed", False, "one of several processes, as the cluster's variables tell")
    flags.DEFINE_bool("traceback", False, "show where an error came from")
    flags.mark_flags_as_required(required)

    def parsed(argv):
        try:
            return flags.FLAGS(_with_config(argv) if "config" in flags.FLAGS else argv)
        except flags.Error as error:  # where a config file raised, the last line of a whole traceback
            sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
        except (AttributeError, KeyError, TypeError, ImportError, ValueError) as error:  # of a config file or a key
            sys.exit(f"error: {error}")

    def told(argv):
        quiet_libraries()
        try:
            if flags.FLAGS.distributed:
                cluster.start(settings().cluster if "config" in flags.FLAGS else settings_lib.Cluster())
            if argv[1:] and not words:
                raise ValueError(f"{argv[1]!r} is no flag; write each as --name=value")
            main(*argv[1:])
        except _WRONG_INPUT as error:
            cluster.fail(str(error), traceback.format_exc() if flags.FLAGS.traceback else "")
            if flags.FLAGS.traceback:
                raise
            sys.exit(f"error: {error}\n(--traceback shows where it arose)")
        except Exception as error:  # a fault of ours
            cluster.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
        except KeyboardInterrupt:
            sys.stdout.flush()
            os._exit(130)  # at once: a search that hangs in a thread would hold up an ordinary exit

    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("searchr1_jax."):
            for flag in defined:  # so that a command's --help shows them too
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(told, flags_parser=parsed)


def _with_config(argv: Sequence[str]) -> list[str]:
    """The arguments with the path of --config found, or with the config of the run in --workdir where none is given.

    Raises:
      ValueError: for an override of a key that there is not.
    """
    argv, given = list(argv), {}
    known = {key.name for key in settings_lib.keys(settings_lib.Settings())}
    for i, argument in enumerate(argv):
        if found := re.match(r"--?config\.([\w.]+)", argument):
            if found[1] not in known:
                raise ValueError(settings_lib.unknown_key(found[1]))
        elif found := re.fullmatch(r"--?(config|workdir)(?:=(.*))?", argument, re.DOTALL):
            name, value = found.groups()
            given[name] = (i, value) if value is not None else (i + 1, argv[i + 1] if i + 1 < len(argv) else "")
    if "config" in given:
        place, value = given["config"]
        path, colon, argument = value.partition(":")
        path = config_file(path)
        prefix = argv[place].partition("=")[0] + "=" if argv[place].startswith("-") else ""
        argv[place] = f"{prefix}{path}{colon}{argument}"
    elif "workdir" in given and (pathlib.Path(given["workdir"][1]) / run_directory.CONFIG).is_file():
        argv.insert(1, f"--config={config_file(workdir_config.__file__)}:{given['workdir'][1]}")
    return argv


def config_file(name: str) -> pathlib.Path:
    """A config file: as it is named, or from the repository's root; its `configs.…` and `examples.…` are found, too."""
    path = next((p for p in (pathlib.Path(name), ROOT / name) if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"--config names {name}, but neither {pathlib.Path(name).absolute()} nor {ROOT / name} is a file"
        )
    for root in (path.resolve().parent.parent, ROOT):  # a user's own configs/ comes first
        if (root / "configs").is_dir() and str(root) not in sys.path:
            sys.path.append(str(root))
    return path


@contextlib.contextmanager
def session(
    settings: settings_lib.Settings,
    workdir: str | os.PathLike,
    *,
    create: bool = True,
    alone: bool = False,
    learns: bool = True,
) -> Iterator[pathlib.Path]:
    """Checks the settings, makes the workdir, and puts a mesh in use where there is none. Yields the workdir.

    Args:
      alone: whether the command is for one process.
      learns: whether it learns, or makes what is learned from.
    Raises:
      ValueError: for settings that cannot work, or, without `create`, a workdir that does not exist.
    """
    quiet_libraries()
    checks.check(settings, learns=learns)
    if "://" in str(workdir):
        raise ValueError(f"--workdir={workdir} is no directory; mount the bucket (as gcsfuse does) and name the mount")
    if not create and not os.path.isdir(workdir):
        raise ValueError(f"--workdir {workdir} does not exist; name the directory of a run, or train one first")
    if alone and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes are running, but this command is for one; start it once, on one host"
        )
    directory = pathlib.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    _check_shared(directory)
    parallel.agree("the config", settings.as_json())
    if settings.log.compilation_cache:
        use_compilation_cache()
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        mesh = parallel.make_mesh(data=settings.mesh.data, fsdp=settings.mesh.fsdp, tensor=settings.mesh.tensor)
    with jax.set_mesh(mesh):
        yield directory


def _check_shared(directory: pathlib.Path) -> None:
    """Raises ValueError where a process does not see what the first one writes into the directory."""
    if jax.process_count() == 1:
        return
    sign, token = directory / ".shared", parallel.gather(uuid.uuid4().hex)[0]
    if parallel.is_first():
        files.write(sign, token)
    parallel.gather(None)  # it is there now
    seen = parallel.gather((cluster.name(), sign.is_file() and sign.read_text() == token))
    if parallel.is_first():
        sign.unlink()
    if apart := [name for name, sees in seen if not sees]:
        raise ValueError(
            f"--workdir {directory} is not shared: {', '.join(apart)} cannot read what {seen[0][0]} wrote there; name a"
            " directory of a file system that all hosts mount"
        )


def quiet_libraries() -> None:
    """Hides the INFO logs of Orbax, Flax and absl; our own output goes through `metrics.say`."""
    logging.set_verbosity(logging.WARNING)


def use_compilation_cache() -> None:
    """Compiled programs are kept in the user's cache directory."""
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(home / "searchr1_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def commands() -> dict[str, str]:
    """Every command of the package and the first sentence of its docstring."""
    files = sorted(path for path in pathlib.Path(__file__).parents[1].glob("*.py") if not path.stem.startswith("__"))
    documented = {path.stem: ast.get_docstring(ast.parse(path.read_text())) or "" for path in files}
    return {name: text.split("\n")[0] for name, text in documented.items()}
