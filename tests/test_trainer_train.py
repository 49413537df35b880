"""The training command: what it writes, in one process and in two, and how it says what is wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import yaml
from small_training import LABELS, make_dataset, make_rows, run_python

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer import train
from trainer.arguments import PRMTrainingArguments

Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """The command sets up logging for its process, which is ours here."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("trainer", "modeling_prm", "hub_card")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files: all records, two evaluation sets, and one with a row that is wrong."""
    folder = tmp_path_factory.mktemp("data")
    bad = [*make_rows(LABELS[:2]), {"problem": "x", "steps": ["x"], "labels": [2.0]}]
    return {
        "train": write_rows(folder / "train.jsonl", make_rows()),
        "first": write_rows(folder / "first.jsonl", make_rows(LABELS[:3])),
        "second": write_rows(folder / "second.jsonl", make_rows(LABELS[4:])),
        "bad": write_rows(folder / "bad.jsonl", bad),
    }


@pytest.fixture
def options(backbone_folder: Folder, data: dict[str, Path], tmp_path: Path) -> list[str]:
    """The least that the command needs, for two steps on the CPU."""
    words = ["--backbone", backbone_folder("qwen2"), "--train-data", data["train"], "--output-dir", tmp_path / "out"]
    return [*map(str, words), "--use-cpu", "--report-to", "none", "--max-steps", "2", "--disable-tqdm", "true"]


def loads(folder: Path) -> PRMForStepScoring:
    """The model saved in a folder, after it and its processor have scored something."""
    model = transformers.AutoModel.from_pretrained(folder)
    row = make_rows()[1]
    batch = transformers.AutoProcessor.from_pretrained(folder)(row["problem"], row["steps"], return_tensors="pt")
    with torch.no_grad():
        assert model(**batch).step_probs.shape == (1, 9)
    return model


def same_weights(first: Any, second: Any) -> bool:
    others = second.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launches_the_command(
    options: list[str], data: dict[str, Path], tmp_path: Path, processes: int
) -> None:
    sets = ["--eval-data", f"first={data['first']}", f"second={data['second']}"]
    layout = ["--per-device-train-batch-size", "2", "--save-steps", "1", "--log-level", "info", "--bf16"]
    done = run_python("trainer.train", *options, *sets, *layout, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    results = {name: json.loads((out / f"{name}_results.json").read_text()) for name in ("train", "eval", "all")}
    assert results["train"].keys() >= {"train_loss", "epoch"}
    # Two steps of two records for each process that there really is.
    assert results["train"]["epoch"] == processes * 4 / 8
    assert f"Total train batch size (w. parallel, distributed & accumulation) = {2 * processes}" in done.stderr
    for name, labels in (("first", LABELS[:3]), ("second", LABELS[4:])):
        count = sum(label != -100.0 for row in labels for label in row)
        assert results["eval"][f"eval_{name}_num_steps"] == count
        assert 0.0 < results["eval"][f"eval_{name}_loss"] < 20.0
    assert results["all"] == results["train"] | results["eval"]
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    # The main process alone tells what was read.
    assert done.stderr.count("train.jsonl (plain): kept 8 of 8 rows") == 1
    model = loads(out)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert same_weights(model, loads(out / "checkpoint-2"))
    assert not same_weights(model, loads(out / "checkpoint-1"))


def test_a_file_gives_the_options_and_the_command_line_wins(
    backbone_folder: Folder, data: dict[str, Path], tmp_path: Path
) -> None:
    given = {
        "backbone": str(backbone_folder("qwen2")),
        "train-data": [str(data["first"]), str(data["second"])],
        "output_dir": str(tmp_path / "from_file"),
        "use-cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 1,
        "learning_rate": "1e-3",
        "head-type": "mlp",
        "separator_token": "<|end_of_step|>",
        "aggregation": "product",
        "max_length": 200,
        "attn_implementation": None,
        "eval_data": [],
        "eval_fraction": 0.3,
        "save_strategy": "no",
    }
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(given))
    metrics = train.main(["--config", str(tmp_path / "options.yaml"), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "from_file").exists()
    model = loads(tmp_path / "out")
    assert model.value_head.dense is not None
    config = model.config
    assert (config.separator_token, config.aggregation, config.max_length) == ("<|end_of_step|>", "product", 200)
    # 3 + 4 records of different problems, 0.3 of 7 held out.
    assert metrics["eval_num_solutions"] == 2
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]


