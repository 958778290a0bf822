"""Where a chat template is found, and that every format that carries one takes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gori.errors import GoriError
from gori.export.template import read_template

NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]


def folder(out: Path, found: object, own: str = "") -> Path:
    (out / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    if own:
        (out / "chat_template.jinja").write_text(own)
    return out


@pytest.mark.parametrize(("found", "want"), [("text", "text"), (None, ""), (NAMED, "plain")])
def test_a_template_is_a_text_or_the_default_of_several(found: object, want: str, tmp_path: Path) -> None:
    assert read_template(folder(tmp_path, found)) == want


def test_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    assert read_template(folder(tmp_path, NAMED, own="jinja")) == "jinja"


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert read_template(tmp_path) == ""


@pytest.mark.parametrize(
    ("found", "message"),
    [(NAMED[:1], "chat templates tool_use, and none is 'default': save"), ([], "of none"), (7, "is a int, not a text")],
)
def test_what_is_no_template_is_refused_and_not_dropped(found: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(GoriError, match=message):
        read_template(folder(tmp_path, found))
