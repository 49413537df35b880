"""This project's side of `train_vs_trl.py`."""

from __future__ import annotations

import json
import sys
import tempfile

import torch
import transformers
from training_meter import Meter, held_out_loss, read_rows, report, training_options, warm_up

import modeling_prm
from modeling_prm import PRMForStepScoring
from trainer.arguments import PRMTrainingArguments
from trainer.prm_trainer import PRMTrainer
from trainer.readers import load_step_dataset


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    transformers.set_seed(job["seed"])
    # TRL writes neither "Problem:" nor the numbers of steps: with the same layout both read as many tokens.
    same = {"problem_template": "{problem}", "step_template": "{step}", "step_joiner": ""}
    layout = same if job["layout"] == "trl" else {}
    model, processor = PRMForStepScoring.from_backbone(job["backbone"], head_dropout=0.0, **layout)
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PRMTrainer(
            model,
            PRMTrainingArguments(**training_options(job, folder), **job["options"]),
            processing_class=processor,
            train_dataset=load_step_dataset(job["train_data"]),
            callbacks=[meter],
        )
        rows = read_rows(job["held_out"])
        problems, solutions = [row["prompt"] for row in rows], [row["completions"] for row in rows]
        batch = processor(problems[:2], solutions[:2], return_tensors="pt")
        labels = torch.zeros(batch["step_positions"].shape)
        warm_up(model, lambda: model(**batch.to(model.device), labels=labels).loss)
        trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    verifier = model.verifier(processor)
    scores = verifier.score_solutions(problems, solutions)
    loss = held_out_loss([score.step_probs for score in scores], [row["labels"] for row in rows])
    report(meter, loss=loss, versions={"modeling_prm": _version(), "transformers": transformers.__version__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("modeling-prm")
    except PackageNotFoundError:
        return modeling_prm.__name__


if __name__ == "__main__":
    main()
