"""Guards against trainings that go wrong without a word: losses that are not finite, a best model never chosen."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import last_checkpoint

logger = logging.getLogger(__name__)

NON_FINITE_FILE = "non_finite_loss.json"
_MOST_SHOWN = 10
_MOST_CHARACTERS = 500


class NonFiniteLossError(ValueError):
    """Training stopped before a step whose loss or gradient is not finite; `records` are the numbers of its records."""

    def __init__(self, message: str, records: list[int]) -> None:
        super().__init__(message)
        self.records = records


class FiniteLossGuard(TrainerCallback):
    """Stops training, in every process, before an optimizer step whose loss or gradient is NaN or infinite.

    The weights stay as they were. A gradient whose norm overflows counts as infinite, since clipping by it leaves
    nothing of the step. The numbers of the records are in the error and, with the loss of each batch and the beginnings
    of their texts, in `non_finite_loss.json` in the output folder. An optimizer step costs one exchange of a number
    between the processes, and one wait for the device.

    With float16 a gradient may overflow: its scaler leaves such steps out, so that the loss alone is looked at.

    Args:
        accelerator: the trainer's.
        describe: from numbers of records to the beginnings of their texts.
    """

    def __init__(self, accelerator: Accelerator, describe: Callable[[list[int]], dict[int, str]]) -> None:
        self._accelerator = accelerator
        self._describe = describe
        self._batches: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._gradient_norm: torch.Tensor | float | None = None

    def observe(self, loss: torch.Tensor, records: torch.Tensor | None) -> None:
        """Take note of the loss (a scalar) of a micro-batch and the numbers of its records (B,), if known."""
        self._batches.append((loss, records))

    def observe_gradient_norm(self, norm: torch.Tensor | float | None) -> None:
        """Take note of the norm of all gradients (a scalar), which then need not be read a second time."""
        self._gradient_norm = norm

    def on_train_begin(self, *args: Any, **rest: Any) -> None:
        """Forget what an earlier training left behind."""
        self._batches, self._gradient_norm = [], None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **rest: Any
    ) -> None:
        """Check the optimizer step that is about to be taken.

        Raises:
            NonFiniteLossError: its loss or gradient is not finite.
        """
        batches, self._batches = self._batches, []
        norm, self._gradient_norm = self._gradient_norm, None
        if not batches:
            return
        numbers = [torch.stack([loss.detach().float().abs() for loss, _ in batches]).max()]
        if self._accelerator.scaler is None:
            numbers.append(_largest(p.grad for p in model.parameters()) if norm is None else _whole(norm))
        # NaN is the maximum of whatever it is among.
        largest = torch.stack([number.to(numbers[0].device) for number in numbers]).max()
        finite = self._accelerator.gather(largest.isfinite().float().reshape(1))
        if bool(finite.min() == 0):
            raise self._error(args, state, batches)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Say so where no model was chosen as the best."""
        if args.load_best_model_at_end and state.best_model_checkpoint is None and state.is_world_process_zero:
            logger.warning(
                "no checkpoint was chosen by metric_for_best_model=%r, so the model is that of the last step, %d",
                args.metric_for_best_model,
                state.global_step,
            )

    def _error(
        self,
        args: TrainingArguments,
        state: TrainerState,
        batches: list[tuple[torch.Tensor, torch.Tensor | None]],
    ) -> NonFiniteLossError:
        mine = [
            {
                "process": self._accelerator.process_index,
                "loss": float(loss),
                "records": None if records is None else records.tolist(),
            }
            for loss, records in batches
        ]
        everything: list[dict[str, Any]] = gather_object(mine)
        bad = [batch for batch in everything if not math.isfinite(batch["loss"])]
        what = "loss" if bad else "gradient"
        # Where each loss is finite, the sum of all gradients is not, whichever batch it comes from.
        bad = bad or everything
        records = sorted({number for batch in bad for number in batch["records"] or ()})
        step = state.global_step + 1
        saved = Path(args.output_dir, NON_FINITE_FILE)
        checkpoint = last_checkpoint(args.output_dir)
        if args.should_save:
            for batch in bad:
                batch["loss"] = str(batch["loss"])  # JSON has no NaN
            found = {
                "optimizer_step": step,
                "not_finite": what,
                "records": records,
                "batches": bad,
                "texts": {str(number): text for number, text in self._describe(records).items()},
                "last_checkpoint": checkpoint,
            }
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return NonFiniteLossError(_message(what, step, records, bad, saved, checkpoint), records)


