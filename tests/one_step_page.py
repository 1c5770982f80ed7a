"""The episodes of docs/one_step.md, and what the package makes of them, array by array.

    texts ─ rollout.episodes ─▶ Trajectory ─ rewards, minibatches ─▶ Batch ─ learning.update ─▶ loss, gradient

What the models would say is made up (`OLD` … `NOW`), so that it can be followed by hand; all else is computed by
the package. The policy that learns is a table with one log-prob for each token, and nothing more.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rollout import scripted

from searchr1_jax.core import parallel, settings as settings_lib, types
from searchr1_jax.learning import advantages, losses, minibatches, update
from searchr1_jax.models import config as model_config
from searchr1_jax.models.families import llama
from searchr1_jax.text import protocol, rewards, tokenizer

QUESTION = types.QAExample(id="q", question="Who wrote Emma?", golden_answers=("Jane Austen",))
TURNS = (("<search> Emma</search>", "<answer> Jane Austen</answer>"), ("<answer> Emma</answer>",))  # of two samples
PASSAGE = types.Passage(id="p", title='"Emma"', text="by Jane Austen")
PROTOCOL = settings_lib.Protocol(
    prompt="{question}\n", information="<information>{docs}</information>", passage="{text}"
)
SETTINGS = settings_lib.Settings().replace({
    "rollout.questions": 1, "rollout.samples": 2, "rollout.context_tokens": 28, "rollout.max_turn_tokens": 8,
    "learner.row_tokens": (28,), "learner.micro_batch_rows": 1, "learner.updates_per_rollout": 1,
    "learner.vocab_chunk": 28, "algorithm.gae_lambda": 0.6, "algorithm.kl_coefficient": 0.1,
    "algorithm.entropy_coefficient": 0.0,
})  # fmt: skip
GRPO = SETTINGS.replace({
    "algorithm.advantage": "group_standardised", "algorithm.gae_lambda": 1.0, "algorithm.kl_in": "loss",
    "algorithm.kl_estimator": "k3",
})  # fmt: skip

# Made up, for each token that the policy wrote: three and four of the first sample, three of the second.
OLD = (-1.2, -0.9, -0.1, -0.7, -1.1, -0.3, -0.1, -0.9, -1.6, -0.2)  # log π before the step, and the sampler's log μ
REFERENCE = (-1.5, -1.0, -0.1, -0.7, -1.4, -0.4, -0.1, -0.9, -1.3, -0.2)  # log π of the reference
VALUE = (0.4, 0.5, 0.5, 0.6, 0.8, 0.9, 0.9, 0.4, 0.2, 0.1)  # V before the token
NOW = (-0.9, -0.85, -0.1, -0.6, -1.05, -0.3, -0.1, -1.0, -1.9, -0.17)  # log π after some update of the step

UNREAD = 7.0  # what the models say where the policy wrote nothing; were it read, the page would change


class Table(update.Learner):
    """A learner whose policy's parameters are its log-probs, [B, T], so that a gradient can be read token by token."""

    def _policy_statistics(self, params, b: types.Batch):
        return params, jnp.zeros_like(params)


class Learned(NamedTuple):
    """What one algorithm makes of the batch; arrays [T] of its only row."""

    reward: np.ndarray  # with the KL in it, where that is its place
    delta: np.ndarray
    advantage: np.ndarray  # before whitening
    targets: update.Targets
    ratio: np.ndarray
    clipped: np.ndarray
    surrogate: np.ndarray
    kl: np.ndarray  # in the loss; 0 where it is in the reward
    value_loss: np.ndarray
    loss: float
    gradient: np.ndarray  # of the loss, with respect to log π


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    tokens: tokenizer.Tokenizer
    trajectories: list[types.Trajectory]
    rewards: list[types.Worth]
    batch: types.Batch  # on the host
    scores: update.Scores
    ppo: Learned
    grpo: Learned


