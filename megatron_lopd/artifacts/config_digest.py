"""The digest of config.json: of what it has a model compute, however that is written.

transformers fills in what the file leaves out, and brings older spellings to its own (rope_theta,
rope_scaling); what then differs from the defaults of the model's class is what counts. Keys that transformers
does not know count as they are. Of an architecture that it does not know, and of one with code of its own,
all keys do.
"""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version
from typing import Any

from megatron_lopd.artifacts.digest_cache import digest_of
from megatron_lopd.artifacts.model_files import ModelFiles
from megatron_lopd.errors import DataError, LopdError, reason_of
from megatron_lopd.files.digests import canonical_json, sha256_bytes, sha256_file
from megatron_lopd.files.reading import read_object

# How the file was written, and in what an engine would run if it were not told: every engine here is.
_NOT_COMPUTED = (
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "_attn_implementation",
    "attn_implementation",
)


def config_digest(files: ModelFiles) -> str:
    """Hex SHA-256. DataError when the file is damaged, or says two things that readers choose between."""
    made_of = [files.config, *files.code]
    return digest_of(f"config, by transformers {version('transformers')}", made_of, partial(_take, files))


def _take(files: ModelFiles) -> str:
    raw = read_object(files.config)
    _check_rope(files, raw)
    code = [[str(path.relative_to(files.root)), sha256_file(path)] for path in files.code]
    settings = raw if code else _as_loaded(files, raw)
    kept = {key: value for key, value in settings.items() if key not in _NOT_COMPUTED}
    return sha256_bytes(canonical_json([_numbers(kept), code]))


def _as_loaded(files: ModelFiles, raw: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig  # takes a second
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        return raw
    try:
        loaded = AutoConfig.from_pretrained(files.root, local_files_only=True, trust_remote_code=False)
        default = type(loaded)().to_dict()
        found = {
            key: value
            for key, value in loaded.to_dict().items()
            if key == "model_type" or key not in default or value != default[key]
        }
    except LopdError:  # a request to stop
        raise
    except Exception as error:  # noqa: BLE001 - its validators raise errors of several libraries
        raise DataError(f"{files.config}: transformers does not load it: {reason_of(error)}") from None
    if found.get("architectures") == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)]:
        del found["architectures"]  # which is what is loaded where none is named
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _check_rope(files: ModelFiles, raw: dict[str, Any]) -> None:
    old, new = raw.get("rope_scaling"), raw.get("rope_parameters")
    if old and new and old != new:
        raise DataError(
            f"{files.config}: rope_scaling and rope_parameters differ: keep the one that is right"
        )
    theta = (new or old or {}).get("rope_theta") if isinstance(new or old or {}, dict) else None
    if None not in (theta, raw.get("rope_theta")) and theta != raw["rope_theta"]:
        raise DataError(
            f"{files.config}: rope_theta={raw['rope_theta']!r} and {theta!r} within rope_parameters: keep "
            "the one that is right"
        )


def _numbers(value: Any) -> Any:
    """Whole numbers as such, however they are written: 1e6 is 1000000."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    return [_numbers(each) for each in value] if isinstance(value, list) else value
