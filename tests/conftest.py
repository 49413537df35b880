"""What the tests share: offline and quiet Transformers, one thread, and tiny checkpoints made once a session."""

from __future__ import annotations

import os

# Read when huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

from modeling_prm import PRMForStepScoring, PRMProcessor

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny random backbone with its tokenizer; not to be written to."""
    root = tmp_path_factory.mktemp("backbones")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            tiny_models.write_backbone(family, root / family)
        return root / family

    return folder


@pytest.fixture(scope="session")
def make_prm(backbone_folder: Callable[[str], Path]) -> Callable[..., tuple[PRMForStepScoring, PRMProcessor]]:
    """A new PRM of a family, with a head wide enough that a wrong hidden state shows in the logits."""

    def make(family: str = "llama", **options: object) -> tuple[PRMForStepScoring, PRMProcessor]:
        model, processor = PRMForStepScoring.from_backbone(backbone_folder(family), **options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.value_head.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
        return model, processor

    return make


@pytest.fixture(scope="session")
def prm_folder(
    tmp_path_factory: pytest.TempPathFactory, make_prm: Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
) -> Callable[[str], Path]:
    """The folder of a family's saved PRM with its processor; not to be written to."""
    root = tmp_path_factory.mktemp("prms")

    def folder(family: str = "llama") -> Path:
        if not (root / family).exists():
            model, processor = make_prm(family)
            model.save_pretrained(root / family)
            processor.save_pretrained(root / family)
        return root / family

    return folder
