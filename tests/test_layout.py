"""The house: who imports whom, what the wheel holds, how long files are, and what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("teacher", "distill", "quantize", "export", "runtime")
MAY_IMPORT = {
    "gori": set(),
    "teacher": {"teacher"},
    "distill": {"teacher", "distill"},
    "quantize": {"teacher", "distill", "quantize"},
    "export": {"teacher", "distill", "quantize", "export", "runtime"},
    "runtime": {"runtime"},
}
EVERYWHERE = {
    "gori/cli.py", "gori/pipeline.py", "gori/candidate.py", "gori/students.py", "gori/commands.py", "gori/__main__.py",
    "gori/targets.py",
}  # fmt: skip
"""Targets.py only names the modules of exporters and engines, as the command line's table does."""
STUDENTS = "gori/students.py"
"""Works with the pipeline's stages and measures files as a sweep does."""
MODULES = sorted(p.relative_to(ROOT).as_posix() for room in ("gori", *ROOMS) for p in (ROOT / room).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, inside functions and in strings given to import_module too."""
    found: set[str] = set()
    package = "gori" if path.parent.name == "gori" else f"gori.{path.parent.name}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) + 1 - node.level], *filter(None, [base])]
                )
            found |= {base} | {f"{base}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("gori."):
            found.add(node.value.partition(":")[0])
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_arrows_allow(module: str) -> None:
    room = module.split("/")[0]
    names = imported(ROOT / module)
    rooms = {parts[1] for n in names if (parts := n.split("."))[0] == "gori" and len(parts) > 1 and parts[1] in ROOMS}
    if module not in EVERYWHERE:
        assert rooms <= MAY_IMPORT[room], f"{module} imports {rooms - MAY_IMPORT[room]}"
    pipeline = any(n == "gori.pipeline" or n.startswith("gori.pipeline.") for n in names)
    assert not pipeline or module.endswith("/commands.py") or module == STUDENTS, f"{module} imports the pipeline"
    candidate = any(n == "gori.candidate" or n.startswith("gori.candidate.") for n in names)
    assert not candidate or module.endswith("commands.py") or module == STUDENTS, f"{module} imports a candidate"
    students = any(n == "gori.students" or n.startswith("gori.students.") for n in names)
    assert not students or module.endswith("commands.py"), f"{module} imports the sizing of students"
    cli = any(n == "gori.cli" or n.startswith("gori.cli.") for n in names)
    assert not cli or module == "gori/__main__.py", f"{module} imports the command line"


def test_the_arrows_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    path = tmp_path / "teacher" / "x.py"
    path.write_text(
        "def f():\n from gori.export import parity\n import gori.runtime.session\n from .. import quantize\n"
    )
    assert {"gori.export.parity", "gori.runtime.session", "gori.quantize"} <= imported(path)


@pytest.mark.parametrize(
    "module", [*MODULES, *(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "tests").glob("*.py")))]
)
def test_a_file_begins_with_what_it_is_and_stays_within_400_lines(module: str) -> None:
    text = (ROOT / module).read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{module} does not say what it is"
    assert len(text.splitlines()) <= 400


def test_rooms_are_flat() -> None:
    for room in ("gori", *ROOMS):
        assert not [p for p in (ROOT / room).rglob("*.py") if p.parent != ROOT / room]


def test_the_packages_of_pyproject_are_the_rooms() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    wanted = {"gori": "gori", **{f"gori.{room}": room for room in ROOMS}}
    assert tool["package-dir"] == wanted
    assert set(tool["packages"]) == set(wanted)


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "gori", *ROOMS):
        # the build writes beside its sources: links to a copy's parts keep this checkout clean
        if (ROOT / name).is_dir():
            (source / name).mkdir()
            for p in (ROOT / name).iterdir():
                if p.is_file():
                    (source / name / p.name).write_bytes(p.read_bytes())
        elif (ROOT / name).exists():
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    modules = {m if m.startswith("gori/") else f"gori/{m}" for m in MODULES}
    data = {p.relative_to(ROOT).as_posix() for s in ("yaml", "jinja", "typed") for p in (ROOT / "gori").glob(f"*{s}")}
    data |= {f"gori/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "runtime").glob("*.html")}
    assert held == modules | data


HEAVY = ("torch", "transformers", "executorch", "torchao", "pandas", "sklearn")


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after running the code."""
    check = f"{code}\nimport sys\nprint('HEAVY', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("HEAVY", 1)[1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import gori.cli, gori.commands, gori.recipe, gori.data, gori.corpus, gori.tokenizer, gori.artifact",
        "import gori.runtime, gori.runtime.session, gori.runtime.generate, gori.runtime.bench, gori.runtime.commands",
        "import gori.evaluate, gori.summary, gori.gates, gori.incar",
        "import gori.teacher, gori.distill, gori.quantize, gori.export, gori.targets",
        "import gori.export.verify, gori.export.golden, gori.export.signing, gori.export.commands",
        "import gori.quantize.sweep_commands, gori.quantize.journal, gori.runtime.measure",
        "import gori.runtime.serve, gori.runtime.serve_http, gori.runtime.serve_line, gori.runtime.serve_commands",
        "from gori.runtime import bandwidth, bench_commands, bench_report, bench_round, bench_threads, step_bytes",
        "import gori.export.gguf_read, gori.runtime.gguf, gori.export.litert_read, gori.runtime.litert",
        "import contextlib\nfrom gori.cli import main\nwith contextlib.suppress(SystemExit): main(['--help'])",
    ],
)
def test_what_needs_no_torch_does_not_load_it(code: str) -> None:
    assert loaded_by(code) == set()


def test_a_heavy_package_would_be_noticed() -> None:
    assert "torch" in loaded_by("import gori.model")


def test_the_readmes_table_of_targets_is_the_one_in_the_code() -> None:
    from gori.targets import TARGETS, markdown, scheme_table

    assert scheme_table() in (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    assert markdown() in (ROOT / "README.md").read_text(encoding="utf-8")
    assert all((ROOT / "docs" / t.docs).exists() for t in TARGETS.values())


def test_a_recipe_may_name_every_target() -> None:
    from gori.recipe import Export
    from gori.targets import TARGETS

    assert [Export.model_validate({"target": name}).target for name in TARGETS] == list(TARGETS)
