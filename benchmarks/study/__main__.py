"""`python -m benchmarks.study train --all`, and a command for each table; see `--help`."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from .plan import RUNS
from .predictions import RESULTS
from .tables import TABLES


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or print a table, as the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="The folder of saved predictions.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="Train and score what is not done yet.")
    train.add_argument("names", nargs="*", metavar="RUN", help=f"Of {', '.join(run.name for run in RUNS)}.")
    train.add_argument("--all", action="store_true", help="All runs, in the order of their worth.")
    train.add_argument("--data", type=Path, default=Path("../shared/data"), help="The folder of the data sets.")
    train.add_argument("--runs", type=Path, default=Path("outputs/study"), help="For checkpoints and models.")
    for name, table in TABLES.items():
        commands.add_parser(name, help=str(table.__doc__).partition("\n")[0])
    commands.add_parser("tables", help="All tables, written into the folder of results too.")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.command == "train":
        from .training import train_all

        names = [run.name for run in RUNS] if options.all else options.names
        train_all(names, data=options.data, runs=options.runs, results=options.results)
        return
    texts, found = [], {}
    for name in TABLES if options.command == "tables" else [options.command]:
        text, found[name] = TABLES[name](options.results)
        texts.append(text)
    print("\n\n".join(texts))
    if options.command == "tables":
        (options.results / "tables.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        (options.results / "tables.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
