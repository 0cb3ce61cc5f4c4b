"""Who a model is: digests of its weights, config, tokenizer and chat template.

The weights digest covers (name, dtype, shape, bytes) of every tensor in name order, read from
safetensors files, so it does not change when files are re-sharded or when the model travels
Hugging Face -> Megatron -> Hugging Face. Two things that are no information are left out: rotary
frequency buffers, and an output layer written beside the embedding it is tied to.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.digest_cache import digest_of, is_kept
from megatron_lopd.errors import DataError
from megatron_lopd.files.digests import canonical_json, sha256_bytes, sha256_file
from megatron_lopd.files.reading import read_json

# Keys of config.json that say how it was written, not what the model computes.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
# Runtime state that tokenizers writes into tokenizer.json.
_VOLATILE_TOKENIZER = ("truncation", "padding")
_SENTENCEPIECE_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class Fingerprint:
    """Hex SHA-256 of each part of a model; "none" for a chat template or weights that are not there."""

    weights: str
    config: str
    tokenizer: str
    chat_template: str

    def parts(self) -> dict[str, str]:
        """{part: digest}, as kept in manifests."""
        return asdict(self)


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor's bytes lie in a safetensors file: [start, end) in bytes from its beginning."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def fingerprint_model(directory: str | Path, *, weights: bool = True) -> Fingerprint:
    """Fingerprint a Hugging Face checkpoint directory; without `weights`, a model that has none yet.

    The digests of weights and tokenizer are kept (`digest_cache`): hashing 64 GB takes minutes.
    Raises DataError when the directory holds no safetensors checkpoint or a file is malformed.
    """
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"{root}: no such model directory: give a Hugging Face checkpoint directory")
    return Fingerprint(
        weights=weights_digest(root) if weights else "none",
        config=_digest_without(_read_config(root), _VOLATILE_CONFIG),
        tokenizer=_tokenizer_digest(root),
        chat_template=chat_template_digest(root),
    )


def weights_digest(root: Path) -> str:
    """Digest of a checkpoint's weights. Raises as `fingerprint_model`."""
    files, tied = safetensors_files(root), _is_tied(root)
    return digest_of(root, "weights", files, {"tied": tied}, lambda: _hash_weights(files, tied))


def is_fingerprinted(root: Path) -> bool:
    """Whether all that takes `fingerprint_model` long is known already. Raises as it does."""
    tokenizer = root / "tokenizer.json"
    return is_kept(root, "weights", safetensors_files(root), {"tied": _is_tied(root)}) and (
        not tokenizer.is_file() or is_kept(root, "tokenizer", [tokenizer], {})
    )


def chat_template_digest(root: Path) -> str:
    """Digest of the chat template's text, wherever transformers keeps it; "none" without one."""
    jinja = root / "chat_template.jinja"
    if jinja.is_file():
        return sha256_bytes(jinja.read_bytes())
    config = root / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    if template is None:
        return "none"
    if isinstance(template, str):
        return sha256_bytes(template.encode())
    return sha256_bytes(canonical_json(template))


def safetensors_files(root: Path) -> list[Path]:
    """The weight files of a checkpoint, by name: those of its index, or all `*.safetensors`.

    Raises DataError naming the directory when there are none, when an indexed one is missing, or when beside
    the index is a model.safetensors that it does not list: some loaders would read that one instead.
    """
    index = root / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{index}: damaged: no weight_map: copy the checkpoint again") from None
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise DataError(f"{root / missing[0]}: missing: {index.name} lists it; copy the checkpoint again")
        if (single := root / "model.safetensors").is_file() and single.name not in names:
            raise DataError(
                f"{single}: not in {index.name} beside it, and read in its place: remove one of them"
            )
        return [root / name for name in names]
    files = sorted(root.glob("*.safetensors"))
    if not files:
        pickled = sorted(root.glob("*.bin"))
        advice = (
            "convert it to safetensors first (pickles are never loaded)" if pickled else "give another path"
        )
        raise DataError(f"{root}: no *.safetensors weights: {advice}")
    return files


def tensor_locations(path: Path) -> Iterator[TensorLocation]:
    """The tensors of one safetensors file, from its header alone. DataError when it is malformed."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise DataError(f"{path}: damaged: not a whole safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: damaged: unreadable safetensors header ({error})") from None
    try:
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = [
            TensorLocation(
                path,
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for name, entry in entries.items()
        ]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: damaged: unreadable safetensors header: copy it again") from None
    for location in found:
        if location.end > size:
            raise DataError(f"{path}: damaged: tensor {location.name} ends at byte {location.end} of {size}")
    yield from found


def _read_config(root: Path) -> dict[str, Any]:
    path = root / "config.json"
    if not path.is_file():
        raise DataError(f"{path}: missing: give a Hugging Face checkpoint directory")
    config = read_json(path)
    if not isinstance(config, dict):
        raise DataError(f"{path}: damaged: not a JSON object")
    return config


def _is_tied(root: Path) -> bool:
    return bool(_read_config(root).get("tie_word_embeddings"))


def _hash_weights(files: list[Path], tied: bool) -> str:
    locations = [
        item for path in files for item in tensor_locations(path) if not _is_redundant(item.name, tied)
    ]
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        digests = list(pool.map(_hash_tensor, locations))
    rows = sorted(
        [item.name, item.dtype, list(item.shape), digest]
        for item, digest in zip(locations, digests, strict=True)
    )
    return sha256_bytes(canonical_json(rows))


def _is_redundant(name: str, tied: bool) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _hash_tensor(location: TensorLocation) -> str:
    if location.start == location.end:
        return sha256_bytes(b"")
    with location.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        digest = hashlib.sha256()
        with memoryview(view) as whole, whole[location.start : location.end] as data:
            digest.update(data)
        return digest.hexdigest()


def _tokenizer_digest(root: Path) -> str:
    path = root / "tokenizer.json"
    if path.is_file():  # 11 MB are parsed in half a second
        return digest_of(
            root, "tokenizer", [path], {}, lambda: _digest_without(read_json(path), _VOLATILE_TOKENIZER)
        )
    parts = {name: sha256_file(root / name) for name in _SENTENCEPIECE_FILES if (root / name).is_file()}
    if not parts:
        raise DataError(f"{root}: no tokenizer (tokenizer.json): copy the tokenizer's files there")
    return sha256_bytes(canonical_json(parts))


def _digest_without(mapping: dict[str, Any], volatile: tuple[str, ...]) -> str:
    return sha256_bytes(canonical_json({key: value for key, value in mapping.items() if key not in volatile}))
