"""The JSON schema of a recipe, for editors and programs: `python -m megatron_lopd.config.schema`.

Ranges and types are those that a recipe is checked by. What only whole sections show (either steps or epochs)
it does not say.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args, get_origin

import msgspec

from megatron_lopd.config.describe import sections
from megatron_lopd.config.hints import bare, hints_of, without_none
from megatron_lopd.config.recipe import Recipe
from megatron_lopd.registry import Registry

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(kind: type = Recipe) -> dict[str, Any]:
    """The schema of a Recipe or a Cluster, with the options of all things known by now."""
    kinds = list(dict.fromkeys(section.kind for section in sections(kind)))
    references, definitions = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    by_kind = dict(zip(kinds, references, strict=True))
    for each, reference in by_kind.items():
        definition = definitions[reference["$ref"].rpartition("/")[2]]
        _complete(each, definition, by_kind)
    return {"$schema": DIALECT, **by_kind[kind], "$defs": definitions}


def _complete(kind: type, definition: dict[str, Any], by_kind: dict[type, dict[str, Any]]) -> None:
    """Add what msgspec knows nothing of: help, doors and their options, and that there are no other keys."""
    properties = definition["properties"]
    declared = {item.name: item for item in dataclasses.fields(kind)}
    for name, item in declared.items():
        if door_key := item.metadata.get("options_of"):
            del properties[name]
            for thing in declared[door_key].metadata["door"].things().values():
                properties[thing.name] = by_kind[thing.Options]
            continue
        found = properties[name]
        inner = without_none(hints_of(kind)[name])
        if door := item.metadata["door"]:
            found = _names(door, found, is_list=get_origin(bare(inner)) is tuple)
        if get_origin(inner) is dict:  # one section may be given bare
            found = {**found, "anyOf": [*found["anyOf"], by_kind[get_args(inner)[1]]]}
        properties[name] = {**found, "description": item.metadata["help"]}
    definition["additionalProperties"] = False


def _names(door: Registry[Any], found: dict[str, Any], *, is_list: bool) -> dict[str, Any]:
    """The schema `found` of a door's key, held to the names that are known, import paths, and none if so."""
    name = {"anyOf": [{"enum": list(door.things())}, {"type": "string", "pattern": ":"}]}
    if is_list:
        return {**found, "items": name}
    if found.get("default") in (None, "") and "default" in found:
        name["anyOf"].append({"enum": [found["default"]]})
    return {**name, **({"default": found["default"]} if "default" in found else {})}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
