"""The harder world: chains of three, namesakes, unseen words, and drills among distractors."""

import collections
import itertools
import random
import re

import pytest

from configs import world_hard
from searchr1_jax.core import settings
from searchr1_jax.data.invented import drills, relations, world as world_lib
from searchr1_jax.retrieval import local

# An independent reader: how each attribute stands in a passage, and how a person is mentioned.
MENTION = r"(?:the (?P<before>[a-z]+) (?P<late>\w+ \w+)|(?P<early>\w+ \w+) the (?P<after>[a-z]+))"
READERS = {
    "country": r"(?:born in|comes from) (\w+)\.",
    "advises": r"(?:Advises|An adviser of) (\w+ \w+ \w+)\.",
    "city": r"makes \w+ in (\w+)\.",
    "founder": rf"(?:founded by|founder is) {MENTION}\.",
}


def read(text, what):
    """The query and the name of what a passage tells."""
    (match,) = re.finditer(READERS[what], text)
    if what != "founder":
        return match[1], match[1]
    name, profession = match["late"] or match["early"], match["before"] or match["after"]
    return f"{name} {profession}", name


@pytest.fixture(scope="module")
def hard():
    return world_lib.make_world(settings.Settings.of(world_hard.get_config()).world)


@pytest.fixture(scope="module")
def asked(hard):
    return {split: world_lib.questions(hard, split) for split in world_lib.SPLITS}


