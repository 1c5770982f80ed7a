"""The engine's sequences, against the slow decoder run on each of them alone, and against the learner.

Turns are decoded, extended by the environment's tokens, and decoded again; where a model's whims would hide a
claim, the policy is a table that chooses the next token by the current one (`acting.table_policy`).
"""

import dataclasses

import acting
import jax
import meshes
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.core import parallel
from searchr1_jax.models import decoder
from searchr1_jax.rollout import programs, sampling

CONFIG, SHAPES = acting.CONFIG, acting.SHAPES
LIVELY = sampling.Decoding(temperature=0.9, top_k=40, top_p=0.95)
EXACT = dict(atol=1e-5, rtol=0)  # float32 log-probs of a few nats
REPLIES = {1: acting.text(101, 6), 2: acting.text(102, 3)}  # after the first and the second turn


@pytest.fixture(scope="module")
def engine():
    with jax.set_mesh(meshes.make()):
        return acting.make_engine()


@pytest.fixture(scope="module")
def host_params():
    with jax.set_mesh(meshes.make()):
        return slow_decoder.random_params(CONFIG, 0)


@pytest.fixture
def slots(laptop, engine, host_params):
    """Empty slots, and the random policy loaded."""
    engine.load(slow_decoder.on_mesh(CONFIG, host_params))
    return acting.Acting(engine)


def load(slots, host):
    slots.engine.load(slow_decoder.on_mesh(CONFIG, host))


def three_turns(slots, decoding):
    """Prompts of several lengths, each with two replies; 1 and 20 tokens need no chunk and both sizes of them."""
    for slot, length in {0: 1, 3: 5, 4: 13, 7: 20}.items():
        slots.begin(acting.text(slot, length), {slot: (1, 2, 3, slot)})
    for turn in (1, 2, 3):
        slots.turn(decoding)
        if turn in REPLIES:
            slots.append({slot: REPLIES[turn] for slot in slots.held})


# What is recorded is what the learner will compute.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probs_are_those_of_the_sequence_run_afresh(slots, host_params, temperature):
    three_turns(slots, sampling.Decoding(temperature=temperature))
    for sequence in slots.held.values():
        slow = slow_decoder.token_logp(host_params, CONFIG, sequence.tokens, temperature)
        assert sequence.sampled.sum() > 12
        np.testing.assert_allclose(np.array(sequence.logp)[sequence.sampled], slow[sequence.sampled], **EXACT)


def test_recorded_log_probs_are_the_learners(slots, host_params):
    three_turns(slots, sampling.Decoding(temperature=0.7))
    sequences = list(slots.held.values())
    tokens, position, segment = np.zeros((3, len(sequences), SHAPES.context), np.int32)
    for row, sequence in enumerate(sequences):
        n = len(sequence.tokens)
        tokens[row, :n], position[row, :n], segment[row, :n] = sequence.tokens, np.arange(n), 1
    graph, _ = decoder.abstract(decoder.Policy, CONFIG)
    settings = dict(compute=slow_decoder.COMPUTE, temperature=0.7, vocab_chunk=16)
    statistics = jax.jit(lambda params, *rows: decoder.bind(graph, params).token_statistics(*rows, **settings))
    rows = parallel.to_mesh((tokens, position, segment), "batch", None)
    logp = np.asarray(statistics(slow_decoder.on_mesh(CONFIG, host_params), *rows)[0])
    for row, sequence in enumerate(sequences):
        recorded, sampled = np.array(sequence.logp), sequence.sampled
        np.testing.assert_allclose(recorded[sampled], logp[row, : len(sampled)][sampled], **EXACT)


@pytest.mark.parametrize("decoding", [acting.GREEDY, LIVELY])
def test_a_policy_that_is_no_number_writes_nothing_and_says_so(slots, host_params, decoding):
    """Whoever reads the one token without an embedding stops, the others go on."""
    broken = jax.tree.map(np.copy, host_params)
    broken["decoder"]["embedding"][7] = np.nan
    load(slots, broken)
    slots.begin([1, 2, 7], {0: (1, 2, 3, 0)})
    slots.begin([1, 2, 3], {1: (1, 2, 3, 1)})
    slots.decode(decoding)
    assert slots.held[0].status == programs.NOT_FINITE and len(slots.held[0].tokens) == 3
    assert slots.held[1].status != programs.NOT_FINITE and len(slots.held[1].tokens) > 3


