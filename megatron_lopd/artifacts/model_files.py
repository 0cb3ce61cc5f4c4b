"""Which files of a Hugging Face directory are the model's. Who hashes, loads or copies a model asks here.

Loaders differ: transformers reads model.safetensors where it is there, whatever an index beside it says; vLLM
reads every *.safetensors, or those of the index; both read all tensors of a file, wherever the index has
them. So what two of them would read differently is refused, and the rest all of them read alike:

- config.json, generation_config.json
- model.safetensors; or model.safetensors.index.json with the files it names, all in the directory itself
- the tokenizer's files, and the chat templates
- with `auto_map` in a config: the *.py files, which run where a recipe trusts them

Nothing else is there for anyone: pickles (*.bin, *.pt, *.pth), GGUF, folders, a processor's files. Links are
followed, since hub caches are made of them.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.manifest import is_plain_path
from megatron_lopd.artifacts.tensor_files import TensorLocation, tensor_locations
from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import (
    is_directory,
    is_there,
    names_in,
    read_object,
    reading,
    require_regular,
)

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "*.tiktoken",
)
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TEMPLATES = (TEMPLATE, f"{MORE_TEMPLATES}/*.jinja")
# Read by one of the loaders in place of, or on top of, what is listed above.
REFUSED = {
    "adapter_config.json": "peft, where it is, merges it on loading: merge it into the weights for good",
    "tekken.json": "some tokenizers would be made of it: make a tokenizer.json of it, and remove it",
    "custom_generate/generate.py": "transformers runs it on loading, where code is trusted: remove it",
}
QUANTIZATION = "hf_quant_config.json"
# Of config.json: by them transformers reads other files than those above.
DIVERTING = ("transformers_weights", "configuration_files")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model. `voice`: tokenizer, templates and end tokens. `code`: what it brings to run."""

    root: Path
    config: Path
    weights: tuple[Path, ...]
    voice: tuple[Path, ...]
    code: tuple[Path, ...]

    @property
    def of_weights(self) -> list[Path]:
        """The weights, and their index where there is one."""
        return [*self.weights, *(path for path in (self.root / INDEX,) if self.weights and is_there(path))]

    @property
    def all(self) -> list[Path]:
        """Every one."""
        return [self.config, *self.of_weights, *self.voice, *self.code]

    def tensors(self) -> list[TensorLocation]:
        """Every tensor, in the order of the files.

        Raises DataError when a file is damaged, a tensor is there twice, or is not where the index says.
        """
        found: dict[str, TensorLocation] = {}
        for path in self.weights:
            for location in tensor_locations(path):
                if location.name in found:
                    first = found[location.name].path.name
                    raise DataError(f"{path}: tensor {location.name} is in {first} too: remove one of them")
                found[location.name] = location
        if is_there(self.root / INDEX):
            self._check_index({name: location.path.name for name, location in found.items()})
        return list(found.values())

    def _check_index(self, found: dict[str, str]) -> None:
        index = _weight_map(self.root / INDEX)
        for name in sorted(index.keys() | found.keys()):
            if index.get(name) != found.get(name):
                raise DataError(
                    f"{self.root / INDEX}: tensor {name} is {_where(found.get(name))}, and the index has it "
                    f"{_where(index.get(name))}: copy the checkpoint again"
                )


def model_files(directory: str | Path, *, weights: bool = True) -> ModelFiles:
    """The files of the model in a directory; without `weights`, of one that has none yet.

    Raises DataError, naming the file, when one is missing or no regular file, or when loaders would differ.
    """
    root = Path(directory)
    if not is_directory(root):
        raise DataError(f"{root}: no such model directory: give a Hugging Face checkpoint directory")
    config = root / CONFIG
    if not _is_there(config):
        raise DataError(f"{config}: missing: give a Hugging Face checkpoint directory")
    settings = read_object(config)
    for name, why in REFUSED.items():
        if _is_there(root / name):
            raise DataError(f"{root / name}: not part of a model here: {why}")
    if _is_there(root / QUANTIZATION) and not settings.get("quantization_config"):
        raise DataError(
            f"{root / QUANTIZATION}: vLLM alone would read it, for config.json has no quantization_config: "
            "put it there, or remove the file"
        )
    for key in DIVERTING:
        if key in settings:
            raise DataError(f"{config}: {key}: one loader alone would heed it: remove the key")
    return ModelFiles(
        root, config, _weights(root) if weights else (), tuple(voice_files(root)), _code(root, settings)
    )


