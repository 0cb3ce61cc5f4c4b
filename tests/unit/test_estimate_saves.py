"""What `lopd plan` says of checkpoints. Against real ranks: tests/dist/test_save_shares.py."""

from __future__ import annotations

import json

import pytest

from megatron_lopd.cli import main
from megatron_lopd.config import ParallelConfig
from megatron_lopd.estimate.memory import Training
from megatron_lopd.estimate.saves import save_estimate
from megatron_lopd.families.memory_shapes import published

PUBLISHED = published()

BF16 = Training(16384, "bf16", fp8=False)


def test_qwen3_8b_at_tp4_dp2_holds_a_step_up_for_less_than_five_seconds() -> None:
    parallel = ParallelConfig(tensor=4, sequence=True, processes=8)
    save = save_estimate(PUBLISHED["Qwen3-8B"], parallel, 8, 8, BF16)
    # 8.19e9 weights of 14 bytes over 8 ranks, and a quarter of a percent of norms and padding.
    assert save.rank_bytes == pytest.approx(8.19e9 * 14 / 8, rel=0.01)
    assert save.node_bytes == 8 * save.rank_bytes
    assert save.gpu_bytes == 0
    assert save.rank_bytes / 10e9 < save.blocked_seconds < 5


def test_the_plan_says_what_a_checkpoint_takes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "examples/qwen3_8b/recipe.yaml", "--gpus", "h100:8"]
    assert main([*arguments, "--json"]) == 0
    saves = {part["stage"]: part["save"] for part in json.loads(capsys.readouterr().out)["training"]}
    assert saves.keys() == {"sft", "train"}
    for save in saves.values():
        assert save["blocked_seconds"] < 5
        assert save["node_bytes"] == 8 * save["rank_bytes"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    gigabytes = f"{saves['train']['rank_bytes'] / 1e9:.1f}"
    lines = shown.split("a checkpoint:")[1].splitlines()[2:4]
    assert [line.split()[:2] for line in lines] == [["sft", gigabytes], ["train", gigabytes]]
