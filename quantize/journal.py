"""A sweep's journal: one JSON object a line, appended under a lock and flushed to the disk before anything goes on.

Knows keys and events, not what a candidate is. Safe against a kill at any byte (a torn last line is mended by whoever
appends next) and against several processes that write into one file; the journal alone says what is finished.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gori.artifact import os_errors, utc_now
from gori.errors import GoriError

JOURNAL = "journal.jsonl"
FINISHED = ("done", "failed")
Event = dict[str, Any]


@dataclass
class State:
    """What a journal says, event after event."""

    started: dict[str, int] = field(default_factory=dict)
    """Key → how often somebody began with it (more than once where a process was killed)."""
    finished: dict[str, Event] = field(default_factory=dict)
    """Key → its `done` or `failed` event."""
    speeds: dict[str, list[Event]] = field(default_factory=dict)
    """Key → its `speed` events."""

    def take(self, event: Event) -> None:
        """Account for one event. `retry` makes a failed candidate open again."""
        key, kind = event["key"], event["event"]
        if kind == "started":
            self.started[key] = self.started.get(key, 0) + 1
        elif kind in FINISHED:
            self.finished.setdefault(key, event)
        elif kind == "retry":
            self.finished.pop(key, None)
        elif kind == "speed":
            self.speeds.setdefault(key, []).append(event)


class Journal:
    """The journal of a directory; `state` is what it said when it was last read."""

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / JOURNAL
        self.state = State()
        self._read = 0
        """Bytes that `state` accounts for: always whole lines."""

    def refresh(self) -> State:
        """Read what others have appended since."""
        if self.path.exists():
            with self._locked() as file:
                self._take_new(file)
        return self.state

    def append(self, kind: str, key: str, **more: Any) -> bool:
        """Write an event, unless it would finish a finished candidate or reopen one that did not fail; returns whether
        it was written. On return it is on the disk."""
        event = {"event": kind, "key": key, "at": utc_now(), **more}
        with self._locked() as file:
            _mend(file, self.path)
            self._take_new(file)
            before = self.state.finished.get(key)
            if kind in FINISHED and before:
                return False
            if kind == "retry" and (before is None or before["event"] != "failed"):
                return False
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._take_new(file)
        return True

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        with os_errors(self.path):
            new = not self.path.exists()
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if new:
                    _flush_directory(self.path.parent)
                yield file

    def _take_new(self, file: BinaryIO) -> None:
        """Account for every whole line after what was read; a torn last one waits until it is mended."""
        file.seek(self._read)
        text = file.read()
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            self.state.take(_parsed(line, self.path, self._read))
            self._read += len(line)


def _parsed(line: bytes, path: Path, at: int) -> Event:
    try:
        event = json.loads(line)
    except ValueError as e:
        raise GoriError(
            f"{path} byte {at} holds a line that is not JSON, which gori never leaves in the middle: restore the file, "
            "or remove that line and what it finished is run again"
        ) from e
    if not isinstance(event, Mapping) or not {"event", "key"} <= set(event):
        raise GoriError(f"{path} byte {at} holds a line without event and key: it is not a journal of gori's")
    return dict(event)


def _mend(file: BinaryIO, path: Path) -> None:
    """End a last line that its writer could not: give a whole object its newline, cut off the beginning of one."""
    file.seek(0)
    text = file.read()
    torn = text[text.rfind(b"\n") + 1 :]
    if not torn:
        return
    try:
        _parsed(torn, path, len(text) - len(torn))
    except GoriError:
        file.truncate(len(text) - len(torn))
    else:
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
    file.flush()


def _flush_directory(directory: Path) -> None:
    """Make a new file's name as lasting as its content."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def held(lock: Path, *, wait: bool, shared: bool = False) -> Iterator[bool]:
    """Hold a lock file for as long as the block runs; yields whether it was got (always, with `wait`).

    The kernel lets go of it when its holder dies, however it dies.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    with open(lock, "a") as handle:
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            yield False
        else:
            yield True
