"""Token shards: text and conversations as one long row of token ids in files, and fixed-length sequences of them.

Files are mapped, never read whole; which sequence comes when is a pure function of seed, epoch and place. Knows nothing
of training.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from gori.artifact import Manifest, content_hash, make, read_manifest, read_object, sha256_json, write_json
from gori.calls import ASSISTANT, END, Function, read_tools
from gori.data import Example, encode, read_conversation
from gori.errors import GoriError
from gori.tokenizer import FILE, Tokenizer, eos_ids

INDEX = "index.json"
AT_ONCE = 1024
"""Lines that are encoded together."""


def write_tokens(files: Sequence[Path], tokenizer_dir: Path, out: Path, shard_tokens: int) -> bool:
    """Encode text files and JSON Lines (`{"text": …}` or `{"messages": […]}`) into shards in `out`; an end mark follows
    each text. Returns whether anything had to be made.

    A shard is little-endian uint16 where the vocabulary fits it, else uint32. Conversations are checked against the
    tools.json beside the tokenizer. Raises GoriError that names the file and line of what cannot be read.
    """
    tokenizer = Tokenizer.load(tokenizer_dir)
    inputs = {str(path): content_hash(path) for path in files} | {"tokenizer": content_hash(tokenizer_dir / FILE)}
    manifest = Manifest("tokens", out.name, 0, {"shard_tokens": shard_tokens}, inputs)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

    def build(tmp: Path) -> None:
        shards: list[dict[str, Any]] = []
        for ids in _cut(_encoded(files, tokenizer, tokenizer_dir), shard_tokens):
            shards.append({"file": f"tokens-{len(shards):05}.bin", "tokens": len(ids)})
            ids.astype(dtype).tofile(tmp / shards[-1]["file"])
        if not shards:
            raise GoriError(f"{', '.join(map(str, files))}: no text in it, so no tokens")
        total = sum(s["tokens"] for s in shards)
        about = {"dtype": dtype.str, "vocab_size": tokenizer.vocab_size, "tokenizer": inputs["tokenizer"]}
        about |= {"tokens": total, "shards": shards}
        write_json(tmp / INDEX, about)
        manifest.metrics |= {"tokens": total, "shards": len(shards)}

    return make(out, manifest, build)


def _cut(pieces: Iterable[Sequence[int]], size: int) -> Iterator[NDArray[np.int64]]:
    """The pieces as one row, in arrays of `size` ids."""
    held: list[int] = []
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield np.array(held[:size], np.int64)
            del held[:size]
    if held:
        yield np.array(held, np.int64)


def _encoded(files: Sequence[Path], tokenizer: Tokenizer, tokenizer_dir: Path) -> Iterator[list[int]]:
    tools = tokenizer_dir / "tools.json"
    functions = read_tools(tools) if tools.exists() else {}
    end = [tokenizer.id(END) if tokenizer.has(END) else eos_ids(tokenizer_dir)[0]]
    pieces = (piece for path in files for piece in _pieces(path, tokenizer, functions, end))
    while some := list(itertools.islice(pieces, AT_ONCE)):
        texts = iter(tokenizer.encode_many([p for p in some if isinstance(p, str)]))
        yield from (next(texts) if isinstance(p, str) else p for p in some)


def _pieces(
    path: Path, tokenizer: Tokenizer, functions: dict[str, Function], end: list[int]
) -> Iterator[str | list[int]]:
    """What a file holds, line by line: text that is not yet encoded, or ids."""
    try:
        with open(path, "rb") as f:
            yield from _rows(f, path, tokenizer, functions, end) if path.suffix == ".jsonl" else _lines(f, path)
            if path.suffix != ".jsonl" and f.tell():
                yield end
    except OSError as e:
        raise GoriError(f"{path} cannot be read: {e.strerror or e}") from e


def _lines(file: IO[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        yield _text(line, f"{path} line {number}")


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as e:
        raise GoriError(f"{where}: byte 0x{line[e.start]:02x} is not UTF-8: save it as UTF-8") from e


def _rows(
    file: IO[bytes], path: Path, tokenizer: Tokenizer, functions: dict[str, Function], end: list[int]
) -> Iterator[str | list[int]]:
    for number, line in enumerate(file, 1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            body = json.loads(_text(line, where))
        except (ValueError, RecursionError) as e:
            raise GoriError(f"{where}: not JSON ({e})") from e
        if isinstance(body, dict) and isinstance(body.get("text"), str):
            if body["text"]:
                yield body["text"]
                yield end
        elif isinstance(body, dict) and "messages" in body:
            if not tokenizer.has(ASSISTANT):
                raise GoriError(f"{where}: a conversation needs a tokenizer that gori trained: it has no {ASSISTANT}")
            yield encode(read_conversation(line, where, functions), tokenizer).ids
        else:
            raise GoriError(f'{where}: expected {{"text": "…"}} or {{"messages": […]}}')


class Ids(Sequence[int]):
    """A sequence's ids, a view of the mapped file: read, and compared with the vocabulary, when they are used."""

    def __init__(self, view: np.memmap[Any, Any], vocab_size: int) -> None:
        self.view, self._vocab_size = view, vocab_size

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, i: Any) -> Any:
        return np.asarray(self)[i]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if (largest := int(self.view.max())) >= self._vocab_size:
            raise GoriError(
                f"{self.view.filename} holds token {largest}, its vocabulary has {self._vocab_size}: it was changed "
                "after it was written, make the tokens again"
            )
        return np.array(self.view, dtype)


