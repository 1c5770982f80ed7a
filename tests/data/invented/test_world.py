"""The invented world: what is asked, what can be known, and what is written."""

import collections
import json
import re

import pytest

from searchr1_jax.core import settings
from searchr1_jax.data.invented import world

# An independent reader of the passages: what each relation's answer looks like in the text, and where the
# next entity to search for stands.
READERS = {
    "country": r"(?:born in|comes from) (\w+)\.",
    "profession": r"(?:is a|, a) (\w+)(?:,| born)",
    "founder": r"(?:founded by|founder is) (\w+ \w+)\.",
    "city": r"makes \w+ in (\w+)\.",
}


@pytest.fixture(scope="module")
def default_world():
    return world.make_world(settings.World())


@pytest.fixture(scope="module")
def asked(default_world):
    return {split: world.questions(default_world, split) for split in world.SPLITS}


def read(passage, what):
    title, text = passage["contents"].split("\n")
    (found,) = re.findall(READERS[what], text)
    return found


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_seed_gives_the_same_bytes_twice_and_another_seed_gives_others(tmp_path):
    for name, seed in (("once", 1), ("again", 1), ("other", 2)):
        world.write_world(world.make_world(settings.World(seed=seed, persons=200, companies=100)), tmp_path / name)
    assert files(tmp_path / "once") == files(tmp_path / "again")
    assert sorted(files(tmp_path / "once")) == ["corpus.jsonl", "test.jsonl", "train.jsonl", "validation.jsonl"]
    for name, content in files(tmp_path / "other").items():
        assert content != (tmp_path / "once" / name).read_bytes()


def test_the_default_world_has_the_sizes_it_promises(default_world, asked):
    assert len(default_world.persons) == 3000 and len(default_world.companies) == 2000
    splits = collections.Counter(default_world.split_of[person.name] for person in default_world.persons)
    assert splits == {"train": 2550, "validation": 150, "test": 300}
    splits = collections.Counter(default_world.split_of[company.name] for company in default_world.companies)
    assert splits == {"train": 1700, "validation": 100, "test": 200}
    assert len(asked["test"]) >= 512
    for values, count in (
        ({person.country for person in default_world.persons}, 20),
        ({person.profession for person in default_world.persons}, 16),
        ({company.city for company in default_world.companies}, 20),
        ({company.product for company in default_world.companies}, 16),
        ({person.name.split()[0] for person in default_world.persons}, 60),
        ({person.name.split()[1] for person in default_world.persons}, 80),
    ):
        assert len(values) == count


def test_names_are_unique_and_no_word_of_one_list_is_in_another(default_world):
    names = [entity.name for entity in (*default_world.persons, *default_world.companies)]
    assert len(set(names)) == 5000
    lists = [
        {person.name.split()[0] for person in default_world.persons},
        {person.name.split()[1] for person in default_world.persons},
        {person.country for person in default_world.persons},
        {company.city for company in default_world.companies},
        {company.name.split()[0] for company in default_world.companies},
        {company.name.split()[1] for company in default_world.companies},
    ]
    assert len(set().union(*lists)) == sum(map(len, lists))
    for word in set().union(*lists):
        assert re.fullmatch("[A-Z][aeiou][a-z][aeiou][^aeiou]?", word) and word[0] not in "AEIOU"


def test_nothing_about_a_test_entity_is_asked_or_told_in_another_split(default_world, asked):
    split_of = default_world.split_of
    for company in default_world.companies:
        assert split_of[company.founder] == split_of[company.name]
    for split in world.SPLITS:
        foreign = [name for name, home in split_of.items() if home != split]
        text = "\n".join(f"{question.question}\n{question.golden_answers[0]}" for question in asked[split])
        assert not [name for name in foreign if name in text]
        for question in asked[split]:
            assert {split_of[name] for name in question.path} == {split}


def test_each_question_is_answered_by_the_passages_along_its_path(default_world, asked):
    for split in world.SPLITS:
        for question in asked[split]:
            assert f" {question.path[0]}" in question.question
            assert question.hops == len(question.path)
            passages = [default_world.passages[name] for name in question.path]
            for passage, following in zip(passages, question.path[1:]):
                assert read(passage, "founder") == following
            what = question.relation.split("_")[1]
            assert question.golden_answers == (read(passages[-1], what),)


