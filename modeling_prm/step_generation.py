"""Proposes next steps with a causal language model, for the searches in `search.py`.

generator = CausalLMStepGenerator(AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name))
generator("What is 2 + 3?", [(), ("2 + 3 = 5.",)], 4)  # 4 first steps, and 4 ways to go on after that one
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from .backbones import chat_problem_template
from .configuration_prm import PRMConfig, backbone_positions
from .processing_prm import _bos_ids, _special_pattern
from .scoring import evaluating, input_device

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ProposedStep:
    """One way to go on after a prefix of steps.

    Args:
        text: the step; blank where what was generated is no step, which a search drops after counting its tokens.
            Blank and final means that the solution ends with the prefix as it is.
        num_tokens: how many tokens it took to generate, of which searches keep a budget.
        is_final: whether the solution ends with it.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: `num_tokens` is negative.
    """

    text: str
    num_tokens: int
    is_final: bool

    def __post_init__(self) -> None:
        for name, kind in (("text", str), ("num_tokens", int), ("is_final", bool)):
            if type(value := getattr(self, name)) is not kind:
                raise TypeError(f"{name} of a ProposedStep must be {kind.__name__}, got {type(value).__name__}")
        if self.num_tokens < 0:
            raise ValueError(f"num_tokens of a ProposedStep must not be negative, got {self.num_tokens}")


class StepGenerator(Protocol):
    """What a search asks for steps: any callable of this form.

    One that also has an attribute `max_step_tokens: int`, the most tokens that one proposal takes, lets a
    search keep its budget of tokens to the token.
    """

    def __call__(self, problem: str, prefixes: Sequence[Sequence[str]], n: int) -> Sequence[Sequence[ProposedStep]]:
        """For each prefix, in order, at most `n` proposals of a step that follows it."""


class CausalLMStepGenerator:
    """Samples steps from a causal language model with its `generate`.

    A step ends where a stop string appears, which is cut off, or at an end-of-sequence token, which ends the
    solution too. What reaches `max_step_tokens`, or the model's last position, before that is cut within a
    step: it comes back blank, and a warning counts it. A prefix that leaves no position free gets no proposal.

    The same call gives the same proposals, whatever was called before: the random numbers follow from `seed`,
    problem, prefixes and `n` (and from `batch_size`, which says who draws together). Calls leave the random
    state, the model's modes and the tokenizer as they were.

    Args:
        model: a causal language model with `generate`. What is not set here (top-k, penalties, ...) stays as in
            its `generation_config`.
        tokenizer: its tokenizer.
        prompt_template: text before the steps, with `{problem}` once; special tokens in it are themselves. By
            default the chat template around the problem as the user's message, where the tokenizer has one, and
            `"Problem: {problem}\\n\\n"` otherwise. In the text of problems and steps special tokens are plain text.
        stop_strings: texts that end a step, wherever in a token they begin or end.
        step_joiner: text after each step of a prefix.
        max_step_tokens: most tokens of one step, the stop string included.
        temperature: of sampling; 0 takes the likeliest token and gives one proposal a prefix.
        top_p: sample from the likeliest tokens that hold this share of the probability.
        seed: where the random numbers start.
        batch_size: most rows (prefixes times `n`) that are generated together.
        is_final: says of a list of steps that the solution is complete, for example
            `lambda steps: "\\\\boxed" in steps[-1]`; otherwise only an end-of-sequence token does.

    Raises:
        TypeError: model or tokenizer is of another kind.
        ValueError: an option that cannot be.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_template: str | None = None,
        stop_strings: Sequence[str] = ("\n\n",),
        step_joiner: str = "\n\n",
        max_step_tokens: int = 256,
        temperature: float = 0.8,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
        is_final: Callable[[Sequence[str]], bool] | None = None,
    ) -> None:
        _check_model(model, tokenizer)
        _check_sampling(max_step_tokens, temperature, top_p, batch_size)
        if isinstance(stop_strings, str) or not all(isinstance(stop, str) and stop for stop in stop_strings):
            raise TypeError(f"stop_strings must be a list of texts that are not empty, got {stop_strings!r}")
        if not stop_strings:
            raise ValueError("stop_strings is empty, so that no step would end before the solution does; give one")
        self.model = model
        self.tokenizer = tokenizer
        self.stop_strings = tuple(stop_strings)
        self.step_joiner = step_joiner
        self.max_step_tokens = max_step_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self.batch_size = batch_size
        self.is_final = is_final
        self.prompt_template, self._bos = template_and_bos(tokenizer, prompt_template)
        self._special = _special_pattern(tokenizer)
        self._eos = end_ids(model, tokenizer)
        self._stop_criterion = StopStringCriteria(tokenizer, list(stop_strings))
        self._max_positions = backbone_positions(model.config.get_text_config())

    def __call__(self, problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[ProposedStep]]:
        """At most `n` proposals for each of the prefixes, in order.

        Raises:
            TypeError: the problem is not a string.
            ValueError: the problem is empty, `n` is below 1, or the problem alone fills the model's positions.
        """
        if not isinstance(problem, str):
            raise TypeError(f"problem must be a string, got {type(problem).__name__}")
        if not problem.strip():
            raise ValueError("problem is empty; give its text")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        n = n if self.temperature > 0 else 1
        prompts = [self.prompt_ids(problem, prefix) for prefix in prefixes]
        limits = [self._room(ids, prefix) for ids, prefix in zip(prompts, prefixes, strict=True)]
        proposals: list[list[ProposedStep]] = [[] for _ in prefixes]
        seed = derive_seed(self.seed, problem, prefixes, n)
        num_cut = 0
        with seeded(seed, input_device(self.model)), evaluating(self.model):
            for limit, rows in self._batches(limits, n):
                generated = self._generate([prompts[row] for row in rows], limit)
                for row, (ids, end) in zip(rows, generated, strict=True):
                    num_cut += end == "cut"
                    proposals[row].append(self._propose(prefixes[row], ids, end))
        if num_cut:
            logger.warning(
                f"{num_cut} of {sum(map(len, proposals))} proposals were cut within a step and are dropped: no stop "
                f"string came within max_step_tokens={self.max_step_tokens} tokens or the model's positions"
            )
        return proposals

    def prompt_ids(self, problem: str, prefix: Sequence[str]) -> list[int]:
        """The ids after which the model generates the step that follows the prefix."""
        before, after = self.prompt_template.split("{problem}")
        # The template's text and the user's, in turns.
        fragments = [before, problem, after]
        for step in prefix:
            fragments += [step, self.step_joiner]
        if not any(self._special.search(text) for text in fragments[1::2]):
            return self._bos + self._ids("".join(fragments))
        # The user's text names special tokens: only the template's are looked for.
        ids, text = list(self._bos), ""
        for index, fragment in enumerate(fragments):
            start = 0
            for special in self._special.finditer(fragment) if index % 2 == 0 else ():
                ids += self._ids(text + fragment[start : special.start()], plain=True) + self._ids(special[0])
                text, start = "", special.end()
            text += fragment[start:]
        return ids + self._ids(text, plain=True)

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        """Ids of a text, in which special tokens are themselves or plain text."""
        if not text:
            return []
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)["input_ids"]
        if (backend := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            # The call leaves its choice there.
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return list(ids)

    def _room(self, ids: list[int], prefix: Sequence[str]) -> int:
        """How many tokens the next step may have."""
        room = self.max_step_tokens
        if self._max_positions is not None:
            room = min(room, self._max_positions - len(ids))
        if room < 1 and not prefix:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the model reads {self._max_positions}, so no step fits; give a "
                "shorter problem or a shorter prompt_template"
            )
        return room

    def _batches(self, limits: list[int], n: int) -> Iterator[tuple[int, list[int]]]:
        """Indices of prompts, each `n` times, in batches of prompts with the same limit of new tokens."""
        for limit in sorted({limit for limit in limits if limit > 0}, reverse=True):
            rows = [row for row, own in enumerate(limits) if own == limit for _ in range(n)]
            for start in range(0, len(rows), self.batch_size):
                yield limit, rows[start : start + self.batch_size]

    def _generate(self, prompts: list[list[int]], limit: int) -> list[tuple[list[int], str]]:
        """One continuation of each prompt: its ids and how it ended, "step", "solution" or "cut"."""
        width = max(map(len, prompts))
        pad_id = self._eos[0] if self._eos else 0
        input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        device = input_device(self.model)
        step_end = StopsAfterPrompt(self._stop_criterion, width)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        output = self.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=limit,
            num_beams=1,
            num_return_sequences=1,
            eos_token_id=self._eos or None,
            pad_token_id=pad_id,
            stop_strings=None,
            stopping_criteria=StoppingCriteriaList([step_end]),
            return_dict_in_generate=False,
            use_cache=True,
            **sampling,
        )
        rows = output[:, width:].tolist()
        return [self._read(row, stop) for row, stop in zip(rows, step_end.lengths(len(rows)), strict=True)]

    def _read(self, row: list[int], step_length: int | None) -> tuple[list[int], str]:
        """A row's ids without what pads it, and how it ended."""
        solution_length = next((i + 1 for i, token_id in enumerate(row) if token_id in self._eos), None)
        # Padding may be an end-of-sequence token, so one that comes after the step's end says nothing.
        if solution_length is not None and (step_length is None or solution_length <= step_length):
            return row[:solution_length], "solution"
        return (row, "cut") if step_length is None else (row[:step_length], "step")

    def _propose(self, prefix: Sequence[str], ids: list[int], end: str) -> ProposedStep:
        if end == "cut":
            return ProposedStep("", len(ids), False)
        # What ends a solution is left out by its place: a model's own choice of it may be an ordinary token.
        shown = ids[:-1] if end == "solution" else ids
        text = self.tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cuts = [text.find(stop) for stop in self.stop_strings if stop in text]
        text = text[: min(cuts, default=len(text))].strip()
        is_final = end == "solution"
        if text and not is_final and self.is_final is not None:
            is_final = bool(self.is_final([*prefix, text]))
        return ProposedStep(text, len(ids), is_final)


