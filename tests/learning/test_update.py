"""The jitted update against a slow one, and what must not matter: cuts, order, padding, mesh, others' tokens."""

import dataclasses
from typing import NamedTuple

import bits
import by_hand
import jax
import meshes
import numpy as np
import pytest
import slow_decoder

from configs import base, presets
from searchr1_jax.core import parallel, settings
from searchr1_jax.data import packing
from searchr1_jax.learning import step as learning, update
from searchr1_jax.models import decoder

MODEL = slow_decoder.tiny_config(width=32)
ROW_TOKENS, STEP = 32, 3
RATE = 0.002  # of both optimizers at STEP
KL = 0.2  # β
# Adam turns the rounding of a gradient that is nearly zero into a step of any size up to the learning rate. So the
# gradients are compared closely and the weights in norm; an update moves them by 1e-2 of it.
WEIGHTS = 1e-4
REWARDS = (1.0, 0.0, 0.5, -0.3, 1.0, 0.2, 0.0, 1.0)


ADAM = {"learning_rate": RATE * 2, "warmup_steps": 8, "b1": 0.8, "b2": 0.9, "weight_decay": 0.1}
PPO = settings.Settings().replace({
    "algorithm.discount": 0.97, "algorithm.gae_lambda": 0.9, "algorithm.value_clip": 0.1,
    "algorithm.kl_coefficient": KL, "algorithm.entropy_coefficient": 0.03,
    "learner.value_warmup_steps": 2, "learner.vocab_chunk": 8, "learner.steps": 50,
    "rollout.temperature": 0.8, "model.attention": "xla",
    **{f"policy.{key}": value for key, value in ADAM.items()}, "policy.max_gradient_norm": 0.3,
    **{f"value.{key}": value for key, value in ADAM.items()}, "value.max_gradient_norm": 100.0,
})  # fmt: skip


def _pack(trajectories, rewards, *, micro_batch_rows=4, max_rows=None, **options):
    written = sum(int(t.sampled.sum()) for t in trajectories)
    return packing.pack(
        trajectories, rewards, row_tokens=ROW_TOKENS, micro_batch_rows=micro_batch_rows,
        max_rows=max_rows or len(trajectories),
        weights=[np.full(len(t.tokens), 1 / written, np.float32) for t in trajectories], **options,
    )  # fmt: skip


def _to_mesh(tree):
    return parallel.to_mesh(tree, None, "batch", None)


def _by_trajectory(array, batch) -> list[np.ndarray]:
    """The [T] pieces of an [M, B, T] array, in the order of the trajectories."""
    array, number = np.asarray(array), np.asarray(batch.trajectory)
    return [array[number == i] for i in range(number.max() + 1)]


def _laid_out(pieces: list[np.ndarray], batch) -> np.ndarray:
    """The inverse of `_by_trajectory`."""
    array = np.zeros(batch.tokens.shape, np.float32)
    for i, piece in enumerate(pieces):
        array[np.asarray(batch.trajectory) == i] = piece
    return array


def _gradients(state):
    """Both optimizers' first moments; linear in the gradient, where Adam's step hides its size."""
    optimizers = (state.policy_optimizer, state.value_optimizer)
    return [by_hand.adam_mean(o) for o in optimizers if o is not None]


def _weights(state):
    return state.policy, state.value


class Result(NamedTuple):
    """Of a rollout's two updates, on the host."""

    states: list[update.TrainState]  # after each update
    updates: list[dict]  # statistics of each update
    scores: list[update.Scores]
    targets: list[update.Targets]
    statistics: dict


