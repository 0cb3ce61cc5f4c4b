"""What a model thinks before it answers, told from the answer by the marks around it."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import numpy as np

from megatron_lopd.data.chat import Tokens

# What a grader is shown, whatever marks a model has.
OPENED, CLOSED = "<think>", "</think>"

# Marks that models write as text.
WRITTEN = (
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
)
# Tokens of a tokenizer's own that are marks: those above, and others of their kind.
_MARK = re.compile(
    r"\W+(?:seed:)?(?:(?:begin|start|end)_(?:of_)?)?(?:think(?:ing)?|thoughts?|reason(?:ing)?)"
    r"(?:_(?:begin|start|end))?\W+",
    re.IGNORECASE,
)
_TAIL = 32  # tokens at a prompt's end that a mark is looked for in


class ThoughtMarks:
    """The marks of one tokenizer, as tokens, special or not, and as text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        names = [name for name in tokenizer.get_added_vocab() if _MARK.fullmatch(name)]
        self._names = {name: CLOSED if "/" in name or "end" in name.lower() else OPENED for name in names}
        self._ids = {tokenizer.convert_tokens_to_ids(name): mark for name, mark in self._names.items()}

    def text(self, prompt: Tokens, response: Tokens) -> str:
        """A response as a grader is shown it: without special tokens, its thought between OPENED and CLOSED.

        It begins with OPENED where its prompt ends with a mark that opens a thought. `prompt` and `response`
        are int32 [P] and [T].
        """
        marks = np.isin(response, list(self._ids))
        pieces = [OPENED] if self._opens(prompt) else []
        start = 0
        for is_mark, group in groupby(marks):
            tokens = response[start : start + len(list(group))]
            start += len(tokens)
            if is_mark:
                pieces += [self._ids[int(token)] for token in tokens]
            else:
                pieces.append(_as_known(self._tokenizer.decode(tokens, skip_special_tokens=True)))
        return "".join(pieces)

    def _opens(self, prompt: Tokens) -> bool:
        end: str = self._tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip()
        opening = [name for name, mark in self._names.items() if mark == OPENED]
        return end.endswith((OPENED, *opening, *(opened for opened, _ in WRITTEN)))


def _as_known(text: str) -> str:
    for opened, closed in WRITTEN:
        text = text.replace(opened, OPENED).replace(closed, CLOSED)
    return text
