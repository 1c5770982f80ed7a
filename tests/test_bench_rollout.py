"""The benches of acting at tiny sizes: that all schedules do the work that was drawn. Times are nobody's claim."""

import dataclasses
import itertools
import json

import jax
import meshes
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.bench import decode, lockstep, rollout, workload as workload_lib
from searchr1_jax.rollout import episodes, programs, sampling

VOCABULARY = 128
MODEL = slow_decoder.tiny_config(vocab_size=VOCABULARY, layers=1)
SETTINGS = workload_lib.Settings(
    trajectories=7, searches=(1, 3), prompt_tokens=(6, 10), passage_tokens=(4, 9), turn_median=5.0,
    turn_tokens=(2, 9), latency_s=0.001,
)  # fmt: skip
SLOTS, BUDGET = 3, 12
OURS = programs.Shapes(slots=SLOTS, context=96, decode_tokens=2, extend_rows=1, extend_chunks=(4, 8), group=1)
LOCKSTEP = dataclasses.replace(OURS, decode_tokens=8)


@pytest.fixture(scope="module")
def bench():
    with jax.set_mesh(meshes.make()):
        workload = workload_lib.make(SETTINGS, VOCABULARY)
        yield rollout.Bench(MODEL, workload, ours=OURS, lockstep=LOCKSTEP, max_turn_tokens=BUDGET)


def batches(workload):
    """Rounds of each lockstep batch: the turns that its trajectories do together."""
    for first in range(0, SETTINGS.trajectories, SLOTS):
        last = min(first + SLOTS, SETTINGS.trajectories)
        turns = [workload.turns_of(i) for i in range(first, last)]
        for turn in range(max(map(len, turns))):
            yield [of[turn] for of in turns if turn < len(of)]


# The workload.


def test_the_workload_is_the_one_that_was_asked_for():
    workload = workload_lib.make(workload_lib.Settings(), 32_000)
    assert len(workload.prompts) == 128
    prompts = [len(prompt) for prompt in workload.prompts]
    passages = [len(turn.passages) for turn in workload.turns if turn.passages]
    for lengths in (prompts, passages):
        assert min(lengths) >= 100 and max(lengths) <= 200 and abs(np.mean(lengths) - 150) < 10
    searches = [sum(turn.passages != () for turn in workload.turns_of(i)) for i in range(128)]
    assert set(searches) == {1, 2, 3, 4} and abs(np.mean(searches) - 2.5) < 0.3
    lengths = np.array([turn.tokens for turn in workload.turns])
    assert lengths.min() >= 10 and lengths.max() == 200 and abs(np.median(lengths) - 50) < 8
    inside = np.log(lengths / 50)  # 95% of a normal lie within two sigmas
    assert 0.9 < np.mean(np.abs(inside) < 2 * 0.7) <= 1 and 0.55 < inside.std() < 0.75
    assert all(turn.passages == () for turn in (workload.turns_of(i)[-1] for i in range(128)))


def test_the_same_seed_draws_the_same_workload():
    assert workload_lib.make(SETTINGS, VOCABULARY) == workload_lib.make(SETTINGS, VOCABULARY)
    other = workload_lib.make(dataclasses.replace(SETTINGS, seed=1), VOCABULARY)
    assert other.prompts != workload_lib.make(SETTINGS, VOCABULARY).prompts


def test_every_text_ends_by_opening_the_turn_that_follows():
    workload = workload_lib.make(SETTINGS, VOCABULARY)
    texts = []
    for i, prompt in enumerate(workload.prompts):
        texts += [prompt, *(turn.passages for turn in workload.turns_of(i) if turn.passages)]
    assert [text[-1] for text in texts] == list(range(len(workload.turns)))
    assert min(min(text[:-1]) for text in texts) >= 2 * len(workload.turns)


