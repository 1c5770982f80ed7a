r"""What packing, the chunked vocabulary projection and a step of GRPO cost a learner.

python -m searchr1_jax.bench.learner [--repeats=3] [--seed=0] [--json]

Packing: a small model's policy update over the same trajectories, packed into rows of one length, and one trajectory a
row, all rows as long as the longest. Lengths are log-normal; a prompt and retrieved passages take their share of each.
Rows of one length cost the same, whatever they hold, so a few of each kind are run and their seconds scaled to all.

    packed_over_padded    learned tokens a second, packed / padded
    row_utilisation       share of the packed rows' places that hold a token

Projection: gradient of the tokens' log-probs with respect to hidden states and output embedding, with all logits at
once and as the learner has it. Temporaries are the compiler's figure for a full micro-batch, which is not run; times
are of fewer tokens, with as many logits at once as there.

    chunked_memory_ratio  temporaries, chunked / dense
    chunked_time_ratio    seconds, chunked / dense

A GRPO step of 48M parameters, everything in float32, without compiling:

    grpo_rollout_s        prompts, shared by the samples of a question, and all new tokens of all samples
    grpo_update_s         scores of policy and reference, advantages, one update with the KL in the loss

Repeats are interleaved, ratios are the medians of the repeats' ratios, seconds are medians.
"""

import dataclasses
import pathlib
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.bench import decode, measuring
from searchr1_jax.core import parallel, settings, types
from searchr1_jax.data import packing
from searchr1_jax.learning import step as learning, update
from searchr1_jax.models import config as model_config, decoder

COMPUTE = decoder.Compute(dtype=jnp.float32, remat=False, attention="auto")
KL_COEFFICIENT = 0.001


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Trajectories, rows and the model that learns from them.

    Attention over a row takes a share of its arithmetic that lies between those of Qwen2.5-3B and 7B.
    """

    model: model_config.ModelConfig = dataclasses.replace(decode.MODEL, vocab_size=2_048, layers=1, heads=1, kv_heads=1)
    trajectories: int = 128
    mean_tokens: int = 600
    sigma: float = 0.8  # of the logarithm
    prompt_tokens: tuple[int, int] = (100, 200)  # ranges are uniform and hold both ends
    turn_tokens: tuple[int, int] = (20, 100)
    passage_tokens: tuple[int, int] = (100, 200)
    row_tokens: int = 4_096  # the limit of a trajectory, too
    vocab_chunk: int = 64  # divides the rows; padded ones are rounded up to it
    rows_run: int = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """The vocabulary, a full micro-batch, and what is run of it."""

    vocab_size: int = 151_936
    width: int = 896
    rows: int = 16
    row_tokens: int = 1_024
    vocab_chunk: int = 32  # of all rows together: rows x vocab_chunk tokens have logits at once
    tokens_run: int = 1_024

    @property
    def model(self) -> model_config.ModelConfig:
        """One without layers."""
        sizes = {"vocab_size": self.vocab_size, "width": self.width}
        return dataclasses.replace(decode.MODEL, layers=0, tied_embeddings=False, **sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A rollout that is learned from in one update."""

    model: model_config.ModelConfig = decode.MODEL
    questions: int = 8
    samples: int = 4
    prompt: int = 64  # tokens
    new: int = 128  # tokens
    micro_batch_rows: int = 8  # a trajectory each, as all are of one length


def grpo_learner(
    model: model_config.ModelConfig, *, samples: int, row_tokens: int, micro_batch_rows: int, vocab_chunk: int
) -> update.Learner:
    """The published GRPO, a rollout an update."""
    return update.Learner(model, settings.Settings().replace({
        "rollout.samples": samples, "learner.updates_per_rollout": 1, "learner.row_tokens": (row_tokens,),
        "learner.micro_batch_rows": micro_batch_rows, "learner.vocab_chunk": vocab_chunk, "policy.warmup_steps": 0,
        "algorithm.advantage": "group_standardised", "algorithm.kl_in": "loss", "algorithm.kl_estimator": "k3",
        "algorithm.kl_coefficient": KL_COEFFICIENT,
    }))  # fmt: skip


def _trajectory(
    question: int, sample: int, tokens: np.ndarray, sampled: np.ndarray, behaviour_logp: np.ndarray
) -> types.Trajectory:
    return types.Trajectory(
        example=types.QAExample(id=f"q{question}", question="", golden_answers=()),
        sample=sample, tokens=tokens.astype(np.int32), sampled=sampled, behaviour_logp=behaviour_logp,
        prompt_tokens=int(np.argmax(sampled)), turns=(), stop_reason="answered", answer=None,
    )  # fmt: skip


