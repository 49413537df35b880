"""Steps from causal language models: where they end, what they cost, and that nothing else is touched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling_prm import PRMVerifier
from modeling_prm.search import beam_search, diverse_verifier_tree_search
from modeling_prm.step_generation import CausalLMStepGenerator, ProposedStep

PROBLEM = "What is 12 + 30?"


def language_model(family: str = "llama", positions: int = 256) -> tuple[Any, PreTrainedTokenizerBase]:
    """A random model of a family whose weights are large enough that its text depends on what it reads."""
    config, tokenizer = tiny_models.FAMILIES[family]
    options = config()
    options.max_position_embeddings = positions
    classes = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}
    torch.manual_seed(0)
    model = classes[family](options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    made = tokenizer()
    model.generation_config.eos_token_id = made.eos_token_id
    return model.eval(), made


class ScriptedLlama(LlamaForCausalLM):
    """Writes given ids, row by row, and end-of-sequence tokens after them."""

    def script(self, rows: list[list[int]]) -> ScriptedLlama:
        self.rows, self.seen = rows, 0
        return self

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        output = super().forward(input_ids, **kwargs)
        self.seen = 0 if input_ids.shape[1] > 1 else self.seen + 1
        output.logits = torch.full_like(output.logits, -1e4)
        for row, ids in enumerate(self.rows[: len(input_ids)]):
            output.logits[row, :, ids[self.seen] if self.seen < len(ids) else 0] = 0.0
        return output


def scripted(rows: list[list[int]], **options: Any) -> CausalLMStepGenerator:
    """A generator whose model writes the given ids; the first id of the tokenizer ends a solution."""
    tokenizer = tiny_models.byte_level_tokenizer()
    assert tokenizer.eos_token_id == 0
    model = ScriptedLlama(transformers.LlamaConfig(**tiny_models.DECODER)).script(rows)
    model.generation_config.eos_token_id = None
    return CausalLMStepGenerator(model, tokenizer, **options)


def ids_of(*pieces: str) -> list[int]:
    """Ids of pieces, each tokenized alone."""
    tokenizer = tiny_models.byte_level_tokenizer()
    return [token_id for piece in pieces for token_id in tokenizer(piece)["input_ids"]]


def test_a_step_ends_at_a_stop_string_however_it_is_cut_into_tokens() -> None:
    newline, blank = ids_of("\n"), ids_of("\n\n")
    assert len(newline) == 1
    assert len(blank) == 1
    four = ids_of("4")
    rows = [
        four + blank + ids_of("never read"),
        four + newline + newline + ids_of("never read"),
        # One line end ends nothing.
        four + newline + four + newline + newline,
        [*four, 0],
        [0],
        blank,
    ]
    proposals = scripted(rows, batch_size=6)("?", [()] * 6, 1)
    assert proposals == [
        [ProposedStep("4", 2, False)],
        [ProposedStep("4", 3, False)],
        [ProposedStep("4\n4", 5, False)],
        [ProposedStep("4", 2, True)],
        [ProposedStep("", 1, True)],
        [ProposedStep("", 1, False)],
    ]


def test_a_stop_string_within_a_token_ends_the_step_there() -> None:
    fox = ids_of(" fox")
    assert len(fox) == 1
    rows = [ids_of("the") + fox + ids_of("never")]
    # "the" is one token of this tokenizer or more; all of them and " fox" are counted.
    expected = ProposedStep("the f", len(ids_of("the")) + 1, False)
    assert scripted(rows, stop_strings=["ox"])("?", [()], 1) == [[expected]]
    # The first of several stop strings cuts.
    assert scripted(rows, stop_strings=["x", "fo"])("?", [()], 1)[0][0].text == "the"


def test_a_stop_string_of_bytes_ends_a_step_with_a_sentencepiece_tokenizer() -> None:
    tokenizer = tiny_models.sentencepiece_bpe_tokenizer()
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    four = tokenizer.convert_tokens_to_ids("4")
    model = ScriptedLlama(transformers.LlamaConfig(**tiny_models.DECODER)).script([[four, newline, newline, four]])
    generator = CausalLMStepGenerator(model, tokenizer)
    assert generator("?", [()], 1) == [[ProposedStep("4", 3, False)]]


def test_a_line_end_after_the_prompt_is_no_blank_line_with_it() -> None:
    newline = ids_of("\n")
    generator = scripted([newline + ids_of("4", "\n", "\n")])
    assert generator.prompt_template.endswith("\n")
    assert generator("?", [("1",)], 1) == [[ProposedStep("4", 4, False)]]


def test_a_special_token_may_end_steps() -> None:
    tokenizer = tiny_models.byte_level_tokenizer(eos_token="<|end|>", sep_token="<|step|>")
    model = ScriptedLlama(transformers.LlamaConfig(**tiny_models.DECODER))
    model.script([tokenizer("4\n\n5<|step|>6")["input_ids"]])
    generator = CausalLMStepGenerator(model, tokenizer, stop_strings=["<|step|>"], step_joiner="<|step|>")
    proposals = generator("?", [()], 1)
    assert [step.text for step in proposals[0]] == ["4\n\n5"]
    assert not proposals[0][0].is_final
    # In a prefix, the joiner is that token.
    assert generator.prompt_ids("?", ["4"])[-1] == tokenizer.sep_token_id


def test_every_end_of_sequence_token_of_the_model_ends_a_solution() -> None:
    generator = scripted([ids_of("4", "}", "never"), ids_of("5", "7", "never"), [*ids_of("6"), 0]])
    generator.model.generation_config.eos_token_id = [ids_of("}")[0], ids_of("7")[0]]
    generator = CausalLMStepGenerator(generator.model, generator.tokenizer)
    proposals = generator("?", [(), (), ()], 1)
    assert proposals == [[ProposedStep(text, 2, True)] for text in "456"]


def test_a_step_that_is_cut_is_blank_and_said(caplog: pytest.LogCaptureFixture) -> None:
    transformers.utils.logging.enable_propagation()
    try:
        proposals = scripted([ids_of("1", "2", "3"), ids_of("4", "\n", "\n")], max_step_tokens=3)("?", [(), ()], 1)
    finally:
        transformers.utils.logging.disable_propagation()
    assert proposals == [[ProposedStep("", 3, False)], [ProposedStep("4", 3, False)]]
    assert "1 of 2 proposals were cut within a step" in caplog.text


def test_a_callable_says_what_is_final() -> None:
    seen: list[list[str]] = []

    def is_final(steps: Sequence[str]) -> bool:
        seen.append(list(steps))
        return steps[-1] == "5"

    rows = [ids_of("4", "\n\n"), ids_of("5", "\n\n"), ids_of("\n\n")]
    proposals = scripted(rows, is_final=is_final)("?", [("1",), ("1",), ("1",)], 1)
    assert [step.is_final for own in proposals for step in own] == [False, True, False]
    assert seen == [["1", "4"], ["1", "5"]]


def test_the_default_prompt_and_the_steps_in_it() -> None:
    model, tokenizer = language_model("llama")
    generator = CausalLMStepGenerator(model, tokenizer)
    whole = tokenizer("Problem: What is 12 + 30?\n\n12 + 30 = 42.\n\nIt is (12).\n\n")["input_ids"]
    assert whole[0] == tokenizer.bos_token_id
    assert generator.prompt_ids(PROBLEM, ["12 + 30 = 42.", "It is (12)."]) == whole
    # A template that writes the BOS itself gets no second one.
    generator = CausalLMStepGenerator(model, tokenizer, prompt_template="<s>Q: {problem} {braces}\n", step_joiner="\n")
    expected = tokenizer("<s>Q: What is 12 + 30? {braces}\n4\n", add_special_tokens=False)["input_ids"]
    assert expected.count(tokenizer.bos_token_id) == 1
    assert generator.prompt_ids(PROBLEM, ["4"]) == expected


def test_the_chat_template_is_the_prompt_where_there_is_one() -> None:
    model, _ = language_model("llama")
    tokenizer = tiny_models.byte_level_tokenizer(eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    generator = CausalLMStepGenerator(model, tokenizer)
    messages = [{"role": "user", "content": PROBLEM}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert generator.prompt_ids(PROBLEM, []) == chat
    # The answer goes on with the steps, each with its joiner.
    rest = tokenizer("assistant\n12 + 30 = 42.\n\n", add_special_tokens=False)["input_ids"]
    start = len(tokenizer("assistant\n", add_special_tokens=False)["input_ids"])
    assert generator.prompt_ids(PROBLEM, ["12 + 30 = 42."]) == chat[:-start] + rest
    # A tokenizer that puts a BOS before texts puts none before a chat.
    llama = tiny_models.sentencepiece_bpe_tokenizer()
    llama.chat_template = "{% for m in messages %}User: {{ m.content }}\n{% endfor %}"
    ids = CausalLMStepGenerator(model, llama).prompt_ids(PROBLEM, [])
    assert ids == llama("User: What is 12 + 30?\n", add_special_tokens=False)["input_ids"]
    assert llama.bos_token_id not in ids
    # A template of one's own takes its place.
    generator = CausalLMStepGenerator(model, tokenizer, prompt_template="Q: {problem}\n")
    assert generator.prompt_ids(PROBLEM, []) == tokenizer("Q: What is 12 + 30?\n")["input_ids"]


def test_special_tokens_in_the_texts_of_users_are_plain_text() -> None:
    model, tokenizer = language_model("gpt2")
    template = "<|endoftext|>Problem: {problem}<|endoftext|>\n"
    generator = CausalLMStepGenerator(model, tokenizer, prompt_template=template)
    ids = generator.prompt_ids("Say <|endoftext|> twice", ["<|endoftext|>"])
    # Nothing of this stays behind in the tokenizer.
    assert tokenizer.backend_tokenizer.encode("<|endoftext|>").ids == [tokenizer.eos_token_id]
    plain = tokenizer("<|endoftext|>", split_special_tokens=True)["input_ids"]
    assert len(plain) > 1
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(ids) == ("<|endoftext|>Problem: Say <|endoftext|> twice<|endoftext|>\n<|endoftext|>\n\n")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_greedy_steps_are_those_of_each_prompt_alone(family: str, batch_size: int) -> None:
    model, tokenizer = language_model(family)
    prefixes = [(), ("12 + 30 = 42.",), ("It is (12) {x}.", "the quick brown fox jumps.")]
    generator = CausalLMStepGenerator(
        model, tokenizer, stop_strings=["e", "\n"], max_step_tokens=60, temperature=0.0, batch_size=batch_size
    )
    proposals = generator(PROBLEM, prefixes, 3)
    texts = []
    for prefix, own in zip(prefixes, proposals, strict=True):
        prompt = torch.tensor([generator.prompt_ids(PROBLEM, prefix)])
        alone = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=60,
            stop_strings=["e", "\n"],
            tokenizer=tokenizer,
            pad_token_id=0,
        )[0, prompt.shape[1] :]
        text = tokenizer.decode(alone, skip_special_tokens=True)
        ends = [place for place in (text.find("e"), text.find("\n")) if place >= 0]
        ended = bool(ends) or alone[-1] == tokenizer.eos_token_id
        expected = ProposedStep(
            text[: min(ends, default=len(text))].strip() if ended else "",
            len(alone),
            alone[-1].item() == tokenizer.eos_token_id,
        )
        assert own == [expected]
        texts.append(expected.text)
    # The prompts lead to different texts, so that a mixed-up row would show.
    assert len(set(texts)) == 3


def sampling_generator(**options: Any) -> CausalLMStepGenerator:
    model, tokenizer = language_model("llama")
    options = {"stop_strings": ["e", "\n"], "max_step_tokens": 60, "temperature": 1.0, **options}
    return CausalLMStepGenerator(model, tokenizer, **options)


def test_the_same_call_gives_the_same_proposals_and_another_seed_others() -> None:
    generator = sampling_generator()
    prefixes = [(), ("12 + 30 = 42.",)]
    first = generator(PROBLEM, prefixes, 4)
    assert [len(own) for own in first] == [4, 4]
    assert len({step.text for own in first for step in own}) > 2
    generator("Another problem", [()], 2)
    torch.manual_seed(123)
    assert generator(PROBLEM, prefixes, 4) == first
    assert sampling_generator()(PROBLEM, prefixes, 4) == first
    assert sampling_generator(seed=1)(PROBLEM, prefixes, 4) != first
    # A small nucleus leaves the likeliest token alone, which is greedy.
    nucleus = sampling_generator(top_p=1e-6)(PROBLEM, [()], 2)[0]
    assert nucleus == sampling_generator(temperature=0.0)(PROBLEM, [()], 1)[0] * 2
    assert sampling_generator(temperature=100.0)(PROBLEM, prefixes, 4) != first


def test_modes_random_states_and_tokenizer_stay_as_they_were() -> None:
    model, tokenizer = language_model("llama")
    tokenizer.padding_side = "right"
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    generation = model.generation_config.to_dict()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    generator = CausalLMStepGenerator(model, tokenizer, stop_strings=["e", "\n"], max_step_tokens=30)
    # The prompts differ in length, so one of them is padded.
    generator(PROBLEM, [(), ("12 + 30 = 42.",)], 2)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token is None
    assert model.generation_config.to_dict() == generation


def test_dropout_is_off_while_a_model_in_training_generates() -> None:
    model, tokenizer = language_model("gpt2")
    options = {"stop_strings": ["e", "\n"], "max_step_tokens": 60, "temperature": 0.0}
    expected = CausalLMStepGenerator(model, tokenizer, **options)(PROBLEM, [()], 1)
    model.train()
    assert CausalLMStepGenerator(model, tokenizer, **options)(PROBLEM, [()], 1) == expected


def test_prompts_that_reach_the_last_position() -> None:
    newline, four = ids_of("\n"), ids_of("4")
    generator = scripted([four * 3 + newline * 2, four * 3 + newline * 2], batch_size=2)
    empty = len(generator.prompt_ids("?", ["4"]))
    assert generator._max_positions == 256
    filler = next(text for count in range(400) if len(generator.prompt_ids("?", [text := "4 " * count + "4"])) >= 252)
    length = len(generator.prompt_ids("?", [filler]))
    assert empty < length < 256
    # Room for 256 - length < 5 tokens in one row, for all 5 in the other; in one batch the short one would be
    # cut short with it, or the long one read past the positions.
    short, long = generator("?", [("4",), (filler,)], 1)
    assert short == [ProposedStep("444", 5, False)]
    assert long == [ProposedStep("", 256 - length, False)]
    # No room at all: no proposal. A problem without room is an error.
    overlong = "4 " * 300
    assert generator("?", [(overlong,), ("4",)], 1) == [[], [ProposedStep("444", 5, False)]]
    with pytest.raises(ValueError, match="tokens and the model reads 256, so no step fits"):
        generator(overlong, [()], 1)


@pytest.mark.parametrize("search", [beam_search, diverse_verifier_tree_search])
def test_searches_run_end_to_end_with_a_language_model_and_a_prm(search: Any, make_prm: Any) -> None:
    verifier = PRMVerifier(*make_prm("llama"))

    def run() -> Any:
        # Tokens are short here, so the solutions soon fill the 256 positions of both models.
        return search(PROBLEM, sampling_generator(), verifier, expansions=2, max_steps=4, max_tokens=1500)

    result = run()
    assert result == run()
    assert result.num_rounds > 1
    assert 0 < result.num_generated_tokens <= 1500
    assert result.best is not None
    # The scores are those that the verifier gives to the same steps at once, to float32's rounding.
    for score in result.solutions:
        again = verifier.score_solution(PROBLEM, score.steps)
        assert score.step_probs == pytest.approx(again.step_probs, abs=1e-5)
        assert score.overall_score == pytest.approx(again.overall_score, abs=1e-5)
    for flag in (True, False):
        own = [s.overall_score for s, f in zip(result.solutions, result.finished, strict=True) if f is flag]
        assert own == sorted(own, reverse=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop_strings": []}, ValueError, "stop_strings is empty"),
        ({"stop_strings": "\n"}, TypeError, "must be a list"),
        ({"stop_strings": [""]}, TypeError, "must be a list of texts that are not empty"),
        ({"prompt_template": "Solve this"}, ValueError, "problem} exactly once"),
        ({"prompt_template": 3}, TypeError, "prompt_template must be a string, got int"),
        ({"max_step_tokens": 0}, ValueError, "max_step_tokens must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an integer, got float"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0 or more"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, tokenizer = language_model("llama")
    with pytest.raises(error, match=message):
        CausalLMStepGenerator(model, tokenizer, **options)


def test_bad_models_and_calls() -> None:
    model, tokenizer = language_model("llama")
    with pytest.raises(TypeError, match="LlamaModel cannot generate"):
        CausalLMStepGenerator(model.model, tokenizer)
    with pytest.raises(TypeError, match="tokenizer must be one of Transformers, got NoneType"):
        CausalLMStepGenerator(model, None)  # type: ignore[arg-type]
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=400)
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        CausalLMStepGenerator(t5, tokenizer)
    generator = CausalLMStepGenerator(model, tokenizer)
    with pytest.raises(ValueError, match="problem is empty"):
        generator(" ", [()], 1)
    with pytest.raises(TypeError, match="problem must be a string, got int"):
        generator(3, [()], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be at least 1"):
        generator(PROBLEM, [()], 0)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (("4", -1, False), ValueError),
        ((4, 1, False), TypeError),
        (("4", 1.0, False), TypeError),
        (("4", 1, 1), TypeError),
    ],
)
def test_bad_proposals(fields: tuple[Any, Any, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        ProposedStep(*fields)
