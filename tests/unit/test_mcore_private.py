"""Private names of torch and Megatron-Core: one module has them, and a release without one is refused."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import private
from megatron_lopd.mcore.reliance import Reliance

PACKAGE = Path(private.__file__).parents[1]
# What these packages document of themselves is to be had from the package; a module below it is theirs.
INNER = ("torch.distributed.checkpoint", "megatron.core.dist_checkpointing")


def private_uses(source: str) -> Iterator[str]:
    """Names of torch's and Megatron-Core's own that a module imports, and `other._name` of any object.

    Not of `self` and `cls`, nor of a name that the module itself defines: another object of its own class.
    """
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_self(node.value)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch", "megatron.core")):
            below = any(str(node.module).startswith(f"{package}.") for package in INNER)
            for alias in node.names:
                if below or "._" in f"{node.module}.{alias.name}":
                    yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names if "._" in each.name)
        elif (
            isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.endswith("__")
            and not is_self(node.value)
            and node.attr not in own
            and ast.unparse(node) != "os._exit"  # which is documented
        ):
            yield f".{node.attr}"


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_no_other_module_has_a_private_name() -> None:
    found = {
        str(path.relative_to(PACKAGE)): uses
        for path in sorted(PACKAGE.rglob("*.py"))
        if (uses := sorted(private_uses(path.read_text())))
    }
    assert found.pop("mcore/private.py")  # or this test sees nothing
    assert found == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from torch._C._distributed_c10d import Store", ["torch._C._distributed_c10d.Store"]),
        (
            "from torch.distributed.checkpoint.filesystem import X",
            ["torch.distributed.checkpoint.filesystem.X"],
        ),
        ("import torch\ntorch.serialization._get_layout", ["._get_layout"]),
        ("from torch.distributed.checkpoint import Metadata\nfrom torch import distributed", []),
        ("class A:\n  def _b(self, other):\n    return other._b()", []),
    ],
)
def test_what_counts_as_private(source: str, expected: list[str]) -> None:
    assert list(private_uses(source)) == expected


@pytest.mark.parametrize("name", private.NAMES, ids=lambda name: name.place)
def test_a_name_that_is_gone_is_refused(name: Reliance) -> None:
    name.check()
    with pytest.raises(ConfigError) as refusal:
        replace(name, place=f"{name.place}_renamed").check()
    package = "torch" if name.place.startswith("torch") else "megatron-core"
    assert str(refusal.value).startswith(f"{package} ")
    assert "is gone" in str(refusal.value)
    assert name.ours in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", [private.NAMES[0], private.NAMES[-1]], ids=["torch", "megatron-core"])
def test_a_release_without_a_name_is_refused_where_it_is_imported(name: Reliance) -> None:
    """In one line, and as a refusal: not as an ImportError of whatever module comes first."""
    module, _, attribute = name.place.partition(":")
    code = (
        "import importlib, sys\n"
        "from megatron_lopd.errors import ConfigError\n"
        f"delattr(importlib.import_module({module!r}), {attribute!r})\n"
        "try:\n"
        "    import megatron_lopd.mcore.private\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    assert f"{name.place} is gone" in line
