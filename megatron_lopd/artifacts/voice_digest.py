"""How a model reads and speaks: digests of its tokenizer as it is loaded, its chat templates, its end tokens.

Files say the same in many ways: merges as pairs or as strings, tokens added in one file or another, settings
that a newer library writes out. So the tokenizer is loaded, and what it then is decides: its own serialised
state, and the few settings of the Python around it that change tokens or text. Lengths, padding and
truncation are not among them: nothing here pads or cuts by the tokenizer.
"""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.digest_cache import digest_of, is_kept
from megatron_lopd.artifacts.model_files import GENERATION, MORE_TEMPLATES, TEMPLATE, ModelFiles
from megatron_lopd.artifacts.named_ids import named_ids
from megatron_lopd.artifacts.places import without_places
from megatron_lopd.errors import DataError, LopdError, reason_of
from megatron_lopd.files.digests import canonical_json, sha256_bytes, sha256_file
from megatron_lopd.files.reading import is_there, read_bytes, read_object

_RUNTIME_STATE = ("truncation", "padding", "version")
_TAGS = ("block_begin", "block_end", "variable_begin", "variable_end")
_CLEANS_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def tokenizer_digest(files: ModelFiles) -> str:
    """Digest of the loaded tokenizer. DataError when it does not load, or reads a file that is not listed."""
    digest: str = _loaded(files)["digest"]
    return digest


def is_loaded(files: ModelFiles) -> bool:
    """Whether `tokenizer_digest` would load nothing within `relying_on_hints`."""
    return is_kept(_part(), _deciding(files))


def end_tokens_digest(files: ModelFiles) -> str:
    """Digest of the ids that end a response, those of `named_ids` and the tokenizer's; or "none"."""
    found = {*named_ids(files.root)[1], _loaded(files)["end"]} - {None}
    return sha256_bytes(canonical_json(sorted(found))) if found else "none"


def chat_template_digest(files: ModelFiles) -> str:
    """Digest of the chat templates, wherever transformers finds them; "none" without one.

    Of the tokens that Jinja2 reads them as, on which all that it does depends: without comments, the space
    within tags, and the line break at the end.
    """
    named = _templates(files)
    if not named:
        return "none"
    return sha256_bytes(canonical_json({name: _as_read(text) for name, text in named.items()}))


def _templates(files: ModelFiles) -> dict[str, str]:
    """By name. Files hide those of tokenizer_config.json, as transformers has it."""
    found = {
        "default" if path.name == TEMPLATE else path.name.removesuffix(".jinja"): _text(path)
        for path in files.voice
        if path.name == TEMPLATE or path.parent.name == MORE_TEMPLATES
    }
    if found or not _has(files, "tokenizer_config.json"):
        return found
    path = files.root / "tokenizer_config.json"
    written = read_object(path).get("chat_template") or {}
    try:
        if isinstance(written, list):
            written = {each["name"]: each["template"] for each in written}
        named = {"default": written} if isinstance(written, str) else dict(written)
    except (KeyError, TypeError, ValueError):
        named = {"": None}
    if not all(isinstance(text, str) for item in named.items() for text in item):
        raise DataError(f"{path}: chat_template is neither a text nor a list of them with names")
    return named


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _as_read(template: str) -> list[list[str]] | str:
    """What Jinja2 reads it as, set as transformers has it; the text, where it can read nothing."""
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    try:
        tokens = environment.lexer.tokenize(template)
        read = []
        for kind, run in groupby(tokens, key=lambda each: each.type):
            values = [each.value for each in run]
            if kind == "data":  # a text that a comment cuts in two is one
                values = ["".join(values)]
            # How a tag begins and ends, with the space there, has done its work by then.
            read += [[kind, "" if kind in _TAGS else repr(value)] for value in values]
        return read
    except jinja2.TemplateError:
        return template


def _has(files: ModelFiles, name: str) -> bool:
    return files.root / name in files.voice


def _deciding(files: ModelFiles) -> list[Path]:
    """What the tokenizer is made of, config.json among it: it may name the class."""
    return [files.config, *files.voice, *files.code]


def _part() -> str:
    libraries = f"transformers {version('transformers')}, tokenizers {version('tokenizers')}"
    return f"tokenizer without places, by {libraries}"


