import hashlib

import pytest

from searchr1_jax.core import settings, types
from searchr1_jax.text import protocol


def passage(title, text):
    return types.Passage(id="0", title=title, text=text)


PARSED = {
    "<think>I need it.</think>\n<search> who wrote Emma </search>": ("search", "who wrote Emma"),
    "<answer>\n Beijing \n</answer>": ("answer", "Beijing"),
    "<search>a</search> then <answer>b</answer>": ("search", "a"),
    "<answer>b</answer><search>a</search>": ("answer", "b"),
    "<search>a <answer>b</answer>": ("answer", "b"),
    "<search>a</answer> <answer>b": ("invalid", ""),
    "<search>a</answer> b</search>": ("search", "a</answer> b"),
    "<search>a<search>b</search>": ("search", "a<search>b"),
    "<search>two\nlines</search>\n": ("search", "two\nlines"),
    "<answer></answer>": ("answer", ""),
    "<answer> \n </answer>": ("answer", ""),
    "<search></search>": ("invalid", ""),
    "<search> \n</search>": ("invalid", ""),
    "<search> </search><answer>b</answer>": ("invalid", ""),
    "a</search>": ("invalid", ""),
    "<search>a": ("invalid", ""),
    "<Search>a</Search>": ("invalid", ""),
    "< search>a</search>": ("invalid", ""),
    "just words": ("invalid", ""),
    "": ("invalid", ""),
}


@pytest.mark.parametrize("turn, action", PARSED.items())
def test_an_action_is_the_first_complete_pair_of_tags(turn, action):
    parsed = protocol.parse_action(turn, ("search",))
    assert (parsed.kind, parsed.content) == action


def test_default_prompt_is_search_r1s():
    published = "325187b4e28848fc12d41dfcb958bf9376b3735630d67686c140b65d1b76d578"
    assert hashlib.sha256(settings.Protocol().prompt.encode()).hexdigest() == published
    prompt = protocol.render_prompt(settings.Protocol(), "who wrote emma")
    assert prompt.endswith("For example, <answer> Beijing </answer>. Question: who wrote emma?\n")


@pytest.mark.parametrize("question", ["who wrote emma", "who wrote emma?", " who wrote emma \n", "\twho wrote emma? "])
def test_a_question_is_stripped_and_ends_with_one_question_mark(question):
    assert protocol.render_prompt(settings.Protocol(prompt="Q: {question}\n"), question) == "Q: who wrote emma?\n"


def test_passages_are_numbered_from_one_and_stripped():
    passages = [passage('"Emma"', "A novel.\nOf 1815."), passage('"Zürich"', "A city. ")]
    docs = protocol.render_docs(settings.Protocol(), passages)
    assert docs == 'Doc 1(Title: "Emma") A novel.\nOf 1815.\nDoc 2(Title: "Zürich") A city.'
    assert protocol.render_docs(settings.Protocol(), []) == ""


def test_braces_in_questions_and_passages_are_text():
    plain = settings.Protocol(prompt="{question}", passage="{i}: {title}{text}\n")
    braces = "what is {question} in {docs} or {0}"
    assert protocol.render_prompt(plain, braces) == f"{braces}?"
    assert protocol.render_docs(plain, [passage("{text}", "{title} {i} \\1 {}")]) == "1: {text}{title} {i} \\1 {}"


def test_braces_of_a_template_that_hold_no_name_are_text():
    assert protocol.render_prompt(settings.Protocol(prompt='{"q": "{question}"} {}'), "a?") == '{"q": "a?"} {}'


@pytest.mark.parametrize(
    "template, text, complaint",
    [
        ("prompt", "Answer this:", r"protocol.prompt is 'Answer this:'; put \{question\} into it, exactly once"),
        ("prompt", "{question} {docs}", r"protocol.prompt is .* unknown \{docs\}; it takes \{question\}"),
        ("correction", "Again: {question}", r"protocol.correction .* unknown \{question\}; it takes no placeholder"),
        ("information", "<information>", r"protocol.information .* put \{docs\} into it"),
        ("information", "{docs} {docs}", r"protocol.information .* exactly once"),
        ("passage", "{i} {title}", r"protocol.passage .* put \{text\} into it"),
        ("passage", "{text} {score}", r"protocol.passage .* unknown \{score\}; it takes \{text\}, \{i\}, \{title\}"),
    ],
)
def test_a_wrong_template_is_refused_by_name(template, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        settings.Settings(protocol=settings.Protocol(**{template: text}))


def test_the_tags_of_an_episode_follow_from_its_tools():
    assert protocol.tags(("search", "note")) == (
        "<think>", "</think>", "<search>", "</search>", "<note>", "</note>", "<information>", "</information>",
        "<answer>", "</answer>",
    )  # fmt: skip
    assert protocol.stop_tags(("search", "note")) == ("</search>", "</note>", "</answer>")
    assert protocol.stop_tags(()) == ("</answer>",)


@pytest.mark.parametrize(
    "turn, action",
    {
        "<note> a </note>": ("note", "a"),
        "<notes> a </notes>": ("notes", "a"),  # one name begins another
        "<search>a <note>b</note>": ("note", "b"),
        "<note>a</search>": ("invalid", ""),
        "<note> </note>": ("invalid", ""),  # an empty call of any tool
        "<calculate>1 + 1</calculate>": ("invalid", ""),  # no tool of this run
        "<answer></answer>": ("answer", ""),
    }.items(),
)
def test_an_action_is_a_call_of_a_tool_of_the_run(turn, action):
    parsed = protocol.parse_action(turn, ("search", "note", "notes"))
    assert (parsed.kind, parsed.content) == action


def test_without_tools_only_answers_are_actions():
    assert protocol.parse_action("<search>a</search>", ()).kind == "invalid"
    assert protocol.parse_action("<answer>a</answer>", ()).content == "a"


@pytest.mark.parametrize("name", ["", "Search", "a b", "a>", "1st", "answer", "think", "information", "invalid"])
def test_a_name_that_cannot_be_a_tools_tag_is_refused(name):
    with pytest.raises(ValueError, match=f"a tool is named '{name}'; use lower-case letters"):
        protocol.check_tools(["search", name])


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tools are named 'search'"):
        protocol.check_tools(["search", "note", "search"])
