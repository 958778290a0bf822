"""The HTTP server under `gori serve`: uvicorn with limits on connections that it has none for, and a stop of our own.

A connection that sends no whole request is closed after a while, whatever it drips, and there are never more
connections than the process has file descriptors for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gori.errors import GoriError, one_line
from gori.runtime.serve_gate import App

IDLE_S = 10.0
"""A connection may be without a request in progress for so long, from its start and between requests."""
SPARE_FILES = 64
MOST_CONNECTIONS = 1024


def most_connections() -> int:
    """As many as the limit of open files leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MOST_CONNECTIONS, soft - SPARE_FILES))


class Connection(H11Protocol):
    """uvicorn's connection, closed where no request is in progress for `idle_s`; one too many is closed at once."""

    idle_s = IDLE_S
    most = MOST_CONNECTIONS
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.in_request:
            self._end_wait()
        elif self._timer is None:
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.in_request and self._timer is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    @property
    def in_request(self) -> bool:
        """A request's head has come whole and its response has not gone out whole."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.idle_s, self._close)

    def _end_wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._timer = None
        if not self.in_request and not self.transport.is_closing():
            self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn's server, which SIGTERM and SIGINT end with exit 0 after all that was accepted is answered; a second
    one ends it at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _stop(self, number: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on `host`; port 0 lets the system choose. GoriError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        out = socket.socket(family, kind, protocol)
        try:
            out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            out.bind(address)
            out.listen(1024)
        except OSError:
            out.close()
            raise
    except OSError as e:
        raise GoriError(f"cannot listen on {host} port {port} ({one_line(e)}): choose another --host or --port") from e
    return out


def url_of(bound: socket.socket) -> str:
    """The address that a browser on this machine opens."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def http_server(app: App, timeout_s: float) -> HttpServer:
    """A server that is ready to run: `server.run(sockets=[listen(...)])`."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a client's bad HTTP is not worth a line each
    Connection.most = most_connections()
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        loop="asyncio",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=int(IDLE_S),
        timeout_graceful_shutdown=int(timeout_s) + 5,
        h11_max_incomplete_event_size=32 << 10,
        proxy_headers=False,
    )
    return HttpServer(config)
