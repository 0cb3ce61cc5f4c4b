"""Host memory that checkpoints are copied to: pinned where there is a GPU, and kept from one to the next.

Pinned memory is copied to at the speed of the bus, where pageable memory goes through a buffer of the
driver's; and it takes seconds to get, which is why it is kept. It comes in segments of a power of two: what
torch's allocator of pinned memory is asked for it rounds up to one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from megatron_lopd.checkpoint.tensor_shards import Box, boxes_of_run
from megatron_lopd.errors import CheckpointError

SEGMENT_BYTES = 1 << 28
# A view of any type may begin at a multiple of it.
ALIGNMENT = 64
# What the parts that a box of up to four axes is cut into may lose by that, in a segment.
SLACK = 8 * ALIGNMENT


class HostBuffer:
    """Room for copies of `boxes`, whatever they will then hold; those are not read yet."""

    def __init__(self, boxes: Iterable[Box]) -> None:
        """Raises CheckpointError when there is not that much memory."""
        sizes: dict[int, int] = {}
        for segment, start, box in _placed(boxes):
            sizes[segment] = start + box.elements.nbytes
        pinned = torch.cuda.is_available()
        try:
            self._segments = [
                torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes.values()
            ]
        except RuntimeError as error:  # of torch's allocator, or of the driver's
            kind = "page-locked host memory" if pinned else "host memory"
            words = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{sum(sizes.values()) / 1e9:.1f} GB of {kind}, where this rank's checkpoints are copied to, "
                f"cannot be had ({words}): give the job more memory, or more data parallel ranks (lopd plan "
                "says what a node needs)"
            ) from error

    @property
    def nbytes(self) -> int:
        """The host memory it holds, in bytes."""
        return sum(segment.nbytes for segment in self._segments)

    def copied(self, boxes: Iterable[Box]) -> list[Box]:
        """The boxes' elements as they are now, in this memory: valid until the next call.

        The boxes must be those this room was made for. One that goes over the end of a segment is cut in two
        or more.
        """
        copies = []
        for segment, start, box in _placed(boxes):
            room = self._segments[segment][start : start + box.elements.nbytes].view(box.elements.dtype)
            room.copy_(box.elements, non_blocking=True)
            copies.append(replace(box, elements=room))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies


def _placed(boxes: Iterable[Box]) -> Iterator[tuple[int, int, Box]]:
    """(segment, where it begins there, box) of each, or of the parts that each is cut into."""
    segment = used = 0
    for box in boxes:
        element, total, start = box.elements.element_size(), box.elements.numel(), 0
        while start < total:
            count = min(total - start, (SEGMENT_BYTES - SLACK - used) // element)
            if count <= 0:
                segment, used = segment + 1, 0
                continue
            for part in _cut(box, start, start + count):
                yield segment, used, part
                used += -(-part.elements.nbytes // ALIGNMENT) * ALIGNMENT
            start += count


def _cut(box: Box, start: int, end: int) -> Iterator[Box]:
    """Elements [start, end) of a box."""
    at = start
    for offset, shape in boxes_of_run(box.shape, start, end):
        count = math.prod(shape)
        shifted = tuple(a + b for a, b in zip(box.offset, offset, strict=True))
        yield replace(box, offset=shifted, shape=shape, elements=box.elements[at : at + count])
        at += count
