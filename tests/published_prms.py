"""Tiny published PRMs on disk, and how their model cards say to score with them.

Each `write_...` saves a checkpoint as the published one is saved, with random weights and a tokenizer of the same
kind; the `..._scores` are written from the model's documentation alone and know nothing of this project.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
PROBLEMS = [
    "Janet has 3 apples and buys {x} = 4 more. How many?",
    "What is 12 + 30 - 2?",
    "Sue lives in Кишинёв; she walks 3.5 km,  twice — how far?",
]
SOLUTIONS = [
    ["She has 3 + 4 = 7 apples.", "So the answer is \\boxed{7}."],
    ["12 + 30 = 42.", "42 - 2 = 40, naïvely.", "第三步: it is 40", "Answer: 40."],
    ["2 * 3.5 = 7.\nThat is in km."],
]
CORPUS = [
    *(
        f"{problem} " + "".join(f"Step {i}: {step} ки\n" for i, step in enumerate(steps, start=1)) + " + - ки + -"
        for problem, steps in zip(PROBLEMS, SOLUTIONS, strict=True)
    ),
    "Please reason step by step, and put your final answer within \\boxed{}. Question:\nAnswer:\nLet's think.\n\n",
    "system\nuser\nassistant\n\n",
] * 10
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHATML = (
    "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday "
    "Date: 26 Jul 2024\\n\\n<|eot_id|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)


def byte_level(pattern: str, special: list[str], **names: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that cuts text as Qwen's or Llama 3's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """As Qwen2.5's, with `<extra_0>`."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra_0>"]
    tokenizer = byte_level(QWEN_PATTERN, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 3.1's, with its chat template's dates and trimming."""
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = byte_level(LLAMA3_PATTERN, special, bos_token=special[0], eos_token=special[1])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], tokenizer.convert_tokens_to_ids(special[0]))]
    )
    tokenizer.chat_template = LLAMA3_CHAT
    return tokenizer


def mistral_tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """As Mistral's: BPE over "▁" with bytes for what it lacks, and a first token."""
    special = ["<unk>", "<s>", "</s>"]
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence(spaces)
    # Merges that leave out what begins the next word, as sentencepiece has them.
    trained.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special + byte_tokens, show_progress=False)
    trained.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    state = json.loads(trained.to_str())["model"]
    model = models.BPE(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **names
    )


