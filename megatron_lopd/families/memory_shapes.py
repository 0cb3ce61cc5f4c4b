"""How large a model is: by its config.json, or, before it is here, by what was published of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.families.config_json import ConfigJson
from megatron_lopd.families.family import family_of
from megatron_lopd.registry import FAMILIES


@dataclass(frozen=True)
class Shape:
    """A model's architecture. `assumed`: why it is a published one; None where config.json was read."""

    arch: Architecture
    assumed: str | None = None

    @property
    def parameters(self) -> int:
        """Every weight of the Hugging Face model, tied ones once (count)."""
        arch, layer = self.arch, family_of(self.arch).layer_sizes(self.arch)
        embeddings = (1 if arch.tied else 2) * arch.vocab_size * arch.hidden_size
        return embeddings + arch.hidden_size + arch.num_layers * (layer.weights + layer.expert_weights)


def read_shape(model_dir: str) -> Shape:
    """The shape in `model_dir`/config.json, or of a published model that is not here yet.

    Raises ConfigError naming the file and the key for a model that is not supported, or that is neither
    here nor published by a family.
    """
    path = Path(model_dir) / "config.json"
    if path.is_file():
        return Shape(read_architecture(model_dir))
    name, known = Path(model_dir).name.removesuffix("-Base"), published()
    if name not in known:
        raise ConfigError(
            f"{path}: no such file, and {Path(model_dir).name} is not a published shape: give a Hugging "
            f"Face model directory, or a path that ends in one of {', '.join(known)}"
        )
    return Shape(known[name], f"{model_dir}: not here, taken to have the published shape of {name}")


def published() -> dict[str, Architecture]:
    """Models by name that can be planned for before they are here; a base model has the other's shape."""
    return {
        name: family.read(ConfigJson(Path(name, "config.json"), {"model_type": family.name} | dict(raw)))
        for family in FAMILIES.things().values()
        for name, raw in family.published.items()
    }
