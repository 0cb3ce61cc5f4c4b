"""Columns of a shard: what a record's arrays are as bytes in the file, and back.

An array is a run of items of `item_bytes` bytes. None and an empty array are both no items.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# Token ids are kept in three bytes. A fourth would be zero in every vocabulary there is.
MAX_VOCABULARY = 1 << 24

# mu-law companding of x = -log p: steps of equal size in log(1 + x / COMPAND_SCALE), up to COMPAND_LIMIT
# nats. They are finest near x = 0, where a token's probability, and so its weight in a KL, is largest.
COMPAND_SCALE = 0.1
COMPAND_LIMIT = 1e4
_CODES = (1 << 16) - 1
_COMPAND_RANGE = math.log1p(COMPAND_LIMIT / COMPAND_SCALE)
_STEPS = np.arange(_CODES + 1) * (_COMPAND_RANGE / _CODES)
# What each code stands for: float32 [65536], from 0 down to -COMPAND_LIMIT.
_DECODED = (0.0 - COMPAND_SCALE * np.expm1(_STEPS)).astype(np.float32)


@dataclass(frozen=True)
class Column:
    """How an array is kept. `encode` gives its bytes; `decode` takes a read-only view of them.

    `holds_tokens`: the values are token ids, int32, of which a record batch keeps the largest.
    """

    item_bytes: int
    encode: Callable[[Any], bytes]
    decode: Callable[[Bytes], Any]
    holds_tokens: bool = False


def _encode_tokens(tokens: NDArray[np.int32]) -> bytes:
    """int32 [n] in [0, 2^24) -> the three low bytes of each, little-endian."""
    return np.ascontiguousarray(tokens, dtype="<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()


def _decode_tokens(raw: Bytes) -> NDArray[np.int32]:
    # Overlapping reads of four bytes every three, the fourth masked away: 2.5 times as fast as copying bytes.
    padded = np.empty(len(raw) + 1, dtype=np.uint8)
    padded[:-1], padded[-1] = raw, 0
    words: NDArray[np.int32] = np.ndarray((len(raw) // 3,), dtype="<i4", buffer=padded, strides=(3,))
    return words & np.int32(MAX_VOCABULARY - 1)


def _encode_floats(values: NDArray[np.float32] | None) -> bytes:
    return b"" if values is None else values.astype("<f4").tobytes()


def _decode_floats(raw: Bytes) -> NDArray[np.float32]:
    return raw.view("<f4")


def _encode_id_planes(ids: NDArray[np.int32] | None) -> bytes:
    """int32 [...] -> the low 16 bits of every id, the bits above them packed, and how many those are.

    A row has as many high bits as its largest id needs, of 0, 2, 4 and 8: an id costs 2.25 bytes in a
    vocabulary up to 2^18, 2.5 up to 2^20, 3 up to 2^24.
    """
    if ids is None:
        return b""
    flat = ids.ravel()
    bits = next(bits for bits in (0, 2, 4, 8) if flat.max() >> (16 + bits) == 0)
    low = (flat & 0xFFFF).astype("<u2")
    return low.tobytes() + _pack_bits((flat >> 16).astype(np.uint8), bits).tobytes() + bytes([bits])


def _decode_id_planes(raw: Bytes) -> NDArray[np.int32]:
    """The ids, flat: int32 [n]."""
    if not len(raw):
        return np.empty(0, dtype=np.int32)
    bits = int(raw[-1])
    count = 8 * (len(raw) - 1) // (16 + bits)
    low = raw[: 2 * count].view("<u2")
    if bits == 0:
        return low.astype(np.int32)
    ids: NDArray[np.int32] = _HIGH_PARTS[bits].take(raw[2 * count : -1], axis=0).ravel()[:count]
    ids |= low
    return ids


def _pack_bits(values: Bytes, bits: int) -> Bytes:
    """Values below 2^bits, 8 / bits to a byte, the first in its lowest bits."""
    if bits == 0:
        return np.empty(0, dtype=np.uint8)
    per_byte = 8 // bits
    padded = np.concatenate([values, np.zeros(-len(values) % per_byte, dtype=np.uint8)])
    shifted = padded.reshape(-1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    packed: Bytes = np.bitwise_or.reduce(shifted, axis=1)
    return packed


def _high_parts(bits: int) -> NDArray[np.int32]:
    """What `bits` to an id every byte holds, in place above the low 16: int32 [256, 8 / bits]."""
    parts = np.arange(256, dtype=np.int32)[:, None] >> np.arange(0, 8, bits)
    return ((parts & ((1 << bits) - 1)) << 16).astype(np.int32)


# Whole bytes by table: six times as fast as shifting and masking every id.
_HIGH_PARTS = {bits: _high_parts(bits) for bits in (2, 4, 8)}


def _encode_companded(log_probs: NDArray[np.float32] | None) -> bytes:
    if log_probs is None:
        return b""
    scaled = np.log1p(log_probs.ravel().astype(np.float64) / -COMPAND_SCALE) * (_CODES / _COMPAND_RANGE)
    return np.rint(scaled).astype("<u2").tobytes()


def _decode_companded(raw: Bytes) -> NDArray[np.float32]:
    """The log-probs, flat: float32 [n]."""
    log_probs: NDArray[np.float32] = _DECODED.take(raw.view("<u2"))
    return log_probs


TOKENS = Column(3, _encode_tokens, _decode_tokens, holds_tokens=True)
LOG_PROBS = Column(4, _encode_floats, _decode_floats)
# The two columns of a top k hold a [T, k] row by row. A record's `make` gives them back their shape.
TOP_K_IDS = Column(1, _encode_id_planes, _decode_id_planes, holds_tokens=True)
# Decoded, a log-prob lp is off by at most 8.9e-5 * (-lp + 0.1) nats: half a step of the companded scale, and
# fp32's rounding. Weighted by the token's own probability that is 3.6e-5 nats; fp16's is 1.9e-4.
TOP_K_LOG_PROBS = Column(2, _encode_companded, _decode_companded)
