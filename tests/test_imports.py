"""The house rules that imports can show: floors, one importer per heavy neighbour, one owner of axis names.

`violations` judges one file by its path and source; one test walks the package, the others plant violations.
"""

import ast
import pathlib

import pytest

import searchr1_jax

PACKAGE = "searchr1_jax"

# A part is a folder or a top-level file. Top-level files not listed are verbs, on the floor of bench/.
FLOORS = {
    **dict.fromkeys(("__init__", "types", "text"), 0),
    **dict.fromkeys(("parallel", "data", "models"), 1),
    **dict.fromkeys(("retrieval",), 2),
    **dict.fromkeys(("rollout", "learning"), 3),
    **dict.fromkeys(("acting", "checkpoint", "metrics", "evaluation", "report", "preflight"), 4),
    **dict.fromkeys(("finished_runs", "claims"), 4),
    **dict.fromkeys(("run_directory", "setup", "search_engine", "command", "guards", "minibatches"), 4),
}
LIBRARY_FLOOR, VERB_FLOOR = 4, 5
FOLDERS = ("text", "data", "models", "retrieval", "rollout", "learning", "bench")

# The one file that imports each heavy neighbour.
NEIGHBOURS = {
    "orbax": "checkpoint.py",
    "scann": "retrieval/scann_index.py",
    "tensorflow_datasets": "data/qa.py",
    "grain": "data/stream.py",
    "matplotlib": "report.py",
    "tensorboardX": "metrics.py",
    "requests": "retrieval/remote.py",
    "bm25s": "retrieval/bm25.py",
    "Stemmer": "retrieval/bm25.py",
    "starlette": "retrieval/server.py",
    "uvicorn": "retrieval/server.py",
    "safetensors": "models/hf.py",
    "transformers": "text/tokenizer.py",
    "tokenizers": "text/tokenizer.py",
}
AXIS_NAMES, AXIS_OWNER = {"fsdp", "tensor"}, "parallel.py"
OUTSIDE = {"configs", "tests"}  # read the package and are never read by it
NO_JAX = {"jax", "jaxlib", "flax", "optax"}


def violations(path: str, source: str) -> list[str]:
    """What a file of the package does against the rules, a line each.

    Args:
      path: relative to the package's folder, as in "retrieval/remote.py".
      source: its text.
    """
    tree = ast.parse(source)
    own = path.split("/")[0].removesuffix(".py")
    found = []
    if "/" in path and own not in FOLDERS:
        found.append(f"{path}: the folder {own}/ is on no floor; give it one in FLOORS and FOLDERS")
    for name, line in _imported(tree, path):
        top, *inner = name.split(".")
        if top == PACKAGE and inner and not _may_import(own, inner[0]):
            floors = _floor(own), _floor(inner[0])
            found.append(f"{path}:{line}: {own} (floor {floors[0]}) imports {name} (floor {floors[1]})")
        if top in OUTSIDE:
            found.append(f"{path}:{line}: imports {name} from outside the package")
        if own == "text" and top in NO_JAX:
            found.append(f"{path}:{line}: text/ knows no jax, and imports {name}")
        if NEIGHBOURS.get(top, path) != path and own != "bench":  # a bench may compare with what we don't use
            found.append(f"{path}:{line}: imports {name}, which only {NEIGHBOURS[top]} does")
    if path != AXIS_OWNER:
        for text, line in _strings(tree):
            if text in AXIS_NAMES:
                found.append(f"{path}:{line}: the mesh axis {text!r} is named outside {AXIS_OWNER}")
    return found


def _floor(part: str) -> int:
    return FLOORS.get(part, VERB_FLOOR)


