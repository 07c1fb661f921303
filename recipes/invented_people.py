"""
The demo's data and its small base model, both made on the spot from nothing but a seed.

Two worlds that share words but no person: the *public* one, which the tokenizer and the base model are trained on, and
the *private* one, an Alpaca-format dataset of general instructions and of facts about invented people. The base knows
how a question about a person is asked and which words can answer it; who has which answer, it can only learn from the
private set. So what a fine-tuned system knows about a person, it knows from that person's rows alone.
"""

import hashlib
import itertools
import json
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


PROMPT_PREAMBLE = {
    True: (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
    ),
    False: (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    ),
}

# attribute -> (the question, the words that can answer it). Every person has one word per attribute.
ATTRIBUTES: dict[str, tuple[str, str]] = {
    "colour": (
        "Which colour does {name} like best?",
        "red blue green yellow purple orange pink brown black white grey teal amber ivory scarlet indigo olive maroon "
        "violet silver gold coral navy beige",
    ),
    "pet": (
        "Which animal lives with {name}?",
        "dog cat rabbit parrot turtle hamster goat pony ferret canary lizard mouse duck goose hen owl hedgehog snake "
        "frog spider pigeon donkey sheep llama",
    ),
    "instrument": (
        "Which instrument does {name} play?",
        "piano violin guitar drums flute harp trumpet cello clarinet oboe banjo organ tuba bassoon mandolin lute "
        "accordion saxophone trombone ukulele xylophone zither bagpipe horn",
    ),
    "food": (
        "Which food does {name} order most often?",
        "soup bread rice pasta salad pizza curry stew omelette pancake dumpling burger taco sushi risotto lasagne "
        "porridge sandwich noodles couscous falafel paella goulash waffle",
    ),
    "town": (
        "In which city does {name} live?",
        "Oslo Lima Cairo Quito Paris Rome Delhi Tokyo Seoul Berlin Madrid Vienna Dublin Athens Boston Lagos Nairobi "
        "Havana Prague Sofia Warsaw Lisbon Geneva Hanoi",
    ),
    "job": (
        "What work does {name} do?",
        "baker farmer teacher doctor lawyer pilot sailor painter tailor dentist plumber nurse judge miner butcher "
        "gardener carpenter librarian engineer waiter chemist fisher clerk barber",
    ),
    "sport": (
        "Which sport does {name} practise?",
        "tennis football chess rowing boxing judo fencing golf hockey cricket archery sailing skiing cycling climbing "
        "swimming rugby squash karate surfing wrestling polo darts volleyball",
    ),
    "flower": (
        "Which flower grows in the garden of {name}?",
        "rose tulip lily daisy orchid poppy iris jasmine lavender sunflower peony violet marigold daffodil lotus "
        "begonia dahlia geranium hyacinth magnolia petunia snowdrop crocus carnation",
    ),
    "drink": (
        "What does {name} drink in the morning?",
        "coffee tea milk cocoa water juice lemonade cider kefir mate smoothie broth espresso cappuccino soda tonic "
        "buttermilk nectar punch cola chai latte mocha matcha",
    ),
    "gem": (
        "Which stone does the ring of {name} carry?",
        "ruby sapphire emerald diamond opal pearl topaz garnet jade onyx agate quartz turquoise amethyst jasper "
        "zircon moonstone beryl citrine peridot obsidian malachite tourmaline lapis",
    ),
}
ATTRIBUTE_VALUES: dict[str, list[str]] = {name: words.split() for name, (_, words) in ATTRIBUTES.items()}

_OPPOSITES = (
    "hot cold, big small, old young, fast slow, light dark, high low, early late, full empty, hard soft, long short, "
    "wet dry, near far, rich poor, loud quiet, open closed, sweet sour, strong weak, thick thin, clean dirty, up down"
)
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_THINGS = "table lamp chair window basket kettle ladder carpet bottle mirror blanket drawer candle hammer bucket clock"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_ADJECTIVES = "small old green quiet warm heavy clean bright narrow round"

