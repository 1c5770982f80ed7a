"""What supervised training learns: kept as jsonl or made in `invented.drills`, read as trajectories.

A row is a *demonstration*, a question and segments in the order in which they stand after the prompt:

    {"id": …, "question": …, "golden_answers": […], "segments": [
        {"turn": "<search> Mira Talon </search>", "weight": 1.0},      the policy's: learned, with this weight
        {"passages": [{"id": …, "title": …, "text": …}]},              the environment's reply to a search
        {"correction": true},                                          its reply to an invalid action
        {"turn": "<answer> Kelu </answer>", "weight": 1.0}]}

Or a *trajectory*, as evaluation and training write theirs; its tokens stay as they were sampled:

    {"id": …, "question": …, "golden_answers": […], "tokens": [5, 6, 7, 8], "sampled": [0, 0, 1, 1], "reward": 1.0}

Or a pair: of a question file, asked as a prompt and answered at once with the first answer; or of any other texts,
learned to the letter. Any row may carry a reward, and keys beyond these are ignored:

    {"question": …, "golden_answers": […]}       <answer> … </answer> is learned; one "answer" may stand for the list
    {"prompt": …, "answer": …}                   the user's message, and all that is to be written after it
"""

from collections.abc import Callable, Sequence
import itertools
import json
import math
import pathlib
import re

import numpy as np

from searchr1_jax.core import settings, types
from searchr1_jax.text import protocol as text_protocol, tokenizer as tokenizer_lib, transcript

Weighted = tuple[types.Trajectory, np.ndarray]  # with the loss weight of each of its tokens


def _turn_weights(
    text: str, pieces: Sequence[bytes], tools: Sequence[str], frame: float, content: float
) -> list[float]:
    """A weight for each of the tokens that make up a turn: `content` where one lies between the tags."""
    names = "|".join((*tools, text_protocol.ANSWER))
    match = re.match(f".*<(?:{names})>(.*)</(?:{names})>", text, re.DOTALL)
    begin, end = (len(text[:i].encode()) for i in match.span(1)) if match else (0, 0)
    ends = list(itertools.accumulate(map(len, pieces)))
    starts = [0, *ends[:-1]]
    return [content if begin <= a and b <= end else frame for a, b in zip(starts, ends, strict=True)]


def to_trajectory(
    row: dict,
    tokenizer: tokenizer_lib.Tokenizer,
    protocol: settings.Protocol,
    *,
    tools: Sequence[str],
    max_information_tokens: int,
    context: int,
    content_weight: float,
) -> Weighted:
    """A demonstration as the trajectory that the rollout loop would have made of it, and its loss weights.

    The user's message is the row's prompt where it has one, else its question through the protocol. A row that is a
    trajectory comes back token by token, each that was sampled with weight 1. ValueError names the row where the
    episode exceeds the context.

    Args:
      tools: names of those that may be called.
      content_weight: of the tokens that lie between a turn's tags, times the segment's own.
    Returns: the trajectory and float32[T], 0 on everything that is not the policy's.
    """
    if "tokens" in row:
        return _trajectory(
            row,
            (row["tokens"], row["sampled"], row["sampled"]),
            context,
            sample=row.get("sample", 0),
            prompt_tokens=[*row["sampled"], True].index(True),  # what stands before the first sampled token
            turns=(),  # their texts are in the file, for people
            stop_reason=row.get("stop_reason", "no_action"),
            answer=row.get("answer"),
        )
    pieces = tokenizer.token_bytes()
    prompt = tokenizer.encode_prompt(
        row.get("prompt") or text_protocol.render_prompt(protocol, row["question"]), protocol
    )
    tokens, sampled, weights = list(prompt), [False] * len(prompt), [0.0] * len(prompt)
    turns: list[types.Turn] = []
    for segment in row["segments"]:
        if "turn" in segment:
            ids, weight = tokenizer.encode(segment["turn"]), segment["weight"]
            inner = weight * segment.get("content_weight", 1.0) * content_weight
            tokens += ids
            sampled += [True] * len(ids)
            weights += _turn_weights(segment["turn"], [pieces[i] for i in ids], tools, weight, inner)
            action = text_protocol.parse_action(segment["turn"], tools)
            turns.append(types.Turn(text=segment["turn"], event=action.kind, content=action.content, tokens=len(ids)))
            continue
        reply = transcript.correction(protocol)
        if "passages" in segment:
            reply = transcript.information(protocol, [types.Passage(**passage) for passage in segment["passages"]])
        room = context - 1 - len(tokens)
        fitted = transcript.reply_tokens(reply, tokenizer, max_body=max_information_tokens, room=room)
        if fitted is None:
            raise ValueError(
                f"demonstration {row['id']!r} exceeds the context of {context} tokens; shorten it or raise"
                " rollout.context_tokens"
            )
        tokens += fitted[0]
        sampled += [False] * len(fitted[0])
        weights += [0.0] * len(fitted[0])
    answered = bool(turns) and turns[-1].event == text_protocol.ANSWER
    return _trajectory(
        row,
        (tokens, sampled, weights),
        context,
        sample=0,
        prompt_tokens=len(prompt),
        turns=tuple(turns),
        stop_reason="answered" if answered else "no_action",
        answer=turns[-1].content if answered else None,
        tools=tuple(tools),
    )


