"""The part of `PRMTrainer` that reads: records to tokens, tokens to batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import torch
from transformers import Trainer

from modeling_prm import PRMProcessor
from modeling_prm.step_loss import IGNORED_LABEL

from .arguments import PRMTrainingArguments
from .labels import LabelRules
from .packing import Packing, problem_sampler
from .preparation import PROBLEM_ID, RECORD_NUMBER, TOKEN_COLUMNS, PreparationReport, tokenize_dataset
from .streaming import StepStream, make_stream, stream_dataloader
from .trl_names import from_trl_columns

logger = logging.getLogger(__name__)


class StepDataTrainer(Trainer):
    """Tokenizes datasets of records, and makes batches of them for training and for evaluation."""

    data_collator: Any
    _signature_columns: Any
    _eval_collator: Any
    _num_labels: int
    packing: Packing | None
    reports: dict[str, PreparationReport]

    def _training_data(
        self, dataset: Any, processor: PRMProcessor, args: PRMTrainingArguments, rules: LabelRules
    ) -> datasets.Dataset | StepStream | None:
        """Tokens to train on; a stream is tokenized as it comes."""
        if isinstance(dataset, datasets.IterableDataset):
            return make_stream(dataset, processor, args, rules, self._num_labels)
        data = self._tokenized(dataset, "train", processor, args)
        if "train" in self.reports and self.reports["train"].soft_labels and args.soft_labels == "harden":
            logger.info(
                "%d labels lie between 0 and 1 and count as correct from %g on; soft_labels='keep' trains on them as "
                "they are",
                self.reports["train"].soft_labels,
                args.label_threshold,
            )
        return data

    def _evaluation_data(self, dataset: Any, processor: PRMProcessor, args: PRMTrainingArguments) -> Any:
        if isinstance(dataset, Mapping):
            return {name: self._tokenized(part, name, processor, args) for name, part in dataset.items()}
        return self._tokenized(dataset, "eval", processor, args)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | int | None]:
        """As in `Trainer`, where records that only fill up an epoch's last batch have no labels."""
        return super().get_batch_samples(map(self._without_fillers, epoch_iterator), num_batches, device)

    def _without_fillers(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # To give every process a whole last batch, accelerate repeats records, which would count twice.
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0 or "labels" not in batch:
            return batch
        labels = batch["labels"].clone()
        labels[max(state.remainder - self.args.process_index * len(labels), 0) :] = IGNORED_LABEL
        return {**batch, "labels": labels}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `Trainer`; takes records too."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._tokenized(eval_dataset, "eval", self.processing_class, self.args)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in `Trainer`; takes records too."""
        return super().get_test_dataloader(self._tokenized(test_dataset, "test", self.processing_class, self.args))

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        if is_training and isinstance(self.train_dataset, StepStream):
            return stream_dataloader(
                self.train_dataset, self.data_collator, self.accelerator, self.args, self._train_batch_size
            )
        # What training leaves out of the labels is measured all the same.
        training_collator = self.data_collator
        self._set_signature_columns_if_needed()
        columns = self._signature_columns
        try:
            self.data_collator = training_collator if is_training else self._eval_collator
            if is_training:
                self._signature_columns = [*columns, RECORD_NUMBER, *([PROBLEM_ID] if self.packing else [])]
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = training_collator
            self._signature_columns = columns

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in `Trainer`; where solutions share their problem's tokens, those of a problem come together."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.packing is not None and self.packing.shares and self.args.train_sampling_strategy == "random":
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = problem_sampler(dataset, seed=seed, epoch=lambda: int(self.state.epoch or 0))
            if sampler is not None:
                return sampler
        return super()._get_train_sampler(train_dataset)

    def _tokenized(
        self, dataset: Any, name: str, processor: PRMProcessor, args: PRMTrainingArguments
    ) -> datasets.Dataset | None:
        if dataset is None:
            return None
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(
                f"the dataset {name!r} must be a datasets.Dataset, got {type(dataset).__name__}; choose one split of a "
                "DatasetDict, or make one with datasets.Dataset.from_list(rows)"
            )
        if all(column in dataset.column_names for column in TOKEN_COLUMNS):
            return dataset
        # One process of a machine writes the tokens, and the others read what it wrote.
        with args.main_process_first(local=True, desc=f"tokenizing {name}"):
            dataset, self.reports[name] = tokenize_dataset(
                from_trl_columns(dataset),
                processor,
                truncation=args.truncation,
                overlong_problems=args.overlong_problems,
                num_labels=self._num_labels,
                num_proc=args.dataset_num_proc,
            )
        return dataset
