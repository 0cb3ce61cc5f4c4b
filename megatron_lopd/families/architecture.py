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

    As JSON: importing transformers takes seconds, in each rank of a job, and nothing else in training needs
    it. Raises ConfigError naming the file and the key for a model family or an option that is not supported,
    or a value that is none.
    """
    path = Path(hf_dir) / "config.json"
    raw = _read_json(path)
    family: Any = raw.get("model_type")
    if family not in get_args(Family):
        raise ConfigError(
            f"{path}: model_type={family!r} is not supported, only {', '.join(get_args(Family))} are"
        )
    for option, supported in SUPPORTED_OPTIONS.items():
        if raw.get(option) not in (None, supported):
            raise ConfigError(f"{path}: {option}={raw[option]!r} is not supported, only {supported!r} is")
    values = _Values(path, raw)
    hidden, heads = values.count("hidden_size"), values.count("num_attention_heads")
    if raw.get("head_dim") is None and family != "qwen3" and hidden % heads:
        raise ConfigError(f"{path}: hidden_size={hidden} does not divide by num_attention_heads={heads}")
    positions = values.count("max_position_embeddings", 2048 if family == "llama" else 32768)
    rope = _rope_of(path, raw)
    return Architecture(
        family=family,
        num_layers=values.count("num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=values.count("intermediate_size"),
        num_heads=heads,
        num_kv_heads=values.count("num_key_value_heads", heads if family == "llama" else None),
        head_dim=values.count("head_dim", 128 if family == "qwen3" else hidden // heads),
        vocab_size=values.count("vocab_size"),
        max_positions=positions,
        norm_eps=values.number("rms_norm_eps", 1e-6),
        init_std=values.number("initializer_range", 0.02),
        tied=values.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        rope_theta=_Values(path, {"rope_theta": raw.get("rope_theta")} | rope).number("rope_theta", 1e4),
        rope_scaling=_rope_scaling(path, rope, positions),
        experts=_experts(values) if family == "qwen3_moe" else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there: give a Hugging Face checkpoint directory") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a JSON object, but {type(raw).__name__}")
    return raw


@dataclass(frozen=True)
class _Values:
    """The values of a config.json by kind; one that is absent or null has the default, where there is one."""

    path: Path
    raw: dict[str, Any]

    def count(self, key: str, default: int | None = None) -> int:
        """Raises ConfigError unless it is a whole number of at least 1."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._refusal(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Raises ConfigError unless it is a number of at least 0."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise self._refusal(key, "a number of at least 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """False by default. Raises ConfigError unless it is true or false."""
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise self._refusal(key, "true or false")
        return value

    def _value(self, key: str, default: object) -> object:
        value = self.raw.get(key)
        return default if value is None else value

    def _refusal(self, key: str, wanted: str) -> ConfigError:
        found = repr(self.raw[key]) if key in self.raw else "missing"
        return ConfigError(f"{self.path}: {key} is {found}: it must be {wanted}")


def _rope_of(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The rotary options: transformers 5 writes `rope_parameters`, older ones `rope_scaling` or nothing."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(
            f"{path}: rope_parameters={rope!r} is not supported, only one set for all layers is"
        )
    return rope


def _rope_scaling(path: Path, rope: dict[str, Any], positions: int) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
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
    values = _Values(path, rope)
    return RopeScaling(
        factor=values.number("factor"),
        low_freq_factor=values.number("low_freq_factor"),
        high_freq_factor=values.number("high_freq_factor"),
        original_max_position_embeddings=values.count("original_max_position_embeddings", positions),
    )


def _experts(values: _Values) -> Experts:
    experts = Experts(
        # transformers 5 writes the second name, the published files have the first.
        count=values.count("num_experts" if "num_experts" in values.raw else "num_local_experts", 128),
        top_k=values.count("num_experts_per_tok", 8),
        ffn_size=values.count("moe_intermediate_size", 768),
        normalize_top_k=values.flag("norm_topk_prob"),
    )
    if experts.normalize_top_k and experts.top_k == 1:
        raise ConfigError(
            f"{values.path}: norm_topk_prob=True with num_experts_per_tok=1 trains no router: set it to false"
        )
    return experts


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
