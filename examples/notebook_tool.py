r"""A tool from outside that keeps state: `<note> born in Kelu </note>` is answered with the episode's notes so far.

python -m searchr1_jax.train --config=configs/quickstart.py --workdir=runs/notebook \
    --config.tools="('search', 'calculate', 'examples.notebook_tool:Notebook')"

The policy is told of it in protocol.prompt. Its tags, the counts of its calls (`calls/note`) and its part in what a
well-formed episode is follow from the name.
"""

from __future__ import annotations

import pathlib
from typing import Any

from searchr1_jax.rollout import environment


class Notebook:
    """Numbers what the policy writes down and shows it again."""

    name = "note"

    def __init__(self, settings: Any, workdir: pathlib.Path):
        """A tool may read its run's settings and files; this one needs neither."""

    def call(self, calls: list[environment.Call]) -> list[str]:
        for call in calls:
            call.memory.setdefault("notes", []).append(call.content)
        return ["".join(f"{i}. {note}\n" for i, note in enumerate(call.memory["notes"], start=1)) for call in calls]
