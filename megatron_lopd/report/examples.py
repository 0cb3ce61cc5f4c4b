"""A few answers of each model, right and wrong, for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lopd.runtime.display import shortened

if TYPE_CHECKING:
    from megatron_lopd.evaluation.answers import GradedAnswer

SHOWN = 2  # of each verdict that counts: right, and not
HEAD, TAIL = 300, 500  # characters of a long text that are kept; an answer is at its end


@dataclass(frozen=True)
class Examples:
    """Rows of (verdict, prompt, response, right answer) under a title."""

    title: str
    rows: Sequence[tuple[str, str, str, str]]


def examples(title: str, answers: Iterable[GradedAnswer]) -> Examples:
    """The first SHOWN sampled answers that are right, and that are not."""
    found: dict[bool, list[GradedAnswer]] = {True: [], False: []}
    for each in answers:
        kind = found[each.verdict == "right"]
        if each.mode == "sampled" and len(kind) < SHOWN:
            kind.append(each)
        if all(len(kind) == SHOWN for kind in found.values()):
            break
    return Examples(title, [_row(each) for each in (*found[True], *found[False])])


def _row(each: GradedAnswer) -> tuple[str, str, str, str]:
    prompt = "\n".join(str(message.get("content", "")) for message in each.prompt)
    prompt, response, gold = (shortened(text, HEAD, TAIL) for text in (prompt, each.text, each.gold or ""))
    return each.verdict, prompt, response, gold