@pytest.fixture(scope="module")
def retriever(hard, tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    world_lib.write_world(hard, directory)
    return local.build(directory / "corpus.jsonl", index="exact", dimensions=256)


def text_of(hard, query):
    return hard.passages[query]["contents"].partition("\n")[2]


def test_each_chain_leads_through_the_texts_of_the_passages_to_the_answer(hard, asked):
    steps = relations.CHAINS
    for question in itertools.chain(*asked.values()):
        assert len(question.path) == question.hops == len(steps[question.relation])
        *links, last = steps[question.relation]
        for query, link, following in zip(question.path, links, question.path[1:]):
            assert read(text_of(hard, query), link)[0] == following
        assert question.golden_answers == (read(text_of(hard, question.path[-1]), last)[1],)
        assert len(set(question.path)) == question.hops


def test_a_question_names_its_first_entity_with_all_that_its_query_needs(hard, asked):
    forms = set()
    for question in itertools.chain(*asked.values()):
        words = set(question.question.split())
        assert [set(query.split()) <= words for query in question.path] == [True] + [False] * (question.hops - 1)
        forms.add(question.path[0] in question.question)
    assert forms == {True, False}  # a company's query stands there, a person's is put together from two places


def test_a_third_of_each_split_needs_each_number_of_searches(asked):
    for questions in asked.values():
        hops = collections.Counter(question.hops for question in questions)
        assert set(hops) == {1, 2, 3} and len(set(hops.values())) == 1


def test_splits_share_no_entity_no_name_of_a_person_and_no_company_of_theirs(hard):
    splits_of = collections.defaultdict(set)
    for entity in hard.entities.values():
        splits_of[entity.name].add(hard.split_of[entity.query])
    assert all(len(splits) == 1 for splits in splits_of.values())
    for person in hard.persons:
        assert hard.split_of[person.advises] == hard.split_of[person.query]
        assert hard.entities[person.advises].founder != person.query
    for company in hard.companies:
        assert hard.split_of[company.founder] == hard.split_of[company.name]


def test_validation_and_test_ask_in_combinations_that_training_never_shows_of_words_that_it_does(hard, asked):
    def forms(split):
        found = collections.defaultdict(set)
        for question in asked[split]:
            entity, form = hard.entities[question.path[0]], question.question.replace(question.path[0], "{}")
            if isinstance(entity, world_lib.Person):
                form = form.replace(f"the {entity.profession} {entity.name}", "{}")
                form = form.replace(f"{entity.name} the {entity.profession}", "{}")
            found[question.relation].add(form)
        return found

    training, test = forms("train"), forms("test")
    assert training.keys() == test.keys() == hard.relations.keys()
    for relation, own in test.items():
        assert len(training[relation]) >= 5 and len(own) >= 3
        assert not own & training[relation]
        assert {w for form in own for w in form.split()} <= {w for form in training[relation] for w in form.split()}


def test_six_persons_bear_each_name_and_their_profession_tells_them_apart(hard):
    bearers = collections.defaultdict(list)
    for person in hard.persons:
        bearers[person.name].append(person)
    assert {len(persons) for persons in bearers.values()} == {6}
    assert all(len({person.profession for person in persons}) == 6 for persons in bearers.values())
    assert len(hard.entities) == len(hard.passages) == 5000


def recall(hard, retriever, entities, query_of):
    found = retriever.search([query_of(entity) for entity in entities], 3)
    hits = [
        hard.passages[entity.query]["id"] in [passage.id for passage in passages]
        for entity, passages in zip(entities, found, strict=True)
    ]
    return sum(hits) / len(hits)


def test_name_and_profession_find_a_person_among_three_and_the_name_alone_does_not(hard, retriever):
    people = random.Random(0).sample(hard.persons, 400)
    firms = random.Random(0).sample(hard.companies, 400)
    assert recall(hard, retriever, people, lambda person: person.query) >= 0.99
    assert recall(hard, retriever, firms, lambda company: company.query) >= 0.99
    # Six passages fit a name alike, so a half of them is among the first three.
    assert 0.4 < recall(hard, retriever, people, lambda person: person.name) < 0.6


# Demonstrations.


@pytest.fixture(scope="module")
def drilled(hard, asked):
    return list(itertools.islice(drills.drills(hard, asked["train"], passages=3, seed=0), 6000))


def moves(row):
    """Texts of turns, and the ids of what a search found."""
    return [s.get("turn") or [passage["id"] for passage in s["passages"]] for s in row["segments"]]


def test_a_drill_is_one_move_after_the_passages_that_lead_to_it(hard, asked, drilled):
    by_id = {question.id: question for question in asked["train"]}
    kinds = collections.Counter()
    for row in drilled:
        question, (*found, move) = by_id[row["id"]], moves(row)
        assert not any(isinstance(step, str) for step in found)
        for query, ids in zip(question.path, found):
            assert len(set(ids)) == 3 and hard.passages[query]["id"] in ids
        if len(found) == question.hops:
            assert move == f"<answer> {question.golden_answers[0]} </answer>"
        else:
            assert move == f"<search> {question.path[len(found)]} </search>"
        kinds[len(found), question.hops] += 1
    assert set(kinds) == {(found, hops) for hops in (1, 2, 3) for found in range(hops + 1)}


def test_the_passage_searched_for_stands_first_then_an_eighth_as_often(hard, asked, drilled):
    by_id = {question.id: question for question in asked["train"]}
    places = collections.Counter()
    for row in drilled:
        for query, ids in zip(by_id[row["id"]].path, moves(row)[:-1]):
            places[ids.index(hard.passages[query]["id"])] += 1
    total = sum(places.values())
    for place, share in enumerate((64 / 73, 8 / 73, 1 / 73)):
        # Rows of one question share what was found: three standard deviations of an effective third of them.
        assert abs(places[place] / total - share) < 3 * (share * (1 - share) / (total / 3)) ** 0.5


def test_distractors_are_of_the_training_split_and_share_a_name(hard, drilled, asked):
    by_id = {question.id: question for question in asked["train"]}
    query_of = {row["id"]: query for query, row in hard.passages.items()}
    for row in drilled:
        for query, ids in zip(by_id[row["id"]].path, moves(row)[:-1]):
            name = set(hard.entities[query].name.split())
            for other in (query_of[i] for i in ids):
                assert hard.split_of[other] == "train"
                assert name & set(re.findall(r"\w+", hard.passages[other]["contents"]))


def test_episodes_of_the_mixture_go_as_far_as_their_kind_says(hard, asked):
    shares = settings.Sft(
        mixture_right=0.25, mixture_guess=0.25, mixture_wrong_entity=0.25, mixture_stopped_early=0.25, guess_weight=0.25
    )
    by_id = {question.id: question for question in asked["train"]}
    mixed = drills.mixture(hard, asked["train"], shares, passages=3)
    seen = collections.Counter()
    for row in itertools.islice(mixed, 2000):
        question, made = by_id[row["id"]], moves(row)
        seen[row["kind"], question.hops] += 1
        searched = [move for move in made if isinstance(move, str)][:-1]
        if row["kind"] == "right":
            assert searched == [f"<search> {query} </search>" for query in question.path]
            assert made[-1] == f"<answer> {question.golden_answers[0]} </answer>"
        elif row["kind"] == "stopped_early":
            says = hard.entities[question.path[1]].name
            assert searched == [f"<search> {question.path[0]} </search>"]
            assert (
                made[-1] == f"<answer> {says} </answer>"
                and says in row["segments"][1]["passages"][made[1].index(hard.passages[question.path[0]]["id"])]["text"]
            )
        else:
            assert len(searched) == (row["kind"] == "wrong_entity")
            assert f"<search> {question.path[0]} </search>" not in searched
    kinds = ("right", "guess", "wrong_entity")
    assert set(seen) == {(k, hops) for k in kinds for hops in (1, 2, 3)} | {("stopped_early", 2), ("stopped_early", 3)}