def test_a_vocabulary_too_small_for_the_turns_is_refused():
    own = 2 * len(workload_lib.make(SETTINGS, VOCABULARY).turns)
    workload_lib.make(SETTINGS, own + 1)
    with pytest.raises(ValueError, match=f"need {own} tokens of their own, the vocabulary has {own}; lower"):
        workload_lib.make(SETTINGS, own)


# The schedules.


def trajectories(bench, kind, budget=None):
    """By the number of their prompt."""
    engine = bench.ours if kind is episodes.Run else bench.lockstep
    engine.reset()
    engine.budget = budget
    library = workload_lib.Environment(bench.workload)
    played = episodes.Rollout(engine, library, workload_lib.Words(), bench.workload.limits())
    played.schedule = kind
    running = played.run(bench.workload.tasks(), sampling.Decoding(), seed=0, step=0)
    return {int(trajectory.example.id): trajectory for trajectory in running}


@pytest.mark.parametrize("kind", [episodes.Run, lockstep.Cached, lockstep.Rerun])
@pytest.mark.parametrize("budget", [None, BUDGET])
def test_a_schedule_writes_the_turns_that_were_drawn(bench, kind, budget):
    played, workload = trajectories(bench, kind, budget), bench.workload
    assert sorted(played) == list(range(SETTINGS.trajectories))
    for number, trajectory in played.items():
        pairs = zip(trajectory.sampled.tolist(), trajectory.tokens.tolist(), strict=True)
        stretches = [
            (sampled, [token for _, token in stretch])
            for sampled, stretch in itertools.groupby(pairs, key=lambda pair: pair[0])
        ]
        expected, turn = [(False, list(workload.prompts[number]))], workload.prompts[number][-1]
        for turns in workload.turns_of(number):
            written = next(tokens for sampled, tokens in stretches[len(expected) :])
            assert len(written) == turns.tokens and written[-1] == len(workload.turns) + turn
            expected.append((True, written))
            if turns.passages:
                expected.append((False, list(turns.passages)))
            turn += 1
        assert stretches == expected
        assert trajectory.stop_reason == "answered"
        assert (trajectory.behaviour_logp[trajectory.sampled] < 0).all()


def test_the_schedules_sample_the_same_tokens_but_for_the_last_bits(bench):
    ours, rerun = trajectories(bench, episodes.Run), trajectories(bench, lockstep.Rerun)
    for number, trajectory in ours.items():
        assert trajectory.tokens.tolist() == rerun[number].tokens.tolist()
        np.testing.assert_allclose(trajectory.behaviour_logp, rerun[number].behaviour_logp, atol=1e-4)


def test_lockstep_slots_wait_for_the_slowest_turn(bench):
    steps = sum(max(turn.tokens for turn in turns) for turns in batches(bench.workload))
    played = bench.play(lockstep.Cached)
    assert played.occupancy == bench.workload.sampled_tokens / (SLOTS * steps)
    assert bench.play(lockstep.Rerun).occupancy == played.occupancy
    assert played.wasted == 0


def test_a_budget_is_decoded_to_its_end_and_the_rest_counted_as_wasted(bench):
    played, workload = bench.play(lockstep.Rerun, budget=BUDGET), bench.workload
    assert played.tokens == workload.sampled_tokens
    assert played.wasted == BUDGET * len(workload.turns) - workload.sampled_tokens


def test_live_caches_take_every_text_once_and_a_rerun_the_whole_prefix_each_turn(bench, monkeypatch):
    appended = []
    extend = workload_lib.Engine.extend

    def counted(engine, rows, chunk):
        appended.append(sum(len(row.tokens) for row in rows))
        extend(engine, rows, chunk)

    monkeypatch.setattr(workload_lib.Engine, "extend", counted)
    workload = bench.workload
    once = again = 0
    for number, prompt in enumerate(workload.prompts):
        length = len(prompt)
        once += length - 1  # the pending token is consumed by decoding
        for turn in workload.turns_of(number):
            again += length - 1
            once += len(turn.passages)
            length += turn.tokens + len(turn.passages)
    for kind, tokens in ((episodes.Run, once), (lockstep.Cached, once), (lockstep.Rerun, again)):
        appended.clear()
        bench.play(kind)
        assert sum(appended) == tokens


