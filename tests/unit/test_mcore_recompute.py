"""What `parallel.recompute` makes again, and where it is refused."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from gloo import run_ranks

from megatron_lopd.config import Fp8Config, ParallelConfig, Recompute
from megatron_lopd.errors import ConfigError
from megatron_lopd.estimate.hours import TokenWork, forward_flops, training_flops
from megatron_lopd.estimate.memory import Training, layer_activations, training_memory
from megatron_lopd.families.memory_shapes import published
from megatron_lopd.mcore.model import transformer_config
from megatron_lopd.mcore.recompute import check_recompute, recompute_options
from tests.machines import fake_kernels
from tests.model_zoo import make_model_dir

PUBLISHED = published()

DENSE, EXPERTS = PUBLISHED["Qwen3-8B"], PUBLISHED["Qwen3-30B-A3B"]
# A layer's parts, and how often each runs in one forward and backward.
RUNS: dict[str, dict[str, dict[str, int]]] = {
    "qwen3": {
        "none": {"self_attention.core_attention": 1, "mlp": 1},
        "core_attn": {"self_attention.core_attention": 2, "mlp": 1},
        "mlp": {"self_attention.core_attention": 1, "mlp": 2},
        "selective": {"self_attention.core_attention": 1, "mlp": 2},
        "full": {"self_attention.core_attention": 2, "mlp": 2},
    },
    "qwen3_moe": {
        "moe": {"self_attention.core_attention": 1, "mlp.router": 2},
        "selective": {"self_attention.core_attention": 1, "mlp.router": 2},
    },
}


@pytest.mark.parametrize("family", RUNS)
def test_the_named_part_of_every_layer_runs_twice(tmp_path: Path, family: Any) -> None:
    make_model_dir(tmp_path / "model", family)
    (seen,) = run_ranks(1, _count_runs, tmp_path / "model", RUNS[family])
    assert seen == RUNS[family]


def _count_runs(model_dir: Path, wanted: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    import torch

    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.process_groups import model_parallel

    found = {}
    arch = read_architecture(model_dir)
    tokens = torch.arange(1, 9)
    for kind, parts in wanted.items():
        parallel = ParallelConfig(recompute=kind)  # type: ignore[arg-type]
        with model_parallel(parallel, seed=0):
            (model,) = build_model(arch, parallel, "fp32")
            runs: Counter[str] = Counter()
            for number, layer in enumerate(model.decoder.layers):
                for part in parts:
                    count = partial(_count, runs, f"{number} {part}")
                    layer.get_submodule(part).register_forward_hook(count)
            ends = torch.tensor([0, 8], dtype=torch.int32)
            model(tokens, torch.arange(8), ends, 8).sum().backward()
        found[kind] = {part: runs[f"0 {part}"] for part in parts}
        assert all(runs[f"{number} {part}"] == runs[f"0 {part}"] for number in (0, 1) for part in parts)
    return found


def _count(runs: Counter[str], name: str, *unused: Any) -> None:
    runs[name] += 1


def test_megatron_core_takes_every_choice_and_warns_of_none_but_core_attn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU with Transformer Engine."""
    fake_kernels(monkeypatch)
    expected = {"selective": ("mlp", "moe_act"), "core_attn": ("core_attn", "core_attn")}
    for arch, at in ((DENSE, 0), (EXPERTS, 1)):
        for kind in get_args(Recompute):
            parallel = ParallelConfig(recompute=kind)
            try:
                check_recompute(arch, parallel, None, grouped=True)
            except ConfigError:
                continue
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                config = transformer_config(arch, parallel, "bf16")
            if kind not in ("none", "full"):
                assert config.recompute_modules == [expected.get(kind, (kind, kind))[at]]
            assert ("core_attn" in str([each.message for each in warned])) == (kind == "core_attn")


@pytest.mark.parametrize(
    ("arch", "kind", "fp8", "grouped", "message"),
    [
        (DENSE, "moe", None, True, r"parallel\.recompute=moe: a qwen3 model has no experts: set .* to mlp"),
        (DENSE, "moe_act", None, True, "has no experts"),
        (EXPERTS, "mlp", None, True, "a qwen3_moe model's are experts: set .* to moe_act or moe"),
        (EXPERTS, "moe_act", None, False, "takes Transformer Engine's grouped experts"),
        (EXPERTS, "moe_act", Fp8Config("delayed"), True, r"not with fp8\.recipe=delayed"),
    ],
)
def test_a_part_that_the_layers_do_not_have_is_refused(
    arch: Any, kind: Any, fp8: Fp8Config | None, grouped: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_recompute(arch, ParallelConfig(recompute=kind), fp8, grouped=grouped)
    check_recompute(arch, ParallelConfig(recompute="selective"), fp8, grouped=grouped)


def test_selective_follows_the_machine_and_the_scaling() -> None:
    selective = ParallelConfig(recompute="selective")
    for grouped, fp8, part in (
        (True, None, "moe_act"),
        (True, Fp8Config("tensorwise"), "moe_act"),
        (True, Fp8Config("delayed"), "moe"),
        (False, None, "moe"),
    ):
        options = recompute_options(EXPERTS, selective, fp8, grouped=grouped)
        assert options == {"recompute_granularity": "selective", "recompute_modules": [part]}


def test_what_is_made_again_is_not_kept_and_takes_time() -> None:
    """By hand, of bf16: a token's gate, up and product in a dense layer, and the norm before them."""
    training, work = Training(16384, "bf16", fp8=False), TokenWork(10, 100, 900)
    experts = EXPERTS.experts
    assert experts is not None
    spared = {
        "mlp": 2 * (3 * DENSE.ffn_size + DENSE.hidden_size),
        "moe_act": 2 * experts.top_k * experts.ffn_size,
        "moe": 2 * (experts.top_k * (2 * EXPERTS.hidden_size + 3 * experts.ffn_size) + 2 * experts.count),
        "core_attn": 0,
    }
    for kind, bytes_spared in spared.items():
        arch = EXPERTS if kind.startswith("moe") else DENSE
        none, some, full = (
            training_memory(arch, ParallelConfig(recompute=each), 1, training).activations  # type: ignore[arg-type]
            for each in ("none", kind, "full")
        )
        # All layers but the one that is at it.
        assert none - some == (arch.num_layers - 1) * bytes_spared * training.tokens
        assert full < some
        again = training_flops(arch, work, ParallelConfig(recompute=kind)) - 3 * forward_flops(arch, work)  # type: ignore[arg-type]
        assert (again > 0) == (kind != "moe_act")
        assert again < forward_flops(arch, work)
    assert layer_activations(DENSE, ParallelConfig(recompute="mlp"), training) == layer_activations(
        DENSE, ParallelConfig(), training
    )
    tied = replace(DENSE, ffn_size=0)
    products = 2 * 3 * DENSE.hidden_size * DENSE.ffn_size * DENSE.num_layers * 10_000
    extra = training_flops(DENSE, work, ParallelConfig(recompute="mlp")) - 3 * forward_flops(DENSE, work)
    assert extra == products == forward_flops(DENSE, work) - forward_flops(tied, work)
