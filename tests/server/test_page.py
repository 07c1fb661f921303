"""
The page in a real browser, at a real server: the whole story clicked through, and what it says when something fails.

`make test-browser` installs what these tests need: playwright, and Debian's Chromium where there is none.
"""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from PIL import Image
from support.served import served_trainer, tiny_system
from support.tiny import (
    IMAGE_SIZE,
    plant_stages,
    rows_for,
    tiny_llama,
    tiny_vit,
    tokenizer_of_words,
)
from transformers import ViTImageProcessor

from hf_s3t import S3TConfig


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_key")]
playwright = pytest.importorskip(
    "playwright.sync_api", reason="The page is tested in a browser, by playwright: `make test-browser`."
)
expect = playwright.expect

CHROMIUM = os.environ.get("HF_S3T_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
# A group whose name would be markup if anything took it for that.
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("There is no Chromium: `make test-browser` installs it.")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server. In the browser's console nothing may be said but that requests failed."""
    contexts, faults = [], []

    def open_page(url, viewport=DESKTOP, **settings):
        context = browser.new_context(viewport=viewport, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: said.type == "error" and faults.append(said.text))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [fault for fault in faults if not fault.startswith("Failed to load resource")]


def trainer_of(path: Path):
    """A trainer of the system of these tests: two shards of three slices, two examples of each of twelve persons."""
    rows = rows_for(tiny_llama(), 24)
    names = [HOSTILE, *(f"user-{n}" for n in range(1, 12))]
    rows = [{**row, "id": f"row-{n}", "person": names[n // 2]} for n, row in enumerate(rows)]
    config = S3TConfig(num_shards=2, num_slices=3, id_column="id", group_column="person")
    return served_trainer(path, rows, config=config)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted") / "tiny-s3t"
    tiny_llama().save_pretrained(path / "base")
    plant_stages(trainer_of(path))
    tokenizer = tokenizer_of_words()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def system(planted, tmp_path):
    return shutil.copytree(planted, tmp_path / planted.name)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


@contextlib.contextmanager
def server(path: Path, port: int | None = None, keys: dict[str, str] | None = None) -> Iterator[str]:
    """`hf-s3t serve`, in a process of its own, until the block ends."""
    port = port or free_port()
    command = [sys.executable, "-m", "hf_s3t", "serve", str(path), "--port", str(port)]
    environment = {**os.environ, **{f"HF_S3T_{scope.upper()}_KEYS": key for scope, key in (keys or {}).items()}}
    with open(path.parent / "server.log", "a") as log:
        process = subprocess.Popen(
            [*command, "--base-model", str(path / "base")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            # It says so when it listens.
            said = process.stdout.readline()
            assert f":{port}" in said, said + (path.parent / "server.log").read_text()[-2000:]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def status_of(url: str, key: str | None = None) -> dict:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx2.get(f"{url}/v1/status", headers=headers).raise_for_status().json()


def drawn(page, kind: str) -> set[str]:
    """The stages that the picture shows as `kind`."""
    return set(page.locator(f".stage.{kind}").evaluate_all("all => all.map(one => one.dataset.stage)"))


def set_of(stage: str) -> tuple[str, frozenset[str]]:
    shard, _, prefix = stage.partition("/")
    return shard, frozenset(prefix.split("-"))


def expect_drawn_as(page, status: dict) -> None:
    """The picture shows what the status says, no more and no less."""
    stages = [stage for shard in status["shards"] for stage in shard["stages"]]
    there = {stage["stage"] for stage in stages}
    serving = {stage["stage"] for stage in stages if stage["is_serving"]}
    # A stage counts by its set of slices, in whatever order.
    sets = {set_of(stage) for stage in there}
    missing = {one for shard in status["shards"] for one in shard["planned"] if set_of(one) not in sets}
    expect(page.locator(".stage.serves")).to_have_count(len(serving))
    expect(page.locator(".stage.missing")).to_have_count(len(missing))
    assert drawn(page, "serves") == serving
    assert drawn(page, "kept") == there - serving
    assert drawn(page, "missing") == missing
    expect(page.locator(".stage.would-go")).to_have_count(0)


def look_for(page, name: str, kind: str = "group") -> None:
    page.locator(f"input[name=kind][value={kind}]").check()
    page.get_by_label("One on each line").fill(name)
    page.get_by_role("button", name="Find, and see what it costs").click()


def ask(page, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#ask-said")).to_have_text("Answered.")


# The story


def test_the_whole_story(system, open_page, tmp_path):
    with server(system) as url:
        page = open_page(url, accept_downloads=True)
        expect(page.get_by_role("status").first).to_have_text("Answers")
        expect(page.get_by_role("heading", level=1)).to_have_text("tiny-s3t")
        before = status_of(url)
        expect_drawn_as(page, before)
        # Without keys no field for one is shown.
        expect(page.locator("#keys")).to_be_hidden()

        ask(page, "w7 w8")
        answers = page.locator(".answer")
        expect(answers).to_have_count(1)
        expect(answers.first).to_contain_text("depths 3, 3")

        look_for(page, "user-2")
        preview = httpx2.post(f"{url}/v1/erasures?dry_run=true", json={"groups": ["user-2"]}).json()
        expect(page.locator("#found")).to_contain_text("2 examples")
        expect(page.locator(".stage.would-go")).to_have_count(len(preview["stages"]))
        assert drawn(page, "would-go") == set(preview["stages"])

        # Whoever thinks better of it changes nothing: by the button, and by Escape.
        page.get_by_role("button", name="Forget 2 examples").click()
        expect(page.get_by_role("dialog")).to_contain_text("Forget 2 examples (user-2)?")
        expect(page.get_by_role("button", name="Keep them")).to_be_focused()
        page.get_by_role("button", name="Keep them").click()
        page.get_by_role("button", name="Forget 2 examples").click()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        assert status_of(url)["deletions"] == 0

        page.get_by_role("button", name="Forget 2 examples").click()
        page.get_by_role("button", name="Forget them").click()
        expect(page.locator(".done")).to_contain_text("2 examples forgotten")
        expect(page.locator("#events")).to_contain_text("went")
        expect(page.locator("#erasure-rows tr")).to_have_count(1)
        expect(page.locator("#erasure-rows")).to_contain_text("done")
        after = status_of(url)
        assert after["deletions"] == 1
        assert set(preview["stages"]).isdisjoint(one["stage"] for shard in after["shards"] for one in shard["stages"])
        expect_drawn_as(page, after)

        page.get_by_role("button", name="Ask again").click()
        expect(answers).to_have_count(2)
        expect(answers.nth(1)).to_contain_text(f"depths {', '.join(map(str, after['depths']))}")
        expect(page.locator("#ask-said")).to_have_text("Answered.")

        page.locator("#forgotten").get_by_role("button", name=re.compile("Receipt")).click()
        expect(page.locator("#receipt")).to_contain_text("Line 1 of the ledger")
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        download.value.save_as(tmp_path / "receipt.json")
        receipt = json.loads((tmp_path / "receipt.json").read_text())
        asked = httpx2.get(f"{url}/v1/erasures/{receipt['id']}").json()
        assert receipt == {name: value for name, value in asked.items() if name != "duplicates"}
        assert "user-2" not in (tmp_path / "receipt.json").read_text()
        page.get_by_role("button", name="Close").click()

        # Another process grows what is missing; the page shows it by itself.
        plant_stages(trainer_of(system), limit=1)
        expect(page.locator("#events")).to_contain_text("has grown")
        expect_drawn_as(page, status_of(url))


def expect_labelled(page, found: dict) -> None:
    """The answer shown is the most probable label, and how sure it is."""
    expect(page.locator("#ask-said")).to_have_text("Answered.")
    expect(page.locator(".answer .text")).to_have_text(found["label"])
    expect(page.locator(".answer")).to_contain_text("sure of 3 labels")


def test_a_classifier_of_texts_says_a_label(tmp_path, open_page):
    system = tiny_system(tmp_path / "texts-s3t", tiny_llama(labels=3))
    with server(system) as url:
        page = open_page(url)
        page.get_by_label("A text to be classified").fill("w7 w8")
        expect(page.locator("#ask-settings")).to_be_hidden()
        page.get_by_role("button", name="Ask", exact=True).click()
        expect_labelled(page, httpx2.post(f"{url}/v1/classify", json={"input": "w7 w8"}).json()["data"][0])


def test_a_classifier_of_images_says_a_label(tmp_path, open_page):
    processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    system = tiny_system(tmp_path / "images-s3t", tiny_vit(), tokenizer=processor)
    image = io.BytesIO()
    Image.new("RGB", (10, 12), "teal").save(image, "PNG")
    with server(system) as url:
        page = open_page(url)
        field = page.get_by_label("An image")
        expect(page.get_by_label("Your question")).to_be_hidden()
        field.set_input_files({"name": "teal.png", "mimeType": "image/png", "buffer": image.getvalue()})
        page.get_by_role("button", name="Ask", exact=True).click()
        sent = f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"
        expect_labelled(page, httpx2.post(f"{url}/v1/classify", json={"images": [sent]}).json()["data"][0])
        expect(page.get_by_alt_text("The image that was asked about")).to_be_visible()


def test_by_the_keyboard_alone(system, open_page):
    with server(system) as url:
        page = open_page(url)
        expect(page.locator(".stage").first).to_be_visible()
        page.keyboard.press("Tab")
        expect(page.get_by_text("Skip to the question")).to_be_focused()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        expect(page.get_by_label("Your question")).to_be_focused()
        page.keyboard.type("w7 w8")
        page.keyboard.press("Enter")
        expect(page.locator("#ask-said")).to_have_text("Answered.")
        names = page.get_by_label("One on each line")
        for _ in range(20):
            if names.evaluate("one => one === document.activeElement"):
                break
            page.keyboard.press("Tab")
        page.keyboard.type("user-3")
        page.keyboard.press("Enter")
        forget = page.get_by_role("button", name="Forget 2 examples")
        expect(forget).to_be_visible()
        for _ in range(6):
            if forget.evaluate("one => one === document.activeElement"):
                break
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Keep them")).to_be_focused()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator(".done")).to_contain_text("2 examples forgotten")


def test_a_request_for_later_waits_and_is_shown_as_waiting(system, open_page):
    with server(system) as url:
        page = open_page(url)
        look_for(page, "row-5", "id")
        page.get_by_role("button", name="Forget 1 example").click()
        page.get_by_label("When").select_option("86400")
        page.get_by_role("button", name="Forget them").click()
        expect(page.locator("#forgotten")).to_contain_text("Until then it still answers")
        expect(page.locator("#erasures-waiting")).to_contain_text("An erasure of 1 example waits")
        expect(page.locator("#erasures")).to_contain_text("waits")
        assert status_of(url)["deletions"] == 0


# What is wrong is said plainly


def test_what_is_not_there_and_what_is_gone_already(system, open_page):
    with server(system) as url:
        page = open_page(url)
        look_for(page, "nobody")
        expect(page.locator("#find-said")).to_contain_text("nobody")
        expect(page.locator("#found")).to_be_hidden()
        httpx2.post(f"{url}/v1/erasures", json={"groups": ["user-4"]}).raise_for_status()
        look_for(page, "user-4")
        expect(page.locator("#find-said")).to_contain_text("nothing is left to forget")


def test_names_are_texts_whatever_they_look_like(system, open_page):
    with server(system) as url:
        page = open_page(url)
        look_for(page, HOSTILE)
        page.locator("#found summary").click()
        expect(page.locator("#found-rows")).to_contain_text(HOSTILE)
        page.get_by_role("button", name="Forget 2 examples").click()
        expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
        assert page.locator("img").count() == 0


def test_keys_are_asked_for_kept_in_the_tab_and_each_is_told_what_it_may(system, open_page):
    keys = {"answer": "key-of-a-client", "erase": "key-of-the-office", "status": "key-of-a-watcher"}
    with server(system, keys=keys) as url:
        page = open_page(url)
        field, use = page.get_by_label("A key of this server"), page.get_by_role("button", name="Use it")
        expect(field).to_be_visible()
        expect(page.get_by_role("status").first).to_have_text("Wants a key")
        ask_button = page.get_by_role("button", name="Ask", exact=True)
        page.get_by_label("Your question").fill("w7")
        ask_button.click()
        expect(page.locator("#ask-said")).to_have_text("The server wants a key to ask.")

        field.fill("a guess that is wrong")
        use.click()
        expect(page.locator("#key-said")).to_have_text("The server does not know this key.")
        assert page.evaluate("() => sessionStorage.length") == 0

        field.fill(keys["answer"])
        use.click()
        expect(page.locator("#key-said")).to_have_text("You may ask with it.")
        expect(field).to_have_value("")
        ask_button.click()
        expect(page.locator("#ask-said")).to_have_text("Answered.")
        expect(page.locator(".stage")).to_have_count(0)
        look_for(page, "user-1")
        expect(page.locator("#find-said")).to_have_text("The server wants a key to forget.")

        field.fill(keys["status"])
        use.click()
        expect(page.locator(".stage").first).to_be_visible()
        expect(page.locator("#erasures-said")).to_contain_text("shows with a key to forget")

        field.fill(keys["erase"])
        use.click()
        expect(page.locator("#key-said")).to_have_text("You may forget, watch with it.")
        look_for(page, "user-1")
        expect(page.get_by_role("button", name="Forget 2 examples")).to_be_visible()
        assert all(key not in page.url and key not in page.locator("body").inner_text() for key in keys.values())
        assert page.evaluate("() => localStorage.length") == 0

        # They outlive a reload of the tab, and no other tab has them.
        page.reload()
        expect(page.locator(".stage").first).to_be_visible()
        expect(open_page(url).get_by_role("status").first).to_have_text("Wants a key")
        for _ in keys:
            page.get_by_role("button", name=re.compile("^Remove")).first.click()
        expect(page.get_by_role("status").first).to_have_text("Wants a key")


def test_an_exhausted_system_says_so_and_comes_back(system, open_page):
    with server(system) as url:
        page = open_page(url)
        asked = [("id", f"row-{n}") for n in range(24)]
        found = httpx2.get(f"{url}/v1/examples", params=asked).json()["data"]
        one_of_each_slice = {(one["shard"], one["slice"]): one["id"] for one in found}
        look_for(page, "\n".join(one_of_each_slice.values()), "id")
        expect(page.locator("#cost .notice")).to_contain_text("Nothing would be left to answer")
        page.get_by_role("button", name="Forget 6 examples").click()
        page.get_by_role("button", name="Forget them").click()
        expect(page.get_by_role("status").first).to_contain_text("Exhausted")
        page.get_by_label("Your question").fill("w7")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator("#ask-said")).to_contain_text("Exhausted: no shard has a stack left")
        expect(page.locator("#ask-said")).to_contain_text("Try again in")
        expect(page.locator(".answer.failed")).to_have_count(1)
        plant_stages(trainer_of(system))
        expect(page.get_by_role("status").first).not_to_contain_text("Exhausted")
        ask(page, "w8")


def test_a_server_that_is_gone_and_one_that_is_back(system, open_page):
    port = free_port()
    with server(system, port) as url:
        page = open_page(url)
        expect(page.get_by_role("status").first).to_have_text("Answers")
        look_for(page, "user-5")
        expect(page.get_by_role("button", name="Forget 2 examples")).to_be_visible()
    expect(page.get_by_role("status").first).to_contain_text("cannot be reached")
    page.get_by_label("Your question").fill("w7")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".answer.failed")).to_contain_text("cannot be reached")
    # Whether it was done is not known; sent again it is the same request.
    page.get_by_role("button", name="Forget 2 examples").click()
    page.get_by_role("button", name="Forget them").click()
    expect(page.locator("#forgotten")).to_contain_text("Whether it was forgotten is not known")
    with server(system, port) as url:
        page.get_by_role("button", name="Send it again").click()
        expect(page.locator(".done")).to_contain_text("2 examples forgotten")
        expect(page.get_by_role("status").first).to_have_text("Answers")
        expect(page.locator("#events")).to_contain_text("the server answers again")
        assert status_of(url)["deletions"] == 1


# For everybody


def overflow(page) -> int:
    return page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_on_a_phone_nothing_is_cut_off_and_everything_is_large_enough_for_a_finger(system, open_page):
    with server(system) as url:
        page = open_page(url, PHONE, has_touch=True, is_mobile=True)
        expect(page.locator(".stage").first).to_be_visible()
        ask(page, "w7 " * 60)
        look_for(page, "user-1")
        page.locator("#found summary").click()
        page.locator("#stage-table summary").click()
        assert overflow(page) == 0
        page.get_by_role("button", name="Forget 2 examples").click()
        assert overflow(page) == 0
        small = "all => all.filter(one => one.offsetHeight && one.offsetHeight < 32).map(one => one.outerHTML)"
        assert (
            page.locator("button, select, textarea, input:not([type=radio], [type=checkbox])").evaluate_all(small)
            == []
        )
        page.get_by_role("button", name="Forget them").click()
        expect(page.locator(".done")).to_be_visible()
        expect(page.locator("#erasures")).to_be_visible()
        page.locator("#forgotten").get_by_role("button").click()
        expect(page.locator("#receipt")).to_be_visible()
        assert overflow(page) == 0


def test_who_wants_no_motion_sees_none(system, open_page):
    with server(system) as url:
        page = open_page(url, reduced_motion="reduce")
        look_for(page, "user-1")
        page.get_by_role("button", name="Forget 2 examples").click()
        page.get_by_role("button", name="Forget them").click()
        gone = page.locator(".stage.gone").first
        expect(gone).to_be_visible()
        assert gone.locator(".ghost").evaluate("one => getComputedStyle(one).animationName") == "none"
        assert page.evaluate("() => document.getAnimations().length") == 0


def test_a_screen_reader_is_told_what_the_picture_shows(system, open_page):
    with server(system) as url:
        page = open_page(url)
        for number in (0, 1):
            picture = page.get_by_role("img", name=re.compile(f"^Shard {number}: depth 3 of 3, .* serves?$"))
            expect(picture).to_be_visible()
        page.locator("#stage-table summary").click()
        expect(page.locator("#stage-rows tr")).to_have_count(2)
        expect(page.get_by_role("log", name="What happened")).to_have_count(1)
        unnamed = "all => all.filter(one => !one.labels?.length && !one.textContent.trim()).map(one => one.outerHTML)"
        assert page.locator("input, select, textarea, button").evaluate_all(unnamed) == []
