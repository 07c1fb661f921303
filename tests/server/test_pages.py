"""The files of the page at `/`: sent as they are, guarded by their headers, with nothing from elsewhere in them."""

import re
from pathlib import Path

import pytest


pytest.importorskip("fastapi", reason="the server needs the extra serve")

from fastapi import FastAPI
from fastapi.testclient import TestClient

import hf_s3t.server.pages as pages


FOLDER = Path(pages.__file__).parent / "page"
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(pages.routes())
    return TestClient(app)


def address(file: Path) -> str:
    return "/" if file.name == "index.html" else f"/page/{file.name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_file_is_sent_as_it_is_to_whoever_asks(client, file):
    answer = client.get(address(file))
    assert answer.status_code == 200
    assert answer.content == file.read_bytes()
    kind = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}[file.suffix]
    assert answer.headers["content-type"].startswith(kind)
    head = client.head(address(file))
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_that_the_browser_has_is_not_sent_again(client, file):
    tag = client.get(address(file)).headers["etag"]
    again = client.get(address(file), headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get(address(file), headers={"If-None-Match": '"another"'}).status_code == 200


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_from_elsewhere_is_loaded_run_or_framed(client, file):
    headers = client.get(address(file)).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert (
        policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    )
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_names_no_other_place(file):
    """Names of formats (`http://www.w3.org/2000/svg`) are no places."""
    places = re.findall(r"https?://[^\s\"']+", file.read_text(encoding="utf-8"))
    assert set(places) <= {"http://www.w3.org/2000/svg"}


def test_every_path_is_relative_so_that_a_proxy_may_put_the_page_anywhere():
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    linked = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert set(linked) == {"page/icon.svg", "page/page.css", "page/page.js"}
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert not re.findall(r"""["'`]/(?:v1|page)/""", text), script.name
        for name in re.findall(r'from "\./([^"]+)"', text):
            assert (FOLDER / name).is_file(), f"{script.name} imports {name}"


def test_what_comes_from_elsewhere_never_becomes_markup_or_code():
    """The headers forbid it too: this says at once where."""
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            script
        )
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]* src=)", html)


def test_keys_are_kept_in_the_tab_alone():
    texts = "".join(script.read_text(encoding="utf-8") for script in SCRIPTS)
    assert "sessionStorage" in texts
    assert not re.search(r"localStorage|document\.cookie|indexedDB", texts)


def test_every_field_has_a_label_and_every_name_is_there():
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    fields = re.findall(r"<(?:input|textarea|select)\b[^>]*\bid=\"([^\"]+)\"", html)
    assert len(fields) > 5
    for field in fields:
        inside = re.search(rf'<label[^>]*>(?:(?!</label>).)*\bid="{field}"', html, re.DOTALL)
        assert f'for="{field}"' in html or inside, field
    named = {
        name for script in SCRIPTS for name in re.findall(r'byId\("([^"]+)"\)', script.read_text(encoding="utf-8"))
    }
    pointed = {
        name for names in re.findall(r'aria-(?:labelledby|describedby)="([^"]+)"', html) for name in names.split()
    }
    assert named | pointed <= set(ids)


def luminance(colour: str) -> float:
    """The relative luminance of a colour, as WCAG 2.2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# What stands on what: a text and its background, both by their names in the stylesheet.
TEXTS = (
    *((text, back) for text in ("ink", "faint") for back in ("card", "back")),
    *(("on-accent", "accent"), ("accent", "card"), ("ink", "tint"), ("card", "bad"), ("bad", "card"), ("bad", "back")),
    *((kind, f"{kind}-tint") for kind in ("good", "fair", "bad")),
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_it_stands_on(scheme):
    """4.5 to 1, which WCAG 2.2 asks for texts of any size."""
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    roots = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", roots[["light", "dark"].index(scheme)]))
    for text, back in TEXTS:
        darker, lighter = sorted((luminance(colours[text]), luminance(colours[back])))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, f"{text} on {back}"


def test_the_page_is_no_part_of_the_description_of_the_api(client):
    assert client.get("/openapi.json").json()["paths"] == {}
