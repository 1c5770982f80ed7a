"""An invented world of persons and companies in which only searching can answer.

    seed ─▶ make_world ─▶ World ─▶ write_world ─▶ corpus.jsonl · train.jsonl · validation.jsonl · test.jsonl

A person has a country and a profession; a company has a founder, a city and a product; one passage tells all
of it. Half of a split's questions need one search, half need two (the country or profession of a company's
founder). Every entity belongs to one split, and a company's founder to the company's own, so nothing that
training shows answers a test question.

Names are built from two-letter syllables, and no two words share their first four letters. In a question a
name always follows a space; in a passage too, but for the name that opens its text: with a passage template
that puts a space there, as the default does, a name is the same tokens everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import random
import re
import uuid

SPLITS = ("train", "validation", "test")
FILES = ("corpus.jsonl", *(f"{split}.jsonl" for split in SPLITS))  # that `write_world` writes

PROFESSIONS = (
    "baker", "barber", "dancer", "dentist", "doctor", "farmer", "fisher", "gardener",
    "lawyer", "miner", "painter", "pilot", "poet", "sailor", "singer", "tailor",
)  # fmt: skip
PRODUCTS = (
    "boats", "boots", "bread", "candles", "chairs", "cheese", "clocks", "cups",
    "drums", "hats", "knives", "lamps", "mirrors", "pens", "ropes", "toys",
)  # fmt: skip
SUFFIXES = ("Labs", "Group", "Works", "Trading")

GIVEN_NAMES, FAMILY_NAMES = 60, 80
FIRST_WORDS, SECOND_WORDS = 50, 60  # of companies; two lists, or "A B Labs" and "B A Labs" would look alike
COUNTRIES, CITIES = 20, 20

_CONSONANTS, _VOWELS = "bdgklmnprstvz", "aeiou"

_PERSON_TEXTS = (
    "{name} is a {profession} born in {country}.",
    "{name}, a {profession}, comes from {country}.",
)
_COMPANY_TEXTS = (
    "{name} was founded by {founder}. It makes {product} in {city}.",
    "{name} makes {product} in {city}. Its founder is {founder}.",
)

# relation: (searches an ideal episode needs, two ways to ask)
RELATIONS = {
    "person_country": (1, ("which country is {} from", "where was {} born")),
    "person_profession": (1, ("what is the profession of {}", "what does {} work as")),
    "company_founder": (1, ("who founded {}", "who is the founder of {}")),
    "company_city": (1, ("which city is {} based in", "where is {} based")),
    "founder_country": (2, ("which country is the founder of {} from", "where was the founder of {} born")),
    "founder_profession": (
        2,
        ("what is the profession of the founder of {}", "what does the founder of {} work as"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody; `name` is a given and a family name."""

    name: str
    country: str
    profession: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Company:
    """A firm; `name` is two words and a suffix, `founder` the name of a person of the company's split."""

    name: str
    founder: str
    city: str
    product: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """All entities, the split of each, and the corpus."""

    seed: int
    persons: tuple[Person, ...]
    companies: tuple[Company, ...]
    split_of: Mapping[str, str]  # entity's name → "train", "validation" or "test"
    passages: Mapping[str, Mapping[str, str]]  # entity's name → {"id", "contents"}, in corpus order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question together with the way to its answer."""

    id: str  # "test-17": unique over the splits of a world
    question: str  # without a question mark; the protocol adds it
    golden_answers: tuple[str, ...]
    hops: int  # searches that an ideal episode needs: 1 or 2
    relation: str  # a key of RELATIONS
    path: tuple[str, ...]  # entities to search for, in order; as many as hops


def make_world(
    *,
    seed: int,
    persons: int = 3000,
    companies: int = 2000,
    test_share: float = 0.10,
    validation_share: float = 0.05,
) -> World:
    """The world that belongs to a seed; the same arguments give the same world.

    Args:
      seed: any integer.
      persons: how many; at most 60 x 80, the pairs of names.
      companies: how many; at most 50 x 60, the pairs of words.
      test_share: fraction of the persons, and of the companies, that only the test split knows.
      validation_share: the same for the validation split.

    Raises ValueError when there are more entities than names, or a split would have no person or no company.
    """
    for what, count, limit in (
        ("persons", persons, GIVEN_NAMES * FAMILY_NAMES),
        ("companies", companies, FIRST_WORDS * SECOND_WORDS),
    ):
        if count > limit:
            raise ValueError(f"there are {limit} names for {count} {what}; ask for at most {limit} {what}")

    rng = random.Random(seed)
    given, family, first, second, country, city = _words(
        rng, (GIVEN_NAMES, FAMILY_NAMES, FIRST_WORDS, SECOND_WORDS, COUNTRIES, CITIES)
    )

    people, split_of, persons_of = [], {}, {split: [] for split in SPLITS}
    splits = _assign_splits(rng, "persons", persons, test_share, validation_share)
    for (a, b), split in zip(_pairs(rng, given, family, persons), splits):
        person = Person(name=f"{a} {b}", country=rng.choice(country), profession=rng.choice(PROFESSIONS))
        people.append(person)
        persons_of[split].append(person.name)
        split_of[person.name] = split

    firms = []
    splits = _assign_splits(rng, "companies", companies, test_share, validation_share)
    for (a, b), split in zip(_pairs(rng, first, second, companies), splits):
        firm = Company(
            name=f"{a} {b} {rng.choice(SUFFIXES)}",
            founder=rng.choice(persons_of[split]),
            city=rng.choice(city),
            product=rng.choice(PRODUCTS),
        )
        firms.append(firm)
        split_of[firm.name] = split

    passages = {}
    for texts, entities in ((_PERSON_TEXTS, people), (_COMPANY_TEXTS, firms)):
        for entity in entities:
            text = rng.choice(texts).format(**dataclasses.asdict(entity))
            passages[entity.name] = {"id": str(len(passages)), "contents": f'"{entity.name}"\n{text}'}

    return World(
        seed=seed, persons=tuple(people), companies=tuple(firms), split_of=split_of, passages=passages
    )


