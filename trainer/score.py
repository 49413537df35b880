"""Score millions of solutions: `accelerate launch -m trainer.score --model M --input solutions.jsonl --output scored/`.

The input is a file or a folder of .jsonl, .json, .csv (each also .gz or .zst) or .parquet, and is read as a stream. A
row has a problem and a solution, as a text, which is cut into steps, or as a list of steps; or in `solutions` several,
as `trainer.best_of_n` reads them, which one process scores together:

    {"id": "a", "problem": "2 + 3?", "steps": ["2 + 3 = 5.", "The answer is 5."]}
    {"id": "b", "problem": "2 + 3?", "solutions": ["2 + 3 = 5.", ["2 + 3 = 6.", "The answer is 6."]]}

In a CSV file lists are JSON text. The output is a folder of Parquet shards, a row a solution, which
`datasets.load_dataset("parquet", data_files="scored/*.parquet")` reads in no certain order, and
`trainer.result_shards.read_rows` in that of the input:

- `row` (int64): the number of the solution, from 0, through all input; `id` (string): that of its input row, as text;
  `solution_idx` (int64): its place among the solutions of its input row, from 0;
- `step_probs` (list of float32): the probability that each step is correct; `overall_score` (float64): their
  aggregation; `first_error` (int64): the 0-based index of the first step below the threshold, -1 where there is none;
  `weakest_step` (int64): that of the lowest probability;
- `error` (string): why the solution could not be read or scored, with file and line; then the scores are null;
- with `--with-problem` `problem`, with `--with-steps` `steps`, as they were scored.

Every solution of the input has its row. `--on-bad-row error` stops at an input row that cannot be read instead; a file
that breaks off (a damaged archive, a quote that is never closed) always stops. Start a run that ended early again with
the same options: what was written stays, and nothing is scored twice. The number of processes may be another.

The code of a checkpoint is never run: whatever it holds, this package's own loads it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from hub_card.errors import one_line_errors
from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.scoring import PRMVerifier

from .command_line import choose_dtype, parse_options, set_up_logging
from .data_files import list_data_files
from .result_shards import ShardWriter
from .scoring_input import Columns, describe_files, find_columns
from .scoring_run import Counts, counting_tokens, score_files

logger = logging.getLogger(__name__)

_WEIGHTS_READ = 1_024


@dataclass
class ScoreArguments:
    """Options of the command line."""

    model: str = field(metadata={"help": "The PRM: a folder or a Hub id."})
    input: str = field(metadata={"help": "A file of solutions, or a folder of such files."})
    output: str = field(metadata={"help": "A folder for the shards: a new one, or that of a run to go on with."})
    revision: str = field(default="main", metadata={"help": "Revision of a PRM on the Hub."})
    problem_column: str | None = field(
        default=None, metadata={"help": "The column of the problem; by default problem, question or prompt."}
    )
    solution_column: str | None = field(
        default=None,
        metadata={"help": "That of one solution; by default steps, solution, completion or response."},
    )
    solutions_column: str | None = field(
        default=None, metadata={"help": "That of a list of solutions to the problem; by default solutions."}
    )
    id_column: str | None = field(default=None, metadata={"help": "That of the id; by default id, where it is."})
    on_bad_row: Literal["record", "error"] = field(
        default="record",
        metadata={"help": "An input row that cannot be read keeps its place with its error, or stops the run."},
    )
    step_style: Literal["blank_lines", "newlines", "step_markers", "thinking"] = field(
        default="blank_lines", metadata={"help": "Where a solution given as a text is cut into steps."}
    )
    aggregation: str | None = field(
        default=None, metadata={"help": "How step probabilities become one score; the config's by default."}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "A step below it is called wrong; the config's by default."}
    )
    with_problem: bool = field(default=False, metadata={"help": "Write the problem too."})
    with_steps: bool = field(default=False, metadata={"help": "Write the steps too."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Dtype of the backbone's weights; auto is bfloat16 where the device computes in it."},
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Most tokens in one forward pass, padding included."}
    )
    window: int = field(
        default=2048,
        metadata={"help": "Solutions that a process reads before it scores them, those of about one length together."},
    )
    rows_per_shard: int = field(default=10_000, metadata={"help": "Most solutions in one shard."})
    seconds_per_shard: float = field(
        default=60.0, metadata={"help": "A shard is written after that time, whatever it has; a kill loses no more."}
    )

    def __post_init__(self) -> None:
        for name in ("window", "rows_per_shard", "max_tokens_per_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.solution_column is not None and self.solutions_column is not None:
            raise ValueError("give --solution-column or --solutions-column, not both")


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Score as the options say; returns counts and throughput of all processes, on the main process."""
    (options,) = parse_options(
        (ScoreArguments,),
        argv,
        prog="trainer.score",
        usage="%(prog)s --model MODEL --input FILE --output FOLDER [options]",
        description="Score solutions in bulk with a process reward model. Start it with `accelerate launch -m "
        "trainer.score` for several processes, and again with the same options to go on after an early end.",
    )
    # Without saying so, processes on CPUs would not find each other, and each would score all. At the end they wait
    # for the slowest.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    set_up_logging(main_process=state.is_main_process)
    with one_line_errors():
        files = list_data_files(Path(options.input))
        columns = find_columns(
            files,
            problem=options.problem_column,
            solution=options.solution_column,
            solutions=options.solutions_column,
            id=options.id_column,
        )
        verifier = load_verifier(options, state.device)
        with ShardWriter(
            options.output,
            settings=job_settings(files, columns, verifier, options),
            features=output_features(options),
            process_index=state.process_index,
            num_processes=state.num_processes,
            rows_per_shard=options.rows_per_shard,
            seconds_per_shard=options.seconds_per_shard,
        ) as writer:
            with counting_tokens(verifier) as count_tokens:
                num_rows, counts = score_files(files, columns, verifier, writer, options, show=state.is_main_process)
                counts.tokens = count_tokens()
            writer.finish(num_rows=num_rows)
        results = summarize(num_rows, gather_object([counts]))
        if not state.is_main_process:
            return None
        report(results, options.output)
    return results


