"""An invented world of persons and companies in which only searching can answer.

    seed ─▶ make_world ─▶ World ─▶ write_world ─▶ corpus.jsonl · train.jsonl · validation.jsonl · test.jsonl

A person has a country and a profession; a company has a founder, a city and a product; one passage tells all
of it. Half of a split's questions need one search, half need two (the country or profession of a company's
founder). Every entity belongs to one split, and a company's founder to the company's own, so nothing that
training shows answers a test question.

A harder world has chains of three (persons advise companies); several people share each name, so a query must give name
and profession; and test questions combine words in ways training never does.

Names are built from two-letter syllables, and no two words share their first four letters. In a question a
name always follows a space; in a passage too, but for the name that opens its text: with a passage template
that puts a space there, as the default does, a name is the same tokens everywhere.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools
import os
import pathlib
import random
import re

from searchr1_jax.core import files, settings as settings_lib
from searchr1_jax.data.invented import relations as relations_lib

SPLITS = ("train", "validation", "test")
FILES = ("corpus.jsonl", *(f"{split}.jsonl" for split in SPLITS))  # that `write_world` writes

GIVEN_NAMES, FAMILY_NAMES = 60, 80
FIRST_WORDS, SECOND_WORDS = 50, 60  # of companies; two lists, or "A B Labs" and "B A Labs" would look alike
COUNTRIES, CITIES = 20, 20

_CONSONANTS, _VOWELS = "bdgklmnprstvz", "aeiou"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody; `name` is a given and a family name."""

    name: str
    query: str  # what to search for: the name, with the profession where others have the same; nobody else's
    country: str
    profession: str
    advises: str | None = None  # query of a company of the person's split that somebody else founded; with three hops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Company:
    """A firm; `name` is two words and a suffix."""

    name: str
    founder: str  # query of a person of the company's split
    city: str
    product: str

    @property
    def query(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """All entities, the split of each, and the corpus."""

    seed: int
    persons: tuple[Person, ...]
    companies: tuple[Company, ...]
    relations: Mapping[str, relations_lib.Relation]  # by name: what is asked
    entities: Mapping[str, Person | Company]  # by query, in corpus order; as the next two
    split_of: Mapping[str, str]  # "train", "validation" or "test"
    passages: Mapping[str, Mapping[str, str]]  # {"id", "contents"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question together with the way to its answer."""

    id: str  # "test-17": unique over the splits of a world
    question: str  # without a question mark; the protocol adds it
    golden_answers: tuple[str, ...]
    hops: int  # searches that an ideal episode needs
    relation: str  # a key of World.relations
    path: tuple[str, ...]  # queries of the entities to search for, in order; as many as hops


def make_world(c: settings_lib.World, *, test_share: float = 0.10, validation_share: float = 0.05) -> World:
    """The world that belongs to a seed; the same arguments give the same world.

    The shares are fractions of the persons, and of the companies, that only that split knows. ValueError when there are
    more entities than names, or a split would have no person or no company.
    """
    _check(c)
    relations = relations_lib.relations(hops=c.hops, namesakes=c.namesakes, paraphrased=c.paraphrased)
    rng = random.Random(c.seed)
    given, family, first, second, country, city = _words(
        rng, (GIVEN_NAMES, FAMILY_NAMES, FIRST_WORDS, SECOND_WORDS, COUNTRIES, CITIES), relations_lib.english(relations)
    )

    people, split_of, of_split = [], {}, {split: [] for split in SPLITS}
    names = c.persons // c.namesakes
    splits = _assign_splits(rng, "names of persons", names, test_share, validation_share)
    for (a, b), split in zip(rng.sample(list(itertools.product(given, family)), names), splits):
        countries = [rng.choice(country) for _ in range(c.namesakes)]
        professions = rng.sample(relations_lib.PROFESSIONS, c.namesakes)
        for home, profession in zip(countries, professions):
            name = f"{a} {b}"
            query = name if c.namesakes == 1 else relations_lib.QUERY.format(name=name, profession=profession)
            people.append(Person(name=name, query=query, country=home, profession=profession))
            of_split[split].append(query)
            split_of[query] = split

    firms = []
    splits = _assign_splits(rng, "companies", c.companies, test_share, validation_share)
    for (a, b), split in zip(rng.sample(list(itertools.product(first, second)), c.companies), splits):
        name = f"{a} {b} {rng.choice(relations_lib.SUFFIXES)}"
        founder, place, product = rng.choice(of_split[split]), rng.choice(city), rng.choice(relations_lib.PRODUCTS)
        firms.append(Company(name=name, founder=founder, city=place, product=product))
        split_of[name] = split
    if c.hops == 3:
        people = _advisers(rng, people, firms, split_of)

    entities = {entity.query: entity for entity in (*people, *firms)}
    texts = [f'"{entity.name}"\n{_text(rng, entity, entities)}' for entity in entities.values()]
    rows = [{"id": str(i), "contents": text} for i, text in enumerate(texts)]
    return World(
        seed=c.seed,
        persons=tuple(people),
        companies=tuple(firms),
        relations=relations,
        entities=entities,
        split_of=split_of,
        passages=dict(zip(entities, rows, strict=True)),
    )


def questions(world: World, split: str) -> list[Question]:
    """The questions of a split, equally many of each number of hops, shuffled.

    Of each number only as many are kept as the scarcest has, spread evenly over its relations.
    """
    if split not in SPLITS:
        raise ValueError(f"{split!r} is not a split; the splits are {', '.join(SPLITS)}")
    rng = random.Random(f"{world.seed} {split}")
    facts = _facts(world, split)
    count = min(sum(map(len, pools)) for pools in facts)
    chosen = [fact for pools in facts for fact in _spread(rng, pools, count)]
    rng.shuffle(chosen)
    result = []
    for number, (name, path, answer) in enumerate(chosen):
        relation = world.relations[name]
        form = rng.choice(relation.forms if split == "train" else relation.unseen_forms)
        text = form.format(_mention(rng, world.entities[path[0]]))
        question = Question(
            id=f"{split}-{number}",
            question=text,
            golden_answers=(answer,),
            hops=relation.hops,
            relation=name,
            path=path,
        )
        result.append(question)
    return result


def write_world(world: World, directory: str | os.PathLike) -> None:
    """Writes corpus.jsonl and one file of questions per split, replacing each file whole or not at all."""
    written: dict[str, Iterable[Mapping]] = {"corpus": world.passages.values()}
    for split in SPLITS:
        written[split] = [
            {"id": q.id, "question": q.question, "golden_answers": q.golden_answers, "metadata": {"hops": q.hops}}
            for q in questions(world, split)
        ]
    for name, rows in written.items():
        files.write_jsonl(pathlib.Path(directory, f"{name}.jsonl"), rows, shared=True)


def _check(c: settings_lib.World) -> None:
    if c.namesakes > len(relations_lib.PROFESSIONS):
        told_apart = f"they are told apart by {len(relations_lib.PROFESSIONS)} professions"
        raise ValueError(f"world.namesakes is {c.namesakes}; {told_apart}, so set it to at most that")
    if c.persons % c.namesakes:
        raise ValueError(
            f"{c.persons} persons are no whole number of names with {c.namesakes} namesakes each; make it a multiple"
        )
    for what, count, limit in (
        ("persons", c.persons, GIVEN_NAMES * FAMILY_NAMES * c.namesakes),
        ("companies", c.companies, FIRST_WORDS * SECOND_WORDS),
    ):
        if count > limit:
            raise ValueError(f"there are {limit} names for {count} {what}; ask for at most {limit} {what}")


def _words(rng: random.Random, counts: Sequence[int], english: str) -> list[list[str]]:
    """Lists of invented words, CVCV or CVCVC; no two, nor one and a text's, share their first four letters."""
    taken = {word[:4] for word in re.findall("[a-z]+", english.lower())}
    lists = []
    for count in counts:
        words = []
        while len(words) < count:
            stem = "".join(rng.choice(letters) for letters in (_CONSONANTS, _VOWELS) * 2)
            if stem not in taken:
                taken.add(stem)
                words.append((stem + rng.choice(("", rng.choice(_CONSONANTS)))).capitalize())
        lists.append(words)
    return lists


def _assign_splits(rng, what: str, count: int, test_share: float, validation_share: float) -> list[str]:
    """A split for each of `count` entities, in random order."""
    test, validation = round(count * test_share), round(count * validation_share)
    sizes = {"train": count - test - validation, "validation": validation, "test": test}
    for split, size in sizes.items():
        if size < 1:
            raise ValueError(
                f"of {count} {what}, test_share {test_share} and validation_share {validation_share} leave "
                f"{size} to the {split} split; ask for more {what} or change the shares"
            )
    splits = [split for split, size in sizes.items() for _ in range(size)]
    rng.shuffle(splits)
    return splits


def _advisers(
    rng: random.Random, people: Sequence[Person], firms: Sequence[Company], split_of: Mapping[str, str]
) -> list[Person]:
    """The same persons, each adviser of a company of their split that they did not found."""
    firms_of = {split: [firm for firm in firms if split_of[firm.name] == split] for split in SPLITS}
    result = []
    for person in people:
        others = [firm.name for firm in firms_of[split_of[person.query]] if firm.founder != person.query]
        if not others:
            raise ValueError(
                f"{person.query} founded all companies of the {split_of[person.query]} split and can advise none; ask"
                " for more companies"
            )
        result.append(dataclasses.replace(person, advises=rng.choice(others)))
    return result


def _mention(rng: random.Random, entity: Person | Company) -> str:
    """How a text or a question speaks of an entity, so that nobody else is meant."""
    if entity.query == entity.name:
        return entity.name
    assert isinstance(entity, Person)  # companies have names of their own
    return rng.choice(relations_lib.MENTIONS).format(name=entity.name, profession=entity.profession)


def _text(rng: random.Random, entity: Person | Company, entities: Mapping[str, Person | Company]) -> str:
    """What the passage of an entity tells."""
    known = dataclasses.asdict(entity)
    if isinstance(entity, Company):
        text = rng.choice(relations_lib.COMPANY_TEXTS)
        return text.format(**known | {"founder": _mention(rng, entities[entity.founder])})
    text = rng.choice(relations_lib.PERSON_TEXTS)
    if entity.advises:
        text += rng.choice(relations_lib.ADVISER_TEXTS)
    return text.format(**known)


def _facts(world: World, split: str) -> list[list[list[tuple]]]:
    """What can be asked in a split: for one hop and more, per relation, every (relation, path, answer)."""
    entities = [entity for query, entity in world.entities.items() if world.split_of[query] == split]
    facts: dict[int, list[list[tuple]]] = {}
    for name, relation in world.relations.items():
        pool = [(name, *_follow(world, e, relation.steps)) for e in entities if hasattr(e, relation.steps[0])]
        facts.setdefault(relation.hops, []).append(pool)
    return [facts[hops] for hops in sorted(facts)]


def _follow(world: World, entity: Person | Company, steps: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The queries along a chain, and what stands at its end."""
    path = [entity.query]
    for step in steps[:-1]:
        entity = world.entities[getattr(entity, step)]
        path.append(entity.query)
    answer = getattr(entity, steps[-1])
    return tuple(path), world.entities[answer].name if steps[-1] in relations_lib.LINKS else answer


def _spread(rng: random.Random, pools: Sequence[list], count: int) -> list:
    """`count` items, drawn as evenly from the pools as their sizes allow."""
    chosen = []
    for done, pool in enumerate(sorted(pools, key=len)):  # what a small pool lacks, the larger ones give
        quota = (count - len(chosen)) // (len(pools) - done)
        chosen += rng.sample(pool, min(quota, len(pool)))
    return chosen
