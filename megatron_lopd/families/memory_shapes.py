"""How large a model is: by its config.json, or, before it is here, by what was published of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import Architecture, Experts, Family, read_architecture


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
    return Shape(read_architecture(model_dir))


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
