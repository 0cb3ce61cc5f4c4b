"""A stage that was cut off, with anything beside what it has made: the same artifact, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from megatron_lopd.errors import LopdError
from tests.attacks.attack import Attack, lopd
from tests.attacks.changes import SPECIALS, CopyOf, Stand, Whole, byte_changes, json_changes

STAGES = ("generate", "sft", "rollout", "score", "train", "export", "evaluate", "report")
JSON = ("plan.json", "timing.json")
# Those whose content is as good as any, while nothing is committed: not what a digest can be held to.
CURVES = ("metrics.jsonl",)
# What later stages read.
READ = (
    "../rollout/manifest.json",
    "../rollout/rollouts-00001.arrow",
    "../rollout/rollouts-00003.arrow",
    "../score/scores-00001.arrow",
    "../score/scores-00003.arrow",
    "../generate/rollouts-00002.arrow",
    "../generate/rollouts-00003.arrow",
    "../generate/tokenizer/tokenizer.json",
    "../generate/tokenizer/tokenizer_config.json",
    "../generate/tokenizer/added_tokens.json",
    "../sft/manifest.json",
    "../sft/model/model.safetensors",
    "../sft/model/config.json",
    "../sft/model/tokenizer_config.json",
    "../sft/model/added_tokens.json",
    "../sft/model/chat_template.jinja",
    "../sft/model/generation_config.json",
    "../sft/model/model.safetensors.index.json",
    "../sft/model/lopd_lineage.json",
    "../train/checkpoints/step_00000005/__0_0.distcp",
    "../train/checkpoints/step_00000005/manifest.json",
)
# Whole files that are not what they stand for.
OTHERS = (
    "run/generate/rollouts-00000.arrow",
    "run/rollout/rollouts-00000.arrow",
    "run/score/scores-00000.arrow",
    "student/model.safetensors",
    "teacher/config.json",
    "run/rollout/manifest.json",
    "run/train/checkpoints/step_00000004/__0_0.distcp",
)
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
    *READ,
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
        path = Path(os.path.normpath(world / "run" / self.stage / self.file))
        if path.is_file() or isinstance(self.change, Stand | Whole | CopyOf):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and isinstance(self.change, Whole):
                shutil.rmtree(path)
            self.change(path)


def committed(world: Path, stage: str) -> dict[str, str]:
    """The digests of what a stage has made, by file."""
    files = json.loads((world / "run" / stage / "manifest.json").read_text())["files"]
    return {name: entry["blake3"] for name, entry in files.items() if name not in CURVES}


class Begun(Attack[Beside]):
    """Plans, locks, claims, shards, checkpoints, temporaries: torn, forged, or links to somewhere else."""

    name = "begun stages"
    examples = 2

    def changes(self) -> SearchStrategy[Beside]:
        stage = st.sampled_from([each for each in STAGES if each != "report"])
        copies = st.builds(CopyOf, st.sampled_from(OTHERS))
        special = st.builds(Stand, st.sampled_from(SPECIALS))
        return st.one_of(
            st.builds(Beside, stage, st.sampled_from(BESIDE), special),
            st.builds(Beside, stage, st.sampled_from(BESIDE), byte_changes),
            st.builds(Beside, stage, st.sampled_from(READ), st.one_of(byte_changes, copies)),
            st.builds(Beside, stage, st.sampled_from(JSON), json_changes),
        )

    def spoil(self, world: Path, change: Beside) -> None:
        change(world)

    def use(self, world: Path, change: Beside | None) -> str:
        """What every stage has made, the one that was cut off among them."""
        if change is not None:
            lopd("status", "recipe.yaml")
            lopd("run", "recipe.yaml", "--dry-run")
            lopd(change.stage, "recipe.yaml")
        with suppress(LopdError):  # what came before it may not be what it was
            lopd("verify", "run")
        return json.dumps({stage: committed(world, stage) for stage in STAGES})

    def allows(self, change: Beside, before: str, after: str) -> bool:
        return json.loads(after)[change.stage] == json.loads(before)[change.stage]
