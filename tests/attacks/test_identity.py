"""A model is what an engine would compute with: every difference is refused, no other way of writing it is.

Each generated difference is shown to change what transformers loads, and each rewriting to leave it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.lineage import WHOLE_MODEL, Evidence, prove_same
from megatron_lopd.errors import DataError, LineageError, LopdError
from tests.attacks.model_differences import AMBIGUITIES, DIFFERENCES, spoil
from tests.attacks.model_rewritings import REWRITINGS, Way, make_base

LONG = 220  # of each, by night
# A second rewriting comes after, but not after those that leave the files elsewhere, nor can it be one that
# takes what others rewrite away.
LAST, FIRST = ("sharded", "links as in a hub cache"), ("no generation config",)
TEXTS = (
    "the 12 and 34+1+1 = 1+1",
    "<|user|>  abc<|assistant|> THE end<|end|>",
    "in the herd, abcd 1234 12.",
    "a b c h 1 2",
)


def ways(kinds: Mapping[str, Way], count: int) -> list[Any]:
    """(name, seed): each kind in turn; those beyond the first `count` by night."""
    names = list(kinds)
    return [
        pytest.param(names[seed % len(names)], seed, marks=[pytest.mark.nightly] if seed >= count else [])
        for seed in range(LONG)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def known(base: Path) -> dict[str, str]:
    return fingerprint_model(base).parts()


@pytest.fixture(scope="module")
def seen(base: Path) -> dict[str, Any]:
    return observe(base)


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "model")
    return tmp_path / "model"


def observe(model: Path) -> dict[str, Any]:
    """What transformers loads, computes and encodes; by what of it."""
    tokens = torch.arange(40).reshape(2, 20)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True)
    with torch.inference_mode():
        logits = loaded(tokens).logits
    weights = hashlib.sha256()
    for name, value in sorted(loaded.state_dict().items()):
        weights.update(name.encode() + value.numpy().tobytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": " 2 "}]
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    return {
        "weights": weights.hexdigest(),
        "logits": logits.tolist(),
        "encoded": encoded,
        "decoded": [tokenizer.decode(each, skip_special_tokens=True) for each in encoded],
        "chat": tokenizer.apply_chat_template(turns, tokenize=False),
        "ends": sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}),
    }


@pytest.mark.parametrize(("name", "seed"), ways(REWRITINGS, len(REWRITINGS)))
def test_what_computes_the_same_is_the_same(
    model: Path, known: dict[str, str], seen: dict[str, Any], name: str, seed: int
) -> None:
    random = Random(seed)
    REWRITINGS[name](random, model)
    if seed >= len(REWRITINGS) and name not in LAST:
        others = [each for each in REWRITINGS if "template" not in each and each not in (name, *FIRST)]
        REWRITINGS[random.choice(others)](random, model)
    assert fingerprint_model(model).parts() == known
    assert observe(model) == seen, "the rewriting is none"


@pytest.mark.parametrize(("name", "seed"), ways(DIFFERENCES, len(DIFFERENCES) + 9))
def test_what_computes_otherwise_is_refused(
    model: Path, known: dict[str, str], seen: dict[str, Any], name: str, seed: int
) -> None:
    DIFFERENCES[name](Random(seed), model)
    other = fingerprint_model(model).parts()
    with pytest.raises(LineageError, match="differs"):
        prove_same("one teacher", Evidence(known, "a"), Evidence(other, "b"), parts=WHOLE_MODEL, allow=False)
    assert observe(model) != seen, "the difference is none"


@pytest.mark.parametrize(("name", "seed"), ways(AMBIGUITIES, len(AMBIGUITIES)))
def test_what_loaders_read_differently_is_refused_in_a_line(model: Path, name: str, seed: int) -> None:
    AMBIGUITIES[name](Random(seed), model)
    with pytest.raises(DataError) as caught:
        fingerprint_model(model)
    assert str(model) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "seed"), ways({"spoilt": spoil}, 30))
def test_what_is_spoilt_is_refused_in_a_line_or_is_what_it_says(
    model: Path, known: dict[str, str], seen: dict[str, Any], name: str, seed: int
) -> None:
    spoil(Random(seed), model)
    found, said = {}, ""
    try:
        found = fingerprint_model(model).parts()
    except LopdError as error:
        said = str(error)
    assert "\n" not in said
    if found == known:
        with suppress(TypeError, ValueError, OSError):  # transformers may not take what counts for nothing
            assert observe(model) == seen