class Rollout:
    """One rollout in two mini-batches, and the states of a PPO run about to learn from it.

    What learns differs from what was scored, so that ratios are not 1 and both clips are at work.
    """

    def __init__(self):
        self.trajectories, self.rewards = by_hand.trajectories(seed=1), REWARDS
        self.halves = [slice(0, 4), slice(4, 8)]
        self.hosts = [_pack(self.trajectories[half], self.rewards[half], max_rows=8) for half in self.halves]
        draw = lambda seed, kind: slow_decoder.random_params(MODEL, seed, kind)
        self.scored, self.reference = draw(0, decoder.Policy), draw(1, decoder.Policy)
        self.scored_value = draw(2, decoder.Value)
        shifted = lambda tree: jax.tree.map(lambda x, noise: x + 0.15 * noise, *tree)
        self.policy = shifted((self.scored, draw(3, decoder.Policy)))
        self.value = shifted((self.scored_value, draw(4, decoder.Value)))

    def states(self, learner):
        """The state that scores, the reference, and the state that learns, on the mesh in use."""
        place = lambda params, kind: slow_decoder.on_mesh(MODEL, params, kind)
        scoring = learner.init(place(self.scored, decoder.Policy), place(self.scored_value, decoder.Value))
        learning = learner.init(place(self.policy, decoder.Policy), place(self.value, decoder.Value))
        return scoring, place(self.reference, decoder.Policy), learning

    def run(self, learner, *, step=STEP):
        """What the learner makes of it: numpy, the states after each update among it."""
        scoring, reference, state = self.states(learner)
        batches = [_to_mesh(host) for host in self.hosts]
        scores = [learner.score(scoring, reference, batch) for batch in batches]
        targets, statistics = learner.estimate(batches, scores, None, kl_coefficient=KL)
        states, updates = [], []
        for batch, score, target in zip(batches, scores, targets, strict=True):
            state, values = learner.update(state, batch, score, target, step, kl_coefficient=KL)
            states.append(jax.device_get(state))
            updates.append(jax.device_get(values))
        return Result(states, updates, *jax.device_get((scores, targets, statistics)))


@pytest.fixture(scope="module")
def mesh():
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def rollout(mesh):
    return Rollout()


@pytest.fixture(scope="module")
def ppo(mesh):
    return update.Learner(MODEL, PPO)


@pytest.fixture(scope="module")
def result(ppo, rollout):
    return rollout.run(ppo)


@pytest.fixture(scope="module")
def lessons(rollout):
    """The rollout's scores and targets, slowly: a list of lessons for each mini-batch."""
    temperature, everything = PPO.rollout.temperature, []
    for t, reward in zip(rollout.trajectories, rollout.rewards, strict=True):
        written = np.flatnonzero(t.sampled)
        old = slow_decoder.token_logp(rollout.scored, MODEL, t.tokens, temperature)
        reference = slow_decoder.token_logp(rollout.reference, MODEL, t.tokens, temperature)
        hidden, _ = slow_decoder.run(rollout.scored_value, MODEL, t.tokens)
        value = np.append(np.nan, (hidden @ rollout.scored_value["head"])[:-1])
        received = -KL * (old - reference)
        received[written[-1]] += reward
        advantage = by_hand.gae(received, value, written, discount=0.97, gae_lambda=0.9)
        everything.append(by_hand.Lesson(t.tokens, t.sampled, old, reference, advantage, value, advantage + value))
    pool = np.concatenate([lesson.advantage[lesson.written] for lesson in everything])
    whitened = [
        dataclasses.replace(lesson, advantage=(lesson.advantage - pool.mean()) / pool.std()) for lesson in everything
    ]
    return [whitened[half] for half in rollout.halves]


