"""A PRM that scores the turns of an agent, trained in minutes on a CPU: `python -m trainer.demo_agent`.

Trains a small PRM from scratch on trajectories of `trainer.demo_agent_data`, and beside it the same model on outcomes
alone; measures on tasks not seen how well turns are told apart, and the accuracy of the best of 8 trajectories as each
chooses it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import set_seed

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.conversations import check_conversation

from .arguments import PRMTrainingArguments
from .command_line import set_up_logging
from .conversation_data import CONVERSATION, dump_conversation
from .demo_agent_data import price_table, rollout, rollouts, tasks
from .demo_backbone import build_demo_backbone
from .prm_trainer import PRMTrainer

TRAIN, EVAL, TASKS, OF = 24_000, 1_000, 250, 8


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the demo; returns what it measured."""
    parser = argparse.ArgumentParser(prog="python -m trainer.demo_agent", description="Train a PRM of agents' turns.")
    parser.add_argument("--output-dir", default="outputs/demo-agent", help="where the model goes (%(default)s)")
    parser.add_argument("--train-trajectories", type=int, default=TRAIN, help="default: %(default)s")
    parser.add_argument("--eval-trajectories", type=int, default=EVAL, help="default: %(default)s")
    parser.add_argument("--tasks", type=int, default=TASKS, help="tasks with 8 trajectories each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    set_up_logging(main_process=True)
    start = time.monotonic()
    turns = train(options, outcomes=False)
    metrics = turns.evaluate()
    outcomes = train(options, outcomes=True)
    folder = Path(options.output_dir)
    turns.save_model(str(folder / "model"))
    outcomes.save_model(str(folder / "outcome_model"))
    results = {
        "turn_auc": metrics["eval_roc_auc"],
        "turn_error_f1": metrics["eval_error_f1"],
        "turn_accuracy": metrics["eval_step_accuracy"],
        "majority_accuracy": metrics["eval_majority_accuracy"],
        **best_of(folder, options.tasks, options.seed),
        "minutes": (time.monotonic() - start) / 60,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("\n".join(f"{name:>20}  {value:.3f}" for name, value in results.items()), flush=True)
    return results


def train(options: argparse.Namespace, *, outcomes: bool) -> PRMTrainer:
    """A trainer that has trained a small PRM, on the labels of turns or on those of outcomes alone."""
    with tempfile.TemporaryDirectory() as folder:
        set_seed(options.seed)
        backbone = build_demo_backbone(folder, seed=options.seed, look_back=look_back(options.seed))
        model, processor = PRMForStepScoring.from_backbone(backbone, conversations="plain")
    args = PRMTrainingArguments(
        output_dir=options.output_dir,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        num_train_epochs=1,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=50,
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
    )
    sets = {
        split: dataset(rollouts(count, seed=options.seed, split=split), outcomes)
        for split, count in (("train", options.train_trajectories), ("eval", options.eval_trajectories))
    }
    trainer = PRMTrainer(
        model, args, processing_class=processor, train_dataset=sets["train"], eval_dataset=sets["eval"]
    )
    trainer.train()
    return trainer


def dataset(trajectories: list[dict[str, Any]], outcomes: bool) -> datasets.Dataset:
    """Records of trajectories; with `outcomes` only the last turn has a label, whether the answer is right."""
    rows = []
    for one in trajectories:
        conversation = check_conversation(one["messages"])
        labels = [-100.0, -100.0, float(one["outcome"])] if outcomes else [float(label > 0) for label in one["labels"]]
        rows.append(
            {
                "problem": conversation.task,
                "steps": conversation.steps,
                "labels": labels,
                CONVERSATION: dump_conversation(one["messages"]),
            }
        )
    return datasets.Dataset.from_list(rows)


def best_of(folder: Path, count: int, seed: int) -> dict[str, float]:
    """The share of tasks whose chosen trajectory of 8 is right: by chance, by either model, and by an oracle."""
    prices, rng = price_table(seed), random.Random(f"best of {seed}")
    every = [[rollout(task, prices, rng) for _ in range(OF)] for task in tasks(count, seed=seed + 1, split="eval")]
    talks = [one["messages"] for group in every for one in group]
    right = torch.tensor([[one["outcome"] for one in group] for group in every], dtype=torch.float64)
    results = {"random_of_8": right.mean().item(), "oracle_of_8": right.amax(dim=1).mean().item()}
    for name, aggregation in (("outcome_model", "last"), ("model", "min")):
        source = folder / name
        verifier = PRMForStepScoring.from_pretrained(source).verifier(PRMProcessor.from_pretrained(source), aggregation)
        scores = torch.tensor([score.overall_score for score in verifier.score_conversations(talks)]).view(count, OF)
        chosen = right.gather(1, scores.argmax(dim=1, keepdim=True))
        results["prm_best_of_8" if name == "model" else "outcome_best_of_8"] = chosen.mean().item()
    return results


def look_back(seed: int) -> tuple[tuple[int | None, ...], ...]:
    """For each layer and head the distance from a turn's end to a number that decides whether it is right.

    Taken from a trajectory's own ids, since all have the same layout.
    """
    with tempfile.TemporaryDirectory() as folder:
        _, processor = PRMForStepScoring.from_backbone(build_demo_backbone(folder, seed=seed), conversations="plain")
    item, pieces, price, product = 11, 3, 7, 21
    messages = rollout((item, pieces), [price] * 20, _NoSlips())["messages"]
    ((encoded, _),) = processor.encode_conversations([check_conversation(messages)])
    ids, ends = encoded.input_ids, encoded.step_positions
    places: dict[int, list[int]] = {}
    for number in (item, pieces, price, product):
        token = processor.tokenizer.convert_tokens_to_ids(str(number))
        places[number] = [place for place, own in enumerate(ids) if own == token]
    turns = (
        (ends[0], (places[item][0], places[item][1])),
        (ends[1], (places[pieces][0], places[pieces][1], places[price][0], places[price][1])),
        (ends[2], (places[product][0], places[product][1])),
    )
    distances = [end - place for end, found in turns for place in found]
    return (tuple(distances[:4]), tuple(distances[4:]), (None,) * 4)


class _NoSlips(random.Random):
    """Chance that never makes a turn slip."""

    def random(self) -> float:
        return 1.0


if __name__ == "__main__":
    main()
