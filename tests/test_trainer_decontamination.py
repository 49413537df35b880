"""Problems shared between training and evaluation: what counts as an overlap, and what is left of the training set."""

from __future__ import annotations

import json
import logging
import string
from pathlib import Path

import pytest
from datasets import Dataset

from trainer.arguments import DataArguments
from trainer.decontamination import (
    NGRAM_WORDS,
    Overlap,
    OverlapIndex,
    decontaminate,
    read_problem_texts,
    word_ngrams,
)
from trainer.preparation import RECORD_NUMBER
from trainer.train import load_data

LETTERS = list(string.ascii_lowercase)
THIRTEEN = " ".join(LETTERS[:13])


def dataset(*problems: str, groups: list[str | None] | None = None) -> Dataset:
    columns = {"problem": list(problems), "steps": [["s"]] * len(problems), "labels": [[1.0]] * len(problems)}
    return Dataset.from_dict(columns | ({} if groups is None else {"problem_group": groups}))


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_not() -> None:
    assert NGRAM_WORDS == 13
    index = OverlapIndex(["something else", f"Given: {THIRTEEN}, find x!"])
    assert index.find(f"y {THIRTEEN.upper().replace(' ', ', ')} z") == Overlap(reference=1, words=THIRTEEN)
    assert index.find(" ".join(["y", *LETTERS[:12], "z"])) is None
    assert index.find(" ".join([*LETTERS[:6], "q", *LETTERS[6:13]])) is None


def test_short_problems_overlap_where_they_are_equal() -> None:
    index = OverlapIndex(["What is 2 + 3?", "What is 2+4?"])
    assert index.find(" what  is 2 + 3? ") == Overlap(reference=0, words=None)
    assert index.find("What is 2 - 3?") is None, "signs tell short problems apart"
    assert index.find("Say: what is 2 + 3?") is None
    assert OverlapIndex(["What is 2 + 3?"], ngram=3).find("So what is 2 * 7?") == Overlap(
        reference=0, words="what is 2"
    )


def test_words() -> None:
    assert list(word_ngrams("A $b_1$, 3.5!", 2)) == ["a b_1", "b_1 3", "3 5"]
    assert list(word_ngrams("\uff21\ufb01 x", 2)) == ["afi x"]  # full width and ligature
    assert list(word_ngrams("求x的值", 4)) == ["求 x 的 值"]
    assert list(word_ngrams("a b", 3)) == []
    with pytest.raises(ValueError, match="at least 1 word, got 0"):
        OverlapIndex([], ngram=0)


def test_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    train = dataset("p", "q", "P ", f"new {THIRTEEN}", "r", groups=["own", None, None, None, "e"])
    test = ["p", f"old {THIRTEEN}", "s", "E"]
    with caplog.at_level(logging.INFO):
        left, removed = decontaminate(train, test)
    assert left["problem"][:] == ["q"]
    assert removed == [0, 2, 3, 4]  # the last by what it is a version of
    assert (
        "left out 4 of 5 solutions, of 4 problems that are also in the evaluation set (3 equal, the others share 13 "
        "words in a row)"
    ) in caplog.text
    same, nothing = decontaminate(train, ["other"])
    assert (same["problem"][:], nothing) == (train["problem"][:], [])
    with pytest.raises(ValueError, match="all 1 solutions are of problems that the evaluation set holds"):
        decontaminate(dataset("p"), test)


def test_one_version_of_a_problem_takes_the_others_with_it() -> None:
    train = dataset("worded so", "worded otherwise", "q", "r", groups=["p1", "p1", "p2", None])
    left, removed = decontaminate(train, ["worded so"])
    assert (left["problem"][:], removed) == (["q", "r"], [0, 1])


def test_problems_of_evaluation_sets_of_many_forms(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"question": "gsm8k", "answer": "#### 1"},
        {"problem": "processbench", "label": 0},
        {"question": {"problem": "prm800k"}},
        {"prompt": "trl"},
        {"original_question": "before", "modified_question": "after", "question": "before"},
        {"problem": "trl"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_problem_texts(file) == ["gsm8k", "processbench", "prm800k", "trl", "before", "after"]
    for bad, message in (("[1]", "has no problem"), ('{"a": 1}', "needs one of problem, question"), ("{", "not JSON")):
        file.write_text(f'{{"problem": "p"}}\n{bad}\n', encoding="utf-8")
        with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{message}"):
            read_problem_texts(file)
    file.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no rows"):
        read_problem_texts(file)
    with pytest.raises(ValueError, match="give a split too"):
        read_problem_texts("owner/name")


def test_the_option_of_training(tmp_path: Path) -> None:
    def write(name: str, *problems: str) -> str:
        rows = [{"problem": problem, "steps": ["a"], "labels": [1]} for problem in problems]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    train, one, two = write("train.jsonl", "a?", "b?", "c?", "d?", "e?"), write("1.jsonl", "A?"), write("2.jsonl", "d?")
    train_set, _ = load_data(DataArguments([train], decontaminate_against=[one, two]), seed=0)
    assert train_set["problem"][:] == ["b?", "c?", "e?"]
    train_set, held_out = load_data(DataArguments([train], decontaminate_against=[one], eval_fraction=0.25), seed=0)
    assert isinstance(held_out, Dataset)
    assert sorted([*train_set["problem"], *held_out["problem"]]) == ["b?", "c?", "d?", "e?"]
    numbers = {row["problem"]: row[RECORD_NUMBER] for part in (train_set, held_out) for row in part}
    assert numbers == {"b?": 1, "c?": 2, "d?": 3, "e?": 4}, "records keep the numbers that they have in the file"
    with pytest.raises(ValueError, match="leave --streaming out"):
        DataArguments([train], decontaminate_against=[one], streaming=True)