def check_finite_weights(model: torch.nn.Module, step: int) -> None:
    """Check that the weights are finite, so that no checkpoint of others takes the place of a good one.

    Raises:
        NonFiniteLossError: they are not.
    """
    if not bool(_largest(model.parameters()).isfinite()):
        raise NonFiniteLossError(
            f"the weights are not finite after optimizer step {step}, so that no checkpoint was saved and the last one "
            "stays; go on from it with a lower learning rate",
            [],
        )


def warn_if_undefined(metrics: Mapping[str, float], args: TrainingArguments, step: int) -> None:
    """Warn where the metric that chooses the best model is NaN, since it then chooses none."""
    name = args.metric_for_best_model
    if name is None:
        return
    name = name if name.startswith("eval_") else f"eval_{name}"
    value = metrics.get(name)
    if value is not None and math.isnan(value):
        logger.warning(
            "%s is NaN at optimizer step %d, so this model cannot be chosen as the best; a metric is undefined where "
            "an evaluation set has only correct or only wrong steps: choose another metric_for_best_model or set",
            name,
            step,
        )


def describe_records(dataset: Any, processor: Any) -> Callable[[list[int]], dict[int, str]]:
    """A function from numbers of records to the beginnings of their texts, as tokenized in `dataset`."""

    def describe(numbers: list[int]) -> dict[int, str]:
        if "record" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "select"):
            return {}
        wanted = set(numbers)
        rows = [index for index, number in enumerate(dataset["record"]) if number in wanted]
        return {
            row["record"]: processor.tokenizer.decode(row["input_ids"])[:_MOST_CHARACTERS]
            for row in dataset.select(rows)
        }

    return describe


def _largest(tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """The largest magnitude in floating-point tensors, not finite if one is not; without waiting for the device."""
    given = [tensor.detach() for tensor in tensors if tensor is not None and tensor.is_floating_point()]
    sharded = any(hasattr(tensor, "to_local") for tensor in given)
    # The shard of a small tensor, such as the head's bias, is empty in most processes.
    given = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in given]
    largest = torch.nn.utils.get_total_norm([tensor for tensor in given if tensor.numel()], norm_type=math.inf)
    if sharded:
        # Not every backend keeps NaN in a maximum.
        largest = largest.nan_to_num(nan=math.inf, posinf=math.inf)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest


def _whole(norm: torch.Tensor | float) -> torch.Tensor:
    """A norm, perhaps one that is spread over processes, as a scalar."""
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return torch.as_tensor(whole, dtype=torch.float32).detach().reshape(())


def _message(
    what: str, step: int, records: list[int], bad: list[dict[str, Any]], saved: Path, checkpoint: str | None
) -> str:
    numbers = ", ".join(map(str, records[:_MOST_SHOWN])) + (", ..." if len(records) > _MOST_SHOWN else "")
    if not records:
        numbers = "not known (the training data have no column 'record')"
    losses = ", ".join(sorted({str(batch["loss"]) for batch in bad})) if what == "loss" else "not finite"
    kept = f"{checkpoint} is the last checkpoint" if checkpoint else "there is no checkpoint yet"
    return (
        f"the {what} of optimizer step {step} is {losses}, so training stopped before it. Numbers of the batch's "
        f"records in the training data (from 0): {numbers}; more in {saved}. {kept}. Look at these records; where they "
        "are in order, lower the learning rate, or use bf16 instead of fp16"
    )
