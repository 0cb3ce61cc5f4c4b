"""The prompts of a recipe: from a file, or made by a task."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from megatron_lopd.artifacts.digest_cache import digest_of, stamp
from megatron_lopd.artifacts.manifest import Parent
from megatron_lopd.config import PromptSource
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.files.digests import canonical_json, sha256_bytes, sha256_file
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.prompts.reader import Reader, reader_of
from megatron_lopd.prompts.rows import read_prompts
from megatron_lopd.registry import PROMPT_READERS, TASKS, identity


def load_prompts(source: PromptSource, split: str, seed: int) -> list[Prompt]:
    """The prompts of `source`, in order. `split` ("sft", "opd", "eval") and `seed` matter to tasks.

    Raises ConfigError for an unknown task or format, DataError for a file that is missing, empty, malformed
    (naming the line) or shorter than `source.count`.
    """
    with _naming(split):
        if source.task is not None:
            assert source.count is not None  # PromptSource requires it of a task
            return list(TASKS[source.task]().prompts(source.count, seed, split))
        assert source.path is not None  # PromptSource requires one of the two
        return read_prompts(
            Path(source.path),
            source.count,
            source.prompt_field,
            source.answer_field,
            source.suffix,
            format=source.format,
            extra_fields=source.extra_fields,
        )


class PromptSet:
    """The prompts of a recipe's source, and what a manifest says of them. Raises as `load_prompts`.

    A file is read when its prompts are asked for, and need not be for what was said of it before.
    """

    def __init__(self, source: PromptSource, split: str, seed: int) -> None:
        self._source, self._split, self._seed = source, split, seed
        self._read: list[int] | None = None  # the file's stamp, when its prompts were read

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts, in order. DataError where the parent that was told of them before is of others."""
        reader, told = self._reader(), self.__dict__.get("parent")
        self._read = None if reader is None else stamp(Path(self._source.path or ""))
        prompts = load_prompts(self._source, self._split, self._seed)
        if told is not None and told.digests["sha256"] != _digest_of_prompts(prompts):
            raise DataError(f"{told.path}: changed since it was hashed: leave it alone, and start again")
        return prompts

    @cached_property
    def parent(self) -> Parent:
        """The prompts as an artifact's parent: a digest of what they say, wherever they came from.

        And of the code that made them, where that is the user's own.
        """
        source = self._source
        digests = {"sha256": self._digest()}
        maker = source.task or source.format or ""
        if ":" in maker:
            digests[f"source of {maker}"] = identity(maker).rpartition(":")[2]
        where = source.path if source.path is not None else f"task {source.task}"
        return Parent("file", where, digests)

    def _digest(self) -> str:
        reader, file = self._reader(), Path(self._source.path or "")
        if reader is None or self._read not in (None, stamp(file)):  # what was read decides
            return _digest_of_prompts(self.prompts)
        code = [sha256_file(Path(inspect.getfile(each))) for each in (type(reader), read_prompts)]
        how = canonical_json([asdict(self._source) | {"path": None}, code])
        part = f"prompts {file.name} {sha256_bytes(how)}"
        return digest_of(part, [file], lambda: _digest_of_prompts(self.prompts))

    def _reader(self) -> Reader | None:
        """What reads the prompts, where that and one file decide what they say: a user's may read others."""
        source = self._source
        if source.path is None or not Path(source.path).is_file():
            return None
        with _naming(self._split):
            reader = reader_of(Path(source.path), source.format)
        return None if PROMPT_READERS.import_path(reader.name) else reader


@contextmanager
def _naming(split: str) -> Iterator[None]:
    """A ConfigError of the block tells which of the recipe's prompts it is of."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"prompts.{split}: {error}") from None


def _digest_of_prompts(prompts: list[Prompt]) -> str:
    content = [
        [prompt.id, list(prompt.messages), prompt.answer, *([prompt.extra] if prompt.extra else [])]
        for prompt in prompts
    ]
    return sha256_bytes(canonical_json(content))