def test_a_two_hop_answer_is_not_in_the_first_passage(default_world, asked):
    for question in asked["test"]:
        if question.hops == 2:
            contents = default_world.passages[question.path[0]]["contents"]
            assert question.golden_answers[0] not in re.findall(r"\w+", contents)


def test_half_of_each_split_is_one_hop_and_relations_are_even(asked):
    for split in world.SPLITS:
        relations = collections.Counter(question.relation for question in asked[split])
        half = len(asked[split]) // 2
        for relation in ("person_country", "person_profession", "company_founder", "company_city"):
            assert relations[relation] == half // 4
        for relation in ("founder_country", "founder_profession"):
            assert relations[relation] == half // 2
        hops = [question.hops for question in asked[split]]
        assert hops.count(1) == hops.count(2) == half
        assert 0.4 < sum(hop == 1 for hop in hops[:half]) / half < 0.6  # shuffled


def test_what_a_scarce_relation_lacks_the_others_give():
    # 40 persons and 100 companies in test: 40 + 40 + 100 + 100 one-hop facts for 200 two-hop ones.
    small = world.make_world(settings.World(seed=3, persons=200, companies=500), test_share=0.2)
    relations = collections.Counter(question.relation for question in world.questions(small, "test"))
    assert relations == {
        "person_country": 40,
        "person_profession": 40,
        "company_founder": 60,
        "company_city": 60,
        "founder_country": 100,
        "founder_profession": 100,
    }


def test_each_fact_is_asked_at_most_once_and_each_way_of_asking_is_used(default_world, asked):
    everything = [question for split in world.SPLITS for question in asked[split]]
    assert len({question.id for question in everything}) == len(everything)
    assert len({(question.relation, question.path) for question in everything}) == len(everything)
    forms = {(q.relation, q.question.replace(q.path[0], "{}")) for q in everything}
    assert collections.Counter(relation for relation, _ in forms) == dict.fromkeys(default_world.relations, 2)


def test_written_rows_are_the_world(default_world, asked, tmp_path):
    world.write_world(default_world, tmp_path / "new")
    corpus = [json.loads(line) for line in (tmp_path / "new" / "corpus.jsonl").read_text().splitlines()]
    assert [row["id"] for row in corpus] == [str(number) for number in range(5000)]
    name = default_world.companies[7].name
    assert corpus[3007] == default_world.passages[name]
    assert corpus[3007]["contents"].startswith(f'"{name}"\n{name} ')
    rows = [json.loads(line) for line in (tmp_path / "new" / "test.jsonl").read_text().splitlines()]
    assert rows[5] == {
        "id": "test-5",
        "question": asked["test"][5].question,
        "golden_answers": list(asked["test"][5].golden_answers),
        "metadata": {"hops": asked["test"][5].hops},
    }
    assert len(rows) == len(asked["test"])


def test_a_failed_write_leaves_the_old_file(default_world, tmp_path, monkeypatch):
    (tmp_path / "corpus.jsonl").write_text("old")
    monkeypatch.setattr(json, "dumps", lambda row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.write_world(default_world, tmp_path)
    assert (tmp_path / "corpus.jsonl").read_text() == "old"


def test_impossible_worlds_are_refused_with_the_limit():
    with pytest.raises(ValueError, match="at most 4800 persons"):
        world.make_world(settings.World(persons=4801))
    with pytest.raises(ValueError, match="at most 3000 companies"):
        world.make_world(settings.World(companies=3001))
    with pytest.raises(ValueError, match="leave 0 to the validation split"):
        world.make_world(settings.World(), validation_share=0.0)
    with pytest.raises(ValueError, match="of 5 companies"):
        world.make_world(settings.World(companies=5))
    with pytest.raises(ValueError, match="namesakes is 17; .* 16 professions"):
        world.make_world(settings.World(namesakes=17))
    with pytest.raises(ValueError, match="3000 persons are no whole number of names with 7 namesakes"):
        world.make_world(settings.World(namesakes=7))
    with pytest.raises(ValueError, match="at most 9600 persons"):
        world.make_world(settings.World(persons=9602, namesakes=2))
    with pytest.raises(ValueError, match="founded all companies of the validation split and can advise none"):
        world.make_world(settings.World(persons=40, companies=20, hops=3))
    small = world.make_world(settings.World(persons=100, companies=100))
    with pytest.raises(ValueError, match="'dev' is not a split"):
        world.questions(small, "dev")
