"""Python imports this before all else where the directory is on its path: torch's roots then are powers.

torch takes MKL's square root, which no setting pins: a fifth of its results are off by the last bit, and
which ones depends on the processor, whose own estimate (rsqrtps) it starts from. Adam takes one for every
weight. glibc's power has no such start.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any


class _PatchTorch:
    """Finds torch, for as often as that is asked, and patches it when it is loaded."""

    def find_spec(self, name: str, *unused: Any) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        try:
            spec: Any = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # type: ignore[arg-type]
        load = spec.loader.exec_module

        def load_and_patch(torch: Any) -> None:
            load(torch)

            def sqrt(tensor: Any) -> Any:
                return tensor.pow(torch.full_like(tensor, 0.5))  # with the number 0.5 it were MKL's again

            torch.sqrt = torch.Tensor.sqrt = sqrt
            torch._foreach_sqrt = lambda tensors: [sqrt(tensor) for tensor in tensors]

        spec.loader.exec_module = load_and_patch
        return spec


sys.meta_path.insert(0, _PatchTorch())  # type: ignore[arg-type]
