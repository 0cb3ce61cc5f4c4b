"""What a model says of its making, and the refusal where two things are not the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.lineage import (
    Evidence,
    ModelLineage,
    prove_same,
    read_model_lineage,
    short,
    worst,
    write_model_lineage,
)
from megatron_lopd.artifacts.manifest import (
    Parent,
)
from megatron_lopd.errors import DataError, LineageError
from tests.unit.test_artifacts import TENSORS, make_model


def test_a_mismatch_names_the_part_both_digests_and_both_places() -> None:
    left = Evidence({"weights": "a" * 64, "config": "c"}, "score's teacher (models/b)")
    right = Evidence({"weights": "b" * 64, "config": "c"}, "generate's teacher (models/a)")
    with pytest.raises(LineageError) as caught:
        prove_same("one teacher", left, right, parts=("config", "weights"), allow=False)
    message = str(caught.value)
    for part in (
        "weights differs",
        "a" * 12,
        "b" * 12,
        "models/a",
        "models/b",
        "allow_teacher_mismatch=true",
    ):
        assert part in message
    assert prove_same("one teacher", left, right, parts=("config",), allow=False).status == "proved"
    assert prove_same("one teacher", left, right, parts=("weights",), allow=True).status == "overridden"
    assert worst(["proved", "overridden", "declared"]) == "overridden"


def test_a_digest_is_shortened_and_what_stands_for_one_is_not() -> None:
    assert short("0123456789abcdef" * 4) == "0123456789ab"
    assert short("random, seed 17") == "random, seed 17"
    assert len(short("x" * 1000)) == 64, "a manifest may say anything"


def test_a_model_lineage_must_speak_of_the_weights_beside_it(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    assert read_model_lineage(model) is None
    lineage = ModelLineage(
        model=fingerprint_model(model).parts(),
        made_by="sft",
        status="proved",
        teacher=Parent("model", "t", {"weights": "ab"}),
        chain={"sft": {"id": "x"}},
    )
    write_model_lineage(model, lineage)
    assert read_model_lineage(model) == lineage
    save_file(TENSORS | {"model.norm.weight": torch.zeros(3)}, model / "model.safetensors")
    with pytest.raises(LineageError, match="describes weights"):
        read_model_lineage(model)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"model": {"weights": 5}},
        {"model": {"weights": None}},
        {"model": []},
        {"made_by": 5},
        {"status": ["proved"]},
        {"teacher": "models/t"},
        {"teacher": {"path": "t", "digests": [1]}},
        {"teacher": {"path": "t", "digests": "x"}},
        {"teacher": {"path": "t", "digests": {"weights": 5}}},
        {"teacher": {"path": 5, "digests": {}}},
        {"chain": [["sft", {"id": "x"}]]},
        {"chain": {"sft": "x"}},
        {"chain": {"sft": {"id": 5}}},
        {"chain": {"../../other": {"id": "x"}}},
        {"chain": {"a\0": {"id": "x"}}},
    ],
)
def test_a_lineage_of_other_types_is_refused_in_a_line(tmp_path: Path, spoilt: dict[str, Any]) -> None:
    model = make_model(tmp_path / "model")
    parts = fingerprint_model(model).parts()
    write_model_lineage(model, ModelLineage(parts, "sft", "declared", None, {}))
    path = model / "lopd_lineage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | spoilt))
    with pytest.raises(DataError, match=r"^[^\n]*lopd_lineage\.json: [^\n]*$"):
        read_model_lineage(model)


@pytest.mark.parametrize("odd", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_no_lineage(tmp_path: Path, odd: Callable[[Path], object]) -> None:
    model = make_model(tmp_path / "model")
    odd(model / "lopd_lineage.json")
    with pytest.raises(DataError, match=r"lopd_lineage\.json: a (directory|FIFO|link)"):
        read_model_lineage(model)
