"""Whole episodes on the real engine: the same bits under any schedule, and the learner's log-probs.

    questions ─▶ episodes.Rollout ⇄ Engine, a small random policy that leans towards tags
                        ⇅ a library that takes its time

The scripted engine's twin of this, `test_scheduling`, knows what should be written; here a policy samples it.
"""

import functools
import random

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import scripted
import slow_decoder

from searchr1_jax.core import parallel, settings, types
from searchr1_jax.data import packing
from searchr1_jax.models import decoder
from searchr1_jax.rollout import engine as engine_lib, environment, episodes, kv_cache, programs, sampling
from searchr1_jax.rollout.tools import search
from searchr1_jax.text import protocol, stop_table

CONFIG = slow_decoder.tiny_config(vocab_size=300, max_positions=256, tied_embeddings=False)
CONTEXT = 3 * kv_cache.BLOCK + 8  # the fourth block overlaps the third
SLOTS, SAMPLES, MAX_TURN_TOKENS = 8, 3, 24
DECODING = sampling.Decoding(temperature=0.9)
SEED, STEP = 3, 7
PROTOCOL = settings.Protocol(prompt="{question}\n", correction="Again!", information="<i>{docs}</i>", passage="{text} ")
# Logits, next to those of some 300 other tokens, which are about 0 ± 1.
TAGS = {"<search>": 5.5, "</search>": 5.0, "<answer>": 4.5, "</answer>": 4.0}
EOS = 3.0


def find(query):
    rng = random.Random(query)
    return [types.Passage(id=str(i), title="", text="word " * rng.randrange(1, 16)) for i in range(2)]


QUESTIONS = [types.QAExample(id=f"q{n}", question="why " * (7 * n % 29) + str(n), golden_answers=()) for n in range(29)]


@pytest.fixture(scope="module")
def params(tagged_tokenizer):
    """Host weights."""
    with jax.set_mesh(meshes.make()):
        weights = slow_decoder.random_params(CONFIG, 0)
    logits = {tagged_tokenizer.encode(tag)[0]: logit for tag, logit in TAGS.items()}
    return slow_decoder.leaning(weights, logits | dict.fromkeys(tagged_tokenizer.eos_ids, EOS))


@pytest.fixture(scope="module")
def play(tagged_tokenizer, params):
    """play(…) is a run of all questions: its trajectories by key, and the queries in their order."""
    pieces = tagged_tokenizer.token_bytes()
    stops = stop_table.build([*pieces, *[b""] * (CONFIG.vocab_size - len(pieces))], protocol.stop_tags(("search",)))

    @functools.cache
    def engine(decode_tokens):
        shapes = programs.Shapes(
            slots=SLOTS, context=CONTEXT, decode_tokens=decode_tokens, extend_rows=4, extend_chunks=(8, 32),
            group=2,
        )  # fmt: skip
        hosts = parallel.hosts_mesh(jax.sharding.get_mesh(), tensor=1)
        engine = engine_lib.Engine(
            CONFIG, shapes, stops, hosts=hosts, eos_ids=tagged_tokenizer.eos_ids,
            max_turn_tokens=MAX_TURN_TOKENS, dtype=jnp.float32,
        )  # fmt: skip
        engine.load(slow_decoder.on_mesh(CONFIG, params))
        return engine

    def play(*, decode_tokens=8, order=None, longest_delay_s=0.0, seed=SEED, step=STEP, finding=find):
        """`order`: the seed by which questions are shuffled and the library is slow."""
        library = scripted.Library(finding, longest_delay_s=longest_delay_s, seed=order or 0)
        around = environment.Environment(PROTOCOL, [search.Search(retriever=library, passages=2)])
        limits = episodes.Limits(max_turns=3, max_information_tokens=50, tool_threads=3)
        asked = QUESTIONS if order is None else random.Random(order).sample(QUESTIONS, len(QUESTIONS))
        room = CONTEXT - MAX_TURN_TOKENS
        tasks = episodes.make_tasks(asked, tagged_tokenizer, PROTOCOL, samples=SAMPLES, room=room)
        with jax.set_mesh(meshes.make()):
            loop = episodes.Rollout(engine(decode_tokens), around, tagged_tokenizer, limits)
            trajectories = {t.key: t for t in loop.run(tasks, DECODING, seed=seed, step=step)}
        assert len(trajectories) == len(QUESTIONS) * SAMPLES
        return trajectories, library.queries

    return play