class StopsAfterPrompt(StoppingCriteria):
    """Stops a row where a stop string appears in what was generated, and notes after how many tokens.

    The prompt is left out: its last line end and a generated one are no blank line between steps.
    """

    def __init__(self, criterion: StopStringCriteria, prompt_length: int) -> None:
        self.criterion = criterion
        self.prompt_length = prompt_length
        self._lengths: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        generated = input_ids[:, self.prompt_length :]
        is_stop: torch.Tensor = self.criterion(generated, scores)
        if self._lengths is None:
            self._lengths = torch.zeros_like(generated[:, 0])
        self._lengths = torch.where((self._lengths == 0) & is_stop, generated.shape[1], self._lengths)
        return is_stop

    def lengths(self, num_rows: int) -> list[int | None]:
        """For each row, how many tokens it had when it stopped, None where it did not."""
        if self._lengths is None:
            return [None] * num_rows
        return [length or None for length in self._lengths.tolist()]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed on the CPU and on one device, then the states from before."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else None):
        torch.random.default_generator.manual_seed(seed)
        for accelerator in accelerators:
            module = torch.get_device_module(accelerator)
            # torch.manual_seed would seed the other devices too.
            with module.device(accelerator):
                module.manual_seed(seed)
        yield


def derive_seed(seed: int, problem: str, prefixes: Sequence[Sequence[str]], n: int) -> int:
    """A seed of 56 bits that depends on all of these, and on nothing else."""
    key = json.dumps([seed, problem, [list(prefix) for prefix in prefixes], n])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