def spread(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that a wrong score shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            # Norms are near 1.
            parameter.normal_(float(parameter.dim() == 1), 0.2, generator=generator)
    return module.eval()


class Published:
    """A published PRM in memory: the model its card loads, its head, and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, head: Any = None) -> None:
        self.model, self.tokenizer, self.head = model, tokenizer, head

    @torch.no_grad()
    def hidden(self, ids: list[int]) -> torch.Tensor:
        """(L, H) of the backbone."""
        backbone = getattr(self.model, "model", self.model)
        return backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """(L, K) of a model with a head of its own."""
        return self.model(input_ids=torch.tensor([ids])).logits[0]


def _save(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any], tokenizer: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.clone().contiguous() for name, value in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_qwen2_prm(folder: Path) -> Published:
    """Qwen2.5-Math-PRM: with `auto_map` to code that is not there, and the language model's output layer."""
    tokenizer = qwen_tokenizer()
    config = transformers.Qwen2Config(**SIZES, vocab_size=512)
    model = spread(AutoModel.from_config(config))
    head = spread(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)), seed=1)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= {f"score.{name}": value for name, value in head.state_dict().items()}
    state["lm_head.weight"] = torch.zeros(512, 32)
    data = config.to_dict() | {
        "architectures": ["Qwen2ForProcessRewardModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
            "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel",
        },
    }
    _save(folder, state, data, tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    return Published(model, tokenizer, head)


def qwen2_prm_scores(
    prm: Published, problem: str, steps: list[str], system: str | None
) -> tuple[list[int], list[float]]:
    """The card of Qwen2.5-Math-PRM-7B; ReasonFlux-PRM-7B's is the same without a system message."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [
        {"role": "user", "content": problem},
        {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
    ]
    text = prm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    ids = prm.tokenizer.encode(text)
    separator = prm.tokenizer.encode("<extra_0>")[0]
    with torch.no_grad():
        probs = prm.head(prm.hidden(ids)).softmax(dim=-1)
    return ids, [probs[i, 1].item() for i, token in enumerate(ids) if token == separator]


def write_causal(folder: Path, family: str) -> Published:
    """A language model: Math-Shepherd's Mistral or RLHFlow's Llama 3.1."""
    if family == "mistral":
        tokenizer: Any = mistral_tokenizer()
        config: Any = transformers.MistralConfig(**SIZES, vocab_size=512, sliding_window=None)
    else:
        tokenizer = llama3_tokenizer()
        config = transformers.LlamaConfig(**SIZES, vocab_size=512)
    model = spread(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Published(model, tokenizer)


def math_shepherd_scores(prm: Published, problem: str, steps: list[str]) -> tuple[list[int], list[float]]:
    """The card of math-shepherd-mistral-7b-prm."""
    good, bad, tag = "+", "-", "ки"
    candidates = prm.tokenizer.encode(f"{good} {bad}")[1:]
    assert len(candidates) == 2
    tag_id = prm.tokenizer.encode(tag)[-1]
    output = "\n".join(f"Step {i}: {step} {tag}" for i, step in enumerate(steps, start=1))
    ids = prm.tokenizer.encode(f"{problem} {output}")
    scores = prm.logits(ids)[:, candidates].softmax(dim=-1)[:, 0]
    return ids, scores[torch.tensor(ids) == tag_id].tolist()


def rlhflow_scores(prm: Published, problem: str, steps: list[str]) -> tuple[list[int], list[float]]:
    """RLHFlow's evaluation: one pass for each step, the score at the third position from the end."""
    candidates = [prm.tokenizer.encode("+")[-1], prm.tokenizer.encode("-")[-1]]
    conversation, scores, ids = [], [], []
    for k, step in enumerate(steps):
        text = problem + " " + step if k == 0 else step
        conversation += [{"content": text, "role": "user"}, {"content": "+", "role": "assistant"}]
        ids = prm.tokenizer.apply_chat_template(conversation, return_dict=False)
        scores.append(prm.logits(ids)[-3, candidates].softmax(dim=-1)[0].item())
    return ids, scores


def write_skywork(folder: Path) -> Published:
    """Skywork-o1-Open-PRM: a language model wrapped, with `v_head.summary`; sharded PyTorch files with an index."""
    tokenizer = byte_level(
        QWEN_PATTERN, ["<|endoftext|>", "<|im_end|>"], bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    config = transformers.Qwen2Config(**SIZES, vocab_size=512)
    model = spread(AutoModelForCausalLM.from_config(config))
    head = spread(nn.Linear(32, 1), seed=1)
    state = {f"pretrained_model.{name}": value for name, value in model.state_dict().items()}
    head_state = {f"v_head.summary.{name}": value for name, value in head.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "pytorch_model-00001-of-00002.bin")
    torch.save(head_state, folder / "pytorch_model-00002-of-00002.bin")
    weight_map = dict.fromkeys(state, "pytorch_model-00001-of-00002.bin")
    weight_map |= dict.fromkeys(head_state, "pytorch_model-00002-of-00002.bin")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["Qwen2ForPrmModel"]}))
    tokenizer.save_pretrained(folder)
    return Published(model, tokenizer, head)


def skywork_scores(prm: Published, problem: str, steps: list[str]) -> tuple[list[int], list[float]]:
    """skywork-o1-prm-inference, with "\\n" for its step token."""
    ids = list(prm.tokenizer.encode(prm.tokenizer.bos_token + problem + "\n"))
    step_token = prm.tokenizer.encode("\n")[-1]
    flagged = []
    for step in steps:
        ids += [*prm.tokenizer.encode(step), step_token]
        flagged.append(len(ids) - 1)
    with torch.no_grad():
        values = prm.head(prm.hidden(ids)).squeeze(-1).sigmoid()
    return ids, values[flagged].tolist()


