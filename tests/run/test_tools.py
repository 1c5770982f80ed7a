"""Tools that a config names."""

import pathlib

import pytest

from configs import base
from searchr1_jax.rollout.tools import calculator, search
from searchr1_jax.run import retrievers, tools


def config(*names, **changes):
    c = base.get_config()
    c.update_from_flattened_dict({"tools": names} | changes)
    return c


@pytest.fixture
def retriever(monkeypatch):
    """What is made of any config's retriever."""
    made = object()
    monkeypatch.setattr(retrievers, "make", lambda config, workdir: made)
    return made


@pytest.fixture
def own_tools(tmp_path, monkeypatch):
    (tmp_path / "own_tools.py").write_text(
        "class Files:\n"
        "    name = 'files'\n"
        "    def __init__(self, settings, workdir):\n"
        "        self.made_of = settings.seed, workdir\n"
        "class Search(Files):\n"
        "    name = 'search'\n"
        "class Nameless:\n"
        "    pass\n"
        "nothing = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_every_row_makes_the_tool_of_its_name(retriever):
    c = config(*tools.TOOLS)
    assert tools.names(c) == tuple(tools.TOOLS) == tuple(tool.name for tool in tools.make(c, pathlib.Path()))


@pytest.mark.parametrize("url, timeout_s", [("", 7.0), ("http://a:1", None)])
def test_the_search_waits_as_long_as_it_is_told_and_for_a_server_as_long_as_its_client(retriever, url, timeout_s):
    c = config("search", **{"retriever.url": url, "retriever.timeout_s": 7.0, "rollout.passages": 5})
    (made,) = tools.make(c, pathlib.Path())
    assert made == search.Search(retriever=retriever, passages=5, timeout_s=timeout_s)


def test_a_users_own_tool_is_a_class_that_is_called_with_settings_and_workdir(own_tools):
    c = config("calculate", "own_tools:Files", seed=5)
    assert tools.names(c) == ("calculate", "files")
    calculate, own = tools.make(c, pathlib.Path("here"))
    assert isinstance(calculate, calculator.Calculator)
    assert own.made_of == (5, pathlib.Path("here"))


def test_a_policy_may_do_without_tools():
    assert tools.names(config()) == tools.make(config(), pathlib.Path()) == ()


@pytest.mark.parametrize(
    "names, complaint",
    [
        (("browse",), "tools names 'browse'; make it one of search, calculate, or package.module:name"),
        (("own_tools:Nameless",), "tools names 'own_tools:Nameless', which is .*; make it a class with a name"),
        (("own_tools:nothing",), "tools names 'own_tools:nothing', which is 1; make it a class with a name"),
        (("search", "search"), "two tools are named 'search'"),
        (("search", "own_tools:Search"), "two tools are named 'search'"),
    ],
)
def test_what_is_no_tool_is_refused_before_an_index_is_opened(own_tools, monkeypatch, names, complaint):
    monkeypatch.delattr(retrievers, "make")
    for refuse in (tools.names, lambda c: tools.make(c, pathlib.Path())):
        with pytest.raises(ValueError, match=complaint):
            refuse(config("calculate", *names))
