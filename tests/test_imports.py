"""The house rules that imports can show: floors, one importer per heavy neighbour, one owner of axis names.

`violations` judges one file by its path and source; one test walks the package, the others plant violations.
"""

import ast
import pathlib

import pytest

import searchr1_jax

PACKAGE = "searchr1_jax"

# A room imports from itself and from the floors below; the files of the root are commands, above all rooms.
FLOORS = {
    "core": 0,
    "text": 1,
    "data": 2,
    "models": 2,
    "retrieval": 3,
    "rollout": 4,
    "learning": 4,
    "run": 5,
    "sweeps": 6,
}
COMMANDS = 7  # and bench/

# The one file that imports each heavy neighbour.
NEIGHBOURS = {
    "orbax": "run/checkpoint.py",
    "scann": "retrieval/scann_index.py",
    "tensorflow_datasets": "data/qa.py",
    "grain": "data/stream.py",
    "matplotlib": "run/curves.py",
    "tensorboardX": "run/metrics.py",
    "requests": "retrieval/remote.py",
    "bm25s": "retrieval/bm25.py",
    "Stemmer": "retrieval/bm25.py",
    "starlette": "retrieval/server.py",
    "uvicorn": "retrieval/server.py",
    "safetensors": "models/hf.py",
    "transformers": "text/tokenizer.py",
    "tokenizers": "text/tokenizer.py",
}
AXIS_NAMES, AXIS_OWNER = {"fsdp", "tensor"}, "core/parallel.py"
AXIS_KEYS = "core/settings.py"  # mesh.fsdp and mesh.tensor are keys too
OUTSIDE = {"configs", "tests", "examples"}  # read the package and are never read by it
NO_JAX = {"jax", "jaxlib", "flax", "optax"}
WITHOUT_JAX = {"text", "core/types.py", "core/settings.py", "core/names.py", "core/files.py"}


def violations(path: str, source: str) -> list[str]:
    """What a file of the package does against the rules, a line each.

    Args:
      path: relative to the package's folder, as in "retrieval/remote.py".
      source: its text.
    """
    tree = ast.parse(source)
    own = path.split("/")[0].removesuffix(".py")
    found = []
    if "/" in path and own not in (*FLOORS, "bench"):
        found.append(f"{path}: the folder {own}/ is on no floor; give it one in FLOORS")
    for name, line in _imported(tree, path):
        top, *inner = name.split(".")
        if top == PACKAGE and inner and not (own == inner[0] or _floor(inner[0]) < _floor(own)):
            floors = _floor(own), _floor(inner[0])
            found.append(f"{path}:{line}: {own} (floor {floors[0]}) imports {name} (floor {floors[1]})")
        if top in OUTSIDE:
            found.append(f"{path}:{line}: imports {name} from outside the package")
        if {own, path} & WITHOUT_JAX and (top in NO_JAX or inner[:2] == ["core", "parallel"]):
            found.append(f"{path}:{line}: knows no jax, and imports {name}")
        if NEIGHBOURS.get(top, path) != path and own != "bench":  # a bench may compare with what we don't use
            found.append(f"{path}:{line}: imports {name}, which only {NEIGHBOURS[top]} does")
    if path not in (AXIS_OWNER, AXIS_KEYS):
        for text, line in _strings(tree):
            if text in AXIS_NAMES:
                found.append(f"{path}:{line}: the mesh axis {text!r} is named outside {AXIS_OWNER}")
    return found


def _floor(part: str) -> int:
    return FLOORS.get(part, COMMANDS)


def _imported(tree: ast.Module, path: str) -> list[tuple[str, int]]:
    """Dotted name and line of everything imported, at any depth; names of `from a import b` as "a.b"."""
    package = [PACKAGE, *path.split("/")[:-1]]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        else:
            continue
        found += [(name, node.lineno) for name in names]
    return found


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _strings(tree: ast.Module) -> list[tuple[str, int]]:
    """Value and line of every string in the code; strings that stand alone (docstrings) are not code."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.value, node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    ]


def test_the_package_keeps_the_house_rules():
    root = pathlib.Path(searchr1_jax.__file__).parent
    files = sorted(root.rglob("*.py"))
    assert len(files) > 10
    found = []
    for file in files:
        found += violations(file.relative_to(root).as_posix(), file.read_text())
    assert not found, "\n" + "\n".join(found)


PLANTED = [
    # floors
    ("text/rewards.py", "from searchr1_jax.data import qa", "text (floor 1) imports searchr1_jax.data.qa"),
    ("core/types.py", "from searchr1_jax.text import protocol", "core (floor 0) imports searchr1_jax.text"),
    ("data/qa.py", "from searchr1_jax.retrieval import base", "searchr1_jax.retrieval.base (floor 3)"),
    ("data/qa.py", "from searchr1_jax.models import config", "data (floor 2) imports searchr1_jax.models"),
    ("models/hf.py", "from searchr1_jax.data import packing", "models (floor 2) imports searchr1_jax.data"),
    ("core/parallel.py", "from searchr1_jax.models import config", "imports searchr1_jax.models.config (floor 2)"),
    ("retrieval/base.py", "from searchr1_jax.rollout import engine", "retrieval (floor 3) imports"),
    ("rollout/episodes.py", "from searchr1_jax.learning import losses", "rollout (floor 4) imports"),
    ("learning/update.py", "from searchr1_jax.rollout import engine", "learning (floor 4) imports"),
    ("learning/update.py", "from searchr1_jax.run import checkpoint", "searchr1_jax.run.checkpoint (floor 5)"),
    ("run/evaluation.py", "from searchr1_jax import train", "imports searchr1_jax.train (floor 7)"),
    ("run/parts.py", "from searchr1_jax.sweeps import claims", "imports searchr1_jax.sweeps.claims (floor 6)"),
    ("train.py", "from searchr1_jax import evaluate", "imports searchr1_jax.evaluate (floor 7)"),
    ("train.py", "from searchr1_jax.bench import rollout", "imports searchr1_jax.bench.rollout (floor 7)"),
    ("bench/rollout.py", "from searchr1_jax import train", "bench (floor 7) imports searchr1_jax.train"),
    ("utils/misc.py", "", "the folder utils/ is on no floor"),
    # however an import is written
    ("data/qa.py", "from searchr1_jax import core, rollout", "imports searchr1_jax.rollout"),
    ("data/qa.py", "def f():\n    from searchr1_jax.run import setup", "data/qa.py:2: data (floor 2)"),
    ("data/qa.py", "from ..rollout import engine", "imports searchr1_jax.rollout.engine"),
    ("data/qa.py", "from .. import rollout", "imports searchr1_jax.rollout"),
    ("core/types.py", "from .. import text", "core (floor 0) imports searchr1_jax.text"),
    ("data/qa.py", "importlib.import_module('scann')", "which only retrieval/scann_index.py does"),
    # neighbours
    ("text/stop_table.py", "import jax.numpy as jnp", "text/stop_table.py:1: knows no jax, and imports jax.numpy"),
    ("text/stop_table.py", "from flax import nnx", "knows no jax, and imports flax.nnx"),
    ("text/stop_table.py", "import optax", "knows no jax, and imports optax"),
    (
        "text/rewards.py",
        "from searchr1_jax.core import parallel",
        "knows no jax, and imports searchr1_jax.core.parallel",
    ),
    ("core/settings.py", "import jax", "knows no jax, and imports jax"),
    ("train.py", "import orbax.checkpoint as ocp", "imports orbax.checkpoint, which only run/checkpoint.py does"),
    ("retrieval/base.py", "try:\n    import scann\nfinally:\n    pass", "retrieval/base.py:2: imports scann"),
    ("retrieval/embed.py", "import transformers", "which only text/tokenizer.py does"),
    ("learning/checkpoint.py", "import orbax", "which only run/checkpoint.py does"),
    # outside
    ("train.py", "from configs import base", "imports configs.base from outside the package"),
    ("bench/rollout.py", "import tests.text", "imports tests.text from outside the package"),
    # axis names
    ("models/layers.py", "spec = P(None, 'fsdp')", "models/layers.py:1: the mesh axis 'fsdp' is named"),
    ("models/layers.py", "def f(axis='tensor'):\n    pass", "the mesh axis 'tensor' is named outside"),
]


@pytest.mark.parametrize("path, source, complaint", PLANTED)
def test_a_planted_violation_is_caught(path, source, complaint):
    found = violations(path, source)
    assert len(found) == 1 and complaint in found[0], found


ALLOWED = [
    ("text/tokenizer.py", "import tokenizers\nfrom searchr1_jax.core import types\nfrom . import protocol"),
    ("core/parallel.py", "import jax\nfrom searchr1_jax.core import types\nAXES = ('fsdp', 'tensor')"),
    ("models/decoder.py", "from searchr1_jax.core import parallel, types\nfrom searchr1_jax.models import layers"),
    ("data/packing.py", "from searchr1_jax.core import parallel\nfrom searchr1_jax.text import rewards"),
    ("retrieval/scann_index.py", "import scann\nfrom searchr1_jax.models import encoder\nfrom . import base"),
    ("rollout/episodes.py", "from searchr1_jax.retrieval import base\nfrom . import engine"),
    ("run/evaluation.py", "from searchr1_jax.run import metrics, setup\nfrom searchr1_jax.rollout import episodes"),
    ("sweeps/claims.py", "from searchr1_jax.run import metrics"),
    ("train.py", "from searchr1_jax.run import evaluation\nfrom searchr1_jax.learning import update"),
    ("bench/decode.py", "from searchr1_jax.bench import table\nfrom searchr1_jax.run import setup"),
    ("models/layers.py", '"""fsdp"""\n"fsdp"\nx = "fsdp and tensor in a sentence"\ny = mesh.fsdp'),
    ("models/hf.py", "import safetensors.numpy\nimport scannable\nimport json, grainy"),
]


@pytest.mark.parametrize("path, source", ALLOWED)
def test_what_the_rules_allow_is_not_caught(path, source):
    assert violations(path, source) == []