class Tokens:
    """A folder of token shards as sequences of `sequence` tokens to predict, each token a target once an epoch.

    A sequence is `sequence + 1` ids, the first of them the last of the one before: the first id of a shard and what is
    left at its end are no targets. Documents stand side by side, and attention sees across them.
    """

    def __init__(self, directory: Path, sequence: int) -> None:
        """Opens the files; those whose sizes are not the manifest's are refused."""
        manifest, index = read_manifest(directory), read_object(directory / INDEX)
        for name, f in manifest["files"].items():
            if not (directory / name).exists() or (directory / name).stat().st_size != f["bytes"]:
                raise GoriError(f"{directory / name} is not the file that was written: make the tokens again")
        self.directory, self.sequence = directory, sequence
        self.tokenizer: str = index["tokenizer"]
        """SHA-256 of the tokenizer.json that made them."""
        self._vocab_size: int = index["vocab_size"]
        self.identity = sha256_json({name: f["sha256"] for name, f in manifest["files"].items()})
        """The folder's content hash as its manifest states it: terabytes are not read for it."""
        self._shards = [np.memmap(directory / s["file"], index["dtype"], "r") for s in index["shards"]]
        self._firsts = list(itertools.accumulate(((len(s) - 1) // sequence for s in self._shards), initial=0))
        if not len(self):
            longest = max(len(s) for s in self._shards)
            raise GoriError(f"{directory}: its longest shard has {longest} tokens, a sequence needs {sequence + 1}")

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, i: int) -> Example:
        """A sequence as a view of the mapped file; GoriError where its ids are read and exceed the vocabulary."""
        shard = bisect_right(self._firsts, i) - 1
        at = (i - self._firsts[shard]) * self.sequence
        ids = cast("np.memmap[Any, Any]", self._shards[shard][at : at + self.sequence + 1])
        return Example(cast(Any, Ids(ids, self._vocab_size)), cast(Any, np.ones(len(ids), bool)))  # read as lists are

    def steps(self, batch_tokens: int, seed: int, first_step: int) -> Iterator[list[Example]]:
        """Endless steps of at most `batch_tokens` tokens, from `first_step` on; an epoch's last may be smaller."""
        rows = batch_tokens // self.sequence
        if not rows:
            raise GoriError(f"batch_tokens {batch_tokens} holds no sequence of {self.sequence} tokens: raise it")
        for step in itertools.count(first_step):
            epoch, at = divmod(step, -(-len(self) // rows))
            places = range(at * rows, min((at + 1) * rows, len(self)))
            yield [self[shuffled(i, len(self), seed, epoch)] for i in places]


def shuffled(i: int, count: int, seed: int, epoch: int) -> int:
    """Where place `i` of `0..count-1` goes in an epoch's order: a permutation that needs no memory.

    A Feistel network on the next even number of bits, walked until it falls below `count` (Black and Rogaway,
    Ciphers with arbitrary finite domains, 2002, the cycle-walking cipher).
    """
    half = max(1, (count - 1).bit_length() + 1 >> 1)
    mask, keys = (1 << half) - 1, np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64).tolist()
    while True:
        left, right = i >> half, i & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        i = left << half | right
        if i < count:
            return i


def _mixed(x: int) -> int:
    """SplitMix64's finaliser (Steele et al. 2014)."""
    low = (1 << 64) - 1
    x = ((x ^ x >> 30) & low) * 0xBF58476D1CE4E5B9 & low
    x = (x ^ x >> 27) * 0x94D049BB133111EB & low
    return x ^ x >> 31