def passage_of(world: World, entity_name: str) -> Mapping[str, str]:
    """The corpus row {"id", "contents"} about an entity; ValueError if the world has no such entity."""
    if entity_name not in world.passages:
        raise ValueError(f"no person and no company of this world is called {entity_name!r}")
    return world.passages[entity_name]


def questions(world: World, split: str) -> list[Question]:
    """The questions of a split, exactly half of them of one hop and half of two, shuffled.

    Of the more numerous half only as many are kept as the other has, spread evenly over its relations.
    Raises ValueError for a split that is not one of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"{split!r} is not a split; the splits are {', '.join(SPLITS)}")
    rng = random.Random(f"{world.seed} {split}")
    one_hop, two_hop = _facts(world, split)
    count = min(sum(map(len, one_hop)), sum(map(len, two_hop)))
    chosen = _spread(rng, one_hop, count) + _spread(rng, two_hop, count)
    rng.shuffle(chosen)
    result = []
    for number, (relation, path, answer) in enumerate(chosen):
        hops, forms = RELATIONS[relation]
        result.append(
            Question(
                id=f"{split}-{number}",
                question=rng.choice(forms).format(path[0]),
                golden_answers=(answer,),
                hops=hops,
                relation=relation,
                path=path,
            )
        )
    return result


def write_world(world: World, directory: str | os.PathLike) -> None:
    """Writes corpus.jsonl and one file of questions per split, replacing each file whole or not at all."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_rows(directory / "corpus.jsonl", world.passages.values())
    for split in SPLITS:
        _write_rows(
            directory / f"{split}.jsonl",
            (
                {
                    "id": question.id,
                    "question": question.question,
                    "golden_answers": question.golden_answers,
                    "metadata": {"hops": question.hops},
                }
                for question in questions(world, split)
            ),
        )


def _words(rng: random.Random, counts: Sequence[int]) -> list[list[str]]:
    """Lists of invented words, CVCV or CVCVC, no two of which share their first four letters."""
    forms = [form for _, pair in RELATIONS.values() for form in pair]
    english = " ".join((*_PERSON_TEXTS, *_COMPANY_TEXTS, *forms, *PROFESSIONS, *PRODUCTS, *SUFFIXES)).lower()
    taken = {word[:4] for word in re.findall("[a-z]+", english)}
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


def _pairs(rng, left: Sequence[str], right: Sequence[str], count: int) -> list[tuple[str, str]]:
    """`count` different pairs of a word of each list."""
    return rng.sample([(a, b) for a in left for b in right], count)


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


def _facts(world: World, split: str) -> list[list[list[tuple]]]:
    """What can be asked in a split: for one hop and for two, per relation, every (relation, path, answer)."""
    facts = {relation: [] for relation in RELATIONS}
    person_of = {person.name: person for person in world.persons}
    for person in world.persons:
        if world.split_of[person.name] == split:
            facts["person_country"].append(((person.name,), person.country))
            facts["person_profession"].append(((person.name,), person.profession))
    for company in world.companies:
        if world.split_of[company.name] == split:
            founder = person_of[company.founder]
            facts["company_founder"].append(((company.name,), founder.name))
            facts["company_city"].append(((company.name,), company.city))
            facts["founder_country"].append(((company.name, founder.name), founder.country))
            facts["founder_profession"].append(((company.name, founder.name), founder.profession))
    return [
        [[(name, *fact) for fact in facts[name]] for name, (hops, _) in RELATIONS.items() if hops == wanted]
        for wanted in (1, 2)
    ]


def _spread(rng: random.Random, pools: Sequence[list], count: int) -> list:
    """`count` items, drawn as evenly from the pools as their sizes allow."""
    chosen = []
    for done, pool in enumerate(sorted(pools, key=len)):  # what a small pool lacks, the larger ones give
        quota = (count - len(chosen)) // (len(pools) - done)
        chosen += rng.sample(pool, min(quota, len(pool)))
    return chosen


def _write_rows(path: pathlib.Path, rows: Iterable[Mapping]) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(temporary, path)
