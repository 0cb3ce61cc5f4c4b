"""What a key's type says: its bare kind, its range, whether it may be empty, and these in words."""

from __future__ import annotations

import functools
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Meta

LARGEST = 10**12  # what no count is above: a slip of the finger is


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The type of every field of a config class, with its range."""
    return get_type_hints(cls, include_extras=True)


def without_none(hint: Any) -> Any:
    """The type of a key that may be empty, when it is not."""
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = [arg for arg in get_args(hint) if arg is not type(None)]
        return inner
    return hint


def bare(hint: Any) -> Any:
    """Without "or empty", and without the range."""
    inner = without_none(hint)
    return get_args(inner)[0] if get_origin(inner) is Annotated else inner


def type_name(hint: Any) -> str:
    """`int`, `fp32 | bf16`, `list of str`."""
    if is_path(hint):
        return "path"
    kind = bare(hint)
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {type_name(get_args(kind)[0])}"
    return str(kind.__name__)


def is_path(hint: Any) -> bool:
    """Whether a key holds the name of a file or directory."""
    return any((meta.extra or {}).get("path") for meta in _metas(hint))


def _metas(hint: Any) -> list[Meta]:
    return [each for each in getattr(without_none(hint), "__metadata__", ()) if isinstance(each, Meta)]


def range_text(hint: Any, value: Any = None) -> str:
    """`at least 0 and below 1`; empty where every value is in range. LARGEST is told of a `value` above."""
    bounds = (("at least", "ge"), ("above", "gt"), ("at most", "le"), ("below", "lt"))
    return " and ".join(
        f"{word} {_number(getattr(meta, bound))}"
        for meta in _metas(hint)
        for word, bound in bounds
        if getattr(meta, bound) is not None
        and (getattr(meta, bound) != LARGEST or (isinstance(value, int) and value > LARGEST))
    )


def _number(bound: float) -> str:
    return "2^63 - 1" if bound == 2**63 - 1 else f"{bound:g}"
