"""`pipeline("step-scoring", ...)` from a checkpoint alone, in clean processes and where the package is installed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from clean_process import CODE_FILES, run_clean
from scoring_by_hand import PROBLEM, SOLUTIONS, by_hand, shapes_seen
from transformers import pipeline

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.pipeline_prm import StepScoringPipeline

FAMILIES = ("llama", "gpt2")
INPUTS = [{"problem": PROBLEM, "steps": steps} for steps in SOLUTIONS]
NAMES = [
    *("steps", "step_probs", "overall_score", "aggregation", "weakest_step", "weakest_prob", "first_error"),
    *("threshold", "solution_idx", "problem", "error"),
]

IN_A_CLEAN_PROCESS = """
from transformers import AutoModel, AutoProcessor, pipeline

result = {}
for family, folder in arguments["folders"].items():
    pipe = pipeline("step-scoring", model=folder, trust_remote_code=True)
    inputs = arguments["inputs"]
    seen = result[family] = {
        "module": type(pipe).__module__.split("."),
        "single": pipe(inputs[0]),
        "list": pipe(inputs),
        "batched": pipe(inputs, batch_size=2),
        "generator": list(pipe(item for item in inputs)),
        "text": pipe({"problem": inputs[0]["problem"], "steps": "a\\nb"}, step_style="newlines"),
        "by task alone": type(pipeline(model=folder, trust_remote_code=True)).__name__,
    }
    made = pipeline("step-scoring", model=folder, trust_remote_code=True, aggregation="mean", on_error="record")
    seen["options"] = made(inputs + [{"problem": "p", "steps": []}])
    try:
        pipeline("step-scoring", model=folder)
    except ValueError as error:
        seen["without trust"] = str(error)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    verifier = model.verifier(processor)
    seen["verifier"] = [type(verifier).__name__, *type(verifier).__module__.split(".")]
    seen["model"] = type(model).__module__.split(".")
    seen["verified"] = verifier.score_solution(inputs[0]["problem"], inputs[0]["steps"]).to_dict()
    pipe.save_pretrained(f"{arguments['resaved']}/{family}")
"""
FROM_RESAVED = """
from transformers import pipeline

result = {
    family: pipeline("step-scoring", model=folder, trust_remote_code=True)(arguments["inputs"])
    for family, folder in arguments["folders"].items()
}
"""


@pytest.fixture(scope="module")
def expected(prm_folder: Callable[[str], Path]) -> dict[str, list[list[float]]]:
    """Each family's probabilities by hand."""
    probs = {}
    for family in FAMILIES:
        model = PRMForStepScoring.from_pretrained(prm_folder(family))
        processor = PRMProcessor.from_pretrained(prm_folder(family))
        probs[family] = [by_hand(model, processor, PROBLEM, steps) for steps in SOLUTIONS]
    return probs


