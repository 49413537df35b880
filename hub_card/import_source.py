"""A published checkpoint as it lies in its folder: config, weights and tokenizer, read without any of its code."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from .card import CARD_DATA_FILE, CardData
from .exporting import LAYOUT_FILE, PROBE_PROBLEMS, PROBE_SOLUTIONS

logger = logging.get_logger(__name__)

_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "vocab*", "merges.txt", "README.md", "LICENSE*")
# Buffers that older versions of Transformers saved.
_OLD_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids", "attn.bias", "attn.masked_bias")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was read.

    Args:
        label: the Hub id or folder, for messages.
        folder: where the files lie.
        config: `config.json` as it stands.
        layout: `prm_layout.json` of an export of ours, else empty.
        weights: every tensor by its name.
        tokenizer: its tokenizer.
    """

    label: str
    folder: Path
    config: dict[str, Any]
    layout: dict[str, Any]
    weights: dict[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerBase

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be known by, in lower case: its Hub id, the id in its config, its folder's name."""
        own = self.config.get("_name_or_path")
        return tuple(name.lower() for name in (self.label, own, Path(self.label).name) if isinstance(name, str))


def find_source(source: str | Path, revision: str | None, token: str | bool | None) -> Path:
    """The folder of a checkpoint, downloaded where it is a Hub id.

    Raises:
        OSError: it cannot be had.
        ValueError: it holds no config, or an adapter only.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or str(source).count("/") != 1:
            raise FileNotFoundError(f"{source} is neither a folder nor a Hub id such as 'Qwen/Qwen2.5-Math-PRM-7B'")
        folder = Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=list(_FILES)))
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{source} holds an adapter; merge it into its model with PEFT and save that first")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} holds no checkpoint (no config.json)")
    return folder


def read_source(label: str, folder: Path) -> Source:
    """Read a checkpoint's files.

    Raises:
        ValueError: a file is missing, damaged, or other than its index says.
    """
    layout = folder / LAYOUT_FILE
    return Source(
        label=label,
        folder=folder,
        config=_read_json(folder / "config.json"),
        layout=_read_json(layout) if layout.is_file() else {},
        weights=_read_weights(label, folder),
        tokenizer=_read_tokenizer(label, folder),
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds no JSON object")
    return data


def _read_weights(label: str, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, from one file or from shards, in safetensors or in PyTorch's own format."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            weights = _read_tensors(folder / name)
        elif index.is_file():
            weights = _read_shards(label, folder, _read_json(index).get("weight_map"))
        else:
            continue
        return {key: tensor for key, tensor in weights.items() if not key.endswith(_OLD_BUFFERS)}
    raise ValueError(
        f"{label} holds no weights (neither model.safetensors nor pytorch_model.bin, nor an index of shards)"
    )


def _read_shards(label: str, folder: Path, weight_map: Any) -> dict[str, torch.Tensor]:
    if not isinstance(weight_map, dict):
        raise ValueError(f"the index of {label} has no weight_map")
    shards = sorted(set(map(str, weight_map.values())))
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise ValueError(f"{label} lacks {len(missing)} of {len(shards)} shards: {shown(missing)}; download it again")
    weights: dict[str, torch.Tensor] = {}
    for name in shards:
        weights |= _read_tensors(folder / name)
    absent, surprising = sorted(weight_map.keys() - weights), sorted(weights.keys() - weight_map)
    if absent or surprising:
        raise ValueError(
            f"the shards of {label} do not hold what its index says: missing {shown(absent)}; surprising "
            f"{shown(surprising)}"
        )
    return weights


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        # Only tensors are unpickled, no code.
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on who reads it
        raise ValueError(f"{file} cannot be read: {error}") from error
    return {str(name): tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


def _read_tokenizer(label: str, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, giving the ids of its `tokenizer.json` where there is one.

    Beside a config Transformers may make another class of it, with other ids.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    file = folder / "tokenizer.json"
    if not file.is_file():
        return tokenizer
    written = tokenizers.Tokenizer.from_file(str(file))
    if _gives(tokenizer, written):
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    if not _gives(plain, written):
        raise ValueError(
            f"the tokenizer of {label} loads as {type(tokenizer).__name__} and gives other ids than its tokenizer.json"
        )
    logger.warning(
        f"{label}: AutoTokenizer makes a {type(tokenizer).__name__} that gives other ids than tokenizer.json; the "
        "latter is taken"
    )
    return plain


def _gives(tokenizer: PreTrainedTokenizerBase, written: tokenizers.Tokenizer) -> bool:
    texts = [*PROBE_PROBLEMS, *(step for steps in PROBE_SOLUTIONS for step in steps)]
    return all(
        tokenizer(text, add_special_tokens=False)["input_ids"] == written.encode(text, add_special_tokens=False).ids
        for text in texts
    )


def keep_card(source: Source, layout: str, folder: Path) -> None:
    """Write what the original's card says of licence, base model and data beside the imported checkpoint."""
    readme, data = source.folder / "README.md", None
    if readme.is_file():
        data = ModelCard(readme.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True).data
    hub_id = source.label if not Path(source.label).exists() else None
    description = f"Imported from {hub_id or Path(source.label).name} (layout {layout}), whose step scores it gives."
    # A licence of the Hub's kind "other" is told by these.
    if named := " ".join(_texts(data, "license_name") + _texts(data, "license_link")):
        description += f" Licence of the original: {named}."
    card = CardData(
        description=description,
        base_model=_first(data, "base_model") or hub_id,
        datasets=_texts(data, "datasets"),
        license=_first(data, "license"),
        languages=_texts(data, "language"),
    )
    (folder / CARD_DATA_FILE).write_text(card.to_json(), encoding="utf-8")
    for file in source.folder.glob("LICENSE*"):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _texts(data: Any, name: str) -> tuple[str, ...]:
    value = getattr(data, name, None)
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(text for text in values if isinstance(text, str))


def _first(data: Any, name: str) -> str | None:
    return next(iter(_texts(data, name)), None)


def shown(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "none"
