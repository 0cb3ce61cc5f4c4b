"""`lopd inspect`: an artifact or a shard, shown to a person."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.lineage import short
from megatron_lopd.artifacts.manifest import is_committed, load_manifest
from megatron_lopd.data.chat import Chat
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.data.schemas import ROLLOUTS, SCORES
from megatron_lopd.data.shards import ShardReader
from megatron_lopd.errors import DataError


def describe_path(path: Path, samples: int) -> Iterator[str]:
    """Yield the lines that describe an artifact directory, or one `.arrow` shard with `samples` of it."""
    if path.suffix == ".arrow":
        yield from _describe_shard(path, samples)
        return
    if not is_committed(path):
        raise DataError(f"{path}: neither a committed artifact nor an .arrow shard")
    manifest = load_manifest(path)
    yield f"{path}: {manifest.kind}, id {manifest.id}, lineage {manifest.lineage}"
    yield from (f"  {name}: {count:,}" for name, count in manifest.counts.items())
    for role, parent in manifest.parents.items():
        digests = ", ".join(f"{part} {short(digest)}" for part, digest in parent.digests.items())
        yield f"  made from {role}: {parent.path} ({digests})"
    for name, entry in manifest.files.items():
        yield f"  {name}: {entry.size:,} bytes, sha256 {short(entry.sha256)}"
    for name in sorted(manifest.files):
        if name.endswith(".arrow"):
            yield from _describe_shard(path / name, samples)


def _describe_shard(path: Path, samples: int) -> Iterator[str]:
    kind: Any = SCORES if path.name.startswith(SCORES.name) else ROLLOUTS
    reader: ShardReader[Any] = ShardReader(kind, [path])
    yield f"{path}: {len(reader)} {kind.name}"
    chat = _chat_for(path.parent)
    for index in range(min(samples, len(reader))):
        yield from _describe_record(reader.record(index), chat)


def _chat_for(directory: Path) -> Chat | None:
    """The tokenizer kept with an artifact, or that of the student it was sampled from."""
    for model in (directory / "tokenizer", directory.parent / "sft" / "model"):
        if (model / "tokenizer.json").is_file():
            return Chat(str(model))
    return None


def _describe_record(record: Rollout | Score, chat: Chat | None) -> Iterator[str]:
    yield f"  {record.sample_id}"
    if isinstance(record, Rollout):
        for name, tokens in (("prompt", record.prompt_tokens), ("response", record.response_tokens)):
            text = repr(chat.tokenizer.decode(tokens)) if chat is not None else tokens.tolist()
            yield f"    {name} ({len(tokens)} tokens): {text}"
        yield f"    finish reason: {record.finish_reason}"
    if record.log_probs is not None:
        mean, least = float(record.log_probs.mean()), float(record.log_probs.min())
        yield f"    log-probs: {len(record.log_probs)}, mean {mean:.4f} nats, least {least:.4f}"
