"""A model's shape from its config.json, read as JSON: importing transformers takes longer than a plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore.architecture import SUPPORTED_OPTIONS, Architecture, Experts, Family

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class Shape:
    """A model's architecture. `assumed`: why it is from the table below; None where config.json was read."""

    arch: Architecture
    assumed: str | None = None

    @property
    def parameters(self) -> int:
        """Every weight of the Hugging Face model, tied ones once (count)."""
        arch = self.arch
        embeddings = (1 if arch.tied else 2) * arch.vocab_size * arch.hidden_size
        return embeddings + arch.hidden_size + arch.num_layers * (layer_dense(arch) + layer_experts(arch))


def layer_dense(arch: Architecture) -> int:
    """Weights of a decoder layer outside its experts, norms, biases and router among them (count)."""
    inner, groups = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    attention = arch.hidden_size * (2 * inner + 2 * groups)
    bias = inner + 2 * groups if arch.qkv_bias else 0
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)
    if arch.experts is None:
        return attention + bias + norms + 3 * arch.hidden_size * arch.ffn_size
    return attention + bias + norms + arch.hidden_size * arch.experts.count


def layer_experts(arch: Architecture) -> int:
    """Weights of a decoder layer's experts, all of them (count); 0 for a dense model."""
    return 3 * arch.hidden_size * arch.experts.ffn_size * arch.experts.count if arch.experts else 0


def read_shape(model_dir: str) -> Shape:
    """The shape in `model_dir`/config.json, or of a published Qwen3 that is not here yet.

    Raises ConfigError naming the file and the key for a model that is not supported, or that is neither
    here nor in the table of published shapes.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        name = Path(model_dir).name.removesuffix("-Base")
        if name not in PUBLISHED:
            raise ConfigError(
                f"{path}: no such file, and {Path(model_dir).name} is not a published shape: give a Hugging "
                f"Face model directory, or a path that ends in one of {', '.join(PUBLISHED)}"
            )
        return Shape(PUBLISHED[name], f"{model_dir}: not here, taken to have the published shape of {name}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    return Shape(_architecture(path, raw))


def _architecture(path: Path, raw: Any) -> Architecture:
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if family not in FAMILIES:
        raise ConfigError(f"{path}: model_type {family!r} is not supported, only {', '.join(FAMILIES)} are")
    for option, supported in SUPPORTED_OPTIONS.items():
        if raw.get(option) not in (None, supported):
            raise ConfigError(f"{path}: {option}={raw[option]!r} is not supported, only {supported!r} is")
    heads, hidden = _count(path, raw, "num_attention_heads"), _count(path, raw, "hidden_size")
    # transformers' own defaults for keys that old checkpoints leave out.
    head_dim = raw.get("head_dim") or (128 if family in ("qwen3", "qwen3_moe") else hidden // heads)
    experts = None
    if family == "qwen3_moe":
        experts = Experts(
            # transformers 5 writes the second name, the published files have the first.
            count=_count(path, raw, "num_experts" if "num_experts" in raw else "num_local_experts"),
            top_k=_count(path, raw, "num_experts_per_tok"),
            ffn_size=_count(path, raw, "moe_intermediate_size"),
            normalize_top_k=bool(raw.get("norm_topk_prob", False)),
        )
    return _decoder(
        family,
        layers=_count(path, raw, "num_hidden_layers"),
        hidden=hidden,
        ffn=_count(path, raw, "intermediate_size"),
        heads=heads,
        groups=_count(path, raw, "num_key_value_heads"),
        head_dim=head_dim,
        vocabulary=_count(path, raw, "vocab_size"),
        tied=bool(raw.get("tie_word_embeddings", False)),
        experts=experts,
    )


def _count(path: Path, raw: dict[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: {key} is {value!r}: it must be a whole number of at least 1")
    return value


def _decoder(
    family: Family,
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    groups: int,
    head_dim: int,
    vocabulary: int,
    tied: bool,
    experts: Experts | None = None,
) -> Architecture:
    """An Architecture of these sizes. What decides no size is left at what the family commonly has."""
    return Architecture(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_positions=40960,
        norm_eps=1e-6,
        init_std=0.02,
        tied=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        rope_theta=1e6,
        rope_scaling=None,
        experts=experts,
    )


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> Architecture:
    return _decoder(
        "qwen3",
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        groups=8,
        head_dim=128,
        vocabulary=151936,
        tied=tied,
    )


# The Qwen3 technical report (arXiv 2505.09388), tables 1 and 2, and the released config.json files; a base
# model has the shape of the other. So that a run can be planned before tens of gigabytes are fetched.
PUBLISHED = {
    "Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
    "Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, tied=True),
    "Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
    "Qwen3-8B": _qwen3(36, 4096, 12288, 32, tied=False),
    "Qwen3-14B": _qwen3(40, 5120, 17408, 40, tied=False),
    "Qwen3-32B": _qwen3(64, 5120, 25600, 64, tied=False),
    "Qwen3-30B-A3B": _decoder(
        "qwen3_moe",
        layers=48,
        hidden=2048,
        ffn=6144,
        heads=32,
        groups=4,
        head_dim=128,
        vocabulary=151936,
        tied=False,
        experts=Experts(count=128, top_k=8, ffn_size=768, normalize_top_k=True),
    ),
}
