"""Labels for the steps of solutions that have none: `accelerate launch -m trainer.label --method monte_carlo
--input solutions.jsonl --output labels --model Qwen/Qwen2.5-0.5B-Instruct`.

Methods, of which all but the last two need reference answers:

- `outcome`: every step takes the correctness of the final answer;
- `monte_carlo`: completions from after each step; a step is wrong where all fail (`--labels hard`), or its label is the
  share that succeeds (`soft`); both counts are kept;
- `first_error`: a binary search for the first error with such completions;
- `arithmetic`: a step is wrong where an equation in it is false;
- `consensus`: the solutions of `--input` on whose first error `--agree-with` agrees.

The input is described in `trainer.labelling_items`. The output is a folder of Parquet shards that `load_step_dataset`
and `--train-data` read, and `report.md`. A run that was killed goes on where it was with the same options; several
processes share the work; the same seed gives the same labels either way. `python -m trainer.label --help` lists the
options.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hub_card.errors import one_line_errors
from modeling_prm.http_client import JsonClient, key_from_environment
from modeling_prm.step_loss import IGNORED_LABEL

from .answers import describe_comparison
from .command_line import parse_options, set_up_logging
from .data_files import list_data_files
from .labelling_arithmetic import arithmetic_labels
from .labelling_consensus import agree
from .labelling_items import Items, LabelItem, read_items
from .labelling_methods import Plan, StepLabels, first_error, monte_carlo, outcome
from .labelling_report import describe, measure
from .labelling_rollouts import CausalLMRollouts, RolloutGenerator
from .labelling_run import Labelled, answer_is_right, label_solutions
from .labelling_server import ServerRollouts
from .result_shards import ShardWriter, read_rows
from .score import hash_weights
from .scoring_input import describe_files

logger = logging.getLogger(__name__)

REPORT_FILE, NUMBERS_FILE = "report.md", "report.yaml"
_SAMPLED = ("monte_carlo", "first_error")
# The methods that read an option; others read those that are not here.
_OPTIONS_OF = {
    "threshold": ("consensus",),
    "labels": ("monte_carlo",),
    "unchecked": ("arithmetic",),
    "check_problem": ("first_error",),
    **dict.fromkeys(("model", "server", "rollouts", "temperature", "top_p", "max_new_tokens", "instruction"), _SAMPLED),
    **dict.fromkeys(("served_model", "tokenizer", "gguf_file", "prompt_template"), _SAMPLED),
}


@dataclass
class LabelArguments:
    """Options of the command line."""

    method: Literal["outcome", "arithmetic", "monte_carlo", "first_error", "consensus"] = field(
        metadata={"help": "How steps are labelled."}
    )
    input: str = field(metadata={"help": "A file or folder of solutions; for consensus, of labelled ones."})
    output: str = field(metadata={"help": "A folder for the labels: a new one, or that of a run to go on with."})
    agree_with: str | None = field(default=None, metadata={"help": "For consensus: the other labels."})
    threshold: float = field(default=0.5, metadata={"help": "For consensus: soft labels from here on are correct."})
    labels: Literal["hard", "soft"] = field(
        default="hard",
        metadata={"help": "For monte_carlo: 1 where any completion succeeds, or the share that does."},
    )
    unchecked: Literal["correct", "ignored"] = field(
        default="correct", metadata={"help": "For arithmetic: what a step without an equation to judge counts as."}
    )
    check_problem: bool = field(
        default=True,
        metadata={"help": "For first_error: leave a solution unlabelled where the problem alone is never solved."},
    )
    step_style: Literal["blank_lines", "newlines", "step_markers", "thinking"] = field(
        default="blank_lines", metadata={"help": "Where a solution given as a text is cut into steps."}
    )
    on_bad_row: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "Stop at a row that cannot be read or lacks a needed answer, or leave it out and count it."},
    )
    comparison: Literal["auto", "math-verify", "string"] = field(
        default="math-verify", metadata={"help": "How final answers are compared."}
    )
    model: str | None = field(default=None, metadata={"help": "The causal language model that completes."})
    revision: str = field(default="main", metadata={"help": "Revision of a model on the Hub."})
    gguf_file: str | None = field(default=None, metadata={"help": "The GGUF file in the model's folder, if it is one."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Dtype of its weights."}
    )
    batch_size: int = field(default=32, metadata={"help": "Most completions of one solution generated together."})
    server: str | None = field(
        default=None,
        metadata={"help": "In place of --model: a server's URL with the OpenAI completions interface, up to /v1."},
    )
    served_model: str | None = field(default=None, metadata={"help": "The model's name there, if there are several."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "The served model's, for its chat template; plain prompts without one."}
    )
    api_key_variable: str = field(
        default="OPENAI_API_KEY", metadata={"help": "The environment variable that holds the server's key, if any."}
    )
    concurrency: int = field(default=8, metadata={"help": "Most requests to the server at a time, of each process."})
    timeout: float = field(default=300.0, metadata={"help": "Seconds that a request may take."})
    retries: int = field(default=5, metadata={"help": "Attempts after a request that failed."})
    rollouts: int = field(default=8, metadata={"help": "Completions after each step that is looked at."})
    temperature: float = field(default=0.7, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the tokens with this share of probability."})
    max_new_tokens: int = field(default=512, metadata={"help": "Most tokens of a completion; cut ones fail."})
    instruction: str | None = field(
        default=None, metadata={"help": "Text after each problem, such as how to state the final answer."}
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Prompt with {problem}; the chat template where there is one by default."}
    )
    step_joiner: str = field(default="\n\n", metadata={"help": "Text after each step; \\n is a line end."})
    stop_strings: list[str] = field(default_factory=list, metadata={"help": "Texts that end a completion."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    seconds_per_shard: float = field(default=60.0, metadata={"help": "How often finished rows are written."})

    def __post_init__(self) -> None:
        for name in ("step_joiner", "prompt_template"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.replace("\\n", "\n"))
        self.stop_strings = [text.replace("\\n", "\n") for text in self.stop_strings]
        if (self.method == "consensus") != (self.agree_with is not None):
            raise ValueError("--agree-with names the other labels for --method consensus, and is for nothing else")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"--threshold must be above 0 and at most 1, got {self.threshold}")
        if self.method in _SAMPLED and (self.model is None) == (self.server is None):
            raise ValueError(f"--method {self.method} needs either --model or --server to complete solutions")
        for name in ("rollouts", "concurrency", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ValueError(
                f"--temperature must be above 0 and --top-p above 0 and at most 1, got {self.temperature} and "
                f"{self.top_p}"
            )
        for name, methods in _OPTIONS_OF.items():
            default = self.__dataclass_fields__[name].default
            if self.method not in methods and getattr(self, name) != default:
                raise ValueError(f"--{name.replace('_', '-')} is for --method {' or '.join(methods)}; leave it out")


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Label as the options say; returns the numbers of the report, on the main process."""
    (options,) = parse_options(
        (LabelArguments,),
        argv,
        prog="trainer.label",
        usage="%(prog)s --method METHOD --input FILE --output FOLDER [options]",
        description="Label the steps of solutions. Start it with `accelerate launch -m trainer.label` for several "
        "processes, and again with the same options to go on after an early end.",
    )
    # Without saying so, processes on CPUs would not find each other. At the end they wait for the slowest.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    set_up_logging(main_process=state.is_main_process)
    with one_line_errors(), contextlib.ExitStack() as stack:
        left_out: dict[str, int] = {}
        rows: Callable[[ShardWriter], Iterator[tuple[int, dict[str, Any]]]]
        if options.method == "consensus":
            agreement = agree(options.input, options.agree_with, threshold=options.threshold)
            num_rows, settings, left_out = len(agreement.kept), {"threshold": options.threshold}, agreement.counts
            settings["agree_with"] = describe_files(list_data_files(Path(options.agree_with)))
            rows = partial(_agreed_rows, agreement.kept)
        else:
            found = read_items(options.input, step_style=options.step_style, on_bad_row=options.on_bad_row)
            left_out = found.left_out
            _check_answers(found, options)
            num_rows = len(found.items)
            if options.method in _SAMPLED:
                generator, settings = stack.enter_context(open_generator(options, state.device))
                rows = partial(_sampled_rows, found.items, generator, options, state.is_main_process)
            else:
                settings = {"unchecked": options.unchecked} if options.method == "arithmetic" else {}
                rows = partial(_computed_rows, found.items, options)
        writer = stack.enter_context(
            ShardWriter(
                options.output,
                settings={**_common_settings(options), **settings},
                features=FEATURES,
                process_index=state.process_index,
                num_processes=state.num_processes,
                seconds_per_shard=options.seconds_per_shard,
            )
        )
        for row, record in rows(writer):
            writer.add(row, record)
        writer.finish(num_rows=num_rows)
        state.wait_for_everyone()
        return report(options, left_out) if state.is_main_process else None


