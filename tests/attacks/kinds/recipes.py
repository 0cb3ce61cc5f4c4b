"""Recipes and overrides: taken as they are written, key by key, or refused by the key."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.attacks.attack import Attack, lopd
from tests.attacks.changes import ODD_TEXT, Json, Long, dump, file_changes, has_text, json_changes, scalars

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
FRAGMENTS = (
    BOMB,
    "bomb: {" * 2000 + "}" * 2000,
    "[" * 100_000,
    "a: " + "- " * 50_000,
    "teacher: &t {model: *t}\n",
    "seed: &s [*s]\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "seed: 2024-13-45\n",
    "seed: 2024-01-01\n",
    "seed: 2024-01-01T99:99:99Z\n",
    "<<: {seed: 6}\n",
    "<<: [1, 2]\n",
    "<<: *nowhere\n",
    "train:\n  <<: {steps: 7}\n",
    "base: &b {steps: 7}\ntrain: {<<: *b}\n",
    "seed: !!python/object/apply:os.system [touch ../outside/pwned]\n",
    "seed: !!python/name:os.system\n",
    "seed: !!binary aGVsbG8=\n",
    "seed: !!set {a, b}\n",
    "seed: !!omap [a: 1]\n",
    "seed: 0x1F\n",
    "seed: 0o17\n",
    "seed: 1_000\n",
    "seed: 1:30:00\n",
    "seed: 017\n",
    "seed: yes\n",
    "seed: .inf\n",
    "seed: .nan\n",
    "seed: " + "9" * 5000 + "\n",
    "seed: 1e400\n",
    "seed: 1e3\n",
    "seed: \t5\n",
    "seed: 5\nseed: 6\n",
    "1: 2\n",
    "true: 2\n",
    "null: 2\n",
    "3.5: 2\n",
    "---\nseed: 5\n---\nseed: 6\n",
    "%YAML 9.9\n---\nseed: 5\n",
    "\ufeffseed: 5\n",
    "seed: 5\x00\n",
    "se\x1b[31med: 5\n",
    "\u202eseed: 5\n",
    'seed: "\\ud800"\n',
    "teacher: {model: ../outside}\n",
    "teacher: {model: /dev/zero}\n",
    "run_dir: ../outside\n",
    "run_dir: ../outside/secret\n",
    "run_dir: /proc/self\n",
    "run_dir: ~/x\n",
    "run_dir: ${HOME}/x\n",
    'run_dir: "a\\nb"\n',
    "run_dir: " + "d/" * 3000 + "\n",
    'allow_user_code: true\nevaluate: {grader: "os:system"}\n',
    'evaluate: {grader: "os:system"}\n',
    'allow_user_code: true\nevaluate: {grader: "this.is.absent:x"}\n',
    'evaluate: {grader: "../outside/secret:x"}\n',
    "prompts: {opd: {path: /dev/zero}}\n",
    "prompts: {opd: {path: recipe.yaml}}\n",
    "prompts: {opd: {task: arithmetic, count: 99999999999999}}\n",
    "prompts: {eval: {a: {task: arithmetic, count: 3}, b/../../c: {task: arithmetic, count: 3}}}\n",
    'prompts: {eval: {"../../outside": {task: arithmetic, count: 3}}}\n',
)


@dataclass(frozen=True)
class Keyed:
    """The recipe with a value changed, written as JSON, which is YAML."""

    change: Json


@dataclass(frozen=True)
class Written:
    """Text after the recipe's own, or in the place of all of it."""

    text: str
    alone: bool


@dataclass(frozen=True)
class Override:
    """An override of the command line."""

    text: str


@dataclass(frozen=True)
class OnDisk:
    """The file itself."""

    change: Any


KEYS = (
    "seed",
    "run_dir",
    "precision",
    "train.steps",
    "train.optimizer.lr",
    "train.objective",
    "train",
    "sft.steps",
    "sft.data",
    "score.top_k",
    "parallel.tensor",
    "rollout.sampling.temperature",
    "rollout.engine",
    "rollout.engine.name",
    "prompts.eval",
    "prompts.opd.path",
    "evaluate.grader",
    "teacher.model",
    "",
    ".",
    "a..b",
    "seed.x",
    "__class__",
)


