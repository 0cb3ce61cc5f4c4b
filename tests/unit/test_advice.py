"""Advice that comes once something is made can be followed in the same directory, or says that it cannot."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_lopd.config import Recipe, describe_keys

PACKAGE = Path(__file__).parents[2] / "megatron_lopd"
# What speaks while a stage is at work, or may.
AT_WORK = ("engines", "training", "convert", "checkpoint", "mcore", "objectives", "pipeline", "data")
ANEW = "another run_dir"
KEY = re.compile(
    r"\b(?:(?:generate|sft|rollout|score|evaluate|train)\.)?(?:engine|sampling|optimizer|guard|agreement|parallel"
    r"|micro_batch_tokens|max_skipped_steps|preflight_\w+|refresh_every|objective|top_k|precision)[a-z_.]*[a-z_]"
)
KEYS = list(describe_keys(Recipe))


def texts(node: ast.AST) -> Iterator[str]:
    """The sentences of a file: each piece of text put together as Python does."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif not isinstance(node, ast.Expr):  # a docstring
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def advised() -> Iterator[tuple[str, str, str]]:
    """(file, key, sentence) of each key that a sentence of advice says to change."""
    for folder in AT_WORK:
        for path in sorted((PACKAGE / folder).glob("*.py")):
            for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
                verb = re.search(r"\b(?:lower|raise|set|run (?:it )?again with) ", text)
                for key in KEY.findall(text[verb.end() :]) if verb else ():
                    yield path.name, key, text


def is_operational(key: str) -> bool:
    """Of all keys of the recipe that end so."""
    found = [each for each in KEYS if each.name == key or each.name.endswith(f".{key}")]
    return bool(found) and all(each.operational for each in found)


# Said by checks, before anything is spent.
BEFORE = {
    ("process.py", "engine.name"),
    ("requests.py", "sampling.max_new_tokens"),
    ("live.py", "rollout.sampling.max_new_tokens"),
    ("vllm.py", "engine.name"),
    ("vllm.py", "score.engine.name"),
    ("rounds.py", "score.engine.name"),
}


def test_every_key_that_is_advised_may_change_there() -> None:
    found = list(advised())
    assert {name for name, _, _ in found} >= {
        "loop.py",
        "guards.py",
        "preflight.py",
        "transformers_engine.py",
    }
    for name, key, text in found:
        may = is_operational(key) or ANEW in text or (name, key) in BEFORE
        assert may, f"{name} says {text!r}: {key} decides, and the directory is refused with it"


def test_what_only_stops_a_run_decides_nothing() -> None:
    for key in ("preflight_samples", "preflight_tolerance", "max_skipped_steps", "guard.min_kept_mass"):
        assert is_operational(key), key