def test_scores_and_targets_are_those_of_a_slow_computation(result, rollout, lessons):
    for host, scores, targets, mine in zip(rollout.hosts, result.scores, result.targets, lessons, strict=True):
        pairs = (
            (scores.logp, "old_logp"), (scores.reference_logp, "reference_logp"), (scores.value, "old_value"),
            (targets.advantage, "advantage"), (targets.returns, "returns"),
        )  # fmt: skip
        for array, name in pairs:
            for piece, lesson in zip(_by_trajectory(array, host), mine, strict=True):
                expected = getattr(lesson, name)[lesson.written]
                np.testing.assert_allclose(piece[lesson.written], expected, atol=2e-5, err_msg=name)
    everything = [lesson for half in lessons for lesson in half]
    kl = np.concatenate([(lesson.old_logp - lesson.reference_logp)[lesson.written] for lesson in everything])
    np.testing.assert_allclose(result.statistics["kl_to_reference"], kl.mean(), rtol=1e-4)
    assert result.statistics["policy_tokens"] == len(kl)
    gap = [
        abs(lesson.old_logp - t.behaviour_logp)[lesson.written]
        for lesson, t in zip(everything, rollout.trajectories, strict=True)
    ]
    np.testing.assert_allclose(result.statistics["sampler_gap/mean"], np.concatenate(gap).mean(), rtol=1e-4)
    np.testing.assert_allclose(result.statistics["sampler_gap/max"], np.concatenate(gap).max(), rtol=1e-4)


def test_a_ppo_rollout_changes_the_weights_as_the_papers_formulas_do(ppo, result, rollout, lessons):
    policy, value = by_hand.AdamW(rollout.policy, PPO.policy), by_hand.AdamW(rollout.value, PPO.value)
    teach_policy = by_hand.Teacher(by_hand.policy_loss, decoder.abstract(decoder.Policy, MODEL)[0], PPO)
    teach_value = by_hand.Teacher(by_hand.value_loss, decoder.abstract(decoder.Value, MODEL)[0], PPO)
    for mine, statistics in zip(lessons, result.updates, strict=True):
        loss, gradient = teach_policy(policy.params, mine, ROW_TOKENS)
        policy.step(gradient, RATE)
        entropy = 0.03 * statistics["policy/entropy"]
        np.testing.assert_allclose(statistics["policy/loss"] - entropy, loss, atol=1e-5)
        assert 0.1 < statistics["policy/clipped"] < 0.9
        np.testing.assert_allclose(statistics["policy/learning_rate"], RATE, rtol=1e-6)
        loss, gradient = teach_value(value.params, mine, ROW_TOKENS)
        value.step(gradient, RATE)
        np.testing.assert_allclose(statistics["value/loss"], loss, rtol=1e-5)
    by_hand.assert_close(_gradients(result.states[-1]), [policy.mean, value.mean], relative=1e-4)
    by_hand.assert_close(_weights(result.states[-1]), (policy.params, value.params), relative=WEIGHTS)


def _first_update(rollout, learner, host, scores, targets, *, step=STEP):
    """The next state and statistics after one update; numpy in, numpy out."""
    state = rollout.states(learner)[2]
    on_mesh = map(_to_mesh, (host, scores, targets))
    return jax.device_get(learner.update(state, *on_mesh, step, kl_coefficient=KL))


def test_what_stands_at_tokens_that_the_policy_did_not_write_changes_nothing(ppo, result, rollout):
    host, others = rollout.hosts[0], ~rollout.hosts[0].policy_mask
    expected = _first_update(rollout, ppo, host, result.scores[0], result.targets[0])
    spoilt = lambda x, value: np.where(others, np.float32(value), x)
    for value in (np.nan, -1e4, 1e4):
        scores, targets = jax.tree.map(lambda x: spoilt(x, value), (result.scores[0], result.targets[0]))
        batch = dataclasses.replace(
            host,
            behaviour_logp=spoilt(host.behaviour_logp, value),
            reward=spoilt(host.reward, value),
            weight=spoilt(host.weight, value),
        )
        by_hand.assert_equal(_first_update(rollout, ppo, batch, scores, targets), expected)


def test_targets_take_nothing_from_tokens_that_the_policy_did_not_write(ppo, result, rollout):
    spoilt = lambda x, host: np.where(host.policy_mask, x, np.float32(np.nan))
    batches, scores = [], []
    for host, score in zip(rollout.hosts, result.scores, strict=True):
        spoilt_batch = dataclasses.replace(
            host, reward=spoilt(host.reward, host), behaviour_logp=spoilt(host.behaviour_logp, host)
        )
        batches.append(_to_mesh(spoilt_batch))
        scores.append(_to_mesh(jax.tree.map(lambda x, host=host: spoilt(x, host), score)))
    by_hand.assert_equal(ppo.estimate(batches, scores, None, kl_coefficient=KL), (result.targets, result.statistics))


