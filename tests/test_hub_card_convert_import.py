from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_prms as pub
import pytest
import tiny_models
import torch
from clean_process import PROJECT, run_clean
from hub_stand_in import HubStandIn
from small_training import make_arguments, make_dataset
from transformers import AutoTokenizer

from hub_card import CardData, publish
from hub_card.convert import import_prm, main
from hub_card.publishing import write_repository
from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.sessions import open_session
from trainer.prm_trainer import PRMTrainer

PROBLEMS, SOLUTIONS = pub.PROBLEMS, pub.SOLUTIONS
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."

# What to write, what its documentation computes, and what to say when importing it.
Scores = Callable[[pub.Published, str, list[str]], tuple[list[int], list[float]]]
CASES: dict[str, tuple[Callable[[Path], pub.Published], Scores, dict[str, Any]]] = {
    "qwen2_prm": (
        pub.write_qwen2_prm,
        lambda prm, problem, steps: pub.qwen2_prm_scores(prm, problem, steps, QWEN_SYSTEM),
        {},
    ),
    "reasonflux": (
        pub.write_qwen2_prm,
        lambda prm, problem, steps: pub.qwen2_prm_scores(prm, problem, steps, None),
        {"layout": "reasonflux"},
    ),
    "math_shepherd": (
        lambda folder: pub.write_causal(folder, "mistral"),
        pub.math_shepherd_scores,
        {"layout": "math_shepherd"},
    ),
    "rlhflow": (lambda folder: pub.write_causal(folder, "llama"), pub.rlhflow_scores, {"layout": "rlhflow"}),
    "skywork": (pub.write_skywork, pub.skywork_scores, {}),
    "trl": (
        lambda folder: pub.write_token_classification(folder, 2, pub.qwen_tokenizer()),
        lambda prm, problem, steps: pub.trl_scores(prm, problem, steps, "\n\n"),
        {"separator": "\n\n"},
    ),
    "trl_text": (
        lambda folder: pub.write_token_classification(folder, 2, pub.qwen_tokenizer()),
        lambda prm, problem, steps: pub.pipeline_scores(prm, problem, steps, "\n\n"),
        {"separator": "\n\n", "layout": "token_classification_text"},
    ),
    # The line end is two tokens of this tokenizer, and it has a first token.
    "trl_llama": (
        lambda folder: pub.write_token_classification(folder, 2, pub.mistral_tokenizer(), "llama"),
        lambda prm, problem, steps: pub.trl_scores(prm, problem, steps, "\n"),
        {"separator": "\n"},
    ),
    # As a text this is the token of a word, and another token has it for its name.
    "trl_plus": (
        lambda folder: pub.write_token_classification(folder, 2, pub.mistral_tokenizer(), "llama"),
        lambda prm, problem, steps: pub.trl_scores(prm, problem, steps, "+"),
        {"separator": "+"},
    ),
    "pure": (
        lambda folder: pub.write_token_classification(folder, 2, pub.qwen_tokenizer()),
        lambda prm, problem, steps: pub.trl_scores(prm, problem, steps, "\n"),
        {"separator": "\n"},
    ),
    "scan": (
        lambda folder: pub.write_token_classification(folder, 1, pub.qwen_tokenizer()),
        lambda prm, problem, steps: pub.trl_scores(prm, problem + "\n\n", steps, "\n\n"),
        {"separator": "\n\n", "problem_template": "{problem}\n\n"},
    ),
    **{
        f"reasoneval_{family}": (
            lambda folder, family=family: pub.write_reasoneval(folder, family),
            lambda prm, problem, steps, family=family: _validity(prm, problem, steps, family),
            {},
        )
        for family in ("mistral", "llama")
    },
}


def _validity(prm: pub.Published, problem: str, steps: list[str], family: str) -> tuple[list[int], list[float]]:
    ids, classes = pub.reasoneval_scores(prm, problem, steps, family)
    return ids, [neutral + right for _, neutral, right in classes]


