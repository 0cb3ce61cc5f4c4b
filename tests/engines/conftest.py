"""SmolLM2-135M on text, for every engine to be held to."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lopd.config import EngineConfig
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.engines import open_engine
from tests.model_zoo import unsampled
from tests.smollm2 import CLOSE, TEXTS, TOP_K, make_smollm2


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def smollm2_asked(smollm2: Path) -> list[Rollout]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def tokens(text: str) -> NDArray[np.int32]:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    return [
        unsampled(f"text{at}", tokens(prompt), tokens(answer)) for at, (prompt, answer) in enumerate(TEXTS)
    ]


@pytest.fixture(scope="session")
def smollm2_scores(smollm2: Path, smollm2_asked: list[Rollout]) -> list[Score]:
    """The transformers engine's scores, which are first held to the model itself."""
    with closing(open_engine(EngineConfig(), str(smollm2))) as engine:
        scores = list(engine.score(smollm2_asked, TOP_K))
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    for request, score in zip(smollm2_asked, scores, strict=True):
        tokens = np.concatenate([request.prompt_tokens, request.response_tokens]).astype(np.int64)
        with torch.no_grad():
            rows = model(torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1).numpy()
        own = rows[np.arange(len(request.prompt_tokens) - 1, len(tokens) - 1), request.response_tokens]
        np.testing.assert_allclose(score.log_probs, own, rtol=0, atol=CLOSE)
    assert np.concatenate([score.log_probs for score in scores]).mean() > -4  # it reads text, and no noise
    return scores
