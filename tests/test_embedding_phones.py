"""The phone examples: the Android bridge answers inside a JVM, Kotlin and Swift are parsed, and what two languages say
is the same in both. An SDK, a phone and a Mac are not here: docs/embedding.md says what that leaves open.
"""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree
from pathlib import Path

import pytest

from embedded import ROOT, done

ANDROID, IOS = ROOT / "examples" / "android", ROOT / "examples" / "ios"

JVM = """
package dev.gori;
public class Native {
  public native long open(byte[] directory, int threads);
  public native byte[] call(long handle, byte[] said, int form);
  public native void cancel(long handle);
  public native void close(long handle);
  public static void main(String[] arguments) throws Exception {
    System.load(arguments[0]);
    Native gori = new Native();
    long handle = gori.open(arguments[1].getBytes("UTF-8"), 1);
    gori.cancel(handle);  // nothing runs: nothing is cancelled
    for (int form = 0; form < 2; ++form) System.out.write(gori.call(handle, arguments[2].getBytes("UTF-8"), form));
    gori.close(handle);
    try {
      gori.open("/nowhere".getBytes("UTF-8"), 1);
    } catch (GoriException e) {
      System.out.print(e.status + " " + e.getMessage());
    }
  }
}
class GoriException extends RuntimeException {
  final int status;
  GoriException(int status, byte[] said) {
    super(new String(said, java.nio.charset.StandardCharsets.UTF_8));
    this.status = status;
  }
}
"""


def java_home() -> Path:
    """A JDK with headers; skips without one."""
    compiler = shutil.which("javac")
    home = Path(compiler).resolve().parent.parent if compiler else None
    if home is None or not (home / "include/jni.h").exists():
        pytest.skip("the JNI bridge needs a JDK with jni.h")
    return home


def test_the_android_bridge_answers_in_a_jvm_as_the_runner_does(runner: Path, car: Path, tmp_path: Path) -> None:
    home = java_home()
    include = [f"-I{p}" for p in (home / "include", home / "include/linux", ROOT / "runtime/cpp")]
    bridge, source = tmp_path / "libgori_jni.so", ANDROID / "app/src/main/cpp/gori_jni.cpp"
    strict = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    done("c++", *strict, *include, source, f"-L{runner}", "-lgori", f"-Wl,-rpath,{runner}", "-o", bridge)
    (tmp_path / "Native.java").write_text(JVM)
    done("javac", "-d", tmp_path, tmp_path / "Native.java")
    said = "운전석 🚗 열선 2단계"
    out = done("java", "-Xmx64m", "-Dfile.encoding=UTF-8", "-cp", tmp_path, "dev.gori.Native", bridge, car, said).stdout
    calls, actions = (done(runner / "gori-call", *form, car, said).stdout.strip() for form in ([], ["--gleo"]))
    assert out.startswith(calls + actions + "2 ")
    assert "/nowhere" in out


def parsed(path: Path, language: str) -> list[str]:
    """Lines that a real parser does not understand."""
    tree_sitter = pytest.importorskip("tree_sitter")
    grammar = pytest.importorskip(f"tree_sitter_{language}")
    tree = tree_sitter.Parser(tree_sitter.Language(grammar.language())).parse(path.read_bytes())
    assert tree.root_node.child_count > 0
    wrong, waiting = [], [tree.root_node]
    while waiting:
        node = waiting.pop()
        if node.is_error or node.is_missing:
            wrong.append(f"{path.name}:{node.start_point[0] + 1}: {node.text!r}")
        waiting += node.children
    return wrong


SOURCES = [*sorted(ANDROID.rglob("*.kt")), *sorted(ANDROID.rglob("*.kts")), *sorted(IOS.rglob("*.swift"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_kotlin_and_swift_parse(path: Path, tmp_path: Path) -> None:
    language = "swift" if path.suffix == ".swift" else "kotlin"
    assert parsed(path, language) == []
    # the parser does see what is wrong: a brace less
    body = path.read_text()
    (tmp_path / path.name).write_text(body[: body.rindex("}")] if "}" in body else body + "fun (")
    assert parsed(tmp_path / path.name, language)


def test_kotlins_native_functions_are_the_bridges() -> None:
    kotlin = (ANDROID / "app/src/main/java/dev/gori/Gori.kt").read_text()
    bridge = (ANDROID / "app/src/main/cpp/gori_jni.cpp").read_text()
    kinds = {"Long": "jlong", "Int": "jint", "ByteArray": "jbyteArray", None: "void"}
    declared = {
        (name, kinds[out or None], *(kinds[p.split(": ")[1]] for p in parameters.split(", ")))
        for name, parameters, out in re.findall(r"external fun (\w+)\((.*)\)(?:: (\w+))?", kotlin)
    }
    defined = {
        (name, out, *(p.split()[0] for p in parameters.split(", ")[2:]))
        for out, name, parameters in re.findall(r"JNIEXPORT (\w+) JNICALL Java_dev_gori_Native_(\w+)\((.*)\)", bridge)
    }
    assert declared == defined
    assert len(declared) == 4


def test_forms_have_the_headers_numbers() -> None:
    header = dict(re.findall(r"GORI_FORM_(\w+) = (\d)", (ROOT / "runtime/cpp/gori.h").read_text()))
    kotlin = re.search(r"enum class Form \{ (.*) \}", (ANDROID / "app/src/main/java/dev/gori/Gori.kt").read_text())
    swift = re.findall(r"case (\w+) = (\d)", (IOS / "Sources/Gori/Gori.swift").read_text())
    assert kotlin is not None
    assert {name: str(i) for i, name in enumerate(kotlin[1].split(", "))} == header
    assert {name.upper(): number for name, number in swift} == header


def test_the_apps_ask_for_no_permission_and_the_build_script_is_a_script() -> None:
    manifest = xml.etree.ElementTree.parse(ANDROID / "app/src/main/AndroidManifest.xml")
    assert not list(manifest.iter("uses-permission"))
    done("bash", "-n", IOS / "build.sh")
