"""The invented world is made once, and nothing of a user's is replaced by it."""

from __future__ import annotations

import miniature
import pytest

from searchr1_jax import prepare


@pytest.fixture
def workdir(tmp_path, laptop):
    """With a world of its own."""
    prepare.run(miniature.settings(), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["corpus.jsonl", "test.jsonl", "init/config.json"])
def test_prepare_does_not_replace_a_users_own_files(laptop, tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}\n")
    with pytest.raises(ValueError, match=f"{name.split('/')[0]} is not of an invented world; .*another --workdir"):
        prepare.run(miniature.settings(), tmp_path)
    assert miniature.files(tmp_path) == {file: b"{}\n"}


def test_prepare_does_not_replace_another_world(workdir):
    before = miniature.files(workdir)
    with pytest.raises(ValueError, match=r"holds another world \(protocol.passage: .*; seed: 0 there, 1 now\)"):
        prepare.run(miniature.settings(**{"world.seed": 1, "protocol.passage": "{text}\n"}), workdir)
    assert miniature.files(workdir) == before


def test_prepare_makes_the_same_files_again(workdir):
    before = miniature.files(workdir)
    prepare.run(miniature.settings(seed=3), workdir)
    after = miniature.files(workdir)
    assert after.keys() == before.keys()
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed <= {"verbs.jsonl", "corpus.jsonl.offsets.npy"}  # that tell the time