def test_the_ablation_learns_from_everything_after_the_prompt(ppo, result, rollout):
    host = _pack(rollout.trajectories[:4], REWARDS[:4], max_rows=8, mask_environment=False)
    masked = _first_update(rollout, ppo, rollout.hosts[0], result.scores[0], result.targets[0])
    everything = _first_update(rollout, ppo, host, result.scores[0], result.targets[0])
    after_prompts = sum(len(t.tokens) - t.prompt_tokens for t in rollout.trajectories[:4])
    assert host.policy_mask.sum() == after_prompts > rollout.hosts[0].policy_mask.sum()
    assert abs(everything[1]["policy/entropy"] - masked[1]["policy/entropy"]) > 1e-3


def test_neither_cutting_nor_order_nor_padding_of_the_rows_changes_what_is_learned(ppo, result, rollout):
    host = rollout.hosts[0]
    expected, statistics = _first_update(rollout, ppo, host, result.scores[0], result.targets[0])
    backwards = _pack(rollout.trajectories[:4][::-1], REWARDS[:4][::-1], micro_batch_rows=1, max_rows=5)
    move = lambda x: _laid_out(_by_trajectory(x, host)[::-1], backwards)
    scores, targets = jax.tree.map(move, (result.scores[0], result.targets[0]))
    assert int(host.micro_batches) == 1 and int(backwards.micro_batches) == 2 < len(backwards.tokens)
    actual, actual_statistics = _first_update(rollout, ppo, backwards, scores, targets)
    by_hand.assert_close(_gradients(actual), _gradients(expected), relative=1e-5)
    by_hand.assert_close(_weights(actual), _weights(expected), relative=WEIGHTS)
    by_hand.assert_close(actual_statistics, statistics, relative=1e-5)


def test_padding_micro_batches_are_not_computed(result, rollout):
    for host, scores in zip(rollout.hosts, result.scores, strict=True):
        used = int(host.micro_batches)
        assert used == 1 and len(host.tokens) == 2
        # Computed, an empty place would have the log-prob of token 0, which is not 0.
        assert np.all(scores.logp[:used] != 0) and not np.any(scores.logp[used:])
        assert not np.any(scores.value[used:])


def test_while_the_value_model_warms_up_the_policy_and_its_optimizer_stay_as_they_are(ppo, result, rollout):
    before = jax.device_get(rollout.states(ppo)[2])
    warming, _ = _first_update(rollout, ppo, rollout.hosts[0], result.scores[0], result.targets[0], step=1)
    learning, _ = _first_update(rollout, ppo, rollout.hosts[0], result.scores[0], result.targets[0], step=2)
    by_hand.assert_equal((warming.policy, warming.policy_optimizer), (before.policy, before.policy_optimizer))
    assert np.any(warming.value["head"] != before.value["head"])
    assert np.any(learning.policy["decoder"]["embedding"] != before.policy["decoder"]["embedding"])


def test_the_state_is_donated(ppo, result, rollout):
    state = rollout.states(ppo)[2]
    batch, scores, targets = map(_to_mesh, (rollout.hosts[0], result.scores[0], result.targets[0]))
    ppo.update(state, batch, scores, targets, STEP, kl_coefficient=KL)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.policy, state.value)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((scores, targets)))


