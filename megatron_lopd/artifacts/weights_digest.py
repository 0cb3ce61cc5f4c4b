"""The digest of a model's weights: of (name, dtype, shape, bytes) of every tensor, in name order.

It does not change when files are sharded otherwise, or when the model travels Hugging Face -> Megatron ->
Hugging Face. Two things that no engine computes with are left out: rotary frequency buffers, which all of
them make themselves, and an output layer equal to the embedding. Where config.json ties the two, engines
use one that differs, and the trainer would not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from megatron_lopd.artifacts.digest_cache import digest_of, is_kept
from megatron_lopd.artifacts.model_files import ModelFiles
from megatron_lopd.artifacts.tensor_files import TensorLocation
from megatron_lopd.errors import DataError
from megatron_lopd.files.digests import HASHING_THREADS, canonical_json, sha256_bytes
from megatron_lopd.files.reading import open_file, reading

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_READ_BYTES = 1 << 20  # at a time, so that what is hashed is still in the processor's cache
_VALUES = 1 << 22  # compared at a time
# numpy's names for what is compared by value, little-endian; bfloat16 is the upper half of a float32.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_PART = "weights"
EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"


def weights_digest(files: ModelFiles) -> str:
    """Hex SHA-256 of the tensors' rows. Raises DataError as `ModelFiles.tensors` and `digest_of`."""
    return digest_of(_PART, files.of_weights, lambda: _of_rows(files.tensors()))


def is_hashed(files: ModelFiles) -> bool:
    """Whether `weights_digest` would take nothing anew within `relying_on_hints`."""
    return is_kept(_PART, files.of_weights)


def other_output(tensors: Sequence[TensorLocation]) -> TensorLocation | None:
    """An output layer that is stored and is not the embedding: what may not be where the two are tied."""
    heads = [each for each in tensors if _is_output(each.name)]
    embeddings = [each for each in tensors if _is_embedding(each.name)]
    return next((head for head in heads if not any(_are_equal(head, each) for each in embeddings)), None)


def _of_rows(tensors: Sequence[TensorLocation]) -> str:
    rows = {
        each: [each.name, each.dtype, list(each.shape), digest]
        for each, digest in zip(tensors, _digests(tensors), strict=True)
    }
    embeddings = [each for each in tensors if _is_embedding(each.name)]
    kept = [
        row
        for each, row in rows.items()
        if not each.name.endswith("rotary_emb.inv_freq")
        and not (_is_output(each.name) and any(_repeats(rows, each, other) for other in embeddings))
    ]
    return sha256_bytes(canonical_json(sorted(kept)))


def _repeats(rows: dict[TensorLocation, list[Any]], head: TensorLocation, embedding: TensorLocation) -> bool:
    """Whether `head` says nothing that `embedding` does not. Their rows tell, where both have one dtype."""
    if head.dtype == embedding.dtype:
        return rows[head][1:] == rows[embedding][1:]
    return _are_equal(head, embedding)


def _is_output(name: str) -> bool:
    return name == OUTPUT or name.endswith(f".{OUTPUT}")


def _is_embedding(name: str) -> bool:
    return name == EMBEDDING or name.endswith(f".{EMBEDDING}")


def _digests(tensors: Sequence[TensorLocation]) -> list[str]:
    """Hex BLAKE3 of each tensor's bytes, taken by several threads."""
    largest_first = sorted(tensors, key=lambda each: each.start - each.end)
    with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1), thread_name_prefix="weights") as pool:
        found = dict(zip(largest_first, pool.map(_hash_tensor, largest_first), strict=True))
    return [found[each] for each in tensors]


def _hash_tensor(tensor: TensorLocation) -> str:
    digest, at = blake3(), tensor.start
    buffer = memoryview(bytearray(min(_READ_BYTES, tensor.end - at)))
    with open_file(tensor.path, buffering=0) as stream, reading(tensor.path):
        stream.seek(at)
        while at < tensor.end:
            count = stream.readinto(buffer[: tensor.end - at])  # type: ignore[attr-defined]
            if not count:
                raise DataError(f"{tensor.path}: damaged: it ends at byte {at}: copy it again")
            digest.update(buffer[:count])
            at += count
    return digest.hexdigest()


def _are_equal(head: TensorLocation, embedding: TensorLocation) -> bool:
    """Whether two tensors have the same values, whatever their dtypes."""
    if head.shape != embedding.shape:
        return False
    if head.dtype == embedding.dtype:
        one, other = _digests([head, embedding])
        return one == other
    if not {head.dtype, embedding.dtype} <= _FLOATS.keys():
        return False
    import numpy as np  # which commands that only ask do without

    count = math.prod(head.shape)
    bounds = pairwise([*range(0, count, _VALUES), count])
    return all(np.array_equal(_values(head, *each), _values(embedding, *each)) for each in bounds)


def _values(tensor: TensorLocation, first: int, last: int) -> NDArray[np.float64]:
    """Values [first, last), flat."""
    import numpy as np

    kind = np.dtype(_FLOATS[tensor.dtype])
    with open_file(tensor.path) as stream, reading(tensor.path):
        stream.seek(tensor.start + first * kind.itemsize)
        raw = np.frombuffer(stream.read((last - first) * kind.itemsize), kind)
    if tensor.dtype == "BF16":
        raw = (raw.astype("<u4") << 16).view("<f4")
    return raw.astype(np.float64)