def trajectories(tokens: tokenizer.Tokenizer) -> list[types.Trajectory]:
    """What the host loop makes of the turns, with made-up log-probs."""
    scripts = {QUESTION: [scripted.script(tokens, *turns) for turns in TURNS]}
    library = scripted.Library(lambda query: [PASSAGE])
    found, _ = scripted.play(tokens, scripts, library, protocol=PROTOCOL)
    made, start = [], 0
    for _, trajectory in sorted(found.items()):
        logp = np.zeros(len(trajectory.tokens), np.float32)
        stop = start + int(trajectory.sampled.sum())
        logp[trajectory.sampled] = OLD[start:stop]
        made.append(dataclasses.replace(trajectory, behaviour_logp=logp))
        start = stop
    return made


def _placed(values, batch: types.Batch) -> np.ndarray:
    """float32[M, B, T] with the values at the policy's tokens."""
    placed = np.full(batch.tokens.shape, UNREAD, np.float32)
    placed[batch.policy_mask] = values
    return placed


def _learned(settings: settings_lib.Settings, made: minibatches.MiniBatches, scores: update.Scores) -> Learned:
    [host], a, beta = made.batches, settings.algorithm, settings.algorithm.kl_coefficient
    shape = model_config.ModelConfig(
        family=llama.FAMILY, vocab_size=8, width=8, layers=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8,
        activation="silu", rope_theta=1e4, norm_eps=1e-6, tied_embeddings=True, max_positions=28,
    )  # fmt: skip
    learner = Table(shape, settings)
    on_mesh = lambda tree: parallel.to_mesh(tree, None, "batch", None)
    batch, given = on_mesh(host), made.advantages and list(map(on_mesh, made.advantages))
    [targets], _ = learner.estimate([batch], [on_mesh(scores)], given, kl_coefficient=beta)

    only = lambda tree: jax.tree.map(lambda x: np.asarray(x)[0] if np.ndim(x) else x, tree)  # [B, T]
    b, s, t, mask = only(host), only(scores), only(jax.device_get(targets)), only(host).policy_mask
    kl = jnp.where(mask, losses.find_kl(a.kl_estimator)(s.logp, s.reference_logp), 0.0)
    reward = b.reward - beta * kl if a.kl_in == "reward" else b.reward
    delta = advantages.gae(reward, s.value, mask, b.segment, dataclasses.replace(a, gae_lambda=0.0))
    advantage = advantages.gae(reward, s.value, mask, b.segment, a)
    now = _placed(NOW, host)[0]
    of_table = lambda logp: learner._loss_of_policy(logp, b, s, t, mask.sum(), beta)
    (loss, _), gradient = jax.value_and_grad(of_table, has_aux=True)(jnp.asarray(now))
    zero = lambda x: jnp.where(mask, x, 0.0)
    written = losses.Written(zero(now), zero(s.logp), zero(b.behaviour_logp), t.advantage, mask, b.segment, b.turn)
    surrogate, clipped = losses.find_policy_loss(a.policy_loss).of_tokens(written, a)
    row = lambda x: np.asarray(x, np.float64)[0]
    return Learned(
        reward=row(reward),
        delta=row(delta),
        advantage=row(advantage),
        targets=update.Targets(row(t.advantage), row(t.returns)),
        ratio=row(jnp.exp(zero(now) - zero(s.logp))),
        clipped=row(clipped),
        surrogate=row(surrogate),
        kl=row(zero(losses.find_kl(a.kl_estimator)(now, s.reference_logp))),
        value_loss=row(zero(losses.clipped_value(s.value, s.value, t.returns, clip=a.value_clip))),
        loss=float(loss),
        gradient=row(gradient),
    )


def step() -> Step:
    """The whole step, on one device."""
    texts = [protocol.render_prompt(PROTOCOL, QUESTION.question), PASSAGE.text, *(t for turns in TURNS for t in turns)]
    with tempfile.TemporaryDirectory() as directory:
        tokens = tokenizer.train(
            texts * 10, vocab_size=400, added_tokens=protocol.tags(("search",)), directory=pathlib.Path(directory)
        )
    played = trajectories(tokens)
    reward = rewards.resolve(settings_lib.Reward(name="exact_match"))
    worth = [reward(trajectory) for trajectory in played]
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])):
        made = minibatches.make(played, worth, SETTINGS)
        [batch] = made.batches
        scores = update.Scores(*(_placed(values, batch) for values in (OLD, REFERENCE, VALUE)))
        ppo, grpo = _learned(SETTINGS, made, scores), _learned(GRPO, minibatches.make(played, worth, GRPO), scores)
    return Step(tokens=tokens, trajectories=played, rewards=worth, batch=batch, scores=scores, ppo=ppo, grpo=grpo)


