"""What several commands are made of refuses what cannot work, by name."""

import pytest

from searchr1_jax.core import settings, types
from searchr1_jax.run import model_files, parts


def test_a_question_that_leaves_no_room_for_a_turn_is_named(byte_tokenizer):
    c = settings.Settings().replace({"rollout.context_tokens": 1100, "rollout.max_turn_tokens": 100})
    question = types.QAExample(id="test/long", question="who founded " * 60, golden_answers=("x",))
    with pytest.raises(ValueError, match="'test/long' has [0-9]+ tokens, but only 1000 leave room"):
        parts.tasks(c, [question], byte_tokenizer, samples=1)


def test_a_decoding_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="decoding 'beam' is unknown; choose greedy or sampled"):
        parts.decoding(settings.Settings(), "beam")


def test_without_a_checkpoint_the_remedies_are_told(tmp_path, laptop):
    with pytest.raises(ValueError, match=r"holds steps \[\]; run python -m searchr1_jax.train first, .*--model"):
        model_files.load(settings.Settings(), tmp_path)
