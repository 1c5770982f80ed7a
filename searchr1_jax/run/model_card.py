"""The README.md of an exported model: what it is, how it was trained, what it scored."""

import json
import pathlib

from searchr1_jax.core import settings as settings_lib
from searchr1_jax.learning import advantages, losses
from searchr1_jax.run import progress
from searchr1_jax.text import protocol

_CARD = """\
---
base_model: {base}
library_name: transformers
pipeline_tag: text-generation
tags: [search-r1, reinforcement-learning]
---

# {name}

A language model that searches: `{base}`, trained by {algorithm} for {step} steps by searchr1_jax after Search-R1 (Jin
et al., 2025). It ends a turn with {stops}, the stop strings of its generation config, and expects what a call
found between `<information>` and `</information>`.

## Evaluation

{scores}

## Prompt

```
{prompt}
```

## Config

```json
{config}
```
"""
_HEAD = "| evaluation | split | decoding | questions | exact match | searches |\n|" + " --- |" * 6


def text(workdir: pathlib.Path, settings: settings_lib.Settings, about: progress.About, *, name: str) -> str:
    """The card.

    Args:
      settings: of the run.
      about: of the checkpoint.
    """
    rows = []
    for path in sorted((workdir / "eval").glob("*.json")):
        if not path.name.startswith("validation-"):
            r = json.loads(path.read_text())
            cells = (
                path.stem,
                r["split"],
                r["decoding"],
                r["n"],
                f"{r.get('em_over_sets', r['em']):.3f}",
                f"{r['searches']:.2f}",
            )
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    return _CARD.format(
        name=name,
        base=about.base,
        step=about.step,
        algorithm=algorithm(settings.algorithm),
        stops=" or ".join(f"`{tag}`" for tag in protocol.stop_tags(about.tools)),
        scores="\n".join([_HEAD, *rows]) if rows else "No evaluation of this run was found.",
        prompt=settings.protocol.prompt.rstrip("\n"),
        config=json.dumps(settings.as_json(), indent=2),
    )


def algorithm(c: settings_lib.Algorithm) -> str:
    """What the algorithm is known as; that of a row of the user's own, which need not be at hand here, by its name."""
    known_as = lambda table, name: table[name].known_as if name in table else name
    if c.advantage == "group_standardised" and c.drop_equal_groups and c.clip_high > c.clip_low:
        return "DAPO"
    return known_as(losses.POLICY_LOSSES, c.policy_loss) or known_as(advantages.ADVANTAGES, c.advantage)
