"""Options of the entry points: from the command line, over those of a YAML file."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from hub_card.errors import one_line_errors


def parse_options(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    usage: str,
    description: str,
    elsewhere: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass, from `argv` and from the file that `--config` names.

    The file is a YAML mapping of the options' names (with `_` or `-`); what the command line gives wins,
    and null or an empty list leaves an option at its default. Mistakes print the usage and one line, and
    exit with status 2, as argparse does. `elsewhere` holds names (with `_`) that options have in other
    programs, and what takes their place here; it is said where one is given.
    """
    parser = HfArgumentParser(
        dataclass_types, prog=f"python -m {prog}", usage=usage, description=description, allow_abbrev=False
    )
    parser.add_argument("--config", help="A YAML file of these options; what the command line gives wins.")
    argv = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors(parser.error):
        config = _config_argument(argv)
        given = _file_options(parser, Path(config), elsewhere or {}) if config is not None else []
        for word in argv:
            _explain(word.removeprefix("--").partition("=")[0], elsewhere or {}, word.startswith("--"))
        *instances, _, unknown = parser.parse_args_into_dataclasses(
            given + argv, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(instances)


def set_up_logging(*, main_process: bool) -> None:
    """Show the library's messages on the main process, and only errors on the others."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for package in ("trainer", "modeling_prm", "hub_card"):
        logging.getLogger(package).setLevel(logging.INFO if main_process else logging.ERROR)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `--dtype` names for a backbone's weights on a device.

    `auto` is bfloat16 where the device computes in it (a CPU with AVX512-BF16 or AMX, a GPU with native bfloat16),
    which is two to three times as fast there, and float32 elsewhere, where bfloat16 would be slower and no more exact.
    Step probabilities then differ by about a hundredth from those in float32, so what reports numbers or chooses
    thresholds takes float32 unless it is told otherwise. float16 is never chosen, since it overflows.

    Args:
        name: `"auto"`, or the dtype's name.
        device: where the weights will be.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.bfloat16 if _computes_bfloat16(device) else torch.float32


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def _config_argument(argv: Sequence[str]) -> str | None:
    for index, argument in enumerate(argv):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and index + 1 < len(argv):
            return argv[index + 1]
    return None


def _explain(name: str, elsewhere: Mapping[str, str], is_option: bool = True) -> None:
    """Refuse an option of another program, with what takes its place."""
    replacement = elsewhere.get(name.replace("-", "_"))
    if is_option and replacement is not None:
        raise ValueError(f"there is no option {name} here; in its place: {replacement}")


def _file_options(parser: HfArgumentParser, path: Path, elsewhere: Mapping[str, str]) -> list[str]:
    """The file's options as words of a command line."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold a mapping of options to values, got {type(options).__name__}")
    choices = {action.dest: action.choices for action in parser._actions if action.dest not in ("help", "config")}
    words: list[str] = []
    for name, value in options.items():
        name = str(name).replace("-", "_")
        if name not in choices:
            _explain(name, elsewhere)
            raise ValueError(f"{path} has the option {name!r}, which is not among those of `{parser.prog} --help`")
        if value is None or value == []:
            continue
        if value is False and "no" in (choices[name] or ()):
            value = "no"  # which YAML takes for a boolean where it is not quoted
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            # In one word, so that a value which starts with a dash is not taken for an option.
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
