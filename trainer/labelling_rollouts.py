"""Completions of solutions that are begun, for Monte Carlo labels: what a generator is, and one from a causal LM.

rollouts = CausalLMRollouts(model, tokenizer, max_new_tokens=512)
rollouts("What is 2 + 3?", [(), ("2 + 3 = 5.",)], 4)  # 4 solutions, and 4 ways to end the one that is begun
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from modeling_prm.capabilities import known_capabilities
from modeling_prm.configuration_prm import backbone_positions
from modeling_prm.scoring import evaluating, input_device
from modeling_prm.step_generation import CausalLMStepGenerator, StopsAfterPrompt, derive_seed, end_ids, seeded

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Rollout:
    """One completion of a solution.

    Args:
        text: what was generated.
        num_tokens: how many tokens that took.
        is_cut: whether it reached the most tokens before it came to an end, so that it reached no final answer.
    """

    text: str
    num_tokens: int
    is_cut: bool


class RolloutGenerator(Protocol):
    """What completes solutions: any callable of this form."""

    def __call__(self, problem: str, prefixes: Sequence[Sequence[str]], n: int) -> Sequence[Sequence[Rollout]]:
        """For each prefix of steps, in order, `n` completions; none where a prefix leaves no room for any.

        Raises:
            ValueError: the problem cannot be completed, such as one longer than the model reads.
        """


class CausalLMRollouts:
    """Samples completions from a causal language model with its `generate`.

    A prompt is the problem in the model's chat template and the steps of the prefix, as
    `modeling_prm.step_generation.CausalLMStepGenerator` writes it. The prompts of one call are computed once for all
    their completions, and what they have in common once for all of them: the keys and values of the longest prompt
    are computed piece by piece, and each shorter prompt branches off. Models whose cache cannot be shared so
    (sliding windows, recurrent layers) compute each prompt for each completion, which one logged line says.

    The same call gives the same completions, whatever was called before, as long as `batch_size` is the same.

    Args:
        model, tokenizer: a causal language model with `generate`, and its tokenizer.
        prompt_template, step_joiner: as of `CausalLMStepGenerator`.
        stop_strings: texts that end a completion, which is cut off before them; for models that go on after an answer.
        max_new_tokens: most tokens of one completion.
        temperature, top_p: of sampling; the temperature is above 0.
        seed: where the random numbers start.
        batch_size: most completions that are generated together.

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
        step_joiner: str = "\n\n",
        stop_strings: Sequence[str] = (),
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        if temperature == 0:
            raise ValueError("temperature must be above 0: without sampling all rollouts of a step would be the same")
        self._prompts = CausalLMStepGenerator(
            model,
            tokenizer,
            prompt_template=prompt_template,
            step_joiner=step_joiner,
            stop_strings=stop_strings or ("\n\n",),
            max_step_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
        )
        self.model, self.tokenizer = model, tokenizer
        self.stop_strings = tuple(stop_strings)
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_p, self.seed, self.batch_size = temperature, top_p, seed, batch_size
        self.num_prompt_tokens = 0
        self._end_ids = end_ids(model, tokenizer)
        self._stop_criterion = StopStringCriteria(tokenizer, list(stop_strings)) if stop_strings else None
        config = model.config.get_text_config()
        self._max_positions = backbone_positions(config)
        known = known_capabilities(config)
        self._shares = known is None or known.has_cache

    def __call__(self, problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[Rollout]]:
        """As `RolloutGenerator`; `num_prompt_tokens` counts the tokens of prompts that were computed."""
        prompts = [self._prompts.prompt_ids(problem, prefix) for prefix in prefixes]
        rooms = [self._room(ids) for ids in prompts]
        if rooms and max(rooms) < 1:
            raise ValueError(
                f"the prompt has {min(map(len, prompts))} tokens and the model reads {self._max_positions}, so no "
                "completion fits"
            )
        rollouts: list[list[Rollout]] = [[] for _ in prefixes]
        key = [*map(str, (self.temperature, self.top_p, self.max_new_tokens)), problem]
        seed = derive_seed(self.seed, "\0".join(key), prefixes, n)
        with seeded(seed, input_device(self.model)), evaluating(self.model), torch.inference_mode():
            caches = self._prompt_caches(prompts) if self._shares else None
            for room in sorted({room for room in rooms if room > 0}, reverse=True):
                rows = [row for row, own in enumerate(rooms) if own == room for _ in range(n)]
                for start in range(0, len(rows), self.batch_size):
                    batch = rows[start : start + self.batch_size]
                    for row, rollout in zip(batch, self._generate(batch, prompts, caches, room), strict=True):
                        rollouts[row].append(rollout)
        return rollouts

    def _room(self, ids: Sequence[int]) -> int:
        """How many tokens a completion may have."""
        if self._max_positions is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, self._max_positions - len(ids))

    def _prompt_caches(self, prompts: Sequence[Sequence[int]]) -> list[DynamicCache] | None:
        """Keys and values of each prompt but for its last token, or None where the model's cannot be shared.

        A trunk grows from prompt to prompt by what all later ones begin with; each prompt branches off it.
        """
        trunk, length = DynamicCache(), 0
        caches: list[DynamicCache] = []
        for index, ids in enumerate(prompts):
            shared = min(_common_length(ids, later) for later in prompts[index + 1 :]) if prompts[index + 1 :] else 0
            shared = max(length, min(shared, len(ids) - 1))
            trunk = self._extend(trunk, ids[length:shared])
            if index == 0 and shared and not _is_plain(trunk):
                self._say_not_shared()
                return None
            length = shared
            caches.append(self._extend(_fork(trunk), ids[shared:-1]))
            if index == 0 and not _is_plain(caches[0]):
                self._say_not_shared()
                return None
        return caches

    def _say_not_shared(self) -> None:
        self._shares = False
        logger.warning_once(
            f"the cache of {type(self.model).__name__} cannot be shared between completions, so that each computes "
            "its prompt anew"
        )

    def _extend(self, cache: DynamicCache, ids: Sequence[int]) -> DynamicCache:
        if not ids:
            return cache
        self.num_prompt_tokens += len(ids)
        inputs = torch.tensor([list(ids)], device=input_device(self.model))
        return self.model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    def _generate(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], caches: list[DynamicCache] | None, room: int
    ) -> list[Rollout]:
        """A completion of each of these prompts."""
        chosen = [list(prompts[row]) for row in rows]
        width = max(map(len, chosen))
        pad_id = self._end_ids[0] if self._end_ids else 0
        device = input_device(self.model)
        input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in chosen], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in chosen], device=device)
        given: dict[str, Any] = {}
        if caches is not None and width > 1:
            given["past_key_values"] = _join([caches[row] for row in rows], width - 1)
        else:
            self.num_prompt_tokens += sum(map(len, chosen))
        stop = None if self._stop_criterion is None else StopsAfterPrompt(self._stop_criterion, width)
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=room,
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            num_beams=1,
            num_return_sequences=1,
            eos_token_id=self._end_ids or None,
            pad_token_id=pad_id,
            stopping_criteria=StoppingCriteriaList([] if stop is None else [stop]),
            return_dict_in_generate=False,
            use_cache=True,
            **given,
        )
        new = output[:, width:].tolist()
        ends = [None] * len(new) if stop is None else stop.lengths(len(new))
        return [self._read(ids, end) for ids, end in zip(new, ends, strict=True)]

    def _read(self, ids: list[int], stop_length: int | None) -> Rollout:
        """A completion from its ids, which padding follows."""
        length = next((i + 1 for i, token_id in enumerate(ids) if token_id in self._end_ids), None)
        # Padding may be an end-of-sequence token, so one that comes after the stop string says nothing.
        if length is not None and (stop_length is None or length <= stop_length):
            shown, count, is_cut = ids[: length - 1], length, False
        else:
            shown = ids[:stop_length]
            count, is_cut = len(shown), stop_length is None
        text = self.tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cuts = [text.find(stop) for stop in self.stop_strings if stop in text]
        return Rollout(text[: min(cuts, default=len(text))], count, is_cut)


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two prompts begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _is_plain(cache: DynamicCache) -> bool:
    """Whether all layers keep all keys and values, and nothing else."""
    return all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)


def _fork(cache: DynamicCache) -> DynamicCache:
    """A cache that begins with what another one holds; growing one leaves the other as it is."""
    fork = DynamicCache()
    for index, layer in enumerate(cache.layers):
        fork.update(layer.keys, layer.values, index)
    return fork


def _join(caches: Sequence[DynamicCache], width: int) -> DynamicCache:
    """Caches of one row each as one, padded on the left to a width in tokens."""
    joined = DynamicCache()
    for index in range(len(caches[0].layers)):
        rows = []
        for part in ("keys", "values"):
            tensors = [getattr(cache.layers[index], part) for cache in caches]
            batch = tensors[0].new_zeros((len(tensors), tensors[0].shape[1], width, tensors[0].shape[3]))
            for row, tensor in enumerate(tensors):
                batch[row, :, width - tensor.shape[2] :] = tensor[0]
            rows.append(batch)
        joined.update(rows[0], rows[1], index)
    return joined
