"""The routes of `gori serve`: OpenAI's chat completions over the line of sessions, models, health, metrics, the page.

Nothing here computes: an answer is made by a thread of the line (serve_line.py), the event loop only carries pieces.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gori.errors import GoriError
from gori.runtime.serve_gate import App, Gate, too_large
from gori.runtime.serve_line import Job, Line
from gori.runtime.serve_metrics import CLOSED, Metrics
from gori.runtime.serve_refusal import Refusal
from gori.runtime.serve_reply import Chunks, Head, Timed, completion
from gori.runtime.serve_request import read_request

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
PAGE_HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


Pieces = AsyncGenerator[str | Timed, None]
"""Of one answer: pieces of its text, then the whole."""


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    timeout_s: float = 30.0
    """From its first byte to its last: reading it, waiting and answering together."""
    body_bytes: int = 1 << 20


class Gone(Exception):  # noqa: N818 (nothing failed)
    """The client went away."""


class Server:
    """The routes over one line."""

    def __init__(self, line: Line, limits: Limits) -> None:
        self.line, self.limits, self.metrics = line, limits, Metrics()
        self.started = int(time.time())
        page = resources.files("gori.runtime").joinpath("page.html")
        self.page = page.read_text(encoding="utf-8")

    # --- what is served ---

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        deadline = time.monotonic() + self.limits.timeout_s
        asked = read_request(await self._body(request, deadline), self.line.model)
        began = time.monotonic()
        job = self.line.enter(asked)
        events = self._events(job, request, deadline, began)
        head = Head(self.line.model.name)
        if asked.stream:
            first = await anext(events)  # so that a refusal still has a status of its own
            chunks = Chunks(head, asked, self.line.model.functions)
            return StreamingResponse(_sse(chunks, first, events), media_type="text/event-stream", headers=NO_STORE)
        async with contextlib.aclosing(events):
            timed = await anext(events)
        assert isinstance(timed, Timed)
        return JSONResponse(completion(head, asked, timed), headers=NO_STORE)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.line.model.name:
            message = f"the model {name[:80]!r} does not exist here: this server has {self.line.model.name!r}"
            raise Refusal(message, "model", status=404, code="model_not_found")
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.line.model.name})

    async def show_metrics(self, request: Request) -> Response:
        text = self.metrics.text(self.line.waiting, self.line.busy, len(self.line.callers))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def show_page(self, request: Request) -> Response:
        return HTMLResponse(self.page, headers=PAGE_HEADERS)

    def _model(self) -> dict[str, Any]:
        info = self.line.callers[0].session.info
        own = {
            "engine": info.engine,
            "engine_version": info.engine_version,
            "context": info.context,
            "file_bytes": info.file_bytes,
            "functions": list(self.line.model.functions),
        }
        name = self.line.model.name
        return {"id": name, "object": "model", "created": self.started, "owned_by": "gori", "gori": own}

    # --- how it is carried ---

    async def _body(self, request: Request, deadline: float) -> bytes:
        """The body, held to its limits of size, time and form."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(f"the content type is {kind[:80]!r}, expected application/json", status=415)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal("a compressed body is not read: send plain JSON", status=415)
        try:
            return await asyncio.wait_for(self._read(request), deadline - time.monotonic())
        except (asyncio.TimeoutError, TimeoutError) as e:
            message = f"the body did not arrive within {self.limits.timeout_s:g} s"
            raise Refusal(message, status=408, headers={"Connection": "close"}) from e
        except ClientDisconnect as e:
            raise Gone from e

    async def _read(self, request: Request) -> bytes:
        out = bytearray()
        async for piece in request.stream():
            out += piece
            if len(out) > self.limits.body_bytes:
                raise too_large(self.limits.body_bytes)
        return bytes(out)

    async def _events(self, job: Job, request: Request, deadline: float, began: float) -> Pieces:
        """Pieces of text, then the whole answer; Refusal where there is none, Gone where nobody listens any more."""
        gone = asyncio.create_task(_gone(request))
        try:
            while True:
                event = await self._event(job, gone, deadline)
                if isinstance(event, Timed):
                    self.metrics.answered(event, time.monotonic() - began)
                yield event
                if isinstance(event, Timed):
                    return
        finally:
            gone.cancel()
            self.line.leave(job)

    async def _event(self, job: Job, gone: asyncio.Task[None], deadline: float) -> str | Timed:
        coming = asyncio.create_task(job.events.get())
        try:
            wait_s = max(0.0, deadline - time.monotonic())
            await asyncio.wait({coming, gone}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            coming.cancel()
        if coming.done() and not coming.cancelled():
            event = coming.result()
            if isinstance(event, Exception):
                raise event
            return event
        if gone.done():
            raise Gone
        did = "was not answered in full" if job.running else "waited, and was not begun,"
        message = f"the request {did} within {self.limits.timeout_s:g} s: try again later, or raise --timeout"
        raise Refusal(message, status=504 if job.running else 503, code="timeout", headers={"Retry-After": "1"})


NO_STORE = {"Cache-Control": "no-store"}


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection; the body was read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _sse(chunks: Chunks, first: str | Timed, events: Pieces) -> AsyncIterator[str]:
    """Server-sent events of a whole answer; an error after the first of them is an event too, which clients raise."""
    for body in chunks.open():
        yield _data(body)
    event: str | Timed | None = first
    try:
        while event is not None:
            for body in chunks.close(event) if isinstance(event, Timed) else chunks.text(event):
                yield _data(body)
            event = await anext(events, None)
        yield "data: [DONE]\n\n"
    except GoriError as e:
        yield _data(_refusal(e).body)
    except Gone:
        pass
    finally:
        await events.aclose()


def _data(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _refusal(e: GoriError) -> Refusal:
    """The engine's own failure is the server's, whatever was asked."""
    return e if isinstance(e, Refusal) else Refusal(str(e), status=500)


async def _refused(request: Request, e: Exception) -> Response:
    assert isinstance(e, GoriError)
    r = _refusal(e)
    return JSONResponse(r.body, r.status, headers=r.headers)


async def _no_route(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    what = f"{request.method} {request.url.path[:80]}"
    said = "there is no such route" if e.status_code == 404 else str(e.detail)
    return await _refused(request, Refusal(f"{what}: {said}", status=e.status_code, headers=dict(e.headers or {})))


async def _left(request: Request, e: Exception) -> Response:
    return Response(status_code=CLOSED)


async def _failed(request: Request, e: Exception) -> Response:
    """A defect of ours: its traceback goes to the server's log, not to the client."""
    return JSONResponse(Refusal("the server failed on this request; its log says why", status=500).body, 500)


def application(line: Line, limits: Limits, key: str | None = None, local: bool = True) -> App:
    """The ASGI application. `local`: it listens on a loopback address, and no other host's name may be asked for."""
    server = Server(line, limits)
    routes = [
        Route("/", server.show_page),
        Route("/healthz", server.health),
        Route("/metrics", server.show_metrics),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.one_model),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {GoriError: _refused, HTTPException: _no_route, Gone: _left, Exception: _failed}

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        line.close()

    inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return Gate(inner, server.metrics, key, local, limits.body_bytes)