def test_a_cache_grown_by_turns_equals_one_filled_at_once(slots):
    three_turns(slots, LIVELY)
    grown, filled = slots.held[3], 5
    slots.append({3: [acting.C]})
    prefix = list(grown.tokens)
    slots.begin(prefix, {filled: (1, 2, 3, 3)})
    slots.turn(LIVELY)
    assert len(grown.tokens) > len(prefix) and slots.held[filled].tokens == grown.tokens
    new = slice(len(prefix), None)
    np.testing.assert_allclose(slots.held[filled].logp[new], grown.logp[new], **EXACT)


def test_greedy_tokens_are_the_likeliest_and_their_log_probs_those_of_temperature_1(slots, host_params):
    three_turns(slots, acting.GREEDY)
    for sequence in slots.held.values():
        logp = slow_decoder.log_softmax(slow_decoder.logits(host_params, CONFIG, sequence.tokens))
        for t in np.flatnonzero(sequence.sampled):
            assert sequence.tokens[t] == logp[t - 1].argmax()
            assert sequence.logp[t] == pytest.approx(logp[t - 1].max(), abs=1e-5)


@pytest.mark.parametrize("decoding", [{"top_k": 1}, {"top_p": 1e-6}])
def test_one_token_to_choose_from_is_greedy(slots, decoding):
    three_turns(slots, acting.GREEDY)
    greedy = {slot: sequence.tokens for slot, sequence in slots.held.items()}
    slots = acting.Acting(slots.engine)
    three_turns(slots, sampling.Decoding(temperature=0.7, **decoding))
    assert {slot: sequence.tokens for slot, sequence in slots.held.items()} == greedy


# When a turn ends.

FILLER = [acting.D] * 70
COUNT = list(range(20, 40))  # distinct tokens that are no part of a tag

