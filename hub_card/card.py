"""From typed data to a model card: what a published PRM says about itself.

`CardData` is the schema of what only its author knows; everything else is read from model and processor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_prm.backbones import is_bidirectional

# Where training leaves `CardData` beside a model.
CARD_DATA_FILE = "card_data.json"
TAGS = ("prm", "process-reward-model", "step-scoring")
_TEMPLATE = Path(__file__).with_name("template.md")

# How a metric is called in a table and in the card's metadata; others go by their own name.
_METRIC_NAMES = {
    "step_accuracy": "Step accuracy",
    "majority_accuracy": "Accuracy of the majority class",
    "balanced_accuracy": "Balanced accuracy",
    "error_precision": "Precision of the error class",
    "error_recall": "Recall of the error class",
    "error_f1": "F1 of the error class",
    "error_share": "Share of wrong steps",
    "roc_auc": "ROC AUC",
    "average_precision": "Average precision of the error class",
    "brier": "Brier score",
    "ece": "Expected calibration error",
    "processbench_f1": "F1 of the first error (ProcessBench)",
    "processbench_acc_error": "Accuracy of the first error on wrong solutions",
    "processbench_acc_correct": "Accuracy on correct solutions",
    "num_steps": "Labelled steps",
    "num_solutions": "Solutions",
    "loss": "Loss",
    "index_only_roc_auc": "ROC AUC of the step's index alone",
    "index_only_average_precision": "Average precision of the step's index alone",
    "index_only_error_f1": "F1 of the error class of the step's index alone",
    "index_only_processbench_f1": "F1 of the first error of the step's index alone",
}


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What one evaluation gave.

    Args:
        dataset: the data's name.
        metrics: values by the metric's name, as `trainer.metrics` names them.
        dataset_id: its Hub id, where it has one.
        split: which part of it.
        note: how it was measured, in a sentence.

    Raises:
        TypeError: a value of `metrics` is no number.
    """

    dataset: str
    metrics: Mapping[str, float]
    dataset_id: str | None = None
    split: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if not isinstance(value, numbers.Real):
                raise TypeError(f"the metric {name} of {self.dataset} must be a number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG for the card: its path on this machine and what it shows."""

    path: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class CardData:
    """What the author of a checkpoint knows about it.

    Args:
        title: the card's title, by default the repository's name.
        description: what the model is for, in a few sentences.
        base_model: Hub id of the backbone.
        datasets: Hub ids, or names, of the training data.
        license: the weights' licence, as the Hub names it (`apache-2.0`, `mit`, `llama3.2`, ...).
        languages: codes such as `en`.
        training: hyperparameters by name.
        results: evaluations.
        pictures: calibration, learning curves and the like.
        limits: what to know before using it, beside what the card says of every PRM.
        citation: BibTeX.
        example_problem, example_steps: shown in the quick start and, written out, in the prompt layout.

    Raises:
        TypeError: one text is given where several are needed, or something else where text is needed.
    """

    title: str | None = None
    description: str = ""
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    license: str | None = None
    languages: tuple[str, ...] = ()
    training: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    results: tuple[EvaluationResult, ...] = ()
    pictures: tuple[Picture, ...] = ()
    limits: tuple[str, ...] = ()
    citation: str | None = None
    example_problem: str = "Start with 4, add 3, subtract 2 and add 1. What is the result?"
    example_steps: tuple[str, ...] = ("4 + 3 = 7.", "7 - 2 = 5.", "5 + 1 = 6.", "The answer is 6.")

    def __post_init__(self) -> None:
        for name in ("title", "description", "base_model", "license", "citation", "example_problem"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name in ("description", "example_problem") or value is not None):
                raise TypeError(f"{name} must be text, got {value!r}")
        for name in ("datasets", "languages", "limits", "example_steps"):
            values = getattr(self, name)
            # A text is a sequence too, of letters.
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise TypeError(f"{name} must be a tuple of texts, got {values!r}")

    def to_json(self) -> str:
        """As the file `card_data.json` holds it."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CardData:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is not JSON, or not of this form.
        """
        try:
            data = json.loads(text)
            data["results"] = tuple(EvaluationResult(**result) for result in data.get("results", ()))
            data["pictures"] = tuple(Picture(**picture) for picture in data.get("pictures", ()))
            for name in ("datasets", "languages", "limits", "example_steps"):
                if isinstance(data.get(name), list):
                    data[name] = tuple(data[name])
            return cls(**data)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not the data of a model card ({error}); CardData says what it holds") from error


def render_card(
    data: CardData,
    model: Any,
    processor: Any,
    *,
    repo_id: str,
    code: Mapping[str, str],
    pictures: Mapping[str, str],
    branch: str = "main",
    commit: str | None = None,
) -> str:
    """The text of a model card.

    Args:
        data: what the author knows.
        model, processor: the PRM.
        repo_id: where it goes.
        code: the SHA-256 of each code file.
        pictures: the path in the repository of each picture, with its caption.
        branch: where in the repository it goes.
        commit: the commit that holds the model, where it is known.

    Raises:
        ValueError: the example is too long for this model.
    """
    config = model.config
    try:
        example = processor(data.example_problem, list(data.example_steps))
    except ValueError as error:
        raise ValueError(
            f"the card's example cannot be written ({error}); give a shorter example_problem and example_steps"
        ) from error
    card = ModelCard.from_template(
        _metadata(data, repo_id),
        template_path=str(_TEMPLATE),
        title=cell(data.title or repo_id.partition("/")[2]),
        repo_id=repo_id,
        revision=python_literal(commit or branch),
        commit=commit,
        description=escape(data.description),
        base_model=code_span(data.base_model) if data.base_model else None,
        datasets=[code_span(name) for name in data.datasets],
        license=cell(data.license) if data.license else None,
        example_problem=python_literal(data.example_problem),
        example_steps=python_literal(list(data.example_steps)),
        example_text=fenced(_decode(processor, example["input_ids"][0])),
        example_positions=example["step_positions"][0],
        separator=code_span(config.separator_token),
        separator_id=config.separator_token_id,
        config=config,
        problem_template=code_span(repr(config.problem_template)),
        step_template=code_span(repr(config.step_template)),
        step_joiner=code_span(repr(config.step_joiner)),
        max_length=processor.max_length,
        backbone_type=code_span(config.text_config.model_type),
        head={"linear": "one linear layer", "mlp": "two linear layers with a ReLU between"}[config.head_type],
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        dtype=str(model.dtype).removeprefix("torch."),
        is_bidirectional=is_bidirectional(config.text_config),
        training=[(cell(name), cell(value)) for name, value in data.training.items()],
        results=[_result_table(result) for result in data.results],
        pictures=[(path, cell(caption)) for path, caption in pictures.items()],
        limits=[cell(limit) for limit in data.limits],
        code=dict(code),
        citation=fenced(data.citation, "bibtex") if data.citation else None,
        versions={"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
    )
    return str(card)


def _metadata(data: CardData, repo_id: str) -> ModelCardData:
    name = data.title or repo_id.partition("/")[2]
    results = [
        EvalResult(
            task_type="token-classification",
            task_name="Step scoring",
            dataset_type=result.dataset_id or result.dataset,
            dataset_name=result.dataset,
            dataset_split=result.split,
            metric_type=metric,
            metric_name=_METRIC_NAMES.get(metric, metric),
            metric_value=float(value),
        )
        for result in data.results
        for metric, value in result.metrics.items()
        if math.isfinite(value)
    ]
    return ModelCardData(
        base_model=data.base_model,
        datasets=list(data.datasets) or None,
        eval_results=results or None,
        language=list(data.languages) or None,
        library_name="transformers",
        license=data.license,
        model_name=name if results else None,
        pipeline_tag="token-classification",
        tags=list(TAGS),
        # The Hub and its readers take what is not set as absent.
        ignore_metadata_errors=False,
    )


def _result_table(result: EvaluationResult) -> dict[str, Any]:
    rows = [(cell(_METRIC_NAMES.get(name, name)), _number(value)) for name, value in result.metrics.items()]
    where = f"{result.dataset}, {result.split}" if result.split else result.dataset
    return {"dataset": cell(where), "note": escape(result.note), "rows": rows}


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"


def _decode(processor: Any, ids: list[int]) -> str:
    text: str = processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def escape(text: str) -> str:
    """Text of others as plain Markdown: no tag, picture, table, heading, list or code comes out of it."""
    text = "\n".join(text.splitlines()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|#!~$])", r"\\\1", text)
    text = re.sub(r"(?m)^[^\S\n]+", "", text)
    # At the start of a line, these make lists and rules.
    text = re.sub(r"(?m)^([-+=])", r"\\\1", text)
    return re.sub(r"(?m)^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)


def cell(value: Any) -> str:
    """A value as one line of plain Markdown, as a cell of a table needs it."""
    return escape(" ".join(str(value).split()))


def code_span(text: str) -> str:
    """Text as inline code in a cell of a table, whatever it holds."""
    text = " ".join(text.splitlines()) or " "
    if "\\|" in text:
        # Readers of Markdown disagree on which sign this escapes in a table.
        return "<code>" + re.sub(r"[^A-Za-z0-9 ]", lambda sign: f"&#{ord(sign[0])};", text) + "</code>"
    text = text.replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall(r"`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def fenced(text: str, language: str = "text") -> str:
    """Text as a block of code, whatever it holds."""
    fence = "`" * max(3, max(map(len, re.findall(r"`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def python_literal(value: str | list[str]) -> str:
    """A string or list of strings as Python code that no line of Markdown can end."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("```", "\\u0060\\u0060\\u0060")
    return "[" + ", ".join(map(python_literal, value)) + "]"