def report(options: LabelArguments, left_out: dict[str, int]) -> dict[str, Any]:
    """Print what all runs together came to, and write it into the output folder."""
    sampled = options.method in _SAMPLED
    result = measure(read_rows(options.output), rollouts=options.rollouts if sampled else None)
    text = describe(result, method=options.method, left_out={} if options.method == "consensus" else left_out)
    if options.method == "consensus":
        text += "".join(f"\n{number:,} {reason}" for reason, number in left_out.items()) + "\n"
        result["consensus"] = dict(left_out)
    if options.method not in ("arithmetic", "consensus"):
        text += f"\nFinal answers compared {describe_comparison(options.comparison)}.\n"
    folder = Path(options.output)
    (folder / REPORT_FILE).write_text(text, encoding="utf-8")
    (folder / NUMBERS_FILE).write_text(yaml.safe_dump(result, sort_keys=True), encoding="utf-8")
    print(f"{text}\nWritten to {folder}")
    return result


FEATURES = datasets.Features(
    {
        "problem": datasets.Value("string"),
        "steps": datasets.List(datasets.Value("string")),
        "labels": datasets.List(datasets.Value("float32")),
        "successes": datasets.List(datasets.Value("int32")),
        "rollouts": datasets.List(datasets.Value("int32")),
        "problem_group": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "solution_answer": datasets.Value("string"),
        "given_labels": datasets.List(datasets.Value("float32")),
        "num_rollouts": datasets.Value("int64"),
        "num_tokens": datasets.Value("int64"),
        "num_cut": datasets.Value("int64"),
        "error": datasets.Value("string"),
    }
)
"""The columns of the output. `successes` and `rollouts` are null where labels come from no completions."""