def voice_files(root: Path) -> list[Path]:
    """What a model needs to speak: its tokenizer, chat templates and end tokens. Raises as `model_files`."""
    settings = _tokenizer_settings(root)
    if settings.get("fast_tokenizer_files"):
        raise DataError(
            f"{root / 'tokenizer_config.json'}: fast_tokenizer_files has each version of a library read "
            "another file: keep one, as tokenizer.json, and remove the key"
        )
    found = [
        path
        for pattern in (GENERATION, *TOKENIZER, *TEMPLATES)
        for path in ([root / pattern] if "*" not in pattern else _matching(root, pattern))
    ]
    return [path for path in found if _is_there(path)]


def _is_there(path: Path) -> bool:
    """Whether anything has this name. DataError unless that is a regular file, or a link to one."""
    if not is_there(path):
        return False
    with reading(path):
        require_regular(path, path.stat().st_mode)
    return True


def _weights(root: Path) -> tuple[Path, ...]:
    single, index = root / WEIGHTS, root / INDEX
    files = [single]
    if _is_there(index):
        names = sorted(set(_weight_map(index).values()))
        files = [root / _plain_name(name, index) for name in names]
        if _is_there(single) and names != [WEIGHTS]:
            raise DataError(
                f"{single}: {'not alone' if WEIGHTS in names else 'not'} in {INDEX} beside it, and read in "
                "its place: remove one of them"
            )
        for path in files:
            if not _is_there(path):
                raise DataError(f"{path}: missing: {INDEX} lists it; copy the checkpoint again")
    stray = [path for path in _safetensors(root) if path not in files]
    if not _is_there(files[0]):
        if stray:
            raise DataError(f"{stray[0]}: neither {WEIGHTS} nor in an {INDEX}: name it so, or add the index")
        pickled = _matching(root, "*.bin")
        advice = "convert it to safetensors first (pickles are never loaded)"
        raise DataError(f"{root}: no {WEIGHTS}: {advice if pickled else 'give another path'}")
    if stray:
        listed = INDEX if _is_there(index) else WEIGHTS
        raise DataError(
            f"{stray[0]}: beside {listed}, which does not list it, and some loaders would read it too: "
            "remove one of them"
        )
    return tuple(files)


def _safetensors(root: Path) -> Sequence[Path]:
    """All that a loader could take for weights; and other indices, which are of others."""
    indices = [path for path in _matching(root, "*.safetensors.index.json") if path.name != INDEX]
    return sorted([*_matching(root, "*.safetensors"), *indices])


def _matching(root: Path, pattern: str) -> list[Path]:
    """As `Path.glob`, which takes a folder that cannot be listed for an empty one."""
    folder = root / os.path.dirname(pattern)
    return [folder / name for name in fnmatch.filter(names_in(folder), os.path.basename(pattern))]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise DataError(f"{index}: damaged: no weight_map: copy the checkpoint again")
    return weight_map


def _plain_name(name: str, index: Path) -> str:
    is_beside = is_plain_path(name) and "/" not in name
    if not is_beside or not name.endswith(".safetensors") or name.startswith("consolidated"):
        raise DataError(
            f"{index}: names {name!r}, which not all loaders read: its files must be *.safetensors beside it"
        )
    return name


def _where(name: str | None) -> str:
    return "nowhere" if name is None else f"in {name}"


def _tokenizer_settings(root: Path) -> dict[str, Any]:
    path = root / "tokenizer_config.json"
    return read_object(path) if _is_there(path) else {}


def _code(root: Path, settings: dict[str, Any]) -> tuple[Path, ...]:
    named = [each["auto_map"] for each in (settings, _tokenizer_settings(root)) if each.get("auto_map")]
    if not named:
        return ()
    if "--" in str(named):
        raise DataError(f"{root}: auto_map names the code of another repository: copy it here, and name that")
    files = sorted(root.rglob("*.py"))
    return tuple(path for path in files if _is_there(path))
