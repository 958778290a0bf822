"""Load on `gori serve`: many clients at once, proper requests among garbage, half-open and aborted connections.

    python benchmarks/serve_load.py demo/export/executorch --clients 64 --seconds 60

starts a server of its own, or give the URL of one that runs. Exit 1 where a proper request was not answered (429 is an
answer: the queue is bounded), anything else was not refused as it should be, or something of it was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SAID = ("조수석 창문 반만 열어줘", "take me to Central Park", "하늘이 왜 파래?", "운전석 열선 2단계", "play some jazz")
WAIT_S = 30.0
"""An answer that takes longer counts as none."""
KINDS = ("plain",) * 6 + ("stream",) * 3 + ("garbage", "binary", "deep", "unknown", "large", "no http", "half open")
KINDS += ("half body", "abort", "abort stream", "flood")
EXPECTED = {"garbage": 400, "binary": 400, "deep": 400, "unknown": 400, "large": 413, "no http": 400}


class Load:
    """Clients of one server, and what became of their requests."""

    def __init__(self, url: str, seed: int) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.host, self.port, self.seed = parts.hostname, parts.port, seed
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.latencies_ms: list[float] = []
        self.wrong: list[str] = []
        self.rss_mib: list[float] = []

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def request(self, body: bytes, length: int | None = None) -> bytes:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n".encode() + body

    async def exchange(self, raw: bytes) -> tuple[int, bytes]:
        """Status and body of one request; the server closes the connection after it."""
        async with self.connection() as (reader, writer):
            with contextlib.suppress(ConnectionError):  # it may refuse a body before it has read it
                writer.write(raw)
                await writer.drain()
            with contextlib.suppress(ConnectionResetError):
                answer = await asyncio.wait_for(_read_all(reader), WAIT_S)
        head, _, body = answer.partition(b"\r\n\r\n")
        return (int(head.split()[1]) if head else 0), body

    async def client(self, number: int, until: float) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while time.monotonic() < until:
            kind = rng.choice(KINDS)
            try:
                outcome = await getattr(self, f"_{kind.replace(' ', '_')}")(rng)
            except (OSError, asyncio.TimeoutError, ValueError, KeyError, AssertionError) as e:
                outcome = f"{type(e).__name__}: {e}"[:160]
                self.wrong.append(f"{kind}: {outcome}")
            if kind in EXPECTED and outcome != str(EXPECTED[kind]):
                self.wrong.append(f"{kind}: {outcome}, expected {EXPECTED[kind]}")
            self.outcomes[kind, outcome] += 1

    # --- proper requests ---

    async def _plain(self, rng: random.Random, stream: bool = False) -> str:
        body = {"messages": [{"role": "user", "content": rng.choice(SAID)}], "stream": stream}
        began = time.monotonic()
        status, answer = await self.exchange(self.request(json.dumps(body).encode()))
        if status == 429:
            await asyncio.sleep(rng.uniform(0.0, 0.2))
            return "429"
        assert status == 200, f"status {status}: {answer[:200]!r}"
        self.latencies_ms.append((time.monotonic() - began) * 1e3)
        if stream:
            assert b"data: [DONE]" in answer, f"a stream without an end: {answer[-200:]!r}"
        else:
            assert json.loads(answer)["choices"][0]["finish_reason"] in ("stop", "tool_calls")
        return "200"

    async def _stream(self, rng: random.Random) -> str:
        return await self._plain(rng, stream=True)

    # --- what has to be refused ---

    async def _garbage(self, rng: random.Random) -> str:
        return await self._refused(
            rng.choice([b"{", b"[1,2", b"null", b'{"messages": 5}', b"\xff\xfe{}", b'"\\ud800"'])
        )

    async def _binary(self, rng: random.Random) -> str:
        return await self._refused(rng.randbytes(rng.randint(1, 5000)))

    async def _deep(self, rng: random.Random) -> str:
        return await self._refused(b"[" * rng.randint(5_000, 200_000))

    async def _unknown(self, rng: random.Random) -> str:
        return await self._refused(b'{"messages": [{"role": "user", "content": "hi"}], "magic": 1}')

    async def _large(self, rng: random.Random) -> str:
        return await self._refused(b" " * (1 << 21))

    async def _refused(self, body: bytes) -> str:
        status, answer = await self.exchange(self.request(body))
        if answer:
            assert json.loads(answer)["error"]["message"], answer[:200]
        return str(status)

    async def _no_http(self, rng: random.Random) -> str:
        status, _ = await self.exchange(rng.randbytes(20) + b"\r\n\r\n")
        return str(status)

    # --- connections that are not what they should be ---

    async def _half_open(self, rng: random.Random) -> str:
        async with self.connection() as (_, writer):
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x"[: rng.randint(0, 40)])
            await asyncio.sleep(rng.uniform(0.1, 2.0))
        return "left"

    async def _half_body(self, rng: random.Random) -> str:
        async with self.connection() as (_, writer):
            writer.write(self.request(b'{"messages": [', 5000))
            await writer.drain()
            await asyncio.sleep(rng.uniform(0.0, 0.5))
        return "left"

    async def _abort(self, rng: random.Random, stream: bool = False) -> str:
        """A whole request whose client resets the connection before the answer."""
        body = {"messages": [{"role": "user", "content": rng.choice(SAID)}], "stream": stream}
        async with self.connection() as (_, writer):
            writer.write(self.request(json.dumps(body).encode()))
            await writer.drain()
            await asyncio.sleep(rng.uniform(0.0, 0.03))
            writer.transport.abort()
        return "left"

    async def _abort_stream(self, rng: random.Random) -> str:
        return await self._abort(rng, stream=True)

    async def _flood(self, rng: random.Random) -> str:
        """Connections that are opened and closed at once."""
        for _ in range(20):
            async with self.connection():
                pass
        return "left"

    # --- the server's own figures ---

    async def metrics(self) -> dict[str, float]:
        head = f"GET /metrics HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n\r\n"
        _, text = await self.exchange(head.encode())
        return {n: float(v) for n, v in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text.decode(), re.MULTILINE)}

    async def watch(self, until: float) -> None:
        while time.monotonic() < until:
            self.rss_mib.append((await self.metrics())["process_resident_memory_bytes"] / (1 << 20))
            await asyncio.sleep(1.0)

    async def run(self, clients: int, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        await asyncio.gather(self.watch(until), *(self.client(i, until) for i in range(clients)))
        await asyncio.sleep(1.0)
        left = await self.metrics()
        self.rss_mib.append(left["process_resident_memory_bytes"] / (1 << 20))
        if left["gori_queue_waiting"] or left["gori_sessions_busy"]:
            self.wrong.append("requests that nobody waits for are still waiting or being answered")
        if failed := {k: v for k, v in left.items() if re.search(r'status="5', k)}:
            self.wrong.append(f"the server counted errors of its own: {failed}")
        return self.summary(seconds)

    def summary(self, seconds: float) -> dict[str, Any]:
        table: dict[str, dict[str, int]] = {}
        for (kind, outcome), n in sorted(self.outcomes.items()):
            table.setdefault(kind, {})[outcome] = n
        ordered = sorted(self.latencies_ms) or [0.0]
        return {
            "seconds": seconds,
            "requests": sum(self.outcomes.values()),
            "answered": len(self.latencies_ms),
            "answered_per_second": round(len(self.latencies_ms) / seconds, 1),
            "p50_ms": round(ordered[len(ordered) // 2], 1),
            "p99_ms": round(ordered[int(len(ordered) * 0.99)], 1),
            "rss_mib": [round(r, 1) for r in self.rss_mib],
            "outcomes": table,
            "wrong": self.wrong[:20],
            "wrong_count": len(self.wrong),
        }


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    """Everything until the end, also where a reset follows what was received."""
    out = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := await reader.read(1 << 16):
            out += piece
    return bytes(out)


@contextlib.contextmanager
def served(artifact: Path, more: list[str]) -> Iterator[tuple[str, int]]:
    """A server of an artifact: its URL and process."""
    command = [sys.executable, "-m", "gori", "serve", str(artifact), "--port", "0", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            sys.exit("the server did not start")
        yield url, process.pid
    finally:
        process.terminate()
        code = process.wait(60)
    if code:
        sys.exit(f"the server ended with {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="an artifact, or the URL of a server")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--queue", default="16", help="of a server of its own")
    parser.add_argument("--sessions", default="1", help="of a server of its own")
    a = parser.parse_args()
    if a.what.startswith("http://"):
        body = asyncio.run(Load(a.what, a.seed).run(a.clients, a.seconds))
    else:
        with served(Path(a.what), ["--queue", a.queue, "--sessions", a.sessions]) as (url, pid):
            files = Path(f"/proc/{pid}/fd")
            asyncio.run(Load(url, a.seed).metrics())  # its event loop has files of its own, which it has opened now
            before = len(list(files.iterdir())) if files.exists() else None
            body = asyncio.run(Load(url, a.seed).run(a.clients, a.seconds))
            time.sleep(1.0)
            body["open_files"] = [before, len(list(files.iterdir()))] if before is not None else None
    print(json.dumps(body, ensure_ascii=False, indent=1))
    sys.exit(1 if body["wrong_count"] else 0)


if __name__ == "__main__":
    main()
