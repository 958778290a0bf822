"""The gate before every route: who may ask, from which page, how much; and what of it all is counted.

A server on a loopback address is open to every page of every browser on the machine, so a request has to name a
loopback host (no DNS rebinding) and, if a page sent it, a page of this server. Pure ASGI; knows nothing of models.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from gori.runtime.serve_metrics import CLOSED, Metrics
from gori.runtime.serve_refusal import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/healthz")
"""What needs no key: the page holds nothing secret and asks for the key itself."""
COUNTED = ("/", "/healthz", "/metrics", "/v1/models", "/v1/chat/completions")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name(url: str) -> str:
    """The host in a URL, empty where there is none that can be read."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


class Gate:
    """Wraps the application; see the head of this file. `key` None: everyone may ask."""

    def __init__(self, app: App, metrics: Metrics, key: str | None, local: bool, body_limit: int) -> None:
        self.app, self.metrics, self.local, self.body_limit = app, metrics, local, body_limit
        self.key = key.encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLOSED

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, counted)
        except Refusal as e:
            await refuse(e, counted)
        finally:
            path = scope["path"]
            self.metrics.request(path if path in COUNTED else "other", status)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.local and not is_loopback(_name(f"//{host}")):
            raise Refusal(
                f"the host {host[:80]!r} is not this machine: ask localhost or a loopback address", status=403
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            raise Refusal(f"a page of {origin[:80]!r} may not ask this server", status=403)
        if self.key is not None and scope["path"] not in OPEN_PATHS:
            self._authorize(headers.get(b"authorization", b""))
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.body_limit:
            raise too_large(self.body_limit)

    def _authorize(self, given: bytes) -> None:
        scheme, _, key = given.partition(b" ")
        assert self.key is not None
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.key):
            wanted = "this server needs its API key in the header Authorization: Bearer KEY"
            raise Refusal(wanted, status=401, headers={"WWW-Authenticate": "Bearer"})


def too_large(limit: int) -> Refusal:
    return Refusal(f"the body is larger than {limit} bytes: send less, or raise --body-limit", status=413)


async def refuse(e: Refusal, send: Send) -> None:
    """Send a refusal's body."""
    body = json.dumps(e.body, ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **e.headers}
    encoded = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": e.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
