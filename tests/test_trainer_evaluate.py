"""Evaluation on benchmarks: thresholds that are not chosen on what is reported, results by hand, and the command."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_card.card import CardData, EvaluationResult
from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.scoring import PRMVerifier
from trainer.benchmark_report import add_to_card, card_results, markdown
from trainer.benchmark_results import (
    Prediction,
    choose,
    evaluate_predictions,
    index_only_judgements,
    positions,
    problem_hash,
    read_predictions,
    write_predictions,
)
from trainer.benchmarks import BenchmarkItem
from trainer.evaluate import EvaluateArguments, main, score_items

ROOT = Path(__file__).resolve().parents[1]
RIGHT, WRONG, NONE = 1.0, 0.0, -100.0


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """The command sets up logging for its process, which is ours here."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("trainer", "modeling_prm", "hub_card")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def prediction(subset: str, labels: tuple[float, ...], probs: tuple[float, ...] | None, **changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "id": f"{subset}-0",
        "subset": subset,
        "generator": "a",
        "problem_hash": problem_hash(f"{subset}{labels}{probs}"),
        "labels": labels,
        "step_probs": probs,
        "error": "too long" if probs is None else None,
        "model_threshold": 0.5,
    }
    return Prediction(**{**values, **changes})


# The best threshold on gsm8k is between 0.2 and 0.3, where both are found; at 0.5 the right one is a false alarm.
GSM8K = [prediction("gsm8k", (RIGHT, WRONG), (0.9, 0.2)), prediction("gsm8k", (RIGHT,), (0.3,))]
MATH = [
    prediction("math", (RIGHT, WRONG, NONE), (0.8, 0.1, 0.9)),  # found
    prediction("math", (WRONG, NONE), (0.4, 0.1), generator="b"),  # called wrong only from 0.4 on
    prediction("math", (RIGHT, RIGHT), (0.6, 0.3)),  # found below 0.3
]
OMNIMATH = [
    prediction("omnimath", (WRONG,), (0.1,)),
    prediction("omnimath", (RIGHT, RIGHT), (0.9, 0.9)),
    prediction("omnimath", (RIGHT,), None, generator="b"),
]


def test_processbench_by_hand() -> None:
    results = evaluate_predictions([*GSM8K, *MATH, *OMNIMATH], benchmark="processbench", threshold_from="gsm8k")
    assert results["threshold"] == {
        "value": pytest.approx(0.25),
        "chosen_on": "gsm8k",
        "num_solutions": 2,
        "metric": "processbench_f1",
        "metric_there": 1.0,
    }
    assert set(results["subsets"]) == {"math", "omnimath"}, "what the threshold was chosen on is not reported"
    math, omnimath = results["subsets"]["math"], results["subsets"]["omnimath"]
    assert (math["acc_error"], math["acc_correct"]) == (0.5, 1.0)
    assert math["f1"] == pytest.approx(2 / 3)
    # The solution that was not scored is one of two without an error.
    assert (omnimath["acc_error"], omnimath["acc_correct"], omnimath["f1"]) == (1.0, 0.5, pytest.approx(2 / 3))
    assert results["average"]["f1"] == pytest.approx(2 / 3)
    assert results["average"]["acc_error"] == 0.75
    assert (results["num_solutions"], results["num_unscored"]) == (6, 1)
    # By generator: b has one missed error in math and nothing right there; a found all that it has.
    assert results["generators"]["a"]["average"]["f1"] == 1.0
    assert results["generators"]["b"]["math"]["acc_error"] == 0.0
    assert results["generators"]["b"]["math"]["f1"] is None
    # Eight labelled steps of five scored solutions, of which one, at 0.4, is taken for right: no step after an error.
    assert results["steps"]["num_steps"] == 8
    assert results["steps"]["step_accuracy"] == pytest.approx(7 / 8)
    # Right steps 0.8 0.6 0.3 0.9 0.9 against wrong ones 0.1 0.4 0.1: 14 of 15 pairs in order.
    assert results["steps"]["roc_auc"] == pytest.approx(14 / 15)
    assert sum(results["reliability"]["counts"]) == 8
    json.dumps(results, allow_nan=False)


