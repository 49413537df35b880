"""Train a PRM: `accelerate launch -m trainer.train --backbone B --train-data F --output-dir D`.

`python -m trainer.train --help` lists the options.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import datasets
import numpy as np
from transformers import set_seed

from hub_card.card import CARD_DATA_FILE, CardData
from hub_card.errors import one_line_errors
from modeling_prm import PRMConfig, PRMForStepScoring, PRMProcessor

from .adapters import ADAPTER_CONFIG, AdapterArguments, add_adapters, check_same_adapters
from .arguments import DataArguments, ModelArguments, PRMTrainingArguments
from .checkpoints import CheckpointSaveError, check_same_model, find_checkpoint, save_errors
from .command_line import parse_options, set_up_logging
from .curves import LearningCurves, can_draw, draw_pictures
from .data_files import is_hub_id
from .decontamination import decontaminate, read_problem_texts
from .guards import NonFiniteLossError
from .model_calibration import CalibrationArguments, calibrate_saved, check_evaluation_set
from .preparation import RECORD_NUMBER
from .prm_trainer import PRMTrainer
from .publishing import describe_training
from .readers import check_rejected_file, load_step_dataset
from .record_stream import stream_step_dataset
from .splits import split_by_problem
from .streaming import check_stream_options
from .trl_names import COMMAND_LINE_NAMES

logger = logging.getLogger(__name__)

REJECTED_FILE = "rejected_rows.jsonl"

# Options of a new PRM that are a part of what it has learned.
FIXED_IN_A_PRM = ("head_type", "num_labels", "class_weights", "separator_token", "prompt_layout")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train as the options say; returns the metrics of the last evaluation (empty without one)."""
    model_args, adapter_args, data_args, args, calibration_args = parse_options(
        (ModelArguments, AdapterArguments, DataArguments, PRMTrainingArguments, CalibrationArguments),
        argv,
        prog="trainer.train",
        usage="%(prog)s --backbone BACKBONE --train-data FILE [FILE ...] --output-dir DIR [options]",
        description="Train a process reward model on labelled steps. Start it with `accelerate launch -m trainer.train`"
        " for several processes; give --model in place of --backbone to go on from a process reward model.",
        elsewhere=COMMAND_LINE_NAMES,
    )
    set_up_logging(main_process=args.process_index == 0)
    draws = can_draw()
    with one_line_errors():
        if data_args.streaming:
            check_stream_options(args)
        checkpoint = find_checkpoint(args)
        with open_rejected_file(data_args, args) as rejected_file:
            train_set, eval_sets = load_data(data_args, seed=args.seed, rejected_file=rejected_file)
        check_evaluation_set(calibration_args.calibration_set, eval_sets)
        set_seed(args.seed)
        model, processor = start_model(model_args)
        check_labels_fit(model, data_args)
        if adapter_args.lora_r is not None:
            model = add_adapters(model, adapter_args)
        if checkpoint is not None:
            check_same_model(model, checkpoint)
            check_same_adapters(model, checkpoint)
        trainer = PRMTrainer(
            model,
            args,
            processing_class=processor,
            train_dataset=train_set,
            eval_dataset=eval_sets,
            callbacks=[LearningCurves()] if draws else None,
            card=CardData(
                base_model=model_args.model if is_hub_id(model_args.model or "") else None,
                datasets=tuple(source for source in data_args.train_data if is_hub_id(source)),
            ),
        )
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        with save_errors("the model", args.output_dir):
            trainer.save_model(_internal_call=True)
    except (NonFiniteLossError, CheckpointSaveError):
        with one_line_errors():
            raise
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    metrics: dict[str, float] = {}
    if eval_sets is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if calibration_args.calibrate:
            calibrate_saved(trainer, calibration_args)
    if draws:
        trainer.pictures = draw_pictures(trainer)
    if trainer.is_world_process_zero():
        card = describe_training(trainer)
        (Path(args.output_dir) / CARD_DATA_FILE).write_text(card.to_json(), encoding="utf-8")
    if args.push_to_hub:
        with one_line_errors():
            trainer.push_to_hub()
    trainer.accelerator.end_training()
    return metrics


def start_model(options: ModelArguments) -> tuple[PRMForStepScoring, PRMProcessor]:
    """The PRM to train and its processor: a new one on a backbone, or the one to go on from.

    Raises:
        ValueError: the backbone is a PRM, the PRM to go on from is none, or an option contradicts it.
    """
    names = ("head_dropout", "max_length", "aggregation", "attn_implementation")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    fixed = {name: getattr(options, name) for name in FIXED_IN_A_PRM if getattr(options, name) is not None}
    if options.model is not None:
        return load_model(options.model, options.model_revision or "main", options.backbone_dtype, given, fixed)
    revision = options.backbone_revision or "main"
    if _model_type(options.backbone, revision) == PRMConfig.model_type:
        raise ValueError(f"{options.backbone} is a PRM already, whose head would be lost; go on from it with --model")
    return PRMForStepScoring.from_backbone(
        options.backbone, dtype=options.backbone_dtype, revision=revision, **given, **fixed
    )


