"""What has to hold before a PRM is published."""

from __future__ import annotations

import html
import json
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token

from modeling_prm.scoring import evaluating, input_device

from .clean_process import score_in_clean_process
from .errors import CheckpointError

# Short enough for every backbone, with steps right and wrong, signs, and lengths that make padding.
PROBE_PROBLEMS = ("What is 2 + 3?", "What is 7 * 6 - 2?")
PROBE_SOLUTIONS = (("2 + 3 = 5.", "So it is 5."), ("7 * 6 = 41.",))

# Largest difference of a logit between this process and a clean one. Another device or other places in
# memory round otherwise; 16-bit numbers have 8 or 11 significant bits.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of two names at least: one name after a slash is often no path.
_PATH = re.compile(r"(?<![\w.-])(?:/[\w.@+-]+){2,}")


def check_weights(model: Any) -> None:
    """Refuse weights that are not finite, and a head that was never trained.

    Raises:
        CheckpointError: saying which weight it is.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise CheckpointError(
                f"{name} holds NaN or infinite values, so the model scores nothing; publish an earlier checkpoint"
            )
    out = model.value_head.out
    spread = out.weight.float().std().item() if out.weight.numel() > 1 else 0.0
    expected = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    if not bool(out.weight.any()):
        raise CheckpointError("the value head's weights are all 0, so every step scores the same; train it first")
    if not bool(out.bias.any()) and 0.75 < spread / expected < 1.25:
        raise CheckpointError(
            "the value head looks as it was initialized (a bias of 0 and weights of the initial spread), so its scores "
            "are random; train it first"
        )


def check_clean_load(model: Any, processor: Any, folder: Path) -> float:
    """Load a saved PRM in a clean process by its own code, and compare its logits with those in memory.

    Returns:
        The largest difference of a logit.

    Raises:
        CheckpointError: it does not load, or ids or logits differ.
    """
    clean = score_in_clean_process(folder, PROBE_PROBLEMS, PROBE_SOLUTIONS)
    batch = processor(list(PROBE_PROBLEMS), [list(steps) for steps in PROBE_SOLUTIONS], return_tensors="pt")
    if not torch.equal(batch["input_ids"], clean.input_ids):
        raise CheckpointError(
            "the saved processor gives other ids in a clean process than in memory, so every score would be off; "
            f"got {clean.input_ids[0].tolist()}, in memory {batch['input_ids'][0].tolist()}"
        )
    device = input_device(model)
    with torch.inference_mode(), evaluating(model):
        logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.float().cpu()
    # Weights that are not finite give logits that are not, and those are equal too, if they are let through.
    same = (logits == clean.logits) | (logits.isnan() & clean.logits.isnan())
    difference = (logits - clean.logits).masked_fill(same, 0.0).abs().max().item()
    tolerance = _TOLERANCE.get(model.dtype, 1e-1)
    if not difference <= tolerance:
        raise CheckpointError(
            f"the saved model scores otherwise in a clean process than in memory: logits differ by up to "
            f"{difference:.3g}, and at most {tolerance:g} is rounding in {str(model.dtype).removeprefix('torch.')}; "
            f"in memory {_rounded(logits)}, saved {_rounded(clean.logits)}"
        )
    return difference


def check_nothing_private(folder: Path, *, token: str | bool | None = None, only_token: bool = False) -> None:
    """Look through the text that would be published for the token, paths that exist here and this machine's name.

    Args:
        folder: what would be published.
        token: the Hub token in use, if it is not the one that `huggingface_hub` finds by itself.
        only_token: leave out paths and the machine's name, which can be words like any other.

    Raises:
        CheckpointError: naming the file, and what it holds.
    """
    tokens = {secret for secret in (token, get_token()) if isinstance(secret, str) and secret}
    private = {
        path: f"the local path {path}" for path in (str(Path.home()), os.getcwd(), tempfile.gettempdir(), str(folder))
    }
    if len(host := platform.node()) > 3:
        private[host] = "the name of this machine"
    # The name of a repository ends like a path, and a word can hold another.
    patterns = {rf"(?<![\w.-]){re.escape(name)}(?![\w-])": what for name, what in private.items() if name != "/"}
    for file in sorted(folder.rglob("*")):
        # A vocabulary holds what it holds; the rest of these is written here.
        if file.suffix not in (".json", ".md", ".jinja", ".yaml") or file.name in ("tokenizer.json", "vocab.json"):
            continue
        text = _as_read(file)
        if any(secret in text for secret in tokens):
            raise CheckpointError(f"{file.relative_to(folder)} would publish the Hub token; take it out")
        found = [what for pattern, what in patterns.items() if re.search(pattern, text)]
        found += [f"the local path {path}" for path in _PATH.findall(text) if os.path.exists(path.rstrip("."))]
        if found and not only_token:
            raise CheckpointError(
                f"{file.relative_to(folder)} would publish {found[0]}; take it out, or publish with force=True "
                "(--force) if it is only a word that looks so"
            )


def _as_read(file: Path) -> str:
    """The text of a file, and again without the signs that escape others in it."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        plain = re.sub(r"\\[nrt]", " ", json.dumps(json.loads(text), ensure_ascii=False))
    else:
        plain = html.unescape(re.sub(r"\\(.)", r"\1", text))
    return f"{text}\n{plain}"


def _rounded(logits: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in logits.flatten().tolist()]
