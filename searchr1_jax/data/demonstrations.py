"""Demonstrations for supervised training: made from the invented world, kept as jsonl, read as trajectories.

A row is a question and segments in the order in which they stand after the prompt:

    {"id": …, "question": …, "golden_answers": […], "segments": [
        {"turn": "<search> Mira Talon </search>", "weight": 1.0},      the policy's: learned, with this weight
        {"passages": [{"id": …, "title": …, "text": …}]},              the environment's reply to a search
        {"correction": true},                                          its reply to an invalid action
        {"turn": "<answer> Kelu </answer>", "weight": 1.0}]}

Two kinds are made. *Drills* are single moves: whom to search for, what to answer or whom to search for next
once passages are given; no drill holds more than one move. The *mixture* is whole episodes, most of them bad,
so that a policy that imitates it searches rarely and is mostly wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import json
import pathlib
import random
import re

import numpy as np

from searchr1_jax import types
from searchr1_jax.data import world as world_lib
from searchr1_jax.text import protocol as text_protocol
from searchr1_jax.text import tokenizer as tokenizer_lib
from searchr1_jax.text import transcript


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Shares of the kinds of whole episodes (they add up to 1), and how much of a wrong one is learned."""

    right: float  # searches along the path, then the right answer
    guess: float  # answers at once, with a random answer of the right kind
    wrong_entity: float  # searches for somebody else first, then answers from that
    stopped_early: float  # two-hop: answers after the first search with what that passage says
    guess_weight: float  # loss weight of an invented answer's content


def _search(name: str) -> dict:
    return {"turn": f"<search> {name} </search>", "weight": 1.0}


def _answer(answer: str, content_weight: float = 1.0) -> dict:
    return {"turn": f"<answer> {answer} </answer>", "weight": 1.0, "content_weight": content_weight}


def _row(question: world_lib.Question, kind: str, segments: list[dict]) -> dict:
    return {
        "id": question.id,
        "question": question.question,
        "golden_answers": list(question.golden_answers),
        "kind": kind,
        "segments": segments,
    }


def _passages(world: world_lib.World, name: str) -> dict:
    row = world_lib.passage_of(world, name)
    title, _, text = row["contents"].partition("\n")
    return {"passages": [{"id": row["id"], "title": title, "text": text}]}


def drills(world: world_lib.World, questions: Sequence[world_lib.Question], *, seed: int) -> Iterator[dict]:
    """Single moves for every question, shuffled, without end (anew each round)."""
    rng = random.Random(seed)
    rows = []
    for q in questions:
        rows.append(_row(q, f"search/{q.relation}", [_search(q.path[0])]))
        seen = [_passages(world, name) for name in q.path]
        rows.append(_row(q, f"answer/{q.relation}", [*seen, _answer(q.golden_answers[0])]))
        if q.hops == 2:
            rows.append(_row(q, f"next/{q.relation}", [seen[0], _search(q.path[1])]))
    while True:
        rng.shuffle(rows)
        yield from rows


def mixture(
    world: world_lib.World, questions: Sequence[world_lib.Question], shares: Mixture, *, seed: int
) -> Iterator[dict]:
    """Whole episodes, without end."""
    rng = random.Random(seed)
    by_hops = {hops: [q for q in questions if q.hops == hops] for hops in (1, 2)}
    by_relation: dict[str, list[world_lib.Question]] = {}
    for q in questions:
        by_relation.setdefault(q.relation, []).append(q)
    kinds = ("right", "guess", "wrong_entity", "stopped_early")
    while True:
        (kind,) = rng.choices(kinds, [getattr(shares, kind) for kind in kinds])
        q = rng.choice(by_hops[2 if kind == "stopped_early" else rng.choice((1, 2))])
        other = rng.choice(by_relation[q.relation])
        if kind == "right":
            segments = []
            for name in q.path:
                segments += [_search(name), _passages(world, name)]
            segments.append(_answer(q.golden_answers[0]))
        elif kind == "guess":
            segments = [_answer(other.golden_answers[0], shares.guess_weight)]
        elif kind == "wrong_entity":
            if other is q:
                other = rng.choice([another for another in by_relation[q.relation] if another is not q])
            wrong = dict(_search(other.path[0]), content_weight=0.0)
            segments = [wrong, _passages(world, other.path[0])]
            found = other.golden_answers[0] if other.hops == 1 else other.path[1]
            segments.append(_answer(found, shares.guess_weight))
        else:
            segments = [
                _search(q.path[0]),
                _passages(world, q.path[0]),
                _answer(q.path[1], shares.guess_weight),
            ]
        yield _row(q, kind, segments)


