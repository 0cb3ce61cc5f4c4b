"""What a recipe may name by import path: refused or imported, its options, and who shows it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lopd import registry
from megatron_lopd.cli import main
from megatron_lopd.commands.doctor import doors
from megatron_lopd.config import Recipe, TrainConfig, deciding, describe_keys, load_recipe, to_plain
from megatron_lopd.config.schema import json_schema
from megatron_lopd.errors import ConfigError
from megatron_lopd.registry import allowing_user_code

MODULE = """
from dataclasses import dataclass
from megatron_lopd.config import Count, Options, key, require
from megatron_lopd.loggers import Logger
from megatron_lopd.objectives import Objective, TopKForwardKl

@dataclass(frozen=True)
class PullOptions(Options):
    strength: Count = key("how hard it pulls (count)", 3)
    shown: bool = key("show it", False, operational=True)

    def check(self, recipe):
        require(self.strength <= recipe.score.top_k, "train.pull.strength is above score.top_k: lower it")

class Pull(TopKForwardKl):
    name = "pull"
    caption = "pulls towards the teacher"
    needs = ("top_k",)
    Options = PullOptions

class Steps(TopKForwardKl):
    name = "steps"
    caption = "has the name of a key"
    needs = ()

class Wordless(TopKForwardKl):
    name = "wordless"
    caption = None

class Lossless(Objective):
    name = "lossless"
    caption = "has its metrics to write yet"
    def token_loss(self, tokens):
        return -tokens.current

class Other:
    name = "other"
    caption = "is no objective"

made = Pull()

class Printed(Logger):
    name = "printed"
    caption = "prints the metrics"
    def open(self, *_): ...
    def write(self, *_): ...
