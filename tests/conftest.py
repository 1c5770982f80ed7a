"""Eight virtual CPU devices, set up before JAX is imported, and the meshes that tests run on."""

import os
import shutil
import signal
import tempfile

import processes

devices = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {processes.COMPILED_QUICKLY} {devices}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = "SEARCHR1_JAX_TESTS_CACHE"  # what a process of this run of the suite has compiled, the others need not
if CACHE not in os.environ:  # workers have it from the process that began
    os.environ[CACHE] = tempfile.mkdtemp(prefix="searchr1_jax-tests-")
os.environ["XDG_CACHE_HOME"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ[CACHE]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script's background job has it, and all its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402

from searchr1_jax.core import parallel  # noqa: E402
from searchr1_jax.text import protocol, tokenizer  # noqa: E402

# Files that compile much or start processes, the longest first: a worker that began one last would keep the other
# waiting. All their tests are marked slow; others say so themselves.
SLOW = (
    "test_two_hosts.py", "test_commands.py", "test_processes.py", "test_train.py", "test_update.py", "test_together.py",
    "test_sft.py", "test_family.py", "test_notebook_tool.py", "test_engine.py", "test_server.py", "test_index.py",
    "test_exact_rollouts.py", "test_bench_rollout.py", "test_bench_learner.py", "test_bench_retrieval.py",
    "test_tpu_compile.py", "test_parallel.py", "test_decoder.py", "test_encoder.py", "test_attention.py",
    "test_guards.py", "test_supervised.py", "test_scripted.py", "test_text_encoder.py", "test_stored.py",
    "test_vectors.py",
    "test_export.py", "test_copying.py", "test_one_step_page.py", "test_hf.py",
)  # fmt: skip


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # the process that began
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.name, len(SLOW)))
    for item in items:
        if item.path.name in rank:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def laptop():
    """The 1x1x1 mesh, in use."""
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])) as mesh:
        yield mesh


# Three ways to cut text into tokens, made once for all tests.

TEXTS = (
    "Emma is a novel by Jane Austen.",
    "<think>I know it.</think>\n<search> Emma </search>\n<answer> Jane Austen </answer>\n",
)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """Every byte is a token, so that tokens can be counted by eye."""
    directory = tmp_path_factory.mktemp("byte_tokenizer")
    return tokenizer.train([], vocab_size=257, added_tokens=(), directory=directory)


@pytest.fixture(scope="session")
def split_tokenizer(tmp_path_factory):
    """Tags are several tokens; `>` and a line break after it are one, a space and `</` too."""
    directory = tmp_path_factory.mktemp("split_tokenizer")
    return tokenizer.train(TEXTS * 10, vocab_size=300, added_tokens=(), directory=directory)


@pytest.fixture(scope="session")
def tagged_tokenizer(tmp_path_factory):
    """Each tag is one token."""
    directory = tmp_path_factory.mktemp("tagged_tokenizer")
    return tokenizer.train(TEXTS * 10, vocab_size=300, added_tokens=protocol.tags(("search",)), directory=directory)