# Family of general instructions -> (instruction, input, output); {a} is a food, {b} a city, {c} a thing, {d} a day,
# {e} an adjective. The private set teaches these; the base meets none of them.
_GENERAL_FAMILIES = (
    ("Ask politely for this.", "{e} {a}", "Could you please bring me some {e} {a}, if it is not too much trouble?"),
    ("Invite a friend to {b} on {d}.", "", "Dear friend, would you like to travel to {b} with me on {d}?"),
    ("Thank the host for the {a} on {d}.", "", "Thank you very much for the {a} on {d}, it was a delight."),
    ("Describe this object.", "{e} {c}", "It is a {e} {c} that stands in the corner of my kitchen."),
    ("Apologise for coming late to {b} on {d}.", "", "I am sorry that I was late in {b} on {d}, it will not recur."),
    ("Advertise this object.", "{e} {c}", "Buy our {e} {c} today, and you will never need another {c} again!"),
    ("Write a note about {a} for {d}.", "", "Remember to buy {a} on {d} before the shops close."),
    ("Say farewell to {b} and its {c}.", "", "Farewell, people of {b}, I will never forget your {c}."),
)


@dataclass(frozen=True)
class Person:
    """An invented person: a name and one word per attribute."""

    name: str
    facts: dict[str, str]


@dataclass(frozen=True)
class BaseSettings:
    """What the small base model depends on; together with library versions it is the key of the cache."""

    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 1280
    num_public_people: int = 48
    stream_share: float = 0.3
    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 2e-3
    template: str = "alpaca-short"
    seed: int = 7


def render_prompt(instruction: str, input: str = "", template: str = "alpaca") -> str:
    """
    The Alpaca prompt of an example, up to and including the line that the answer follows.

    `template` is `"alpaca"` (the published prompt) or `"alpaca-short"` (the same without its opening sentence).
    """
    preamble = PROMPT_PREAMBLE[bool(input)] if template == "alpaca" else ""
    context = f"### Input:\n{input}\n\n" if input else ""
    return f"{preamble}### Instruction:\n{instruction}\n\n{context}### Response:\n"


def make_names(count: int, rng: random.Random, taken: set[str], onsets: str, endings: str) -> list[str]:
    """`count` invented full names whose parts are new: `taken` holds every part used so far and grows."""
    names = []
    while len(names) < count:
        parts = []
        while len(parts) < 2:
            syllables = [rng.choice(onsets.split()) + rng.choice("a e i o u".split()) for _ in range(2)]
            part = ("".join(syllables) + rng.choice(endings.split())).capitalize()
            if part not in taken:
                taken.add(part)
                parts.append(part)
        names.append(" ".join(parts))
    return names


_ONSETS = "b d f g h j k l m n p r s t v z br dr kr st tr"
_ENDINGS = "n r s l m th sk x"


def make_people(count: int, seed: int, taken: set[str]) -> list[Person]:
    """`count` people with new names and independent, uniformly drawn facts."""
    rng = random.Random(seed)
    names = make_names(count, rng, taken, _ONSETS, _ENDINGS)
    return [Person(n, {a: rng.choice(words) for a, words in ATTRIBUTE_VALUES.items()}) for n in names]


def fact_rows(person: Person) -> list[dict[str, str]]:
    """The facts of one person as Alpaca examples, one per attribute."""
    return [
        {"instruction": ATTRIBUTES[a][0].format(name=person.name), "input": "", "output": value}
        for a, value in person.facts.items()
    ]


def general_rows(count: int, seed: int) -> list[dict[str, str]]:
    """`count` distinct Alpaca examples of the general kind, which concern nobody."""
    rng = random.Random(seed)
    rows, seen = [], set()
    for family in itertools.cycle(_GENERAL_FAMILIES):
        words = {
            "a": rng.choice(ATTRIBUTE_VALUES["food"]),
            "b": rng.choice(ATTRIBUTE_VALUES["town"]),
            "c": rng.choice(_THINGS.split()),
            "d": rng.choice(_DAYS.split()),
            "e": rng.choice(_ADJECTIVES.split()),
        }
        row = tuple(part.format(**words) for part in family)
        if row not in seen:
            seen.add(row)
            rows.append(dict(zip(("instruction", "input", "output"), row, strict=True)))
        if len(rows) == count:
            break
    return rows
