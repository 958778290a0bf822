"""`gori init`: one's own conversations split into train, dev and test, and a commented recipe beside them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from gori.artifact import writing
from gori.calls import read_tools
from gori.data import read_conversations
from gori.errors import GoriError

SHARES = (("test", 10), ("dev", 5))
"""Percent of the rows that become test and dev; the rest is for training."""


def write_recipe(directory: Path, files: Sequence[Path], tools: Path | None) -> Path:
    """Write recipe.yaml, and where files are given train.jsonl, dev.jsonl, test.jsonl and tools.json."""
    if directory.exists() and any(directory.iterdir()):
        raise GoriError(f"{directory} is not empty: name a new directory")
    if files and tools is None:
        raise GoriError("--data needs --tools FILE: the functions that the conversations call")
    if tools:
        read_tools(tools)
    parts = _split(files, tools) if files and tools else {}
    text = resources.files("gori").joinpath("starter.yaml").read_text(encoding="utf-8")
    name = json.dumps(directory.resolve().name, ensure_ascii=False)  # a quoted string is YAML too: a name may be 2024
    with writing(directory) as tmp:
        for part, lines in parts.items():
            (tmp / f"{part}.jsonl").write_bytes(b"".join(lines))
        if tools:
            shutil.copyfile(tools, tmp / "tools.json")
        (tmp / "recipe.yaml").write_text(text.replace("NAME", name), encoding="utf-8")
    return directory / "recipe.yaml"


def _split(files: Sequence[Path], tools: Path) -> dict[str, list[bytes]]:
    """Each distinct line goes to one part by its hash, so that a file that grows keeps its old split."""
    functions = read_tools(tools)
    parts: dict[str, list[bytes]] = {"train": [], "dev": [], "test": []}
    seen: set[bytes] = set()
    for path in files:
        read_conversations(path, functions)
        for raw in path.read_bytes().split(b"\n"):
            line = raw.strip()
            if line and line not in seen:
                seen.add(line)
                parts[_part(line)].append(line + b"\n")
    if empty := [name for name, lines in parts.items() if not lines]:
        raise GoriError(f"{len(seen)} rows are too few: {empty[0]} would be empty; give more conversations")
    return parts


def _part(line: bytes) -> str:
    at = int.from_bytes(hashlib.sha256(line).digest()[:4], "big") % 100
    for name, share in SHARES:
        if at < share:
            return name
        at -= share
    return "train"
