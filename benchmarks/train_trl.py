"""The TRL side of `train_vs_trl.py`; runs in an environment with trl 1.13.0 and without this project."""

from __future__ import annotations

import json
import sys
import tempfile

import datasets
import torch
import transformers
import trl
from training_meter import Meter, held_out_loss, read_rows, report, training_options, warm_up
from transformers import AutoModelForTokenClassification, AutoTokenizer
from trl.experimental.prm import PRMConfig, PRMTrainer


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    transformers.set_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["backbone"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForTokenClassification.from_pretrained(job["backbone"], num_labels=2, dtype=torch.float32)
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PRMTrainer(
            model,
            PRMConfig(**training_options(job, folder), max_length=None, step_separator="\n"),
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(read_rows(job["train_data"])),
            callbacks=[meter],
        )
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)]).to(model.device)
        warm_up(model, lambda: model(**batch).loss)
        trainer.train()
    rows = read_rows(job["held_out"])
    probs = [step_probs(trainer, model, row) for row in rows]
    loss = held_out_loss(probs, [row["labels"] for row in rows])
    report(meter, loss=loss, versions={"trl": trl.__version__, "transformers": transformers.__version__})


@torch.inference_mode()
def step_probs(trainer: PRMTrainer, model: torch.nn.Module, row: dict) -> list[float]:
    """The probability that each step is correct, where TRL trains it: at the last token of its separator."""
    model.eval()
    options = {"step_separator": "\n", "max_length": None, "max_completion_length": None}
    item = trainer.tokenize_row(row, trainer.processing_class, train_on_last_step_only=False, is_eval=True, **options)
    logits = model(input_ids=torch.tensor([item["input_ids"]], device=model.device)).logits[0].float()
    is_step = torch.tensor(item["labels"]) != -100
    return logits.softmax(dim=-1)[is_step.to(logits.device), 1].tolist()


if __name__ == "__main__":
    main()
