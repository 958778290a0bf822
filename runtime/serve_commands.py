"""`gori serve`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import click

from gori import console
from gori.errors import GoriError, MissingEngine
from gori.options import json_option

SIZES = {"": 1, "b": 1, "kb": 1 << 10, "kib": 1 << 10, "mb": 1 << 20, "mib": 1 << 20}


class Bytes(click.ParamType):
    """A number of bytes, as in 65536, 64KB or 1MB (of 1024)."""

    name = "bytes"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d{1,12})\s*([a-z]*)", str(value).lower())
        if not found or found[2] not in SIZES or int(found[1]) == 0:
            self.fail(f"{value!r} is no size: write a number of bytes, as in 65536, 64KB or 1MB", param, ctx)
        return int(found[1]) * SIZES[found[2]]


@click.command(epilog="Example: gori serve demo/export/executorch --port 8080  ·  then open http://127.0.0.1:8080")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 picks a free one and prints it."
)
@click.option("--name", help="The model's name in requests; default: the artifact's folder.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with the API key; or GORI_API_KEY.")
@click.option("--insecure", is_flag=True, help="Listen on other than loopback addresses without an API key.")
@click.option("--queue", type=click.IntRange(1), default=16, show_default=True, help="Requests that may wait.")
@click.option("--body-limit", type=Bytes(), default="1MB", show_default=True, help="Most bytes of a request's body.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(0.1, 3600), default=30, show_default=True,
    help="Seconds that one request may take, waiting included.",
)  # fmt: skip
@click.option("--sessions", type=click.IntRange(1, 64), default=1, show_default=True, help="Answers made at once.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: the engine's choice.")
@click.option("--words", is_flag=True, help="The model was trained to answer in words too, where nothing is called.")
@json_option
def serve(
    artifact: Path,
    host: str,
    port: int,
    name: str | None,
    api_key_file: Path | None,
    insecure: bool,
    queue: int,
    body_limit: int,
    timeout_s: float,
    sessions: int,
    threads: int | None,
    words: bool,
    as_json: bool,
) -> None:
    """Serve ARTIFACT to OpenAI clients on this machine, with a small page to try it."""
    try:
        from gori.runtime.serve import Limits, application
        from gori.runtime.serve_gate import is_loopback
        from gori.runtime.serve_http import http_server, listen, url_of
        from gori.runtime.serve_line import Line, open_callers
    except ModuleNotFoundError as e:
        if e.name not in ("starlette", "uvicorn"):
            raise
        raise MissingEngine(f"serving needs {e.name}, which is not installed here: pip install 'gori[serve]'") from e
    key, local = read_key(api_key_file), is_loopback(host)
    if key is None and not local and not insecure:
        raise GoriError(
            f"{host} can be reached from other machines and no API key is set: give --api-key-file or GORI_API_KEY, "
            "listen on 127.0.0.1, or say --insecure"
        )
    with listen(host, port) as bound:
        line = Line(open_callers(artifact, sessions, threads), queue, name, words)
        server = http_server(application(line, Limits(timeout_s, body_limit), key, local), timeout_s)
        where, info = url_of(bound), line.callers[0].session.info
        body = {"url": where, "model": line.model.name, "engine": info.engine, "sessions": sessions}
        print(json.dumps(body, ensure_ascii=False) if as_json else where, flush=True)
        console.log(f"{line.model.name} by {info.engine} {info.engine_version}, {sessions} at a time; Ctrl-C ends")
        server.run(sockets=[bound])


def read_key(path: Path | None) -> str | None:
    """The API key of a file, else of GORI_API_KEY, else None."""
    if path is None:
        text, where = os.environ.get("GORI_API_KEY"), "GORI_API_KEY"
        if text is None:
            return None
    else:
        try:
            text, where = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as e:
            raise GoriError(f"{path} cannot be read as an API key's file ({e}): give a text file with one key") from e
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise GoriError(f"{where} holds no API key: write one word of ASCII characters into it")
    return key
