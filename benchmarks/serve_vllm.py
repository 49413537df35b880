"""Serve PRMs with a real vLLM, compare its step scores with ours, and measure throughput against concurrency.

    python benchmarks/serve_vllm.py --prm outputs/demo/model

Makes an environment with vLLM in `.venv-vllm` if there is none, exports each PRM (`hub_card.convert.export_prm`),
starts a server on it, scores the same solutions with `PRMVerifier` here and with `RemoteVerifier` there, at each number
of concurrent requests, and ends the server. Prints a line of JSON a measurement and then a table; exits with status 1
where a step's probability differs by more than `--tolerance`.

Both use all cores, in turn. A solution's tokens are the problem's and its steps'; solutions have different problems, so
that neither side gains from a shared one.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm_server import VllmServer, installed_versions, make_environment

from hub_card.convert import export_prm
from modeling_prm import PRMForStepScoring, PRMProcessor, PRMVerifier, SolutionScore
from modeling_prm.remote_verifier import RemoteVerifier, fingerprint
from trainer.demo_data import generate_arithmetic


def main() -> int:
    options = parse()
    # So that an end from outside ends the server too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    python = make_environment(Path(options.environment))
    say(options, {"event": "environment", **installed_versions(python)})
    problems, solutions = read_solutions(options.solutions, options.num_solutions)
    lines = []
    for prm in options.prm:
        with tempfile.TemporaryDirectory() as folder:
            lines += measure(prm, python, Path(folder), problems, solutions, options)
    print(table(lines))
    worst = max(line["largest_difference"] for line in lines if "largest_difference" in line)
    if worst > options.tolerance:
        print(f"step scores differ by {worst:.2g}, more than {options.tolerance:g}", file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prm", nargs="+", required=True, help="folders of PRMs")
    parser.add_argument("--layout", choices=("auto", "qwen2_prm", "token_classification"), default="auto")
    parser.add_argument(
        "--rows", choices=("step", "token"), default="step", help="what the server returns a row for (default: step)"
    )
    parser.add_argument("--environment", default=".venv-vllm", help="a folder, made if it is not there")
    parser.add_argument("--solutions", help='a file with a line {"problem": ..., "steps": [...]} each; else arithmetic')
    parser.add_argument("--num-solutions", type=int, default=50)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32], help="numbers of requests at a time")
    parser.add_argument("--repetitions", type=int, default=1, help="of each measurement; medians are shown")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides' backbone")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--output", help="a file that the lines of JSON are added to")
    return parser.parse_args()


def read_solutions(file: str | None, number: int) -> tuple[list[str], list[list[str]]]:
    """The problems and the steps of their solutions."""
    if file is None:
        rows = generate_arithmetic(number, seed=17)
    else:
        with Path(file).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines][:number]
    if len(rows) < number:
        raise SystemExit(f"{file} has {len(rows)} solutions, --num-solutions asks for {number}")
    return [row["problem"] for row in rows], [list(row["steps"]) for row in rows]


def measure(
    prm: str, python: Path, folder: Path, problems: list[str], solutions: list[list[str]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Score with one PRM here and there; a line a measurement."""
    model = PRMForStepScoring.from_pretrained(prm, dtype=getattr(torch, options.dtype))
    processor = PRMProcessor.from_pretrained(prm)
    family = model.config.text_config.model_type
    layout = options.layout
    if layout == "auto":
        layout = "qwen2_prm" if family == "qwen2" else "token_classification"
    # Without the tokenizer, which beside some configs loads with other ids: the server is sent ids.
    export_prm(prm, folder / "served", layout=layout, tokenizer=False)
    items = processor.encode(problems, solutions)
    common = {"prm": Path(prm).name, "family": family, "layout": layout, "rows": options.rows, "dtype": options.dtype}
    common |= {"solutions": len(solutions), "tokens": sum(len(item.input_ids) for item in items)}
    verifier = PRMVerifier(model, processor)
    seconds, expected = timed(verifier, problems, solutions, options.repetitions)
    lines = [{**common, "event": "here", **throughput(common, seconds)}]
    say(options, lines[-1])
    mark = fingerprint(verifier)
    with VllmServer(
        python,
        folder / "served",
        folder / "vllm.log",
        step_tag_id=processor.separator_token_id if options.rows == "step" else None,
        max_model_len=processor.max_length or model.config.max_positions or 4_096,
        dtype=options.dtype,
    ) as server:
        say(options, {**common, "event": "started", "seconds": round(server.start_seconds, 1)})
        for concurrency in options.concurrency:
            with RemoteVerifier(server.url, processor, concurrency=concurrency, fingerprint=mark) as remote:
                seconds, scores = timed(remote, problems, solutions, options.repetitions)
            line = {**common, "event": "served", "concurrency": concurrency, **throughput(common, seconds)}
            lines.append({**line, "largest_difference": largest_difference(expected, scores)})
            say(options, lines[-1])
    return lines


def timed(
    verifier: Any, problems: list[str], solutions: list[list[str]], repetitions: int
) -> tuple[list[float], list[SolutionScore]]:
    """Seconds of each repetition, after some solutions that do not count, and the scores."""
    verifier.score_solutions(problems[:2], solutions[:2], show_progress=False)
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        scores = verifier.score_solutions(problems, solutions, show_progress=False)
        seconds.append(time.perf_counter() - start)
    return seconds, scores


def throughput(common: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "seconds": [round(value, 3) for value in seconds],
        "solutions_per_second": round(common["solutions"] / median, 2),
        "tokens_per_second": round(common["tokens"] / median, 1),
    }


def largest_difference(expected: Sequence[SolutionScore], scores: Sequence[SolutionScore]) -> float:
    """Of any step's probability; as many steps and solutions are a matter of course."""
    return max(
        abs(ours - theirs)
        for here, there in zip(expected, scores, strict=True)
        for ours, theirs in zip(here.step_probs or (), there.step_probs or (), strict=True)
    )


def say(options: argparse.Namespace, line: dict[str, Any]) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if options.output:
        with Path(options.output).open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A row a measurement, as Markdown."""
    rows = [
        "",
        "| PRM | backbone | rows | scored by | requests at a time | solutions/s | tokens/s | largest difference |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for line in lines:
        there = line["event"] == "served"
        rows.append(
            f"| {line['prm']} | {line['family']} | {line['rows']} | {'vLLM' if there else 'PRMVerifier'} "
            f"| {line['concurrency'] if there else ''} | {line['solutions_per_second']:.1f} "
            f"| {line['tokens_per_second']:,.0f} | {format(line['largest_difference'], '.1e') if there else ''} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