@contextlib.contextmanager
def open_generator(options: LabelArguments, device: torch.device) -> Iterator[tuple[RolloutGenerator, dict[str, Any]]]:
    """Where completions come from, and what of it the rows depend on."""
    sampling: dict[str, Any] = {
        "prompt_template": options.prompt_template,
        "step_joiner": options.step_joiner,
        "stop_strings": options.stop_strings,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    depends = {**sampling, "rollouts": options.rollouts, "instruction": options.instruction}
    if options.server is not None:
        tokenizer = None if options.tokenizer is None else AutoTokenizer.from_pretrained(options.tokenizer)
        with JsonClient(
            options.server,
            api_key=key_from_environment(options.api_key_variable),
            timeout=options.timeout,
            retries=options.retries,
            concurrency=options.concurrency,
        ) as client:
            server = ServerRollouts(client, served_model=options.served_model, tokenizer=tokenizer, **sampling)
            template = server.prompt_template
            yield server, {**depends, "served_model": server.served_model, "prompt_template": template}
        return
    source = {"revision": options.revision} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **source)
    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **source).to(device).eval()
    depends |= {"model_weights": hash_weights(model), "dtype": str(model.dtype), "batch_size": options.batch_size}
    yield CausalLMRollouts(model, tokenizer, batch_size=options.batch_size, **sampling), depends