# The tables.


def blocks() -> dict[str, str]:
    """What stands in the page, by name."""
    return tables(step())


def tables(s: Step) -> dict[str, str]:
    first, second = s.trajectories
    of_row = lambda name: getattr(s.batch, name)[0, 0]
    ppo, grpo, scores = s.ppo, s.grpo, jax.tree.map(lambda x: x[0, 0], s.scores)
    changes = np.flatnonzero(np.diff(np.stack([of_row(n) for n in ("segment", "turn", "response")])).any(axis=0)) + 1
    pieces = [
        _shown(s.tokens.decode([i])) if k else "–" for i, k in zip(of_row("tokens"), of_row("segment"), strict=True)
    ]
    stretches = lambda cells: [" ".join(part) for part in np.split(np.array(cells), changes)]
    batch = [["", "prompt", "turn 0", "reply", "turn 1", "prompt", "turn 0", "empty"], ["text", *stretches(pieces)]]
    for name in ("tokens", "segment", "position", "response", "sampled", "policy_mask", "turn"):
        batch.append([f"`{name}`", *stretches([str(int(x)) for x in of_row(name)])])
    for name in ("behaviour_logp", "reward", "weight"):
        batch.append([f"`{name}`", *stretches([number(x) for x in of_row(name)])])
    mask = of_row("policy_mask")
    head = ["", *(piece for piece, written in zip(pieces, mask, strict=True) if written)]
    owner = [f"{sample}, {turn}" for sample, turn in zip(of_row("trajectory")[mask], of_row("turn")[mask], strict=True)]

    def table(**rows) -> str:
        body = [[name, *map(number, np.asarray(values)[mask])] for name, values in rows.items()]
        return _table([head, ["sample, turn", *owner], *body])

    now = np.full(len(mask), 0.0)
    now[mask] = NOW
    return {
        "episodes": _table([
            ["sample", "text after the prompt", "answer", "reward"],
            *(
                [str(t.sample), f"`{s.tokens.decode(t.tokens[t.prompt_tokens :])}`", str(t.answer), number(worth)]
                for t, worth in zip((first, second), s.rewards, strict=True)
            ),
        ]),
        "batch": _table(batch),
        "scores": table(**{"log π_old": scores.logp, "log π_ref": scores.reference_logp, "V": scores.value}),
        "estimates": table(**{
            "r": ppo.reward,
            "δ": ppo.delta,
            "A": ppo.advantage,
            "A, whitened": ppo.targets.advantage,
            "R": ppo.targets.returns,
        }),
        "losses": table(**{
            "log π": now,
            "ρ": ppo.ratio,
            "clipped": ppo.clipped,
            "loss": ppo.surrogate,
            "∂ / ∂ log π": ppo.gradient,
            "value loss": ppo.value_loss,
        }),
        "grpo": table(**{
            "A": grpo.targets.advantage,
            "loss": grpo.surrogate,
            "KL, k3": grpo.kl,
            "∂ / ∂ log π": grpo.gradient,
        }),
    }  # fmt: skip


def number(x) -> str:
    """Three decimals, fewer where these are 0; which digit is the last does not hang on the last bits."""
    assert abs(abs(x) * 1000 % 1 - 0.5) > 1e-3, f"{x} lies between two numbers of three decimals"
    return f"{round(float(x), 3) + 0:.3f}".rstrip("0").rstrip(".")  # + 0: there is no -0


def _shown(piece: str) -> str:
    return "`" + piece.replace(" ", "␣").replace("\n", "↵") + "`"


def _table(rows: list[list[str]]) -> str:
    """A markdown table; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join('-' * max(w, 3) for w in widths)} |", *lines[1:]])
