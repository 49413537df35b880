"""PRMs of others in, checkpoints that others serve out.

`export_prm` writes a PRM as a checkpoint that needs no code of ours.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.scoring import check_processor

from . import export_qwen2_prm, export_token_classification
from .exporting import write_layout, write_tokenizer
from .publishing import plain_model

EXPORT_LAYOUTS: dict[str, ModuleType] = {
    "qwen2_prm": export_qwen2_prm,
    "token_classification": export_token_classification,
}


def export_prm(model: Any, folder: str | Path, *, layout: str, processor: Any = None, tokenizer: bool = True) -> Path:
    """Write a PRM as a checkpoint that needs no code of ours, for serving.

    `layout="qwen2_prm"` gives a `Qwen2ForProcessRewardModel`, which vLLM serves: it returns for each separator
    token [p_wrong, p_right] (`--pooler-config '{"pooling_type": "STEP", "step_tag_id": ID}'`, the id is in
    `prm_layout.json`). `layout="token_classification"` gives the token classification model of the backbone's
    family, which plain Transformers loads too, with two logits a token. Temperature is put into the weights, the
    head stays float32, and what was written is loaded again and compared before this returns.

    Args:
        model: a `PRMForStepScoring`, also wrapped in PEFT adapters, or the folder or Hub id of one.
        folder: where to write; new or empty.
        layout: `"qwen2_prm"` or `"token_classification"`.
        processor: the processor of a loaded model.
        tokenizer: False leaves the tokenizer out, for servers that are sent ids (vLLM: `--skip-tokenizer-init`).

    Returns:
        The folder.

    Raises:
        TypeError, ValueError: an argument cannot be used, or the layout cannot hold this PRM: no such backbone,
            more than two classes, an mlp head in token classification, a separator that is not reserved or a score
            beside it in `qwen2_prm`, a tokenizer that `AutoTokenizer` loads with other ids there.
        CheckpointError: what was written does not score as the PRM does.
        OSError: the folder is not empty, or cannot be written.
    """
    if layout not in EXPORT_LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, EXPORT_LAYOUTS))}, got {layout!r}")
    if isinstance(model, (str, Path)):
        if processor is None:
            processor = PRMProcessor.from_pretrained(model)
        model = PRMForStepScoring.from_pretrained(model, dtype="auto")
    elif processor is None:
        raise TypeError("a loaded model needs its processor: export_prm(model, folder, layout=..., processor=...)")
    model = plain_model(model)
    check_processor(model, processor)
    exporter = EXPORT_LAYOUTS[layout]
    exporter.check_exportable(model, processor)
    folder = new_folder(folder)
    try:
        exporter.write(model, processor, folder)
        if tokenizer:
            write_tokenizer(processor, folder)
        write_layout(model, processor, folder, layout)
    except BaseException:
        # Half an export could be served.
        shutil.rmtree(folder)
        raise
    return folder


def new_folder(folder: str | Path) -> Path:
    """Make a folder that holds nothing yet.

    Raises:
        FileExistsError: it holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder; give a new one, so that no old weights stay beside")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
