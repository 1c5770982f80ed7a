"""The verbs index and serve, as they are typed."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import processes
import pytest
import requests

ROOT = pathlib.Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "2"))  # of a build; KILLS=10 python -m pytest tests/test_index.py -k killed
ROWS = 1500


def _command(*arguments) -> list[str]:
    return [sys.executable, "-m", *map(str, arguments)]


def _run(*arguments, expected=0) -> str:
    done = subprocess.run(_command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr
    return done.stdout + done.stderr


def _files(directory: pathlib.Path) -> dict[str, bytes]:
    """All but what was measured."""
    files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    if "scann" in manifest["parts"]:
        assert manifest["parts"].pop("scann")["recall_at_3"] == 1
    return files | {"manifest": json.dumps(manifest).encode()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    rng = random.Random(0)
    names = [rng.choice("bdgklm") + rng.choice("aeiou") + rng.choice("nprst") + rng.choice("aeiou") for _ in range(400)]
    with open(path, "w") as file:
        for i in range(ROWS):
            name = f"{names[i % 400].title()} {names[i * 7 % 399].title()} {i}"
            text = " ".join(rng.choices(names, k=60))
            file.write(json.dumps({"id": f"p{i}", "contents": f'"{name}"\n{name} wrote {text}.'}) + "\n")
    return path


@pytest.fixture(scope="module")
def index(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("index") / "index"
    said = _run("searchr1_jax.index", "build", f"--index={directory}", f"--corpus={corpus}", "--parts=exact,bm25")
    assert f"{directory}: {ROWS:,} passages" in said and "memory to build" in said
    return directory


def test_a_build_killed_at_random_moments_ends_with_the_same_index(corpus, index, tmp_path):
    directory, rng = tmp_path / "index", random.Random(time.time_ns())
    build = "searchr1_jax.index", "build", f"--index={directory}", f"--corpus={corpus}", "--parts=exact,bm25"
    began = time.monotonic()
    _run(*build[:2], f"--index={tmp_path / 'timed'}", *build[3:])
    whole = time.monotonic() - began
    moments = []
    for _ in range(KILLS):
        process = subprocess.Popen(_command(*build), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moments.append(rng.uniform(0.4, 1.0) * whole)  # before, it has not begun to work
        time.sleep(moments[-1])
        process.send_signal(signal.SIGKILL)
        process.wait()
    _run(*build)
    actual, expected = _files(directory), _files(index)
    assert actual.keys() == expected.keys(), moments
    assert all(actual[name] == expected[name] for name in expected), moments


def test_two_processes_build_what_one_does(corpus, index, tmp_path):
    build = ["-m", "searchr1_jax.index", "build", f"--index={tmp_path / 'i'}", f"--corpus={corpus}"]
    first, second = processes.finished(processes.start_verb_twice([*build, "--parts=exact,bm25"]))
    assert _files(tmp_path / "i") == _files(index)
    assert f"{ROWS:,} passages" in first and "passages" not in second


def test_where_one_process_fails_both_end_with_its_error(corpus, tmp_path):
    (tmp_path / "encoder").touch()  # where the first one wants to make a directory
    build = ["-m", "searchr1_jax.index", "build", f"--index={tmp_path}", f"--corpus={corpus}", "--parts=exact,bm25"]
    running = processes.start_verb_twice(build)
    said = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [1, 1], said
    assert "error: [Errno 20] Not a directory" in said[0] and "another process failed: NotADirectory" in said[1]


def test_a_finished_index_is_left_as_it_is(corpus, index):
    build = "searchr1_jax.index", "build", f"--index={index}", f"--corpus={corpus}", "--parts=exact,bm25"
    before = {path: path.stat().st_mtime_ns for path in index.rglob("*")}
    assert "is this index already, and whole" in _run(*build)
    assert {path: path.stat().st_mtime_ns for path in index.rglob("*")} == before


def test_what_a_build_would_miss_at_its_end_is_said_at_its_start(corpus, tmp_path, monkeypatch):
    index, questions = tmp_path / "i", tmp_path / "q.jsonl"
    for text, said in [('{"question": "who?"}\n', "holds 1 questions to tune on"), ('{"question": 1}\n', "no text")]:
        questions.write_text(text)
        build = "searchr1_jax.index", "build", f"--index={index}", f"--corpus={corpus}"
        assert said in _run(*build, "--parts=exact", f"--queries={questions}", expected=1)
    (tmp_path / "scann.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert 'error: the package "scann" cannot be imported here' in _run(*build, "--parts=scann", expected=1)
    assert not index.exists()


def test_what_the_machine_cannot_hold_is_refused_after_the_estimate(corpus, tmp_path):
    code = """if True:
        import types, psutil
        psutil.virtual_memory = lambda: types.SimpleNamespace(total=10**5)
        from searchr1_jax import index
        from searchr1_jax.run import command
        command.run(index.main, required=("index",))
    """
    command = [sys.executable, "-c", code, "build", f"--index={tmp_path / 'i'}", f"--corpus={corpus}", "--parts=bm25"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "memory to build" in done.stdout
    assert "of memory and this machine has 0.0 GB; lower --memory_gb" in done.stderr and not (tmp_path / "i").exists()


def test_info_prints_the_manifest_and_query_what_is_found(index, corpus):
    assert json.loads(_run("searchr1_jax.index", "info", f"--index={index}"))["corpus"]["rows"] == ROWS
    first = json.loads(corpus.read_text().splitlines()[0])
    title = first["contents"].partition("\n")[0].strip('"')
    said = _run("searchr1_jax.index", "query", f"--index={index}", "--k=1", title)
    assert re.search(rf"\bp0\b.*{title}", said)


def test_a_dry_run_says_what_a_build_takes_and_writes_nothing(corpus, tmp_path):
    index = f"--index={tmp_path / 'i'}"
    said = _run("searchr1_jax.index", "build", index, f"--corpus={corpus}", "--dry_run", "--parts=exact,bm25")
    assert "BM25" in said and not (tmp_path / "i").exists()
    rows = "--rows=21015324", "--dimensions=768"
    wiki = _run("searchr1_jax.index", "build", index, "--dry_run", *rows, "--parts=exact")
    assert f"{21_015_324 * 768 * 4 / 1e9:,.3f} GB" in wiki and not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["build", "--index=x"], "--corpus is missing"),
        (["rebuild", "--index=x"], r"say what to do: python -m searchr1_jax.index build\|info\|query"),
        (["info", "--index=/nowhere"], "/nowhere holds no index; make it with"),
        (["build", "--index=x", "--corpus=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["build", "--index=x", "--corpus=/nowhere.jsonl", "--max_tokens=9"], "--max_tokens without --encoder"),
        (["build", "--index=x", "--rows=5", "--dry_run", "--parts=bm25"], "--rows=5 plans vectors"),
        (["serve", "--index=/nowhere", "--threads=0"], "threads is 0"),
        (["serve", "--index=/nowhere", "--port=70000"], "port=70000"),
    ],
)
def test_a_wrong_command_ends_with_one_line_that_says_what_is_wrong(arguments, said):
    verb = ["searchr1_jax.serve"] if arguments[0] == "serve" else ["searchr1_jax.index", arguments[0]]
    answer = _run(*verb, *arguments[1:], expected=1)
    assert re.search(f"error: .*{said}", answer) and "Traceback" not in answer


def _is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=10).status_code == 200
    except requests.ConnectionError:
        return False


def test_a_server_answers_from_the_index_and_what_it_cached_without_it(index, corpus, tmp_path):
    first = json.loads(corpus.read_text().splitlines()[0])
    query = first["contents"].partition("\n")[0]

    def ask(*options):
        port = processes.free_port()
        url, cache = f"http://127.0.0.1:{port}", f"--cache={tmp_path}/c.sqlite"
        process = processes.start(["-m", "searchr1_jax.serve", f"--port={port}", f"--index={index}", cache, *options])
        try:
            deadline = time.monotonic() + 60
            while not _is_up(url):
                assert process.poll() is None and time.monotonic() < deadline, process.communicate()
                time.sleep(0.1)
            assert requests.get(f"{url}/health", timeout=10).json()["passages"] == ROWS
            body = {"queries": [query], "topk": 2, "return_scores": True}
            return requests.post(f"{url}/retrieve", json=body, timeout=30).json()
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0

    answer = ask()
    assert answer["result"][0][0]["document"] == first and len(answer["result"][0]) == 2
    assert ask("--replay", f"--encoder={tmp_path}/nowhere") == answer
