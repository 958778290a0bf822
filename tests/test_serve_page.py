"""The page of `gori serve` in headless Chromium: an utterance in, its call, cost and alternatives out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from gori.runtime.caller import Caller
from serving import ask, serving, write_student

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-dev-shm-usage --virtual-time-budget=10000"
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    return write_student(tmp_path_factory.mktemp("page") / "toy", toy_tokenizer)


def shown(url: str, profile: Path) -> str:
    """The page's document after its script has run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def inside(dom: str, tag: str, name: str) -> str:
    """The text of the element with this id."""
    found = re.search(rf'<{tag} id="{name}"[^>]*>(.*?)</{tag}>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return html.unescape(re.sub(r"<[^>]+>", " ", found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("said", ["서울역 가자", "take me to <b>Pier 39</b>"])
def test_the_page_shows_the_call_its_cost_and_the_alternatives(said: str, student: Path, tmp_path: Path) -> None:
    answer = Caller.open(student).call(said)
    with serving(student) as url:
        dom = shown(f"{url}/#{quote(said)}", tmp_path)
    calls = json.loads(inside(dom, "pre", "call"))
    assert calls == [{"name": c.name, "arguments": dict(c.arguments)} for c in answer.calls or []]
    facts = inside(dom, "dl", "facts")
    assert f"{answer.prompt_tokens} + {len(answer.ids)}" in facts
    assert re.search(r"\d+\.\d ms", facts)
    rows = re.findall(r'<td class="name">([^<]+)', dom)
    assert [r.split(" ")[0] for r in rows] == [n for n, _ in answer.alternatives]
    assert "3 functions" in inside(dom, "span", "model")
    assert '<div id="error" role="alert" hidden=""></div>' in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_page_asks_for_the_key_where_one_is_needed(student: Path, tmp_path: Path) -> None:
    with serving(student, key="sesame") as url:
        dom = shown(f"{url}/#hi", tmp_path)
    assert "needs its API key" in inside(dom, "div", "error")
    assert 'id="key"' in dom
    assert "hidden" not in re.search(r'<input id="key"[^>]*>', dom)[0]  # type: ignore[index]


def test_the_page_loads_nothing_from_elsewhere(student: Path) -> None:
    with serving(student) as url:
        status, headers, text = ask(url, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(r"https?://|//[a-z]+\.", re.sub(r"//  ?[^\n]*", "", text))
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
