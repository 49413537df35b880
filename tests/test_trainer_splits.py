"""Splitting by problem."""

import pytest
from datasets import Dataset, DatasetDict

from trainer.splits import split_by_problem


def make(problems: list[str]) -> Dataset:
    return Dataset.from_dict({"problem": problems, "row": list(range(len(problems)))})


def test_every_solution_of_a_problem_is_on_one_side() -> None:
    dataset = make([f"problem {index % 10}" for index in range(40)])
    train, held_out = split_by_problem(dataset, 0.3, seed=0)
    # 0.3 of 10 distinct problems are 3, with 4 solutions each.
    assert (len(train), len(held_out)) == (28, 12)
    assert len(set(held_out["problem"])) == 3
    assert not set(train["problem"]) & set(held_out["problem"])
    assert sorted([*train["row"], *held_out["row"]]) == list(range(40))
    assert list(train["row"]) == sorted(train["row"])


def test_problems_that_differ_in_case_and_whitespace_are_one() -> None:
    # Four distinct problems, so 0.25 holds out exactly one, with all its spellings.
    dataset = make(["Find  X.", "find x.", " FIND\nx. ", "b", "B", "c", "d"])
    for seed in range(8):
        train, held_out = split_by_problem(dataset, 0.25, seed=seed)
        keys = [{" ".join(text.split()).lower() for text in side["problem"]} for side in (train, held_out)]
        assert len(keys[1]) == 1
        assert not keys[0] & keys[1]


def test_split_depends_on_the_seed_and_not_on_the_order_or_number_of_rows() -> None:
    problems = [f"problem {index}" for index in range(20)]
    held_out = set(split_by_problem(make(problems), 0.2, seed=1)[1]["problem"])
    again = set(split_by_problem(make(problems[::-1] + problems[:5]), 0.2, seed=1)[1]["problem"])
    assert again == held_out
    others = [set(split_by_problem(make(problems), 0.2, seed=seed)[1]["problem"]) for seed in range(2, 6)]
    assert any(other != held_out for other in others)


def test_split_is_the_same_on_every_platform() -> None:
    # SHA-256 of "0\na", "0\nb", "0\nc", "0\nd" begins 0d3b, 3e27, efc7, 0caa: d comes first.
    assert split_by_problem(make(["a", "b", "c", "d"]), 0.25, seed=0)[1]["problem"][:] == ["d"]


@pytest.mark.parametrize(("problems", "fraction"), [(["a"], 0.5), (["a", "b", "c"], 0.1), (["a", "b"], 0.9)])
def test_an_empty_side_is_refused(problems: list[str], fraction: float) -> None:
    with pytest.raises(ValueError, match=f"of {len(problems)} distinct problems holds out"):
        split_by_problem(make(problems), fraction, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_fraction_must_be_a_share(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must be between 0 and 1"):
        split_by_problem(make(["a", "b"]), fraction, seed=0)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="a column 'problem' is needed, got"):
        split_by_problem(Dataset.from_dict({"prompt": ["a", "b"]}), 0.5, seed=0)
    with pytest.raises(TypeError, match="got DatasetDict"):
        split_by_problem(DatasetDict(), 0.5, seed=0)
    with pytest.raises(TypeError, match="seed must be an int, got float"):
        split_by_problem(make(["a", "b"]), 0.5, seed=0.5)  # type: ignore[arg-type]


def test_versions_of_one_problem_stay_together_even_through_others() -> None:
    # "c" is a version of "b", "b" of "a", and "A " is "a" again: one family of 4 rows. The other 6 stand alone.
    problems = ["a", "b", "c", "A ", "d", "e", "f", "g", "h", "i"]
    groups = [None, "a", "b", None, "d", None, "f", "g", None, "i"]
    rows = [{"problem": p, "problem_group": g, "row": i} for i, (p, g) in enumerate(zip(problems, groups, strict=True))]
    dataset = Dataset.from_list(rows)
    sides = set()
    for seed in range(20):
        train, held_out = split_by_problem(dataset, 3 / 7, seed=seed)
        family_on_train = {0, 1, 2, 3} & set(train["row"])
        assert family_on_train in (set(), {0, 1, 2, 3})
        assert len(held_out) == (3 if family_on_train else 6)
        sides.add(bool(family_on_train))
    assert sides == {True, False}
