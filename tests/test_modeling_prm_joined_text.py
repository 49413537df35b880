"""Layouts of PRMs of others: texts joined before they are tokenized, separators of several tokens, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import published_prms
import pytest
import tiny_models
from tokenizers import AddedToken

from modeling_prm import PRMConfig, PRMProcessor

PROBLEM = "What is 12 + {x}?"
STEPS = ["12 + 30 = 42.", "So  it is 四 ки.", "Done"]


def joined(tokenizer: Any, **options: Any) -> PRMProcessor:
    layout = {"separator_token": " ки", "separator_is_reserved": False, "problem_template": "{problem} "}
    return PRMProcessor(tokenizer, **(layout | {"layout_version": 2} | options))


def with_special(tokenizer: Any, *names: str) -> Any:
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    "builder",
    [tiny_models.byte_level_tokenizer, tiny_models.sentencepiece_bpe_tokenizer, tiny_models.roberta_tokenizer],
)
def test_ids_are_those_of_the_whole_text(builder: Callable[[], Any]) -> None:
    tokenizer = builder()
    item = joined(tokenizer).encode([PROBLEM], [STEPS])[0]
    text = f"{PROBLEM} " + "\n".join(f"Step {i}: {step} ки" for i, step in enumerate(STEPS, start=1))
    encoding = tokenizer(text)
    end = 1 if encoding["input_ids"][-1] == tokenizer.convert_tokens_to_ids("</s>") else 0
    assert item.input_ids == encoding["input_ids"][: len(encoding["input_ids"]) - end]
    # The tag in the second step's text ends no step.
    places = [text.index(end) + len(end) for end in ("42. ки", "四 ки. ки", "Done ки")]
    expected = [max(i for i in range(len(item.input_ids)) if _starts_before(encoding, i, place)) for place in places]
    assert item.step_positions == expected
    assert item.num_steps == 3


def _starts_before(encoding: Any, token: int, place: int) -> bool:
    span = encoding.token_to_chars(token)
    return span is not None and span.start < place


def test_special_tokens_of_templates_are_ids_and_of_texts_are_text() -> None:
    tokenizer = with_special(tiny_models.byte_level_tokenizer(), "<|a|>", "<|b|>", "<step>")
    processor = joined(
        tokenizer,
        separator_token="<step>",
        separator_is_reserved=True,
        prompt_layout="chat",
        problem_template="<|a|>user {problem}<|b|>\n",
        step_template="<|a|>{step}<|b|>x",
        step_joiner="<|b|>",
    )
    item = processor.encode(["P <|a|> <step>"], [["one <|b|>", "two"]])[0]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    a, b, step = (tokenizer.convert_tokens_to_ids(name) for name in ("<|a|>", "<|b|>", "<step>"))
    first = [a, *ids("user P <|a|> <step>"), b, *ids("\n"), a, *ids("one <|b|>"), b, *ids("x"), step]
    assert item.input_ids == [*first, b, a, *ids("two"), b, *ids("x"), step]
    assert item.step_positions == [len(first) - 1, len(item.input_ids) - 1]


def test_white_space_after_a_separator_of_white_space_is_a_text_of_its_own() -> None:
    tokenizer = tiny_models.byte_level_tokenizer()
    # Beside each other the line ends of separator and step are one token.
    assert tokenizer.tokenize("a.\n" + "\n\nb") == ["a", ".", "ĊĊ", "Ċ", "b"]
    options = {"step_template": "{step}", "step_joiner": "", "problem_template": "{problem}\n"}
    processor = joined(tokenizer, separator_token="\n", **options)
    item = processor.encode(["P"], [["a.", "\n\nb", "c"]])[0]
    pieces = [tokenizer(text)["input_ids"] for text in ("P\na.\n", "\n\nb\nc\n")]
    assert item.input_ids == pieces[0] + pieces[1]
    # What a step is read from does not change with the steps after it.
    alone = processor.encode(["P"], [["a."]])[0]
    assert item.input_ids[: len(alone.input_ids)] == alone.input_ids
    assert item.step_positions[0] == alone.step_positions[0] == len(pieces[0]) - 1


def test_whole_steps_are_dropped_and_scores_are_read_one_earlier() -> None:
    processor = joined(tiny_models.byte_level_tokenizer(), score_offset=-1)
    whole = processor.encode([PROBLEM], [STEPS])[0]
    second = whole.step_positions[1] + 1
    for max_length, kept in ((second, 1), (second + 1, 2), (whole.step_positions[0] + 1, 0)):
        processor.max_length = max_length
        item = processor.encode([PROBLEM], [STEPS], truncation="drop")[0]
        assert (len(item.step_positions), item.num_steps) == (kept, 3)
        assert len(item.input_ids) <= max_length
        assert item.step_positions == whole.step_positions[:kept]
        if kept:
            assert item.input_ids == whole.input_ids[: item.step_positions[-1] + 2]
        with pytest.raises(ValueError, match=f"keeps {kept} of 3 steps at max_length={max_length}"):
            processor.encode([PROBLEM], [STEPS])


def test_separator_of_several_tokens() -> None:
    tokenizer = published_prms.mistral_tokenizer()
    separator = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert len(separator) == 2
    processor = PRMProcessor(tokenizer, separator_token="\n", separator_is_reserved=False, step_joiner="")
    assert processor.separator_token_id == separator[-1]
    item = processor.encode(["P"], [["a", "b"]])[0]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    first = [tokenizer.bos_token_id, *ids("Problem: P\n\n"), *ids("Step 1: a"), *separator]
    assert item.input_ids == [*first, *ids("Step 2: b"), *separator]
    assert item.step_positions == [len(first) - 1, len(item.input_ids) - 1]


def test_nothing_between_steps() -> None:
    tokenizer = tiny_models.byte_level_tokenizer()
    processor = PRMProcessor(tokenizer, separator_token="", separator_is_reserved=False, step_joiner="")
    assert processor.separator_token_id is None
    item = processor.encode(["P"], [["a.", "b"]])[0]
    pieces = [tokenizer(text)["input_ids"] for text in ("Problem: P\n\n", "Step 1: a.", "Step 2: b")]
    assert item.input_ids == [token for piece in pieces for token in piece]
    assert item.step_positions == [len(pieces[0] + pieces[1]) - 1, len(item.input_ids) - 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separator_token": "ки "}, "ends with a space, which joins the text that follows"),
        ({"separator_token": ""}, r"separator_token must not be empty where it is to be found in the ids"),
        ({"separator_token": " ки and"}, "is not one token of this tokenizer's vocabulary"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    reserved = {"separator_is_reserved": not options["separator_token"].endswith(" ")}
    with pytest.raises(ValueError, match=message):
        joined(tiny_models.byte_level_tokenizer(), **options, **reserved)


def test_separator_that_the_tokenizer_swallows() -> None:
    processor = joined(tiny_models.wordpiece_tokenizer(), separator_token="\n", problem_template="{problem}\n")
    with pytest.raises(
        ValueError, match=r"no token that ends where the separator '\\n' ends after step 1 of solution 0"
    ):
        processor.encode(["what"], [["the fox", "jumps"]])


def test_config_of_the_second_layout(tmp_path: Any) -> None:
    config = PRMConfig(layout_version=2, separator_token="", separator_is_reserved=False)
    config.save_pretrained(tmp_path)
    loaded = PRMConfig.from_pretrained(tmp_path)
    assert (loaded.layout_version, loaded.separator_token, loaded.separator_token_id) == (2, "", None)
    assert PRMConfig().layout_version == 1