_CONTENT = re.compile(r".*<(?:search|answer)>(.*)</(?:search|answer)>", re.DOTALL)


def _turn_weights(text: str, pieces: Sequence[bytes], frame: float, content: float) -> list[float]:
    """A weight for each of the tokens that make up a turn: `content` where one lies between the tags."""
    match = _CONTENT.match(text)
    begin, end = (len(text[:i].encode()) for i in match.span(1)) if match else (0, 0)
    ends = list(itertools.accumulate(map(len, pieces)))
    starts = [0, *ends[:-1]]
    return [content if begin <= a and b <= end else frame for a, b in zip(starts, ends, strict=True)]


def to_trajectory(
    row: dict,
    tokenizer: tokenizer_lib.Tokenizer,
    protocol: text_protocol.Protocol,
    *,
    max_information_tokens: int,
    context: int,
    content_weight: float,
) -> tuple[types.Trajectory, np.ndarray]:
    """A demonstration as the trajectory that the rollout loop would have made of it, and its loss weights.

    Args:
      content_weight: of the tokens that lie between a turn's tags, times the segment's own.
    Returns: the trajectory and float32[T], 0 on everything that is not the policy's.
    Raises:
      ValueError: naming the row, where the episode exceeds the context.
    """
    pieces = tokenizer.token_bytes()
    prompt = tokenizer.encode_prompt(protocol.render_prompt(row["question"]))
    tokens, sampled, weights = list(prompt), [False] * len(prompt), [0.0] * len(prompt)
    turns: list[types.Turn] = []
    for segment in row["segments"]:
        if "turn" in segment:
            ids, weight = tokenizer.encode(segment["turn"]), segment["weight"]
            inner = weight * segment.get("content_weight", 1.0) * content_weight
            tokens += ids
            sampled += [True] * len(ids)
            weights += _turn_weights(segment["turn"], [pieces[i] for i in ids], weight, inner)
            action = text_protocol.parse_action(segment["turn"])
            turns.append(types.Turn(text=segment["turn"], event=action.kind, content=action.content))
            continue
        if "passages" in segment:
            passages = [types.Passage(**passage) for passage in segment["passages"]]
            reply = transcript.information(protocol, passages)
        else:
            reply = transcript.correction(protocol)
        fitted = transcript.reply_tokens(
            reply, tokenizer, max_body=max_information_tokens, room=context - 1 - len(tokens)
        )
        if fitted is None:
            raise ValueError(f"demonstration {row['id']!r} exceeds the context of {context} tokens")
        tokens += fitted[0]
        sampled += [False] * len(fitted[0])
        weights += [0.0] * len(fitted[0])
    if len(tokens) > context:
        raise ValueError(
            f"demonstration {row['id']!r} has {len(tokens)} tokens, more than the context of {context}"
        )
    answered = bool(turns) and turns[-1].event == text_protocol.ANSWER
    trajectory = types.Trajectory(
        example=types.QAExample(
            id=row["id"], question=row["question"], golden_answers=tuple(row["golden_answers"])
        ),
        sample=0,
        tokens=np.array(tokens, np.int32),
        sampled=np.array(sampled, bool),
        behaviour_logp=np.zeros(len(tokens), np.float32),
        prompt_tokens=len(prompt),
        turns=tuple(turns),
        stop_reason="answered" if answered else "no_action",
        answer=turns[-1].content if answered else None,
    )
    return trajectory, np.array(weights, np.float32)


def read(path: str | pathlib.Path) -> list[dict]:
    """Rows of a demonstrations file.

    Raises:
      ValueError: naming file and line of the first row that is not as described above.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                missing = {"id", "question", "golden_answers", "segments"} - row.keys()
                unknown = [segment for segment in row.get("segments", ()) if not _known(segment)]
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: {error}; write one JSON object a line") from error
            if missing:
                raise ValueError(f"{path}, line {number}: lacks {sorted(missing)}")
            if unknown:
                raise ValueError(
                    f"{path}, line {number}: the segment {unknown[0]} is neither a turn with its weight, nor passages"
                    " with id, title and text, nor a correction"
                )
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no demonstrations")
    return rows


def _known(segment: dict) -> bool:
    if "passages" in segment:
        return all(passage.keys() == {"id", "title", "text"} for passage in segment["passages"])
    return {"turn", "weight"} <= segment.keys() or segment.get("correction") is True