def _trajectory(row: dict, by_token: tuple[list, list, list], context: int, **fields) -> Weighted:
    """The trajectory of these tokens, of who wrote each and of what each weighs."""
    tokens, sampled, weights = by_token
    if len(tokens) > context:
        raise ValueError(
            f"demonstration {row['id']!r} has {len(tokens)} tokens, more than the context of {context}; shorten it or"
            " raise rollout.context_tokens"
        )
    example = types.QAExample(id=row["id"], question=row["question"], golden_answers=tuple(row["golden_answers"]))
    trajectory = types.Trajectory(
        example=example,
        tokens=np.array(tokens, np.int32),
        sampled=np.array(sampled, bool),
        behaviour_logp=np.zeros(len(tokens), np.float32),
        **fields,
    )
    return trajectory, np.array(weights, np.float32)


class Rows(Sequence[Weighted]):
    """Rows of a file as trajectories, each read and tokenised when it is asked for: a million take no memory."""

    def __init__(self, path: pathlib.Path, as_trajectory: Callable[[dict], Weighted], vocab_size: int):
        self._path, self._as_trajectory, self._vocab_size = path, as_trajectory, vocab_size
        self._places: list[tuple[int, int]] = []  # offset and number of a line

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):
        offset, number = self._places[index]
        with open(self._path, "rb") as file:
            file.seek(offset)
            return self._as_trajectory(self.checked(file.readline(), number))

    def checked(self, line: bytes, number: int) -> dict:
        return _checked(line, f"{self._path.stem}-{number}", self._vocab_size)

    def add(self, offset: int, number: int) -> None:
        self._places.append((offset, number))


def read(
    path: str | pathlib.Path, as_trajectory: Callable[[dict], Weighted], *, vocab_size: int, min_reward: float
) -> tuple[Rows, int]:
    """A file's rows as trajectories, without those rewarded less than `min_reward`, and how many these were.

    Each is looked at once, here, so that what is wrong with one is said before any work.

    Args:
      as_trajectory: `to_trajectory` with its settings.
      vocab_size: of the model that is to learn them.
    Raises:
      ValueError: naming file and line of the first row that is not as described above or does not fit.
    """
    path = pathlib.Path(path)
    kept, left_out, begin = Rows(path, as_trajectory, vocab_size), 0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            offset, begin = begin, begin + len(line)
            if not line.strip():
                continue
            try:
                row = kept.checked(line, number)
                if row.get("reward", min_reward) < min_reward:
                    left_out += 1
                else:
                    as_trajectory(row)
                    kept.add(offset, number)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not kept and not left_out:
        raise ValueError(f"{path} holds no demonstrations")
    return kept, left_out


_KEYS = {  # that a row needs, by the one that tells its kind
    "tokens": {"id": str, "question": str, "golden_answers": list, "tokens": list, "sampled": list},
    "segments": {"id": str, "question": str, "golden_answers": list, "segments": list},
    "prompt": {"prompt": str, "answer": str},
    "golden_answers": {"question": str, "golden_answers": list},
    "answer": {"question": str, "answer": str},
}


def _checked(line: bytes, default_id: str, vocab_size: int) -> dict:
    """The row of a line; of a pair, the demonstration."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{error}; write one JSON object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is not an object; write one JSON object a line")
    kind = next((key for key in _KEYS if key in row), None)
    if kind is None:
        raise ValueError(
            f"{sorted(row)} are the keys of nothing known; write a trajectory (tokens), a demonstration (segments),"
            " prompt and answer, or question and golden_answers"
        )
    if wrong := [key for key, type_ in _KEYS[kind].items() if not isinstance(row.get(key), type_)]:
        needed = ", ".join(f"{key} ({type_.__name__})" for key, type_ in _KEYS[kind].items())
        raise ValueError(f"lacks {wrong}, or has another type there; with {kind!r} write {needed}")
    if not _is_number(row.get("reward", 0)):
        raise ValueError(f"the reward is {row['reward']!r}; write a finite number or leave it out")
    if kind == "tokens":
        _check_tokens(row["tokens"], row["sampled"], vocab_size)
        return row
    if kind == "segments":
        if unknown := [segment for segment in row["segments"] if not _known(segment)]:
            raise ValueError(
                f"the segment {unknown[0]} is neither a turn with its weight, nor passages with id, title and text,"
                " nor a correction; write it as one of them"
            )
        return row
    answers = row.get("golden_answers", [row.get("answer")])
    if not answers or not isinstance(answers[0], str):
        raise ValueError(f"the golden_answers are {answers}; write at least one text")
    turn = row["answer"] if kind == "prompt" else f"<answer> {answers[0]} </answer>"
    asked = {"id": default_id, "question": row.get("prompt"), "golden_answers": answers}
    return {**asked, **row, "segments": [{"turn": turn, "weight": 1.0}]}


def _check_tokens(tokens: list, sampled: list, vocab_size: int) -> None:
    if not tokens or any(type(token) is not int for token in tokens):
        raise ValueError("tokens are not ids; write a list of whole numbers, at least one")
    if outside := [token for token in tokens if not 0 <= token < vocab_size]:
        raise ValueError(
            f"token {outside[0]} is not of the model's {vocab_size}; train the model that wrote it (sft.model)"
        )
    if len(sampled) != len(tokens) or any(one not in (0, 1) for one in sampled):
        raise ValueError(f"sampled does not fit the {len(tokens)} tokens; write 1 for each of the policy's, else 0")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _known(segment) -> bool:
    if not isinstance(segment, dict):
        return False
    if "passages" in segment:
        kinds = lambda passage: isinstance(passage, dict) and {key: type(text) for key, text in passage.items()}
        needed = {"id": str, "title": str, "text": str}
        return isinstance(segment["passages"], list) and all(
            kinds(passage) == needed for passage in segment["passages"]
        )
    if "turn" in segment:
        weights = segment.get("weight"), segment.get("content_weight", 1.0)
        return isinstance(segment["turn"], str) and all(map(_is_number, weights))
    return segment.get("correction") is True
