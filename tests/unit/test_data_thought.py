"""An answer within a thought is no answer, however the thought is marked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_lopd.data.dataset import shard_name
from megatron_lopd.data.records import Rollout
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.data.shards import write_shard
from megatron_lopd.data.thought import WRITTEN
from megatron_lopd.evaluation.verdicts import Marker
from megatron_lopd.graders.math_grader import MathGrader
from megatron_lopd.prompts.prompt import Prompt

TEXT = [r"\boxed{", "}", "7", "3", "so", " "]
MARKS = {
    "Qwen's": ("<think>", "</think>"),
    "Magistral's": ("[THINK]", "[/THINK]"),
    "OpenThinker's": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "Cohere's": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "somebody's": ("<|reasoning_start|>", "<|reasoning_end|>"),
}


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader() as opened:
        yield opened


# As text, those that are declared; the others are known by their tokens alone.
CASES = [(name, kind) for name in MARKS for kind in ("special", "token")]
CASES += [(name, "text") for name, marks in MARKS.items() if marks in [("<think>", "</think>"), *WRITTEN]]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_thought_is_not_answered(tmp_path: Path, grader: MathGrader, name: str, kind: str) -> None:
    opened, closed = MARKS[name]
    written = [opened, closed] if kind == "special" else []
    vocabulary = ["<pad>", "<|end|>", *TEXT, *sorted({*opened, *closed} - {*TEXT, *written}), opened, closed]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template="{{ 7 }}")
    if kind != "text":
        fast.add_tokens([opened, closed], special_tokens=kind == "special")
    fast.save_pretrained(tmp_path / "voice")

    def tokens(*pieces: str) -> list[int]:
        whole = [[piece] if piece in TEXT or kind != "text" else list(piece) for piece in pieces]
        return [ids[token] for each in whole for token in each]

    right, wrong = (r"\boxed{", "7", "}"), (r"\boxed{", "3", "}")
    asked = {
        "a thought, and an answer": ((), (opened, *wrong, closed, *right), True),
        "an answer that is thought alone": ((), (opened, *right, closed, "so"), False),
        "a thought that does not close": ((), (opened, *right), False),
        "a thought that the template opens": ((opened, " "), (*right, closed, *wrong), False),
        "and that does not close": ((opened, " "), right, False),
        "none": ((), right, True),
        "one that the template closes": ((opened, " ", closed), right, True),
    }
    prompts = [Prompt(case, ({"role": "user", "content": "?"},), "7") for case in asked]
    records = [
        Rollout(
            f"{case}/0",
            np.array(tokens("so", *prompt), np.int32),
            np.array([*tokens(*response), ids["<|end|>"]], np.int32),
            "stop",
            -np.ones(len(tokens(*response)) + 1, np.float32),
        )
        for case, (prompt, response, _) in asked.items()
    ]
    shard = tmp_path / shard_name(ROLLOUTS, 0)
    write_shard(shard, ROLLOUTS, records, plan="")
    marker = Marker(prompts, tmp_path / "voice", trust_remote_code=False)
    found = marker.by_prompt([shard], grader, tmp_path)
    assert {case: found[case][0].right for case in asked} == {
        case: said for case, (_, _, said) in asked.items()
    }
