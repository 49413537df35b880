"""Score the same solutions with this project and in other ways, side by side: seconds, ratios and peak memory.

    python benchmarks/scoring.py --backbone smollm2 --dtype float32 --cases short long --output scoring.jsonl

All sides have the same weights, dtype and inputs, take turns, and medians are reported; a ratio is the median of the
ratios of neighbouring runs. `bare` is the backbone alone on the distinct tokens of a case without padding, the limit of
what scoring can reach. `--external vllm="PYTHON SCRIPT"` adds a server (see `External` in `scoring_sides.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from scoring_cases import Case, distinct_tokens, make_case
from scoring_sides import External, Side, beam_sides, scoring_sides, seconds_of
from train_vs_trl import make_backbone
from transformers import AutoModel, AutoTokenizer, Qwen2Config

from modeling_prm import PRMForStepScoring, scoring

CASES = ("short", "long", "very-long", "mixed", "beam", "bulk")
QWEN2 = {
    "qwen2-0.5b-shape": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    "qwen2-7b-shape": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
}
HEADS = {
    "qwen2-0.5b-shape": {"num_attention_heads": 14, "num_key_value_heads": 2},
    "qwen2-7b-shape": {"num_attention_heads": 28, "num_key_value_heads": 4},
}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.backbone_folder or Path(temporary) / "backbone")
        model, processor = load(options, folder)
        if options.only:
            run_once(options, model, processor)
            return
        externals = start_externals(options, model, processor, Path(temporary) / "prm")
        for name in options.cases:
            case = make_case(name, processor, bulk=options.bulk, seed=options.seed)
            result = run_case(options, model, processor, case, externals)
            if options.memory:
                result["peak_memory_mib"] = peak_memories(options, name, folder)
            print(table(result), flush=True)
            if options.output:
                with Path(options.output).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
        for external in externals.values():
            external.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=("tiny", "smollm2", *QWEN2), default="tiny")
    parser.add_argument("--backbone-folder", help="where the backbone is, or is written to")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["short", "long", "mixed", "beam"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--bulk", type=int, default=10_000, help="solutions of the case bulk")
    parser.add_argument("--sides", nargs="+", help="of a case, only these")
    parser.add_argument("--external", nargs="+", default=[], help="NAME=COMMAND of sides in processes of their own")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, each side in its own process")
    parser.add_argument("--only", help="run one side of the first case once, and print its peak memory")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="append each case as a line of JSON to this file")
    return parser.parse_args()


def load(options: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    if not (folder / "config.json").exists():
        if options.backbone in QWEN2:
            make_backbone("tiny", folder, options.seed)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            config = Qwen2Config(vocab_size=len(tokenizer), **QWEN2[options.backbone], **HEADS[options.backbone])
            AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        else:
            make_backbone(options.backbone, folder, options.seed)
    torch.manual_seed(options.seed)
    model, processor = PRMForStepScoring.from_backbone(folder, dtype=getattr(torch, options.dtype))
    return model.to(options.device), processor


def start_externals(options: argparse.Namespace, model: Any, processor: Any, folder: Path) -> dict[str, External]:
    if not options.external:
        return {}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    pairs = [text.partition("=") for text in options.external]
    return {name: External(command, str(folder)) for name, _, command in pairs}


def sides_of(options: argparse.Namespace, model: Any, processor: Any, case: Case) -> tuple[dict[str, Side], Any, int]:
    """The sides of a case, its encoded solutions, and how many distinct tokens these have."""
    if case.beams:
        sides, encoded, distinct = beam_sides(model, processor, case), None, 0
    else:
        encoded = processor.encode(case.problems, case.solutions)
        distinct = distinct_tokens(encoded)
        sides = scoring_sides(model, processor, case, encoded, distinct)
    if case.name == "bulk":
        sides = {"ours": sides["ours"]}
    chosen = options.sides or list(sides)
    return {name: side for name, side in sides.items() if name in chosen}, encoded, distinct


def run_case(
    options: argparse.Namespace, model: Any, processor: Any, case: Case, externals: dict[str, External]
) -> dict[str, Any]:
    sides, encoded, distinct = sides_of(options, model, processor, case)
    seconds: dict[str, list[float]] = {name: [] for name in (*sides, *(externals if encoded else ()))}
    passes: list[float] = []
    # The first round warms up.
    for repetition in range(-1 if case.name != "bulk" else 0, options.repetitions if case.name != "bulk" else 1):
        for name in seconds:
            print(f"{case.name}, repetition {repetition + 1}: {name}", file=sys.stderr, flush=True)
            if name in externals:
                taken = externals[name].seconds(encoded)
            elif case.name == "bulk":
                taken, in_passes = seconds_and_passes(sides[name], model.device)
                passes.append(in_passes)
            else:
                taken = seconds_of(sides[name], model.device)
            if repetition >= 0:
                seconds[name].append(taken)
    ours = seconds.get("ours", [])
    return {
        "case": case.name,
        **{name: getattr(options, name) for name in ("backbone", "dtype", "device", "threads", "repetitions", "seed")},
        "torch": torch.__version__,
        "solutions": len(case.solutions),
        "tokens": sum(len(item.input_ids) for item in encoded or ()),
        "distinct_tokens": distinct,
        "seconds": seconds,
        "ours_is_faster": {
            name: statistics.median(other / own for other, own in zip(taken, ours, strict=True))
            for name, taken in seconds.items()
            if ours
        },
        "share_of_forward_passes": passes[0] / ours[0] if passes else None,
    }


def seconds_and_passes(side: Side, device: torch.device) -> tuple[float, float]:
    """Seconds of a side, and of the forward passes in it."""
    compute, spent = scoring.compute, [0.0]

    def timed(*arguments: Any) -> None:
        spent[0] += seconds_of(lambda: compute(*arguments), device)

    scoring.compute = timed  # type: ignore[assignment]
    try:
        return seconds_of(side, device), spent[0]
    finally:
        scoring.compute = compute


def peak_memories(options: argparse.Namespace, case: str, folder: Path) -> dict[str, float]:
    """Peak resident memory of each side in MiB, on a CPU, each in a process of its own that scores the case once."""
    peaks = {}
    for name in options.sides or ["ours", "loop", "padded", "bare 8x128"]:
        if case == "beam" and name.startswith("bare"):
            continue
        command = [sys.executable, __file__, "--only", name, "--cases", case, "--backbone-folder", str(folder)]
        command += ["--dtype", options.dtype, "--threads", str(options.threads), "--seed", str(options.seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])["peak_memory_mib"]
    return peaks


def run_once(options: argparse.Namespace, model: Any, processor: Any) -> None:
    case = make_case(options.cases[0], processor, bulk=options.bulk, seed=options.seed)
    side = sides_of(options, model, processor, case)[0][options.only]
    side()
    print(json.dumps({"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['backbone']}, {result['dtype']}, {result['case']}: {result['solutions']} solutions, "
        f"{result['tokens']:,} tokens, {result['distinct_tokens']:,} distinct, {result['threads']} threads of "
        f"{result['device']}, median of {result['repetitions']}",
        "",
        "| | seconds | ours is faster | peak memory (MiB) |",
        "| --- | --- | --- | --- |",
    ]
    for name, taken in result["seconds"].items():
        ratio = result["ours_is_faster"].get(name)
        memory = result.get("peak_memory_mib", {}).get(name)
        cells = [f"{statistics.median(taken):.3f}", f"{ratio:.2f}" if ratio else "", f"{memory:,.0f}" if memory else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if result["share_of_forward_passes"] is not None:
        lines.append(f"\nforward passes are {result['share_of_forward_passes']:.1%} of the time")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
