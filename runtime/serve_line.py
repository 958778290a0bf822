"""The line before the sessions: questions wait in order, a worker thread answers each, the event loop never does.

A session answers one question at a time, so there are as many threads as sessions. What is no longer wanted, because
its client went away or its time ran out, is taken out of the line, or ends at the next token. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gori.runtime.caller import MOST, Caller
from gori.runtime.constrain import PromptError
from gori.runtime.generate import Pick, picker
from gori.runtime.serve_refusal import Refusal
from gori.runtime.serve_reply import Stopper, Timed
from gori.runtime.serve_request import Model, Request

Event = str | Timed | Exception
"""A piece of the answer's text; the whole answer, the last event; or why there is none, the last event too."""


class Job:
    """One question on its way. Made and read on the event loop; `wanted` and `emit` are for the worker's thread too."""

    def __init__(self, asked: Request) -> None:
        self.asked = asked
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.running = False
        self._loop = asyncio.get_running_loop()
        self._dropped = threading.Event()
        self._entered = time.monotonic()
        self.queue_ms = 0.0

    def drop(self) -> None:
        """Nobody waits for the answer any more."""
        self._dropped.set()

    @property
    def wanted(self) -> bool:
        return not self._dropped.is_set()

    def start(self) -> None:
        self.running, self.queue_ms = True, (time.monotonic() - self._entered) * 1e3

    def emit(self, event: Event) -> None:
        """Hand an event to the event loop."""
        if self.wanted:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Line:
    """Sessions, and who waits for them."""

    def __init__(
        self, callers: Sequence[Caller], most_waiting: int, name: str | None = None, words: bool = False
    ) -> None:
        first = callers[0]
        functions = first.functions if first.speaks_calls else {}
        longest = max(map(len, first.tokenizer.pieces))
        name = name or first.directory.resolve().name
        self.model = Model(name, functions, words or not functions, first.session.info.context * longest)
        self.callers, self.most_waiting = callers, most_waiting
        self._idle = list(callers)
        self._waiting: list[Job] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(len(callers), "answer")
        self._mean_s = 0.05

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> int:
        return len(self.callers) - len(self._idle)

    def enter(self, asked: Request) -> Job:
        """Put a question into the line; Refusal 429 where it is full."""
        if not self._idle and len(self._waiting) >= self.most_waiting:
            seconds = max(1, math.ceil(self._mean_s * len(self._waiting) / len(self.callers)))
            raise Refusal(
                f"{len(self._waiting)} requests wait already, which is as many as may: try again in {seconds} s",
                status=429,
                headers={"Retry-After": str(seconds)},
            )
        job = Job(asked)
        self._waiting.append(job)
        self._next()
        return job

    def leave(self, job: Job) -> None:
        """The job's answer is not wanted any more, or was given."""
        job.drop()
        if job in self._waiting:
            self._waiting.remove(job)

    def close(self) -> None:
        """Wait until the threads have ended."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _next(self) -> None:
        while self._idle and self._waiting:
            caller, job = self._idle.pop(), self._waiting.pop(0)
            job.start()
            self._pool.submit(self._run, caller, job, asyncio.get_running_loop())

    def _run(self, caller: Caller, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        began = time.monotonic()
        try:
            job.emit(answer(caller, job.asked, self.model, job))
        except Exception as e:
            job.emit(e)
        finally:
            loop.call_soon_threadsafe(self._ended, caller, time.monotonic() - began)

    def _ended(self, caller: Caller, took_s: float) -> None:
        self._mean_s += 0.1 * (took_s - self._mean_s)
        self._idle.append(caller)
        self._next()


def open_callers(path: Path, sessions: int, threads: int | None) -> list[Caller]:
    """So many sessions of one artifact, each warm: grammar read, one answer given."""
    callers = [Caller.open(path, threads) for _ in range(sessions)]
    for c in callers:
        c.call("hello", constrained=c.speaks_calls, most=2)
    return callers


def answer(caller: Caller, asked: Request, model: Model, job: Job) -> Timed:
    """Answer one question; its pieces are emitted as they are said where it is to be streamed."""
    words, stopper, shown = asked.form == "words", Stopper(asked.stop), []

    def on_text(piece: str) -> None:
        if words:
            piece = stopper.push(piece)
            piece = piece if shown else piece.lstrip()  # a word begins with the space before it
            if piece:
                shown.append(piece)
        if piece and asked.stream:
            job.emit(piece)

    try:
        found = caller.answer(
            asked.turns,
            constrained=not words,
            most=asked.most_tokens or MOST,
            pick=_pick(asked, caller, model),
            on_text=on_text,
            cancelled=lambda: stopper.found or not job.wanted,
            only=asked.only,
            must_call=asked.must_call,
            most_calls=asked.most_calls,
        )
    except PromptError as e:
        raise Refusal(str(e), "messages", code="context_length_exceeded") from e
    if words:
        if (rest := stopper.close()) and asked.stream:
            job.emit(rest)
        found.text = "".join(shown) + rest
    return Timed(found, job.queue_ms, caller.session.info.engine, stopper.found)


def _pick(asked: Request, caller: Caller, model: Model) -> Pick:
    """The likeliest token, or a sampled one; where a model of calls is to use words, of tokens that are text."""
    seed = None
    if asked.temperature > 0:
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
    pick = picker(seed, asked.temperature, top_p=asked.top_p)
    if asked.form != "words" or not model.functions:
        return pick
    text = np.array([bool(p) for p in caller.tokenizer.pieces])
    text[caller.ends] = True
    return lambda logits: pick(np.where(text, logits, -np.inf))
