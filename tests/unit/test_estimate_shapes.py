from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from megatron_lopd.errors import ConfigError
from megatron_lopd.families.memory_shapes import Shape, published, read_shape
from tests.model_zoo import FAMILIES, Family, make_config

PUBLISHED = published()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), family=st.sampled_from(FAMILIES), tied=st.booleans())
def test_parameters_are_those_of_the_transformers_model(
    data: st.DataObject, family: Family, tied: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    groups = data.draw(st.integers(1, 3))
    heads = groups * data.draw(st.integers(1, 3))
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": heads * 2 * data.draw(st.integers(1, 8)),
        "intermediate_size": data.draw(st.integers(1, 50)),
        "num_hidden_layers": data.draw(st.integers(1, 4)),
        "vocab_size": data.draw(st.integers(2, 300)),
    }
    if family.startswith("qwen3"):
        sizes["head_dim"] = 2 * data.draw(st.integers(1, 20))
    if family == "qwen3_moe":
        sizes |= {
            "num_experts": data.draw(st.integers(2, 6)),
            "moe_intermediate_size": data.draw(st.integers(1, 30)),
        }
    config = make_config(family, tied=tied, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    directory = tmp_path_factory.mktemp("model")
    config.save_pretrained(directory)
    shape = read_shape(str(directory))
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())


def test_published_shapes() -> None:
    """The sizes that the model cards round to, and the one config.json of them that is here."""
    here = read_shape("tools/bench/qwen3_0.6b").arch
    assert here == PUBLISHED["Qwen3-0.6B"]
    billions = {name: Shape(arch).parameters / 1e9 for name, arch in PUBLISHED.items()}
    printed = {"0.6B": 0.6, "1.7B": 1.7, "4B": 4.0, "8B": 8.2, "14B": 14.8, "32B": 32.8, "30B-A3B": 30.5}
    assert {name: round(value, 1) for name, value in billions.items()} == {
        f"Qwen3-{name}": value for name, value in printed.items()
    }
    assert read_shape("elsewhere/Qwen3-8B-Base").arch == PUBLISHED["Qwen3-8B"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
    ],
)
def test_a_shape_that_cannot_be_read_says_which_key(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    raw = json.loads(Path("tools/bench/qwen3_0.6b/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ConfigError, match=expected):
        read_shape(str(tmp_path))


def test_an_unknown_model_that_is_not_here_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"models/Llama-9/config.json: no such file.*Qwen3-0.6B"):
        read_shape("models/Llama-9")
