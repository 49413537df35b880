"""Model cards: metadata that the Hub reads, snippets that run, and text of others that stays text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from clean_process import run_clean
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny_models import byte_level_tokenizer
from transformers import AutoModel, BloomConfig, BloomModel

from hub_card import CardData, EvaluationResult, Picture
from hub_card.card import TAGS, cell, code_span, escape, fenced, python_literal, render_card
from hub_card.publishing import write_repository
from modeling_prm import PRMForStepScoring

MakePRM = Callable[..., tuple[Any, Any]]
CLASSES = {"num_labels": 3, "class_weights": [1.0, 0.5, 0.0]}
CHAT_TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def prms(make_prm: MakePRM, backbone_folder: Callable[[str], Path]) -> dict[str, tuple[Any, Any]]:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    backbone = AutoModel.from_pretrained(backbone_folder("qwen3"))
    chat = PRMForStepScoring.from_backbone(backbone, tokenizer=tokenizer, prompt_layout="chat", head_type="mlp")
    # With ALiBi there are no positions to run out of.
    torch.manual_seed(0)
    endless = BloomModel(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=400))
    unlimited = PRMForStepScoring.from_backbone(endless, tokenizer=byte_level_tokenizer())
    return {
        "plain": make_prm("llama"),
        "classes": make_prm("qwen2", **CLASSES),
        "chat": chat,
        "bidirectional": make_prm("bert", max_length=120, aggregation="product"),
        "no max_length": unlimited,
    }


def render(prm: tuple[Any, Any], data: CardData | None = None, **options: Any) -> str:
    settings: dict[str, Any] = {"repo_id": "user/name", "code": {"a.py": "0" * 64}, "pictures": {}}
    return render_card(data or CardData(), *prm, **(settings | options))


# ---- what a reader finds ------------------------------------------------------------------------------


def test_a_card_says_what_its_model_needs(prms: dict[str, tuple[Any, Any]]) -> None:
    cards = {name: render(prm) for name, prm in prms.items()}
    model, processor = prms["plain"]
    assert "| Backbone | `llama` |" in cards["plain"]
    assert "| Head | one linear layer, 1 logit a step, float32 |" in cards["plain"]
    # By hand: embeddings of 361 tokens and two layers of width 32, with 2 of 4 heads' keys and values; norms; head.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    rows = model.get_input_embeddings().weight.shape[0]
    assert f"| Parameters | {rows * 32 + 2 * layer + 32 + 33:,}, saved in float32 |" in cards["plain"]
    assert "at most 256 tokens, problem and solution together; a longer one raises an error" in cards["plain"]
    assert f"the separator `<\\|step_end\\|>`, id {processor.separator_token_id} |" in cards["plain"]
    assert "The default aggregation is `min`." in cards["plain"]
    assert "| Head | one linear layer, 3 classes a step, float32 |" in cards["classes"]
    assert "| Head | two linear layers with a ReLU between, 1 logit a step, float32 |" in cards["chat"]
    assert r"| Problem | `'<\|endoftext\|>user\n{problem}\nassistant:'` |" in cards["chat"]
    assert "| Reads | at most 120 tokens" in cards["bidirectional"]
    assert "The default aggregation is `product`." in cards["bidirectional"]
    assert "| Reads | any length |" in cards["no max_length"]
    told = {name: "The backbone is bidirectional: a step's score depends on" in card for name, card in cards.items()}
    assert told == {name: name == "bidirectional" for name in cards}


def test_a_card_says_how_probabilities_and_first_errors_are_made(prms: dict[str, tuple[Any, Any]]) -> None:
    model, processor = prms["plain"]
    plain = render((model, processor))
    assert "divided by the temperature" not in plain
    assert "`first_error` is the first step with a probability below 0.5, where" in plain
    model.config.temperature, model.config.error_threshold = 1.25, 0.3125
    try:
        card = render((model, processor))
    finally:
        model.config.temperature, model.config.error_threshold = 1.0, 0.5
    assert "the sigmoid of its logit divided by the temperature 1.25. `first_error` is the first step with" in card
    assert "a probability below 0.3125, where no other threshold is given." in card


def test_the_example_written_out_is_what_the_processor_writes(prms: dict[str, tuple[Any, Any]]) -> None:
    """Byte-level tokenizers give their text back, so it can be written by hand."""
    data = CardData(example_problem="1 + 2 + 1?", example_steps=("1 + 2 = 3.", "3 + 1 = 4."))
    written = "1 + 2 + 1?\n\nStep 1: 1 + 2 = 3.<|step_end|>\nStep 2: 3 + 1 = 4.<|step_end|>\n```"
    card = render(prms["classes"], data)
    assert f"```text\nProblem: {written}" in card
    positions = re.search(r"at `step_positions` \[(\d+), (\d+)\]", card)
    processor = prms["classes"][1]
    ids = processor(data.example_problem, list(data.example_steps))["input_ids"][0]
    assert [ids[int(position)] for position in positions.groups()] == [processor.separator_token_id] * 2
    assert f"```text\n<|endoftext|>user\n{data.example_problem}" in render(prms["chat"], data)


def test_an_example_that_does_not_fit_is_named(prms: dict[str, tuple[Any, Any]]) -> None:
    data = CardData(example_problem="1 + 1? " * 100)
    with pytest.raises(ValueError, match=r"card's example cannot be written \(.*\); give a shorter example_problem"):
        render(prms["bidirectional"], data)


def test_everything_the_author_knows_is_on_the_card(prms: dict[str, tuple[Any, Any]]) -> None:
    data = CardData(
        title="A PRM of sums",
        description="For sums.",
        base_model="org/base",
        datasets=("org/steps", "our own"),
        license="mit",
        languages=("en", "fr"),
        training={"learning_rate": 1e-05, "freeze_backbone": False},
        results=(EvaluationResult(dataset="sums", metrics={"roc_auc": 0.98765, "num_steps": 12345}, note="Once."),),
        limits=("Sums alone.",),
        citation="@misc{x, title={X}}",
    )
    card = render(prms["plain"], data, pictures={"pictures/1-a.png": "Calibration"})
    for part in (
        "# A PRM of sums\n",
        "\n\nFor sums.\n",
        "| Backbone | `llama`, from `org/base` |",
        "| Training data | `org/steps`, `our own` |",
        "| Licence of the weights | mit |",
        "| learning\\_rate | 1e-05 |\n| freeze\\_backbone | False |",
        "### sums\n\n| | |\n| --- | --- |\n| ROC AUC | 0.9877 |\n| Labelled steps | 12,345 |\n\nOnce.\n",
        "![Calibration](pictures/1-a.png)\n\nCalibration\n",
        "\n- Sums alone.\n",
        "```bibtex\n@misc{x, title={X}}\n```",
        "The weights are under mit.",
        f"| `a.py` | `{'0' * 64}` |",
    ):
        assert part in card, part
    bare = render(prms["plain"])
    assert not [name for name in ("## Training", "## Results", "## Citation", "Training data", "![") if name in bare]
    assert "| Licence of the weights | not stated |" in bare


def test_the_commit_to_pin_is_in_snippets_and_advice(prms: dict[str, tuple[Any, Any]]) -> None:
    sha = "0123456789abcdef0123456789abcdef01234567"
    card = render(prms["plain"], commit=sha, branch="dev")
    assert f'source, revision = "user/name", "{sha}"\n' in card
    assert f'pipeline("step-scoring", model="user/name", revision="{sha}", trust_remote_code=True)' in card
    assert f'`revision="{sha}"` is the one with this model and this code' in card
    assert (card.count(sha), card.count('"dev"')) == (3, 0)
    unpinned = render(prms["plain"], branch="dev")
    assert unpinned.count('"dev"') == 2
    assert "by its full hash, as `revision=...`; a branch can move" in unpinned


# ---- metadata --------------------------------------------------------------------------------------


def test_metadata_is_read_by_huggingface_hub(prms: dict[str, tuple[Any, Any]]) -> None:
    results = (
        EvaluationResult(
            dataset="Sums",
            dataset_id="org/sums",
            split="test",
            metrics={"roc_auc": 0.75, "custom": 2, "bad": float("nan")},
        ),
        EvaluationResult(dataset="held-out problems", metrics={"brier": 0.125}),
    )
    data = CardData(
        title="T", base_model="org/base", datasets=("a/b", "c"), license="mit", languages=("en",), results=results
    )
    found = ModelCard(render(prms["plain"], data)).data
    assert found.tags == list(TAGS) == ["prm", "process-reward-model", "step-scoring"]
    assert (found.base_model, found.datasets, found.license, found.language) == (
        "org/base",
        ["a/b", "c"],
        "mit",
        ["en"],
    )
    assert (found.library_name, found.pipeline_tag, found.model_name) == ("transformers", "token-classification", "T")
    read = [
        (r.dataset_name, r.dataset_type, r.dataset_split, r.metric_type, r.metric_name, r.metric_value)
        for r in found.eval_results
    ]
    assert read == [
        ("Sums", "org/sums", "test", "roc_auc", "ROC AUC", 0.75),
        ("Sums", "org/sums", "test", "custom", "custom", 2.0),
        ("held-out problems", "held-out problems", None, "brier", "Brier score", 0.125),
    ]
    bare = ModelCard(render(prms["plain"])).data.to_dict()
    assert bare == {"library_name": "transformers", "pipeline_tag": "token-classification", "tags": list(TAGS)}


# ---- snippets --------------------------------------------------------------------------------------

RUN_SNIPPETS = """
import contextlib, io, os
result = {}
for name, root in arguments.items():
    os.chdir(root)  # where user/name is the folder of the saved model
    text = open("user/name/README.md", encoding="utf-8").read()
    snippets = [block.split("```")[0] for block in text.split("```python\\n")[1:]]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for snippet in snippets:
            exec(snippet, {})
    result[name] = [len(snippets), printed.getvalue()]
