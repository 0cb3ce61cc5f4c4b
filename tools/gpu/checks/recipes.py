"""Whole runs, from generate to report, as `lopd run` makes them."""

from __future__ import annotations

import json
import time
from pathlib import Path

from megatron_lopd.mcore import compat
from megatron_lopd.mcore.capabilities import capabilities
from tools.gpu import device
from tools.gpu.context import CheckFailed, LeftOut, Part
from tools.gpu.recipes import run_stages, write_recipe

ROOT = Path(__file__).parents[3]
# Bytes of GPU memory: 0.6 G weights in training, 18 bytes each, and micro-batches of 8,192 tokens.
NEEDED = 25e9
# Of five seeds on a CPU the least was 95.4 % (README), with a standard error below 1 of 2,048 problems.
LEAST_ACCURACY = 0.93


def bf16(part: Part) -> None:
    """A 0.6B run, layers in bf16."""
    device.open_device(part)
    device.need_memory(NEEDED, "quickstart is a run that fits any GPU")
    recipe = write_recipe(part.scratch, part.toy)
    device.release()
    _run(part, recipe)


def fp8(part: Part) -> None:
    """The same, trained in FP8."""
    device.open_device(part)
    compat.prepare()
    if reason := capabilities().fp8["tensorwise"]:
        raise LeftOut(f"needs FP8 tensorwise: {reason}")
    device.need_memory(NEEDED, "quickstart is a run that fits any GPU")
    recipe = write_recipe(part.scratch, part.toy, fp8={"recipe": "tensorwise"})
    device.release()
    _run(part, recipe)


def quickstart(part: Part) -> None:
    """examples/quickstart, whose accuracy is known."""
    short = [f"prompts.{name}.count=32" for name in ("sft", "opd", "eval")]
    short += ["sft.steps=2", "sft.optimizer.warmup_steps=1", "sft.global_batch_size=16"]
    short += ["train.steps=2", "train.global_batch_size=16"]
    overrides = [f"run_dir={part.scratch / 'run'}", *(short if part.toy else [])]
    _run(part, ROOT / "examples" / "quickstart" / "recipe.yaml", *overrides)
    summary = json.loads((part.scratch / "run" / "report" / "summary.json").read_text(encoding="utf-8"))
    (found,) = summary["accuracy"].values()
    sft, opd = found["sft"]["sampled"], found["lightning_opd"]["sampled"]
    part.figure("accuracy", sft=sft, lightning_opd=opd, lineage=summary["lineage"])
    if not part.toy and not (opd > sft and opd >= LEAST_ACCURACY):
        raise CheckFailed(f"accuracy is {sft:.1%} after SFT, {opd:.1%} after OPD")


def _run(part: Part, recipe: Path, *overrides: str) -> None:
    began = time.monotonic()
    for stage, seconds in run_stages(recipe, *overrides):
        part.figure(stage, seconds=seconds)
    part.figure("whole run", seconds=time.monotonic() - began)