def trajectories(p: Packing, *, seed: int) -> list[types.Trajectory]:
    """Random tokens: a prompt, then turns and passages until the length is reached, a turn's token last."""
    rng, made = np.random.default_rng(seed), []
    between = lambda both: int(rng.integers(both[0], both[1] + 1))
    spread = rng.lognormal(np.log(p.mean_tokens) - p.sigma**2 / 2, p.sigma, p.trajectories)
    for i, length in enumerate(np.clip(np.rint(spread), 2, p.row_tokens).astype(int)):
        sampled = np.ones(length, bool)
        place = min(between(p.prompt_tokens), length // 2)
        sampled[:place] = False
        while (place := place + between(p.turn_tokens)) < length - 1:
            passages = min(between(p.passage_tokens), length - 1 - place)
            sampled[place : place + passages] = False
            place += passages
        logp = np.where(sampled, -np.log(p.model.vocab_size), 0).astype(np.float32)
        made.append(_trajectory(i, 0, rng.integers(p.model.vocab_size, size=length), sampled, logp))
    return made


def packed(p: Packing, these: list[types.Trajectory]) -> types.Batch:
    """As many rows in use as first-fit takes, a row a micro-batch."""
    return packing.pack(these, [1.0] * len(these), row_tokens=p.row_tokens, micro_batch_rows=1, max_rows=len(these))


def padded(p: Packing, these: list[types.Trajectory]) -> types.Batch:
    """One trajectory a row, all rows as long as the longest."""
    longest = max(len(t.tokens) for t in these)
    row_tokens = -(-longest // p.vocab_chunk) * p.vocab_chunk
    alone = [packing.pack([t], [1.0], row_tokens=row_tokens, micro_batch_rows=1, max_rows=1) for t in these]
    together = jax.tree.map(lambda *parts: np.concatenate([np.atleast_1d(x) for x in parts]), *alone)
    return dataclasses.replace(together, micro_batches=np.int32(len(alone)))


def _updating(p: Packing, learner: update.Learner, params: decoder.Params, host: types.Batch):
    """An update of a state of its own from `rows_run` rows of the batch, compiled: it has learned from none once."""
    state = learner.init(jax.tree.map(jnp.copy, params), None)
    zeros, ones = np.zeros_like(host.reward), np.ones_like(host.reward)
    scores = update.Scores(host.behaviour_logp, host.behaviour_logp, zeros)
    place = lambda tree: parallel.to_mesh(tree, None, "batch", None)
    batch, scores, targets = map(place, (host, scores, update.Targets(ones, zeros)))

    def run(rows=p.rows_run):
        nonlocal state
        share = dataclasses.replace(batch, micro_batches=parallel.to_mesh(np.int32(rows)))
        state, _ = learner.update(state, share, scores, targets, 0, kl_coefficient=KL_COEFFICIENT)
        jax.block_until_ready(state)

    run(rows=0)
    return run


def packing_figures(p: Packing, *, repeats: int, seed: int) -> dict[str, float]:
    these = trajectories(p, seed=seed)
    batches = {"packed": packed(p, these), "padded": padded(p, these)}
    rows = {"row_tokens": p.row_tokens, "micro_batch_rows": 1, "vocab_chunk": p.vocab_chunk}
    learner = grpo_learner(p.model, samples=1, **rows)
    params = decoder.init(decoder.Policy, p.model, seed=seed)
    runs = {name: _updating(p, learner, params, batch) for name, batch in batches.items()}
    learned = sum(int(t.sampled.sum()) for t in these)
    rates = {
        name: [learned / (int(batches[name].micro_batches) * s / p.rows_run) for s in seconds]
        for name, seconds in measuring.interleaved(repeats, runs).items()
    }
    return {
        "packed_over_padded": measuring.median_ratio(rates["packed"], rates["padded"]),
        "row_utilisation": float(np.mean(batches["packed"].segment[: int(batches["packed"].micro_batches)] > 0)),
    } | {f"{name}_tokens_per_s": statistics.median(rate) for name, rate in rates.items()}


def gradient(model: model_config.ModelConfig, vocab_chunk: int | None) -> Any:
    """Jitted: parameters, tokens, weights -> gradient of the weighted log-probs; of the norm and the head, so of hidden
    states as well. The embedding is left as it is: its gradient would cost all alike. Without `vocab_chunk` all logits
    are there at once, and kept for the backward pass.
    """
    graph, _ = decoder.abstract(decoder.Policy, model)

    def logp(policy, token_BT):
        if vocab_chunk is not None:
            options = {"temperature": 1.0, "vocab_chunk": vocab_chunk}
            return policy.token_statistics(token_BT, token_BT, token_BT, COMPUTE, **options)[0]
        logits_BTV = policy.logits(policy.decoder.packed(token_BT, token_BT, token_BT, COMPUTE))
        chosen = jax.nn.one_hot(token_BT, model.vocab_size, dtype=bool)
        return jnp.sum(jnp.where(chosen, jax.nn.log_softmax(logits_BTV), 0.0), axis=-1)

    def loss(learned, rest, token_BT, weight_BT):
        body = rest["decoder"] | {"norm": learned["norm"]}
        policy = decoder.bind(graph, {"head": learned["head"], "decoder": body})
        return jnp.sum(weight_BT * logp(policy, token_BT))

    def run(params, token_BT, weight_BT):
        learned = {"head": params["head"], "norm": params["decoder"]["norm"]}
        return jax.grad(loss)(learned, params, token_BT, weight_BT)

    return jax.jit(run)


def projection_figures(p: Projection, *, repeats: int, seed: int) -> dict[str, float]:
    model, rng = p.model, np.random.default_rng(seed)
    batch = jax.sharding.NamedSharding(jax.sharding.get_mesh(), parallel.spec("batch", None))
    full = [jax.ShapeDtypeStruct((p.rows, p.row_tokens), kind, sharding=batch) for kind in (jnp.int32, jnp.float32)]
    _, abstract = decoder.abstract(decoder.Policy, model)
    dense, chunked = (  # bytes that the compiler reserves beside arguments and results
        gradient(model, chunk).lower(abstract, *full).compile().memory_analysis().temp_size_in_bytes
        for chunk in (None, p.vocab_chunk)
    )
    tokens = rng.integers(p.vocab_size, size=(1, p.tokens_run), dtype=np.int32)
    params = decoder.init(decoder.Policy, model, seed=seed)
    arguments = params, *parallel.to_mesh((tokens, np.ones_like(tokens, np.float32)), "batch", None)
    ways = {"dense": gradient(model, None), "chunked": gradient(model, p.rows * p.vocab_chunk)}  # in one row
    runs = {name: lambda way=way: jax.block_until_ready(way(*arguments)) for name, way in ways.items()}
    measuring.interleaved(1, runs)  # compiles
    seconds = measuring.interleaved(repeats, runs)
    return {
        "chunked_memory_ratio": chunked / dense,
        "chunked_time_ratio": measuring.median_ratio(seconds["chunked"], seconds["dense"]),
        "dense_gb": dense / 1e9,
        "chunked_gb": chunked / 1e9,
    }


class GRPO:
    """An actor and a learner of the same policy."""

    def __init__(self, s: Step, *, seed: int):
        self._step, self._rng, row_tokens = s, np.random.default_rng(seed), s.prompt + s.new
        rows = {"row_tokens": row_tokens, "micro_batch_rows": s.micro_batch_rows, "vocab_chunk": row_tokens}
        self._learner = grpo_learner(s.model, samples=s.samples, **rows)
        self._reference = decoder.init(decoder.Policy, s.model, seed=seed)
        self._state = self._learner.init(jax.tree.map(jnp.copy, self._reference), None)
        sizes = {"prompt": s.prompt, "new": s.new, "questions": s.questions, "samples": s.samples}
        self._engine = decode.writer(s.model, self._state.policy, **sizes)

    def roll_out(self) -> list[types.Trajectory]:
        """Samples of new random prompts."""
        s = self._step
        prompts = self._rng.integers(s.model.vocab_size, size=(s.questions, s.prompt))
        written = decode.write(self._engine, prompts)
        tokens = np.concatenate([np.repeat(prompts, s.samples, axis=0), written.tokens], axis=1)
        logp = np.pad(written.logp, ((0, 0), (s.prompt, 0)))
        sampled = np.arange(s.prompt + s.new) >= s.prompt
        return [_trajectory(*divmod(slot, s.samples), tokens[slot], sampled, logp[slot]) for slot in range(len(tokens))]

    def learn(self, these: list[types.Trajectory]) -> dict[str, float]:
        """One update from trajectories of which every other one is rewarded; its statistics."""
        rewards = [float(i % 2) for i in range(len(these))]
        self._state, values = learning.learn(
            self._learner, self._state, self._reference, these, rewards, 0,
            kl_coefficient=KL_COEFFICIENT, failed=pathlib.Path(tempfile.gettempdir()) / "failed",
        )  # fmt: skip
        jax.block_until_ready(self._state)
        return values


def step_figures(s: Step, *, repeats: int, seed: int) -> dict[str, float]:
    step = GRPO(s, seed=seed)
    these = step.roll_out()
    step.learn(these)  # compiles
    runs = {"grpo_rollout_s": step.roll_out, "grpo_update_s": lambda: step.learn(these)}
    return {name: statistics.median(s) for name, s in measuring.interleaved(repeats, runs).items()}


def measure(p: Packing, projection: Projection, step: Step, **options: int) -> dict[str, float]:
    """All figures, with these repeats and this seed."""
    return packing_figures(p, **options) | projection_figures(projection, **options) | step_figures(step, **options)


def main():
    given = measuring.flags(__doc__, repeats=3, seed=0)
    asked = {"repeats": given.repeats, "seed": given.seed}
    with measuring.one_device():
        measuring.tell(asked, measure(Packing(), Projection(), Step(), **asked), as_json=given.json)


if __name__ == "__main__":
    main()
