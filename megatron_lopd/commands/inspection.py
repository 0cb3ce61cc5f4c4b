"""`lopd inspect`: an artifact or a shard, shown to a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lopd.artifacts.committed import CommittedFile
from megatron_lopd.artifacts.lineage import short
from megatron_lopd.artifacts.manifest import committed_files, is_committed, load_manifest
from megatron_lopd.commands.verify import artifacts_of
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.evaluation.answers import ANSWERS, read_answers
from megatron_lopd.files.reading import is_file
from megatron_lopd.pipeline.plan_file import PLAN_FILE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megatron_lopd.data.arrow_file import ShardFile
    from megatron_lopd.data.records import Rollout, Score, TopK
    from megatron_lopd.data.shards import ShardReader

Decode = Callable[[Sequence[int]], str]

TOP_TOKENS_SHOWN = 8


def describe_path(path: Path, samples: int) -> Iterator[str]:
    """Yield the lines that describe a run, an artifact, a shard or graded answers, with `samples` of each."""
    if path.suffix == ".arrow":
        yield from describe_shard(path, samples)
        return
    if path.name == ANSWERS:
        yield from _describe_answers(path, samples)
        return
    if not is_committed(path):
        yield from _describe_run(path)
        return
    manifest = load_manifest(path)
    yield f"{path}: {manifest.kind}, id {manifest.id}, lineage {manifest.lineage}"
    yield from (f"  {name}: {count:,}" for name, count in manifest.counts.items())
    for role, parent in manifest.parents.items():
        digests = ", ".join(f"{part} {short(digest)}" for part, digest in parent.digests.items())
        yield f"  made from {role}: {parent.path} ({digests})"
    for name, entry in manifest.files.items():
        yield f"  {name}: {entry.size:,} bytes, BLAKE3 {short(entry.blake3)}"
    for file in committed_files(path, manifest):
        if file.name.endswith(".arrow") and not file.path.parent.with_name(ANSWERS).is_file():
            yield from describe_shard(file, samples)
        if file.path.name == ANSWERS:
            yield from _describe_answers(file, samples)


def _describe_run(path: Path) -> Iterator[str]:
    """What is committed in a run's directory, and what was begun."""
    artifacts = [] if is_file(path) else artifacts_of(path)
    if not artifacts:
        raise DataError(
            f"{path}: nothing to inspect: give a run's directory in which a stage is committed, an artifact, "
            f"an .arrow shard or {ANSWERS}"
        )
    yield f"{path}: a run"
    for each in artifacts:
        manifest = load_manifest(each)
        counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in manifest.counts.items())
        yield f"  {each.relative_to(path)}: {manifest.kind}, {manifest.lineage}{counts and f', {counts}'}"
    for each in sorted(path.glob(f"*/{PLAN_FILE}")):
        if each.parent not in artifacts:
            yield f"  {each.parent.name}: begun"
    yield f"look into one with lopd inspect {artifacts[0]}"


def _describe_answers(file: Path | CommittedFile, samples: int) -> Iterator[str]:
    """The first `samples` graded answers of each mode."""
    yield f"{file if isinstance(file, Path) else file.path}: graded answers"
    shown: Counter[str] = Counter()
    for each in read_answers(file):
        shown[each.mode] += 1
        if shown[each.mode] > samples:
            continue
        yield f"  {each.id} ({each.mode}): {each.verdict}"
        for message in each.prompt:
            yield f"    {message.get('role')}: {message.get('content')!r}"
        yield f"    response: {each.text!r}"
        known = {"right answer": each.gold, "answer read": each.answer}  # a grader may need or read none
        if said := ", ".join(f"{what}: {text!r}" for what, text in known.items() if text is not None):
            yield f"    {said}"


