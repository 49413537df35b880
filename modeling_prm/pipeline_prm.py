"""The pipeline of a checkpoint: `pipeline("step-scoring", model="user/name", trust_remote_code=True)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from transformers import Pipeline

from .scoring import PRMVerifier

# So many inputs are sorted by length together.
_WINDOW = 256


class StepScoringPipeline(Pipeline):
    """Scores the steps of solutions.

    `pipe({"problem": "1 + 1?", "steps": ["1 + 1 = 2.", "The answer is 2."]})` gives a dictionary with
    `step_probs`, `overall_score`, `weakest_step`, `first_error` and the other fields of `SolutionScore`; a list,
    a dataset or a generator of such inputs gives as many, in the same order. `steps` may be the solution's
    whole text.

    Options, when the pipeline is made or at a call: `aggregation` and `threshold` as in `PRMVerifier`,
    `step_style` as in `split_steps`, `on_error` as in `PRMVerifier.score_solutions`, and `batch_size`, the most
    solutions in one forward pass.

    Raises:
        TypeError: an input is not a dictionary of `problem` and `steps`.
        ValueError: an input lacks one of them or has another key, or cannot be scored.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def _sanitize_parameters(
        self,
        aggregation: str | None = None,
        threshold: float | None = None,
        step_style: Any = None,
        on_error: str | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        options = {"aggregation": aggregation, "threshold": threshold, "step_style": step_style, "on_error": on_error}
        return {}, {name: value for name, value in options.items() if value is not None}, {}

    def preprocess(self, inputs: Any) -> dict[str, Any]:
        if not isinstance(inputs, dict):
            raise TypeError(
                "an input of this pipeline is a dictionary such as {'problem': '1 + 1?', 'steps': ['1 + 1 = 2.']}, "
                f"got {type(inputs).__name__}"
            )
        if inputs.keys() != {"problem", "steps"}:
            raise ValueError(f"an input has the keys 'problem' and 'steps', got {sorted(map(str, inputs))}")
        return dict(inputs)

    def _forward(self, model_inputs: Any, **options: Any) -> Any:
        return self._score([model_inputs], None, options)[0]

    def postprocess(self, model_outputs: Any) -> dict[str, Any]:
        return model_outputs.to_dict()

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        # The base class pads with a data loader, which knows nothing of step positions or lengths.
        items = iter(inputs)
        given_batch_size = batch_size if batch_size > 1 else None
        first = 0
        while window := [self.preprocess(item) for item in islice(items, _WINDOW)]:
            for score in self._score(window, given_batch_size, forward_params):
                yield {**self.postprocess(score), "solution_idx": first + score.solution_idx}
            first += len(window)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the model, its code and its processor; `kwargs` are those of `Pipeline.save_pretrained`."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _score(self, items: list[dict[str, Any]], batch_size: int | None, options: dict[str, Any]) -> list[Any]:
        verifier = PRMVerifier(
            self.model, self.processor, options.get("aggregation"), threshold=options.get("threshold", 0.5)
        )
        return verifier.score_solutions(
            [item["problem"] for item in items],
            [item["steps"] for item in items],
            step_style=options.get("step_style", "blank_lines"),
            on_error=options.get("on_error", "raise"),
            batch_size=batch_size,
        )
