from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lopd.cli import main
from megatron_lopd.config import load_recipe
from megatron_lopd.errors import ConfigError
from megatron_lopd.estimate.gpu_kinds import GPUS, GpuCluster, parse_cluster
from megatron_lopd.estimate.hours import PUBLISHED_HOURS, Published, published_hours
from megatron_lopd.estimate.layouts import candidates, own_layout, smallest_layout
from megatron_lopd.estimate.memory import Training
from megatron_lopd.estimate.run_plan import make_plan
from megatron_lopd.families.architecture import check_layout
from megatron_lopd.families.memory_shapes import published

PUBLISHED = published()

RECIPE = "examples/qwen3_8b/recipe.yaml"
MICRO_BATCH = Training(16384, "bf16", fp8=False)


@pytest.mark.parametrize("case", PUBLISHED_HOURS, ids=lambda case: case.student)
def test_published_hours_of_lightning_opd(case: Published) -> None:
    """In sample: one constant, UTILIZATION, is fitted to these two, and README promises 25%."""
    assert sum(published_hours(case).values()) == pytest.approx(case.hours, rel=0.25)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("gpus", ["h100:8", "a100-80g:32", "b200:1"])
def test_the_smallest_layout_can_be_trained(name: str, gpus: str) -> None:
    arch, cluster = PUBLISHED[name], parse_cluster(gpus)
    found = smallest_layout(arch, cluster, MICRO_BATCH, batch=256)
    fitting = [
        layout
        for parallel in candidates(arch, cluster)
        if (layout := own_layout(arch, parallel, cluster, MICRO_BATCH)).fits(cluster)
    ]
    if found is None:
        assert fitting == []
        return
    assert found.memory.total <= cluster.gpu.memory_bytes
    check_layout(arch, found.parallel)  # what build_model asks before it builds
    axes = found.parallel.tensor * found.parallel.pipeline * found.parallel.context
    assert axes * found.data == cluster.count == found.parallel.processes
    assert found.parallel.tensor <= cluster.node_size
    assert axes == min(x.parallel.tensor * x.parallel.pipeline * x.parallel.context for x in fitting)


def test_published_30b_a3b_fits_the_node_it_was_trained_on() -> None:
    """arXiv 2604.13010 trained it on one node of 8 H100s."""
    assert (
        smallest_layout(PUBLISHED["Qwen3-30B-A3B"], GpuCluster(GPUS["h100"], 8), MICRO_BATCH, 256) is not None
    )


def test_the_stages_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE, "--gpus", "h100:8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in plan["stages"]] == ["generate", "sft", "rollout", "score", "train"]
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert stages["rollout"]["work"]["samples"] == 150 * 256
    # One forward and one backward, where the published code makes five thirds of that.
    published = published_hours(PUBLISHED_HOURS[1])
    assert stages["train"]["gpu_hours"] == pytest.approx(published["train"] * 3 / 5)
    assert stages["score"]["gpu_hours"] == pytest.approx(published["score"])
    assert plan["gpu_hours"] == pytest.approx(sum(stage["gpu_hours"] for stage in plan["stages"]))
    assert all(stage["hours"] == stage["gpu_hours"] / 8 for stage in plan["stages"])


def test_a_layer_made_again_costs_a_forward_more() -> None:
    none, full = (
        make_plan(load_recipe(RECIPE, [f"parallel.recompute={kind}"]), parse_cluster("h100:8")).stages[-1]
        for kind in ("none", "full")
    )
    assert full.gpu_hours == pytest.approx(none.gpu_hours * 4 / 3)


def test_a_pipeline_waits_for_its_first_and_last_micro_batches() -> None:
    none, split = (
        make_plan(load_recipe(RECIPE, ["parallel.tensor=1", *axes]), parse_cluster("h100:8")).stages[-1]
        for axes in ([], ["parallel.pipeline=4", "parallel.virtual_pipeline=3"])
    )
    micro_batches = 256 * (150 + 4096) / 16384 / 2
    assert split.gpu_hours / none.gpu_hours == pytest.approx(1 + 3 / (3 * micro_batches))


def test_shorter_responses_take_less_of_everything() -> None:
    recipe, cluster = load_recipe(RECIPE), parse_cluster("h100:8")
    whole, half = (make_plan(recipe, cluster, fill).stages for fill in (1.0, 0.5))
    for one, other in zip(whole, half, strict=True):
        assert 0 < other.gpu_hours < 0.55 * one.gpu_hours  # prompts stay as long as they are


def test_prompts_that_are_here_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "opd.jsonl"
    path.write_text('{"prompt": "%s"}\n' % ("x" * 386) * 10)  # 400 bytes a line
    recipe = load_recipe(RECIPE, [f"prompts.opd.path={path}", "rollout.sampling.samples_per_prompt=3"])
    stages = {stage.name: stage for stage in make_plan(recipe, parse_cluster("h100:8")).stages}
    assert (stages["rollout"].work.samples, stages["rollout"].work.prompt) == (30, 100)
    assert stages["train"].work.samples == 150 * 256


def test_what_the_plan_suggests_fits(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", RECIPE, "--gpus", "h100:8"]
    assert main([*arguments, "parallel.tensor=1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "sft, train: parallel (data 8, recompute none)" in error
    assert "most of it activations" in error
    suggested = error.strip().rsplit(": set ", 1)[1].split()
    assert main([*arguments, "parallel.tensor=1", *suggested]) == 0


@pytest.mark.parametrize(
    ("gpus", "overrides", "expected"),
    [
        ("v100:8", [], "unknown GPU 'v100': use one of a100-80g, h100, h200, b200"),
        ("h100", [], "write the number of GPUs after a colon, as in h100:8"),
        ("h100:12", [], "not whole nodes of 8, nor 1, 2, 4 or 8: use h100:8 or h100:16"),
        ("h100:0", [], "write the number of GPUs"),
        ("h100:2", [], "2 GPUs are not a multiple of 4 (tensor x context x pipeline = 4 x 1 x 1)"),
        (
            "h100:8",
            ["parallel.tensor=16", "parallel.processes=16"],
            "does not divide the model's num_key_value_heads=8",
        ),
        (
            "h100:1",
            ["parallel.tensor=1", "teacher.model=models/Qwen3-8B"],
            "no layout fits; the least, data 1, recompute full, is",
        ),
        (
            "h100:1",
            [],
            "do not fit 1 x h100 (80 GB each): raise generate.engine.tensor, lower max_new_tokens",
        ),
        ("h100:1", ["generate.engine.dtype=fp32"], "generate: the model's 131 GB of fp32 weights"),
        ("a100-80g:8", ["fp8.recipe=tensorwise"], "a100-80g has no FP8"),
        ("h100:8", ["student.model=models/mine"], "models/mine/config.json: no such file"),
        ("h100:8", ["train.steps=", "train.epochs=1"], "prompts.opd: there are no prompts here to count"),
    ],
)
def test_what_cannot_be_planned_says_why_in_one_line(
    gpus: str, overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", RECIPE, "--gpus", gpus, *overrides]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("fill", [0.0, -1.0, 1.5, float("nan")])
def test_fill_is_a_share(fill: float) -> None:
    with pytest.raises(ConfigError, match="--fill"):
        make_plan(load_recipe(RECIPE), parse_cluster("h100:8"), fill)