def test_with_the_models_or_a_given_threshold_all_is_reported() -> None:
    every = [*GSM8K, *MATH]
    of_model = evaluate_predictions(every, benchmark="processbench", threshold_from="model")
    assert set(of_model["subsets"]) == {"gsm8k", "math"}
    assert of_model["threshold"]["value"] == 0.5
    # At 0.5 all errors are found, and both right solutions are false alarms.
    assert of_model["subsets"]["gsm8k"]["f1"] == 0.0
    assert (of_model["subsets"]["math"]["acc_error"], of_model["subsets"]["math"]["acc_correct"]) == (1.0, 0.0)
    given = evaluate_predictions(every, benchmark="processbench", threshold_from=0.25)
    assert given["subsets"]["gsm8k"]["f1"] == 1.0
    with pytest.raises(ValueError, match="the threshold must be in"):
        choose(every, 1.5, metric="processbench_f1")
    other = prediction("math", (RIGHT,), (0.5,), model_threshold=0.4)
    with pytest.raises(ValueError, match=r"other thresholds, \[0.4, 0.5\]"):
        choose([*every, other], "model", metric="processbench_f1")


def test_the_held_out_part_goes_by_problems() -> None:
    predictions = [
        prediction("math", labels, probs, id=f"{number}{letter}", problem_hash=problem_hash(f"problem {number}"))
        for number in range(20)
        for letter, labels, probs in (("a", (WRONG,), (0.2,)), ("b", (RIGHT,), (0.6,)))
    ]
    threshold, reported = choose(predictions, "held-out", metric="processbench_f1", held_out_fraction=0.25, seed=3)
    assert threshold.num_solutions == 10  # of 5 problems
    assert threshold.value == pytest.approx(0.4)
    problems = {p.problem_hash for p in reported}
    assert len(problems) == 15
    assert len(reported) == 30, "both solutions of a problem are on one side"
    _, others = choose(predictions, "held-out", metric="processbench_f1", held_out_fraction=0.25, seed=4)
    assert {p.problem_hash for p in others} != problems
    for fraction, message in ((0.0, "between 0 and 1"), (0.01, "leaves 0 solutions to choose on")):
        with pytest.raises(ValueError, match=message):
            choose(predictions, "held-out", metric="processbench_f1", held_out_fraction=fraction)
    with pytest.raises(ValueError, match=r"cannot be chosen on 'gsm8k': the subsets are math;"):
        choose(predictions, "gsm8k", metric="processbench_f1")
    with pytest.raises(ValueError, match="and 0 to report"):
        choose(predictions, "math", metric="processbench_f1")


def test_prmbench_by_hand() -> None:
    predictions = [
        prediction("deception", (RIGHT, WRONG), (0.9, 0.6), generator=None),
        prediction("circular", (RIGHT, WRONG), (0.4, 0.3), generator=None),
        prediction("multi_solutions", (RIGHT, RIGHT), (0.9, 0.2), generator=None),
        prediction("circular", (WRONG,), None, generator=None),
    ]
    results = evaluate_predictions(predictions, benchmark="prmbench", threshold_from="model")
    # deception: right steps 1 hit and 1 wrong step taken for right, F1 = 2/3; the wrong one is missed, F1 0.
    assert results["subsets"]["deception"]["prm_score"] == pytest.approx(1 / 3)
    assert results["subsets"]["circular"]["prm_score"] == pytest.approx(1 / 3)
    assert results["subsets"]["multi_solutions"]["prm_score"] == pytest.approx(2 / 3)
    # Pooled: right steps 2 hits, 2 missed, 1 wrong taken for right, F1 = 4/7; wrong ones 1 hit, 1 missed, 2 false, 2/5.
    assert results["overall"]["prm_score"] == pytest.approx(0.5 * 4 / 7 + 0.5 * 2 / 5)
    assert results["overall"]["num_steps"] == 6
    assert "generators" not in results
    text = markdown(results)
    assert "| deception | 33.3 | 66.7 | 0.0 |" in text
    assert "| multi_solutions | 66.7 | 66.7 | - |" in text
    assert "4 solutions, 1 of them could not be scored. The threshold is 0.5, that of the model's config." in text
    (entry,) = card_results(results)
    assert (entry.dataset, entry.metrics["prm_score_deception"]) == ("PRMBench", pytest.approx(1 / 3))