class Recipes(Attack[Any]):
    """Every key and type, YAML's corners, and overrides."""

    name = "recipes"
    copies = ("recipe.yaml", "teacher", "student")
    examples = 6

    def changes(self) -> SearchStrategy[Any]:
        likely = st.one_of(
            st.integers(0, 40),
            st.sampled_from([0.5, 1e-3, 1.0, True, False, None, "5", "1e-3", "yes", "fp32", "bf16", "math"]),
            st.sampled_from(
                ["arithmetic", "teacher", "student", "run", "transformers", "constant", "cosine"]
            ),
        )
        places = st.lists(st.integers(0, 30), max_size=4).map(tuple)
        value = st.one_of(
            likely.map(json.dumps),
            scalars.map(lambda each: json.dumps(each)),
            st.sampled_from([*ODD_TEXT, *map(Long, FRAGMENTS)]),
        )
        return st.one_of(
            st.builds(Keyed, json_changes),
            st.builds(
                Keyed, st.builds(Json, places, st.sampled_from(["set", "delete"]), st.just(""), likely)
            ),
            st.builds(Written, st.sampled_from([Long(each) for each in FRAGMENTS]), st.booleans()),
            st.builds(Override, st.builds("{}={}".format, st.sampled_from(KEYS), value)),
            st.builds(Override, st.text(max_size=12)),
            st.builds(OnDisk, file_changes),
        )

    def spoil(self, world: Path, change: Any) -> None:
        path = world / "recipe.yaml"
        if isinstance(change, Keyed):
            written = json.loads(json.dumps(yaml.safe_load(path.read_text())))  # no section is two's any more
            path.write_bytes(dump(change.change.changed(written)))
        elif isinstance(change, Written):
            text = change.text
            if not change.alone:  # in the place of what it says of the same keys
                kept = yaml.safe_load(path.read_text())
                for key in re.findall(r"^(\w+):", text, flags=re.MULTILINE):
                    kept.pop(key, None)
                text = f"{yaml.safe_dump(kept)}\n{text}"
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        elif isinstance(change, OnDisk):
            change.change(path)

    def use(self, world: Path, change: Any) -> str:
        """Every key as it is taken."""
        from megatron_lopd.config import load_recipe, to_plain

        overrides = [change.text] if isinstance(change, Override) else []
        if not (isinstance(change, Override) and change.text.startswith("-")):  # that is an option
            lopd("run", "recipe.yaml", "--dry-run", *overrides)
        recipe = load_recipe("recipe.yaml", overrides)
        written = yaml.safe_load(Path("recipe.yaml").read_text()) if change is None else None
        return json.dumps({"taken": to_plain(recipe), "written": written}, default=repr)

    def allows(self, change: Any, before: str, after: str) -> bool:
        """Each value that was given is there as it was given."""
        plain = json.loads(after)["taken"]
        if isinstance(change, Keyed):
            asked = change.change.changed(json.loads(before)["written"])
        elif isinstance(change, Override):
            key, _, text = change.text.partition("=")
            asked = yaml.safe_load(text) if text else None
            for part in reversed(key.split(".")):
                asked = {part: asked}
        elif isinstance(change, Written):
            try:
                asked = yaml.safe_load(change.text)
            except ValueError:  # a date that is none
                return False
        else:
            return True
        sets = asked["prompts"].get("eval") if isinstance(asked.get("prompts"), dict) else None
        if isinstance(sets, dict) and "eval" not in sets:
            plain["prompts"]["eval"] = plain["prompts"]["eval"].get("eval", plain["prompts"]["eval"])
        return not has_text(asked) and _is_within(asked, plain)


def _is_within(asked: Any, taken: Any) -> bool:
    if isinstance(asked, dict):
        # A set to evaluate on that is given bare is the only one, by the name of its key.
        return isinstance(taken, dict) and all(
            (name in taken and _is_within(value, taken[name]))
            or (value in (None, {}) and not taken.get(name))
            for name, value in asked.items()
        )
    if isinstance(asked, list):
        return isinstance(taken, list) and len(asked) == len(taken) and all(map(_is_within, asked, taken))
    if isinstance(asked, bool) or isinstance(taken, bool):
        return asked is taken
    if isinstance(asked, str) and isinstance(taken, float | int):  # 1e-6 or 1e3, which YAML 1.1 reads as text
        return float(asked) == taken
    if isinstance(asked, str) and isinstance(taken, str) and (home := re.match(r"(~|\$\{HOME\})/", asked)):
        return taken.endswith(f"/home/{asked[home.end() :]}")  # as the attempt's process has it
    return bool(asked == taken)
