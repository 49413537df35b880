"""PRMs of others in, checkpoints that others serve out.

    python -m hub_card.convert import Qwen/Qwen2.5-Math-PRM-7B my_prm
    python -m hub_card.convert export my_prm served --layout qwen2_prm

`import_prm` makes a checkpoint of ours from a published PRM; `export_prm` writes one that needs no code of ours.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.configuration_prm import LAYOUT_OPTIONS
from modeling_prm.scoring import check_processor

from . import export_qwen2_prm, export_token_classification
from .errors import one_line_errors
from .exporting import write_layout, write_tokenizer
from .import_causal import math_shepherd, rlhflow
from .import_layouts import ImportOptions, Parts, recognize
from .import_qwen2_prm import qwen2_prm, reasonflux
from .import_skywork import skywork
from .import_source import Source, find_source, keep_card, read_source
from .import_token_classification import reasoneval, token_classification, token_classification_text
from .importing import assemble
from .publishing import plain_model

IMPORT_LAYOUTS: dict[str, Callable[[Source, ImportOptions], Parts]] = {
    "qwen2_prm": qwen2_prm,
    "reasonflux": reasonflux,
    "math_shepherd": math_shepherd,
    "rlhflow": rlhflow,
    "skywork": skywork,
    "token_classification": token_classification,
    "token_classification_text": token_classification_text,
    "reasoneval": reasoneval,
}
EXPORT_LAYOUTS: dict[str, ModuleType] = {
    "qwen2_prm": export_qwen2_prm,
    "token_classification": export_token_classification,
}


def import_prm(
    source: str | Path,
    folder: str | Path | None = None,
    *,
    layout: str = "auto",
    separator: str | None = None,
    problem_template: str | None = None,
    class_weights: Sequence[float] | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[PRMForStepScoring, PRMProcessor]:
    """Make a PRM of ours from a published one, which gives the same step scores.

    Nothing of the original's code runs. Its prompt, separator and score become the config's, its head's two outputs
    the one logit whose sigmoid is their softmax; then it is a PRM like any other here.

    Args:
        source: a Hub id, or a folder.
        folder: where to save model, processor and the card's data (licence, base model); new or empty.
        layout: how its steps are scored, one of `IMPORT_LAYOUTS`; `"auto"` tells by its weights' names, by the name
            of a published PRM, and by `prm_layout.json` of an export of ours.
        separator: the text after each step, where the checkpoint does not say it (token classification).
        problem_template: the text around the problem, with `{problem}` once, where it is not the layout's own.
        class_weights: how much each label counts as right; by default the last of two.
        dtype: of the backbone's weights; by default that of the file. The head is float32.
        revision, token: as in `huggingface_hub`.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        ValueError: it has no layout that is known, lacks weights or has surprising ones (both are listed), or its ids
            cannot be written here.
        OSError: it cannot be had, or the folder is not empty.
    """
    if layout != "auto" and layout not in IMPORT_LAYOUTS:
        raise ValueError(f"layout must be 'auto' or one of {', '.join(map(repr, IMPORT_LAYOUTS))}, got {layout!r}")
    folder = None if folder is None else new_folder(folder)
    read = read_source(str(source), find_source(source, revision, token))
    known: dict[str, Any] = {}
    if layout == "auto":
        layout, known = recognize(read)
        if layout not in IMPORT_LAYOUTS:
            raise ValueError(f"{source} names a layout {layout!r} that is not known here")
    options = ImportOptions(
        separator=separator if separator is not None else read.layout.get("separator_token", known.get("separator")),
        problem_template=problem_template or read.layout.get("problem_template"),
        class_weights=None if class_weights is None else [float(weight) for weight in class_weights],
    )
    parts = IMPORT_LAYOUTS[layout](read, options)
    parts.options.update({name: read.layout[name] for name in LAYOUT_OPTIONS if name in read.layout})
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model, processor = assemble(read, layout, parts, wanted)
    for name in ("aggregation", "error_threshold"):
        setattr(model.config, name, read.layout.get(name, getattr(model.config, name)))
    if folder is not None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        keep_card(read, layout, folder)
        # Raises where the tokenizer would load with other ids.
        PRMProcessor.from_pretrained(folder)
    return model, processor


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


def main(argv: Sequence[str] | None = None) -> None:
    """Import or export as the options say."""
    options = _parser().parse_args(argv)
    with one_line_errors():
        if options.command == "import":
            model, _ = import_prm(
                options.source,
                options.folder,
                layout=options.layout,
                separator=_unescaped(options.separator),
                problem_template=_unescaped(options.problem_template),
                class_weights=options.class_weights,
                dtype=options.dtype,
                revision=options.revision,
            )
            shape = f"{model.config.text_config.model_type}, {model.config.head_type} head"
            print(f"Imported {options.source} ({shape}) to {options.folder}")
        else:
            export_prm(options.source, options.folder, layout=options.layout, tokenizer=not options.no_tokenizer)
            print(f"Exported {options.source} to {options.folder} as {options.layout}")


def _unescaped(text: str | None) -> str | None:
    r"""What was typed with \n for a line end."""
    return None if text is None else text.replace("\\n", "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hub_card.convert", description="PRMs of others in, checkpoints that others serve out."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    incoming = commands.add_parser("import", help="make a PRM of ours from a published one", allow_abbrev=False)
    incoming.add_argument("source", help="Hub id or folder of the published PRM")
    incoming.add_argument("folder", help="where to save it; new or empty")
    incoming.add_argument("--layout", default="auto", choices=["auto", *IMPORT_LAYOUTS], help="default: %(default)s")
    incoming.add_argument("--separator", help=r"text after each step, for token classification, such as '\n\n'")
    incoming.add_argument("--problem-template", help="text around the problem, with {problem} once")
    incoming.add_argument("--class-weights", nargs="+", type=float, help="how much each label counts as right")
    incoming.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the file")
    incoming.add_argument("--revision", help="branch, tag or commit")
    outgoing = commands.add_parser("export", help="write a PRM for serving without code of ours", allow_abbrev=False)
    outgoing.add_argument("source", help="Hub id or folder of a PRM of ours")
    outgoing.add_argument("folder", help="where to write it; new or empty")
    outgoing.add_argument("--layout", required=True, choices=list(EXPORT_LAYOUTS))
    outgoing.add_argument("--no-tokenizer", action="store_true", help="for a server that is sent ids")
    return parser


if __name__ == "__main__":
    main()