def load_verifier(options: ScoreArguments, device: torch.device) -> PRMVerifier:
    """The PRM that `--model` names, on a device."""
    dtype = choose_dtype(options.dtype, device)
    model = PRMForStepScoring.from_pretrained(options.model, revision=options.revision, dtype=dtype)
    processor = PRMProcessor.from_pretrained(options.model, revision=options.revision)
    return PRMVerifier(model.to(device), processor, options.aggregation, threshold=options.threshold)


def output_features(options: ScoreArguments) -> datasets.Features:
    """The columns of the shards, without `row`."""
    text, index = datasets.Value("string"), datasets.Value("int64")
    columns: dict[str, Any] = {"id": text, "solution_idx": index}
    columns |= {"problem": text} if options.with_problem else {}
    columns |= {"steps": datasets.List(text)} if options.with_steps else {}
    columns |= {"step_probs": datasets.List(datasets.Value("float32")), "overall_score": datasets.Value("float64")}
    return datasets.Features({**columns, "first_error": index, "weakest_step": index, "error": text})


def job_settings(
    files: Sequence[Path], columns: Columns, verifier: PRMVerifier, options: ScoreArguments
) -> dict[str, Any]:
    """What rows depend on; paths are not among it, so that model and input may be moved."""
    # By what comes out of it, since a later version of this package may have more options of the layout.
    probe = verifier.processor.encode(["1 + 1?"], [["1 + 1 = 2.", "So it is 2."]], truncation="drop")[0]
    layout = json.dumps([list(probe.input_ids), list(probe.step_positions), verifier.model.config.class_weights])
    return {
        "input": describe_files(files),
        "dtype": str(verifier.model.backbone.dtype).removeprefix("torch."),
        "model_weights": hash_weights(verifier.model),
        "model_layout": hashlib.sha256(layout.encode()).hexdigest()[:16],
        "max_length": verifier.processor.max_length,
        "aggregation": verifier.aggregation,
        "threshold": verifier.threshold,
        "step_style": options.step_style,
        **{f"{name}_column": value for name, value in vars(columns).items()},
    }


def hash_weights(model: torch.nn.Module) -> str:
    """A hash of the first numbers of each parameter, the same on every device."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().flatten()[:_WEIGHTS_READ].to("cpu", torch.float32)
        digest.update(name.encode() + numbers.numpy().tobytes())
    return digest.hexdigest()[:16]


def summarize(num_rows: int, every: Sequence[Counts]) -> dict[str, Any]:
    """The counts of all processes, and solutions and tokens a second over the time of the slowest."""
    seconds = max(counts.seconds for counts in every)
    scored, failed, tokens = (sum(getattr(one, name) for one in every) for name in ("scored", "failed", "tokens"))
    return {
        "num_solutions": num_rows,
        "num_scored": scored,
        "num_failed": failed,
        "first_error": next((counts.first_error for counts in every if counts.first_error is not None), None),
        "seconds": seconds,
        "solutions_per_second": (scored + failed) / max(seconds, 1e-9),
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "num_processes": len(every),
    }


def report(results: Mapping[str, Any], folder: str) -> None:
    """Print the counts and the throughput.

    Raises:
        ValueError: no solution of the input could be scored.
    """
    scored, failed, total = results["num_scored"], results["num_failed"], results["num_solutions"]
    if failed == total and failed:
        raise ValueError(f"none of {failed:,} solutions could be scored; the first: {results['first_error']}")
    if failed:
        share = f"{failed:,} of {scored + failed:,}"
        logger.warning(
            "%s solutions could not be scored and have their error; the first: %s", share, results["first_error"]
        )
    earlier = total - scored - failed
    print(
        f"{total:,} solutions in {folder}{f', {earlier:,} of them from earlier runs' if earlier else ''}\n"
        f"Scored {scored + failed:,} in {results['seconds']:.1f} s on {results['num_processes']} process(es): "
        f"{results['solutions_per_second']:.1f} solutions/s, {results['tokens_per_second']:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