def test_the_index_alone_by_hand() -> None:
    # In each half the second step is always wrong and the first never: the index alone finds every first error.
    rows = [prediction("math", (RIGHT, WRONG), (0.5, 0.5), id=str(i)) for i in range(4)]
    rows += [prediction("math", (RIGHT,), (0.5,), id=f"r{i}") for i in range(4)]
    rows.insert(0, prediction("math", (RIGHT, WRONG), None))
    judgements = index_only_judgements(rows, "processbench_f1")
    assert judgements[0] is None
    assert judgements[1:] == [[False, True]] * 4 + [[False]] * 4
    results = evaluate_predictions(rows[1:], benchmark="processbench", threshold_from="model")
    assert results["average"]["index_only_f1"] == 1.0
    assert results["average"]["f1"] == 0.0  # 0.5 is not below 0.5
    assert results["index_only"]["roc_auc"] == 1.0


def test_positions_by_hand() -> None:
    long = prediction("math", (RIGHT,) * 11 + (WRONG,), (0.9,) * 11 + (0.8,))
    rows = positions([prediction("math", (WRONG, NONE), (0.3, 0.1)), long], 0.5)
    assert [row["position"] for row in rows] == [*map(str, range(1, 11)), "11+"]
    assert rows[0] == {
        "position": "1",
        "num_steps": 2,
        "error_share": 0.5,
        "accuracy": 1.0,
        "mean_prob": pytest.approx(0.6),
    }
    assert (rows[1]["num_steps"], rows[1]["error_share"]) == (1, 0.0)
    assert (rows[10]["num_steps"], rows[10]["error_share"], rows[10]["accuracy"]) == (2, 0.5, 0.5)
    assert rows[10]["mean_prob"] == pytest.approx(0.85)


def test_predictions_are_read_again_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    write_predictions([*MATH, *OMNIMATH], file)
    assert read_predictions(file) == [*MATH, *OMNIMATH]
    good = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    for bad, message in (
        ("{", ":1 is no prediction"),
        (json.dumps({**good, "step_probs": [0.5]}), "1 step_probs for 3 labels"),
        (json.dumps({**good, "step_probs": [0.5, 2, 0.5]}), r"must be in \[0, 1\]"),
        (json.dumps({**good, "labels": [1, 2, 0]}), "labels must be in"),
        (json.dumps({"id": "x"}), "labels"),
        ("", "holds no prediction"),
    ):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_predictions(file)


def test_results_go_into_a_card_in_place_of_older_ones(tmp_path: Path) -> None:
    file = tmp_path / "card_data.json"
    old = [
        EvaluationResult(dataset="ProcessBench", split="math", metrics={"processbench_f1": 0.1}),
        EvaluationResult(dataset="own", metrics={"roc_auc": 0.7}),
    ]
    file.write_text(CardData(license="mit", results=tuple(old)).to_json(), encoding="utf-8")
    results = evaluate_predictions([*GSM8K, *MATH, *OMNIMATH], benchmark="processbench", threshold_from="gsm8k")
    entries = card_results(results, dataset_id="Qwen/ProcessBench")
    add_to_card(file, entries)
    card = CardData.from_json(file.read_text(encoding="utf-8"))
    assert card.license == "mit"
    assert [(result.dataset, result.split) for result in card.results] == [
        ("own", None),
        ("ProcessBench", None),
        ("ProcessBench", "math"),
        ("ProcessBench", "omnimath"),
    ]
    whole = card.results[1]
    assert whole.metrics["processbench_f1"] == pytest.approx(2 / 3)
    assert "chosen by processbench_f1 on gsm8k (2 solutions, 1.000 there), which is left out" in whole.note
    assert "the mean of math, omnimath" in whole.note
    assert "1 of 6 solutions could not be scored" in whole.note
    assert whole.dataset_id == "Qwen/ProcessBench"


def item(name: str, number: int, **changes: Any) -> BenchmarkItem:
    texts = tuple(f"{i} + 1 = {i + 1}." for i in range(number))
    values = {"id": name, "subset": "own", "problem": f"Problem {name}", "steps": texts, "labels": (RIGHT,) * number}
    return BenchmarkItem(**{**values, **changes})


