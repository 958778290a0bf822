"""The `gori` command: a literal table of commands, each imported when it is used, so that `gori --help` is fast."""

from __future__ import annotations

import errno
import importlib
import os
import sys

import click

import gori
from gori.errors import GateError, GoriError
from gori.ranks import current, joined

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("gori.commands:demo", "The whole pipeline on the built-in in-car task."),
    "init": ("gori.commands:init", "A commented recipe.yaml for your own data."),
    "run": ("gori.commands:run", "Every stage of a recipe; skips what is unchanged, continues what was cut off."),
    "data": ("gori.commands:data", "The built-in corpus; checking your own."),
    "teacher": ("gori.teacher.commands:teacher", "Train, import or cache a mixture-of-experts teacher."),
    "distill": ("gori.distill.commands:distill", "Pour a dense student out of a teacher."),
    "quantize": ("gori.quantize.commands:quantize", "Integers and scales, once, for every target."),
    "sweep": (
        "gori.quantize.sweep_commands:sweep",
        "Many schemes and methods, measured on the real engine; the best for a budget.",
    ),
    "export": (
        "gori.export.commands:export_command",
        "Carry the integers into a target's file and prove it by running.",
    ),
    "verify": ("gori.export.commands:verify", "Hashes, integers, signature and golden outputs of exported artifacts."),
    "sign": ("gori.export.commands:sign", "Sign an artifact with a key file or a PKCS#11 token."),
    "eval": (
        "gori.runtime.commands:evaluate_command",
        "Exact call match per language, of a checkpoint or an artifact.",
    ),
    "call": ("gori.runtime.commands:call", "One utterance, one call as JSON."),
    "chat": ("gori.runtime.commands:chat", "A conversation."),
    "bench": ("gori.runtime.bench_commands:bench", "Speed and memory of artifacts, side by side."),
    "serve": ("gori.runtime.serve_commands:serve", "OpenAI-compatible server on localhost, with a small page."),
    "doctor": ("gori.commands:doctor", "What is installed and which targets work here."),
}


ON_RANKS = {"demo", "run", "teacher", "distill"}
"""Commands that torchrun may start."""


class Lazy(click.Group):
    """A group whose commands are imported when they run; the list shows the table's one-line help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if current().world > 1 and cmd_name not in ON_RANKS:
            raise GoriError(f"`gori {cmd_name}` works in one process: start it without torchrun")
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            from gori.errors import nearest

            raise click.UsageError(f"no command {args[0]!r}{nearest(args[0], COMMANDS)}", ctx) from e


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gori.__version__, prog_name="gori")
def root() -> None:
    """gori (고리): teacher → distill → quantize → export → run, on a device near you.

    Start with `gori demo`, then `gori init mine` for your own data.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit 0 done, 1 a user's error in one sentence, 2 usage, 3 a gate or budget not met."""
    try:
        try:
            with joined():
                root.main(arguments, prog_name="gori", standalone_mode=True)
        finally:
            sys.stdout.flush()
    except GateError as e:
        _say(e)
        sys.exit(3)
    except GoriError as e:
        _say(e)
        sys.exit(1)
    except ModuleNotFoundError as e:
        if e.name not in ("torch", "torchao", "transformers"):
            raise
        _say(GoriError(f"this needs {e.name}, which is not installed here: pip install {e.name}"))
        sys.exit(1)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's last flush would fail again
        _say(GoriError(f"cannot write the result: {e.strerror}: free space"))
        sys.exit(1)


def _say(error: GoriError) -> None:
    click.echo(f"gori: {error}", err=True)


if __name__ == "__main__":
    main()
