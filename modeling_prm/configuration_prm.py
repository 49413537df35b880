"""Configuration of a process reward model: a backbone, a value head and the layout of its input."""

from __future__ import annotations

import copy
import difflib
import math
from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .conversation_layout import ConversationLayout

# The newest layout of ids that `PRMProcessor` writes. It grows by one whenever old checkpoints would be read
# otherwise, or old code would misread new ones, and every older version stays readable.
LAYOUT_VERSION = 2

HEAD_TYPES = ("linear", "mlp")
PROMPT_LAYOUTS = ("plain", "chat")
AGGREGATIONS = ("min", "product", "last", "mean", "weighted_mean", "max", "geometric_mean")

# Backbones that number positions from `pad_token_id + 1`, so that many of their positions are never read.
_OFFSET_POSITIONS = frozenset(
    {"camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta"}
    | {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)

# Keys that Transformers, Trainer and the Hub write into a config next to its dataclass fields.
_FOREIGN_OPTIONS = frozenset(
    {"_attn_implementation", "_experts_implementation", "_name_or_path", "attn_implementation", "auto_map"}
    | {"custom_pipelines", "experts_implementation", "model_type", "name_or_path", "num_labels"}
    | {"output_attentions", "per_layer_config", "quantization_config", "torch_dtype", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "base_model_tp_plan", "transformers_weights"}
)

# The options that say how text becomes ids; `PRMProcessor` takes each by the same name.
LAYOUT_OPTIONS = (
    "separator_token",
    "separator_is_reserved",
    "score_offset",
    "prompt_layout",
    "problem_template",
    "step_template",
    "step_joiner",
    "max_length",
    "layout_version",
    "conversation_layout",
)

# What `pipeline("step-scoring", ...)` finds in a checkpoint's config.
_CUSTOM_PIPELINES = {"step-scoring": {"impl": "pipeline_prm.StepScoringPipeline", "pt": ["AutoModel"], "type": "text"}}

_OPTION_TYPES: dict[str, tuple[type, ...]] = {
    "head_type": (str,),
    "head_dropout": (float, int),
    "class_weights": (list, tuple, type(None)),
    "separator_token": (str,),
    "separator_token_id": (int, type(None)),
    "separator_is_reserved": (bool,),
    "score_offset": (int,),
    "prompt_layout": (str,),
    "problem_template": (str,),
    "step_template": (str,),
    "step_joiner": (str,),
    "max_length": (int, type(None)),
    "aggregation": (str,),
    "ids_probe": (str, type(None)),
    "temperature": (float, int),
    "error_threshold": (float, int),
    "layout_version": (int,),
    "conversation_layout": (dict, type(None)),
}


def check_options(options: dict[str, Any]) -> None:
    """Check the options of `PRMConfig` given by name.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option's value is not one of those allowed.
    """
    for name, value in options.items():
        types = _OPTION_TYPES[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
            raise TypeError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__})")
    for weight in options.get("class_weights") or ():
        if not isinstance(weight, (float, int)):
            raise TypeError(f"class_weights must be numbers, got {weight!r} ({type(weight).__name__})")
    for name, allowed in (
        ("head_type", HEAD_TYPES),
        ("prompt_layout", PROMPT_LAYOUTS),
        ("aggregation", AGGREGATIONS),
        ("score_offset", (0, -1)),
    ):
        if name in options and options[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {options[name]!r}")
    if not 0.0 <= options.get("head_dropout", 0.0) < 1.0:
        raise ValueError(f"head_dropout must be at least 0 and below 1, got {options['head_dropout']}")
    if not 0.0 < options.get("temperature", 1.0) < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {options['temperature']}")
    if not 0.0 <= options.get("error_threshold", 0.5) <= 1.0:
        raise ValueError(f"error_threshold must be in [0, 1], got {options['error_threshold']}")
    if not options.get("separator_token", "x") and options.get("separator_is_reserved", True):
        raise ValueError(
            "separator_token must not be empty where it is to be found in the ids; name a token such as "
            "'<|step_end|>', or say separator_is_reserved=False where nothing stands between steps"
        )
    for name, minimum in (("max_length", 1), ("separator_token_id", 0)):
        if options.get(name) is not None and options[name] < minimum:
            raise ValueError(f"{name} must be None or at least {minimum}, got {options[name]}")
    if not 1 <= options.get("layout_version", 1) <= LAYOUT_VERSION:
        raise ValueError(
            f"layout_version {options['layout_version']} is not known here, versions 1 to {LAYOUT_VERSION} are; "
            "the checkpoint was written by a newer release: upgrade modeling-prm, or load it with "
            "trust_remote_code=True, which takes the code saved beside it"
        )
    if options.get("conversation_layout") is not None:
        ConversationLayout.from_dict(options["conversation_layout"])
    for name, marker in (("problem_template", "{problem}"), ("step_template", "{step}")):
        if name in options and options[name].count(marker) != 1:
            raise ValueError(f"{name} must hold {marker} exactly once, got {options[name]!r}")


def has_offset_positions(backbone_config: PretrainedConfig) -> bool:
    """Whether a backbone numbers positions by the padding ids itself, from `pad_token_id + 1` on."""
    return backbone_config.model_type in _OFFSET_POSITIONS


def backbone_positions(backbone_config: PretrainedConfig) -> int | None:
    """How many tokens a backbone may read, or None where nothing limits it.

    Beyond this number a position table has no row, and rotary positions were never trained.
    """
    positions = getattr(backbone_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    if has_offset_positions(backbone_config):
        return positions - (getattr(backbone_config, "pad_token_id", None) or 0) - 1
    rope = getattr(backbone_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn" and "original_max_position_embeddings" in rope:
        return max(positions, int(rope.get("factor", 1.0) * rope["original_max_position_embeddings"]))
    return positions


class PRMConfig(PretrainedConfig):
    """Configuration of a `PRMForStepScoring`.

    Args:
        text_config: the backbone's configuration, any that `AutoConfig` knows, or its dictionary.
        head_type: `"linear"` (dropout, then one linear layer to the logits) or `"mlp"` (linear H to H,
            ReLU, linear to the logits).
        head_dropout: dropout probability before the linear head, at least 0 and below 1.
        num_labels: logits a step, 1 by default: the step's probability is the logit's sigmoid. With
            K classes it is the softmax weighted by `class_weights`.
        class_weights: K numbers in [0, 1], one a class: how much the class counts as correct. Needed
            for K classes, refused for one logit.
        separator_token: the token that closes each step. One that is not reserved may be a text of several
            tokens, of which the last is read, or empty: then a step's own last token is.
        separator_token_id: its id, of several the last one's, None where it is empty;
            `PRMForStepScoring.from_backbone` fills it in.
        separator_is_reserved: whether the separator can come from nothing but the end of a step. Then
            the model finds the step positions in the ids by itself.
        score_offset: 0 reads a step's score at its separator's last token, -1 one position earlier.
        prompt_layout: `"plain"`, or `"chat"` where `problem_template` is a rendered chat template that
            holds the tokenizer's first token itself.
        problem_template: text around the problem, with `{problem}` once.
        step_template: text around a step, with `{step}` once; `{i}` is the step's number from 1.
        step_joiner: text between a separator and the next step.
        max_length: most tokens in one input; None means as many as the backbone reads.
        aggregation: how step probabilities become one score where no method is named.
        ids_probe: the processor's hash of the ids of a fixed text, so that another tokenizer is noticed;
            `PRMForStepScoring.from_backbone` fills it in.
        temperature: above 0; step probabilities are the sigmoid, or softmax, of the logits divided by it,
            which calibrates them without changing their order (Guo et al., 1706.04599). The loss takes
            the logits as they are.
        error_threshold: in [0, 1]; a step is called wrong where its probability is below this and no
            other threshold is named.
        layout_version: version of the layout of ids. In 1, that of PRMs made here, problem, steps and
            separators are tokenized each alone; in 2, that of most PRMs of others, all that stands between two
            special tokens is tokenized as one text.
        conversation_layout: what stands around the messages of conversations, a `ConversationLayout` as a dictionary;
            None where the PRM reads none. `PRMForStepScoring.from_backbone` takes it from the chat template.

    Unknown options are refused, as are values of the wrong type.

    Raises:
        TypeError: an unknown option, or a value of the wrong type.
        ValueError: a value outside those allowed, or a backbone that cannot be used (encoder-decoder,
            multimodal, custom code).
    """

    model_type = "prm"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (as Transformers declares it)
    keys_to_ignore_at_inference = ["step_mask"]  # noqa: RUF012

    text_config: PretrainedConfig | None = None
    head_type: str = "linear"
    head_dropout: float = 0.1
    class_weights: list[float] | None = None
    separator_token: str = "<|step_end|>"
    separator_token_id: int | None = None
    separator_is_reserved: bool = True
    score_offset: int = 0
    prompt_layout: str = "plain"
    problem_template: str = "Problem: {problem}\n\n"
    step_template: str = "Step {i}: {step}"
    step_joiner: str = "\n"
    max_length: int | None = None
    aggregation: str = "min"
    ids_probe: str | None = None
    temperature: float = 1.0
    error_threshold: float = 0.5
    layout_version: int = 1
    conversation_layout: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        known = {field.name for field in fields(type(self))} | _FOREIGN_OPTIONS
        for name in kwargs.keys() - known:
            raise TypeError(f"PRMConfig has no option {name!r}{_did_you_mean(name)}")
        self.text_config = _backbone_config(self.text_config)
        for name in ("attn_implementation", "experts_implementation"):
            # Transformers sets these on the backbone too, where None would undo the backbone's own.
            kwargs.setdefault(name, getattr(self.text_config, f"_{name}", None))
        if getattr(self, "id2label", None) is None:
            num_labels = kwargs.pop("num_labels", 1)
            if not isinstance(num_labels, int) or isinstance(num_labels, bool) or num_labels < 1:
                raise ValueError(f"num_labels must be an integer of at least 1, got {num_labels!r}")
            # Names of our own, since Transformers does not save its default of two labels.
            names = ["correct"] if num_labels == 1 else [f"class_{i}" for i in range(num_labels)]
            self.id2label = dict(enumerate(names))
            self.label2id = {name: i for i, name in enumerate(names)}
        kwargs.setdefault("custom_pipelines", copy.deepcopy(_CUSTOM_PIPELINES))
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Check every option as it stands now; loading and saving call this.

        Raises:
            TypeError, ValueError: as the class says.
        """
        check_options({name: getattr(self, name) for name in _OPTION_TYPES})
        weights = self.class_weights
        if self.num_labels == 1 and weights is not None:
            raise ValueError("class_weights belong to num_labels of 2 or more; with one logit leave them out")
        if self.num_labels != 1 and (
            weights is None or len(weights) != self.num_labels or not all(0.0 <= w <= 1.0 for w in weights)
        ):
            raise ValueError(
                f"num_labels={self.num_labels} needs class_weights, {self.num_labels} numbers in [0, 1] that say "
                f"how much each class counts as correct, such as [1.0, ..., 0.0]; got {weights!r}"
            )
        if self.text_config is None:
            return
        positions = self.max_positions
        if positions is not None and self.max_length is not None and self.max_length > positions:
            raise ValueError(
                f"max_length={self.max_length} is more than the {positions} tokens that the backbone "
                f"({self.text_config.model_type}) can read; give at most {positions}"
            )
        if self.text_config.is_encoder_decoder:
            raise ValueError(
                f"{self.text_config.model_type!r} is an encoder-decoder backbone, which has no single sequence to "
                "read step scores from; use a decoder (Qwen2, Llama, ...) or an encoder (BERT, ModernBERT, ...)"
            )
        if self.text_config.get_text_config() is not self.text_config or not hasattr(self.text_config, "hidden_size"):
            raise ValueError(
                f"{self.text_config.model_type!r} has no hidden_size of its own, as multimodal models do not; "
                "give its text model (for example model.language_model and its config) as the backbone"
            )
        width = getattr(self.text_config, "word_embed_proj_dim", self.text_config.hidden_size)
        if width != self.text_config.hidden_size:
            raise ValueError(
                f"this {self.text_config.model_type!r} backbone returns states of width {width} and not of its "
                f"hidden_size {self.text_config.hidden_size}, which a value head cannot read; use another size of it"
            )

    @property
    def max_positions(self) -> int | None:
        """How many tokens the backbone may read, or None where nothing limits it."""
        return None if self.text_config is None else backbone_positions(self.text_config)

    @property
    def layout(self) -> dict[str, Any]:
        """The options that say how text becomes ids, as `PRMProcessor` takes them."""
        return {name: getattr(self, name) for name in LAYOUT_OPTIONS}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a dictionary, as `from_pretrained` does with the file `config.json`.

        Keys that tools add to a saved config are kept as attributes; one that looks like a mistyped
        option of ours is refused.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"this is a {model_type!r} checkpoint, not a process reward model; start one from it with "
                "PRMForStepScoring.from_backbone(...)"
            )
        known = {field.name for field in fields(cls)} | _FOREIGN_OPTIONS
        foreign = {name: config_dict[name] for name in config_dict.keys() - known}
        for name in [*foreign, *(kwargs.keys() - known)]:
            # Close enough to be a slip: tools write keys such as `unsloth_version` and `max_seq_length`.
            if hint := _did_you_mean(name, cutoff=0.85):
                raise TypeError(f"PRMConfig has no option {name!r}{hint}")
        own = {name: value for name, value in config_dict.items() if name not in foreign}
        loaded = super().from_dict(own, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in foreign.items():
            setattr(config, name, value)
        config.check()
        return loaded

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as any Transformers config, after checking the options once more."""
        self.check()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _did_you_mean(name: str, cutoff: float = 0.75) -> str:
    close = difflib.get_close_matches(name, [*_OPTION_TYPES, "text_config", "num_labels"], n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def _backbone_config(value: Any) -> PretrainedConfig | None:
    if value is None or isinstance(value, PretrainedConfig):
        return value
    if not isinstance(value, dict):
        raise TypeError(f"text_config must be a config or its dictionary, got {type(value).__name__}")
    model_type = value.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"text_config has model_type {model_type!r}, which this version of Transformers does not have: give a "
            "backbone that Transformers knows (one of custom code is not supported), or upgrade transformers"
        )
    return AutoConfig.for_model(**value)
