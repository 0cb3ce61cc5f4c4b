"""What a run would do with each of its stages: the one answer that run, dry runs, doctor and status give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_lopd.errors import LineageError, LopdError
from megatron_lopd.pipeline.execute import check_begun, check_unchanged
from megatron_lopd.pipeline.plan_file import has_parts
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Stage


@dataclass(frozen=True)
class Judgement:
    """A stage's `state` in words, and what stops a run at it; None where nothing does."""

    stage: Stage
    state: str
    refusal: LopdError | None = None


def judge(stages: Iterable[Stage], run: ResolvedRun) -> Iterator[Judgement]:
    """Each of the stages, which come in the order of a run, as it would be met there.

    A run ends at the first that is refused. What is committed behind a stage that is yet to be made is
    compared with the recipe when that is there.
    """
    refused = waiting = ""
    for stage in stages:
        if refused:
            yield Judgement(stage, f"not reached: {refused} is refused")
            continue
        committed = run.is_committed(stage.name)
        state = "committed" if committed else "begun" if has_parts(run.directory_of(stage.name)) else "to do"
        if waiting:
            after = "" if state == "to do" else f", to be compared with the recipe once {waiting} is there"
            yield Judgement(stage, state + after)
            continue
        refusal = _refusal(stage, run, committed=committed)
        if refusal is not None:
            refused = stage.name
            state += f", {'by another recipe' if isinstance(refusal, LineageError) else 'damaged'}"
        elif not committed:
            waiting = stage.name
        yield Judgement(stage, state, refusal)


def _refusal(stage: Stage, run: ResolvedRun, *, committed: bool) -> LopdError | None:
    try:
        (check_unchanged if committed else check_begun)(stage, run)
    except LopdError as error:
        return error
    return None