def _check_answers(found: Items, options: LabelArguments) -> None:
    """Refuse, or leave out, what lacks the answer that a method needs, and a comparison that is not there."""
    if options.method == "arithmetic":
        return
    describe_comparison(options.comparison)
    answered = [item for item in found.items if item.answer is not None]
    if options.on_bad_row == "skip" and answered and len(answered) < len(found.items):
        found.left_out["no reference answer"] += len(found.items) - len(answered)
        found.items = answered
    if missing := [number for number, item in enumerate(found.items) if item.answer is None]:
        raise ValueError(
            f"--method {options.method} needs a reference answer for every solution, and solution {missing[0] + 1} of "
            f"{options.input} has none; add a column answer, pass --on-bad-row skip, or use --method arithmetic"
        )


def _common_settings(options: LabelArguments) -> dict[str, Any]:
    settings: dict[str, Any] = {"method": options.method, "input": describe_files(list_data_files(Path(options.input)))}
    if options.method != "consensus":
        settings |= {"step_style": options.step_style, "on_bad_row": options.on_bad_row}
    if options.method not in ("consensus", "arithmetic"):
        settings["answers_compared"] = describe_comparison(options.comparison)
    if options.method == "monte_carlo":
        settings["labels"] = options.labels
    if options.method == "first_error":
        settings["check_problem"] = options.check_problem
    return settings


def _sampled_rows(
    items: Sequence[LabelItem], generator: RolloutGenerator, options: LabelArguments, show: bool, writer: ShardWriter
) -> Iterator[tuple[int, dict[str, Any]]]:
    def start(item: LabelItem, is_right: bool) -> Plan:
        if options.method == "monte_carlo":
            return monte_carlo(item, is_right, rollouts=options.rollouts, kind=options.labels)
        return first_error(item, is_right, check_problem=options.check_problem)

    due = [(row, item) for row, item in enumerate(items) if writer.is_due(row)]
    labelled = label_solutions(
        due,
        start,
        generator,
        rollouts=options.rollouts,
        comparison=options.comparison,
        instruction=options.instruction,
        concurrency=options.concurrency if options.server is not None else 1,
    )
    for found in transformers_logging.tqdm(
        labelled, total=len(due), desc="Labelling", unit="solution", disable=not show
    ):
        yield found.row, _to_record(found)


def _computed_rows(
    items: Sequence[LabelItem], options: LabelArguments, writer: ShardWriter
) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, item in enumerate(items):
        if not writer.is_due(row):
            continue
        if options.method == "outcome":
            labels = outcome(item, answer_is_right(item, options.comparison))
        else:
            values = arithmetic_labels(item.steps, unchecked=1.0 if options.unchecked == "correct" else IGNORED_LABEL)
            labels = StepLabels(labels=tuple(values), successes=(), rollouts=())
        yield row, {**_to_record(Labelled(row=row, item=item, result=labels)), "successes": None, "rollouts": None}


def _agreed_rows(kept: Sequence[Any], writer: ShardWriter) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, (record, successes, rollouts) in enumerate(kept):
        if writer.is_due(row):
            yield (
                row,
                {
                    **dict.fromkeys(FEATURES),
                    "problem": record.problem,
                    "steps": list(record.steps),
                    "labels": list(record.labels),
                    "problem_group": record.problem_group,
                    "successes": successes,
                    "rollouts": rollouts,
                },
            )


def _to_record(found: Labelled) -> dict[str, Any]:
    item, result = found.item, found.result
    return {
        "problem": item.problem,
        "steps": list(item.steps),
        "labels": list(result.labels),
        "successes": list(result.successes),
        "rollouts": list(result.rollouts),
        "problem_group": None,
        "answer": item.answer,
        "solution_answer": item.solution_answer,
        "given_labels": None if item.labels is None else list(item.labels),
        "num_rollouts": found.num_rollouts,
        "num_tokens": found.num_tokens,
        "num_cut": found.num_cut,
        "error": result.error,
    }


if __name__ == "__main__":
    main()
