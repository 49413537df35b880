"""The Hub stand-in's look at the metadata of a model card: a few of the real server's rules.

Checked are the YAML itself, ``license`` against the Hub's identifiers, the types of a few fields and the required
fields of ``model-index``. The real server knows many more rules and words its messages differently.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
"""
LICENSES = frozenset(_LICENSES.split())
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def card_metadata(content: str) -> Any:
    """Return the metadata of a card, ``None`` if there is none; ``yaml.YAMLError`` if it cannot be read."""
    match = _FRONT_MATTER.match(content)
    return yaml.safe_load(match[1]) if match else None


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings about the metadata of a card."""
    try:
        data = card_metadata(content)
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ['"metadata" must be of type object'], []
    return [*_field_errors(data), *_index_errors(data.get("model-index"))], []


def _field_errors(data: dict[str, Any]) -> list[str]:
    errors = []
    licenses = data.get("license", [])
    for name in licenses if isinstance(licenses, list) else [licenses]:
        if not isinstance(name, str) or name not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}, array]')
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics", "base_model", "language"):
        values = data.get(key, [])
        many = values if isinstance(values, list) else [values]
        if (key == "tags" and not isinstance(values, list)) or not all(isinstance(value, str) for value in many):
            errors.append(f'"{key}" must be an array of strings')
    return errors


def _index_errors(index: Any) -> list[str]:
    """Return what ``model-index`` lacks; task, dataset and metrics of each result are required."""
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        errors += _missing(model, where, "name", "results")
        for j, result in enumerate(model.get("results") or [] if isinstance(model, dict) else []):
            place = f"{where}.results[{j}]"
            errors += _missing(result, place, "task", "dataset", "metrics")
            if isinstance(result, dict):
                errors += _missing(result.get("task", {"type": ""}), f"{place}.task", "type")
                errors += _missing(result.get("dataset", {"type": "", "name": ""}), f"{place}.dataset", "type", "name")
                for k, metric in enumerate(result.get("metrics") or []):
                    errors += _missing(metric, f"{place}.metrics[{k}]", "type", "value")
    return errors


def _missing(value: Any, where: str, *names: str) -> list[str]:
    if not isinstance(value, dict):
        return [f'"{where}" must be of type object']
    return [f'"{where}.{name}" is required' for name in names if name not in value]