@pytest.mark.parametrize("case", CASES)
def test_ids_and_scores_are_the_published_ones(case: str, tmp_path: Path) -> None:
    write, scores, options = CASES[case]
    published = write(tmp_path / "published")
    import_prm(tmp_path / "published", tmp_path / "ours", **options)
    model = PRMForStepScoring.from_pretrained(tmp_path / "ours")
    processor = PRMProcessor.from_pretrained(tmp_path / "ours")
    assert model.dtype == torch.float32

    expected = [scores(published, *pair) for pair in zip(PROBLEMS, SOLUTIONS, strict=True)]
    assert [len(probs) for _, probs in expected] == [2, 4, 1]
    spread = max(max(probs) for _, probs in expected) - min(min(probs) for _, probs in expected)
    assert spread > 0.05  # else any score would do

    for (ids, _), item in zip(expected, processor.encode(PROBLEMS, SOLUTIONS), strict=True):
        assert item.input_ids == ids[: len(item.input_ids)]
        # What the original's template writes after the last step is read by no score.
        assert processor.tokenizer.decode(ids[len(item.input_ids) :]).strip() in ("", "<|im_end|>", "<|eot_id|>")
    verifier = model.verifier(processor)
    batched = verifier.score_solutions(PROBLEMS, SOLUTIONS)
    for problem, steps, (_, probs), together in zip(PROBLEMS, SOLUTIONS, expected, batched, strict=True):
        assert together.step_probs == pytest.approx(probs, abs=1e-5)
        assert verifier.score_solution(problem, steps).step_probs == pytest.approx(probs, abs=1e-5)


def test_checkpoint_that_trl_saved() -> None:
    folder = Path(__file__).parent / "fixtures" / "trl_1.13.0"
    model, processor = import_prm(folder, separator="\n\n")
    rows = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert [len(row["step_probs"]) for row in rows] == [2, 3, 2, 1]
    verifier = model.verifier(processor)
    for row in rows:
        item = processor.encode([row["problem"]], [row["steps"]])[0]
        assert (item.input_ids, item.step_positions) == (row["input_ids"], row["step_positions"])
        result = verifier.score_solution(row["problem"], row["steps"])
        assert result.step_probs == pytest.approx(row["step_probs"], abs=1e-5)


def test_labels_in_the_other_order(tmp_path: Path) -> None:
    published = pub.write_token_classification(tmp_path, 2, pub.qwen_tokenizer())
    model, processor = import_prm(tmp_path, separator="\n", class_weights=[1, 0])
    result = model.verifier(processor).score_solution(PROBLEMS[0], SOLUTIONS[0])
    _, probs = pub.trl_scores(published, PROBLEMS[0], SOLUTIONS[0], "\n")
    assert model.config.num_labels == 1
    assert result.step_probs == pytest.approx([1 - prob for prob in probs], abs=1e-5)


def test_redundancy_of_three_classes(tmp_path: Path) -> None:
    published = pub.write_reasoneval(tmp_path, "llama")
    model, processor = import_prm(tmp_path, class_weights=[0, 1, 0])
    result = model.verifier(processor).score_solution(PROBLEMS[1], SOLUTIONS[1])
    _, classes = pub.reasoneval_scores(published, PROBLEMS[1], SOLUTIONS[1], "llama")
    assert result.step_probs == pytest.approx([neutral for _, neutral, _ in classes], abs=1e-5)


def test_special_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    pub.write_qwen2_prm(tmp_path)
    model, processor = import_prm(tmp_path)
    steps = ["Say <extra_0> and <|im_end|>.", "Then \n\n stop"]
    item = processor.encode(["Is <extra_0> a step?"], [steps])[0]
    assert item.input_ids.count(processor.separator_token_id) == 2
    assert [item.input_ids[i] for i in item.step_positions] == [processor.separator_token_id] * 2
    assert len(model.verifier(processor).score_solution("Is <extra_0> a step?", steps).step_probs) == 2


def test_a_step_that_begins_with_a_line_end_is_joined_as_the_original_joins_it(tmp_path: Path) -> None:
    published = pub.write_qwen2_prm(tmp_path)
    model, processor = import_prm(tmp_path)
    steps = ["\n\nFirst, 3.", "\nThen 4."]
    ids, probs = pub.qwen2_prm_scores(published, PROBLEMS[0], steps, QWEN_SYSTEM)
    item = processor.encode([PROBLEMS[0]], [steps])[0]
    assert item.input_ids == ids[: len(item.input_ids)]
    assert model.verifier(processor).score_solution(PROBLEMS[0], steps).step_probs == pytest.approx(probs, abs=1e-5)


def test_a_tag_in_the_problem_is_no_step(tmp_path: Path) -> None:
    pub.write_causal(tmp_path, "mistral")
    _, processor = import_prm(tmp_path, layout="math_shepherd")
    item = processor.encode(["What does ки mean?"], [["A tag.", "So ки it is"]])[0]
    tag = processor.separator_token_id
    assert item.input_ids.count(tag) == 4
    assert item.step_positions == [i for i, token in enumerate(item.input_ids) if token == tag][1::2]