def test_scores_are_the_verifiers_in_the_order_given(
    make_prm: Callable[..., tuple[PRMForStepScoring, PRMProcessor]],
) -> None:
    verifier = PRMVerifier(*make_prm(), threshold=0.4)
    items = [item("a", 1), item("b", 4), item("c", 2, steps=("x", " ")), item("d", 3)]
    predictions = score_items(items, verifier)
    assert [prediction.id for prediction in predictions] == ["a", "b", "c", "d"]
    for one, own in zip(items, predictions, strict=True):
        assert (own.labels, own.model_threshold) == (one.labels, 0.4)
        if one.id == "c":
            assert own.step_probs is None
            assert own.error is not None
            assert own.error.startswith("c ") or " c " in own.error
        else:
            alone = verifier.score_solution(one.problem, list(one.steps)).step_probs
            assert own.step_probs == pytest.approx(alone, abs=1e-5)


def write_processbench(folder: Path, solutions: int = 3) -> Path:
    folder.mkdir()
    for name in ("gsm8k", "math"):
        rows = [
            {
                "id": f"{name}-{i}",
                "generator": f"model-{i % 2}",
                "problem": f"Start with {i} and add 1.",
                "steps": [f"{i} + {k} = {i + k}." for k in range(2 + i % 3)],
                "final_answer_correct": True,
                "label": i % 2 - 1,
            }
            for i in range(solutions)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def test_the_command_and_its_predictions_give_the_same(
    prm_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, first, again = write_processbench(tmp_path / "data"), tmp_path / "first", tmp_path / "again"
    card = tmp_path / "card_data.json"
    common = ["--benchmark", "processbench"]
    options = ["--model", str(prm_folder("llama")), "--data", str(data), "--card-data", str(card)]
    results = main([*common, *options, "--output-dir", str(first)])
    assert results is not None
    assert list(results["subsets"]) == ["math"]
    assert results["threshold"]["chosen_on"] == "gsm8k"
    table = (first / "results.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert str(tmp_path) not in table
    entries = json.loads((first / "evaluation_results.json").read_text(encoding="utf-8"))
    in_card = CardData.from_json(card.read_text(encoding="utf-8")).results
    assert tuple(EvaluationResult(**entry) for entry in entries) == in_card
    assert "Read from a file or folder, data." in in_card[0].note
    assert main([*common, "--predictions", str(first / "predictions.jsonl"), "--output-dir", str(again)]) == results
    assert not (again / "predictions.jsonl").exists()
    stored = json.loads((again / "results.json").read_text(encoding="utf-8"))
    assert {name: stored[name] for name in results} == results
    with pytest.raises(SystemExit, match="of an earlier run"):
        main([*common, *options, "--output-dir", str(first)])
    with pytest.raises(SystemExit, match="--threshold-from omnimath: it must be one of several subsets"):
        main([*common, *options, "--output-dir", str(tmp_path / "new"), "--threshold-from", "omnimath"])
    assert not (tmp_path / "new").exists()


def test_labelled_data_is_evaluated_at_the_models_threshold(prm_folder: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    rows = [{"problem": f"{i}?", "steps": ["a", "b"], "labels": [1, -1 if i % 2 else 1]} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    results = main(
        ["--model", str(prm_folder("llama")), "--benchmark", str(file), "--output-dir", str(tmp_path / "out")]
    )
    assert results is not None
    assert (results["benchmark"], results["threshold"]["value"]) == ("own", 0.5)
    assert results["steps"]["num_steps"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --model to score with, or --predictions"),
        ({"model": "m", "predictions": "p"}, "not both"),
        ({"model": "m", "threshold": 0.5, "threshold_from": "math"}, "not both"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateArguments(benchmark="processbench", output_dir="d", **options)


def test_two_processes_give_what_one_does(prm_folder: Callable[[str], Path], tmp_path: Path) -> None:
    data = write_processbench(tmp_path / "data", solutions=5)
    arguments = ["--model", str(prm_folder("llama")), "--benchmark", "processbench", "--data", str(data)]
    main([*arguments, "--output-dir", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "trainer.evaluate"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *arguments, "--output-dir", str(tmp_path / "two")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == 1, "one process writes"
    one, two = (read_predictions(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert [prediction.id for prediction in two] == [prediction.id for prediction in one]
    for a, b in zip(one, two, strict=True):
        assert b.step_probs == pytest.approx(a.step_probs, abs=1e-5)