def test_rollouts_of_other_lengths_compile_nothing(ppo, result, rollout):
    before = ppo.compiled
    scoring, reference, state = rollout.states(ppo)
    for step, layouts in enumerate([((3, 1),) * 8, ((2, 28),) * 8, by_hand.LAYOUTS[::-1]]):
        trajectories = by_hand.trajectories(step, layouts)
        batches = [_to_mesh(_pack(trajectories[half], REWARDS[half], max_rows=8)) for half in rollout.halves]
        scores = [ppo.score(state, reference, batch) for batch in batches]
        targets, _ = ppo.estimate(batches, scores, None, kl_coefficient=KL / (step + 1))
        for batch, score, target in zip(batches, scores, targets, strict=True):
            state, _ = ppo.update(state, batch, score, target, step, kl_coefficient=KL, rate_scale=1 / (step + 1))
    assert ppo.compiled == before


def test_a_mesh_of_eight_learns_what_one_device_does(result, rollout):
    with jax.set_mesh(parallel.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])):
        on_eight = rollout.run(update.Learner(MODEL, PPO))
    by_hand.assert_close(_gradients(on_eight.states[0]), _gradients(result.states[0]), relative=1e-5)
    by_hand.assert_close(on_eight.targets, result.targets, relative=1e-5)
    by_hand.assert_close(on_eight.statistics, result.statistics, relative=1e-5)
    by_hand.assert_close(_weights(on_eight.states[-1]), _weights(result.states[-1]), relative=WEIGHTS)


def _memories(tree) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def test_what_waits_in_host_memory_changes_no_bit(rollout):
    offloading = PPO.replace({"learner.offload": ("reference", "optimizer")})
    with jax.set_mesh(meshes.make(2, 2, 2)):
        expected, learner = rollout.run(update.Learner(MODEL, PPO)), update.Learner(MODEL, offloading)
        _, reference, state = rollout.states(learner)
        layouts = jax.tree.map(lambda x: x.sharding.spec, state)
        reference, batch = learner.keep(reference), _to_mesh(rollout.hosts[0])
        device, host = {jax.devices()[0].default_memory().kind}, {parallel.HOST_MEMORY}
        waiting = lambda: _memories((reference, state.policy_optimizer, state.value_optimizer))
        assert waiting() == host and _memories((state.policy, state.value)) == device
        scores = learner.score(rollout.states(learner)[0], reference, batch)
        by_hand.assert_equal(scores, expected.scores[0])
        targets = _to_mesh(expected.targets[0])
        for step in (STEP, STEP + 1):  # the second begins with what the first put away
            state, statistics = learner.update(state, batch, scores, targets, step, kl_coefficient=KL)
            if step == STEP:
                by_hand.assert_equal((state, statistics), (expected.states[0], expected.updates[0]))
            assert waiting() == host and _memories((state.policy, state.value)) == device
        assert jax.tree.map(lambda x: x.sharding.spec, state) == layouts
        assert learner.compiled == 2  # score and update, once each


# Other algorithms, by `learning.step`: two questions of three samples in each of two mini-batches.

SLOW_RATE = RATE / 10  # so that rounding, of which Adam makes whole steps, is not felt in the second gradient
PRESETS = {
    "grpo": {},
    "rloo": {"kl_estimator": "k2"},
    "dr_grpo": {"constant_tokens": 40},
    "dapo": {"importance_cap": 1.1},
    "gspo": {"clip_low": 0.001, "clip_high": 0.002},
}
GROUPED_REWARDS = [1, 0, 0, 0, 0, 0, 0.2, 1, 0, 1, 1, 1]  # the second and the fourth question do not vary


