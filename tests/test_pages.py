"""The pages of docs/ say what the code says."""

import ast
import pathlib
import re

import pages
import pytest

PACKAGE = pages.ROOT / "searchr1_jax"


@pytest.mark.parametrize("name", pages.PAGES)
def test_tables_and_code_of_a_page_are_those_of_the_code(name):
    text = (pages.ROOT / name).read_text()
    assert pages.filled(text, pages.PAGES[name]()) == text, f"{name} is stale; write it again: python tests/pages.py"


def defined(path: pathlib.Path) -> set[str]:
    """The names of a module: functions, classes, their methods (Class.method), and variables."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        for target in getattr(node, "targets", None) or [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                names.add(target.id)
    return names


@pytest.mark.parametrize("name", pages.PAGES)
def test_every_file_and_function_that_a_page_names_is_there(name):
    text = re.sub(r"```.*?```", "", (pages.ROOT / name).read_text(), flags=re.DOTALL)
    named = re.findall(r"`([\w/]+\.py)`((?:,?\s`[\w.]+`)*)", text)
    named += [(path, f" `{row}`") for row, path in re.findall(r"`(\w+)`\s(?:in|of)\s`([\w/]+\.py)`", text)]
    for path, rest in named:
        path = next((p / path for p in (PACKAGE, pages.ROOT) if (p / path).is_file()), None) or pytest.fail(
            f"no {path}"
        )
        assert set(re.findall(r"`([\w.]+)`", rest)) <= defined(path), (path, rest)
    assert len(named) > 10


def test_lines_that_a_page_quotes_are_in_the_file_named_before_them():
    text = re.sub(r"```.*?```", "", (pages.ROOT / "docs/extend.md").read_text(), flags=re.DOTALL)
    quoted = list(re.finditer(r"^    (.+)$", text, re.MULTILINE))
    for line in quoted:
        path = re.findall(r"`([\w/]+\.py)`", text[: line.start()])[-1]
        assert line[1] in (PACKAGE / path).read_text(), (path, line[1])
    assert len(quoted) == 2


@pytest.mark.parametrize("name", pages.PAGES)
def test_every_link_of_a_page_leads_somewhere(name):
    page = pages.ROOT / name
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor
