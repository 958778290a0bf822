"""recipe.yaml: what is unknown or wrong is refused in one sentence, overrides land where they should."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import yaml

from gori.errors import GoriError
from gori.pipeline import check
from gori.recipe import Recipe, load

MINIMAL = "name: mine\ndata: {train: a.jsonl, dev: b.jsonl, test: [c.jsonl, d.jsonl], tools: t.json}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_file_paths_are_relative_to_the_recipe_and_absolute_ones_kept(recipe: Path, tmp_path: Path) -> None:
    d = load(recipe).data
    assert (d.train, d.test) == (str(tmp_path / "a.jsonl"), [str(tmp_path / "c.jsonl"), str(tmp_path / "d.jsonl")])
    recipe.write_text(MINIMAL.replace("a.jsonl", "/data/a.jsonl") + "teacher: {path: t}\n")
    assert load(recipe).data.train == "/data/a.jsonl"
    assert load(recipe).teacher.path == str(tmp_path / "t")
    recipe.write_text(MINIMAL + "distill: {unlabelled: {files: [said.txt, /data/b.jsonl]}}\n")
    unlabelled = load(recipe).distill.unlabelled
    assert unlabelled
    assert unlabelled.files == [str(tmp_path / "said.txt"), "/data/b.jsonl"]


@pytest.mark.parametrize("name", ["demo.yaml", "starter.yaml"])
def test_the_recipes_that_gori_carries_are_valid(name: str, tmp_path: Path) -> None:
    text = resources.files("gori").joinpath(name).read_text(encoding="utf-8")
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert load(tmp_path / "r.yaml").student.kind == "qwen3"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("sed: 1", "unknown key sed: did you mean 'seed'"),
        ("distill: {tran: {steps: 5}}", "unknown key distill.tran: did you mean 'train'"),
        ("distill: {train: {step: 5}}", "unknown key distill.train.step: did you mean 'steps'"),
        ("teacher: {train: {stepps: 1}}", "unknown key teacher.train.stepps: did you mean 'steps'"),
        ("distill: {on_policy: {shar: 1}}", "unknown key distill.on_policy.shar: did you mean 'share'"),
        ("distill: {progressive: [{layrs: 1}]}", "distill.progressive.0.layers: Field required"),
        ("distill: {unlabelled: {files: []}}", "distill.unlabelled.files: List should have at least 1 item"),
        ("export: [{traget: executorch}]", "unknown key export.0.traget: did you mean 'target'"),
        ("quantize: {zzz: 1}", "unknown key quantize.zzz: choose one of bits_per_weight, compare"),
        ("distill: {train: {steps: 0}}", "distill.train.steps: Input should be greater than or equal to 1, got 0"),
        ("distill: {train: {steps: many}}", "distill.train.steps: .* got 'many'"),
        ("student: {kind: gpt2}", "student.kind: .* got 'gpt2'"),
        ("seed: [1]", "seed: .*"),
        ("teacher: 5", "teacher: .* got 5"),
        ("1: 2", "recipe.yaml: "),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_its_place(more: str, message: str, recipe: Path) -> None:
    recipe.write_text(MINIMAL + more + "\n")
    with pytest.raises(GoriError, match=message) as caught:
        load(recipe)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping of sections, got NoneType"), (b"[1]", "must be a mapping of sections, got list"),
        (b"a: [1", "is not YAML: .*line 1"), (b"a: \xff", "is not UTF-8 at byte 3"), (b"a: b: c", "is not YAML"),
        (b"name: x\ndata: {train: a}", "data.dev is missing: name a file, as in --set data.dev=FILE"),
        (b"name: x\ndata: {builtin: incar, train: a}", "data.builtin makes its own files, so data.train"),
        (b"data: {builtin: incar}", "name: Field required"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused_in_one_sentence(content: bytes, message: str, recipe: Path) -> None:
    recipe.write_bytes(content)
    with pytest.raises(GoriError, match=message) as caught:
        load(recipe)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GoriError, match="does not exist: `gori init DIR` writes one"):
        load(tmp_path / "none.yaml")
    with pytest.raises(GoriError, match="cannot be read"):
        load(tmp_path)


def test_overrides_are_yaml_values_at_dotted_keys(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "distill:\nexport: [{target: executorch}]\n")
    r = load(
        recipe,
        (
            "distill.train.steps=7", "distill.losses={jsd: 2}", "student.tied=false", "data.test=[x.jsonl]",
            "export.0.context=64", "name=a=b", "data.train=here.jsonl",
        ),
    )  # fmt: skip
    assert (r.distill.train.steps, r.distill.losses, r.student.tied) == (7, {"jsd": 2.0}, False)
    assert (r.data.test, r.export[0].context, r.name) == (["x.jsonl"], 64, "a=b")
    assert r.data.train == "here.jsonl"  # a path on the command line is relative to where it is typed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.train.steps", "expected KEY=VALUE"), ("=5", "expected KEY=VALUE"), ("a=[1", "the value is not YAML"),
        ("distill.train.stepz=5", "unknown key distill.train.stepz: did you mean 'steps'"),
        ("export.1.context=64", r"what holds '1' is a list of 1: name one of 0\.\.0"),
        ("export.x.context=64", "what holds 'x' is a list of 1"),
        ("name.first=x", "what holds 'first' is 'mine', no section"),
        ("name.first.second=x", "what holds 'first' is 'mine', no section"),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be_applied_is_refused(override: str, message: str, recipe: Path) -> None:
    recipe.write_text(MINIMAL + "export: [{target: executorch}]\n")
    with pytest.raises(GoriError, match=message):
        load(recipe, (override,))


def test_every_field_of_the_training_section_is_one_that_the_loop_takes() -> None:
    from gori.recipe import TeacherTrain, Train
    from gori.teacher.train import TrainSettings

    ours, theirs = set(TeacherTrain.model_fields), set(TrainSettings.__dataclass_fields__)
    outside = {"swap_values", "invent_values", "threads", "peak_tflops", "tensorboard", "tokens", "sequence"}
    assert ours - theirs == outside
    assert theirs <= ours
    assert ours - set(Train.model_fields) == {"tokens", "sequence", "expert_parallel"}  # no student's


def test_a_recipe_that_is_dumped_and_read_is_the_same() -> None:
    text = resources.files("gori").joinpath("demo.yaml").read_text(encoding="utf-8")
    r = Recipe.model_validate(yaml.safe_load(text))
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(r.model_dump()))) == r


def test_the_demo_is_the_in_car_example() -> None:
    root = Path(__file__).parents[1]
    assert (root / "gori/demo.yaml").read_bytes() == (root / "examples/incar/recipe.yaml").read_bytes()


@pytest.mark.parametrize("name", ["recipe", "long"])
def test_the_snips_recipes_need_only_their_files_and_nothing_a_later_stage_refuses(name: str) -> None:
    path = Path(__file__).parents[1] / f"examples/snips/{name}.yaml"
    with pytest.raises(GoriError, match=r"data\.train is missing"):
        load(path)
    files = {"train": "train.jsonl", "dev": "dev.jsonl", "test": "dev.jsonl", "tools": "tools.json"}
    check(load(path, tuple(f"data.{k}={v}" for k, v in files.items())))


def test_an_override_reaches_one_of_two_sections_that_a_yaml_alias_made_one(tmp_path: Path) -> None:
    text = "name: x\ndata: {builtin: incar}\nteacher: {train: &same {steps: 5}}\ndistill: {train: *same}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load(tmp_path / "recipe.yaml", ("distill.train.steps=7",))
    assert (recipe.teacher.train.steps, recipe.distill.train.steps) == (5, 7)
