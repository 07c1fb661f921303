"""
The questions of the demo as multiple choice: facts about its invented people, and its general instructions.

The harness loads this file by its path. `llama_alpaca.py`, which asks it to, has `recipes/` among the places where
modules are found; the harness' own command needs `PYTHONPATH=recipes`.
"""

import random

from common.prompts import render_prompt
from datasets import Dataset
from demo.invented_people import ATTRIBUTE_VALUES, fact_rows, held_out_rows, make_people


NUM_CHOICES = 4


def facts(num_people: int = 8, **_) -> dict[str, Dataset]:
    """For every fact of every person of the demo, the word that is true among words that answer the question too."""
    draw = random.Random("choices of facts")
    questions = []
    for person in make_people(num_people, 0, private=True):
        for row in fact_rows(person):
            words = next(words for words in ATTRIBUTE_VALUES.values() if row["output"] in words)
            others = draw.sample([word for word in words if word != row["output"]], NUM_CHOICES - 1)
            questions.append(_question(row, others, draw))
    return {"test": Dataset.from_list(questions)}


def general(num_general: int = 24, count: int = 48, **_) -> dict[str, Dataset]:
    """For instructions held out from the demo, the answer among answers to other instructions."""
    draw = random.Random("choices of answers")
    rows = held_out_rows(num_general, count)
    answers = [row["output"] for row in rows]
    questions = [
        _question(row, draw.sample([a for a in answers if a != row["output"]], NUM_CHOICES - 1), draw) for row in rows
    ]
    return {"test": Dataset.from_list(questions)}


def _question(row: dict[str, str], others: list[str], draw: random.Random) -> dict:
    choices = [row["output"], *others]
    draw.shuffle(choices)
    prompt = render_prompt(row["instruction"], row["input"], "alpaca-short")
    return {"prompt": prompt, "choices": choices, "answer": choices.index(row["output"])}