def template_and_bos(tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[str, list[int]]:
    """The template of prompts, and the ids to put before it, which a chat template writes itself.

    Raises:
        TypeError, ValueError: the template is no string, or has not `{problem}` exactly once.
    """
    if template is None and tokenizer.chat_template:
        # A chat template writes the special tokens that it wants.
        return chat_problem_template(tokenizer), []
    template = PRMConfig.problem_template if template is None else template
    if not isinstance(template, str):
        raise TypeError(f"prompt_template must be a string, got {type(template).__name__}")
    if template.count("{problem}") != 1:
        raise ValueError(f"prompt_template must have {{problem}} exactly once, got {template!r}")
    bos = tokenizer.bos_token
    is_there = bool(bos) and template.startswith(bos)
    return template, [] if is_there else _bos_ids(tokenizer)


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All ids that end a solution, those of the model's generation and the tokenizer's."""
    ids: list[int] = []
    for found in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids += [] if found is None else [found] if isinstance(found, int) else list(found)
    return list(dict.fromkeys(ids))


def _check_model(model: Any, tokenizer: Any) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be one of Transformers, got {type(tokenizer).__name__}")
    if not callable(getattr(model, "generate", None)) or not model.can_generate():
        raise TypeError(
            f"{type(model).__name__} cannot generate; give a causal language model, as AutoModelForCausalLM loads it"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, whose steps would not follow the prompt in one "
            "sequence; give a causal language model"
        )


def _check_sampling(max_step_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    for name, value in (("max_step_tokens", max_step_tokens), ("batch_size", batch_size)):
        if type(value) is not int:
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
