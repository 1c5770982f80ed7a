"""Question files: what comes back, what is refused, and what lies in the cache."""

import json
import os
import socket

import pytest

from searchr1_jax.core import settings, types
from searchr1_jax.data import qa
from searchr1_jax.data.invented import world

ROW = {"id": "test_0", "question": "who?", "golden_answers": ["A"]}


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def load(path):
    return qa.load(path, name="nq", cache_dir=path.parent / "cache")


def test_rows_come_back_as_examples_in_the_order_of_the_file(tmp_path):
    file = write(
        tmp_path / "dev.jsonl",
        {"id": "test_0", "question": "où est-ce ?", "answer": ["Zürich", "スイス"], "metadata": {"hops": 2}},
        {"id": 7, "question": "when?", "golden_answers": "1990", "hops": 3, "metadata": {"type": "bridge"}},
        "",
        {"question": "what?", "golden_answers": ["this", "that", "both"], "metadata": None},
        {"id": "a", "question": "nq-open style?", "answer": "yes"},
    )
    source = load(file)
    assert len(source) == 4
    assert list(source) == [
        types.QAExample(id="nq/test_0", question="où est-ce ?", golden_answers=("Zürich", "スイス"), hops=2),
        types.QAExample(id="nq/7", question="when?", golden_answers=("1990",), hops=3),
        types.QAExample(id="nq/dev-4", question="what?", golden_answers=("this", "that", "both"), hops=0),
        types.QAExample(id="nq/a", question="nq-open style?", golden_answers=("yes",), hops=0),
    ]
    assert source[3].id == "nq/a"
    assert type(source[0].hops) is int
    for index in (4, -1):
        with pytest.raises(IndexError, match="4 questions"):
            source[index]


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object is needed"),
        ({**ROW, "question": " "}, "the question is empty"),
        ({"id": "x", "golden_answers": ["A"]}, "the question is None"),
        ({"id": "x", "question": "who?"}, "no golden answers"),
        ({**ROW, "golden_answers": []}, "no golden answers"),
        ({**ROW, "golden_answers": ["A", ""]}, "the golden answer is empty"),
        ({**ROW, "golden_answers": [3]}, "the golden answer is 3"),
        ({**ROW, "id": None}, "the id is None"),
        ({**ROW, "hops": "two"}, "hops is 'two'"),
        ({**ROW, "metadata": {"hops": -1}}, "hops is -1"),
        ({**ROW, "question": "half \ud800 pair"}, "half of a surrogate pair"),
        (ROW, "the id 'test_0' is that of line 1 already"),
    ],
)
def test_a_broken_line_is_named_before_anything_is_written(tmp_path, bad, complaint):
    file = write(tmp_path / "dev.jsonl", ROW, "", bad)
    with pytest.raises(ValueError, match=r"dev\.jsonl, line 3: .*" + complaint):
        load(file)
    assert os.listdir(tmp_path) == ["dev.jsonl"]


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "dev.jsonl"
    file.write_bytes(json.dumps(ROW).encode() + b'\n{"id": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="dev.jsonl, line 2: not JSON .*utf-8.* position 11"):
        load(file)


def test_a_missing_or_empty_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl cannot be read: No such file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="void.jsonl holds no questions"):
        load(write(tmp_path / "void.jsonl", "", " "))
    assert os.listdir(tmp_path) == ["void.jsonl"]


def test_a_changed_file_is_prepared_anew_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    file = write(tmp_path / "dev.jsonl", ROW)
    assert load(file)[0].golden_answers == ("A",)
    write(file, {**ROW, "golden_answers": ["B"]})
    assert load(file)[0].golden_answers == ("B",)
    assert len(os.listdir(tmp_path / "cache")) == 2
    monkeypatch.setattr(qa.SearchQA, "_generate_examples", lambda self: 1 / 0)
    assert load(file)[0].golden_answers == ("B",)


def test_an_interrupted_preparation_leaves_nothing_and_is_done_again(tmp_path, monkeypatch):
    file = write(tmp_path / "dev.jsonl", ROW)

    def interrupted(self):
        yield 0, self._rows[0]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(qa.SearchQA, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(file)
    assert os.listdir(tmp_path / "cache") == []
    assert load(file)[0].id == "nq/test_0"


def test_of_two_processes_that_prepare_one_file_both_succeed(tmp_path, monkeypatch):
    file = write(tmp_path / "dev.jsonl", ROW)
    rename = os.rename

    def second_to_rename(source, target):
        monkeypatch.setattr(os, "rename", rename)
        load(file)  # the other process, from start to end
        rename(source, target)

    monkeypatch.setattr(qa.os, "rename", second_to_rename)
    assert load(file)[0].id == "nq/test_0"
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_preparing_and_reading_are_silent_and_stay_off_the_network(tmp_path, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("network access")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load(write(tmp_path / "dev.jsonl", ROW))[0].question == "who?"
    assert capfd.readouterr() == ("", "")


def test_the_questions_of_a_world_come_back(tmp_path):
    small = world.make_world(settings.World(persons=100, companies=100))
    world.write_world(small, tmp_path)
    source = load(tmp_path / "train.jsonl")
    for example, question in zip(source, world.questions(small, "train"), strict=True):
        assert example == types.QAExample(
            id=f"nq/{question.id}",
            question=question.question,
            golden_answers=question.golden_answers,
            hops=question.hops,
        )
