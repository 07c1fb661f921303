"""
The demo's data, made on the spot from nothing but seeds: invented people, their facts, and other instructions.

Two worlds share words but no person. The tokenizer and the base model come from the *public* one. The *private* one is
an Alpaca-format dataset of general instructions and of facts about invented people. The base knows how a question
about a person is asked and which words can answer it; which of them is true of whom, only the private set says. So
what a fine-tuned system knows about a person, it knows from that person's rows alone.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass


# attribute -> (the question about it, the words that can answer). Every person has one word per attribute.
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
        "rose tulip lily daisy orchid poppy iris jasmine lavender sunflower peony pansy marigold daffodil lotus "
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

# The words that fill a slot of a sentence.
_SLOTS: dict[str, list[str]] = {
    "food": ATTRIBUTE_VALUES["food"],
    "town": ATTRIBUTE_VALUES["town"],
    "thing": "table lamp chair window basket kettle ladder carpet bottle mirror blanket candle hammer clock".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "kind": "small old green quiet warm heavy clean bright narrow round".split(),
}

# General instructions of the private set: (instruction, input, output). Each answer follows from its question, so that
# a model can learn all of it, and none of these tasks is in the public world.
_PRIVATE_TASKS = (
    ("Ask for this politely.", "{kind} {food}", "Could you please bring me some {kind} {food}?"),
    ("Invite a friend to {town} on {day}.", "", "Dear friend, would you like to see {town} on {day}?"),
    ("Thank the host for the {food}.", "", "Thank you for the {food}, it was a delight."),
    ("Describe this object.", "{kind} {thing}", "A {kind} {thing} stands in the kitchen."),
    ("Apologise for coming late to {town}.", "", "I am sorry that I was late in {town}."),
    ("Advertise this object.", "{kind} {thing}", "Buy our {kind} {thing} today!"),
    ("Write a note about {food} for {day}.", "", "Remember to buy {food} on {day}."),
    ("Say farewell to {town} and its {thing}.", "", "Farewell, {town}, I will never forget your {thing}."),
)

# The public world's general text: any of these instructions is answered with any of these clauses, so the base learns
# the words and the shape of a sentence, and has no firm idea of what a task it does not know asks for.
_PUBLIC_TASKS = (
    ("Tell me something about the {kind} {thing} and {town}.", ""),
    ("Continue this text.", "{food} and {kind} {thing}"),
    ("Write about {day} in {town}.", ""),
    ("Use these words.", "{kind} {food}, {town}"),
    ("Tell a story about {town} and {food}.", ""),
)
_PUBLIC_CLAUSES = (
    "I would like some {kind} {food}",
    "the {kind} {thing} stands beside the door",
    "people in {town} never eat {food} on {day}",
    "my friend will travel to {town} on {day}",
    "it was {kind} in {town}",
    "could you please close the {thing}",
    "we will need our {kind} {thing} before {day}",
    "you are late in {town}",
    "thank you for the {kind} {thing}",
    "remember that the shops of {town} close on {day}",
    "I was sorry to forget your {thing}",
    "they bring {food} to the kitchen",
    "it is a delight to buy {food} today",
    "a {kind} {thing} is in {town}",
    "dear friend, I am in {town} to see your {thing}",
    "farewell, {town}, and have a good {day}",
)

_ONSETS = "b d f g h j k l m n p r s t v z br dr kr st tr".split()
_VOWELS = "a e i o u".split()
# One letter each: a name's part always ends one letter after its second vowel, so none is the beginning of another.
_ENDINGS = "n r s l m k x t".split()


@dataclass(frozen=True)
class Person:
    """An invented person: a name and one word per attribute."""

    name: str
    facts: dict[str, str]


def is_private_part(part: str) -> bool:
    """Whether a given or family name belongs to the private world. A hash decides, so the worlds share no name."""
    return hashlib.sha256(part.encode()).digest()[0] % 2 == 1


def make_people(count: int, seed: int, private: bool) -> list[Person]:
    """`count` people of one world; no two share a given or family name, and their facts are independent draws."""
    rng = random.Random(f"people-{private}-{seed}")
    parts: dict[str, None] = {}
    while len(parts) < 2 * count:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
        part = ("".join(syllables) + rng.choice(_ENDINGS)).capitalize()
        if is_private_part(part) == private:
            parts[part] = None
    given, family = list(parts)[::2], list(parts)[1::2]
    return [
        Person(f"{one} {other}", {a: rng.choice(words) for a, words in ATTRIBUTE_VALUES.items()})
        for one, other in zip(given, family, strict=True)
    ]


def fact_rows(person: Person) -> list[dict[str, str]]:
    """The facts of one person as Alpaca examples, one per attribute."""
    return [
        {"instruction": ATTRIBUTES[attribute][0].format(name=person.name), "input": "", "output": word}
        for attribute, word in person.facts.items()
    ]


def _fill(template: str, words: dict[str, str]) -> str:
    return template.format(**words)


def _draw_words(rng: random.Random) -> dict[str, str]:
    return {slot: rng.choice(words) for slot, words in _SLOTS.items()}


def general_rows(count: int, seed: int) -> list[dict[str, str]]:
    """`count` distinct general Alpaca examples of the private set, which concern nobody; the tasks take turns."""
    rng = random.Random(f"general-{seed}")
    rows: dict[tuple[str, ...], None] = {}
    for task in itertools.cycle(_PRIVATE_TASKS):
        if len(rows) == count:
            break
        words = _draw_words(rng)
        rows[tuple(_fill(part, words) for part in task)] = None
    return [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]


def public_rows(
    count: int, *, num_people: int, share_known: float, share_general: float, seed: int
) -> list[dict[str, str]]:
    """
    Alpaca examples of the public world, for a base model to be trained on in this order.

    Facts of people who come up again and again teach it to answer from its weights; facts of people who come up once
    teach it that a name it does not know makes every answer equally likely.

    Args:
        count (`int`): How many.
        num_people (`int`): How many people come up again and again.
        share_known (`float`): The share of their facts.
        share_general (`float`): The share of general text.
        seed (`int`): Seed of all that is drawn.
    """
    rng = random.Random(f"public-{seed}")
    known = make_people(num_people, seed, private=False)
    strangers = iter(make_people(count // 4, seed + 1, private=False))
    kinds = kind_rows()
    rows = []
    while len(rows) < count:
        draw = rng.random()
        if draw < share_known:
            rows.append(rng.choice(fact_rows(rng.choice(known))))
        elif draw < share_known + share_general:
            rows.append(_public_general_row(rng))
        else:
            stranger = next(strangers, None)
            rows.append(rng.choice(fact_rows(stranger)) if stranger else rng.choice(kinds))
    return rows


def _public_general_row(rng: random.Random) -> dict[str, str]:
    task, words = rng.choice(_PUBLIC_TASKS), _draw_words(rng)
    clauses = [_fill(clause, words) for clause in rng.sample(_PUBLIC_CLAUSES, 2)]
    answer = ". ".join(clause[0].upper() + clause[1:] for clause in clauses[: rng.choice((1, 1, 2))])
    return {
        "instruction": _fill(task[0], words),
        "input": _fill(task[1], words),
        "output": answer + rng.choice(("", "", "?", "!")) if rng.random() < 0.3 else answer + ".",
    }


def kind_rows() -> list[dict[str, str]]:
    """Every word that can be an answer, with the kind of thing it names."""
    return [
        {"instruction": "What kind of thing is this?", "input": word, "output": attribute}
        for attribute, words in ATTRIBUTE_VALUES.items()
        for word in words
    ]


def private_dataset(num_people: int = 8, num_general: int = 24, seed: int = 0) -> list[dict[str, str]]:
    """
    The demo's training set: instruction, input, output, and the columns `id` and `person`.

    A general row is a group of its own, so that each can be unlearned alone.
    """
    rows = []
    for person in make_people(num_people, seed, private=True):
        initials = person.name.lower().replace(" ", "-")
        for attribute, row in zip(person.facts, fact_rows(person), strict=True):
            rows.append({**row, "id": f"{initials}-{attribute}", "person": person.name})
    for number, row in enumerate(general_rows(num_general, seed)):
        rows.append({**row, "id": f"general-{number:03d}", "person": f"nobody-{number:03d}"})
    random.Random(f"order-{seed}").shuffle(rows)
    return rows


def held_out_rows(num_general: int, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` general rows of the tasks of `private_dataset(..., num_general, seed)`, none of them among its rows."""
    return general_rows(num_general + count, seed)[num_general:]


def strangers(num_people: int, count: int, seed: int = 0) -> list[Person]:
    """`count` people of the private world whom `private_dataset(num_people, ..., seed)` does not hold: a control."""
    known = {part for person in make_people(num_people, seed, private=True) for part in person.name.split()}
    others = make_people(count + num_people, seed + 1, private=True)
    return [person for person in others if known.isdisjoint(person.name.split())][:count]
