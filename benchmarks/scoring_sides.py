"""The sides of the scoring benchmark: each is a function without arguments that scores a whole case once."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from scoring_cases import Case, propose

from modeling_prm.cpu_products import onednn_products
from modeling_prm.processing_prm import EncodedSolution
from modeling_prm.search import beam_search
from modeling_prm.solution_score import SolutionScore

Side = Callable[[], Any]


def scoring_sides(
    model: Any, processor: Any, case: Case, encoded: list[EncodedSolution], distinct: int
) -> dict[str, Side]:
    """The sides of a case of solutions. Ours is given texts, all others ids."""
    verifier = model.verifier(processor)
    device = model.device

    def ours() -> list[SolutionScore]:
        return verifier.score_solutions(case.problems, case.solutions, show_progress=False)

    sides: dict[str, Side] = {
        "bare 4x256": lambda: bare(model, distinct, 4, 256),
        "bare 8x128": lambda: bare(model, distinct, 8, 128),
        "ours": ours,
        "loop": lambda: [one_by_one(model, processor, item) for item in encoded],
        "padded": lambda: padded(model, processor, encoded),
    }
    if device.type == "cpu" and model.backbone.dtype == torch.float32:
        sides["ours, oneDNN"] = lambda: _within_onednn(ours)
        sides["bare 8x128, oneDNN"] = lambda: _within_onednn(sides["bare 8x128"])
    return sides


def beam_sides(model: Any, processor: Any, case: Case) -> dict[str, Side]:
    """The sides of a search: the same search with verifiers that compute more or less of it anew."""
    verifier = model.verifier(processor)

    def search(given: Any) -> Any:
        return beam_search(case.problems[0], propose, given, num_beams=case.beams, expansions=4, max_steps=case.steps)

    sides: dict[str, Side] = {
        "ours": lambda: search(verifier),
        "loop": lambda: search(_Prefixes(verifier, model, processor, one_by_one)),
        "padded": lambda: search(_Prefixes(verifier, model, processor, None)),
    }
    if model.device.type == "cpu" and model.backbone.dtype == torch.float32:
        sides["ours, oneDNN"] = lambda: _within_onednn(sides["ours"])
    return sides


def _within_onednn(side: Side) -> Any:
    with onednn_products():
        return side()


@torch.inference_mode()
def bare(model: Any, tokens: int, rows: int, length: int) -> None:
    """The backbone alone on so many tokens, without padding."""
    full, rest = divmod(tokens, length)
    for start in range(0, full, rows):
        shape = (min(rows, full - start), length)
        model.backbone(input_ids=torch.randint(0, 1000, shape, device=model.device), use_cache=False)
    if rest:
        model.backbone(input_ids=torch.randint(0, 1000, (1, rest), device=model.device), use_cache=False)
    _wait(model.device)


@torch.inference_mode()
def one_by_one(model: Any, processor: Any, item: EncodedSolution) -> list[float]:
    """A textbook PRM: one pass a solution, and a Python loop over its tokens."""
    hidden = model.backbone(input_ids=torch.tensor([item.input_ids], device=model.device)).last_hidden_state[0]
    return [
        torch.sigmoid(model.value_head(hidden[place])).item()
        for place, token in enumerate(item.input_ids)
        if token == processor.separator_token_id
    ]


@torch.inference_mode()
def padded(model: Any, processor: Any, encoded: list[EncodedSolution], batch_size: int = 8) -> list[list[float]]:
    """As token classification does: batches in the order given, padded, with a score for every token."""
    scores = []
    for start in range(0, len(encoded), batch_size):
        batch = processor.pad(encoded[start : start + batch_size], return_tensors="pt").to(model.device)
        states = model.backbone(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        probs = torch.sigmoid(model.value_head(states)).squeeze(-1).cpu()
        scores += [
            row[places[places >= 0]].tolist() for row, places in zip(probs, batch["step_positions"].cpu(), strict=True)
        ]
    return scores


class _Prefixes:
    """A verifier of whole prefixes, each computed anew."""

    def __init__(self, verifier: Any, model: Any, processor: Any, one: Any) -> None:
        self.verifier, self.model, self.processor, self.one = verifier, model, processor, one

    def score_solutions(self, problems: Any, solutions: Any, *, on_error: str) -> list[SolutionScore]:
        steps = [list(solution) for solution in solutions]
        encoded = self.processor.encode(problems, steps)
        if self.one is None:
            probs = padded(self.model, self.processor, encoded)
        else:
            probs = [self.one(self.model, self.processor, item) for item in encoded]
        results = []
        for own, given in zip(probs, steps, strict=True):
            weakest = min(range(len(own)), key=own.__getitem__)
            results.append(
                SolutionScore(
                    steps=tuple(given),
                    step_probs=tuple(own),
                    overall_score=min(own),
                    aggregation="min",
                    weakest_step=weakest,
                    weakest_prob=own[weakest],
                    first_error=-1,
                    threshold=0.5,
                    solution_idx=0,
                )
            )
        return results


class External:
    """A side in a process of its own, as a server that needs another environment.

    The command is started with the PRM's folder as its last argument. It writes a line when it is ready. For each
    line `{"ids": [[...], ...]}` that it reads, it scores these sequences and writes `{"seconds": ...}`. Between lines
    it idles.
    """

    def __init__(self, command: str, folder: str) -> None:
        self._process = subprocess.Popen(
            [*shlex.split(command), folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
        )
        self._read()

    def seconds(self, encoded: list[EncodedSolution]) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": [item.input_ids for item in encoded]}) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._read())["seconds"])

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(timeout=60)

    def _read(self) -> str:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            sys.exit(f"the external side ended with {self._process.wait()}")
        return line


def seconds_of(side: Side, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    side()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
