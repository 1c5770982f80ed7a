"""The stream of questions: complete, shuffled and exactly resumable."""

import collections
import itertools
import json

import pytest

from searchr1_jax.core import types
from searchr1_jax.data import stream


def source(name, count):
    return [types.QAExample(id=f"{name}/{n}", question=f"q{n}", golden_answers=("a",)) for n in range(count)]


# 23 questions and steps of 4: a step never ends with an epoch before the fourth.
SOURCES = (source("nq", 10), source("hotpot", 13))


def make(seed=0, **settings):
    return stream.QuestionStream(SOURCES, **{"seed": seed, "batch_questions": 4, **settings})


def take(questions, steps):
    return [[example.id for example in batch] for batch in itertools.islice(questions, steps)]


def test_every_epoch_asks_each_question_once_in_an_order_of_its_own():
    batches = list(itertools.islice(make(), 23))  # 92 questions, four epochs
    assert all(type(batch) is list and len(batch) == 4 for batch in batches)
    asked = [example for batch in batches for example in batch]
    epochs = [asked[start : start + 23] for start in range(0, 92, 23)]
    everything = SOURCES[0] + SOURCES[1]
    for epoch in epochs:
        assert collections.Counter(epoch) == collections.Counter(everything)
        assert epoch != everything
    assert len({tuple(example.id for example in epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("position", [0, 1, 5, 6, 17, 40])
def test_resuming_equals_never_having_stopped(position):
    uninterrupted = take(make(), 50)
    stopped = make()
    take(stopped, position)
    state = json.loads(json.dumps(stopped.state()))
    take(stopped, 3)  # the state stays what it was
    resumed = make()
    take(resumed, 2)
    resumed.restore(state)
    assert resumed.state() == state
    assert take(resumed, 50 - position) == uninterrupted[position:]


def test_a_step_may_be_larger_than_an_epoch():
    counts = collections.Counter(take(make(batch_questions=46), 1)[0])
    assert len(counts) == 23 and set(counts.values()) == {2}


def test_a_seed_repeats_itself_and_nearby_seeds_share_no_epoch():
    assert take(make(seed=1), 23) == take(make(seed=1), 23)
    epochs = [
        tuple(itertools.chain(*take(make(seed=seed, batch_questions=23), 3)[epoch : epoch + 1]))
        for seed in range(4)
        for epoch in range(3)
    ]
    assert len(set(epochs)) == 12


def test_empty_steps_and_sources_are_refused():
    with pytest.raises(ValueError, match="step of 0 questions"):
        make(batch_questions=0)
    with pytest.raises(ValueError, match=r"the sources hold \[10, 0\] questions"):
        stream.QuestionStream([SOURCES[0], []], seed=0, batch_questions=4)
    with pytest.raises(ValueError, match=r"the sources hold \[\] questions"):
        stream.QuestionStream([], seed=0, batch_questions=4)


def test_a_state_of_other_settings_is_refused_by_name():
    state = make().state()
    only_nq = stream.QuestionStream(SOURCES[:1], seed=0, batch_questions=4)
    for other, complaint in (
        (make(seed=1), "seed 0 and this one 1"),
        (make(batch_questions=8), "batch_questions 4 and this one 8"),
        (only_nq, r"questions \[10, 13\] and this one \[10\]"),
    ):
        with pytest.raises(ValueError, match=complaint):
            other.restore(state)
        assert other.state()["step"] == 0
