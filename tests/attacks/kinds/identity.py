"""What a model is: one that computes otherwise is another, one that is only written otherwise is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from megatron_lopd.errors import LopdError
from tests.attacks.attack import Attack
from tests.attacks.model_differences import AMBIGUITIES, DIFFERENCES
from tests.attacks.model_rewritings import REWRITINGS, make_base

LAST, FIRST = ("sharded", "links as in a hub cache"), ("no generation config",)


@dataclass(frozen=True)
class Way:
    """A way to change the model, drawn with a seed."""

    name: str
    seed: int


class Twins(Attack[Way]):
    """A small model beside a base that stays as it was, and what is proved of the two."""

    copies = ()

    def build(self, world: Path) -> None:
        make_base(world / "base")
        shutil.copytree(world / "base", world / "model")

    def use(self, world: Path, change: Way | None) -> str:
        from megatron_lopd.artifacts.fingerprint import fingerprint_model
        from megatron_lopd.artifacts.lineage import WHOLE_MODEL, Evidence, prove_same

        base, model = (Evidence(fingerprint_model(name).parts(), name) for name in ("base", "model"))
        prove_same("one teacher", base, model, parts=WHOLE_MODEL, allow=False)
        return json.dumps(model.digests)

    def named(self, change: Way) -> Sequence[str]:
        return ["model"]


class Different(Twins):
    """A difference in a loaded byte, file or setting is refused, as is what two loaders read differently."""

    name = "identity: differences"
    examples = 3

    def changes(self) -> SearchStrategy[Way]:
        return st.builds(Way, st.sampled_from([*DIFFERENCES, *AMBIGUITIES]), st.integers(0, 1 << 30))

    def spoil(self, world: Path, change: Way) -> None:
        (DIFFERENCES | AMBIGUITIES)[change.name](Random(change.seed), world / "model")

    def allows(self, change: Way, before: str, after: str) -> bool:
        return False


class Rewritten(Twins):
    """No way of writing the same model is refused."""

    name = "identity: rewritings"
    examples = 3

    def changes(self) -> SearchStrategy[Way]:
        return st.builds(Way, st.sampled_from(list(REWRITINGS)), st.integers(0, 1 << 30))

    def spoil(self, world: Path, change: Way) -> None:
        random = Random(change.seed)
        REWRITINGS[change.name](random, world / "model")
        if change.name not in LAST:
            others = [
                each for each in REWRITINGS if "template" not in each and each not in (change.name, *FIRST)
            ]
            REWRITINGS[random.choice(others)](random, world / "model")

    def use(self, world: Path, change: Way | None) -> str:
        try:
            return super().use(world, change)
        except LopdError as error:
            raise AssertionError(f"the same model is refused: {error}") from None
