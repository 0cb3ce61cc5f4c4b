"""Models of one tokenizer, each padded to a number of rows of its own, as Qwen2.5's: from end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_lopd.cli import main
from megatron_lopd.config import EngineConfig, Sampling
from megatron_lopd.data.dataset import open_scores, open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.engines import Prompted, open_engine
from megatron_lopd.engines.draw import draw, truncated_log_probs
from megatron_lopd.ops.top_k import vocab_parallel_top_k
from tests.model_zoo import make_model_dir, unsampled
from tests.pipeline import SMALL, write_recipe

TOKENS, STUDENT = 81, 131
TOP_K = 8
# fp32 sums in another order; shards keep the log-probs of a top k coarser.
NATS, KEPT_NATS = 1e-4, 1e-3


def models(root: Path, teacher_rows: int, student_rows: int = STUDENT, tokens: int = TOKENS) -> None:
    make_model_dir(root / "teacher", seed=1, vocab_size=teacher_rows, tokens=tokens, **SMALL)
    make_model_dir(root / "student", seed=2, vocab_size=student_rows, tokens=tokens, tied=True, **SMALL)


@pytest.mark.parametrize(
    ("teacher_rows", "engine", "objective", "sampling"),
    [
        (140, {"name": "megatron", "megatron": {"micro_batch_tokens": 96}}, "topk_reverse_kl", {}),
        (96, {"batch_size": 16}, "topk_forward_kl", {"top_p": 0.9, "temperature": 0.8}),
        (96, {"batch_size": 16}, "sampled_reverse_kl", {}),
    ],
)
def test_a_whole_run(
    teacher_rows: int,
    engine: dict[str, object],
    objective: str,
    sampling: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    models(tmp_path, teacher_rows)
    drawn = {"sampling": {"max_new_tokens": 12} | sampling, "engine": {"batch_size": 16, "shard_samples": 16}}
    recipe = write_recipe(tmp_path, generate=drawn, rollout=drawn, score={"engine": engine, "top_k": TOP_K})
    monkeypatch.chdir(tmp_path)
    options = ["sft.steps=2", "train.steps=2", f"train.objective={objective}", "prompts.eval=null"]
    assert main(["run", recipe.name, *options]) == 0, capfd.readouterr().err
    # The trainer gives what was drawn the log-probs that the sampler kept, whatever the tokenless had.
    assert "rollouts agree with the trainer within" in capfd.readouterr().err
    first = json.loads(Path("run/train/metrics.jsonl").read_text().splitlines()[0])
    assert first["drift_kl"] == pytest.approx(0, abs=1e-3)

    rollouts, scores = list(open_shards(ROLLOUTS, Path("run/rollout"))), list(open_scores(Path("run/score")))
    for answers in (rollouts, open_shards(ROLLOUTS, Path("run/generate"))):
        assert max(each.response_tokens.max() for each in answers) < TOKENS
    teacher = AutoModelForCausalLM.from_pretrained("teacher")
    missing = 0.0
    for rollout, score in zip(rollouts[:8], scores[:8], strict=True):
        tokens = np.concatenate([rollout.prompt_tokens, rollout.response_tokens])
        with torch.no_grad():
            logits = teacher(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].double()
        exact = logits.log_softmax(-1)[len(rollout.prompt_tokens) - 1 : -1].numpy()
        own = rollout.response_tokens[:, None]
        np.testing.assert_allclose(score.log_probs, np.take_along_axis(exact, own, 1)[:, 0], atol=NATS)
        assert score.top_k is not None
        likeliest = np.argsort(-exact[:, :TOKENS], axis=1)[:, :TOP_K]
        np.testing.assert_array_equal(score.top_k.ids, likeliest)
        np.testing.assert_allclose(
            score.top_k.log_probs, np.take_along_axis(exact, likeliest, 1), atol=KEPT_NATS
        )
        rest = exact.copy()
        np.put_along_axis(rest, np.concatenate([likeliest, own], axis=1), -np.inf, axis=1)
        # The rows without a token are in it.
        np.testing.assert_allclose(score.top_k.tail_log_probs, np.log(np.exp(rest).sum(1)), atol=NATS)
        missing += float(np.exp(exact[:, TOKENS:]).sum(1).mean()) / 8
    assert missing > 0.05, "the models would draw them"


def test_too_few_rows_are_refused_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command, in the same words."""
    monkeypatch.chdir(tmp_path)
    for teacher, student, who in ((80, 131, "teacher.model"), (131, 80, "student.model")):
        models(tmp_path, teacher, student)
        recipe = write_recipe(tmp_path).name
        commands: Sequence[Sequence[str]] = (
            ("run", recipe, "--dry-run"),
            ("doctor", recipe),
            ("plan", recipe, "--gpus", "h100:1"),
            ("run", recipe),
        )
        for command in commands:
            capsys.readouterr()
            assert main(list(command)) == 2, command
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert (
                f"{who}: {who.split('.')[0]} has vocab_size=80, too few for token 80 of its tokenizer"
                in error
            )
        assert not Path("run").exists()
        shutil.rmtree("teacher")
        shutil.rmtree("student")
    models(tmp_path, 140)
    capsys.readouterr()
    assert main(["run", write_recipe(tmp_path).name, "--dry-run", "score.top_k=82"]) == 2
    assert "score.top_k=82 leaves none" in capsys.readouterr().err


