"""A stage that was cut off, with anything beside what it has made: the same artifact, or a refusal."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.attacks.attack import Attack, lopd
from tests.attacks.changes import SPECIALS, Stand, Whole, byte_changes, json_changes

STAGES = ("generate", "sft", "rollout", "score", "train", "export", "evaluate", "report")
JSON = ("plan.json", "timing.json")
# Those whose content is as good as any, while nothing is committed: not what a digest can be held to.
CURVES = ("metrics.jsonl",)
BESIDE = (
    *JSON,
    *CURVES,
    ".lock",
    "manifest.json",
    ".claims",
    ".claims/rollouts-00000.arrow",
    ".claims/rollouts-00000.arrow.0",
    ".claims/scores-00001.arrow.1",
    "tokenizer",
    "tokenizer/tokenizer.json",
    "tensorboard",
    "checkpoints",
    "checkpoints/step_00000009",
    "checkpoints/step_00000005",
    "checkpoints/step_00000005.bak",
    "checkpoints/step_00000005/manifest.json",
    "checkpoints/step_00000005/.metadata",
    "checkpoints/step_00000005/common.pt",
    "checkpoints/step_00000005/__0_0.distcp",
    "rollouts-00000.arrow",
    "rollouts-00001.arrow",
    "rollouts-00007.arrow",
    "scores-00001.arrow",
    "model",
    "model/config.json",
    "model/lopd_lineage.json",
    "model/model.safetensors",
    "hf",
    "hf/config.json",
    "sft",
    "sft/eval/greedy/rollouts-00000.arrow",
    "results.json",
    "index.html",
    "summary.json",
    ".tmp-0123-rollouts-00000.arrow",
    ".tmp-step_00000005",
)


@dataclass(frozen=True)
class Beside:
    """The stage was cut off before its commit, and a file of its directory was changed."""

    stage: str
    file: str
    change: Any

    def __call__(self, world: Path) -> None:
        (world / "run" / self.stage / "manifest.json").unlink()
        path = world / "run" / self.stage / self.file
        if path.is_file() or isinstance(self.change, Stand | Whole):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and isinstance(self.change, Whole):
                shutil.rmtree(path)
            self.change(path)


class Begun(Attack[Beside]):
    """Plans, locks, claims, shards, checkpoints, temporaries: torn, forged, or links to somewhere else."""

    name = "begun stages"
    examples = 10

    def changes(self) -> SearchStrategy[Beside]:
        stage = st.sampled_from([each for each in STAGES if each != "report"])
        special = st.builds(Stand, st.sampled_from(SPECIALS))
        return st.one_of(
            st.builds(Beside, stage, st.sampled_from(BESIDE), special),
            st.builds(Beside, stage, st.sampled_from(BESIDE), byte_changes),
            st.builds(Beside, stage, st.sampled_from(JSON), json_changes),
        )

    def spoil(self, world: Path, change: Beside) -> None:
        change(world)

    def use(self, world: Path, change: Beside | None) -> str:
        """What was made: the digest of every file of the stage's manifest, by name."""
        made = {}
        for stage in STAGES if change is None else (change.stage,):
            if change is None:
                (world / "run" / stage / "manifest.json").unlink()
            lopd("status", "recipe.yaml")
            lopd("run", "recipe.yaml", "--dry-run")
            lopd(stage, "recipe.yaml")
            files = json.loads((world / "run" / stage / "manifest.json").read_text())["files"]
            made[stage] = {name: entry["sha256"] for name, entry in files.items() if name not in CURVES}
        lopd("verify", "run")
        return json.dumps(made, sort_keys=True)

    def allows(self, change: Beside, before: str, after: str) -> bool:
        return json.loads(after)[change.stage] == json.loads(before)[change.stage]
