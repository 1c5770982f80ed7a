"""The examples of docs/extend.md, and what each of them needed."""

from __future__ import annotations

import ast
import io
import pathlib
import tokenize

ROOT = pathlib.Path(__file__).parents[1]

# Each extension: the heading of its recipe, its example (none: it is added inside), and what one in the package takes.
EXTENSIONS = (
    ("A reward", "examples/turn_reward.py", "a function and a row of `REWARDS` in `text/rewards.py`"),
    ("A tool", "examples/notebook_tool.py", "a file in `rollout/tools/` and a row of `TOOLS` in `run/tools.py`"),
    ("An advantage", "examples/advantage.py", "a function and a row of `ADVANTAGES` in `learning/advantages.py`"),
    ("A policy loss", "examples/policy_loss.py", "a function and a row of `POLICY_LOSSES` in `learning/losses.py`"),
    ("A family", "examples/family.py", "a file in `models/families/` and a row of `FAMILIES` in `models/catalog.py`"),
    ("A retriever", "examples/retriever.py", "a file in `retrieval/` and a row of `KINDS` in `run/retrievers.py`"),
    ("A part of an index", None, "a file in `retrieval/` and a row of `PARTS` in `retrieval/parts.py`"),
    ("A method in a study", "examples/study.py", "a row of `METHODS` in `configs/study.py`"),
    ("A setting", None, "a line of `core/settings.py`"),
    ("A command", "examples/command.py", "a file at the root of `searchr1_jax/`"),
)


def blocks() -> dict[str, str]:
    """The table, and the code of each example in the order of the recipes."""
    rows = [["an extension", "from outside", "lines of code", "package edits", "inside the package"]]
    for heading, example, inside in EXTENSIONS:
        linked = f"[{heading.lower()}](#{heading.lower().replace(' ', '-')})"
        outside = [f"[{example}](../{example})", str(code_lines(example)), "0"] if example else ["–", "–", "–"]
        rows.append([linked, *outside, inside])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    table = "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
    code = {name: f"```python\n{(ROOT / name).read_text()}```" for _, name, _ in EXTENSIONS if name}
    return {"extensions": table} | code


def code_lines(name: str) -> int:
    """Lines of a file that hold code: no blank ones, comments or docstrings."""
    text = (ROOT / name).read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)
