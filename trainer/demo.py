"""The whole path in a few minutes on a CPU: `python -m trainer.demo`.

Trains a small PRM from scratch on generated arithmetic, evaluates it on problems it has not seen, saves
it, loads it back as a remote-code checkpoint in a clean process, and scores three solutions of one
problem.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from transformers import set_seed

from hub_card.card import CARD_DATA_FILE
from hub_card.clean_process import score_in_clean_process
from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.pictures import plot_ranked_solutions
from modeling_prm.reports import write_html_report

from .arguments import PRMTrainingArguments
from .command_line import set_up_logging
from .demo_backbone import build_demo_backbone
from .demo_data import example_solutions, generate_arithmetic
from .prm_trainer import PRMTrainer
from .publishing import describe_training

TRAIN_PROBLEMS = 57_600
EVAL_PROBLEMS = 1_000
BAR_WIDTH = 20


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the demo; returns the metrics on held-out problems."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.demo", description="Train, evaluate, save, reload and use a small PRM."
    )
    parser.add_argument("--output-dir", default="outputs/demo", help="where the model goes (default: %(default)s)")
    parser.add_argument("--train-problems", type=int, default=TRAIN_PROBLEMS, help="default: %(default)s")
    parser.add_argument("--eval-problems", type=int, default=EVAL_PROBLEMS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    set_up_logging(main_process=True)

    trainer = make_trainer(options.output_dir, options.train_problems, options.eval_problems, options.seed)
    show(f"Training on {options.train_problems:,} generated problems")
    trainer.train()
    metrics = trainer.evaluate()
    show(f"{options.eval_problems:,} held-out problems\n{format_metrics(metrics)}")

    folder = Path(options.output_dir) / "model"
    trainer.save_model(str(folder))
    # What `python -m hub_card --model ...` puts into the model card.
    (folder / CARD_DATA_FILE).write_text(describe_training(trainer).to_json(), encoding="utf-8")
    problem, solutions = example_solutions()
    steps = [solution["steps"] for solution in solutions.values()]
    step_probs = score_reloaded(trainer, folder, problem, steps)
    show(f"Problem: {problem}")
    for name, solution, probs in zip(solutions, solutions.values(), step_probs, strict=True):
        show(format_solution(name, solution["steps"], solution["labels"], probs.tolist()))
    draw(folder, problem, steps)
    return metrics


def make_trainer(output_dir: str, train_problems: int, eval_problems: int, seed: int) -> PRMTrainer:
    """A trainer for a new small PRM, on problems told apart from those of its evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        set_seed(seed)
        model, processor = PRMForStepScoring.from_backbone(build_demo_backbone(folder, seed=seed))
    train_set = datasets.Dataset.from_list(generate_arithmetic(train_problems, seed=seed, split="train"))
    eval_set = datasets.Dataset.from_list(generate_arithmetic(eval_problems, seed=seed, split="eval"))
    args = PRMTrainingArguments(
        output_dir=output_dir,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        num_train_epochs=1,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
    )
    return PRMTrainer(model, args, processing_class=processor, train_dataset=train_set, eval_dataset=eval_set)


def score_reloaded(
    trainer: PRMTrainer, folder: Path, problem: str, solutions: Sequence[Sequence[str]]
) -> list[torch.Tensor]:
    """Step probabilities of the saved model in a clean process, one tensor (S,) a solution.

    Raises:
        RuntimeError: its logits differ from those of the model in memory by more than 1e-4.
    """
    problems = [problem] * len(solutions)
    reloaded = score_in_clean_process(folder, problems, solutions)
    # Training under autocast leaves the model's forward wrapped in it.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    batch = trainer.processing_class(problems, solutions, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        logits = model(**batch).logits.cpu()
    difference = (logits - reloaded.logits).abs().max().item()
    # Weights mapped from a file lie elsewhere in memory than trained ones, which can change the last bit.
    if difference > 1e-4:
        raise RuntimeError(f"the reloaded model's logits differ from those in memory by up to {difference:g}")
    show(f"{folder}: loads in a clean process by its own code; its logits differ from memory by {difference:.1g}")
    return [probs[: len(steps)] for probs, steps in zip(reloaded.step_probs, solutions, strict=True)]


def draw(folder: Path, problem: str, solutions: Sequence[Sequence[str]]) -> None:
    """Rank the solutions with the saved model, and show them as a picture and as a web page beside it."""
    # A wrong step that a later one puts right is no fault of the whole, so the last step decides.
    verifier = PRMForStepScoring.from_pretrained(folder).verifier(PRMProcessor.from_pretrained(folder), "last")
    ranked = verifier.rank_solutions(problem, solutions)
    picture, page = folder.parent / "ranked.png", folder.parent / "report.html"
    plot_ranked_solutions(ranked).savefig(picture)
    write_html_report(page, ranked)
    show(f"The three solutions ranked by their last step: {picture} and {page}")


def format_metrics(metrics: dict[str, float]) -> str:
    """The metrics that matter here, beside what costs nothing."""
    wrong = metrics["eval_error_share"]
    rows = (
        ("step accuracy", metrics["eval_step_accuracy"], "calling every step right", metrics["eval_majority_accuracy"]),
        ("error F1", metrics["eval_error_f1"], "calling every step wrong", 2 * wrong / (1 + wrong)),
        ("ROC AUC", metrics["eval_roc_auc"], "chance", 0.5),
        ("first error F1", metrics["eval_processbench_f1"], "calling every step right", 0.0),
    )
    return "\n".join(f"  {name:<15} {value:.3f}   ({beside}: {base:.3f})" for name, value, beside, base in rows)


def format_solution(name: str, steps: Sequence[str], labels: Sequence[float], step_probs: Sequence[float]) -> str:
    """A table of a solution's steps: probability of being correct, as a number and a bar, truth and text."""
    lines = [f"The {name} solution", f"  step  P(correct) {'':<{BAR_WIDTH}}  truth  text"]
    for number, (step, label, prob) in enumerate(zip(steps, labels, step_probs, strict=True), start=1):
        bar = "#" * round(prob * BAR_WIDTH)
        truth = "right" if label == 1 else "wrong"
        lines.append(f"  {number:>4}  {prob:>10.3f} {bar:<{BAR_WIDTH}}  {truth}  {step}")
    return "\n".join(lines)


def show(text: str) -> None:
    """Write a paragraph to standard output, after what the progress bars left."""
    sys.stderr.flush()
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
