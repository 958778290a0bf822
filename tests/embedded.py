"""What the tests of the embedding examples share: commands, a service, an exported student of the in-car task."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

from gori import corpus, incar, tokenizer
from gori.export.build import export
from students import Case, of, write_checkpoint

ROOT = Path(__file__).parent.parent


def done(*command: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """A finished command; its output where it failed."""
    out = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300, **more)
    assert out.returncode == 0, out.stdout + out.stderr
    return out


def exported_car(root: Path) -> Path:
    """An exported student with the in-car functions, untrained: the grammar alone makes its answers calls."""
    root.mkdir()
    (root / "tools.json").write_text(json.dumps(incar.tools(), ensure_ascii=False), encoding="utf-8")
    functions = corpus.read_tools(root / "tools.json")
    words = tokenizer.train([" 창문 열어줘", " open the window"] * 4, functions, 760)
    student = write_checkpoint(Case(of("qwen3", vocab_size=760, max_position=256), "w4a8-g32"), root / "student")
    words.save(student)
    shutil.copyfile(root / "tools.json", student / "tools.json")
    export("executorch", student, root / "et", context=256, chunk=32)
    return root / "et"


class Service:
    """The program as systemd would run it: notifications, a watchdog, a socket."""

    def __init__(self, program: Path, car: Path, engine: Path, work: Path, *more: object) -> None:
        self.path = str(work / "s")
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.bind(str(work / "notify"))
        self.told.settimeout(20)
        notices = {"NOTIFY_SOCKET": str(work / "notify"), "WATCHDOG_USEC": "100000", "LD_PRELOAD": str(engine)}
        where = more or ("--socket", self.path)
        command = [program, "--artifact", car, "--bus", work / "bus", "--deadline-ms", 100, *where]
        self.process = subprocess.Popen(
            list(map(str, command)), env={**os.environ, **notices}, stderr=subprocess.PIPE, text=True
        )

    def notice(self) -> str:
        return self.told.recv(4096).decode()

    def ready(self) -> None:
        while not self.notice().startswith("READY=1\nSTATUS=gori "):
            pass

    def client(self) -> socket.socket:
        out = socket.socket(socket.AF_UNIX)
        out.connect(self.path)
        out.settimeout(20)
        return out

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=20)
        return self.process.returncode, said


def ask(client: socket.socket, line: str | bytes) -> list[dict[str, str]]:
    """A line to a client's service, and its callbacks."""
    client.sendall((line.encode() if isinstance(line, str) else line) + b"\n")
    with client.makefile("rb") as lines:
        return json.loads(lines.readline())