def load_model(
    name: str, revision: str, dtype: str, changes: dict[str, Any], fixed: dict[str, Any]
) -> tuple[PRMForStepScoring, PRMProcessor]:
    """A saved PRM and its processor, to go on from.

    Args:
        name, revision: where it is.
        dtype: of the backbone's weights.
        changes: options by name, in place of its own.
        fixed: options by name that must be its own.

    Raises:
        ValueError: it is no PRM or has adapters alone, or one of `fixed` is not its own.
    """
    if (Path(name) / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{name} holds adapters alone; give --model the output folder of that training, where they are merged"
        )
    model_type = _model_type(name, revision)
    if model_type not in (PRMConfig.model_type, None):
        raise ValueError(f"{name} is a {model_type!r} model and no PRM; start a new PRM on it with --backbone")
    config = PRMConfig.from_pretrained(name, revision=revision)
    different = [option for option, value in fixed.items() if value != getattr(config, option)]
    if different:
        shown = "; ".join(f"{option} is {getattr(config, option)!r}, not {fixed[option]!r}" for option in different)
        raise ValueError(f"{name} was made with other options, which stay as they are: {shown}. Leave them out")
    model = PRMForStepScoring.from_pretrained(name, revision=revision, dtype=dtype, **changes)
    processor = PRMProcessor.from_pretrained(name, revision=revision)
    if "max_length" in changes:
        processor.max_length = changes["max_length"]
    return model, processor


def _model_type(name: str | None, revision: str) -> str | None:
    """What a folder or Hub id holds by its config, or None where there is no config to read."""
    try:
        return PRMConfig.get_config_dict(name, revision=revision)[0].get("model_type")
    except OSError:
        return None


def check_labels_fit(model: PRMForStepScoring, options: DataArguments) -> None:
    """Check that labels are read as class indices for a model of several classes, and for no other.

    Raises:
        ValueError: they are not.
    """
    num_labels = model.config.num_labels
    given = ["--data-format classes"] if options.data_format == "classes" else []
    given += ["--neutral class"] if options.neutral == "class" else []
    if num_labels > 1 and not given:
        raise ValueError(
            f"the model has {num_labels} classes a step, and the labels are read as how correct a step is; give them "
            "as class indices, with --data-format classes, or --neutral class for ratings"
        )
    if num_labels == 1 and given:
        raise ValueError(
            f"{given[0]} is for models of several classes, and this one has one logit a step; give --num-labels and "
            "--class-weights too, or leave it out"
        )


@contextlib.contextmanager
def open_rejected_file(options: DataArguments, args: PRMTrainingArguments) -> Iterator[TextIO | None]:
    """The file for rows that are left out, of all sources; None for other processes and where there is none."""
    if options.on_bad_row != "skip" or options.streaming or args.process_index != 0:
        yield None
        return
    path = Path(options.rejected_file or Path(args.output_dir) / REJECTED_FILE)
    named = [data.partition("=")[2] for data in options.eval_data if "=" in data]
    for source in [*options.train_data, *options.eval_data, *named]:
        check_rejected_file(path, Path(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        yield file
        if file.tell():
            logger.warning("the rows that were left out are in %s", path)


def load_data(
    options: DataArguments, *, seed: int, rejected_file: TextIO | None = None
) -> tuple[datasets.Dataset | datasets.IterableDataset, datasets.Dataset | dict[str, datasets.Dataset] | None]:
    """The training set, and the evaluation set or sets by name, if any."""
    if options.streaming:
        hub = any(map(is_hub_id, options.train_data))
        train_set: Any = stream_step_dataset(
            options.train_data,
            format=options.data_format,
            on_bad_row=options.on_bad_row,
            split=options.train_split if hub else None,
            neutral=options.neutral,
            paths=options.paths,
        )
    else:
        train_set = _load_all(options.train_data, options, split=options.train_split, rejected_file=rejected_file)
    if (options.eval_fraction or options.decontaminate_against) and RECORD_NUMBER not in train_set.column_names:
        # What is said about a record later has its number among all.
        train_set = train_set.add_column(RECORD_NUMBER, np.arange(len(train_set)))
    if options.decontaminate_against:
        against = [
            text
            for source in options.decontaminate_against
            for text in read_problem_texts(source, split=options.eval_split if is_hub_id(source) else None)
        ]
        train_set, _ = decontaminate(train_set, against)
    if options.eval_fraction:
        return split_by_problem(train_set, options.eval_fraction, seed=seed)
    # A path may hold the sign itself, as the folders of partitioned data do.
    plain = [source for source in options.eval_data if "=" not in source or Path(source).exists()]
    named = [source.partition("=") for source in options.eval_data if source not in plain]
    if named and plain:
        raise ValueError(f"name every evaluation set or none: {plain} have no name, as in name=path")
    names = [name for name, _, _ in named]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"give each evaluation set a name of its own, as in name=path; got the names {names}")
    if named:
        return train_set, {
            name: _load_all([path], options, split=options.eval_split, rejected_file=rejected_file)
            for name, _, path in named
        }
    if not plain:
        return train_set, None
    return train_set, _load_all(plain, options, split=options.eval_split, rejected_file=rejected_file)


def _load_all(
    sources: Sequence[str], options: DataArguments, *, split: str, rejected_file: TextIO | None = None
) -> datasets.Dataset:
    parts = [
        load_step_dataset(
            source,
            format=options.data_format,
            on_bad_row=options.on_bad_row,
            rejected_file=rejected_file,
            split=split if is_hub_id(source) else None,
            neutral=options.neutral,
            paths=options.paths,
        )
        for source in sources
    ]
    return datasets.concatenate_datasets(parts)


if __name__ == "__main__":
    main()