"""
RECIPE: dict[str, Any] = {
    "run_dir": "run",
    "allow_user_code": True,
    "score": {"top_k": 4},
    "train": {"steps": 5, "objective": "pulling:Pull", "pull": {"strength": 2}},
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe beside the module that it names. What it adds to the doors is forgotten after the test."""
    for door in registry.DOORS:
        door.things()
        monkeypatch.setattr(door, "_things", dict(door._things))
        monkeypatch.setattr(door, "_imported", dict(door._imported))
    (tmp_path / "pulling.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pulling", raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    yield path
    sys.modules.pop("pulling", None)


def test_a_users_objective_has_options_under_its_name(recipe: Path) -> None:
    train = load_recipe(recipe, ["train.pull.shown=true"]).train
    assert train is not None
    assert (train.options.strength, train.options.shown) == (2, True)
    assert load_recipe(recipe, ["train.pull=null"]).train.options.strength == 3


def test_the_printed_recipe_is_the_recipe(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, ["prompts.opd={task: arithmetic, count: 2}", "train.loggers=[jsonl]"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(to_plain(loaded), sort_keys=False))
    assert load_recipe(again) == loaded


def test_the_file_that_user_code_is_in_decides_with_its_options(recipe: Path) -> None:
    train = load_recipe(recipe).train
    plain = deciding(train)
    assert plain["pull"] == {"strength": 2}
    assert deciding(load_recipe(recipe, ["train.pull.shown=true"]).train) == plain
    assert deciding(load_recipe(recipe, ["train.pull.strength=3"]).train) != plain
    (recipe.parent / "pulling.py").write_text(MODULE + "\n# changed\n")
    sys.modules.pop("pulling")
    registry.OBJECTIVES._imported.clear()
    registry.OBJECTIVES._things.pop("pull")
    changed = deciding(load_recipe(recipe).train)
    assert changed["objective"].startswith("pulling:Pull sha256:")
    assert changed["objective"] != plain["objective"]
    assert changed | {"objective": ""} == plain | {"objective": ""}


def test_a_file_that_changes_under_the_code_that_runs_is_refused(recipe: Path) -> None:
    train = load_recipe(recipe).train
    (recipe.parent / "pulling.py").write_text(MODULE + "\n# changed\n")
    for ask in (lambda: deciding(train), lambda: deciding(load_recipe(recipe).train)):
        with pytest.raises(ConfigError, match="the file of pulling has changed since this process imported"):
            ask()


def test_user_code_that_another_recipe_has_brought_in_is_not_this_ones(recipe: Path) -> None:
    load_recipe(recipe)
    with pytest.raises(ConfigError, match="pulling:Pull is code of yours: set allow_user_code=true"):
        load_recipe(recipe, ["allow_user_code=false"])
    for allowed in ("true", "false"):  # by a name that a lineage could not tell the code by
        with pytest.raises(ConfigError, match="pull is code of yours: name it by its import path, pulling:P"):
            load_recipe(recipe, [f"allow_user_code={allowed}", "train.objective=pull"])


def test_the_projects_own_may_be_named_either_way(recipe: Path) -> None:
    text = yaml.safe_load(recipe.read_text())
    del text["train"]["pull"]
    recipe.write_text(yaml.safe_dump(text))
    load_recipe(recipe, ["train.objective=megatron_lopd.objectives:TopKForwardKl"])
    assert load_recipe(recipe, ["train.objective=topk_forward_kl"]).train.objective == "topk_forward_kl"


def test_a_module_that_exits_is_an_error(recipe: Path) -> None:
    (recipe.parent / "pulling.py").write_text("import sys; sys.exit()")
    with pytest.raises(ConfigError, match="pulling:Pull: cannot be imported: SystemExit"):
        load_recipe(recipe)


CARELESS_OBJECTIVE = """
from megatron_lopd.config import Options
from megatron_lopd.objectives import TopKForwardKl

class Careless(TopKForwardKl):
    name = "careless"
    caption = "whose options are no dataclass"
    class Options(Options):
        strength: int = 3
"""
CARELESS_ENGINE = """
from dataclasses import dataclass
from megatron_lopd.config import Options, key
from megatron_lopd.engines import EngineKind

@dataclass(frozen=True)
class CarelessOptions(Options):
    strength: int = key("how hard it works", 3)

class CarelessKind(EngineKind):
    name = "careless"
    caption = "whose options are not an engine's"
    Options = CarelessOptions
    def open(self, config, model_dir): ...

Careless = CarelessKind()
"""


@pytest.mark.parametrize(
    ("module", "override", "base"),
    [
        (CARELESS_OBJECTIVE, "train.objective=", "config.keys.Options"),
        (CARELESS_ENGINE, "score.engine.name=", "engines.kind.EngineOptions"),
    ],
)
def test_options_that_are_none_are_refused_and_leave_nothing_behind(
    recipe: Path, module: str, override: str, base: str
) -> None:
    (recipe.parent / "carelessly.py").write_text(module)
    expected = f"its Options must be a frozen dataclass and a subclass of megatron_lopd.{base}, each"
    with pytest.raises(ConfigError, match=f"carelessly:Careless: Careless.*: {expected}"):
        load_recipe(recipe, [f"{override}carelessly:Careless"])
    assert load_recipe(recipe).train is not None
    assert "careless" not in str(json_schema())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["allow_user_code=false"], "train.objective: objective pulling:Pull is code of yours: set allow_"),
        (["train.pull.strenth=1"], "unknown key train.pull.strenth: did you mean train.pull.strength?"),
        (["train.strength=1"], "unknown key train.strength: did you mean train.pull.strength?"),
        (["train.pull.strength=0"], "train.pull.strength must be at least 1, not 0"),
        (["train.pull.strength=9"], "train.pull.strength is above score.top_k"),
        (["train.pull=3"], "train.pull: expected keys and values, not 3"),
        (["score.top_k=0"], "train.objective=pulling:Pull needs the teacher's top k"),
        (
            ["train.topk_reverse_kl.entropy=1"],
            "train.topk_reverse_kl has options of another objective than train.objective=pulling:Pull: drop",
        ),
        (["train.objective=pulling:Steps"], "train.objective: steps is a key here: give your objective anot"),
        (["train.objective=pulling:Wordless"], "pulling:Wordless: no objective: it has no text called capti"),
        (["train.objective=pulling:Lossless"], "pulling:Lossless: no objective: it has no metrics"),
        (
            ["train.objective=pulling:Other"],
            "pulling:Other: no objective: it must be a subclass of megatron_lopd.objectives.Objective",
        ),
        (["train.objective=pulling:made"], "pulling:made: no objective: it must be a subclass of"),
        (["train.loggers=[jsonl, pulling:Pull]"], "pulling:Pull: no logger: it must be a subclass of"),
        (
            ["score.engine={name: pulling:Pull}"],
            "pulling:Pull: no engine: it must be an object of megatron_lopd.engines.EngineKind",
        ),
        (["train.objective=pulling:Push"], "pulling:Push: cannot be imported: AttributeError"),
        (["train.objective=nowhere:Push"], "nowhere:Push: cannot be imported: ModuleNotFoundError"),
        (["train.objective=pul"], "train.objective: unknown objective 'pul'"),
        (["train.objective=3"], "train.objective: expected str, got 3"),
        (["train.objective=topk_forward_kl"], "unknown key train.pull: known keys here are"),
        (["train.loggers=[jsonl, pulling:Nobody]"], "train.loggers: pulling:Nobody: cannot be imported"),
        (["train.loggers=[jsonl, 3]"], "train.loggers[1]: expected str, got 3"),
        (["train.loggers=[tensorboard]"], "train.loggers: jsonl is not among them"),
        (["train.loggers=jsonl"], "train.loggers: expected list of str, got 'jsonl'"),
        (["score.engine={name: vlm}"], "score.engine.name: unknown engine 'vlm' (did you mean vllm?)"),
        (
            ["score.engine={name: transformers, fp8: {recipe: tensorwise}}"],
            "engine.fp8: engine.name=transformers has no FP8 layers",
        ),
    ],
)
def test_what_names_and_options_get_wrong(recipe: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{recipe}: ")
    assert "\n" not in str(caught.value)


def test_options_of_another_thing_are_refused_in_python_too(recipe: Path) -> None:
    with allowing_user_code(True):
        pull = TrainConfig(steps=1, objective="pulling:Pull").options
    with pytest.raises(ConfigError, match="PullOptions is not of objective=topk_reverse_kl"):
        TrainConfig(steps=1, options=pull)


def test_help_doctor_and_schema_show_what_the_recipe_adds(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "pull" not in dict(doors())["objective"]
    with pytest.raises(SystemExit):
        main(["train", str(recipe), "train.loggers=[jsonl, pulling:Printed]", "--help"])
    shown = capsys.readouterr().out
    assert "pulling:Pull: pulls towards the teacher" in shown
    assert "pulling:Printed: prints the metrics" in shown
    assert "\ntrain.pull:\n  strength (int, at least 1; default 3)\n      how hard it pulls (count)" in shown
    assert dict(doors())["objective"].endswith(", pull (pulling:Pull)")
    assert json_schema()["$defs"]["TrainConfig"]["properties"]["pull"] == {"$ref": "#/$defs/PullOptions"}


def test_help_has_the_keys_of_engines_once_with_their_places(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = capsys.readouterr().out
    places = "generate.engine, rollout.engine, score.engine, score.agreement.engine, evaluate.engine"
    assert shown.count("shard_samples (") == 1
    assert f"\n{places}:\n" in shown
    options = ", ".join(f"{place}.vllm" for place in places.split(", "))
    assert f" {options}: python (path; empty) " in " ".join(shown.split())


def test_the_schema_has_every_key_and_its_range() -> None:
    schema = json_schema()

    def at(place: str) -> dict[str, Any]:
        node = schema
        for name in place.split("."):
            options = node.get("anyOf", [node])
            (node,) = [each for each in options if "$ref" in each] or options
            if "$ref" in node:
                node = schema["$defs"][node["$ref"].rpartition("/")[2]]
            assert node["additionalProperties"] is False
            node = node["properties"][name]
        return node

    for key in describe_keys(Recipe):
        assert at(key.name.replace(".<name>", ""))["description"] == key.help
    assert at("train.optimizer.beta1") | {"description": ""} == {
        "type": "number",
        "minimum": 0,
        "exclusiveMaximum": 1,
        "default": 0.9,
        "description": "",
    }