def test_options_reach_the_model(options: list[str], tmp_path: Path) -> None:
    more = ["--prompt-layout", "plain", "--head-dropout", "0.3", "--attn-implementation", "eager", "--bf16"]
    assert train.main([*options, *more, "--backbone-dtype", "bfloat16", "--save-strategy", "no"]) == {}
    model = loads(tmp_path / "out")
    assert model.config.head_dropout == 0.3
    dtypes = {name.partition(".")[0]: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {"backbone": torch.bfloat16, "value_head": torch.float32}
    assert not (tmp_path / "out" / "eval_results.json").exists()
    parsed = train.ModelArguments("b", attn_implementation="eager", prompt_layout="chat", backbone_revision="v2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PRMForStepScoring, "from_backbone", lambda backbone, **given: (backbone, given))
        _, given = train.start_model(parsed)
    assert (given["attn_implementation"], given["prompt_layout"], given["revision"]) == ("eager", "chat", "v2")


def test_the_same_seed_gives_the_same_model(options: list[str], tmp_path: Path) -> None:
    folders = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        train.main([*options, "--seed", seed, "--save-strategy", "no", "--output-dir", str(tmp_path / name)])
        folders.append(loads(tmp_path / name))
    assert same_weights(folders[0], folders[1])
    assert not same_weights(folders[0], folders[2])


def test_resuming_ends_where_an_uninterrupted_run_does(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    training_step = train.PRMTrainer.training_step
    monkeypatch.setattr(
        train.PRMTrainer, "training_step", lambda self, *given: (calls.append(1), training_step(self, *given))[1]
    )
    # The schedule must not see where the first part stopped.
    steps = ["--save-steps", "2", "--lr-scheduler-type", "constant", "--learning-rate", "1e-2"]
    steps += ["--per-device-train-batch-size", "2", "--head-learning-rate", "5e-2"]
    train.main([*options, *steps, "--max-steps", "4", "--output-dir", str(tmp_path / "whole")])
    train.main([*options, *steps])
    with pytest.raises(SystemExit) as stopped:
        train.main([*options, *steps, "--max-steps", "4"])
    assert stopped.value.code == (
        f"error: {tmp_path / 'out'} holds checkpoint-2 of an earlier run; go on from it with "
        "--resume-from-checkpoint last, or name another --output-dir"
    )
    assert len(calls) == 4 + 2
    train.main([*options, *steps, "--max-steps", "4", "--resume-from-checkpoint", "last"])
    assert len(calls) == 4 + 2 + 2, "the first two steps must not be taken again"
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert same_weights(loads(tmp_path / "out"), loads(tmp_path / "whole"))
    assert not same_weights(loads(tmp_path / "out"), loads(tmp_path / "out" / "checkpoint-2"))
    # Named, the checkpoint need not be the last, nor in the output folder.
    named = str(tmp_path / "out" / "checkpoint-2")
    train.main([*options, *steps, "--max-steps", "4", "--resume-from-checkpoint", named, "--output-dir", f"{named}b"])
    assert same_weights(loads(Path(f"{named}b")), loads(tmp_path / "whole"))


@pytest.mark.parametrize("other", [["--max-length", "60"], ["--separator-token", "<sep2>"], ["--head-type", "mlp"]])
def test_going_on_with_another_layout_or_head_is_refused(options: list[str], other: list[str], tmp_path: Path) -> None:
    train.main([*options, "--save-steps", "2"])
    with pytest.raises(SystemExit) as stopped:
        train.main([*options, *other, "--resume-from-checkpoint", "last"])
    name = other[0].removeprefix("--").replace("-", "_")
    assert f"checkpoint-2 was trained with other options: {name} was" in str(stopped.value.code)


MISTAKES = {
    "unknown option": (["--no-such-option", "1"], "unrecognized arguments: --no-such-option 1"),
    "missing file of options": (["--config", "absent.yaml"], "No such file or directory: 'absent.yaml'"),
    "broken file of options": (["--config", "{tmp}/broken.yaml"], "broken.yaml is not valid YAML"),
    "unknown option in the file": (["--config", "{tmp}/unknown.yaml"], "has the option 'learn_rate', which is not"),
    "two kinds of evaluation data": (["--eval-data", "x", "--eval-fraction", "0.1"], "give --eval-data or --eval-fr"),
    "label smoothing": (["--label-smoothing-factor", "0.1"], "smooths the targets of a softmax"),
    "unknown dtype": (["--backbone-dtype", "float33"], "invalid choice: 'float33'"),
    "unknown backbone": (["--backbone", "{tmp}/absent"], "absent is neither a folder, nor a GGUF file, nor a Hub id"),
    "a PRM as backbone": (["--backbone", "{prm}"], "is a PRM already, whose head would be lost"),
    "missing data": (["--train-data", "{tmp}/absent.jsonl"], "absent.jsonl does not exist"),
    "bad row": (["--train-data", "{bad}"], r"bad.jsonl:3: labels must be in [0, 1] or -100: got 2.0"),
    "unknown format": (["--data-format", "no_such"], "no_such"),
    "bad fraction": (["--eval-fraction", "1.5"], "fraction must be between 0 and 1"),
    "half the sets named": (["--eval-data", "a=x", "y"], "name every evaluation set or none: ['y'] have no name"),
    "a name twice": (["--eval-data", "a=x", "a=y"], "a name of its own, as in name=path; got the names ['a', 'a']"),
    "no name": (["--eval-data", "=x"], "a name of its own"),
    "no checkpoint": (["--resume-from-checkpoint", "last"], "holds no checkpoint to go on from"),
    "wrong checkpoint": (["--resume-from-checkpoint", "{tmp}"], "is no checkpoint of training, which holds trainer_s"),
    "too long": (["--max-length", "300"], "max_length=300 is more than the 256 tokens"),
    "too short": (["--max-length", "3"], "8 records have a problem that leaves room for no step"),
    "absent attention": (["--attn-implementation", "no_such"], "no_such"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    name: str, options: list[str], prm_folder: Folder, data: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "broken.yaml").write_text("seed: [1\nx: }")
    (tmp_path / "unknown.yaml").write_text("learn_rate: 1")
    argv, message = MISTAKES[name]
    places = {"{tmp}": str(tmp_path), "{prm}": str(prm_folder("qwen2")), "{bad}": str(data["bad"])}
    for place, path in places.items():
        argv = [word.replace(place, path) for word in argv]
    with pytest.raises(SystemExit) as stopped:
        train.main([*options, *argv])
    if stopped.value.code == 2:
        shown = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert len(shown) == 1
    else:
        shown = [stopped.value.code]
        assert shown[0].startswith("error: ")
        assert "\n" not in shown[0]
    assert message in shown[0]
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_mistake_shows_no_traceback_and_fails(options: list[str], tmp_path: Path) -> None:
    done = run_python("trainer.train", *options, "--backbone", tmp_path / "absent")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'absent'} is neither a folder")


def test_a_mistake_found_in_one_process_ends_both(options: list[str]) -> None:
    # The data are tokenized in one process while the other waits for it.
    done = run_python("trainer.train", *options, "--max-length", "3", processes=2, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert all("8 records have a problem that leaves room for no step" in line for line in lines)


def test_bad_rows_can_be_skipped(options: list[str], data: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    argv = [*options, "--train-data", str(data["bad"]), "--on-bad-row", "skip", "--data-format", "plain"]
    train.main([*argv, "--save-strategy", "no", "--max-steps", "1"])
    assert any("kept 2 of 3 rows: 2 records; 1 rejected" in message for message in caplog.messages)


def test_help_lists_our_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m trainer.train --backbone BACKBONE --train-data FILE")
    for option in ("--backbone", "--train-data", "--eval-fraction", "--head-learning-rate", "--config", "--bf16"):
        assert f"{option} " in shown


def test_a_path_may_hold_the_sign_of_a_name(data: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "part=1").mkdir()
    path = write_rows(tmp_path / "part=1" / "rows.jsonl", make_rows(LABELS[:2]))
    for given in ([str(path)], [f"a={path}"]):
        _, sets = train.load_data(train.DataArguments([str(data["train"])], eval_data=given), seed=0)
        found = sets if isinstance(sets, datasets.Dataset) else sets["a"]
        assert found["labels"] == LABELS[:2]


def test_data_of_the_hub_are_read_by_split(data: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(path: str, *, split: str | None, **rest: Any) -> datasets.Dataset:
        seen.append((path, split))
        return make_dataset(LABELS[:1])

    monkeypatch.setattr(train, "load_step_dataset", load)
    local = str(data["train"])
    options = train.DataArguments(["owner/name", local], eval_data=["other/name"], train_split="train[:9]")
    train_set, eval_set = train.load_data(options, seed=0)
    assert seen == [("owner/name", "train[:9]"), (local, None), ("other/name", "test")]
    assert (len(train_set), len(eval_set)) == (2, 1)
    seen.clear()
    train.load_data(train.DataArguments([local], eval_data=["a=owner/name"], eval_split="dev"), seed=0)
    assert seen == [(local, None), ("owner/name", "dev")]


def test_processor_and_model_saved_together_belong_together(options: list[str], tmp_path: Path) -> None:
    train.main([*options, "--save-strategy", "no", "--max-length", "100"])
    processor = PRMProcessor.from_pretrained(tmp_path / "out")
    assert (processor.max_length, PRMForStepScoring.from_pretrained(tmp_path / "out").config.max_length) == (100, 100)


def test_rejected_rows_of_all_sources_are_in_one_file(data: dict[str, Path], tmp_path: Path) -> None:
    def bad(name: str) -> str:
        path = write_rows(tmp_path / name, make_rows(LABELS[:2]))
        path.write_text(path.read_text() + json.dumps({"problem": name, "steps": ["a"], "labels": []}) + "\n")
        return str(path)

    args = PRMTrainingArguments(str(tmp_path / "out"), use_cpu=True)
    options = train.DataArguments([bad("a.jsonl"), bad("b.jsonl")], eval_data=[bad("c.jsonl")], on_bad_row="skip")
    with train.open_rejected_file(options, args) as file:
        train_set, _ = train.load_data(options, seed=0, rejected_file=file)
    assert len(train_set) == 4
    entries = [json.loads(line) for line in (tmp_path / "out" / "rejected_rows.jsonl").read_text().splitlines()]
    assert [(Path(entry["file"]).name, entry["number"]) for entry in entries] == [
        ("a.jsonl", 3),
        ("b.jsonl", 3),
        ("c.jsonl", 3),
    ]
    # The data itself is never written over.
    options = train.DataArguments([bad("a.jsonl")], on_bad_row="skip", rejected_file=str(tmp_path / "a.jsonl"))
    with (
        pytest.raises(ValueError, match="would be among the data that is read"),
        train.open_rejected_file(options, args),
    ):
        pass
    with pytest.raises(ValueError, match="--rejected-file is written with --on-bad-row skip"):
        train.DataArguments(["a.jsonl"], rejected_file="b.jsonl")


def test_neutral_and_paths_reach_the_reader(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"problem": "p", "steps": ["a", "b", "c"], "labels": [1, 0, -1]}])
    options = train.DataArguments([str(path)], eval_data=[str(path)], neutral="class")
    train_set, eval_set = train.load_data(options, seed=0)
    assert train_set["labels"][:] == eval_set["labels"][:] == [[0.0, 1.0, 2.0]]
    options = train.DataArguments([str(path)], neutral="ignored", streaming=True)
    assert [row["labels"] for row in train.load_data(options, seed=0)[0]] == [[1.0, -100.0, 0.0]]
