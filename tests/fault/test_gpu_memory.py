"""`lopd run` with one process for everything, on a fake GPU: nobody has any of it when vLLM starts.

The fake GPU is a directory. A process that makes a model's weights has a context on it until it ends, as it
would have on a real one; a fake vLLM refuses to start, as the real one does, while another has one.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_lopd.artifacts.manifest import load_manifest
from tests.fault.test_kill import COMMAND
from tests.pipeline import write_recipe

REPOSITORY = Path(__file__).parents[2]
SFT = {"data": "data.jsonl", "steps": 2, "global_batch_size": 4, "micro_batch_tokens": 96}
FAKE_GPU = '''
import os, sys
from pathlib import Path

LEDGER = Path(os.environ["FAKE_GPU"])

def holders():
    """What processes that live, this one aside, have a context for."""
    found = []
    for path in LEDGER.iterdir():
        try:
            ended = Path(f"/proc/{path.name}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            ended = True
        if not ended and path.name != str(os.getpid()):
            found.append(path.read_text())
    return found

def take():
    others = holders()
    mine = LEDGER / str(os.getpid())
    if not mine.exists():
        with open(LEDGER.parent / "log", "a") as log:
            log.write(f"{command()} beside {others}\\n")
        mine.write_text(command())

def command():
    words = [word for word in sys.argv[1:] if "=" not in word]
    return words[0] if words else "python"
'''
AT_START = """
import sys

if sys.argv[:1] != ["-c"]:  # those ask for versions, and use no torch
    import torch
    from fake_gpu import take

    made = torch.nn.Parameter.__new__

    def make(cls, *arguments, **options):
        take()
        return made(cls, *arguments, **options)

    torch.nn.Parameter.__new__ = make
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_name = lambda number: "a fake GPU"
"""
FAKE_VLLM = '''
from types import SimpleNamespace
import numpy as np
from fake_gpu import holders

def SamplingParams(**options):
    return SimpleNamespace(**options)

def TokensPrompt(prompt_token_ids):
    return prompt_token_ids

class LLM:
    """Draws what the transformers engine draws."""

    def __init__(self, model, **unused):
        if holders():
            raise ValueError(f"Free memory is less than desired GPU memory utilization: {holders()}")
        from megatron_lopd.config import EngineConfig
        from megatron_lopd.engines.transformers_engine import TransformersEngine
        self._engine = TransformersEngine(EngineConfig(), model)

    def generate(self, asked, parameters, use_tqdm):
        from megatron_lopd.config import Sampling
        from megatron_lopd.engines import Prompted
        requests = [
            Prompted("x", np.array(tokens, dtype=np.int32), each.seed)
            for tokens, each in zip(asked, parameters)
        ]
        first = parameters[0]
        sampling = Sampling(max_new_tokens=first.max_tokens, temperature=first.temperature)
        for done in self._engine.generate(requests, sampling, frozenset(first.stop_token_ids)):
            log_probs = SimpleNamespace(logprobs=done.log_probs.tolist())
            output = SimpleNamespace(
                token_ids=done.response_tokens.tolist(), logprobs=log_probs, finish_reason=done.finish_reason
            )
            yield SimpleNamespace(outputs=[output])
'''


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.timeout(900)  # four processes that import torch, on a machine that others use as well
def test_nothing_of_training_is_held_when_vllm_starts(tmp_path: Path) -> None:
    assert not torch.cuda.is_available(), "the fake would be taken for a real one"
    write_recipe(tmp_path, sft=SFT, train=None)
    talks = [
        [{"role": "user", "content": f"{number}+1="}, {"role": "assistant", "content": f"{number + 1}"}]
        for number in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps({'messages': each})}\n" for each in talks))
    fakes = write(
        tmp_path / "fakes",
        {
            "fake_gpu.py": FAKE_GPU,
            "sitecustomize.py": AT_START,
            "vllm/__init__.py": FAKE_VLLM,
            "vllm/v1/__init__.py": "",
            "vllm/v1/engine/__init__.py": "",
            "vllm/v1/engine/exceptions.py": "class EngineDeadError(Exception): pass",
            "vllm-0.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.0\n",
            "vllm-0.0.dist-info/top_level.txt": "vllm\n",
        },
    )
    (tmp_path / "gpu").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [*COMMAND, "evaluate.engine.name=vllm"],
        cwd=tmp_path,
        env=environment
        | {
            "FAKE_GPU": str(tmp_path / "gpu"),
            "PYTHONPATH": os.pathsep.join([str(fakes), str(REPOSITORY)]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Not `run` itself; and last, by the number of its pipe, vLLM's own process.
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first == "sft beside []"
    assert second.partition(" ")[0].isdigit()
    assert second.endswith(" beside []")
    assert load_manifest(tmp_path / "run/evaluate").versions["vllm"] == "0.0"