@pytest.fixture(scope="module")
def calm(play):
    """Questions in their order, nothing takes any time."""
    return play()


def test_the_policy_meets_every_event_and_every_end(calm):
    """In contexts of one to four blocks of attention; and there are far more episodes than slots."""
    trajectories, queries = calm[0].values(), calm[1]
    assert {t.stop_reason for t in trajectories} == {"answered", "turn_limit", "no_action", "length"}
    events = {turn.event for t in trajectories for turn in t.turns}
    assert events == {"search", "answer", "invalid", "truncated"}
    assert len(queries) > 20 and any(t.eos_dropped for t in trajectories)
    assert any(t.passages_cut for t in trajectories)
    assert {(len(t.tokens) - 1) // kv_cache.BLOCK for t in trajectories} == {0, 1, 2, 3}
    assert len(trajectories) > 3 * SLOTS


@pytest.mark.parametrize(
    "schedule",
    [
        dict(order=1),
        dict(order=2, longest_delay_s=0.02),
        dict(decode_tokens=3),
        dict(decode_tokens=3, order=3, longest_delay_s=0.01),
    ],
    ids=str,
)
def test_trajectories_are_the_same_bits_under_any_schedule(play, calm, schedule):
    """Tokens, masks, log-probs, turns and counts."""
    trajectories, queries = play(**schedule)
    assert scripted.as_tuples(trajectories) == scripted.as_tuples(calm[0])
    assert sorted(queries) == sorted(calm[1])


def test_a_run_that_lost_its_retriever_leaves_nothing_behind(play, calm):
    """Slots that still run, calls in flight, texts half appended: the next run on the engine is not touched."""
    answered = iter(range(20))

    def mortal(query):
        if next(answered, None) is None:
            raise OSError("gone")
        return find(query)

    with pytest.raises(environment.ToolError, match="gone"):
        play(seed=SEED + 2, finding=mortal)
    assert scripted.as_tuples(play()[0]) == scripted.as_tuples(calm[0])


@pytest.mark.parametrize("other", [dict(seed=SEED + 1), dict(step=STEP + 1)], ids=str)
def test_another_seed_or_step_is_another_draw(play, calm, other):
    again, _ = play(**other)
    tokens = {(key, tuple(t.tokens.tolist())) for trajectories in (again, calm[0]) for key, t in trajectories.items()}
    assert len(tokens) == 2 * len(again)


def test_the_samples_of_a_question_differ(calm):
    assert len({tuple(t.tokens.tolist()) for t in calm[0].values()}) == len(QUESTIONS) * SAMPLES


def test_recorded_log_probs_are_those_that_the_learner_computes_from_packed_rows(calm, params):
    """Of episodes with three turns and more, so of text that was decoded, appended to, and decoded on."""
    trajectories = [t for t in calm[0].values() if len(t.turns) >= 3]
    batch = packing.pack(
        trajectories, [0.0] * len(trajectories), row_tokens=CONTEXT, micro_batch_rows=len(trajectories),
        max_rows=len(trajectories),
    )  # fmt: skip
    with jax.set_mesh(meshes.make()):
        graph, _ = decoder.abstract(decoder.Policy, CONFIG)
        settings = dict(compute=slow_decoder.COMPUTE, temperature=DECODING.temperature, vocab_chunk=CONTEXT)
        statistics = jax.jit(lambda params, *rows: decoder.bind(graph, params).token_statistics(*rows, **settings))
        rows = parallel.to_mesh([x[0] for x in (batch.tokens, batch.position, batch.segment)], "batch", None)
        logp = np.asarray(statistics(slow_decoder.on_mesh(CONFIG, params), *rows)[0])
    sampled = batch.sampled[0]
    assert sampled.sum() > 500
    np.testing.assert_allclose(batch.behaviour_logp[0][sampled], logp[sampled], atol=1e-5, rtol=0)