def _weights_a_token(c, trajectories):
    """What each trajectory's tokens weigh in a mini-batch, from the papers' formulas."""
    written = [int(t.sampled.sum()) for t in trajectories]
    return {
        "token_mean": [1 / sum(written)] * len(written),
        "sequence_mean": [1 / (len(written) * n) for n in written],
        "constant": [1 / (len(written) * 40)] * len(written),
    }[c.aggregation]


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_changes_the_weights_as_the_papers_formulas_do(mesh, rollout, tmp_path, name):
    config = base.get_config()
    config.seed = 1  # at step 0 it leaves four questions in their order
    presets.ALGORITHMS[name](config)
    config.rollout.update(samples=3, questions=4, context_tokens=ROW_TOKENS, temperature=0.8)
    config.learner.update(row_tokens=(ROW_TOKENS,), micro_batch_rows=2, vocab_chunk=8, value_warmup_steps=2)
    config.algorithm.update(entropy_coefficient=0.03, **PRESETS[name])
    if config.algorithm.kl_coefficient:
        config.algorithm.kl_coefficient = KL
    config.policy.update(
        learning_rate=SLOW_RATE, warmup_steps=0, b1=0.8, b2=0.9, weight_decay=0.1, max_gradient_norm=0.3
    )
    s, rng = settings.Settings.of(config), np.random.default_rng(5)
    learner, c, temperature = update.Learner(MODEL, s), s.algorithm, s.rollout.temperature
    layouts = by_hand.LAYOUTS + by_hand.LAYOUTS[:4]
    trajectories = [by_hand.trajectory(f"q{i // 3}", layout, rng, sample=i % 3) for i, layout in enumerate(layouts)]
    advantages = [
        advantage
        for question in range(4)
        for advantage in by_hand.group_advantages(c.advantage, GROUPED_REWARDS[3 * question : 3 * question + 3])
    ]
    slow, lessons = by_hand.AdamW(rollout.policy, s.policy), []
    for t, advantage in zip(trajectories, advantages, strict=True):
        old = slow_decoder.token_logp(rollout.policy, MODEL, t.tokens, temperature)
        reference = slow_decoder.token_logp(rollout.reference, MODEL, t.tokens, temperature)
        nothing = np.zeros(len(t.tokens))
        if c.importance_cap:  # a positive factor of the loss is one of the advantage
            advantage = advantage * np.minimum(np.exp(np.where(t.sampled, old - t.behaviour_logp, 0)), 1.1)
        lessons.append(by_hand.Lesson(t.tokens, t.sampled, old, reference, advantage + nothing, nothing, nothing))
    teach = by_hand.Teacher(by_hand.policy_loss, decoder.abstract(decoder.Policy, MODEL)[0], s)
    # Without variance a question is left out where the algorithm says so, and else teaches KL and entropy alone.
    kept = [0, 1, 2, 6, 7, 8] if c.drop_equal_groups else list(range(12))
    for half in (kept[: len(kept) // 2], kept[len(kept) // 2 :]):
        weights = _weights_a_token(c, [trajectories[i] for i in half])
        _, gradient = teach(slow.params, [lessons[i] for i in half], ROW_TOKENS, weights)
        slow.step(gradient, SLOW_RATE)

    place = lambda params: slow_decoder.on_mesh(MODEL, params)
    state = learner.init(place(rollout.policy), None)
    # At step 0: there is no value model whose warm-up the policy would have to wait for.
    state, values = learning.learn(
        learner, state, place(rollout.reference) if learner.has_reference else None,
        trajectories, GROUPED_REWARDS, 0, kl_coefficient=KL, failed=tmp_path,
    )  # fmt: skip
    assert state.value is None and not any(name.startswith("value/") for name in values)
    assert ("kl_to_reference" in values) == learner.has_reference == bool(c.kl_coefficient)
    by_hand.assert_close(_gradients(state), [slow.mean], relative=1e-4)
    by_hand.assert_close(state.policy, slow.params, relative=WEIGHTS)


def test_estimates_without_their_mask_see_what_the_environment_wrote(result, rollout, lessons):
    """As the published code has it: GAE, whitening and the value loss run over all that follows the prompts."""
    learner = update.Learner(MODEL, PPO.replace({"algorithm.mask_estimates": False}))
    batches = [_to_mesh(host) for host in rollout.hosts]
    targets, _ = learner.estimate(batches, [_to_mesh(s) for s in result.scores], None, kl_coefficient=KL)
    everything = []
    for t, reward, lesson in zip(
        rollout.trajectories, rollout.rewards, [lesson for half in lessons for lesson in half], strict=True
    ):
        response = np.arange(t.prompt_tokens, len(t.tokens))
        received = np.where(lesson.written, -KL * (lesson.old_logp - lesson.reference_logp), 0.0)
        received[np.flatnonzero(t.sampled)[-1]] += reward
        options = dict(discount=0.97, gae_lambda=0.9)
        everything.append((response, by_hand.gae(received, lesson.old_value, response, **options), lesson))
    pool = np.concatenate([advantage[response] for response, advantage, _ in everything])
    for half, host, target in zip((everything[:4], everything[4:]), rollout.hosts, targets, strict=True):
        pieces = zip(_by_trajectory(target.advantage, host), _by_trajectory(target.returns, host), half, strict=True)
        for advantage, returns, (response, slow, lesson) in pieces:
            whitened = (slow - pool.mean()) / pool.std()
            np.testing.assert_allclose(advantage[lesson.written], whitened[lesson.written], atol=5e-5)
            assert not advantage[~lesson.written].any()  # nothing but the policy's tokens is reinforced
            np.testing.assert_allclose(returns[response], (slow + lesson.old_value)[response], atol=5e-5)


def test_the_penalty_is_of_the_policys_tokens_alone_also_where_estimates_are_not_masked(result, rollout):
    """The reference differs in what was retrieved, by 2 nats a token, and nowhere else: nobody is punished for it."""
    learner = update.Learner(MODEL, PPO.replace({"algorithm.mask_estimates": False, "algorithm.whiten": False}))
    batches = [_to_mesh(host) for host in rollout.hosts]

    def estimated(nats):
        scores = [s._replace(reference_logp=np.where(host.policy_mask, s.logp, s.logp - nats).astype(np.float32))
                  for s, host in zip(result.scores, rollout.hosts, strict=True)]  # fmt: skip
        return learner.estimate(batches, [_to_mesh(s) for s in scores], None, kl_coefficient=0.1)[0]

    assert any((host.response & ~host.policy_mask).any() for host in rollout.hosts)
    bits.assert_equal(jax.device_get(estimated(2.0)), jax.device_get(estimated(0.0)))


@pytest.mark.parametrize("rows", [1, 2, 4, 16])
def test_any_number_of_micro_batches_is_the_same_update(ppo, result, rollout, rows):
    """Eight trajectories, packed or one a row, cut into micro-batches of so many rows."""
    expected = rollout_update(ppo, rollout, result, micro_batch_rows=8)
    actual = rollout_update(ppo, rollout, result, micro_batch_rows=rows)
    by_hand.assert_close(_gradients(actual[0]), _gradients(expected[0]), relative=1e-5)
    by_hand.assert_close(actual[1], expected[1], relative=1e-5)


def rollout_update(learner, rollout, result, *, micro_batch_rows):
    """The update of one mini-batch of all eight trajectories."""
    host = _pack(rollout.trajectories, REWARDS, micro_batch_rows=micro_batch_rows, max_rows=16)
    pieces = lambda field: [piece for r, h in zip(field, rollout.hosts, strict=True) for piece in _by_trajectory(r, h)]
    scores, targets = (
        type(records[0])(*(_laid_out(pieces(column), host) for column in zip(*records, strict=True)))
        for records in (result.scores, result.targets)
    )
    return _first_update(rollout, learner, host, scores, targets)


@pytest.mark.parametrize("field, value", [("advantage", "gea"), ("policy_loss", "ppo"), ("kl_estimator", "k4")])
def test_a_misspelt_choice_is_refused_by_name(mesh, field, value):
    with pytest.raises(ValueError, match=f"algorithm.{field} names '{value}'; make it one of"):
        update.Learner(MODEL, PPO.replace({f"algorithm.{field}": value}))


def test_rows_that_do_not_divide_over_the_mesh_are_refused():
    with (
        jax.set_mesh(meshes.make(2, 2)),
        pytest.raises(ValueError, match="learner.micro_batch_rows of 6 does not divide over 4 shards"),
    ):
        update.Learner(MODEL, PPO.replace({"learner.micro_batch_rows": 6}))
