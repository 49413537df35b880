"""Options from the command line over those of a YAML file, and mistakes shown in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_card.errors import one_line_errors
from trainer.command_line import choose_dtype, parse_options, set_up_logging


@dataclass
class First:
    needed: str = field(metadata={"help": "What is needed."})
    some_names: list[str] = field(default_factory=list)
    learning_rate: float = 0.5
    a_flag: bool = False
    on_by_default: bool = True
    limit: int | None = 7


@dataclass
class Second:
    options: dict[str, Any] | str | None = None
    text: str = "text"

    def __post_init__(self) -> None:
        if self.text == "bad":
            raise ValueError("text must not be bad,\n  as it is")


def parse(*argv: str) -> tuple[First, Second]:
    return parse_options((First, Second), argv, prog="some.module", usage="%(prog)s --needed N", description="Tests.")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        (tmp_path / "options.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "options.yaml")

    return write


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of error that the options give, after the usage."""
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    usage, error, *more = capsys.readouterr().err.splitlines()
    assert usage == "usage: python -m some.module --needed N"
    assert more == []
    assert error.startswith("python -m some.module: error: ")
    return error.removeprefix("python -m some.module: error: ")


def test_options_go_to_their_dataclasses() -> None:
    first, second = parse("--needed", "n", "--some-names", "a", "b", "--learning_rate", "1e-3", "--a-flag", "--text=t")
    assert first == First("n", ["a", "b"], 1e-3, True)
    assert second == Second(text="t")


FILE = """
needed: 5
some-names: [a, 'b c', 3]
learning_rate: 1e-5
a-flag: yes
on_by_default: false
limit: null
options: {"x": 1, "y": [true, null]}
text: --dashed
"""


def test_a_file_gives_options_with_dashes_lists_booleans_null_and_mappings(write: Any) -> None:
    first, second = parse("--config", write(FILE))
    # Null leaves the default.
    assert first == First("5", ["a", "b c", "3"], 1e-5, True, False, 7)
    assert second == Second(options='{"x": 1, "y": [true, null]}', text="--dashed")


def test_the_command_line_wins_over_the_file(write: Any) -> None:
    path = write(FILE)
    for argv in (
        ("--config", path, "--some_names", "z", "--learning-rate", "2", "--a-flag", "false", "--text", "t"),
        ("--some_names", "z", "--learning-rate", "2", "--a-flag", "false", "--text", "t", f"--config={path}"),
    ):
        first, second = parse(*argv)
        assert first == First("5", ["z"], 2.0, False, False, 7)
        assert second.text == "t"


@pytest.mark.parametrize("text", ["needed: n\nsome_names: []", "needed: n\nsome_names: null", "needed: n"])
def test_an_empty_list_is_the_default(write: Any, text: str) -> None:
    assert parse("--config", write(text))[0] == First("n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("needed: n\nlearning_rat: 1", "has the option 'learning_rat', which is not among those of `python -m some"),
        ("needed: n\nhelp: true", "has the option 'help', which is not"),
        ("needed: n\nconfig: other.yaml", "has the option 'config', which is not"),
        ("needed: [1, 2\nx: }", "is not valid YAML: "),
        ("- needed\n- n", "must hold a mapping of options to values, got list"),
        ("", "must hold a mapping of options to values, got NoneType"),
        ("needed: n\nlearning_rate: fast", "--learning-rate: invalid float value: 'fast'"),
        ("needed: n\na_flag: perhaps", "--a-flag"),
        ("needed: n\ntext: bad", "text must not be bad, as it is"),
        ("learning_rate: 1", "the following arguments are required: --needed"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    write: Any, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = write(text)
    error = error_of(capsys, "--config", path)
    assert message in error
    if "option '" in message or "YAML" in message or "mapping" in message:
        assert error.startswith(path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--needed", "n", "--unknown", "3"), "unrecognized arguments: --unknown 3"),
        (("--needed", "n", "stray"), "unrecognized arguments: stray"),
        # An abbreviation would change its meaning when a longer name is added.
        (("--needed", "n", "--learning", "1"), "unrecognized arguments: --learning 1"),
        (("--needed", "n", "--limit", "x"), "invalid int value: 'x'"),
        (("--needed", "n", "--text", "bad"), "text must not be bad, as it is"),
        (("--needed", "n", "--config", "absent.yaml"), "No such file or directory: 'absent.yaml'"),
        (("--needed", "n", "--config"), "expected one argument"),
        ((), "the following arguments are required: --needed"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert message in error_of(capsys, *argv)


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for text in ("--needed", "What is needed.", "--some-names", "--text", "--config", "Tests."):
        assert text in shown


@pytest.mark.parametrize("kind", [ValueError, TypeError, FileNotFoundError, ImportError])
def test_expected_errors_end_in_one_line(kind: type[Exception]) -> None:
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise kind("over\n   two lines")
    assert stopped.value.code == "error: over two lines"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"), one_line_errors():
        raise RuntimeError("a bug")


@pytest.fixture
def levels() -> Iterator[dict[str, int]]:
    names = ("trainer", "modeling_prm", "hub_card")
    before = {name: logging.getLogger(name).level for name in names}
    yield {}
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("levels")
def test_only_the_main_process_tells_what_it_does() -> None:
    for main_process, enabled in ((True, True), (False, False)):
        set_up_logging(main_process=main_process)
        for name in ("trainer.readers", "modeling_prm.backbones", "hub_card.clean_process"):
            assert logging.getLogger(name).isEnabledFor(logging.INFO) is enabled
            assert logging.getLogger(name).isEnabledFor(logging.ERROR)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_the_dtype_on_a_cpu(
    capabilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == expected
    # What is named is taken.
    assert choose_dtype("float32", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    assert choose_dtype("float16", cpu) == torch.float16


@pytest.mark.parametrize("native", [True, False])
def test_the_dtype_on_a_gpu(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert choose_dtype("auto", torch.device("cuda", 0)) == (torch.bfloat16 if native else torch.float32)
    assert choose_dtype("auto", torch.device("mps")) == torch.float32
