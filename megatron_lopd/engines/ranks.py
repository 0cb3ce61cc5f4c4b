"""How rank 0 has the other ranks take part in what it does: messages, one after the other.

They go over the store that brought the ranks together and are no collective, so that idle ranks wait for as
long as rank 0 has other things to do, where a collective would time out.
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, PrefixStore

from megatron_lopd.mcore.process_groups import world_store

FOREVER = timedelta(days=365)
# How long rank 0 stays for the others to read its last word: ranks that wait for it read it at once, and
# ranks that hang in a collective, since another one has failed, never do.
PARTING = timedelta(seconds=10)


class Channel:
    """Rank 0 sends, every other rank receives: the same messages in the same order, on channels by `name`."""

    def __init__(self, name: str) -> None:
        self._store = PrefixStore(f"lopd-{name}", world_store())
        self._others = int(os.environ.get("WORLD_SIZE", "1")) - 1
        self._numbers = itertools.count()

    def send(self, message: Any, *, last: bool = False) -> None:
        """To every other rank; may be called before they are there. Messages are this project's own.

        After the `last` one this process may end, and the store with it.
        """
        number = next(self._numbers)
        if not self._others:
            return
        self._store.set(f"message{number}", pickle.dumps(message))  # type: ignore[arg-type]  # takes bytes
        if last:
            with suppress(DistStoreError):
                self._store.wait([f"taken{number}"], PARTING)
                self._store.delete_key(f"taken{number}")

    def receive(self) -> Any:
        """The next message, whenever it comes. The last rank to read it clears it away."""
        number = next(self._numbers)
        self._store.wait([f"message{number}"], FOREVER)
        message = pickle.loads(self._store.get(f"message{number}"))
        if self._store.add(f"read{number}", 1) == self._others:
            self._store.delete_key(f"message{number}")
            self._store.delete_key(f"read{number}")
            self._store.set(f"taken{number}", "")
        return message

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on rank 0, whenever the last one comes; nothing elsewhere."""
        number, rank = next(self._numbers), int(os.environ.get("RANK", "0"))
        if rank:
            self._store.set(f"value{number}/{rank}", pickle.dumps(value))  # type: ignore[arg-type]
            return []
        keys = [f"value{number}/{other}" for other in range(1, self._others + 1)]
        values = [value]
        for key in keys:
            self._store.wait([key], FOREVER)
            values.append(pickle.loads(self._store.get(key)))
            self._store.delete_key(key)
        return values


@functools.cache
def channel(name: str = "engine") -> Channel:
    """This process's, for its life: the store keeps what was sent, and numbers go on."""
    return Channel(name)