def test_sharded_and_bfloat16(tmp_path: Path) -> None:
    published = pub.write_token_classification(tmp_path / "whole", 2, pub.qwen_tokenizer())
    published.model.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    published.tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    model, processor = import_prm(tmp_path / "shards", separator="\n")
    assert (model.backbone.dtype, model.value_head.out.weight.dtype) == (torch.bfloat16, torch.float32)
    model, processor = import_prm(tmp_path / "shards", separator="\n", dtype="float32")
    published = pub.load_token_classification(tmp_path / "shards")
    _, probs = pub.trl_scores(published, PROBLEMS[0], SOLUTIONS[0], "\n")
    result = model.verifier(processor).score_solution(PROBLEMS[0], SOLUTIONS[0])
    assert result.step_probs == pytest.approx(probs, abs=1e-5)


def test_recognized_by_name(tmp_path: Path) -> None:
    pub.write_causal(tmp_path / "math-shepherd-mistral-7b-prm", "mistral")
    model, _ = import_prm(tmp_path / "math-shepherd-mistral-7b-prm")
    assert model.config.separator_token == " ки"
    folder = tmp_path / "other"
    pub.write_token_classification(folder, 2, pub.qwen_tokenizer())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "jinachris/PURE-PRM-7B"}))
    model, _ = import_prm(folder)
    assert model.config.separator_token == "\n"
    assert not model.config.text_config.name_or_path


def test_tokenizer_that_auto_tokenizer_makes_another_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A Qwen2 config beside a tokenizer that cuts text as GPT-2's does: AutoTokenizer gives other ids."""
    tokenizer = tiny_models.byte_level_tokenizer()
    published = pub.write_token_classification(tmp_path, 2, tokenizer)
    # Numbers of two digits are one token to GPT-2's rule, two to Qwen's.
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("12 + 30")["input_ids"] != tokenizer("12 + 30")["input_ids"]
    model, processor = import_prm(tmp_path, tmp_path / "ours", separator="\n")
    processor = PRMProcessor.from_pretrained(tmp_path / "ours")
    result = model.verifier(processor).score_solution("What is 12 + 30?", ["12 + 30 = 42."])
    ids, probs = pub.trl_scores(published, "What is 12 + 30?", ["12 + 30 = 42."], "\n")
    assert processor.encode(["What is 12 + 30?"], [["12 + 30 = 42."]])[0].input_ids == ids
    assert result.step_probs == pytest.approx(probs, abs=1e-5)


def test_loads_in_a_clean_process(tmp_path: Path) -> None:
    """Separators of two tokens, none, and joined texts, in a process that has only the saved code."""
    folders = {}
    for case in ("math_shepherd", "reasoneval_mistral", "trl_llama", "qwen2_prm"):
        write, _, options = CASES[case]
        write(tmp_path / case)
        model, processor = import_prm(tmp_path / case, tmp_path / "ours" / case, **options)
        folders[str(tmp_path / "ours" / case)] = [
            list(result.step_probs) for result in model.verifier(processor).score_solutions(PROBLEMS, SOLUTIONS)
        ]
    code = """
from transformers import AutoModel, AutoProcessor
result = {}
for folder in arguments["folders"]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    scores = model.verifier(processor).score_solutions(arguments["problems"], arguments["solutions"])
    result[folder] = [list(score.step_probs) for score in scores]
"""
    arguments = {"folders": list(folders), "problems": PROBLEMS, "solutions": SOLUTIONS}
    found = run_clean(code, folder=tmp_path / "process", arguments=arguments)
    assert found.keys() == folders.keys()
    for folder, expected in folders.items():
        assert [pytest.approx(probs, abs=1e-6) for probs in expected] == found[folder]


def test_card_keeps_licence_and_base_model(tmp_path: Path) -> None:
    pub.write_causal(tmp_path / "published", "mistral")
    (tmp_path / "published" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: qwen\nlicense_link: here/LICENSE\n"
        "base_model: mistralai/Mistral-7B-v0.1\ndatasets: [a/b]\nlanguage: en\n---\n# Title\n"
    )
    (tmp_path / "published" / "LICENSE").write_text("MIT, as it stands")
    model, processor = import_prm(tmp_path / "published", tmp_path / "ours", layout="math_shepherd")
    card = CardData.from_json((tmp_path / "ours" / "card_data.json").read_text())
    assert (card.license, card.base_model, card.datasets) == ("other", "mistralai/Mistral-7B-v0.1", ("a/b",))
    assert card.languages == ("en",)
    assert card.description.startswith("Imported from published (layout math_shepherd)")
    assert card.description.endswith("Licence of the original: qwen here/LICENSE.")
    assert (tmp_path / "ours" / "LICENSE").read_text() == "MIT, as it stands"
    render = write_repository(model, processor, tmp_path / "repository", card=card, repo_id="user/name")
    assert "license: other" in render(None)