# The commands.


def reported(capsys) -> dict:
    """The one line that a command printed."""
    return json.loads(capsys.readouterr().out)


def test_the_rollout_command_reports_its_figures_in_one_line(bench, monkeypatch, capsys):
    def known(model, workload, *, ours, lockstep, max_turn_tokens):
        assert len(workload.prompts) == 128 and workload.settings.seed == 2
        assert lockstep.slots == ours.slots == 16 and max_turn_tokens == BUDGET
        return bench  # a small one, compiled already

    monkeypatch.setattr(rollout, "Bench", known)
    monkeypatch.setattr(rollout, "MAX_TURN_TOKENS", BUDGET)
    monkeypatch.setattr("sys.argv", ["rollout", "--json", "--repeats=1", "--seed=2"])
    rollout.main()
    figures = reported(capsys)
    measured = {"over_lockstep_rerun", "over_lockstep_cached", "over_reference", "tokens_per_s"}
    assert measured < set(figures) and all(figures[name] > 0 for name in measured)
    assert 0 < figures["occupancy"] <= 1 and figures["host_overhead"] > 0
    assert figures["new_programs"] == 0 and figures["wasted_tokens"] == 0
    assert figures["seed"] == 2 and figures["trajectories"] == 128


def test_the_decode_command_fills_both_caches_and_reports_in_one_line(monkeypatch, capsys):
    for name, value in {"MODEL": MODEL, "ROWS": 2, "PROMPT": 130, "NEW": 62}.items():
        monkeypatch.setattr(decode, name, value)
    write, counts = decode.write, []
    monkeypatch.setattr(decode, "write", lambda *args: counts.append(write(*args).count.tolist()))
    monkeypatch.setattr("sys.argv", ["decode", "--json", "--repeats=1"])
    decode.main()
    assert counts == [[62, 62]] * 4  # a warm-up and a repeat in each cache
    figures = reported(capsys)
    assert set(figures) == {"tokens_per_s_192", "tokens_per_s_1024"} and min(figures.values()) > 0


# torch, where it is installed.


@pytest.fixture
def theirs(bench):
    pytest.importorskip("torch")
    from searchr1_jax.bench import hugging_face

    return hugging_face, hugging_face.Model(MODEL, bench.params)


def test_torch_writes_as_many_tokens_as_asked_after_prefixes_of_any_length(theirs):
    _, model = theirs
    new = model.write([[1, 2, 3], [4], [5, 6, 7, 8, 9]], [3, 7, 1])
    assert [len(row) for row in new] == [3, 7, 1]
    assert all(0 <= token < VOCABULARY for row in new for token in row)


def test_torch_plays_the_same_episodes(theirs, bench, monkeypatch):
    hugging_face, model = theirs
    asked, write = [], model.write

    def recorded(prefixes, lengths):
        asked.append(sum(lengths))
        return write(prefixes, lengths)

    monkeypatch.setattr(model, "write", recorded)
    _, tokens = hugging_face.play(model, bench.workload, share=slice(SLOTS))
    rounds = list(itertools.islice(batches(bench.workload), len(asked)))
    assert asked == [sum(turn.tokens for turn in turns) for turns in rounds]
    assert tokens == sum(asked) == sum(t.tokens for i in range(SLOTS) for t in bench.workload.turns_of(i))


def test_torch_is_compared_by_decoding_and_by_episodes(theirs, bench):
    ours = bench.play(episodes.Run)
    decoding, whole = rollout.over_torch(bench, theirs[1], ours, batch=1, decoded=4)
    assert decoding > 0 and whole > 0
