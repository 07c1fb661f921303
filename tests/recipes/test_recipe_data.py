"""The demo's data: nothing private reaches the tokenizer or the base, the sets are as described, the prompts exact."""

import pytest
from common.chats import chat_template
from common.prompts import PROMPT_TEMPLATES, render_prompt
from demo import invented_people as demo
from demo.small_llama import BaseSettings, base_rows, cache_folder, train_tokenizer


SMALL = BaseSettings(steps=40, batch_size=32)


def text_of(rows):
    return "\n".join(f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows)


def private_parts(*seeds):
    return {part for seed in seeds for p in demo.make_people(8, seed, private=True) for part in p.name.split()}


@pytest.fixture(scope="module")
def public():
    return base_rows(BaseSettings()) + demo.kind_rows()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SMALL)


def test_base_corpus_names_no_private_person(public):
    corpus = text_of(public)
    assert not [part for part in private_parts(0, 1, 2, 3, 4) if part in corpus]


def test_a_planted_private_fact_would_be_found(public):
    (person, *_) = demo.make_people(8, 0, private=True)
    planted = text_of([*public, demo.fact_rows(person)[0]])
    assert [part for part in private_parts(0) if part in planted] == [
        part for part in private_parts(0) if part in person.name.split()
    ]


def test_base_corpus_holds_no_private_question(public):
    asked = {row["instruction"] for row in public}
    assert asked.isdisjoint(row["instruction"] for row in demo.private_dataset())
    assert asked.isdisjoint(row["instruction"] for row in demo.held_out_rows(64, 48))


def test_tokenizer_has_no_token_for_a_private_name_and_spells_anything(tokenizer):
    assert private_parts(0, 1, 2).isdisjoint(token.lstrip("Ġ") for token in tokenizer.get_vocab())
    for text in ("Żółć, 東京 🦔\n\t<odd>", demo.make_people(1, 0, private=True)[0].name):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_prompt_is_a_token_prefix_of_prompt_and_answer(tokenizer):
    for row in demo.private_dataset():
        prompt = render_prompt(row["instruction"], row["input"], "alpaca-short")
        ids = tokenizer(prompt)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer(prompt + row["output"])["input_ids"][: len(ids)] == ids


def test_worlds_share_no_name_whatever_the_seed():
    public_parts = {part for s in range(20) for p in demo.make_people(20, s, private=False) for part in p.name.split()}
    assert public_parts.isdisjoint(private_parts(*range(20)))
    assert all(demo.is_private_part(part) for part in private_parts(*range(20)))


def test_data_is_a_function_of_its_arguments():
    assert demo.private_dataset(8, 64, 3) == demo.private_dataset(8, 64, 3)
    assert demo.private_dataset(8, 64, 3) != demo.private_dataset(8, 64, 4)
    assert base_rows(SMALL) == base_rows(SMALL)


def test_groups_are_people_and_single_general_rows():
    rows = demo.private_dataset(8, 64)
    people = {person.name: person for person in demo.make_people(8, 0, private=True)}
    assert len({row["id"] for row in rows}) == len(rows) == 8 * len(demo.ATTRIBUTES) + 64
    for name, person in people.items():
        mine = [row for row in rows if row["person"] == name]
        assert sorted(row["output"] for row in mine) == sorted(person.facts.values())
    others = [row["person"] for row in rows if row["person"] not in people]
    assert len(set(others)) == len(others) == 64


def test_held_out_rows_are_new_and_of_the_same_tasks():
    trained = {(row["instruction"], row["input"]) for row in demo.general_rows(64, 0)}
    held_out = [(row["instruction"], row["input"]) for row in demo.held_out_rows(64, 48)]
    assert len(held_out) == len(set(held_out)) == 48
    assert trained.isdisjoint(held_out)


def test_control_people_are_private_and_never_trained_on():
    trained = private_parts(0)
    control = demo.strangers(8, 20)
    assert len(control) == 20
    for person in control:
        assert trained.isdisjoint(person.name.split())
        assert all(demo.is_private_part(part) for part in person.name.split())


def test_alpaca_prompts_are_the_published_ones():
    assert render_prompt("Add.", "2 and 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n"
    )
    assert render_prompt("Greet.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\n"
    )
    assert render_prompt("Greet.", template="alpaca-short") == "### Instruction:\nGreet.\n\n### Response:\n"
    with pytest.raises(ValueError, match="alpaca-short"):
        render_prompt("Greet.", template="vicuna")


def test_a_base_of_other_settings_is_kept_elsewhere(tmp_path):
    kept = cache_folder(SMALL, str(tmp_path))
    assert kept.parent == tmp_path
    assert kept == cache_folder(BaseSettings(steps=40, batch_size=32), str(tmp_path))
    assert kept != cache_folder(BaseSettings(steps=41, batch_size=32), str(tmp_path))


@pytest.mark.parametrize("template", PROMPT_TEMPLATES)
def test_a_question_in_a_chat_is_the_prompt_that_was_trained_on(tokenizer, template):
    rendered_by = chat_template(template)

    def render(*contents):
        roles = ("user", "assistant")
        chat = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
        return tokenizer.apply_chat_template(
            chat, chat_template=rendered_by, tokenize=False, add_generation_prompt=True
        )

    first = render_prompt('Say "it\'s".', template=template)
    assert render('Say "it\'s".') == f"<s>{first}"
    later = render_prompt("And now?", template="alpaca-short")
    assert render('Say "it\'s".', "It's.", "And now?") == f"<s>{first}It's.</s>{later}"
