"""What the invented world tells and what is asked about it: attributes, chains of them, and the words for both.

    company ─ founder ─▶ person ─ advises ─▶ company ─ city ─▶ "Kelu"       a chain of three steps, three searches

A step is an attribute of the entity that was reached; the last one is the answer. All of it is data: another relation
is another row of CHAINS, another attribute a field of `world.Person` or `world.Company` and a line of PHRASES.
"""

import dataclasses
import itertools

PROFESSIONS = (
    "baker", "barber", "dancer", "dentist", "doctor", "farmer", "fisher", "gardener",
    "lawyer", "miner", "painter", "pilot", "poet", "sailor", "singer", "tailor",
)  # fmt: skip
PRODUCTS = (
    "boats", "boots", "bread", "candles", "chairs", "cheese", "clocks", "cups",
    "drums", "hats", "knives", "lamps", "mirrors", "pens", "ropes", "toys",
)  # fmt: skip
SUFFIXES = ("Labs", "Group", "Works", "Trading")

PERSON_TEXTS = ("{name} is a {profession} born in {country}.", "{name}, a {profession}, comes from {country}.")
ADVISER_TEXTS = (" Advises {advises}.", " An adviser of {advises}.")  # follow a person's text, with three hops
COMPANY_TEXTS = (
    "{name} was founded by {founder}. It makes {product} in {city}.",
    "{name} makes {product} in {city}. Its founder is {founder}.",
)

# Of a person with namesakes: how texts and questions speak of them, and what to search for.
MENTIONS = ("the {profession} {name}", "{name} the {profession}")
QUERY = "{name} {profession}"

LINKS = ("founder", "advises")  # attributes whose value is another entity

CHAINS = {
    "person_country": ("country",),
    "person_profession": ("profession",),
    "company_founder": ("founder",),
    "company_city": ("city",),
    "founder_country": ("founder", "country"),
    "founder_profession": ("founder", "profession"),
    "person_advises": ("advises",),
    "founder_advises": ("founder", "advises"),
    "advised_city": ("advises", "city"),
    "advised_founder": ("advises", "founder"),
    "advised_founder_country": ("advises", "founder", "country"),
    "founder_advised_city": ("founder", "advises", "city"),
}

# Two ways to ask for the last step of a chain, and how the steps before it stand there.
ASKED = {
    "country": ("which country is {} from", "where was {} born"),
    "profession": ("what is the profession of {}", "what does {} work as"),
    "city": ("which city is {} based in", "where is {} based"),
    "founder": ("who founded {}", "who is the founder of {}"),
    "advises": ("which company does {} advise", "whom does {} advise"),
}
REACHED = {"founder": "the founder of {}", "advises": "the company advised by {}"}

# Paraphrases are nested: "do you know" · "the home country of" · "the person who started" · "Baka Tolu Labs".
FRAMES = ("can you name {}", "do you know {}", "could you tell me {}", "have you heard of {}")
PHRASES = {
    "country": ("the home country of {}", "the country of birth of {}", "the country that {} is from"),
    "profession": ("the profession of {}", "the trade of {}", "the job that {} has"),
    "city": ("the home city of {}", "the city of {}", "the city that {} works in"),
    "founder": ("the founder of {}", "the person who started {}"),
    "advises": ("the company that {} advises", "the firm advised by {}"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation:
    """A kind of question."""

    steps: tuple[str, ...]  # attributes, from the entity that the question names on; one search each
    forms: tuple[str, ...]  # ways in which the training split asks, with {} for the entity
    unseen_forms: tuple[str, ...]  # ways in which the other splits ask

    @property
    def hops(self) -> int:
        return len(self.steps)


def relations(*, hops: int, namesakes: int, paraphrased: bool) -> dict[str, Relation]:
    """The relations of a world, by name.

    Args:
      hops: searches of the longest chains, 2 or 3; only with three do persons advise companies.
      namesakes: persons of each name; where there are several, a mention of one tells the profession, so it is not
        asked for.
      paraphrased: False: two ways to ask for each, in every split; True: nested phrases, and the other splits ask in
        combinations of them that training never shows.
    """
    found = {}
    for name, steps in CHAINS.items():
        if (hops < 3 and "advises" in steps) or (namesakes > 1 and "profession" in steps):
            continue
        seen, unseen = _paraphrases(steps) if paraphrased else (_plain(steps),) * 2
        found[name] = Relation(steps=steps, forms=seen, unseen_forms=unseen)
    return found


def _plain(steps: tuple[str, ...]) -> tuple[str, ...]:
    """The two ways to ask."""
    name = "{}"
    for step in steps[:-1]:
        name = REACHED[step].format(name)
    return tuple(form.format(name) for form in ASKED[steps[-1]])


def _paraphrases(steps: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All nestings of a frame and a phrase a step: those of training, and a third of them that it never shows.

    Held out are those whose places in the lists add up to a multiple of three, so each phrase is in training.
    """
    seen, unseen = [], []
    for parts in itertools.product(enumerate(FRAMES), *(enumerate(PHRASES[step]) for step in reversed(steps))):
        form = "{}"
        for _, part in parts:
            form = form.format(part)
        (unseen if sum(place for place, _ in parts) % 3 == 0 else seen).append(form)
    return tuple(seen), tuple(unseen)


def english(found: dict[str, Relation]) -> str:
    """All fixed text of a world, which its invented words keep away from."""
    forms = [form for relation in found.values() for form in (*relation.forms, *relation.unseen_forms)]
    texts = [*PERSON_TEXTS, *COMPANY_TEXTS, *(ADVISER_TEXTS if "person_advises" in found else ())]
    return " ".join((*texts, *forms, *PROFESSIONS, *PRODUCTS, *SUFFIXES))
