"""The math grader against the toy task's exact one, on what a trained model writes."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.config import EngineConfig, EvaluateConfig, Sampling
from megatron_lopd.data.chat import Chat
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.data.shards import ShardReader
from megatron_lopd.evaluation.grading import grade_model
from megatron_lopd.evaluation.verdicts import Marker
from megatron_lopd.graders import open_grader
from megatron_lopd.prompts.arithmetic import problems
from megatron_lopd.prompts.prompt import Prompt

TEACHER = Path(__file__).parents[2] / "examples/quickstart/teacher"
FORMS = ("{}", r"\boxed{{{}}}", "${}.0$", r"\frac{{3\cdot {}}}{{3}}")  # of one and the same answer


def test_two_graders_agree_on_a_trained_models_answers(tmp_path: Path) -> None:
    asked = list(problems(60, seed=123, split="eval"))
    prompts = [
        Prompt(p.id, ({"role": "user", "content": p.prompt},), FORMS[n % len(FORMS)].format(p.answer))
        for n, p in enumerate(asked)
    ]
    last_digit = {p.id: p.answer for p in asked}
    sampling = Sampling(max_new_tokens=26, temperature=1.5, samples_per_prompt=4)  # so that it errs at times
    settings = EvaluateConfig("math", sampling=sampling, engine=EngineConfig(batch_size=256))
    with open_grader("math") as mathematical, open_grader("arithmetic") as exact:
        mathematical.require(prompts)
        job = TEACHER, prompts, settings, 1, tmp_path, "teacher", mathematical, "a plan"
        grades, _ = grade_model(*job)
        shards = sorted((tmp_path / "sampled").glob("*.arrow"))
        marker = Marker(prompts, TEACHER, False)
        found = marker.by_prompt(shards, mathematical, tmp_path)
        truth = marker.by_prompt(shards, exact, tmp_path)
    chat, right = Chat(str(TEACHER)), {True: 0, False: 0}
    texts = {r.sample_id: chat.decode(r.response_tokens) for r in ShardReader(ROLLOUTS, shards)}
    for prompt_id, verdicts in truth.items():
        for index, (one, other) in enumerate(zip(verdicts, found[prompt_id], strict=True)):
            right[one.right] += 1
            if one.right != other.right:  # the exact one wants the toy task's form as well
                assert other.right
                assert texts[f"{prompt_id}/{index}"].endswith(last_digit[prompt_id])
    assert min(right.values()) > 20
    assert grades.ungraded == 0
    assert grades.majority is not None
    assert grades.majority.share > grades.sampled  # a trained model errs in more ways than it is right
