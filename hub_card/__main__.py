"""Publish a saved PRM: `python -m hub_card --model DIR --repo user/name`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from modeling_prm import PRMForStepScoring, PRMProcessor

from .card import CARD_DATA_FILE, CardData
from .errors import CheckpointError, one_line_errors
from .publishing import Publication, publish


def main(argv: Sequence[str] | None = None) -> None:
    """Publish as the options say."""
    options = _parser().parse_args(argv)
    with one_line_errors():
        folder = Path(options.model)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no saved model (no config.json); give the folder of save_pretrained")
        model, processor = _load(folder)
        publication = publish(
            model,
            processor,
            options.repo,
            card=_card(folder, options),
            license_file=options.license_file,
            private=options.private or None,
            revision=options.revision,
            commit_message=options.commit_message,
            force=options.force,
            dry_run=options.dry_run,
        )
    print(_report(publication))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hub_card",
        description="Publish a saved process reward model. It is loaded in a clean process and compared first. The "
        "Hub token is the one of `hf auth login` or HF_TOKEN.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the saved model and processor")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="where to publish it")
    parser.add_argument("--private", action="store_true", help="make a new repository private; refuse a public one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made if missing (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="check, and show every file and the card; send nothing")
    parser.add_argument("--force", action="store_true", help="publish although weights look untrained or text private")
    parser.add_argument("--commit-message", default="Upload process reward model", help="default: %(default)s")
    card = parser.add_argument_group("the card", f"What is given here wins over DIR/{CARD_DATA_FILE}.")
    card.add_argument("--card-data", metavar="FILE", help=f"data of the card as JSON (default: DIR/{CARD_DATA_FILE})")
    card.add_argument("--title", help="default: the repository's name")
    card.add_argument("--description", help="what the model is for")
    card.add_argument("--base-model", metavar="USER/NAME", help="the backbone")
    card.add_argument("--datasets", nargs="+", metavar="NAME", help="the training data")
    card.add_argument("--license", metavar="NAME", help="the weights' licence, such as apache-2.0")
    card.add_argument("--license-file", metavar="FILE", help="its text, published as LICENSE")
    card.add_argument("--languages", nargs="+", metavar="CODE", help="such as en")
    return parser


def _load(folder: Path) -> tuple[PRMForStepScoring, PRMProcessor]:
    try:
        return PRMForStepScoring.from_pretrained(folder, dtype="auto"), PRMProcessor.from_pretrained(folder)
    except Exception as error:  # what a damaged file raises depends on who reads it
        raise CheckpointError(f"{folder} does not load: {error}") from error


def _card(folder: Path, options: argparse.Namespace) -> CardData:
    file = Path(options.card_data) if options.card_data else folder / CARD_DATA_FILE
    given = options.card_data is not None or file.is_file()
    card = CardData.from_json(file.read_text(encoding="utf-8")) if given else CardData()
    names = ("title", "description", "base_model", "datasets", "license", "languages")
    values = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name in ("datasets", "languages"):
        if name in values:
            values[name] = tuple(values[name])
    return dataclasses.replace(card, **values)


def _report(publication: Publication) -> str:
    width = max(map(len, publication.files))
    files = [f"  {name:<{width}}  {size:>13,} bytes" for name, size in publication.files.items()]
    if publication.commit is None:
        head = f"{publication.repo_id} would hold these {len(files)} files, which load and score in a clean process:"
        return "\n".join([head, *files, "", "README.md:", "", publication.card])
    return "\n".join(
        [
            f"Published {len(files)} files to {publication.url}",
            *files,
            f'Pin this commit when loading: revision="{publication.commit}"',
        ]
    )


if __name__ == "__main__":
    main()
