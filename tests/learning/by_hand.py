"""Learning once more, a trajectory and a token at a time, from the papers' formulas; and trajectories for it.

What it shares with the package is the decoder (compared with numpy in `models/`), run here on one unpacked
trajectory, and the layout of its weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import slow_decoder

from searchr1_jax.core import parallel, settings, types
from searchr1_jax.models import decoder

# Tokens of the prompt, then by turns of the policy and of the environment.
LAYOUTS = ((4, 3, 5, 2), (6, 5), (3, 2, 4, 1, 6, 4), (5, 1), (4, 7, 3, 3), (3, 4, 2, 5), (7, 2, 6, 2), (3, 9))


def algorithm(**changes) -> settings.Algorithm:
    """The section `algorithm` with its defaults but for `changes`."""
    return dataclasses.replace(settings.Algorithm(), **changes)


def trajectory(example_id: str, layout, rng: np.random.Generator, *, sample: int = 0, vocab: int = 64):
    """Random tokens whose runs have the lengths of the layout; the policy wrote the second, fourth, … run."""
    sampled = np.repeat(np.arange(len(layout)) % 2 == 1, layout)
    return types.Trajectory(
        example=types.QAExample(id=example_id, question="", golden_answers=()),
        sample=sample,
        tokens=rng.integers(0, vocab, len(sampled)).astype(np.int32),
        sampled=sampled,
        behaviour_logp=np.where(sampled, -rng.random(len(sampled)), 0).astype(np.float32),
        prompt_tokens=layout[0],
        turns=(),
        stop_reason="answered",
        answer=None,
    )


def trajectories(seed: int, layouts=LAYOUTS) -> list[types.Trajectory]:
    rng = np.random.default_rng(seed)
    return [trajectory(f"q{i}", layout, rng) for i, layout in enumerate(layouts)]


# Packed rows: to whom each place belongs (0: to nobody), and the tokens that the policy wrote.
SEGMENTS = ("111111111112222222", "111112223333000000", "000000000000000000", "111111111111111111")
WRITTEN = ("..WWW..WW.W...WW.W", "WW...W.W..........", "..................", "W..WWWWW.W..WW....")


def packed_rows():
    """The mask and the segments above, each [4, 18]; the third trajectory of the second row wrote nothing."""
    mask = np.array([[letter == "W" for letter in row] for row in WRITTEN])
    return mask, np.array([[int(digit) for digit in row] for row in SEGMENTS], np.int32)


def each_trajectory(mask, segment):
    """The row, the places and, counted among these, the written tokens of every trajectory of packed rows."""
    for row in range(len(mask)):
        for number in range(1, segment[row].max() + 1):
            places = np.flatnonzero(segment[row] == number)
            yield row, places, [t for t, place in enumerate(places) if mask[row, place]]


def gae(reward, value, written, *, discount, gae_lambda):
    """Aₜ = Σₖ (γλ)ᵏ δₜ₊ₖ over the `written` tokens of one trajectory; δ = r + γ V(next written) − V."""
    value_after = {now: value[after] for now, after in itertools.pairwise(written)}
    delta = {t: reward[t] + discount * value_after.get(t, 0.0) - value[t] for t in written}
    advantage = np.zeros(len(reward))
    for i, t in enumerate(written):
        advantage[t] = sum((discount * gae_lambda) ** k * delta[later] for k, later in enumerate(written[i:]))
    return advantage


def returns(reward, written, *, discount):
    """Gₜ = Σₖ γᵏ rₜ₊ₖ over the `written` tokens of one trajectory."""
    result = np.zeros(len(reward))
    for i, t in enumerate(written):
        result[t] = sum(discount**k * reward[later] for k, later in enumerate(written[i:]))
    return result


def group_advantages(name: str, rewards: list[float]) -> list[float]:
    """The advantages of a question's samples, each formula as its paper has it."""
    if len(rewards) == 1 or name == "reward":
        return rewards
    if name == "leave_one_out":
        return [r - statistics.mean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    scale = {"group_mean": 1.0, "group_standardised": statistics.stdev(rewards) + 1e-6}[name]
    return [(r - statistics.mean(rewards)) / scale for r in rewards]


def turn_returns(rewards: list[list[float]], *, discount: float) -> list[list[float]]:
    """A_k = Σ_{j≥k} γ^{j−k} r̂_j, rewards standardised over all turns of all samples of a question."""
    every = [reward for sample in rewards for reward in sample]
    mean, scale = statistics.mean(every), statistics.stdev(every) + 1e-6
    return [
        [
            sum(discount ** (j - k) * (sample[j] - mean) / scale for j in range(k, len(sample)))
            for k in range(len(sample))
        ]
        for sample in rewards
    ]


def clipped_objective(ratio, advantage, *, clip_low, clip_high, dual_clip=0.0) -> float:
    """min(ρ A, clamp(ρ) A), and with a dual clip max(that, c A) for a negative A; of one token or one sequence."""
    bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
    objective = min(ratio * advantage, bounded * advantage)
    return max(objective, dual_clip * advantage) if dual_clip and advantage < 0 else objective


def sequence_objective(logp, old_logp, advantage, **clip) -> float:
    """GSPO's objective of one trajectory, from the log-probs of its written tokens."""
    likelihood, old_likelihood = math.exp(math.fsum(logp)), math.exp(math.fsum(old_logp))
    return clipped_objective((likelihood / old_likelihood) ** (1 / len(logp)), advantage, **clip)


def slope(f, x, step=1e-5):
    """∂f/∂xₜ by central differences, float64."""
    nudges = step * np.eye(len(x))
    return np.array([(f(x + nudge) - f(x - nudge)) / (2 * step) for nudge in nudges])


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one trajectory teaches; arrays [T]."""

    tokens: np.ndarray
    written: np.ndarray  # bool
    old_logp: np.ndarray
    reference_logp: np.ndarray
    advantage: np.ndarray
    old_value: np.ndarray
    returns: np.ndarray

    def padded(self, length: int) -> Lesson:
        """Zeros behind the last token, which a causal model does not see, so that one program serves all."""
        pad = lambda x: np.pad(x, (0, length - len(x)))
        return Lesson(*(pad(np.where(self.written, x, 0) if x.dtype.kind == "f" else x) for x in _fields(self)))


def _fields(lesson: Lesson) -> list[np.ndarray]:
    return [getattr(lesson, field.name) for field in dataclasses.fields(lesson)]


jax.tree_util.register_dataclass(Lesson)


def _alone(tokens):
    """One trajectory as the only row: tokens, positions and segment, each [1, T]."""
    rows = tokens[None], jnp.arange(len(tokens))[None], jnp.ones((1, len(tokens)), jnp.int32)
    return jax.sharding.reshard(rows, parallel.spec("batch", None))


def _only_row(x):
    return jax.sharding.reshard(x, jax.P())[0]


def _all_logp(policy: decoder.Policy, tokens, temperature):
    """log π of the whole vocabulary at each place of one trajectory, [T, V]."""
    before = policy.decoder.packed(*_alone(tokens), slow_decoder.COMPUTE)
    return jax.nn.log_softmax(_only_row(policy.logits(before)) / temperature)


def weighted_loss(policy: decoder.Policy, tokens, weight) -> jax.Array:
    """−Σ wₜ log π(t) of one trajectory."""
    return -jnp.sum(weight * _all_logp(policy, tokens, 1.0)[jnp.arange(len(tokens)), tokens])


def policy_loss(policy: decoder.Policy, lesson: Lesson, s: settings.Settings) -> jax.Array:
    """The clipped objective, the entropy bonus and the KL (k2, or k3 of at most 10), summed over a trajectory.

    GSPO's ratio is that of the whole trajectory: the geometric mean of its tokens'.
    """
    c, logp_TV = s.algorithm, _all_logp(policy, lesson.tokens, s.rollout.temperature)
    logp = logp_TV[jnp.arange(len(lesson.tokens)), lesson.tokens]
    ratio = jnp.exp(logp - lesson.old_logp)
    if c.policy_loss == "gspo_clip":
        change = jnp.where(lesson.written, logp - lesson.old_logp, 0.0)
        ratio = jnp.exp(jnp.sum(change) / jnp.sum(lesson.written))
    bounded = jnp.minimum(jnp.maximum(ratio, 1 - c.clip_low), 1 + c.clip_high)
    loss = -jnp.minimum(ratio * lesson.advantage, bounded * lesson.advantage)
    loss += c.entropy_coefficient * jnp.sum(jnp.exp(logp_TV) * logp_TV, axis=-1)
    if c.kl_coefficient and c.kl_in == "loss":
        gap = lesson.reference_logp - logp
        kl = {"k2": gap**2 / 2, "k3": jnp.minimum(jnp.exp(gap) - gap - 1, 10.0)}[c.kl_estimator]
        loss += c.kl_coefficient * kl
    return jnp.sum(jnp.where(lesson.written, loss, 0.0))


def value_loss(model: decoder.Value, lesson: Lesson, s: settings.Settings) -> jax.Array:
    """½ max of the squared errors with and without the clip, summed over one trajectory."""
    value = _only_row(model(*_alone(lesson.tokens), slow_decoder.COMPUTE))
    clip = s.algorithm.value_clip
    near = jnp.minimum(jnp.maximum(value, lesson.old_value - clip), lesson.old_value + clip)
    loss = jnp.maximum((value - lesson.returns) ** 2, (near - lesson.returns) ** 2) / 2
    return jnp.sum(jnp.where(lesson.written, loss, 0.0))


class Teacher:
    """Loss and gradient of a list of lessons, one lesson after the other: a mean over the written tokens, or a sum
    that gives each lesson its weight a token."""

    def __init__(self, loss, graph, s: settings.Settings):
        self._of_one = jax.jit(jax.value_and_grad(lambda params, x: loss(decoder.bind(graph, params), x, s)))

    def __call__(self, params, lessons: list[Lesson], length: int, weights: list[float] | None = None):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        each = jax.device_get([self._of_one(params, lesson.padded(length)) for lesson in lessons])
        count = sum(lesson.written.sum() for lesson in lessons)
        weights = weights or [1 / count] * len(lessons)
        return jax.tree.map(lambda *pieces: sum(w * x for w, x in zip(weights, pieces, strict=True)), *each)


class AdamW:
    """AdamW with a clipped gradient on a tree of numpy arrays, float64."""

    def __init__(self, params, config: settings.Optimizer):
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(params))
        self.config, self.count = config, 0
        self.mean = jax.tree.map(np.zeros_like, self.params)
        self.square = jax.tree.map(np.zeros_like, self.params)

    def step(self, gradient, learning_rate: float) -> None:
        c = self.config
        gradient = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(gradient))
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda g: g * min(1.0, c.max_gradient_norm / norm), gradient)
        self.count += 1
        self.mean = jax.tree.map(lambda m, g: c.b1 * m + (1 - c.b1) * g, self.mean, gradient)
        self.square = jax.tree.map(lambda v, g: c.b2 * v + (1 - c.b2) * g**2, self.square, gradient)

        def moved(p, m, v):
            m, v = m / (1 - c.b1**self.count), v / (1 - c.b2**self.count)
            return p - learning_rate * (m / (np.sqrt(v) + 1e-8) + c.weight_decay * p)

        self.params = jax.tree.map(moved, self.params, self.mean, self.square)


def adam_mean(optimizer_state):
    """The first moments in an optax state: the clipped gradients, averaged."""
    (mean,) = [part.mu for part in optimizer_state if hasattr(part, "mu")]
    return mean


def assert_close(actual, expected, *, relative: float):
    """Every array of two trees agrees in norm, relative to the expected one."""
    actual, expected = jax.device_get((actual, expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        gap = np.linalg.norm(np.ravel(a - e)) / max(np.linalg.norm(np.ravel(e)), 1e-12)
        assert gap <= relative, f"{jax.tree_util.keystr(path)} is off by {gap:.2e}"


def assert_equal(actual, expected):
    """Two trees are equal to the last bit."""
    actual, expected = jax.device_get((actual, expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, e, err_msg=jax.tree_util.keystr(path))
