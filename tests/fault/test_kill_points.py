"""`kill -9` at every fsync, rename and removal of a checkpoint's save, enumerated, and at some of its writes.

Every night also at every write.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model_zoo import make_model_dir

SOURCE = Path(__file__).with_name("kill_points.c")
ROOT = Path(__file__).parents[2]
TINY = {
    "vocab_size": 67,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
}


@pytest.mark.timeout(600)  # up to 200 forks
@pytest.mark.parametrize(
    "writes", [8, pytest.param(1, marks=pytest.mark.nightly)], ids=["some writes", "every write"]
)
def test_wherever_a_save_is_killed_the_newest_whole_checkpoint_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], writes: int
) -> None:
    """Step 2 is whole and step 3 damaged when step 3 is saved anew, and killed."""
    library = tmp_path / "kill_points.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    model = make_model_dir(tmp_path / "model", tied=True, **TINY)
    result = subprocess.run(
        [sys.executable, "-m", "tests.fault.kill_points", library, model, tmp_path / "work", str(writes)],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": _python_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    with capsys.disabled():
        for who, report in found.items():
            print(f"\n{who}: kill points {report['points']}, {len(report['killed at'])} killed at", end="")
        print()

    enumerated = found["rank 0 of 1"]
    spared = enumerated["points"]["write"] * (1 - 1 / writes)
    assert len(enumerated["killed at"]) == pytest.approx(sum(enumerated["points"].values()) - spared, abs=1)
    for kind in ("open", "write", "fsync", "rename", "unlink", "mkdir"):
        assert enumerated["points"][kind] > 0, kind
    for report in found.values():
        steps = report["steps"]
        assert len(steps) == len(report["killed at"])
        assert steps == sorted(steps), "once committed, a checkpoint is not lost again"
        assert set(steps) <= {2, 3}
        assert steps[0] == 2
    assert enumerated["steps"][-1] == 3


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "tests" / "dist"), os.environ.get("PYTHONPATH", "")])
