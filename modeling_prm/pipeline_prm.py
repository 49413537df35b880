"""The pipeline of a checkpoint: `pipeline("step-scoring", model="user/name", trust_remote_code=True)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import Any

from transformers import Pipeline

from .scoring import PRMVerifier

# So many inputs are sorted by length together.
_WINDOW = 256
# The base class takes no batch size for 1, which is a limit here.
_NO_LIMIT = 1 << 30


class StepScoringPipeline(Pipeline):
    """Scores the steps of solutions.

    `pipe({"problem": "1 + 1?", "steps": ["1 + 1 = 2.", "The answer is 2."]})` gives a dictionary with
    `step_probs`, `overall_score`, `weakest_step`, `first_error` and the other fields of `SolutionScore`. A list of
    such inputs gives a list, in the same order; a dataset or a generator gives an iterator, which reads 256 inputs
    ahead. `steps` may be the solution's whole text. A conversation is `{"messages": [...]}`, with `tools` if any, and
    gives the fields of `ConversationScore`. Of a model in memory, make one with
    `StepScoringPipeline(model=model, processor=processor)`.

    Options, when the pipeline is made or at a call: `aggregation` and `threshold` as in `PRMVerifier`,
    `step_style` as in `split_steps`, `step_unit` and `truncation` as in `PRMVerifier.score_messages`, `on_error` as in
    `PRMVerifier.score_solutions`, and `batch_size`, the most solutions in one forward pass (by default only their
    tokens are limited).

    Raises:
        TypeError: an input is not a dictionary of `problem` and `steps`, or of `messages`, or they are no texts.
        ValueError: an input lacks one of them or has another key, or cannot be scored.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __call__(self, inputs: Any, *args: Any, batch_size: int | None = None, **options: Any) -> Any:
        if isinstance(inputs, (list, tuple)):
            inputs = list(inputs)
            if not inputs:
                return []
        elif isinstance(inputs, Iterable) and not isinstance(inputs, (Mapping, str)):
            # The base class knows generators and datasets of torch; this makes one of those of `datasets` too.
            inputs = (item for item in inputs)
        if batch_size is None:
            batch_size = _NO_LIMIT if self._batch_size is None else self._batch_size
        return super().__call__(inputs, *args, batch_size=batch_size, **options)

    def _sanitize_parameters(
        self,
        aggregation: str | None = None,
        threshold: float | None = None,
        step_style: Any = None,
        on_error: str | None = None,
        step_unit: str | None = None,
        truncation: str | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        options = {"aggregation": aggregation, "threshold": threshold, "step_style": step_style, "on_error": on_error}
        options |= {"step_unit": step_unit, "truncation": truncation}
        return {}, {name: value for name, value in options.items() if value is not None}, {}

    def preprocess(self, inputs: Any) -> dict[str, Any]:
        if not isinstance(inputs, dict):
            raise TypeError(
                "an input of this pipeline is a dictionary such as {'problem': '1 + 1?', 'steps': ['1 + 1 = 2.']}, "
                f"got {type(inputs).__name__}"
            )
        if inputs.keys() != {"problem", "steps"} and not {"messages"} <= inputs.keys() <= {"messages", "tools"}:
            raise ValueError(
                "an input has the keys 'problem' and 'steps', or 'messages' and, if any, 'tools', got "
                f"{sorted(map(str, inputs))}"
            )
        return dict(inputs)

    def _forward(self, model_inputs: Any, **options: Any) -> Any:
        return self._score([model_inputs], 1, options)[0]

    def postprocess(self, model_outputs: Any) -> dict[str, Any]:
        return model_outputs.to_dict()

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        # The base class pads with a data loader, which knows nothing of step positions or lengths.
        items = iter(inputs) if isinstance(inputs, Iterable) else (inputs[i] for i in range(len(inputs)))
        first_idx = 0
        while window := [self.preprocess(item) for item in islice(items, _WINDOW)]:
            yield from map(self.postprocess, self._score(window, batch_size, forward_params, first_idx))
            first_idx += len(window)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the model, its code and its processor; `kwargs` are those of `Pipeline.save_pretrained`."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _score(
        self, items: list[dict[str, Any]], batch_size: int, options: dict[str, Any], first_idx: int = 0
    ) -> list[Any]:
        verifier = PRMVerifier(
            self.model, self.processor, options.get("aggregation"), threshold=options.get("threshold")
        )
        common = {"on_error": options.get("on_error", "raise"), "batch_size": batch_size}
        results: list[Any] = []
        # Inputs of one kind in a row are scored together.
        for is_conversation, group in groupby(items, key=lambda item: "messages" in item):
            some, start = list(group), first_idx + len(results)
            if is_conversation:
                results += verifier.score_conversations(
                    some,
                    step_unit=options.get("step_unit", "turn"),
                    truncation=options.get("truncation", "error"),
                    first_idx=start,
                    **common,
                )
            else:
                results += verifier.score_solutions(
                    [item["problem"] for item in some],
                    [item["steps"] for item in some],
                    step_style=options.get("step_style", "blank_lines"),
                    first_idx=start,
                    **common,
                )
        return results
