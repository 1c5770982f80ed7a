"""The commands index and serve: what they do as functions, and as they are typed."""

import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import types

import http_servers
import processes
import pytest
import requests

from searchr1_jax import index as command, serve
from searchr1_jax.retrieval import building, scann_index, server

ROOT = pathlib.Path(__file__).parents[1]
ROWS = 1500
RECIPE = building.Recipe(parts=("exact", "bm25"))


def _run(*arguments, expected=0) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr
    return done.stdout + done.stderr


def _files(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


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
    command.build(directory, corpus, RECIPE)
    return directory


# The command `index build`, killed when it tells of what its first argument names.
KILLED = """if True:
    import contextlib, os, signal, sys
    from searchr1_jax import index
    from searchr1_jax.run import command

    stage = sys.argv.pop(1)

    @contextlib.contextmanager
    def killed():
        yield lambda what, done, total: what == stage and os.kill(os.getpid(), signal.SIGKILL)

    index._bars = killed
    command.run(index.main, index.define, required=("index",), words=True)
"""


def test_a_build_that_is_killed_and_started_again_ends_with_the_same_index(corpus, index, tmp_path):
    typed = ["build", f"--index={tmp_path / 'i'}", f"--corpus={corpus}", "--parts=exact,bm25"]
    for stage in ("embedding", "BM25"):
        _run("-c", KILLED, stage, *typed, expected=-signal.SIGKILL)
    command.build(tmp_path / "i", corpus, RECIPE)
    assert _files(tmp_path / "i") == _files(index)


def test_two_processes_build_what_one_does(corpus, index, tmp_path):
    build = ["-m", "searchr1_jax.index", "build", f"--index={tmp_path / 'i'}", f"--corpus={corpus}"]
    first, second = processes.finished(processes.start_verb_twice([*build, "--parts=exact,bm25"]))
    assert _files(tmp_path / "i") == _files(index)
    assert f"{ROWS:,} passages" in first and "passages" not in second


def test_where_one_process_fails_both_end_with_its_error(corpus, tmp_path):
    (tmp_path / "encoder").touch()  # where the first one wants to make a directory
    build = ["-m", "searchr1_jax.index", "build", f"--index={tmp_path}", f"--corpus={corpus}", "--parts=exact,bm25"]
    running = processes.start_verb_twice(build)
    said = [process.communicate(timeout=processes.HANGS_S)[1] for process in running]
    assert [process.returncode for process in running] == [1, 1], said
    cause = (
        r"error: process [01] of 2 \(.*\): (another process failed: NotADirectoryError: )?\[Errno 20\] Not a directory"
    )
    assert all(re.search(cause, err) for err in said), said


def test_a_finished_index_is_left_as_it_is(corpus, index, capsys):
    before = {path: path.stat().st_mtime_ns for path in index.rglob("*")}
    command.build(index, corpus, RECIPE)
    assert "is this index already, and whole" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in index.rglob("*")} == before


def test_what_a_build_would_miss_at_its_end_is_said_at_its_start(corpus, tmp_path, monkeypatch):
    index, questions = tmp_path / "i", tmp_path / "q.jsonl"
    for text, said in [('{"question": "who?"}\n', "holds 1 questions to tune on"), ('{"question": 1}\n', "no text")]:
        questions.write_text(text)
        with pytest.raises(ValueError, match=said):
            command.build(index, corpus, building.Recipe(parts=("exact",)), queries=questions)
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    assert building.Recipe().parts == ("exact",) and not scann_index.available()
    with pytest.raises(ImportError, match='the package "scann" cannot be imported here'):
        command.build(index, corpus, building.Recipe(parts=("scann",)))
    with pytest.raises(FileNotFoundError, match="/nowhere.jsonl"):
        command.build(index, "/nowhere.jsonl", RECIPE)
    assert not index.exists()


def test_what_the_machine_cannot_hold_is_refused_after_the_estimate(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: types.SimpleNamespace(total=10**5))
    with pytest.raises(ValueError, match="of memory and this machine has 0.0 GB; lower --memory_gb"):
        command.build(tmp_path / "i", corpus, building.Recipe(parts=("bm25",)))
    assert "BM25" in capsys.readouterr().out and not (tmp_path / "i").exists()


def test_a_dry_run_says_what_a_build_takes_and_writes_nothing(corpus, tmp_path, capsys):
    command.build(tmp_path / "i", corpus, RECIPE, dry_run=True)
    assert re.search("vectors(.|\n)*exact(.|\n)*BM25", capsys.readouterr().out) and not (tmp_path / "i").exists()