def describe_shard(
    shard: ShardFile,
    samples: int,
    sample_ids: Sequence[str] = (),
    position: int = 0,
    tokenizer: Path | None = None,
) -> Iterator[str]:
    """Yield the lines that describe a shard and its first `samples`, or those of the ids given.

    `position` is the response token whose top k is shown. Tokens are decoded with `tokenizer`, a model
    directory, or else with the one kept beside the shard. Raises DataError for what is damaged or not there.
    """
    from megatron_lopd.data.schemas import ROLLOUTS, kind_of
    from megatron_lopd.data.shard_kind import NO_TOKEN
    from megatron_lopd.data.shards import ShardReader

    path = shard if isinstance(shard, Path) else shard.path
    if not path.is_file():
        raise DataError(f"{path}: no such shard")
    kind = kind_of(shard)
    reader: ShardReader[Any] = ShardReader(kind, [shard])
    parameters = "".join(f", {name} {value}" for name, value in kind.parameters.items())
    yield f"{path}: {len(reader):,} {kind.name}, version {kind.version}{parameters}"
    responses = reader.lengths("response_tokens" if kind is ROLLOUTS else "log_probs")
    size = path.stat().st_size
    yield f"  {size:,} bytes, {size / responses.sum():.2f} a response token"
    if kind is ROLLOUTS:
        yield f"  prompt tokens: {_spread(reader.lengths('prompt_tokens'))}"
    yield f"  response tokens: {_spread(responses)}"
    if reader.max_token != NO_TOKEN:
        yield f"  largest token id: {reader.max_token}"
    decode = _decoder(path.parent, tokenizer)
    indices = [reader.position(each) for each in sample_ids] or range(min(samples, len(reader)))
    for index in indices:
        yield from _describe_record(reader.record(index), decode, position)


def _spread(lengths: NDArray[np.int64]) -> str:
    import numpy as np

    least, median, most = np.percentile(lengths, [0, 50, 100])
    return f"{lengths.sum():,} (a sample: least {least:.0f}, median {median:.0f}, most {most:.0f})"


def _decoder(directory: Path, tokenizer: Path | None) -> Decode | None:
    """By the tokenizer given, or kept with an artifact, or that of the student it was sampled from."""
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        return _slow_decoder(tokenizer)
    beside = (directory.parent / stage / "model" for stage in ("student", "sft"))
    for model in (tokenizer, directory / "tokenizer", *beside):
        if model is not None and (model / "tokenizer.json").is_file():
            # By itself, where transformers would take seconds: what it adds, clean-ups, is not wanted here.
            from tokenizers import Tokenizer

            try:
                found = Tokenizer.from_file(str(model / "tokenizer.json"))
            except Exception as error:
                raise ConfigError(f"{model}: its tokenizer does not load: {error}") from error
            return lambda ids: str(found.decode(list(ids), skip_special_tokens=False))
    return None


def _slow_decoder(model: Path) -> Decode:
    """Of a tokenizer that only transformers reads."""
    from megatron_lopd.data.chat import Chat

    tokenizer = Chat(str(model)).tokenizer
    return lambda ids: str(tokenizer.decode(list(ids)))


def _describe_record(record: Rollout | Score, decode: Decode | None, position: int) -> Iterator[str]:
    from megatron_lopd.data.records import Rollout, Score

    yield f"  {record.sample_id}"
    if isinstance(record, Rollout):
        for name, tokens in (("prompt", record.prompt_tokens), ("response", record.response_tokens)):
            text = repr(decode(tokens.tolist())) if decode is not None else tokens.tolist()
            yield f"    {name} ({len(tokens)} tokens): {text}"
        yield f"    finish reason: {record.finish_reason}"
    if record.log_probs is not None:
        mean, least = float(record.log_probs.mean()), float(record.log_probs.min())
        yield f"    log-probs: {len(record.log_probs)}, mean {mean:.4f} nats, least {least:.4f}"
    if isinstance(record, Score) and record.top_k is not None:
        yield from _describe_top_k(record, record.top_k, decode, position)


def _describe_top_k(score: Score, top_k: TopK, decode: Decode | None, position: int) -> Iterator[str]:
    if not 0 <= position < len(score.log_probs):
        raise DataError(
            f"sample {score.sample_id} has {len(score.log_probs)} response tokens: choose a position from 0 "
            f"to {len(score.log_probs) - 1}, not {position}"
        )
    own, tail = score.log_probs[position], top_k.tail_log_probs[position]
    yield f"    response token {position}: log-prob {own:.4f} nats, tail {tail:.4f}"
    likeliest = zip(top_k.ids[position].tolist(), top_k.log_probs[position].tolist(), strict=True)
    for token, log_prob in list(likeliest)[:TOP_TOKENS_SHOWN]:
        text = f" {decode([token])!r}" if decode is not None else ""
        yield f"      {token}{text}: {log_prob:.4f}"
    if len(top_k.ids[position]) > TOP_TOKENS_SHOWN:
        yield f"      and {len(top_k.ids[position]) - TOP_TOKENS_SHOWN} less likely"