STOPS = {
    "a tag that is one token": ([acting.A], [acting.ANSWER], programs.TAG),
    "a tag cut into four, the last with text beyond it": (
        [acting.A], [acting.B, acting.SLASH, acting.SEA, acting.RCH, acting.CLOSE_AND_MORE], programs.TAG,
    ),
    "a tag cut otherwise": ([acting.A], [acting.ANS, acting.WER, acting.CLOSE], programs.TAG),
    "a tag inside a token": ([acting.A], [acting.B, acting.INSIDE], programs.TAG),
    "end of sequence, which is dropped": ([acting.A], [acting.B, acting.C], programs.EOS),
    "end of sequence at once": ([acting.A], [], programs.EOS),
    "a turn's tokens are used up": ([COUNT[0]], COUNT[1:11], programs.TURN_FULL),
    "a tag completed by the turn's last token": ([COUNT[0]], [*COUNT[1:10], acting.ANSWER], programs.TAG),
    "the context is full": ([*FILLER[:60], COUNT[0]], COUNT[1:4], programs.CONTEXT_FULL),
    "context and turn are full": ([*FILLER[:53], COUNT[0]], COUNT[1:11], programs.CONTEXT_FULL),
    "a tag completed by the context's last token": (
        [*FILLER[:60], COUNT[0]], [*COUNT[1:3], acting.ANSWER], programs.TAG,
    ),
    "half a tag in the prompt counts for nothing": (
        [acting.A, acting.SLASH], [acting.SEARCH_CLOSE, *COUNT[:9]], programs.TURN_FULL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_a_turn_ends_at_the_very_token_by(slots, case):
    prompt, written, reason = STOPS[case]
    beyond = acting.EOS if reason == programs.EOS else acting.A  # what the policy would write next
    load(slots, acting.chain(prompt[-1], *written, beyond))
    slots.begin(prompt, {2: (0, 0, 0, 0)})
    slots.turn(acting.GREEDY)
    assert (slots.held[2].tokens, slots.held[2].status) == (prompt + written, reason)
    slots.decode(acting.GREEDY)  # a stopped slot stays as it is
    assert (slots.held[2].tokens, slots.held[2].status) == (prompt + written, reason)


def test_matching_starts_afresh_at_each_turn(slots):
    half = [*COUNT[1:10], acting.SLASH]
    rest = [acting.SEARCH_CLOSE, *COUNT[10:19]]
    load(slots, acting.chain(COUNT[0], *half, acting.C, *rest))
    slots.begin([COUNT[0]], {2: (0, 0, 0, 0)})
    slots.turn(acting.GREEDY)
    assert slots.held[2].tokens == [COUNT[0], *half]
    slots.append({2: [acting.C]})
    slots.turn(acting.GREEDY)
    assert slots.held[2].tokens == [COUNT[0], *half, acting.C, *rest]
    assert slots.held[2].status == programs.TURN_FULL


def test_a_dropped_end_of_sequence_leaves_no_trace_in_what_follows(slots, host_params):
    """Exchanges the output rows of EOS and of the second greedy token: the policy then writes EOS there."""
    prompt = acting.text(5, 7)
    tokens = list(prompt)
    for _ in range(2):
        tokens.append(int(slow_decoder.logits(host_params, CONFIG, tokens)[-1].argmax()))
    second = tokens.pop()
    assert second != tokens[-1] and acting.EOS not in (second, tokens[-1])
    order = np.arange(CONFIG.vocab_size)
    order[[acting.EOS, second]] = second, acting.EOS
    swapped = host_params | {"head": host_params["head"][order]}
    load(slots, swapped)
    slots.begin(prompt, {6: (0, 0, 0, 0)})
    slots.turn(acting.GREEDY)
    assert (slots.held[6].tokens, slots.held[6].status) == (tokens, programs.EOS)
    slots.append({6: REPLIES[1]})
    slots.turn(acting.GREEDY)
    sequence = slots.held[6]
    assert sequence.tokens[: len(tokens) + 6] == tokens + REPLIES[1] and len(sequence.tokens) > len(tokens) + 6
    slow = slow_decoder.token_logp(swapped, CONFIG, sequence.tokens)
    np.testing.assert_allclose(np.array(sequence.logp)[sequence.sampled], slow[sequence.sampled], **EXACT)


def test_the_last_places_of_the_context_hold_what_they_should(slots, host_params):
    head = host_params["head"].copy()
    head[: len(acting.WRITTEN)] = 0.0  # no tag and no EOS is ever the likeliest
    wordy = host_params | {"head": head}
    load(slots, wordy)
    slots.begin(acting.text(8, 55), {1: (0, 0, 0, 0)})
    slots.append({1: acting.text(9, 6)})  # from place 54 on, in a chunk of 12: its end lies beyond the context
    slots.turn(acting.GREEDY)
    sequence = slots.held[1]
    assert len(sequence.tokens) == SHAPES.context and sequence.status == programs.CONTEXT_FULL
    slow = slow_decoder.token_logp(wordy, CONFIG, sequence.tokens)
    np.testing.assert_allclose(sequence.logp[61:], slow[61:], **EXACT)


# The same seed gives the same tokens.

EPISODES = {  # question: (prompt, replies)
    1: (acting.text(11, 5), (acting.text(21, 9), acting.text(22, 2))),
    2: (acting.text(12, 17), (acting.text(23, 4), acting.text(24, 14))),
    3: (acting.text(13, 2), (acting.text(25, 1), acting.text(26, 5))),
}


def play(slots, admissions, *, leave_at):
    """Runs `EPISODES` and whoever else is admitted: (call, slot, question); a reply follows each turn at once.

    Returns: tokens and log-probs of each episode.
    """
    waiting, seated, turns, call, done = sorted(admissions), {}, {}, 0, {}
    while waiting or seated:
        while waiting and waiting[0][0] <= call:
            _, slot, question = waiting.pop(0)
            assert slot not in seated
            prompt = EPISODES[question][0] if question in EPISODES else acting.text(question, question % 19 + 1)
            slots.begin(prompt, {slot: (7, 1, question, 0)})
            seated[slot], turns[slot] = question, 0
        slots.decode(LIVELY, leave_at=leave_at)
        call += 1
        replies = {}
        for slot, question in list(seated.items()):
            if slots.held[slot].status == programs.RUNNING:
                continue
            _, written = EPISODES.get(question, (None, ()))
            if turns[slot] < len(written):
                replies[slot] = written[turns[slot]]
                turns[slot] += 1
            else:
                done[question] = slots.held[slot].tokens, np.array(slots.held[slot].logp)
                del seated[slot]
        slots.append(replies)
    return {question: done[question] for question in EPISODES}


TOGETHER = [(0, 0, 1), (0, 1, 2), (0, 2, 3)]


@pytest.fixture(scope="module")
def together(engine, host_params):
    """Episodes side by side, nobody else there."""
    with jax.set_mesh(meshes.make()):
        engine.load(slow_decoder.on_mesh(CONFIG, host_params))
        return play(acting.Acting(engine), TOGETHER, leave_at=SHAPES.slots)


@pytest.mark.parametrize(
    "admissions, leave_at",
    [
        ([(0, 7, 3), (1, 4, 2), (5, 2, 1)], SHAPES.slots),  # other slots, another order, one after the other
        (TOGETHER, 1),  # every call left as soon as somebody stopped
        ([(0, slot, 50 + slot) for slot in range(8)] + [(9, 6, 2), (10, 0, 3), (11, 3, 1)], 2),  # slots used before
        (TOGETHER + [(slot - 3, slot, 60 + slot) for slot in range(3, 8)], SHAPES.slots),  # company
    ],
)
def test_tokens_and_log_probs_are_the_same_bits_under_any_schedule(slots, together, admissions, leave_at):
    played = play(slots, admissions, leave_at=leave_at)
    for question, (tokens, logp) in together.items():
        assert len(tokens) > len(EPISODES[question][0]) + 15
        assert played[question][0] == tokens
        np.testing.assert_array_equal(played[question][1], logp)


def test_samples_that_share_a_row_are_those_of_rows_of_their_own(slots):
    prompt = acting.text(31, 18)  # two chunks
    slots.begin(prompt, {2: (0, 0, 9, 0), 5: (0, 0, 9, 1), 6: (0, 0, 9, 2)})
    slots.turn(LIVELY)
    shared = [slots.held[slot] for slot in (2, 5, 6)]
    slots = acting.Acting(slots.engine)
    for sample, slot in enumerate((7, 0, 5)):
        slots.begin(prompt, {slot: (0, 0, 9, sample)})
    slots.turn(LIVELY)
    for slot, other in zip((7, 0, 5), shared, strict=True):
        assert slots.held[slot].tokens == other.tokens
        np.testing.assert_array_equal(slots.held[slot].logp, other.logp)
    assert len({tuple(sequence.tokens) for sequence in shared}) == 3


def test_every_part_of_an_identity_changes_the_draw(slots):
    """Ten tokens, each one of 48 with the same chance: two draws of them are equal once in 48¹⁰."""
    even = np.zeros((CONFIG.vocab_size, CONFIG.vocab_size))
    even[:, :16] = -30.0  # tags and EOS
    load(slots, acting.table_policy(even))
    identities = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (1, 1, 1, 1)]
    for slot, identity in enumerate(identities):
        slots.begin([acting.A], {slot: identity})
    slots.turn(sampling.Decoding())
    drawn = [tuple(slots.held[slot].tokens) for slot in range(6)]
    assert len(set(drawn[:5])) == 5 and drawn[5] == drawn[0]
    assert len(set(drawn[0][1:])) > 4  # and so does the position


# Shapes and meshes.


def test_nothing_is_compiled_after_warm_up(slots):
    three_turns(slots, LIVELY)
    compiled = slots.engine.compiled
    assert compiled == 1 + len(SHAPES.extend_chunks)
    for i, decoding in enumerate([sampling.Decoding(), acting.GREEDY, LIVELY, sampling.Decoding(top_k=3)]):
        slots.begin(acting.text(i, 3 + 9 * i), {i: (i, 0, 0, 0), 7 - i: (i, 0, 0, 1)})
        slots.decode(decoding, leave_at=1 + i)
        slots.turn(decoding)
        slots.append({i: acting.text(i, 1 + i), 7 - i: acting.text(i, 13 - i)})
    load(slots, acting.chain(1, 2))
    slots.turn(LIVELY)
    acting.Acting(slots.engine).begin([1], {0: (0, 0, 0, 0)})
    assert slots.engine.compiled == compiled


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])
def test_eight_devices_sample_what_one_does(together, host_params, shape):
    """On 1x2x4 there are fewer K/V heads than tensor shards."""
    with jax.set_mesh(meshes.make(*shape)):
        engine = acting.make_engine()
        engine.load(slow_decoder.on_mesh(CONFIG, host_params))
        played = play(acting.Acting(engine), [(0, 1, 1), (0, 7, 2), (1, 4, 3)], leave_at=2)
        for question, (tokens, logp) in together.items():
            assert played[question][0] == tokens
            np.testing.assert_allclose(played[question][1], logp, **EXACT)

        slots = acting.Acting(engine)  # samples that share a row, in the second slots' shard
        slots.begin(acting.text(31, 18), {6: (0, 0, 9, 0), 7: (0, 0, 9, 1)})
        slots.turn(LIVELY)
        for slot in (6, 7):
            sequence = slots.held[slot]
            slow = slow_decoder.token_logp(host_params, CONFIG, sequence.tokens, LIVELY.temperature)
            np.testing.assert_allclose(np.array(sequence.logp)[sequence.sampled], slow[sequence.sampled], **EXACT)
        assert slots.held[6].tokens != slots.held[7].tokens
        assert engine.compiled == 1 + len(SHAPES.extend_chunks)


@pytest.mark.parametrize(
    "changes, said", [({"slots": 6}, "rollout.slots of 6"), ({"extend_rows": 2}, "extend_rows of 2")]
)
def test_slots_and_rows_that_do_not_divide_over_the_shards_are_refused(changes, said):
    with jax.set_mesh(meshes.make(2, 2, 2)), pytest.raises(ValueError, match=f"{said} does not divide over 4 shards"):
        acting.make_engine(dataclasses.replace(SHAPES, **changes))
