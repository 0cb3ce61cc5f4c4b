from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from megatron_lopd.cli import main
from megatron_lopd.config import ParallelConfig, Recompute, load_recipe
from megatron_lopd.errors import ConfigError
from megatron_lopd.estimate.gpu_kinds import GPUS, GpuCluster, parse_cluster
from megatron_lopd.estimate.hours import PUBLISHED_HOURS, TokenWork, forward_flops, published_hours
from megatron_lopd.estimate.layouts import RECOMPUTE, own_layout, smallest_layout
from megatron_lopd.estimate.memory import Training
from megatron_lopd.estimate.run_plan import make_plan
from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.memory_shapes import Shape, published

PUBLISHED = published()

RECIPE = "examples/qwen3_8b/recipe.yaml"
MICRO_BATCH = Training(16384, "bf16", fp8=False)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.6B", 0.44), ("1.7B", 1.4), ("4B", 3.6), ("8B", 6.95), ("14B", 13.2), ("32B", 31.2)],
)
def test_a_token_costs_two_flops_for_each_weight_that_the_model_cards_count(
    name: str, billions: float
) -> None:
    """Their "non-embedding parameters"; of one token, which attends to itself alone, and no output layer."""
    flops = forward_flops(PUBLISHED[f"Qwen3-{name}"], TokenWork(1, prompt=1, response=0))
    assert flops / 2e9 == pytest.approx(billions, rel=0.03)  # two digits are printed


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("gpus", ["h100:8", "a100-80g:32", "b200:1"])
def test_the_smallest_layout_can_be_trained(name: str, gpus: str) -> None:
    """Against every split there is into powers of two, each asked for by itself."""
    arch, cluster = PUBLISHED[name], parse_cluster(gpus)
    found = smallest_layout(arch, cluster, MICRO_BATCH, batch=256)
    fewest = min(
        (
            tensor * pipeline * context
            for tensor, pipeline, context, expert in product((1, 2, 4, 8), *[(1, 2, 4, 8, 16, 32)] * 3)
            if expert == 1 or arch.experts
            for recompute in RECOMPUTE
            if fits(arch, cluster, tensor, pipeline, context, expert, recompute)
        ),
        default=None,
    )
    axes = None
    if found is not None:
        axes = found.parallel.tensor * found.parallel.pipeline * found.parallel.context
        assert found.fits(cluster)
        assert axes * found.data == cluster.count == found.parallel.processes
    assert axes == fewest


def fits(
    arch: Architecture,
    cluster: GpuCluster,
    tensor: int,
    pipeline: int,
    context: int,
    expert: int,
    recompute: Recompute,
) -> bool:
    """Whether the cluster's GPUs hold that split; False where there is none such."""
    if tensor * pipeline * context > cluster.count or tensor > cluster.node_size:
        return False
    try:
        parallel = ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=expert,
            expert_tensor=1 if arch.experts else None,
            recompute=recompute,
            processes=cluster.count,
        )
        return own_layout(arch, parallel, cluster, MICRO_BATCH).fits(cluster)
    except ConfigError:
        return False


@pytest.mark.parametrize(
    ("name", "gpus"), [("Qwen3-8B", "h100:1"), ("Qwen3-32B", "b200:1"), ("Qwen3-32B", "h100:4")]
)
def test_weights_and_their_state_that_fill_all_gpus_fit_no_layout(name: str, gpus: str) -> None:
    """By hand: a weight's bf16, fp32 gradient, master and two moments are 18 bytes, wherever they are."""
    cluster = parse_cluster(gpus)
    assert 18 * Shape(PUBLISHED[name]).parameters > cluster.count * cluster.gpu.memory_bytes
    assert smallest_layout(PUBLISHED[name], cluster, MICRO_BATCH, batch=256) is None


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


def test_the_teacher_s_evaluation_is_planned_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["prompts.eval={aime: {task: arithmetic, count: 30}}", "evaluate.sampling.max_new_tokens=4096"]
    sets += ["evaluate.sampling.samples_per_prompt=3", "evaluate.engine.dtype=bf16"]
    plans = [
        make_plan(load_recipe(RECIPE, [*sets, f"evaluate.teacher={asked}"]), parse_cluster("h100:8"))
        for asked in ("false", "true")
    ]
    without, with_teacher = (
        {stage.model: stage for stage in plan.stages if stage.name == "evaluate"} for plan in plans
    )
    assert list(without) == ["student"]
    assert with_teacher["student"] == without["student"]
    assert with_teacher["student"].work.samples == 2 * 30 * 4
    assert with_teacher["teacher"].work.samples == 30 * 4
    assert with_teacher["teacher"].gpu_hours > without["student"].gpu_hours / 2  # 32B for 8B
    said = "evaluate: 1 teacher model x 30 prompts x 4 answers, 3 sampled and 1 greedy"
    assert [said in plan.assumptions for plan in plans] == [False, True]
    # The table says what its hours are, and which of them published figures count.
    assert main(["plan", RECIPE, "--gpus", "h100:8", *sets, "evaluate.teacher=true"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (total,) = (line for line in lines if line[:1] == ["total"])
    (distillation,) = (line for line in lines if line[:2] == ["of", "it"])
    assert [line for line in lines if line[:3] == ["work", "(GPU-hours:", "of"]]
    hours = {stage.name: stage.gpu_hours for stage in plans[1].stages}
    assert float(distillation[-3]) == pytest.approx(
        hours["rollout"] + hours["score"] + hours["train"], abs=0.06
    )
    assert float(total[-3]) == pytest.approx(8 * float(total[-2]), rel=0.01)


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
            "do not fit 1 x h100 (80 GB each): raise generate.engine.vllm.tensor, lower max_new_tokens",
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
