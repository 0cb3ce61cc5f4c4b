"""Strict recipes: every kind of mistake is one line naming the file, the dotted key and the remedy."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lopd.config import Recipe, deciding, describe_keys, load_recipe, to_plain
from megatron_lopd.errors import ConfigError

GOOD = """
run_dir: runs/x
seed: 3
teacher: {model: models/t}
student: {model: models/s, init: random}
prompts:
  opd: {task: arithmetic, count: 10}
sft: {steps: 5, optimizer: {lr: 1e-3, schedule: cosine}}
train: {epochs: 1.5}
"""
# Each line is ten of the one before.
BOMB = "\n".join(f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 10)}]" for at in range(1, 30))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_and_its_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD),
        ["train.optimizer.lr=2e-6", "seed=9", "parallel.tensor=2", "parallel.processes=2"],
    )
    assert recipe.seed == 9
    assert recipe.sft is not None
    assert recipe.train is not None
    assert recipe.sft.optimizer.lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert recipe.train.optimizer.lr == 2e-6
    assert recipe.train.optimizer.beta2 == 0.98
    assert to_plain(recipe)["parallel"]["tensor"] == 2


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        ("run_dirr: x", None, "unknown key run_dirr: did you mean run_dir?"),
        (GOOD, "train.optimzer.lr=1", "unknown key train.optimzer: did you mean train.optimizer?"),
        (GOOD, "lr=1", "unknown key lr: did you mean sft.optimizer.lr?"),
        (GOOD, "train.lr=1", "unknown key train.lr: did you mean train.optimizer.lr?"),
        (GOOD, "seed=abc", "seed: expected int, got 'abc'"),
        (GOOD, "seed=-1", "seed must be at least 0 and at most 2^63 - 1, not -1"),
        (GOOD, "sft.optimizer.warmup_steps=5", "sft.optimizer.warmup_steps=5 must be below sft.steps=5"),
        (GOOD, "train.optimizer.lr=inf", "train.optimizer.lr: expected float, got 'inf'"),
        (GOOD, "train.optimizer.lr=.inf", "train.optimizer.lr: expected a finite float, got inf"),
        (GOOD, "train.optimizer.lr='1e-3'", "train.optimizer.lr: expected float, got '1e-3'"),
        (GOOD, "train.optimizer.beta1=2", "train.optimizer.beta1 must be at least 0 and below 1, not 2"),
        (GOOD, "train.preflight_samples=-1", "train.preflight_samples must be at least 0, not -1"),
        (GOOD, "seed=true", "seed: expected int, got True"),
        (GOOD, "seed=", "seed: expected int, got nothing"),
        (GOOD, "train.optimizer.lr=fast", "train.optimizer.lr: expected float, got 'fast'"),
        (GOOD, "train.optimizer.lr=-1", "train.optimizer.lr must be above 0, not -1"),
        (
            GOOD,
            "sft.optimizer.schedule=cosin",
            "'cosin' is not one of constant, cosine, linear: did you mean cosine?",
        ),
        (GOOD, "train.steps=3", "train: give either steps or epochs, and not both"),
        (
            GOOD,
            "parallel.tensor=2",
            "parallel.processes=1 must be a multiple of 2 (tensor x context x pipeline = 2 x 1 x 1): "
            "set parallel.processes=2",
        ),
        (GOOD, "parallel.virtual_pipeline=2", "set parallel.virtual_pipeline=1 or parallel.pipeline to at"),
        ("# nothing", "", "the file is empty: a recipe is a mapping"),
        (GOOD, "score.top_k=0", "needs the teacher's top k: set score.top_k"),
        (GOOD, "prompts.opd.path=x.jsonl", "give either path (a file) or task"),
        (
            GOOD,
            "prompts.opd.suffix=Go.",
            "prompts.suffix is for the prompts of a file: drop it with task arith",
        ),
        (GOOD, "prompts.eval={}", "prompts.eval names no set: give a source"),
        (GOOD, "prompts.eval={a/b: {path: x}}", "prompts.eval: 'a/b' cannot name a directory"),
        (
            GOOD,
            "prompts.eval={aime: {pth: x}}",
            "unknown key prompts.eval.aime.pth: did you mean prompts.eval.aime",
        ),
        (
            GOOD,
            "prompts.eval={aime: {path: x}, amc: x.jsonl}",
            "prompts.eval.amc: expected keys and values, not 'x.jsonl'",
        ),
        (GOOD, "prompts.eval={aime: }", "prompts.eval.aime: expected keys and values, not None"),
        (
            GOOD,
            "prompts.eval={aime: , amc: {path: x}}",
            "prompts.eval.aime: expected keys and values, not None",
        ),
        (GOOD, "prompts.eval={pth: x.jsonl}", "unknown key prompts.eval.pth: did you mean prompts.eval.path"),
        (
            GOOD,
            "prompts.eval.path=x.jsonl",
            "missing key evaluate.grader: what checks the answers of prompts",
        ),
        (
            GOOD,
            "prompts.eval={a: {task: arithmetic, count: 1}, b: {path: x}}",
            "missing key evaluate.grader",
        ),
        (GOOD, "prompts.eval=x.jsonl", "prompts.eval: expected keys and values, not 'x.jsonl'"),
        (GOOD, "seed", "write it as dotted.key=value"),
        (GOOD, "seed.deeper=1", "seed holds a value, not keys"),
        ("seed: 1", None, "missing key run_dir"),
        ("run_dir: x\nrun_dir: y", None, "key 'run_dir' is given twice"),
        ("- a", None, "a recipe is a mapping"),
        ("a: [", None, "not valid YAML"),
        ("seed: 2024-13-45", None, "seed: expected int, got '2024-13-45'"),
        ("[a]: 1", None, "recipe.yaml:1: a key that is no text"),
        ("{a: 1}: 1", None, "recipe.yaml:1: a key that is no text"),
        ("a: &x {b: *x}", None, "recipe.yaml:1: *x stands within itself"),
        ("a: &x 1\n*x : 2", None, "recipe.yaml:2: *x as a key"),
        ("a: *x", None, "recipe.yaml:1: *x is not defined before"),
        ("a: &x {b: 1}\nc: {<<: *x}", None, "recipe.yaml:2: << (merging) is not taken"),
        ("[" * 100_000, None, "recipe.yaml:1: more than 32 levels deep"),
        ("a: " * 40 + "1", None, "not valid YAML"),
        ("\n".join(" " * at + "a:" for at in range(50)), None, "more than 32 levels deep"),
        ("a: &a0 [1]\n" + BOMB, None, "above 100,000 values, aliases written out"),
        ("seed: " + "9" * 5_000, None, "a number of 5,000 characters"),
        ("a: !!python/object:os.system {}", None, "the tag tag:yaml.org,2002:python/object:os.system"),
        ("a: !!set {b}", None, "the tag tag:yaml.org,2002:set: values here have none"),
        ('a: "\\ud800"', None, "half of a surrogate pair"),
        ("run_dir: x\n---\nseed: 1", None, "recipe.yaml:2: a second document begins"),
        ("x: " + "y" * (1 << 20), None, "above 1,048,576 bytes"),
        (GOOD, "run_dir=${HOME/x", "run_dir: '${HOME/x': a ${ is not closed"),
        (GOOD, "run_dir=$NOT_SET/x", "run_dir: '$NOT_SET/x': $NOT_SET is not set in the environment"),
        (GOOD, "sft.data=${NOT_SET}", "sft.data: '${NOT_SET}': $NOT_SET is not set"),
        (GOOD, "teacher.model=~nobody-here/x", "teacher.model: '~nobody-here/x': there is no such home"),
        (GOOD, 'run_dir="a\\nb"', "has characters that do not print"),
        (GOOD, "sft.steps=1e3.5", "sft.steps: expected int, got '1e3.5'"),
        (GOOD, "sft.steps=1.5", "sft.steps: expected int, got 1.5"),
        (GOOD, f"sft.steps={10**20}", "sft.steps must be at least 1 and at most 1e+08, not 1" + "0" * 20),
        (GOOD, "sft.steps=1e99", "sft.steps must be at least 1 and at most 1e+08"),
        (GOOD, f"rollout.engine.workers={10**13}", "workers must be at least 1 and at most 1e+12"),
        (GOOD, "train={steps: 50000, refresh_every: 1}", "above 10,000 refreshes: raise it"),
        (GOOD, "seed=2024-13-45", "seed: expected int, got '2024-13-45'"),
        (GOOD, "seed=010", "seed: expected int, got '010'"),
        (GOOD, "parallel.sequence=yes", "parallel.sequence: expected bool, got 'yes'"),
        (GOOD, "seed={[a]: 1}", "override 'seed={[a]: 1}':1: a key that is no text"),
        (GOOD, "seed=[", "override 'seed=[': not valid YAML"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, text: str, override: str | None, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, text), [override] if override else [])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=" + "1" * 400_000 + "x", "seed: expected int, got '111"),
        ("run_dir=" + "${" * 200_000, "run_dir: a path of 400,000 characters: ${${"),
    ],
    ids=["what looks like a number to its end", "names that are not closed"],
)
def test_what_is_wrong_costs_no_more_time_than_it_has_characters(
    tmp_path: Path, override: str, expected: str
) -> None:
    """By their square these would take hours."""
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_recipe(write(tmp_path, GOOD), [override])


def test_an_override_reaches_only_its_own_section(tmp_path: Path) -> None:
    text = GOOD + "generate: {sampling: &s {top_k: 3}}\nrollout: {sampling: *s}\n"
    recipe = load_recipe(write(tmp_path, text), ["rollout.sampling.temperature=0.5"])
    assert (recipe.generate.sampling.temperature, recipe.rollout.sampling.temperature) == (1.0, 0.5)
    assert recipe.rollout.sampling.top_k == 3


def test_values_are_what_they_say(tmp_path: Path) -> None:
    """Numbers as people write them; what YAML 1.1 takes for dates and truths is text."""
    recipe = load_recipe(
        write(tmp_path, GOOD),
        ["run_dir=2024-13-45", "seed=1_000", "train.optimizer.lr=.5e-3", "teacher.model=yes", "sft.data="],
    )
    assert (recipe.run_dir, recipe.seed) == ("2024-13-45", 1000)
    assert recipe.teacher is not None
    assert recipe.teacher.model == "yes"
    assert recipe.train is not None
    assert recipe.train.optimizer.lr == 0.5e-3
    snowman = load_recipe(write(tmp_path, GOOD + "# \N{SNOWMAN}"), ['run_dir="\N{SNOWMAN}"'])
    assert snowman.run_dir == "\N{SNOWMAN}"
    assert load_recipe(write(tmp_path, GOOD), ["sft.steps=1e3"]).sft == replace(recipe.sft, steps=1000)


def test_paths_say_what_they_do_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = write(tmp_path, GOOD)
    asked = ["run_dir=~/runs", "teacher.model=${SCRATCH}/t", "student.model=$SCRATCH/s", "sft.data=a~b"]
    recipe = load_recipe(path, asked)
    assert recipe.teacher is not None
    assert recipe.student is not None
    assert recipe.sft is not None
    found = (recipe.run_dir, recipe.teacher.model, recipe.student.model, recipe.sft.data)
    assert found == ("/home/me/runs", "/scratch/me/t", "/scratch/me/s", "a~b")
    suffix = load_recipe(path, ["prompts.opd={path: x.jsonl, suffix: costs $5 ~}"])
    assert suffix.prompts.opd is not None
    assert suffix.prompts.opd.suffix == "costs $5 ~"


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, "."])
def test_what_is_no_recipe_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"no such recipe|a directory, not a recipe: give the path of a YAML"
    ):
        load_recipe(name)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


# What running out of memory advises to lower, which the directory of a stage must not refuse.
ROOM = [
    *(f"{stage}.engine.batch_size=1" for stage in ("generate", "rollout", "score", "evaluate")),
    *(f"{stage}.micro_batch_tokens=5000" for stage in ("sft", "train")),
]


def test_operational_keys_do_not_decide(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    one = load_recipe(path)
    other = load_recipe(path, ["train.checkpoint_every=7", "parallel.processes=4", *ROOM])
    changed = load_recipe(path, ["train.optimizer.clip_grad=0.5"])
    assert deciding(one) == deciding(other)
    assert deciding(one) != deciding(changed)


def test_every_key_is_described_once() -> None:
    keys = list(describe_keys(Recipe))
    names = [key.name for key in keys]
    assert len(names) == len(set(names)) > 50
    assert {item.name for item in dataclasses.fields(Recipe)} == {name.split(".")[0] for name in names}
    assert all(key.help for key in keys)


def test_config_imports_no_torch() -> None:
    code = "import sys, megatron_lopd.config, megatron_lopd.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_evaluation_set_or_several_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "evaluate: {grader: math}\n")
    one = load_recipe(path, ["prompts.eval.path=a.jsonl", "prompts.eval.count=3"])
    assert one.prompts.eval is not None
    assert {name: source.path for name, source in one.prompts.eval.items()} == {"eval": "a.jsonl"}
    two = load_recipe(
        path, ["prompts.eval.aime24.path=a.jsonl", "prompts.eval.math500={path: b.jsonl, count: 2}"]
    )
    assert two.prompts.eval is not None
    assert [(name, source.path) for name, source in two.prompts.eval.items()] == [
        ("aime24", "a.jsonl"),
        ("math500", "b.jsonl"),
    ]
    assert load_recipe(path, ["prompts.eval=null"]).prompts.eval is None


def test_a_built_in_tasks_own_grader_need_not_be_named(tmp_path: Path) -> None:
    path, sets = write(tmp_path, GOOD), "prompts.eval={task: arithmetic, count: 2}"
    assert load_recipe(path, [sets]).evaluate.grader == "arithmetic"
    assert load_recipe(path, [sets, "evaluate.grader=math"]).evaluate.grader == "math"