def test_vectors_that_are_not_there_yet_are_planned_by_their_number(tmp_path):
    embedded, exact = command.plan(building.Recipe(parts=("exact",)), 21_015_324, 768)
    assert (embedded.disk_bytes, embedded.seconds) == (21_015_324 * 768 * 4, None)
    assert exact.serving_bytes == 21_015_324 * (768 * 4 + 4)  # and a scale a row
    with pytest.raises(ValueError, match=r"--rows=5 plans vectors .* --parts of \['scann', 'exact'\], not \['bm25'\]"):
        command.plan(building.Recipe(parts=("bm25",)), 5, 8)


def test_as_they_are_typed_info_prints_the_manifest_and_query_what_is_found(index, corpus):
    assert json.loads(_run("-m", "searchr1_jax.index", "info", f"--index={index}"))["corpus"]["rows"] == ROWS
    title = json.loads(corpus.read_text().splitlines()[0])["contents"].partition("\n")[0].strip('"')
    assert re.search(r"\bp0\b", _run("-m", "searchr1_jax.index", "query", f"--index={index}", "--k=1", title))


def test_a_query_returns_what_it_prints(index, corpus, capsys):
    first = json.loads(corpus.read_text().splitlines()[0])
    [[passage]] = command.query(index, [first["contents"].partition("\n")[0]], k=1, search="bm25")
    assert passage.id == "p0" and "p0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["index", "build", "--index=x"], "--corpus is missing"),
        (["index", "build", "--index=x", "--rows=5"], "--rows=5 .*give it with --dry_run"),
        (["serve", "--index=x", "--port=70000"], "port=70000"),
    ],
)
def test_a_wrong_command_ends_with_one_line_that_says_what_is_wrong(arguments, said):
    verb, *others = arguments
    answer = _run("-m", f"searchr1_jax.{verb}", *others, expected=1)
    assert re.search(f"error: .*{said}", answer) and "Traceback" not in answer


def test_what_to_do_and_what_to_serve_has_to_be_said(tmp_path):
    with pytest.raises(ValueError, match=r"say what to do: python -m searchr1_jax.index build\|info\|query"):
        command.main("rebuild")
    with pytest.raises(ValueError, match="say what to look for"):
        command.query(tmp_path, [])
    for given in ({}, {"index": "x", "online": "brave"}):
        with pytest.raises(ValueError, match="say what to serve"):
            serve.run(**given)
    with pytest.raises(ValueError, match="--replay answers from a cache alone; name it with --cache"):
        serve.run(index="x", replay=True)


def _is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=10).status_code == 200
    except requests.ConnectionError:
        return False


def test_a_server_answers_from_the_index_and_what_it_cached_without_it(index, corpus, tmp_path, monkeypatch):
    first = json.loads(corpus.read_text().splitlines()[0])
    body = {"queries": [first["contents"].partition("\n")[0]], "topk": 2, "return_scores": True}
    port = processes.free_port()
    url, cache = f"http://127.0.0.1:{port}", tmp_path / "c.sqlite"
    typed = ["-m", "searchr1_jax.serve", f"--port={port}", f"--index={index}", f"--cache={cache}"]
    process = processes.start(typed)
    try:
        http_servers.wait_for(lambda: process.poll() is not None or _is_up(url), 60)
        answer = requests.post(f"{url}/retrieve", json=body, timeout=30).json()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, process.communicate()
    assert answer["result"][0][0]["document"] == first and len(answer["result"][0]) == 2
    [replayed] = _answers(monkeypatch, body, index=str(index), cache=str(cache), replay=True, encoder="/nowhere")
    assert replayed == (answer, {"identity": replayed[1]["identity"], "passages": ROWS, "search": "hybrid"})


def _answers(monkeypatch, body, **given):
    """What `serve.run` answers, and what it says of itself."""
    found = []

    def serving(retriever, *, host, port, settings, info):
        with http_servers.serving(retriever, settings, info=info) as url:
            asked = requests.post(f"{url}/retrieve", json=body, timeout=30), requests.get(f"{url}/health", timeout=30)
            found.append(tuple(answer.json() for answer in asked))

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(serve.server, "serve", serving)
    serve.run(**given)
    return found


def test_an_index_made_at_the_start_is_served_too(corpus, monkeypatch):
    first = json.loads(corpus.read_text().splitlines()[0])
    body = {"queries": [first["contents"].partition("\n")[0]], "topk": 1}
    settings = server.Settings(warm_queries=(1,))
    [(answer, about)] = _answers(monkeypatch, body, index="exact", corpus=str(corpus), settings=settings)
    assert answer["result"] == [[first]] and re.fullmatch("corpus [0-9a-f]{16} exact 256", about["identity"])
    with pytest.raises(ValueError, match="--encoder=e is of a built index, which exact is not"):
        serve.run(index="exact", corpus=str(corpus), encoder="e")
