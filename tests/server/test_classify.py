"""Classification over HTTP: each text or image gets what the model says of it alone."""

import base64
import io

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from support.preferences import pairs, preference_trainer, tokenizer
from support.served import serving, tiny_system
from support.tiny import IMAGE_SIZE, PAD, s3t_config, tiny_bert, tiny_llama, tiny_vit
from transformers import ViTImageProcessor


TEXTS = ["w7 w8 w9", "w10", "w11 w12 w13 w14 w15", "w20 w21"]


@pytest.mark.parametrize("make", [tiny_bert, lambda: tiny_llama(labels=3)], ids=["bert", "llama"])
def test_texts_of_all_lengths_together_get_what_they_get_alone(tmp_path, make):
    with serving(tiny_system(tmp_path / "system", make(), config=s3t_config(num_shards=2))) as (url, service):
        answer = httpx2.post(f"{url}/v1/classify", json={"model": "system", "input": TEXTS}).json()
        for text, found in zip(TEXTS, answer["data"], strict=True):
            with torch.no_grad():
                alone = service.model(input_ids=torch.tensor([service.processor(text)["input_ids"]])).logits[0]
            assert found["probs"] == pytest.approx(alone.softmax(-1).tolist(), abs=1e-5)
            assert found["label"] == f"LABEL_{alone.argmax().item()}" and found["num_classes"] == 3
            assert "score" not in found
        assert answer["usage"]["prompt_tokens"] == 11 and PAD == 0
        one = httpx2.post(f"{url}/v1/classify", json={"input": TEXTS[0]}).json()["data"]
        assert one[0]["probs"] == pytest.approx(answer["data"][0]["probs"], abs=1e-5)
        for body, status in (
            ({}, 422), ({"input": []}, 422), ({"input": ""}, 422), ({"images": ["x"]}, 422), ({"input": 3}, 422),
            ({"input": "w7 " * 300}, 422), ({"model": "other", "input": "w7"}, 404),
        ):  # fmt: skip
            assert httpx2.post(f"{url}/v1/classify", json=body).status_code == status, body
        refused = httpx2.post(f"{url}/v1/completions", json={"prompt": "w7"})
        assert refused.status_code == 404 and "/v1/classify" in refused.json()["error"]["message"]


def test_an_ensemble_of_rewards_gives_the_mean_of_its_members_scores(tmp_path):
    path = tmp_path / "system"
    tiny_llama(2, labels=1).save_pretrained(path / "base")
    trainer = preference_trainer("reward", path, pairs(), arguments={"learning_rate": 0.1})
    trainer.train()
    answers = [f"{row['prompt']}{row[name]} </s>" for row in pairs(3) for name in ("chosen", "rejected")]
    with serving(path, tokenizer()) as (url, _):
        found = httpx2.post(f"{url}/v1/classify", json={"input": answers}).json()["data"]
    for text, one in zip(answers, found, strict=True):
        inputs = tokenizer()(text, return_tensors="pt")
        with torch.no_grad():
            told = trainer.s3t_model(**inputs).logits[0]
        assert one["score"] == pytest.approx(told.item(), abs=1e-5) and one["num_classes"] == 1
        assert one["probs"] == pytest.approx(told.sigmoid().tolist(), abs=1e-5)
    # Pairs are two inputs, of which the better one is told by its score.
    assert len({one["score"] for one in found}) == 6


def url_of(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.slow
def test_images_get_what_they_get_alone(tmp_path):
    processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (10, 12, 3), dtype=np.uint8)) for _ in range(3)]
    system = tiny_system(tmp_path / "system", tiny_vit(), tokenizer=processor, config=s3t_config(num_shards=2))
    with serving(system, processor) as (url, service):
        body = {"model": "system", "images": [url_of(image) for image in images]}
        answer = httpx2.post(f"{url}/v1/classify", json=body).json()
        for image, found in zip(images, answer["data"], strict=True):
            with torch.no_grad():
                alone = service.model(**processor(images=[image], return_tensors="pt")).logits[0]
            assert found["probs"] == pytest.approx(alone.softmax(-1).tolist(), abs=1e-5)
        same = httpx2.post(f"{url}/v1/classify", json={"input": url_of(images[0])}).json()["data"]
        assert same[0]["probs"] == pytest.approx(answer["data"][0]["probs"], abs=1e-5)
        broken = [
            "w7", "data:image/png;base64,***", "data:image/png;base64,AAAA", url_of(images[0])[:-40],
            url_of(Image.new("1", (8_000, 8_000))), url_of(Image.new("1", (1, 500))), url_of(images[0], "TIFF"),
        ]  # fmt: skip
        for one in broken:
            refused = httpx2.post(f"{url}/v1/classify", json={"images": [one]})
            assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_image")
        many = httpx2.post(f"{url}/v1/classify", json={"images": [url_of(Image.new("1", (6_000, 6_000)))] * 2})
        assert many.status_code == 422 and "pixels" in many.json()["error"]["message"]
