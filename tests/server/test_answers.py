"""Answers as clients get them: each what it would get alone, whatever ran beside it, streamed or not."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
import torch
from support.plain_peft import naive_ensemble, naive_member
from support.served import serving, tiny_system
from support.tiny import lm_rows, s3t_config, tiny_llama, tokenizer_of_words

from hf_s3t.server.problems import Problem
from hf_s3t.server.prompts import Prompts
from hf_s3t.server.schemas import Message


TEMPLATE = "{% for m in messages %}{{ m['role'] == 'user' and 'w5 ' or 'w6 ' }}{{ m['content'] }} {% endfor %}w7"
PROMPTS = ["w7 w8", "w30 w31 w32 w33 w34 w35", "w9", "w40 w41 w42", "w11 w12", "w50", "w20 w21 w22 w23", "w13 w14"]


def tokenizer():
    made = tokenizer_of_words()
    made.add_special_tokens({"eos_token": "</s>"})
    made.chat_template = TEMPLATE
    return made


def facts():
    return [{**row, "labels": [-100] * 4 + row["input_ids"][4:]} for row in lm_rows(24)]


SYSTEMS = {
    "one shard": dict(),
    "five shards": dict(config=s3t_config(num_shards=5, partition="balanced")),
    "gated": dict(
        config=s3t_config(num_shards=3, partition="balanced", gate="terms", gate_top_k=1, gate_temperature=0.1),
        rows=facts(),
        processing_class=tokenizer_of_words(),
    ),
}


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            path = tmp_path_factory.mktemp("served") / "system"
            made[name] = tiny_system(path, tokenizer=tokenizer(), **SYSTEMS[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def served(systems):
    with serving(systems("five shards"), tokenizer()) as (url, service):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), service, url


def text_alone(service, prompt: str, max_tokens: int) -> str:
    """What `model.generate` makes of one prompt, and how it is written after it."""
    inputs = service.processor(prompt, return_tensors="pt")
    ids = service.model.generate(
        **{name: inputs[name] for name in ("input_ids", "attention_mask")},
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    decode = service.processor.decode
    return decode(ids[0], skip_special_tokens=True)[len(decode(inputs["input_ids"][0], skip_special_tokens=True)) :]


@pytest.mark.parametrize("name", SYSTEMS)
def test_clients_at_once_each_get_what_they_would_get_alone(systems, name):
    lengths = [3, 9, 1, 12, 5, 7, 2, 8]
    with serving(systems(name), tokenizer(), batch_wait=0.5) as (url, service), ThreadPoolExecutor(8) as pool:
        sizes = []
        service.metrics.batch = sizes.append
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask(prompt, length):
            return client.completions.create(model="system", prompt=prompt, max_tokens=length, temperature=0)

        answers = list(pool.map(ask, PROMPTS, lengths))
        for prompt, length, answer in zip(PROMPTS, lengths, answers):
            assert answer.choices[0].text == text_alone(service, prompt, length)
            assert answer.usage.prompt_tokens == len(prompt.split())
    # They did run together.
    assert max(sizes) > 1 and sum(sizes) == 8


def test_several_prompts_as_texts_or_tokens_are_answered_in_their_order(served):
    client, service, _ = served
    texts = [text_alone(service, prompt, 4) for prompt in PROMPTS]
    tokens = [service.processor(prompt)["input_ids"] for prompt in PROMPTS]
    for prompt in (PROMPTS, tokens):
        answer = client.completions.create(model="system", prompt=prompt, max_tokens=4, temperature=0, n=2)
        assert [choice.text for choice in answer.choices] == [text for text in texts for _ in range(2)]
        assert [choice.index for choice in answer.choices] == list(range(16))
        assert answer.usage.completion_tokens <= 16 * 4
    (choice,) = client.completions.create(model="system", prompt=tokens[0], max_tokens=4, temperature=0).choices
    assert choice.text == texts[0]


def streamed(stream):
    """The texts, finish reasons and number of chunks of each choice of a stream."""
    texts, reasons = {}, {}
    for chunk in stream:
        for choice in chunk.choices:
            piece = choice.text if hasattr(choice, "text") else choice.delta.content
            texts.setdefault(choice.index, []).append(piece or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return {i: "".join(pieces) for i, pieces in texts.items()}, reasons, {i: len(p) for i, p in texts.items()}


def test_a_stream_says_what_the_answer_says_piece_by_piece(served):
    client, _, _ = served
    asked = dict(model="system", prompt=PROMPTS[:3], max_tokens=9, temperature=0)
    whole = client.completions.create(**asked)
    texts, reasons, pieces = streamed(client.completions.create(**asked, stream=True))
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert min(pieces.values()) > 3


def test_a_stream_ends_with_what_it_cost_if_that_is_asked(served):
    client, _, _ = served
    asked = dict(model="system", prompt=PROMPTS[0], max_tokens=5, temperature=0)
    *others, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == client.completions.create(**asked).usage
    assert all(chunk.usage is None for chunk in others)


def test_a_chat_is_answered_as_its_template_writes_it(served):
    client, service, _ = served
    messages = [
        {"role": "developer", "content": "w9"},
        {"role": "user", "content": [{"type": "text", "text": "w10 "}, {"type": "text", "text": "w11"}]},
    ]
    expected = text_alone(service, "w6 w9 w5 w10 w11 w7", 6)
    asked = dict(model="system", messages=messages, max_completion_tokens=6, temperature=0)
    answer = client.chat.completions.create(**asked, user="somebody", store=False)
    assert answer.choices[0].message.content == expected and answer.usage.prompt_tokens == 6
    first, *_ = chunks = list(client.chat.completions.create(**asked, stream=True))
    assert first.choices[0].delta.role == "assistant" and streamed(chunks)[0] == {0: expected}


def test_an_answer_ends_before_a_stop_string_also_in_a_stream(served):
    client, service, _ = served
    whole = text_alone(service, PROMPTS[0], 12)
    words = whole.split()
    # Over the borders of tokens.
    stop = f"{words[2][-1]} {words[3]} {words[4][:2]}"
    expected = whole[: whole.index(stop)]
    asked = dict(model="system", prompt=PROMPTS[0], max_tokens=12, temperature=0, stop=stop)
    (choice,) = client.completions.create(**asked).choices
    assert (choice.text, choice.finish_reason) == (expected, "stop")
    assert streamed(client.completions.create(**asked, stream=True))[:2] == ({0: expected}, {0: "stop"})


def test_the_end_of_a_text_is_told_and_not_shown(served):
    client, _, _ = served
    # Bias makes the end certain.
    asked = dict(model="system", prompt="w7", max_tokens=5, temperature=0, logit_bias={"2": 100})
    (choice,) = client.completions.create(**asked).choices
    assert (choice.text, choice.finish_reason) == ("", "stop")
    asked = dict(model="system", prompt="w7", max_tokens=5, temperature=0, logit_bias={"2": -100})
    assert client.completions.create(**asked).choices[0].finish_reason == "length"


def test_a_seed_makes_what_is_drawn_the_same_again_whatever_was_drawn_before(served):
    client, _, _ = served
    asked = dict(model="system", prompt="w7 w8", max_tokens=8, temperature=1.5, n=3)

    def texts(**more):
        return [choice.text for choice in client.completions.create(**asked, **more).choices]

    first = texts(seed=7)
    assert len(set(first)) == 3
    unseeded = [texts(), texts()]
    assert texts(seed=7) == first and texts(seed=8) != first
    # What a seeded request drew does not show in what others draw after it.
    assert unseeded[0] != unseeded[1] and texts() != first and texts() != texts()


def test_logprobs_are_those_of_the_naive_ensemble(served, systems):
    client, service, _ = served
    path = systems("five shards")
    serving_now = service.model._calls.routing.served
    members = [[naive_member(tiny_llama(), path, tip.shard, tip.prefix) for tip in tips] for tips in serving_now]
    asked = dict(model="system", prompt="w7 w8 w9", max_tokens=5, temperature=0, logit_bias={"2": -100})
    found = client.completions.create(**asked, logprobs=3).choices[0]
    ids = service.processor("w7 w8 w9" + found.text)["input_ids"]
    inputs = {"input_ids": torch.tensor([ids])}
    expected = naive_ensemble(members, service.model.aggregation, inputs)[0, 2:-1].log_softmax(-1)
    assert found.logprobs.tokens == found.text.split()
    chosen = expected.gather(1, torch.tensor(ids[3:])[:, None])[:, 0]
    assert found.logprobs.token_logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
    assert [len(top) for top in found.logprobs.top_logprobs] == [3] * 5
    best = [max(top.values()) for top in found.logprobs.top_logprobs]
    assert best == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
    assert [found.text[start : start + 1] for start in found.logprobs.text_offset] == [" "] * 5
    chat = client.chat.completions.create(
        model="system", messages=[{"role": "user", "content": "w8"}], max_tokens=4, temperature=0,
        logprobs=True, top_logprobs=2, stream=True,
    )  # fmt: skip
    told = [
        entry for chunk in chat for choice in chunk.choices if choice.logprobs for entry in choice.logprobs.content
    ]
    assert 0 < len(told) <= 4 and all(len(entry.top_logprobs) == 2 for entry in told)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in told)


def test_penalties_change_scores_as_they_are_defined(served):
    client, service, _ = served
    asked = dict(model="system", prompt="w7 w8", max_tokens=12, temperature=0, logit_bias={"2": -100})
    tokens = client.completions.create(**asked, presence_penalty=2.0, frequency_penalty=2.0).choices[0].text.split()
    expected, ids = [], service.processor("w7 w8")["input_ids"]
    for _ in range(12):
        logits = service.model(input_ids=torch.tensor([ids])).logits[0, -1].clone()
        for token in set(expected):
            logits[token] -= 2.0 + 2.0 * expected.count(token)
        logits[2] -= 100
        expected.append(logits.argmax().item())
        ids = [*ids, expected[-1]]
    assert tokens == service.processor.decode(expected).split()


REFUSED = {
    "another model": ({"model": "other"}, 404, "model_not_found"),
    "no prompt": ({"prompt": None}, 422, None),
    "empty prompt": ({"prompt": ""}, 422, "empty_prompt"),
    "unknown token": ({"prompt": [999]}, 422, "unknown_token"),
    "unknown field": ({"guided_regex": ".*"}, 422, "extra_forbidden"),
    "best of": ({"best_of": 3}, 422, None),
    "too hot": ({"temperature": 3}, 422, None),
    "too many tokens": ({"max_tokens": 10**6}, 422, "max_tokens"),
    "no room": ({"max_tokens": 127, "prompt": "w7 w8"}, 422, "context_length_exceeded"),
    "long prompt": ({"prompt": "w7 " * 200}, 422, "context_length_exceeded"),
    "unknown bias": ({"logit_bias": {"999": 1}}, 422, "unknown_token"),
    "half of a character": ({"prompt": ["w7", "\ud800"]}, 422, None),
    "too many choices": ({"prompt": ["w7"] * 3, "n": 64}, 422, "value_error"),
    "no penalty": ({"repetition_penalty": 1e-320}, 422, None),
    "bias of words": ({"logit_bias": {"w7": 1}}, 422, "logit_bias"),
    "options without stream": ({"stream_options": {"include_usage": True}}, 422, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_with_what_is_wrong(served, name):
    _, _, url = served
    changes, status, code = REFUSED[name]
    body = {"model": "system", "prompt": "w7", "max_tokens": 2, "temperature": 0, **changes}
    headers = {"Content-Type": "application/json"}
    answer = httpx2.post(f"{url}/v1/completions", content=json.dumps(body), headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert code in (None, error["code"]) and error["message"].endswith(".")


@pytest.mark.parametrize("body", ["", "{", "[]", "3", '{"prompt": NaN}', '{"prompt": "w7", "stop": [""]}', "\xff"])
def test_a_malformed_body_is_422_and_not_repeated(served, body):
    _, _, url = served
    headers = {"Content-Type": "application/json"}
    answer = httpx2.post(f"{url}/v1/completions", content=body.encode("latin-1"), headers=headers)
    assert answer.status_code == 422 and set(answer.json()) == {"error"}


def test_fields_of_clients_that_change_nothing_are_taken(served):
    _, _, url = served
    body = {"prompt": "w7", "max_tokens": 2, "user": "u", "best_of": 1, "echo": False, "suffix": None, "tools": None}
    assert httpx2.post(f"{url}/v1/completions", json=body).status_code == 200


def test_the_coldest_temperature_is_no_error_and_next_to_greedy(served):
    _, _, url = served
    texts = [
        httpx2.post(f"{url}/v1/completions", json={"prompt": "w7", "max_tokens": 3, "temperature": temperature}).json()
        for temperature in (0, 1e-320)
    ]
    assert texts[0]["choices"] == texts[1]["choices"]


def test_without_a_chat_template_the_way_out_is_told(systems):
    with serving(systems("one shard")) as (url, _):
        body = {"messages": [{"role": "user", "content": "w7"}]}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 422 and "`/v1/completions`" in answer.json()["error"]["message"]
        assert httpx2.post(f"{url}/v1/classify", json={"input": "w7"}).status_code == 404


def test_what_a_template_refuses_is_told(served):
    _, service, _ = served
    strict = tokenizer_of_words()
    strict.chat_template = "{{ raise_exception('Roles must alternate') }}"
    prompts = Prompts(service.model, strict, service.settings)
    with pytest.raises(Problem, match="Roles must alternate") as refused:
        prompts.of_chat([Message(role="user", content="w7")])
    assert refused.value.status == 422


def test_the_description_names_every_route_and_its_key(served):
    _, _, url = served
    described = httpx2.get(f"{url}/openapi.json").json()
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/classify"} <= set(described["paths"])
    needs_key = {
        path for path, methods in described["paths"].items() if all("security" in m for m in methods.values())
    }
    assert {path for path in described["paths"] if path.startswith("/v1/")} | {"/metrics"} == needs_key
    assert "bearer" in json.dumps(described["components"]["securitySchemes"])
