"""What a model is, in Megatron-Core's terms, and whether a layout can split it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_lopd.config import ParallelConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.families.config_json import ConfigJson
from megatron_lopd.registry import FAMILIES


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the rotary frequencies, as in config.json's `rope_type: llama3`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Experts:
    """A mixture-of-experts feed-forward: `top_k` of `count` experts a token, each `ffn_size` wide.

    `normalize_top_k`: the chosen experts' probabilities are made to sum to 1.
    """

    count: int
    top_k: int
    ffn_size: int
    normalize_top_k: bool


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: sizes count features, heads, layers, positions or vocabulary entries.

    A family whose config.json says more has a subclass of this with fields of its own.
    """

    family: str  # its name in registry.FAMILIES: config.json's model_type
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    init_std: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: RopeScaling | None
    experts: Experts | None
    rotary_share: float = 1.0  # of a head's features, the first ones, that rotate

    def padded_vocab_size(self, tp_size: int) -> int:
        """The vocabulary rounded up to a multiple of the tensor parallel size."""
        return math.ceil(self.vocab_size / tp_size) * tp_size


def read_architecture(hf_dir: str | Path) -> Architecture:
    """Read `hf_dir`/config.json as the family that its `model_type` names reads it.

    Raises ConfigError naming the file and the key for a family that this process does not know, an option
    that the family does not support, or a value that is none.
    """
    config = ConfigJson.of(hf_dir)
    name, known = config.raw.get("model_type"), FAMILIES.things()
    if name not in known:
        raise ConfigError(
            f"{config.path}: model_type={name!r} is not supported, only {', '.join(known)} are: write a "
            "family for it in a file of yours, and name it as student.family or teacher.family, module:NAME"
        )
    arch: Architecture = known[name].read(config)
    return arch


def check_layout(arch: Architecture, parallel: ParallelConfig) -> None:
    """Raise ConfigError, saying which number must change and to what, unless `parallel` can split `arch`."""
    split_by_tensor = {
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        **({} if arch.experts else {"intermediate_size": arch.ffn_size}),
    }
    tensor_sizes = _divisors(math.gcd(*split_by_tensor.values()))
    for name, size in split_by_tensor.items():
        if size % parallel.tensor:
            raise ConfigError(
                f"parallel.tensor={parallel.tensor} does not divide the model's {name}={size}: "
                f"set parallel.tensor to {_either(tensor_sizes)}"
            )
    _check_stages(arch.num_layers, parallel)
    rows = arch.padded_vocab_size(parallel.tensor) // parallel.tensor
    if arch.vocab_size <= rows * (parallel.tensor - 1):
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} leaves a rank with nothing of the model's vocab_size="
            f"{arch.vocab_size}: set parallel.tensor to 1"
        )
    if arch.experts:
        _check_experts(arch.experts, parallel)
    elif parallel.expert > 1 or parallel.expert_tensor not in (None, parallel.tensor):
        raise ConfigError(
            f"parallel.expert={parallel.expert} and parallel.expert_tensor={parallel.expert_tensor_size} "
            f"split experts, and a {arch.family} model has none: set parallel.expert to 1 and leave "
            "parallel.expert_tensor empty"
        )


def _check_experts(experts: Experts, parallel: ParallelConfig) -> None:
    if experts.count % parallel.expert:
        raise ConfigError(
            f"parallel.expert={parallel.expert} does not divide the model's num_experts={experts.count}: "
            f"set parallel.expert to {_either(_divisors(experts.count))}"
        )
    if experts.ffn_size % parallel.expert_tensor_size:
        raise ConfigError(
            f"parallel.expert_tensor={parallel.expert_tensor_size} (parallel.tensor, where it is empty) does "
            f"not divide the model's moe_intermediate_size={experts.ffn_size}: set parallel.expert_tensor to "
            f"{_either(_divisors(experts.ffn_size))}"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"parallel.sequence=false does not go with experts at parallel.tensor={parallel.tensor}: "
            "set parallel.sequence to true"
        )


def _check_stages(layers: int, parallel: ParallelConfig) -> None:
    """Each pipeline rank's chunks must hold equally many layers."""
    if layers % parallel.pipeline:
        raise ConfigError(
            f"parallel.pipeline={parallel.pipeline} does not divide the model's num_hidden_layers="
            f"{layers}: set parallel.pipeline to {_either(_divisors(layers))}"
        )
    on_a_rank = layers // parallel.pipeline
    if on_a_rank % parallel.virtual_pipeline:
        raise ConfigError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} does not divide the {on_a_rank} layers "
            f"of a pipeline rank (num_hidden_layers={layers}, parallel.pipeline={parallel.pipeline}): "
            f"set parallel.virtual_pipeline to {_either(_divisors(on_a_rank))}"
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _either(choices: list[int]) -> str:
    return " or ".join(str(choice) for choice in choices)