"""


def test_snippets_run_as_they_stand(prms: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    """With quotes, backslashes and fences in the example, which they hold as Python."""
    hard = ("1 + \"2\" '3' \\n ``` '''", "\\", "so\n```\n# 4 \u2028 é")
    data = {name: CardData() for name in prms} | {"classes": CardData(example_problem=hard[0], example_steps=hard[1:])}
    for name, (model, processor) in prms.items():
        folder = tmp_path / name / "user" / "name"
        folder.mkdir(parents=True)
        write_repository(model, processor, folder, card=data[name], repo_id="user/name")
    arguments = {name: str(tmp_path / name) for name in prms}
    printed = run_clean(RUN_SNIPPETS, folder=tmp_path / "process", arguments=arguments)
    for name, (model, processor) in prms.items():
        problem, steps = data[name].example_problem, list(data[name].example_steps)
        verifier = model.verifier(processor)
        score = verifier.score_solution(problem, steps)
        number, text = printed[name]
        lines = text.splitlines()
        assert number == 2
        assert text.startswith(f"{score}\n")
        shown = next(line for line in lines if line.startswith("(") and line.endswith(str(score.first_error)))
        probs, overall = shown.rsplit(" ", 2)[:2]
        assert ast.literal_eval(probs) == pytest.approx(score.step_probs, abs=1e-6)
        assert float(overall) == pytest.approx(score.overall_score, abs=1e-6)
        ranked = verifier.rank_solutions(problem, [steps, steps[:-1]])
        assert str([solution.solution_idx for solution in ranked]) in lines
        assert len(lines[-1]) > 20  # the pipeline's answer


def test_pictures_are_copied_under_names_that_are_safe(prms: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    (tmp_path / "a (1)](x) <b>.PNG").write_bytes(b"first")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "loss.png").write_bytes(b"second")
    (tmp_path / "loss.png").write_bytes(b"third")
    paths = ("a (1)](x) <b>.PNG", "other/loss.png", "loss.png")
    pictures = tuple(Picture(path=str(tmp_path / path), caption=f"No. {i}") for i, path in enumerate(paths))
    (tmp_path / "repo").mkdir()
    write_repository(*prms["plain"], tmp_path / "repo", card=CardData(pictures=pictures), repo_id="user/name")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "repo" / "pictures").iterdir()}
    assert copied == {"1-a-1-x-b-.png": b"first", "2-loss.png": b"second", "3-loss.png": b"third"}
    card = (tmp_path / "repo" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card
    sources = [attributes["src"] for tag, attributes in rendered(card).tags if tag == "img"]
    assert sources == [f"pictures/{name}" for name in sorted(copied)]


# ---- text of others --------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "<script\nsrc=//evil.example\n>\n</script\n>",
    "<div\nonclick=alert(1)\n",
    "a | b | c",
    "x\\|<script>alert(1)</script>",
    "x\\\\|<img src=x onerror=alert(1)>|\\",
    "```\n# heading\n```\n~~~",
    "`tick` ``two`` ```three``` `",
    "---\nlicense: evil\n---\n# heading",
    "text\r# heading\r\r- item\r---\r<b>bold</b>",
    "# heading\n\n## another\n===\n---",
    "![picture](http://evil/x.png) [link](javascript:alert(1)) [ref]: http://evil <http://evil>",
    "1. one\n2) two\n+ plus\n* star\n- dash\n> quote\n    code",
    "{{ config }} {% for x in y %}{% endraw %}{# x #}",
    "key: [unclosed, &anchor *alias !!python/object/apply:os.system ['x'] # no comment",
    "<!-- comment\n\n--> &lt;script&gt; &amp; &#60;b&#62;",
    "$x$ ~~strike~~ _em_ **strong** \\",
    "| --- | --- |\n| a | b |",
    "' \" ''' \"\"\" \\n \\",
    "\u2028# heading\u2029\x0b- item\x85é 四 🙂",
]


class Rendered(HTMLParser):
    """A card as a browser has it: its tags, and the text of each cell, each heading and the whole."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.headings: list[str] = []
        self._in_cell = self._in_heading = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
            self._in_heading = True
        if tag == "td":
            self.cells.append("")
            self._in_cell = True

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.cells[-1] += data
        if self._in_heading:
            self.headings[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag != "td"
        self._in_heading = self._in_heading and tag not in ("h1", "h2", "h3")

    def structure(self) -> list[str]:
        """The tags, but for paragraphs, of which a text may have several."""
        return [tag for tag, _ in self.tags if tag not in ("p", "br")]


def rendered(card: str) -> Rendered:
    """The card's body by an independent reader of Markdown, with HTML let through."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return Rendered(markdown.render(ModelCard(card).text))


def card_full_of(text: str) -> CardData:
    """The text in every place that takes one."""
    return CardData(
        title=text,
        description=text,
        base_model=text,
        datasets=(text, text),
        license=text,
        training={text: text},
        results=(EvaluationResult(dataset=text, split=text, metrics={text: 0.5}, note=text),),
        limits=(text,),
        citation=text,
        example_problem=text,
        example_steps=("So.",),
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_others_stays_text(prms: dict[str, tuple[Any, Any]], text: str) -> None:
    pictures = {"pictures/1-a.png": text}
    harmless = rendered(
        render(prms["classes"], card_full_of("plain words"), pictures=pictures | {"pictures/1-a.png": "x"})
    )
    card = render(prms["classes"], card_full_of(text), pictures=pictures)
    found = rendered(card)
    assert found.structure() == harmless.structure()
    # As it was written, in one line where the place has one.
    line = " ".join(text.split())
    assert found.headings[0] == line
    assert " ".join(f"{text}, {text}".split()) in found.headings  # data set and split of a result
    assert line in found.cells  # the name of a hyperparameter
    assert f"from {' '.join(text.splitlines())}" in " ".join(found.cells)
    for paragraph in text.splitlines():
        assert paragraph.strip() in found.text
    captions = [attributes for tag, attributes in found.tags if tag == "img"]
    assert captions == [{"src": "pictures/1-a.png", "alt": line}]
    data = ModelCard(card).data
    assert (data.base_model, data.datasets, data.license, data.model_name) == (text, [text, text], text, text)
    result = data.eval_results[0]
    assert (result.dataset_name, result.dataset_split, result.metric_type) == (text, text, text)


@pytest.mark.parametrize("text", HOSTILE)
def test_examples_are_python_that_gives_them_back(text: str) -> None:
    for value in (text, [text, "plain", text]):
        literal = python_literal(value)
        assert ast.literal_eval(literal) == value
        assert "```" not in literal
        assert "\n" not in literal


@pytest.mark.parametrize(
    ("function", "text", "expected"),
    [
        (escape, "plain words, 3.5 (so) - it's", "plain words, 3.5 (so) - it's"),
        (escape, "a_b*c", r"a\_b\*c"),
        (escape, "  - x\n2. y", "\\- x\n2\\. y"),
        (cell, " a\n b\t| c", r"a b \| c"),
        (cell, 1e-05, "1e-05"),
        (cell, 0.5, "0.5"),
        (escape, "3.\n4)\tx\n5.", "3\\.\n4\\)\tx\n5\\."),
        (code_span, "org/name", "`org/name`"),
        (code_span, "a`b", "``a`b``"),
        (code_span, "`", "`` ` ``"),
        (code_span, "a|b", r"`a\|b`"),
        (code_span, "a\\|<", "<code>a&#92;&#124;&#60;</code>"),
        (code_span, "", "` `"),
        (fenced, "a\n", "```text\na\n```"),
        (fenced, "a ````\n", "`````text\na ````\n`````"),
    ],
)
def test_markdown_as_it_is_written(function: Callable[[Any], str], text: Any, expected: str) -> None:
    assert function(text) == expected


# ---- data ------------------------------------------------------------------------------------------


def test_card_data_survives_its_file() -> None:
    data = CardData(
        title="é",
        datasets=("a", "b"),
        training={"lr": 0.1, "frozen": True},
        results=(EvaluationResult(dataset="x", metrics={"m": 0.5}, note="n"),),
        pictures=(Picture(path="p.png", caption="c"),),
        limits=("l",),
    )
    assert CardData.from_json(data.to_json()) == data
    assert CardData.from_json("{}") == CardData()
    assert json.loads(data.to_json())["results"][0]["metrics"] == {"m": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"titel": "x"}',
        '{"results": [{"dataset": "x"}]}',
        '{"results": [{"dataset": "x", "metrics": {"m": "0.5"}}]}',
        '{"datasets": "org/name"}',
        '{"datasets": [1]}',
        '{"limits": null}',
        '{"title": 5}',
        '{"description": null}',
        '{"pictures": ["x.png"]}',
    ],
)
def test_what_is_no_card_data_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not the data of a model card .*CardData says what it holds"):
        CardData.from_json(text)


def test_one_text_in_place_of_several_is_refused() -> None:
    with pytest.raises(TypeError, match="datasets must be a tuple of texts, got 'org/name'"):
        CardData(datasets="org/name")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the metric roc_auc of x must be a number, got 'high'"):
        EvaluationResult(dataset="x", metrics={"roc_auc": "high"})  # type: ignore[dict-item]
