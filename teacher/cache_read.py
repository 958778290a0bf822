"""Reading a cache: an epoch's rows with what the teacher said of them, each shard checked against its seal.

Needs no teacher and no torch. Knows nothing of training.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from gori import console
from gori.artifact import read_manifest, read_object, sha256_file
from gori.data import Example
from gori.errors import GoriError
from gori.teacher.cache_file import Shard, check

INDEX = "index.json"


class CachedRows:
    """A finished cache."""

    def __init__(self, directory: Path) -> None:
        self.directory, manifest = Path(directory), read_manifest(directory)
        if manifest["stage"] != "cache":
            raise GoriError(f"{directory} holds stage {manifest['stage']}, expected a cache: `gori teacher cache`")
        if self.content != manifest["files"].get(INDEX, {}).get("sha256"):
            raise GoriError(f"{self.directory / INDEX} was changed after it was written: copy the cache again")
        self._index = read_object(self.directory / INDEX)
        self._settings = self._index["settings"]
        self._epoch: tuple[int, Sequence[Example]] = (-1, ())

    @property
    def content(self) -> str:
        """What identifies the cache: the hash of its index, which holds every shard's."""
        return sha256_file(self.directory / INDEX)

    @property
    def tail(self) -> bool:
        """Whether what the weights of a token lack to 1 is the mass of all other tokens (method topk)."""
        return self._settings["method"] == "topk"

    @property
    def hard(self) -> bool:
        """Whether the rows' answers are what the teacher wrote, and no distribution."""
        return self._settings["tokenizers"] == "sequence"

    @property
    def rows_per_epoch(self) -> int:
        return max(s["rows"][1] for s in self._index["shards"])

    def setting(self, name: str) -> Any:
        """What the cache was made with, as a recipe's `distill` names it: tokenizers, swap_values, temperature, …"""
        return self._settings[name]

    def check(
        self,
        *,
        teacher: str | None = None,
        tokenizer: str | None = None,
        train: str | None = None,
        temperature: float | None = None,
        max_position: int | None = None,
    ) -> None:
        """Refuse a cache that does not belong to what a recipe has; what is None is not looked at.

        `teacher`, `tokenizer`, `train`: content hashes. Another training file is no error and said on stderr."""
        for name, wanted in {"teacher": teacher, "tokenizer": tokenizer}.items():
            if wanted is not None and self._index[name] != wanted:
                raise GoriError(
                    f"the cache {self.directory} is of another {name} ({self._index[name][:12]}, here {wanted[:12]}): "
                    "make the cache again, or name the one that belongs to it"
                )
        if temperature is not None and temperature != self.setting("temperature"):
            raise GoriError(
                f"the cache {self.directory} was made at temperature {self.setting('temperature')}, and "
                f"distill.temperature is {temperature}: set it to the cache's, or make a cache at yours"
            )
        longest = max(s["longest"] for s in self._index["shards"])
        if max_position is not None and longest > max_position:
            raise GoriError(
                f"the cache {self.directory} has a row of {longest} tokens, and student.max_position is "
                f"{max_position}: raise it to {longest}, or make a cache for it"
            )
        if train is not None and train != self._index["train"]:
            console.log(f"the cache {self.directory} is of another training file: its rows are used, not data.train's")

    def epoch(self, number: int) -> Sequence[Example]:
        """The rows of a training's epoch; the cached epochs follow each other in turn. Kept until another is read."""
        number %= self._settings["epochs"]
        if self._epoch[0] != number:
            shards = [self._shard(s) for s in self._index["shards"] if s["epoch"] == number]
            self._epoch = (number, Joined(shards))
        return self._epoch[1]

    def _shard(self, entry: dict[str, Any]) -> Shard:
        path = self.directory / entry["file"]
        try:
            check(path, entry)
        except GoriError as e:
            first, end = entry["rows"]
            raise GoriError(f"{e} (rows {first}..{end - 1} of epoch {entry['epoch']})") from e
        return Shard(path)


class Joined(Sequence[Example]):
    """Shards one after the other."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards, self._ends = shards, list(accumulate(len(s) for s in shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = bisect_right(self._ends, i)
        return self._shards[shard][i - (self._ends[shard - 1] if shard else 0)]