def test_trains_on(tmp_path: Path) -> None:
    """Labels reach the positions that the layout names, where nothing in the ids does."""
    pub.write_reasoneval(tmp_path, "mistral")
    model, processor = import_prm(tmp_path)
    inputs = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    labels = torch.full(inputs["step_positions"].shape, -100.0)
    labels[1, 2] = 2.0
    output = model.train()(**inputs, labels=labels)
    output.loss.backward()
    expected = -output.logits[1, 2].log_softmax(dim=-1)[2]
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert model.value_head.out.weight.grad.abs().sum() > 0


def test_sessions_training_and_publishing_take_an_imported_prm(tmp_path: Path) -> None:
    pub.write_causal(tmp_path / "published", "mistral")
    model, processor = import_prm(tmp_path / "published", layout="math_shepherd")
    verifier = model.verifier(processor)
    with open_session(verifier, PROBLEMS[1]) as session:
        beam = session.root
        for step in SOLUTIONS[1]:
            beam = session.extend(beam, step)
    assert beam.score is not None
    expected = verifier.score_solution(PROBLEMS[1], SOLUTIONS[1]).step_probs
    assert beam.score.step_probs == pytest.approx(expected, abs=1e-5)
    # Loads in a clean process and gives the same logits there.
    files = publish(model, processor, "user/name", dry_run=True).files
    assert {"joined_text.py", "model.safetensors", "README.md"} <= files.keys()
    before = model.value_head.out.weight.detach().clone()
    arguments = make_arguments(tmp_path / "run", sgd=True, per_device_train_batch_size=8)
    PRMTrainer(model=model, args=arguments, train_dataset=make_dataset(), processing_class=processor).train()
    assert not torch.equal(model.value_head.out.weight, before)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pub.write_token_classification(tmp_path / "published", 2, pub.qwen_tokenizer())
    main(["import", str(tmp_path / "published"), str(tmp_path / "ours"), "--separator", r"\n\n"])
    assert "(qwen2, linear head)" in capsys.readouterr().out
    assert PRMProcessor.from_pretrained(tmp_path / "ours").separator_token == "\n\n"
    with pytest.raises(SystemExit, match=r"error: .*not an empty folder"):
        main(["import", str(tmp_path / "published"), str(tmp_path / "ours"), "--separator", r"\n\n"])
    main(["export", str(tmp_path / "ours"), str(tmp_path / "served"), "--layout", "token_classification"])
    assert (tmp_path / "served" / "model.safetensors").is_file()


FROM_HUB = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from huggingface_hub import HfApi
from hub_card.convert import import_prm
HfApi().create_repo("user/Qwen2.5-Math-PRM-7B")
commit = HfApi().upload_folder(repo_id="user/Qwen2.5-Math-PRM-7B", folder_path=sys.argv[2])
HfApi().delete_file("config.json", "user/Qwen2.5-Math-PRM-7B")
model, processor = import_prm("user/Qwen2.5-Math-PRM-7B", sys.argv[3], revision=commit.oid)
result = model.verifier(processor).score_solution("What is 2 + 2?", ["2 + 2 = 4.", "So 4."])
try:
    import_prm("user/Qwen2.5-Math-PRM-7B")
except ValueError as error:
    print(json.dumps([result.step_probs, str(error)]))
"""


def test_from_a_hub_id_at_a_revision(tmp_path: Path) -> None:
    published = pub.write_qwen2_prm(tmp_path / "published")
    paths = json.dumps([str(PROJECT), str(PROJECT / "tests")])
    with HubStandIn() as hub:
        probs, error = hub.run(FROM_HUB, tmp_path / "home", paths, str(tmp_path / "published"), str(tmp_path / "ours"))
    _, expected = pub.qwen2_prm_scores(published, "What is 2 + 2?", ["2 + 2 = 4.", "So 4."], QWEN_SYSTEM)
    assert probs == pytest.approx(expected, abs=1e-5)
    assert "holds no checkpoint (no config.json)" in error
    card = CardData.from_json((tmp_path / "ours" / "card_data.json").read_text())
    assert card.base_model == "user/Qwen2.5-Math-PRM-7B"