def write_token_classification(folder: Path, labels: int, tokenizer: Any, family: str = "qwen2") -> Published:
    """TRL's, PURE's (2 labels) or SCAN's (1)."""
    options = {**SIZES, "vocab_size": 512, "num_labels": labels}
    config: Any = transformers.Qwen2Config(**options) if family == "qwen2" else transformers.LlamaConfig(**options)
    model = spread(AutoModelForTokenClassification.from_config(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Published(model, tokenizer)


def trl_scores(prm: Published, problem: str, steps: list[str], separator: str) -> tuple[list[int], list[float]]:
    """As TRL's PRMTrainer tokenizes, and the probability of its second label (SCAN: the sigmoid of its one)."""
    tokenizer = prm.tokenizer
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids += tokenizer(problem, add_special_tokens=False)["input_ids"]
    positions = []
    for step in steps:
        ids += tokenizer(step, add_special_tokens=False)["input_ids"]
        ids += tokenizer.encode(separator, add_special_tokens=False)
        positions.append(len(ids) - 1)
    logits = prm.logits(ids)[positions]
    return ids, (logits.softmax(dim=-1)[:, 1] if logits.shape[1] == 2 else logits.sigmoid()[:, 0]).tolist()


def pipeline_scores(prm: Published, problem: str, steps: list[str], separator: str) -> tuple[list[int], list[float]]:
    """The cards of HuggingFaceH4's PRMs: a pass over the text up to each step, read at its last token."""
    ids, scores = [], []
    for end in range(1, len(steps) + 1):
        text = separator.join((problem, *steps[:end])) + separator
        ids = prm.tokenizer(text)["input_ids"]
        scores.append(prm.logits(ids)[-1].softmax(dim=-1)[1].item())
    return ids, scores


def write_reasoneval(folder: Path, family: str) -> Published:
    """ReasonEval: Mistral whose padding token is its first token, or Llama with one of its own."""
    if family == "mistral":
        tokenizer, config = mistral_tokenizer(pad_token="<s>"), transformers.MistralConfig(**SIZES, vocab_size=512)
    else:
        tokenizer, config = mistral_tokenizer(pad_token="</s>"), transformers.LlamaConfig(**SIZES, vocab_size=512)
    model = spread(AutoModel.from_config(config))
    head = spread(nn.Linear(32, 3), seed=1)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= {f"score_head.{name}": value for name, value in head.state_dict().items()}
    data = config.to_dict() | {"architectures": ["ReasonEval"], "score_dimension": 3, "use_bias": True}
    _save(folder, state, data, tokenizer)
    return Published(model, tokenizer, head)


def reasoneval_scores(
    prm: Published, problem: str, steps: list[str], family: str
) -> tuple[list[int], list[list[float]]]:
    """ReasonEval's example: the classes' probabilities at the positions that it counts."""
    pad = prm.tokenizer.pad_token
    text = f"Question:\n{problem}\nAnswer:\nLet's think step by step.\n" + pad + "".join(step + pad for step in steps)
    pad_id = prm.tokenizer(pad)["input_ids"][-1]
    ids: list[int] = []
    positions = []
    for index, token in enumerate(prm.tokenizer(text)["input_ids"]):
        if token == pad_id:
            positions.append(index - 1 - len(positions))
        else:
            ids.append(token)
    if family == "mistral":
        ids, positions = [1, *ids], positions[2:]
    else:
        positions = positions[1:]
    with torch.no_grad():
        probs = prm.head(prm.hidden(ids)).softmax(dim=-1)
    return ids, probs[positions].tolist()


def load_qwen2_prm(folder: Path) -> Published:
    """A `Qwen2ForProcessRewardModel` as its own code puts it together, from any folder that holds one."""
    state = load_file(folder / "model.safetensors")
    config = transformers.Qwen2Config.from_pretrained(folder)
    model = AutoModel.from_config(config).float()
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    size = config.hidden_size
    head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))
    head.load_state_dict({k.removeprefix("score."): v for k, v in state.items() if k.startswith("score.")})
    tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None
    return Published(model.eval(), tokenizer, head.eval())


def load_token_classification(folder: Path) -> Published:
    """A token classification model as plain Transformers loads it."""
    model = AutoModelForTokenClassification.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None
    return Published(model, tokenizer)
