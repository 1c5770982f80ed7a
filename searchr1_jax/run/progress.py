"""What a checkpoint says beside its weights: the JSON object that lets a run go on, and an export describe it."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """What a run changes of its settings as it goes."""

    kl_coefficient: float  # β
    rate_scale: float = 1.0  # of the learning rates
    rollbacks: int = 0  # so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """Of a checkpoint."""

    model: dict[str, Any]  # config.json of the policy
    base: str  # the model that training started from
    tools: list[str] = dataclasses.field(default_factory=lambda: ["search"])  # names of those it may call
    has_value_model: bool
    stream: dict[str, Any]  # position of the question stream
    step: int  # rollouts learned from
    owed: dict[str, float] | None  # figures of the last step, if its evaluation is still owed
    course: Course

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Self:
        """Of the JSON object that `as_json` gave."""
        return cls(**{**extra, "course": Course(**extra["course"])})

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