@pytest.fixture(scope="module")
def seen(prm_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("pipeline")
    folders = {family: str(prm_folder(family)) for family in FAMILIES}
    arguments = {"folders": folders, "inputs": INPUTS, "resaved": str(root / "resaved")}
    return {"root": root} | run_clean(IN_A_CLEAN_PROCESS, folder=root / "process", arguments=arguments)


def check(scores: list[dict[str, Any]], probs: list[list[float]], aggregation: str = "min") -> None:
    """All that a pipeline says of the solutions, from their probabilities by hand."""
    assert len(scores) == len(probs) == len(SOLUTIONS)
    for index, (score, values) in enumerate(zip(scores, probs, strict=True)):
        assert list(score) == NAMES
        assert score["step_probs"] == pytest.approx(values, abs=1e-5)
        overall = min(values) if aggregation == "min" else sum(values) / len(values)
        assert score["overall_score"] == pytest.approx(overall, abs=1e-5)
        assert score["first_error"] == next((i for i, p in enumerate(values) if p < 0.5), -1)
        assert score["weakest_step"] == values.index(min(values))
        assert (score["steps"], score["problem"]) == (SOLUTIONS[index], PROBLEM)
        assert (score["aggregation"], score["solution_idx"], score["error"]) == (aggregation, index, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_process_needs_the_checkpoint_alone(
    family: str, seen: dict[str, Any], expected: dict[str, list[list[float]]]
) -> None:
    found = seen[family]
    assert (found["module"][0], found["module"][-1]) == ("transformers_modules", "pipeline_prm")
    for way in ("list", "batched", "generator"):
        check(found[way], expected[family])
    check([found["single"], *found["list"][1:]], expected[family])
    check(found["options"][:-1], expected[family], aggregation="mean")
    assert found["options"][-1]["error"] == "solution 5 has no step; give at least one"
    assert found["options"][-1]["overall_score"] is None
    assert found["text"]["steps"] == ["a", "b"]
    assert found["by task alone"] == "StepScoringPipeline"
    assert "trust_remote_code=True" in found["without trust"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_verifier_of_a_loaded_model_is_the_one_saved_with_it(family: str, seen: dict[str, Any]) -> None:
    name, *module = seen[family]["verifier"]
    assert (name, module[0], module[-1]) == ("PRMVerifier", "transformers_modules", "scoring")
    assert module[:-1] == seen[family]["model"][:-1]
    assert seen[family]["verified"] == seen[family]["single"]


def test_a_saved_pipeline_loads_again(
    seen: dict[str, Any], expected: dict[str, list[list[float]]], prm_folder: Callable[[str], Path]
) -> None:
    folders = {family: seen["root"] / "resaved" / family for family in FAMILIES}
    for family, folder in folders.items():
        assert {path.name for path in folder.iterdir()} == {path.name for path in prm_folder(family).iterdir()}
        for file in CODE_FILES:
            assert (folder / file).read_bytes() == (prm_folder(family) / file).read_bytes()
    arguments = {"folders": {family: str(folder) for family, folder in folders.items()}, "inputs": INPUTS}
    again = run_clean(FROM_RESAVED, folder=seen["root"] / "again", arguments=arguments)
    for family in FAMILIES:
        assert again[family] == seen[family]["list"]
        check(again[family], expected[family])


@pytest.fixture(scope="module")
def pipe(prm_folder: Callable[[str], Path]) -> StepScoringPipeline:
    return StepScoringPipeline(
        model=PRMForStepScoring.from_pretrained(prm_folder("llama")),
        processor=PRMProcessor.from_pretrained(prm_folder("llama")),
    )


def test_with_the_package_the_same_call_works(
    prm_folder: Callable[[str], Path], expected: dict[str, list[list[float]]]
) -> None:
    loaded = pipeline("step-scoring", model=str(prm_folder("gpt2")), trust_remote_code=True)
    assert type(loaded.model) is PRMForStepScoring
    check(loaded(INPUTS), expected["gpt2"])


def test_what_it_gives_is_json(pipe: StepScoringPipeline) -> None:
    scores = pipe([*INPUTS, {"problem": "", "steps": ["a"]}], on_error="record")
    assert json.loads(json.dumps(scores)) == scores
    assert type(pipe(INPUTS[0])) is dict


class MapDataset(torch.utils.data.Dataset):
    """A dataset as torch has them: a length and items, and no end when asked past it."""

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return INPUTS[index % len(INPUTS)]


class StreamDataset(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(INPUTS)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: INPUTS, list),
        (lambda: tuple(INPUTS), list),
        (lambda: (item for item in INPUTS), Iterator),
        (lambda: iter(INPUTS), Iterator),
        (lambda: datasets.Dataset.from_list(INPUTS), Iterator),
        (lambda: datasets.Dataset.from_list(INPUTS).to_iterable_dataset(), Iterator),
        (MapDataset, Iterator),
        (StreamDataset, Iterator),
    ],
)
def test_whatever_holds_inputs(
    make: Callable[[], Any], kind: type, pipe: StepScoringPipeline, expected: dict[str, list[list[float]]]
) -> None:
    scores = pipe(make())
    assert isinstance(scores, kind)
    check(list(scores), expected["llama"])


def test_nothing_gives_nothing(pipe: StepScoringPipeline) -> None:
    assert pipe([]) == pipe(()) == list(pipe(iter([]))) == []


def test_batch_size_is_the_most_solutions_in_a_pass(
    pipe: StepScoringPipeline, expected: dict[str, list[list[float]]]
) -> None:
    made = StepScoringPipeline(model=pipe.model, processor=pipe.processor, batch_size=2)
    for scorer, options, rows in (
        (pipe, {}, [5]),
        (pipe, {"batch_size": 1}, [1] * 5),
        (pipe, {"batch_size": 3}, [3, 2]),
        (made, {}, [2, 2, 1]),
        (made, {"batch_size": 4}, [4, 1]),
    ):
        for inputs in (list(INPUTS), iter(INPUTS)):
            scores: list[Any] = []
            passes = shapes_seen(pipe.model, lambda run=scorer, x=inputs, o=options, s=scores: s.extend(run(x, **o)))
            assert [count for count, _ in passes] == rows
            check(scores, expected["llama"])
    with pytest.raises(ValueError, match="batch_size must be None or at least 1, got 0"):
        pipe(INPUTS, batch_size=0)


def test_a_stream_is_read_in_windows_and_numbered_through(pipe: StepScoringPipeline) -> None:
    taken = []

    def stream() -> Iterator[dict[str, Any]]:
        for index in range(600):
            taken.append(index)
            yield {"problem": f"What is {index}?", "steps": [] if index in (3, 300) else [f"It is {index}."]}

    results = pipe(stream(), on_error="record")
    assert next(results)["steps"] == ["It is 0."]
    assert len(taken) < 300
    rest = list(results)
    assert [score["solution_idx"] for score in rest] == list(range(1, 600))
    assert [score["problem"] for score in rest] == [f"What is {index}?" for index in range(1, 600)]
    errors = {score["solution_idx"]: score["error"] for score in rest if score["error"]}
    assert errors == {index: f"solution {index} has no step; give at least one" for index in (3, 300)}


def test_options_at_a_call_come_before_those_it_was_made_with(pipe: StepScoringPipeline) -> None:
    made = StepScoringPipeline(model=pipe.model, processor=pipe.processor, aggregation="mean", threshold=0.0)
    score = made(INPUTS[1])
    assert (score["aggregation"], score["threshold"], score["first_error"]) == ("mean", 0.0, -1)
    assert score["overall_score"] == pytest.approx(sum(score["step_probs"]) / 6, abs=1e-9)
    score = made(INPUTS[1], aggregation="max", threshold=1.0)
    assert (score["aggregation"], score["threshold"], score["first_error"]) == ("max", 1.0, 0)
    assert score["overall_score"] == max(score["step_probs"])
    stored = StepScoringPipeline(model=copy.deepcopy(pipe.model), processor=pipe.processor)
    stored.model.config.error_threshold = 1.0
    assert [(stored(i)["threshold"], stored(i)["first_error"]) for i in INPUTS] == [(1.0, 0)] * len(INPUTS)
    text = {"problem": PROBLEM, "steps": "Step 1: a\nb\n\nc"}
    styles = ("blank_lines", "newlines", "step_markers")
    assert [made(text, step_style=style)["steps"] for style in styles] == [
        *(["Step 1: a\nb", "c"], ["Step 1: a", "b", "c"], ["a\nb\n\nc"])
    ]


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("2 + 3?", TypeError, "an input of this pipeline is a dictionary such as .*, got str"),
        (["2 + 3?"], TypeError, "got str"),
        ([INPUTS], TypeError, "got list"),
        (
            {"problem": "p"},
            ValueError,
            r"has the keys 'problem' and 'steps', or 'messages' and, if any, 'tools', got \['problem'\]",
        ),
        ({"problem": "p", "step": ["a"]}, ValueError, r"got \['problem', 'step'\]"),
        ({**INPUTS[0], "labels": [1]}, ValueError, r"got \['labels', 'problem', 'steps'\]"),
        ({"problem": 3, "steps": ["a"]}, TypeError, "problem 0 must be a string, got int"),
        ([INPUTS[0], {"problem": "p", "steps": ["a", ""]}], ValueError, "step 2 of solution 1 is empty"),
        ({"problem": "p", "steps": ["12 + 30 = 42."] * 99}, ValueError, "longer than max_length=256 tokens"),
    ],
)
def test_inputs_that_cannot_be(given: Any, kind: type[Exception], message: str, pipe: StepScoringPipeline) -> None:
    with pytest.raises(kind, match=message):
        pipe(given)


def test_options_that_cannot_be(pipe: StepScoringPipeline) -> None:
    for options, message in (
        ({"aggregation": "median"}, "there is no aggregation 'median'"),
        ({"threshold": 2.0}, r"threshold must be in \[0, 1\], got 2.0"),
        ({"step_style": "lines"}, "there is no style 'lines'"),
        ({"on_error": "skip"}, "on_error must be 'raise' or 'record', got 'skip'"),
    ):
        for inputs in (INPUTS[0], INPUTS):
            with pytest.raises(ValueError, match=message):
                pipe(inputs, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'agregation'"):
        pipe(INPUTS, agregation="min")


def test_saving_takes_the_options_of_saving(pipe: StepScoringPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
    processor = PRMProcessor.from_pretrained(tmp_path / "saved")
    assert processor(PROBLEM, SOLUTIONS[0]) == pipe.processor(PROBLEM, SOLUTIONS[0])
