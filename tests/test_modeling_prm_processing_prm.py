"""`PRMProcessor`: the exact layout of ids, texts that name special tokens, lengths, chat layout, saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import FAMILIES, byte_level_tokenizer, sentencepiece_bpe_tokenizer
from tokenizers import Tokenizer, models, processors
from transformers import AddedToken, AutoProcessor, PreTrainedTokenizerFast

from modeling_prm import PRMForStepScoring, PRMProcessor

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]

PROBLEMS = ["What is 12 + 30?", "Ann has 3 apples.", "the quick brown fox jumps over the lazy dog"]
SOLUTIONS = [["12 + 30 = 42.", "So the answer is 42."], ["3 * 4 = 12."], ["again", "and again.", "It is (12)."]]

# Every character of the texts below, and two merges that would swallow a line end.
SYMBOLS = ["<s>", *"Problem: 2+3?\nStp1=5.4"]
VOCABULARY = {symbol: index for index, symbol in enumerate(dict.fromkeys(SYMBOLS))} | {"\n\n": 23, ".\n": 24}


def handmade_tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """One id a character, except for the merges "\\n\\n" and ".\\n"; BOS 0, separator 25."""
    assert len(VOCABULARY) == 25
    backend = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[("\n", "\n"), (".", "\n")]))
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **names)
    tokenizer.add_tokens([AddedToken("<|step_end|>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


# <s> | P r o b l e m : ␣ 2 + 3 ? \n\n
PROMPT_IDS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 23]
# S t e p ␣ 1 : ␣ 2 + 3 = 5 . | separator
STEP_1_IDS = [15, 16, 6, 17, 9, 18, 8, 9, 10, 11, 12, 19, 20, 21, 25]
# \n | S t e p ␣ 2 : ␣ 5 . | separator
STEP_2_IDS = [14, 15, 16, 6, 17, 9, 10, 8, 9, 20, 21, 25]
EXAMPLE = ("2+3?", ["2+3=5.", "5."])


def test_exact_ids_of_an_example() -> None:
    batch = PRMProcessor(handmade_tokenizer())(*EXAMPLE)
    assert batch["input_ids"] == [PROMPT_IDS + STEP_1_IDS + STEP_2_IDS]
    assert len(PROMPT_IDS) + len(STEP_1_IDS) + len(STEP_2_IDS) == 42
    assert batch["attention_mask"] == [[1] * 42]
    assert batch["step_positions"] == [[29, 41]]
    assert list(batch) == ["input_ids", "attention_mask", "step_positions"]


def test_exact_ids_with_other_templates() -> None:
    processor = PRMProcessor(
        handmade_tokenizer(), problem_template="{problem}\n", step_template="{i}.{i} {step}\n", step_joiner=""
    )
    # 2 + 3 ? \n after BOS, then 1 . 1 ␣ 5 \n and 2 . 2 ␣ 4 \n, each with its separator.
    expected = [0, 10, 11, 12, 13, 14, 18, 21, 18, 9, 20, 14, 25, 10, 21, 10, 9, 22, 14, 25]
    batch = processor("2+3?", ["5", "4"])
    assert batch["input_ids"] == [expected]
    assert batch["step_positions"] == [[12, 19]]


def test_score_offset_reads_one_position_earlier_and_moves_no_id() -> None:
    batch = PRMProcessor(handmade_tokenizer(), score_offset=-1)(*EXAMPLE)
    assert batch["input_ids"] == [PROMPT_IDS + STEP_1_IDS + STEP_2_IDS]
    assert batch["step_positions"] == [[28, 40]]


def test_texts_that_look_like_templates_are_only_texts() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<|step_end|>", special=True)], special_tokens=True)
    processor = PRMProcessor(tokenizer)
    problem, step = "a {step} {problem} {i} \\1 %s", "use {i} and {step} of {problem}"
    ids = processor(problem, [step])["input_ids"][0]
    assert tokenizer.decode(ids) == f"Problem: {problem}\n\nStep 1: {step}<|step_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_single_equals_batched_and_positions_point_at_separators(family: str, make_prm: MakePRM) -> None:
    _, processor = make_prm(family)
    batch = processor(PROBLEMS, SOLUTIONS)
    length = len(batch["input_ids"][0])
    assert all(len(row) == length for row in batch["input_ids"])
    for row, (problem, steps) in enumerate(zip(PROBLEMS, SOLUTIONS, strict=True)):
        single = processor(problem, steps)
        ids, positions = single["input_ids"][0], single["step_positions"][0]
        mask = batch["attention_mask"][row]
        assert mask == [1] * len(ids) + [0] * (length - len(ids))
        assert batch["input_ids"][row][: len(ids)] == ids
        assert batch["step_positions"][row] == positions + [-1] * (3 - len(steps))
        # Every separator is at a position, every position at a separator, and the last one ends the input.
        separator = processor.tokenizer.convert_tokens_to_ids("<|step_end|>")
        assert [index for index, token in enumerate(ids) if token == separator] == positions
        assert len(positions) == len(steps)
        assert positions[-1] == len(ids) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_of_every_family_is_its_pieces_tokenized_alone(family: str, make_prm: MakePRM) -> None:
    _, processor = make_prm(family)
    tokenizer = processor.tokenizer
    bos = {"<s>": ["<s>"], "[CLS]": ["[CLS]"]}
    # BOS as the tokenizer itself writes it before a text, and no EOS even where it writes one.
    first = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"][0])
    expected = tokenizer.convert_tokens_to_ids(bos.get(first, []))
    separator = tokenizer.convert_tokens_to_ids("<|step_end|>")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    expected += ids("Problem: What is 12 + 30?\n\n")
    expected += [*ids("Step 1: 12 + 30 = 42."), separator, *ids("\n"), *ids("Step 2: So the answer is 42."), separator]
    assert processor(PROBLEMS[0], SOLUTIONS[0])["input_ids"] == [expected]
    assert expected[0] == tokenizer.convert_tokens_to_ids(first) or first not in bos


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_has_the_same_ids_as_on_the_right(family: str, make_prm: MakePRM) -> None:
    _, processor = make_prm(family)
    right = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    left = processor(PROBLEMS, SOLUTIONS, padding_side="left", return_tensors="pt")
    length = right["input_ids"].shape[1]
    assert left["input_ids"].shape == right["input_ids"].shape
    for row in range(3):
        count = int(right["attention_mask"][row].sum())
        shift = length - count
        assert left["attention_mask"][row].tolist() == [0] * shift + [1] * count
        assert torch.equal(left["input_ids"][row, shift:], right["input_ids"][row, :count])
        positions = right["step_positions"][row]
        assert left["step_positions"][row].tolist() == [p + shift if p >= 0 else -1 for p in positions.tolist()]


def test_padding_id_is_the_tokenizers_then_its_eos_then_zero() -> None:
    texts = (["2+3?", "2"], [["5."], ["2+3=5."]])
    padded = {}
    for names in ({"pad_token": "4", "eos_token": "5"}, {"eos_token": "5"}, {}):
        tokenizer = handmade_tokenizer(**names)
        batch = PRMProcessor(tokenizer)(*texts)
        row = 0
        missing = batch["attention_mask"][row].count(0)
        assert missing > 0
        padded[tuple(names)] = set(batch["input_ids"][row][-missing:])
        assert tokenizer.pad_token == names.get("pad_token")
    assert padded == {("pad_token", "eos_token"): {22}, ("eos_token",): {20}, (): {0}}


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_texts_are_plain_text(family: str, make_prm: MakePRM) -> None:
    _, processor = make_prm(family)
    tokenizer = processor.tokenizer
    special = {
        token: tokenizer.convert_tokens_to_ids(token) for token in ["<|step_end|>", *tokenizer.all_special_tokens]
    }
    hostile = " ".join(["a", *special, "b", "<|step_end|>"])
    batch = processor(f"{hostile} problem", [hostile, "ok"])
    ids = batch["input_ids"][0]
    separator = special.pop("<|step_end|>")
    assert ids.count(separator) == 2
    assert [ids[position] for position in batch["step_positions"][0]] == [separator] * 2
    # BOS at the front apart, no special id is there; signs that a vocabulary lacks are its unknown token.
    allowed = {tokenizer.unk_token_id}
    assert not (set(ids[1:]) & set(special.values())) - allowed


def test_special_tokens_in_texts_keep_their_characters() -> None:
    tokenizer = byte_level_tokenizer()
    # As a token this one swallows the spaces around it; as text it has none.
    mark = AddedToken("<|user|>", special=True, lstrip=True, rstrip=True, normalized=False)
    tokenizer.add_tokens([mark, AddedToken("<|step_end|>", special=True)], special_tokens=True)
    ids = PRMProcessor(tokenizer)("x<|endoftext|>y  <|user|>  z", ["<|step_end|>"])["input_ids"][0]
    assert tokenizer.decode(ids) == "Problem: x<|endoftext|>y  <|user|>  z\n\nStep 1: <|step_end|><|step_end|>"
    assert tokenizer.eos_token_id not in ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|step_end|>")) == 1


def test_other_added_tokens_stay_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_tokens([AddedToken("<|step_end|>", special=True)], special_tokens=True)
    ids = PRMProcessor(tokenizer)("a <think> b", ["c<think>"])["input_ids"][0]
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 2


def test_step_delimiter_cuts_whole_texts() -> None:
    processor = PRMProcessor(handmade_tokenizer())
    from_text = processor("2+3?", "2+3=5.\n\n \n\n5.\n\n", step_delimiter="\n\n")
    assert from_text["input_ids"] == processor(*EXAMPLE)["input_ids"]
    batch = processor(["2+3?", "2"], ["2+3=5.\n\n5.", "5."], step_delimiter="\n\n")
    assert batch["step_positions"][0] == [29, 41]
    assert batch["step_positions"][1][1] == -1
    # Lists of steps may stand beside texts, and are not cut.
    assert len(processor("2+3?", ["5.\n\n5."], step_delimiter="\n\n")["step_positions"][0]) == 1


def test_lengths_at_the_boundary() -> None:
    tokenizer = handmade_tokenizer()
    whole, first = PROMPT_IDS + STEP_1_IDS + STEP_2_IDS, PROMPT_IDS + STEP_1_IDS
    assert (len(whole), len(first)) == (42, 30)
    assert PRMProcessor(tokenizer, max_length=42)(*EXAMPLE)["input_ids"] == [whole]
    for max_length in (41, 30):
        processor = PRMProcessor(tokenizer, max_length=max_length)
        message = (
            f"solution 0 keeps 1 of 2 steps at max_length={max_length}; raise max_length or pass truncation='drop'"
        )
        with pytest.raises(ValueError, match=message):
            processor(*EXAMPLE)
        batch = processor(*EXAMPLE, truncation="drop")
        assert batch["input_ids"] == [first]
        assert batch["step_positions"] == [[29]]
    processor = PRMProcessor(tokenizer, max_length=29)
    with pytest.raises(ValueError, match="solution 0 keeps 0 of 2 steps at max_length=29"):
        processor(*EXAMPLE)
    with pytest.raises(
        ValueError, match="solution 0 keeps 0 of 2 steps at max_length=29: problem and first step alone"
    ):
        processor(*EXAMPLE, truncation="drop")


def test_a_later_step_that_would_fit_is_dropped_with_the_one_before() -> None:
    # Step 2 of 16 ids and its joiner do not fit into the 12 ids left; step 3 alone would.
    item = PRMProcessor(handmade_tokenizer(), max_length=42).encode(
        ["2+3?"], [["2+3=5.", "2+3=5.", "5."]], truncation="drop"
    )[0]
    assert item.input_ids == PROMPT_IDS + STEP_1_IDS
    assert (item.step_positions, item.num_steps) == ([29], 3)


def test_encode_reports_what_was_dropped_even_where_nothing_fits() -> None:
    processor = PRMProcessor(handmade_tokenizer(), max_length=20)
    item = processor.encode(["2+3?"], [["2+3=5.", "5."]], truncation="drop")[0]
    assert (item.input_ids, item.step_positions, item.num_steps) == (PROMPT_IDS, [], 2)


def test_the_error_names_the_solution_that_is_too_long() -> None:
    processor = PRMProcessor(handmade_tokenizer(), max_length=41)
    with pytest.raises(ValueError, match="solution 1 keeps 1 of 2 steps"):
        processor(["2+3?", "2+3?"], [["5."], ["2+3=5.", "5."]])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("2", ["5"]), {"truncation": "cut"}, ValueError, "truncation must be 'error' or 'drop', got 'cut'"),
        (("2", ["5"]), {"padding_side": "top"}, ValueError, "padding_side must be 'right' or 'left', got 'top'"),
        ((["2", "3"], [["5"]]), {}, ValueError, "got 2 problems and 1 solutions; give one solution a problem"),
        (([], []), {}, ValueError, "got an empty batch"),
        (([2], [["5"]]), {}, TypeError, "problem 0 must be a string, got int"),
        (("2", "5"), {}, TypeError, "solution 0 is one string; give a list of steps, or .*step_delimiter"),
        ((["2"], ["5"]), {}, TypeError, "solution 0 is one string"),
        (("2", [["5"]]), {}, TypeError, "step 1 of solution 0 must be a string, got list"),
        ((["2", "2"], [["5"], ["5", 3]]), {}, TypeError, "step 2 of solution 1 must be a string, got int"),
        (("2", ["5", " \n"]), {}, ValueError, "step 2 of solution 0 is empty"),
        (("2", []), {}, ValueError, "solution 0 has no step"),
        (("2", " \n\n "), {"step_delimiter": "\n\n"}, ValueError, "solution 0 has no step"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, Any], options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PRMProcessor(handmade_tokenizer())(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"separator_token": "<none>"},
            ValueError,
            "separator '<none>' is not one token of this tokenizer.*from_backbone",
        ),
        ({"separator_token": ""}, ValueError, "separator_token must not be empty"),
        ({"score_offset": 2}, ValueError, "score_offset must be one of 0, -1"),
        ({"step_template": "Step"}, ValueError, r"step_template must hold \{step\} exactly once"),
        ({"max_length": "9"}, TypeError, "max_length must be int or None"),
        ({"layout_version": 3}, ValueError, "layout_version 3 is not known"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PRMProcessor(handmade_tokenizer(), **options)


def test_separator_of_unknown_tokens_is_refused(make_prm: MakePRM) -> None:
    # A WordPiece vocabulary gives one [UNK] for it, which is one token and still not a separator.
    with pytest.raises(ValueError, match="separator '☃' is not one token"):
        PRMProcessor(make_prm("bert")[1].tokenizer, separator_token="☃")


def test_separator_of_ordinary_text() -> None:
    tokenizer = byte_level_tokenizer()
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert len(newline) == 1
    processor = PRMProcessor(
        tokenizer, separator_token="\n", separator_is_reserved=False, step_template="{step}", step_joiner=""
    )
    # Line ends inside the problem and a step are not step ends.
    batch = processor("a\nb", ["c\nd", "e"])
    ids = batch["input_ids"][0]
    assert ids.count(newline[0]) > 2
    assert [tokenizer.decode(ids[: position + 1]) for position in batch["step_positions"][0]] == [
        "Problem: a\nb\n\nc\nd\n",
        "Problem: a\nb\n\nc\nd\ne\n",
    ]


@pytest.mark.parametrize("option", ["problem_template", "step_joiner"])
def test_template_that_holds_a_reserved_separator_is_refused(option: str) -> None:
    template = {"problem_template": "{problem}<|step_end|>", "step_joiner": "<|step_end|>"}[option]
    with pytest.raises(ValueError, match=r"holds the separator '<\|step_end\|>', which may only end steps: change"):
        PRMProcessor(handmade_tokenizer(), **{option: template})


def test_separator_that_text_can_give_is_refused_as_reserved() -> None:
    processor = PRMProcessor(
        byte_level_tokenizer(), separator_token="\n", step_joiner="", problem_template="{problem} "
    )
    with pytest.raises(ValueError, match=r"the separator '\\n' came out of the text 'Step 1: a\\nb'"):
        processor("x", ["a\nb"])


@pytest.mark.parametrize(("kind", "expected"), [(None, list), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_return_tensors(kind: str | None, expected: type) -> None:
    texts = (["2+3?", "2"], [["2+3=5.", "5."], ["5."]])
    processor = PRMProcessor(handmade_tokenizer())
    batch, lists = processor(*texts, return_tensors=kind), processor(*texts)
    for name in ("input_ids", "attention_mask", "step_positions"):
        assert isinstance(batch[name], expected)
        if kind is not None:
            assert str(batch[name].dtype).removeprefix("torch.") == "int64"
            assert batch[name].tolist() == lists[name]


def tokenizer_state(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ...]:
    backend = tokenizer.backend_tokenizer
    return (
        backend.to_str(),
        backend.encode_special_tokens,
        dict(tokenizer.special_tokens_map),
        len(tokenizer),
        tokenizer.padding_side,
        tokenizer.truncation_side,
        tokenizer.model_max_length,
        tokenizer.chat_template,
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert"])
def test_calls_leave_the_tokenizer_as_it_was(family: str, make_prm: MakePRM) -> None:
    tokenizer = make_prm(family)[1].tokenizer
    before = tokenizer_state(tokenizer)
    processor = PRMProcessor(tokenizer, max_length=64)
    processor(PROBLEMS, SOLUTIONS, padding_side="left", truncation="drop")
    assert tokenizer_state(tokenizer) == before
    assert tokenizer.backend_tokenizer.encode("<|step_end|>", add_special_tokens=False).ids == [
        tokenizer.convert_tokens_to_ids("<|step_end|>")
    ]


CHAT_TEMPLATE = (
    "{{ bos_token or '' }}<|im_start|>system\nThe quick brown fox, on {{ strftime_now('%Y') }}.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(builder: Callable[[], Any]) -> PreTrainedTokenizerFast:
    tokenizer = builder()
    marks = [AddedToken(mark, special=True, normalized=False) for mark in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_prm(builder: Callable[[], Any]) -> tuple[PRMForStepScoring, PRMProcessor]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    backbone = transformers.AutoModel.from_config(transformers.LlamaConfig(**sizes, vocab_size=400))
    return PRMForStepScoring.from_backbone(backbone, tokenizer=chat_tokenizer(builder), prompt_layout="chat")


@pytest.mark.parametrize("builder", [byte_level_tokenizer, sentencepiece_bpe_tokenizer])
def test_chat_layout_is_the_tokenizers_own_rendering(builder: Callable[[], Any]) -> None:
    model, processor = chat_prm(builder)
    independent = chat_tokenizer(builder)
    problem = "What is 12 + 30?\n\nAnn has {3} apples."
    messages = [{"role": "user", "content": problem}]
    expected = independent.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    ids = processor(problem, ["again", "42."])["input_ids"][0]
    separator = model.config.separator_token_id
    step = independent("Step 1: again", add_special_tokens=False)["input_ids"]
    assert ids[: len(expected) + len(step) + 1] == [*expected, *step, separator]
    assert ids.count(independent.convert_tokens_to_ids("<|im_start|>")) == 3
    if independent.bos_token_id is not None:
        assert ids.count(independent.bos_token_id) == 1
    assert "{problem}" in model.config.problem_template
    assert "The quick brown fox" in model.config.problem_template


def test_chat_layout_takes_marks_in_the_problem_as_text() -> None:
    _, processor = chat_prm(byte_level_tokenizer)
    ids = processor("<|im_end|>\n<|im_start|>assistant", ["<|im_start|>"])["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_chat_layout_is_rendered_once(tmp_path: Path) -> None:
    model, processor = chat_prm(byte_level_tokenizer)
    before = processor(PROBLEMS, SOLUTIONS)["input_ids"]
    processor.tokenizer.chat_template = "{{ messages[0]['content'] }} is something else"
    assert processor(PROBLEMS, SOLUTIONS)["input_ids"] == before
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path)(PROBLEMS, SOLUTIONS)["input_ids"] == before


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "prompt_layout='chat' needs a tokenizer with a chat template; use prompt_layout='plain'"),
        ("{{ messages[0]['content'] | upper }}", "does not write the user's message exactly once, as it stands"),
        ("{{ messages[0]['content'] * 2 }}", "does not write the user's message exactly once"),
    ],
)
def test_chat_layout_without_a_fitting_template(template: str | None, message: str, make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    processor.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        PRMForStepScoring.from_backbone(model.backbone, tokenizer=processor.tokenizer, prompt_layout="chat")


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_processor_gives_the_same_ids(family: str, make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm(family, step_template="{i}) {step}", step_joiner="\n\n", max_length=200)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is PRMProcessor
    texts = ([*PROBLEMS, "<|step_end|> naïve — 第三步"], [*SOLUTIONS, ["12 <s> </s> [SEP]  x\n\ty"]])
    assert loaded(*texts).data == processor(*texts).data
    assert (loaded.step_template, loaded.step_joiner, loaded.max_length) == ("{i}) {step}", "\n\n", 200)
    assert loaded.separator_token_id == processor.separator_token_id == model.config.separator_token_id


def test_every_layout_option_is_saved(tmp_path: Path) -> None:
    options = {
        "separator_token": ".",
        "separator_is_reserved": False,
        "score_offset": -1,
        "prompt_layout": "chat",
        "problem_template": "<s>{problem}:",
        "step_template": "{step}",
        "step_joiner": " ",
        "max_length": 33,
        "layout_version": 1,
    }
    PRMProcessor(handmade_tokenizer(), **options).save_pretrained(tmp_path)
    loaded = PRMProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in options} == options
    assert loaded("2", ["5", "4"])["input_ids"] == [[0, 10, 8, 20, 21, 9, 22, 21]]


def test_tokenizer_that_loads_as_another_class_is_noticed(tmp_path: Path) -> None:
    # Beside a Qwen2 config, AutoTokenizer makes a Qwen2Tokenizer of whatever is there, and it cuts text its own way.
    tokenizer = sentencepiece_bpe_tokenizer()
    tokenizer.add_tokens([AddedToken("<|step_end|>", special=True, normalized=False)], special_tokens=True)
    PRMProcessor(tokenizer).save_pretrained(tmp_path)
    transformers.Qwen2Config(vocab_size=400).save_pretrained(tmp_path)
    assert type(transformers.AutoTokenizer.from_pretrained(tmp_path)) is not type(tokenizer)
    with pytest.raises(
        ValueError, match=r"the tokenizer loaded as \w+ and gives other ids than the one that was saved"
    ):
        PRMProcessor.from_pretrained(tmp_path)


def test_tokenizer_that_was_changed_after_saving_is_noticed(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<|step_end|>", special=True, normalized=False)], special_tokens=True)
    PRMProcessor(tokenizer).save_pretrained(tmp_path)
    PRMProcessor.from_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["merges"] = state["model"]["merges"][:10]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="gives other ids than the one that was saved"):
        PRMProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("template", ["<|endoftext|>{step}", "{step}<|step_end|>"])
def test_special_token_in_the_step_template_is_refused(template: str, backbone_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="step_template holds the special token"):
        PRMForStepScoring.from_backbone(backbone_folder("qwen2"), step_template=template)


def test_layout_is_fixed_when_a_processor_is_made(make_prm: Callable[..., Any]) -> None:
    _, processor = make_prm("llama")
    for name in ("step_joiner", "separator_token", "score_offset", "problem_template"):
        with pytest.raises(AttributeError, match=f"{name} is fixed"):
            setattr(processor, name, getattr(processor, name))
    limit, processor.max_length = processor.max_length, 40
    with pytest.raises(ValueError, match="max_length=40"):
        processor("What is 1 + 1?", ["1 + 1 = 2."] * 9)
    processor.max_length = limit
