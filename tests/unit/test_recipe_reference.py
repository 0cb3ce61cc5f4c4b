"""The page that tells every key of a recipe."""

from __future__ import annotations

from megatron_lopd.config import Cluster, Recipe
from megatron_lopd.config.describe import sections
from megatron_lopd.registry import DOORS
from tools.docs.recipe_reference import page


def test_it_has_every_section_with_its_keys_and_whatever_is_behind_a_door() -> None:
    text = page()
    parts = text.split("\n## ")
    for kind, own in ((Recipe, "The recipe's own keys"), (Cluster, "The file's own keys")):
        for section in (each for each in sections(kind) if each.keys):
            title = f"`{section.place}`" if section.place else own
            (part,) = (part for part in parts if title in part.partition("\n")[0])
            for key in section.keys:
                assert part.count(f"\n| `{key.name}` | ") == 1
    for door in DOORS:
        for name, thing in door.things().items():
            assert f"\n- `{name}`: {thing.caption}\n" in text
    assert "\n| `batch_size` | int, at least 1 | 64 | sequences run together" in text
    assert all(line.replace("\\|", "").count("|") == 5 for line in text.split("\n") if line.startswith("| `"))