def _may_import(own: str, other: str) -> bool:
    if other == "types" or (own == other and own in FOLDERS):
        return True
    if own == "parallel":
        return False
    if other == "parallel":
        return _floor(own) >= _floor(other)
    return _floor(other) < _floor(own) or _floor(other) == _floor(own) == LIBRARY_FLOOR


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
    ("text/rewards.py", "from searchr1_jax.data import qa", "text (floor 0) imports searchr1_jax.data.qa"),
    ("text/rewards.py", "import searchr1_jax.parallel", "imports searchr1_jax.parallel (floor 1)"),
    ("types.py", "from searchr1_jax.text import protocol", "types (floor 0) imports searchr1_jax.text"),
    ("data/qa.py", "from searchr1_jax.retrieval import base", "searchr1_jax.retrieval.base (floor 2)"),
    ("data/qa.py", "from searchr1_jax.models import config", "data (floor 1) imports searchr1_jax.models"),
    ("models/hf.py", "from searchr1_jax.data import packing", "models (floor 1) imports searchr1_jax.data"),
    ("parallel.py", "from searchr1_jax.text import protocol", "parallel (floor 1) imports searchr1_jax.text"),
    ("parallel.py", "from searchr1_jax.models import config", "imports searchr1_jax.models.config (floor 1)"),
    ("retrieval/base.py", "from searchr1_jax.rollout import engine", "retrieval (floor 2) imports"),
    ("rollout/episodes.py", "from searchr1_jax.learning import losses", "rollout (floor 3) imports"),
    ("learning/update.py", "from searchr1_jax.rollout import engine", "learning (floor 3) imports"),
    ("learning/update.py", "from searchr1_jax import checkpoint", "searchr1_jax.checkpoint (floor 4)"),
    ("evaluation.py", "from searchr1_jax import train", "imports searchr1_jax.train (floor 5)"),
    ("train.py", "from searchr1_jax import evaluate", "imports searchr1_jax.evaluate (floor 5)"),
    ("train.py", "from searchr1_jax.bench import rollout", "imports searchr1_jax.bench.rollout (floor 5)"),
    ("bench/rollout.py", "from searchr1_jax import train", "bench (floor 5) imports searchr1_jax.train"),
    ("utils/misc.py", "", "the folder utils/ is on no floor"),
    # however an import is written
    ("data/qa.py", "from searchr1_jax import types, rollout", "imports searchr1_jax.rollout"),
    ("data/qa.py", "def f():\n    from searchr1_jax import setup", "data/qa.py:2: data (floor 1)"),
    ("data/qa.py", "from ..rollout import engine", "imports searchr1_jax.rollout.engine"),
    ("data/qa.py", "from .. import rollout", "imports searchr1_jax.rollout"),
    ("types.py", "from . import text", "types (floor 0) imports searchr1_jax.text"),
    ("data/qa.py", "importlib.import_module('scann')", "which only retrieval/scann_index.py does"),
    # neighbours
    ("text/stop_table.py", "import jax.numpy as jnp", "text/ knows no jax, and imports jax.numpy"),
    ("text/stop_table.py", "from flax import nnx", "text/ knows no jax, and imports flax.nnx"),
    ("text/stop_table.py", "import optax", "text/ knows no jax, and imports optax"),
    ("train.py", "import orbax.checkpoint as ocp", "imports orbax.checkpoint, which only checkpoint.py does"),
    ("retrieval/base.py", "try:\n    import scann\nfinally:\n    pass", "retrieval/base.py:2: imports scann"),
    ("retrieval/embed.py", "import transformers", "which only text/tokenizer.py does"),
    ("learning/checkpoint.py", "import orbax", "which only checkpoint.py does"),
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
    ("text/tokenizer.py", "import tokenizers\nfrom searchr1_jax import types\nfrom . import protocol"),
    ("parallel.py", "import jax\nfrom searchr1_jax import types\nAXES = ('fsdp', 'tensor')"),
    ("models/decoder.py", "from searchr1_jax import parallel, types\nfrom searchr1_jax.models import layers"),
    ("data/packing.py", "from searchr1_jax import parallel\nfrom searchr1_jax.text import rewards"),
    ("retrieval/scann_index.py", "import scann\nfrom searchr1_jax.models import encoder\nfrom . import base"),
    ("rollout/episodes.py", "from searchr1_jax.retrieval import base\nfrom . import engine"),
    ("evaluation.py", "from searchr1_jax import metrics, setup\nfrom searchr1_jax.rollout import episodes"),
    ("train.py", "from searchr1_jax import evaluation, parallel\nfrom searchr1_jax.learning import update"),
    ("bench/decode.py", "from searchr1_jax.bench import table\nfrom searchr1_jax import setup"),
    ("models/layers.py", '"""fsdp"""\n"fsdp"\nx = "fsdp and tensor in a sentence"\ny = mesh.fsdp'),
    ("models/hf.py", "import safetensors.numpy\nimport scannable\nimport json, grainy"),
]


@pytest.mark.parametrize("path, source", ALLOWED)
def test_what_the_rules_allow_is_not_caught(path, source):
    assert violations(path, source) == []
