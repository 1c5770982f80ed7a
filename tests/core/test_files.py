"""What is written whole is there whole or not at all, whatever goes wrong on the way."""

import pathlib

import pytest

from searchr1_jax.core import files


def _names(directory: pathlib.Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_has_the_new_content_and_nothing_is_beside_it(tmp_path, shared):
    for content, expected in [("é\n", b"\xc3\xa9\n"), (b"\xff", b"\xff")]:
        files.write(tmp_path / "folders" / "made" / "f", content, shared=shared)
        assert (tmp_path / "folders" / "made" / "f").read_bytes() == expected
        assert _names(tmp_path / "folders" / "made") == ["f"]


def test_a_directory_takes_the_place_of_the_one_before(tmp_path):
    for name in ("old", "new"):
        with files.whole(tmp_path / "d") as temporary:
            temporary.mkdir()
            (temporary / name).touch()
            assert not (tmp_path / "d" / name).exists()
    assert _names(tmp_path) == ["d", "d/new"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_what_was_there_is_there_and_nothing_else(tmp_path, shared, error):
    files.write(tmp_path / "f", "old")
    (tmp_path / "d").mkdir()
    for name in ("f", "d"):
        with pytest.raises(error):
            with files.whole(tmp_path / name, shared=shared) as temporary:
                if name == "d":
                    temporary.mkdir()
                    temporary /= "inside"
                temporary.write_text("half")
                raise error
    assert _names(tmp_path) == ["d", "f"] and (tmp_path / "f").read_text() == "old"


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    (tmp_path / ".f.partial").mkdir()
    (tmp_path / ".f.partial" / "half").touch()
    files.write(tmp_path / "f", "whole")
    assert _names(tmp_path) == ["f"]


def test_a_directory_does_not_replace_a_file(tmp_path):
    (tmp_path / "d").touch()
    for shared in (False, True):
        with pytest.raises(NotADirectoryError):
            with files.whole(tmp_path / "d", shared=shared) as temporary:
                temporary.mkdir()
    assert _names(tmp_path) == ["d"]


def test_two_that_make_the_same_at_the_same_time_do_not_meet(tmp_path):
    with files.whole(tmp_path / "f", shared=True) as first, files.whole(tmp_path / "f", shared=True) as second:
        first.write_text("same")
        second.write_text("same")
    assert _names(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "same"


def test_of_directories_made_at_the_same_time_the_first_one_stays(tmp_path):
    with files.whole(tmp_path / "d", shared=True) as late:
        late.mkdir()
        (late / "content").touch()
        with files.whole(tmp_path / "d", shared=True) as early:
            early.mkdir()
            (early / "content").touch()
        reader = (tmp_path / "d" / "content").stat().st_ino
    assert _names(tmp_path) == ["d", "d/content"] and (tmp_path / "d" / "content").stat().st_ino == reader


def test_json_comes_back_and_what_is_none_is_named_with_its_remedy(tmp_path):
    files.write_json(tmp_path / "one", {"é": [1, None]})
    assert files.read_json(tmp_path / "one", "") == {"é": [1, None]}
    files.write_jsonl(tmp_path / "rows", iter([{"a": 1}, "b"]))
    assert (tmp_path / "rows").read_text() == '{"a": 1}\n"b"\n'
    for broken in ("{", b"\xff"):
        files.write(tmp_path / "one", broken)
        with pytest.raises(ValueError, match="one is no JSON .*; bake it again"):
            files.read_json(tmp_path / "one", "bake it again")
