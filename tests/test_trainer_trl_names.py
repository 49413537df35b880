"""Coming from TRL: its options and its data work, or one line says what takes their place."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import yaml
from small_training import make_arguments

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer import train
from trainer.arguments import PRMTrainingArguments
from trainer.prm_trainer import PRMTrainer
from trainer.trl_names import COMMAND_LINE_NAMES, PYTHON_NAMES, from_trl_columns

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
Folder = Callable[..., Path]

# The options of trl.experimental.prm.PRMConfig in TRL 1.13.0 beside those of TrainingArguments.
TRL_OPTIONS = {
    "max_length",
    "max_completion_length",
    "disable_dropout",
    "step_separator",
    "train_on_last_step_only",
    "dataset_num_proc",
}
TRL_ROWS = [
    {"prompt": "What is 2 + 3?", "completions": ["2 + 3 = 5.", "So it is 6."], "labels": [True, False]},
    {"prompt": "What is 9 - 5?", "completions": ["Step 1: 9 - 5 = 4.", "Step 2: It is 4."], "labels": [True, True]},
]
OUR_ROWS = [
    {"problem": "What is 2 + 3?", "steps": ["2 + 3 = 5.", "So it is 6."], "labels": [1.0, 0.0]},
    {"problem": "What is 9 - 5?", "steps": ["9 - 5 = 4.", "It is 4."], "labels": [1.0, 1.0]},
]


def ours() -> set[str]:
    return {field.name for field in dataclasses.fields(PRMTrainingArguments)}


def test_every_option_of_trl_is_ours_or_explained() -> None:
    assert ours() | PYTHON_NAMES.keys() >= TRL_OPTIONS
    assert not ours() & PYTHON_NAMES.keys()
    assert {"train_on_last_step_only", "disable_dropout"} <= ours()


def test_the_command_line_explains_only_what_it_lacks() -> None:
    known = ours()
    for options in (train.ModelArguments, train.AdapterArguments, train.DataArguments):
        known |= {field.name for field in dataclasses.fields(options)}
    assert known | COMMAND_LINE_NAMES.keys() >= TRL_OPTIONS
    assert not known & COMMAND_LINE_NAMES.keys()
    # What an explanation sends to is there.
    named = {word.strip(",") for text in COMMAND_LINE_NAMES.values() for word in text.split() if word.startswith("--")}
    assert {word.removeprefix("--").replace("-", "_") for word in named} <= known


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("step_separator", "separator_token"),
        ("max_length", "max_length"),
        ("max_completion_length", "max_length"),
        ("model_init_kwargs", "dtype"),
    ],
)
def test_arguments_say_what_replaces_an_option(name: str, replacement: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"^PRMTrainingArguments has no option '{name}' as TRL has: ") as error:
        make_arguments(tmp_path, **{name: 1})
    assert "PRMForStepScoring.from_backbone" in str(error.value)
    assert replacement in inspect.signature(PRMForStepScoring.from_backbone).parameters
    assert replacement in str(error.value)
    assert "\n" not in str(error.value)


def test_arguments_are_otherwise_those_of_a_dataclass(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
        make_arguments(tmp_path, no_such=1)
    parameters = inspect.signature(PRMTrainingArguments).parameters
    assert {"output_dir", "pos_weight", "learning_rate"} <= parameters.keys()
    args = make_arguments(tmp_path, train_on_last_step_only=True, disable_dropout=True)
    assert (args.train_on_last_step_only, args.disable_dropout) == (True, True)


@pytest.mark.parametrize("name", COMMAND_LINE_NAMES)
def test_the_command_says_what_replaces_an_option(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As in a command of TRL, so that what ours needs is missing.
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({name: "x"}))
    for words in ([f"--{name}", "x"], [f"--{name.replace('_', '-')}=x"], ["--config", str(tmp_path / "options.yaml")]):
        with pytest.raises(SystemExit) as stopped:
            train.main([*words, "--output_dir", str(tmp_path / "out")])
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert "there is no option " in line
        assert line.endswith(f"; in its place: {COMMAND_LINE_NAMES[name]}")


def test_a_value_that_reads_like_an_option_is_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--separator-token", "step_separator", "--output_dir", str(tmp_path / "out")])
    assert "in its place" not in capsys.readouterr().err


def test_a_tokenizer_and_a_token_classifier_are_refused(
    make_prm: MakePRM, backbone_folder: Folder, tmp_path: Path
) -> None:
    model, processor = make_prm("qwen2")
    data = datasets.Dataset.from_list(OUR_ROWS)
    with pytest.raises(TypeError, match=r"got PRMForStepScoring and \w*; PRMForStepScoring.from_backbone\(...\) makes"):
        PRMTrainer(model, make_arguments(tmp_path), processing_class=processor.tokenizer, train_dataset=data)
    classifier = transformers.AutoModelForTokenClassification.from_pretrained(backbone_folder("qwen2"), num_labels=2)
    with pytest.raises(TypeError, match=r"got Qwen2ForTokenClassification and .*PRMForStepScoring.from_backbone"):
        PRMTrainer(classifier, make_arguments(tmp_path), processing_class=processor.tokenizer, train_dataset=data)
    with pytest.raises(TypeError, match=r"got str and PRMProcessor; PRMForStepScoring.from_backbone"):
        PRMTrainer("Qwen/Qwen2-0.5B", make_arguments(tmp_path), processing_class=processor, train_dataset=data)
    with pytest.raises(TypeError, match=r"args must be trainer.arguments.PRMTrainingArguments, got TrainingArguments"):
        PRMTrainer(model, transformers.TrainingArguments(str(tmp_path)), processing_class=processor, train_dataset=data)


def test_data_of_trl_trains_and_evaluates_as_ours(prm_folder: Folder, tmp_path: Path) -> None:
    found = []
    for rows in (TRL_ROWS, OUR_ROWS):
        data = datasets.Dataset.from_list(rows)
        trainer = PRMTrainer(
            PRMForStepScoring.from_pretrained(prm_folder("qwen2")),
            make_arguments(tmp_path, max_steps=2, logging_steps=1, learning_rate=1e-2),
            processing_class=PRMProcessor.from_pretrained(prm_folder("qwen2")),
            train_dataset=data,
            eval_dataset={"held_out": data},
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, trainer.evaluate()["eval_held_out_brier"], trainer.train_dataset["input_ids"][:]))
    assert found[0] == found[1]
    assert len(found[0][0]) == 2


def test_rows_of_trl_become_records() -> None:
    # A soft label, one left out, and a column more.
    rows = [{"prompt": "p", "completions": ["a", "b", "c"], "labels": [0.25, None, 1.0], "source": "s"}]
    converted = from_trl_columns(datasets.Dataset.from_list(rows))
    assert converted[:] == {"problem": ["p"], "steps": [["a", "b", "c"]], "labels": [[0.25, -100.0, 1.0]]}
    assert from_trl_columns(datasets.Dataset.from_list(TRL_ROWS)).to_list() == OUR_ROWS
    for other in (OUR_ROWS, [{"prompt": "p", "labels": [True]}], [{**OUR_ROWS[0], **TRL_ROWS[0]}]):
        dataset = datasets.Dataset.from_list(other)
        assert from_trl_columns(dataset) is dataset


def test_a_bad_row_of_trl_is_named() -> None:
    rows = [*TRL_ROWS, {"prompt": "p", "completions": ["a", "b"], "labels": [True]}]
    with pytest.raises(ValueError, match=r"record 2 \(from 0\): as many labels as steps are needed"):
        from_trl_columns(datasets.Dataset.from_list(rows))


def test_a_file_of_trl_trains(backbone_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRL_ROWS))
    words = ["--backbone", backbone_folder("qwen2"), "--train_data", tmp_path / "steps.jsonl", "--max_length", 100]
    words += ["--output_dir", tmp_path / "out", "--use_cpu", "--report_to", "none", "--max_steps", 1]
    train.main([*map(str, words), "--save_strategy", "no", "--train_on_last_step_only", "--lora_r", "2"])
    model = PRMForStepScoring.from_pretrained(tmp_path / "out")
    assert model.config.max_length == 100
    assert torch.isfinite(model.value_head.out.weight).all()
