"""
The demo's data and its small base model, both made on the spot from nothing but seeds.

Two worlds share words but no person. The tokenizer and the base model come from the *public* one. The *private* one is
an Alpaca-format dataset of general instructions and of facts about invented people. The base knows how a question
about a person is asked and which words can answer it; which of them is true of whom, only the private set says. So
what a fine-tuned system knows about a person, it knows from that person's rows alone.
"""

import dataclasses
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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

_PREAMBLE = "Below is an instruction that describes a task. "
_PREAMBLE_INPUT = "Below is an instruction that describes a task, paired with an input that provides further context. "
_REQUEST = "Write a response that appropriately completes the request.\n\n"
PROMPT_TEMPLATES = ("alpaca", "alpaca-short")


@dataclass(frozen=True)
class Person:
    """An invented person: a name and one word per attribute."""

    name: str
    facts: dict[str, str]


@dataclass(frozen=True)
class BaseSettings:
    """What the tokenizer and the base model depend on; with the versions of the libraries, the key of their cache."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 1536
    num_people: int = 24
    share_known: float = 0.65
    share_general: float = 0.2
    steps: int = 320
    batch_size: int = 64
    learning_rate: float = 4e-3
    template: str = "alpaca-short"
    seed: int = 7


def render_prompt(instruction: str, context: str = "", template: str = "alpaca") -> str:
    """
    The Alpaca prompt, up to where the answer begins.

    Args:
        instruction (`str`): The task.
        context (`str`, defaults to `""`): The example's input; its part of the prompt is left out when empty.
        template (`str`, defaults to `"alpaca"`): `"alpaca"` as published, `"alpaca-short"` without the opening words.
    """
    if template not in PROMPT_TEMPLATES:
        raise ValueError(f"`prompt_template` must be one of {', '.join(PROMPT_TEMPLATES)}, got {template!r}.")
    opening = (_PREAMBLE_INPUT if context else _PREAMBLE) + _REQUEST if template == "alpaca" else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"{opening}### Instruction:\n{instruction}\n\n{middle}### Response:\n"


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


def public_rows(settings: BaseSettings) -> list[dict[str, str]]:
    """
    All that the base model is trained on, in order: `steps * batch_size` Alpaca examples of the public world.

    Facts of people who come up again and again teach it to answer from its weights; facts of people who come up once
    teach it that a name it does not know makes every answer equally likely.
    """
    rng = random.Random(f"public-{settings.seed}")
    count = settings.steps * settings.batch_size
    known = make_people(settings.num_people, settings.seed, private=False)
    strangers = iter(make_people(count // 4, settings.seed + 1, private=False))
    kinds = _kind_rows()
    rows = []
    while len(rows) < count:
        draw = rng.random()
        if draw < settings.share_known:
            rows.append(rng.choice(fact_rows(rng.choice(known))))
        elif draw < settings.share_known + settings.share_general:
            rows.append(_public_general_row(rng))
        else:
            stranger = next(strangers, None)
            rows.append(rng.choice(fact_rows(stranger)) if stranger else rng.choice(kinds))
    return rows + kinds


def _public_general_row(rng: random.Random) -> dict[str, str]:
    task, words = rng.choice(_PUBLIC_TASKS), _draw_words(rng)
    clauses = [_fill(clause, words) for clause in rng.sample(_PUBLIC_CLAUSES, 2)]
    answer = ". ".join(clause[0].upper() + clause[1:] for clause in clauses[: rng.choice((1, 1, 2))])
    return {
        "instruction": _fill(task[0], words),
        "input": _fill(task[1], words),
        "output": answer + rng.choice(("", "", "?", "!")) if rng.random() < 0.3 else answer + ".",
    }


def _kind_rows() -> list[dict[str, str]]:
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


def train_tokenizer(settings: BaseSettings) -> Any:
    """A byte-level BPE tokenizer of the public world; being byte-level, it can spell anything."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (render_prompt(r["instruction"], r["input"], settings.template) + r["output"] for r in _spelled(settings))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def _spelled(settings: BaseSettings) -> list[dict[str, str]]:
    # The last rows are the list of all answers: seen often enough, each of these words becomes a token of its own.
    rows = public_rows(settings)
    return rows[:6000] + rows[settings.steps * settings.batch_size :] * 40


