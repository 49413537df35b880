"""Expected errors of the command lines, as one line without a traceback and without the Hub token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub import get_token


class CheckpointError(RuntimeError):
    """A checkpoint that does not do what it should, such as load and score the same somewhere else."""


@contextmanager
def one_line_errors(report: Callable[[str], object] | None = None) -> Iterator[None]:
    """Show an expected error (bad value, bad file, a Hub that refuses) as one line, and exit."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, CheckpointError) as error:
        (report or _exit_with)(without_token(" ".join(str(error).split())))


def without_token(text: str, token: str | bool | None = None) -> str:
    """The text with the Hub token, the one given or the one in use here, taken out."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "[token]")
    return text


def _exit_with(message: str) -> None:
    sys.exit(f"error: {message}")
