"""The textbook PRM: what hand-made PRMs do, as they do it.

Problem and steps are joined by line ends and tokenized as one text; a step's score is read wherever the token of a
line end is found, and at the last token; scores and labels are matched in order from the first such place on, and
whatever is left over on either side is dropped. The loss is the mean over solutions of each one's mean binary
cross-entropy. Since the problem ends in a line end too, the first step's label meets a place before that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from modeling_prm.step_loss import IGNORED_LABEL

DROPOUT = 0.1


@dataclass
class TextbookOutput(ModelOutput):
    """`loss`, a scalar where there are labels, and `logits` (B, S), 0 where there is no place to read."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class TextbookPRM(nn.Module):
    """A backbone with a linear layer on every token, of which those at the given places are read."""

    def __init__(self, backbone: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(DROPOUT)
        self.score = nn.Linear(hidden_size, 1)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        step_positions: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> TextbookOutput:
        """Scores at `step_positions` (B, S), padded with -1; labels (B, S) are padded with -100."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        scores = self.score(self.dropout(hidden)).squeeze(-1).float()
        is_step = step_positions >= 0
        logits = scores.gather(1, step_positions.clamp(min=0)).masked_fill(~is_step, 0.0)
        return TextbookOutput(loss=None if labels is None else textbook_loss(logits, labels), logits=logits)


def textbook_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over solutions of the mean cross-entropy of each one's labelled places; logits and labels (B, S)."""
    labelled = labels != IGNORED_LABEL
    losses = F.binary_cross_entropy_with_logits(logits, torch.where(labelled, labels, 0.0), reduction="none")
    counts = labelled.sum(dim=1)
    means = (losses * labelled).sum(dim=1) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum().clamp(min=1)


def load_textbook(folder: str) -> tuple[TextbookPRM, PreTrainedTokenizerBase]:
    """A new textbook PRM on the backbone in a folder, which may be a GGUF file, and its tokenizer."""
    file = next((path.name for path in Path(folder).glob("*.gguf")), None)
    backbone = AutoModel.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return TextbookPRM(backbone, backbone.config.hidden_size), tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, problem: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids of the joined text, and the places where a step is thought to end, as many as steps at most."""
    ids = tokenizer("\n".join([problem, *steps]))["input_ids"]
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    places = [place for place, token in enumerate(ids) if token == line_end]
    if not places or places[-1] != len(ids) - 1:
        places.append(len(ids) - 1)
    return ids, places[: len(steps)]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, problem: str, steps: Sequence[str], labels: Sequence[float]
) -> dict[str, list[Any]]:
    """A row to train on; of scores and labels, as many as there are of both."""
    ids, places = encode(tokenizer, problem, steps)
    return {"input_ids": ids, "step_positions": places, "labels": list(labels)[: len(places)]}


def collate(rows: Sequence[dict[str, list[Any]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right: ids and mask (B, L), places and labels (B, S)."""
    length, most = max(len(row["input_ids"]) for row in rows), max(len(row["step_positions"]) for row in rows)

    def pad(name: str, size: int, value: float) -> list[list[Any]]:
        return [list(row[name]) + [value] * (size - len(row[name])) for row in rows]

    batch = {
        "input_ids": torch.tensor(pad("input_ids", length, pad_token_id)),
        "attention_mask": torch.tensor([[int(i < len(row["input_ids"])) for i in range(length)] for row in rows]),
        "step_positions": torch.tensor(pad("step_positions", most, -1)),
    }
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor(pad("labels", most, IGNORED_LABEL), dtype=torch.float32)
    return batch