def _loaded(files: ModelFiles) -> dict[str, Any]:
    """`digest`, and `end`: the id of its end token."""
    found: dict[str, Any] = json.loads(digest_of(_part(), _deciding(files), partial(_load, files)))
    return found


def _load(files: ModelFiles) -> str:
    if files.code:  # never run to be hashed: its identity is its files
        return _of_files(files, None, "with code of its own")
    for path in files.voice:
        read_bytes(path)  # a loader names no file that it cannot read, and reads without a limit
    from transformers import AutoTokenizer  # takes seconds
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.root, trust_remote_code=False, local_files_only=True)
    except LopdError:  # a request to stop
        raise
    except Exception as error:  # noqa: BLE001 - tokenizers raises no narrower one
        raise DataError(f"{files.root}: its tokenizer does not load: {reason_of(error)}") from None
    finally:
        logging.set_verbosity(before)
    listed = {path.name for path in files.voice}
    read = {name for name in type(tokenizer).vocab_files_names.values() if name}
    for name in sorted(read - listed):
        if is_there(files.root / name):
            raise DataError(
                f"{files.root / name}: the tokenizer reads it, and lopd would not: make a tokenizer.json"
            )
    end = tokenizer.eos_token_id
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return _of_files(files, end, type(tokenizer).__qualname__)
    state = _without_defaults(json.loads(backend.to_str()))
    if state["model"].get("dropout"):
        raise DataError(
            f"{files.root}: its tokenizer has a dropout, and reads a text as other tokens each time: set "
            "model.dropout of its tokenizer.json to null"
        )
    return _result([_merges_as_pairs(state), _python_settings(tokenizer)], end)


def _result(state: Any, end: int | None) -> str:
    return json.dumps({"digest": sha256_bytes(canonical_json(state)), "end": end})


def _of_files(files: ModelFiles, end: int | None, kind: str) -> str:
    made_of = [path for path in files.voice if path.name != GENERATION and path.suffix != ".jinja"]
    return _result([kind, [[path.name, _digest(path)] for path in (*made_of, *files.code)]], end)


def _digest(path: Path) -> str:
    """Of a file; of tokenizer_config.json without the places in it, which are not given away."""
    if path.name != "tokenizer_config.json":
        return sha256_file(path)
    return sha256_bytes(canonical_json(without_places(read_object(path))))


def _without_defaults(state: dict[str, Any]) -> dict[str, Any]:
    """Without runtime state, and without null and false: what a library that lacks a key does."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(each) for key, each in value.items() if each is not None and each is not False}
        return [clean(each) for each in value] if isinstance(value, list) else value

    vocabulary = state["model"].pop("vocab", None), state["model"].pop("merges", None)
    kept: dict[str, Any] = clean({key: each for key, each in state.items() if key not in _RUNTIME_STATE})
    kept["model"] |= {"vocab": vocabulary[0], "merges": vocabulary[1]}
    return kept


def _merges_as_pairs(state: dict[str, Any]) -> dict[str, Any]:
    merges = state["model"]["merges"] or []
    pairs = [each.split(" ", 1) if isinstance(each, str) else each for each in merges]
    return state | {"model": state["model"] | {"merges": pairs}}


def _python_settings(tokenizer: Any) -> dict[str, Any]:
    """What transformers adds to the backend: classes with methods of their own, and settings."""
    from transformers import PreTrainedTokenizerFast

    mro = type(tokenizer).__mro__
    own = mro[: mro.index(PreTrainedTokenizerFast)] if PreTrainedTokenizerFast in mro else mro
    classes = [
        f"{each.__module__}.{each.__qualname__}"
        for each in own
        if any(callable(value) and not name.startswith("__") for name, value in _methods(each))
    ]
    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    cleans = tokenizer.clean_up_tokenization_spaces and (not is_bpe or getattr(tokenizer, _CLEANS_BPE, True))
    special = {
        name: sorted(map(str, token)) if isinstance(token, list | tuple) else str(token)
        for name, token in tokenizer.special_tokens_map.items()
    }
    return {
        "classes": classes,
        "cleans_up": bool(cleans),
        "special": special,
        "splits_special": bool(tokenizer.split_special_tokens),
    }


def _methods(kind: type) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(kind).items() if not isinstance(value, type)]