def test_holes_are_not_drawn_and_what_is_kept_of_a_draw_is_what_it_says(tmp_path: Path) -> None:
    """Ids between tokens, too; and a model with a tokenizer of its own is asked for its rows alone."""
    make_model_dir(tmp_path, tokens=TOKENS, vocab_size=STUDENT, **SMALL)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    gone = {id for word, id in list(vocabulary.items()) if word in "bcdefg" and vocabulary.pop(word)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    barred = gone | set(range(TOKENS, STUDENT))
    engine = open_engine(EngineConfig(), str(tmp_path))
    prompt = np.array([2, 6, 3], dtype=np.int32)
    asked = [Prompted(f"s{seed}", prompt, seed) for seed in range(40)]
    for sampling in (
        Sampling(max_new_tokens=8),
        Sampling(max_new_tokens=8, temperature=0.0),
        Sampling(max_new_tokens=8, temperature=0.7, top_p=0.9),
    ):
        drawn = list(engine.generate(asked, sampling, frozenset({1})))
        assert not barred & set(np.concatenate([each.response_tokens for each in drawn]).tolist())
        for rollout, score in zip(drawn, engine.score(drawn), strict=True):
            assert rollout.behaviour_log_probs is not None
            np.testing.assert_allclose(rollout.behaviour_log_probs, score.log_probs, atol=NATS)
    most = STUDENT - len(barred)
    (score,) = engine.score([unsampled("s", prompt, prompt)], most)
    assert score.top_k is not None
    assert set(score.top_k.ids[0].tolist()) == set(range(STUDENT)) - barred


def test_a_draw_is_from_the_tokens_alone() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    tokenless = torch.tensor([2, 9, 11])
    uniform = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).clamp(min=1e-9)
    spread = logits.expand(4000, -1)
    alone = logits.clone()
    alone[:, tokenless] = -torch.inf
    for sampling in (Sampling(), Sampling(temperature=0.5, top_p=0.8, top_k=6)):
        tokens, kept = draw(spread, sampling, uniform, tokenless)
        expected = truncated_log_probs(alone, sampling)[0].exp()
        shares = torch.bincount(tokens, minlength=12) / 4000
        torch.testing.assert_close(shares.double(), expected, atol=1e-3, rtol=0)
        own = logits.double().log_softmax(-1)[0]
        torch.testing.assert_close(kept[-1].double(), own[tokens], atol=1e-6, rtol=0)
        if not sampling.is_plain:
            torch.testing.assert_close(kept[0].double(), expected[tokens].log(), atol=1e-6, rtol=0)


def test_at_the_real_sizes() -> None:
    """Qwen2.5's: 151,665 tokens in 151,936 and in 152,064 rows; one micro-batch."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 16, generator=generator)
    tokens = torch.randint(0, 151_665, (8,), generator=generator)
    for rows in (151_936, 152_064):
        weight = torch.randn(rows, 16, generator=generator)
        weight[151_665:] *= 3  # the likeliest of all, were they looked at
        tokenless = torch.arange(151_665, rows)
        ids, scored = vocab_parallel_top_k(hidden, weight, tokens, 64, tokenless, vocab_size=rows)
        exact = (hidden @ weight.t()).double().log_softmax(1)
        expected = exact[:, :151_665].topk(64, dim=1)
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(scored.top_k_log_probs.double(), expected.values, atol=1e-4, rtol=0)
        total = scored.top_k_log_probs.double().exp().sum(1) + scored.tail_log_probs.double().exp()
        total += torch.where((ids == tokens[:, None]).any(1), 0, scored.log_probs.double().exp())
        torch.testing.assert_close(total, torch.ones(8, dtype=torch.float64), atol=1e-5, rtol=0)
        assert exact[:, 151_665:].exp().sum(1).max() > 0.1