def train_base(settings: BaseSettings, tokenizer: Any, log: Callable[[str], None] = print) -> Any:
    """A small Llama, pretrained on the public world."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / settings.steps)
        )
        for step, parts in enumerate(_base_batches(settings, tokenizer)):
            optimizer.zero_grad()
            answer_loss = 0.0
            for part in parts:
                loss, of_answers = _base_loss(model, *part)
                (loss / len(parts)).backward()
                answer_loss += of_answers / len(parts)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 40 == 0:
                log(f"  pretraining step {step}/{settings.steps}, loss of the answers {answer_loss:.2f}")
    return model.eval()


def _base_batches(settings: BaseSettings, tokenizer: Any):
    """
    Batches in parts of like length, for nearly half of all tokens would be padding otherwise. A part holds the padded
    ids, and per row how many tokens are prompt and how many there are in all.
    """
    rows = public_rows(settings)[: settings.steps * settings.batch_size]
    prompts = tokenizer([render_prompt(r["instruction"], r["input"], settings.template) for r in rows])["input_ids"]
    answers = tokenizer([r["output"] for r in rows], add_special_tokens=False)["input_ids"]
    examples = [(p, a + [tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]
    for start in range(0, len(examples), settings.batch_size):
        batch = sorted(examples[start : start + settings.batch_size], key=lambda pair: len(pair[0]) + len(pair[1]))
        size = settings.batch_size // 4
        yield [_padded(batch[at : at + size], tokenizer.pad_token_id) for at in range(0, len(batch), size)]


def _padded(examples: list[tuple[list[int], list[int]]], pad: int) -> tuple[Any, Any, Any]:
    import torch

    lengths = torch.tensor([len(p) + len(a) for p, a in examples])
    ids = torch.full((len(examples), int(lengths.max())), pad)
    for row, (p, a) in zip(ids, examples, strict=True):
        row[: len(p) + len(a)] = torch.tensor(p + a)
    return ids, torch.tensor([len(p) for p, _ in examples]), lengths


def _base_loss(model: Any, ids: Any, prompt_lengths: Any, lengths: Any) -> tuple[Any, float]:
    """
    The answers' loss and, with less weight, the prompts', so that the model knows every word from both sides.

    Padding is on the right, where a causal model does not look.
    """
    import torch

    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses = losses.view(len(ids), -1)
    position = torch.arange(1, ids.shape[1])
    in_answer = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    in_prompt = position < prompt_lengths[:, None]
    answer = ((losses * in_answer).sum(1) / in_answer.sum(1)).mean()
    prompt = (losses * in_prompt).sum() / in_prompt.sum()
    return answer + 0.3 * prompt, answer.item()


def base_model(settings: BaseSettings | None = None, cache_dir: str | None = None, log=print) -> tuple[str, float]:
    """
    The folder of the base model and its tokenizer, made now unless the cache holds it.

    Args:
        settings ([`BaseSettings`], *optional*): What to make.
        cache_dir (`str`, *optional*): Defaults to `HF_S3T_CACHE`, else `hf_s3t` in the user's cache folder.
        log (`Callable`, defaults to `print`): Takes each line of progress.

    Returns:
        `tuple[str, float]`: The folder, and the seconds it took to make: 0 if it was there.
    """
    settings = settings or BaseSettings()
    folder = _cache_root(cache_dir) / f"invented-people-{_cache_key(settings)}"
    if (folder / "config.json").is_file():
        return str(folder), 0.0
    started = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed: a cache entry is complete or absent, also with two runs at once.
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        tokenizer = train_tokenizer(settings)
        train_base(settings, tokenizer, log).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return str(folder), time.perf_counter() - started


def _cache_root(cache_dir: str | None) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_dir or os.environ.get("HF_S3T_CACHE") or Path(home) / "hf_s3t").expanduser()


def _cache_key(settings: BaseSettings) -> str:
    """A hash of all that the base depends on: its settings, this file, and the versions of what computes it."""
    import tokenizers
    import torch
    import transformers

    parts = {
        "settings": dataclasses.asdict(settings),
        "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "versions": [platform.python_version(), tokenizers.__version__, torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
