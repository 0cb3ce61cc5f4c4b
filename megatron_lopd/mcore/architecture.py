"""What a Hugging Face config.json says of a model, in Megatron-Core's terms, or why it cannot be run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_lopd.config import ParallelConfig
from megatron_lopd.errors import ConfigError

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]

# key of config.json -> the only value that is supported (absent counts as that value)
SUPPORTED_OPTIONS: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "quantization_config": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the rotary frequencies, as in config.json's `rope_type: llama3`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Experts:
    """A Qwen3-MoE feed-forward: `top_k` of `count` experts a token, each `ffn_size` wide.

    `normalize_top_k`: the chosen experts' probabilities are made to sum to 1.
    """

    count: int
    top_k: int
    ffn_size: int
    normalize_top_k: bool


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: sizes count features, heads, layers, positions or vocabulary entries."""

    family: Family
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

    def padded_vocab_size(self, tp_size: int) -> int:
        """The vocabulary rounded up to a multiple of the tensor parallel size."""
        return math.ceil(self.vocab_size / tp_size) * tp_size


def read_architecture(hf_dir: str | Path) -> Architecture:
    """Read `hf_dir`/config.json, with the defaults transformers has for the keys it leaves out.

    Raises ConfigError naming the file and the key for a model family or an option that is not supported.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig  # takes seconds, and most of this package does not need it

    path = Path(hf_dir) / "config.json"
    family = _read_family(path)
    try:
        config = AutoConfig.from_pretrained(hf_dir)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: transformers does not accept it: {reason}") from error
    for size in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ):
        if getattr(config, size) < 1:
            raise ConfigError(f"{path}: {size} is {getattr(config, size)}: it must be at least 1")
    for option, supported in SUPPORTED_OPTIONS.items():
        value = getattr(config, option, supported)
        if value != supported and value is not None:
            raise ConfigError(f"{path}: {option}={value!r} is not supported, only {supported!r} is")
    return Architecture(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        init_std=config.initializer_range,
        tied=config.tie_word_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        rope_theta=float(config.rope_parameters["rope_theta"]),
        rope_scaling=_read_rope_scaling(path, config.rope_parameters),
        experts=_read_experts(path, config) if family == "qwen3_moe" else None,
    )


def _read_family(path: Path) -> Family:
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there: give a Hugging Face checkpoint directory") from error
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a JSON object: {error}") from error
    if model_type not in get_args(Family):
        raise ConfigError(
            f"{path}: model_type={model_type!r} is not supported, only {', '.join(get_args(Family))} are"
        )
    family: Family = model_type
    return family


def _read_rope_scaling(path: Path, rope: dict[str, Any]) -> RopeScaling | None:
    rope_type = rope.get("rope_type", "default")
    rotated = rope.get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        raise ConfigError(f"{path}: partial_rotary_factor={rotated} is not supported, only 1.0 is")
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise ConfigError(
            f"{path}: rope_type={rope_type!r} (rope_parameters, or rope_scaling in older files) is not "
            "supported, only 'default' and 'llama3' are"
        )
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
    )


def _read_experts(path: Path, config: Any) -> Experts:
    if config.norm_topk_prob and config.num_experts_per_tok == 1:
        raise ConfigError(
            f"{path}: norm_topk_prob=True with num_experts_per_tok=1 trains no router: set it to false"
        )
    return Experts(
        count=config.num_experts,
        top_k=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        normalize_top_k=config.norm_topk_prob,
    )


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
