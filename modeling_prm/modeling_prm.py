"""The process reward model: a backbone with a value head that is read once a step."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput, can_return_tuple, logging

from .backbones import add_separator, backbone_init_options, chat_problem_template, load_backbone
from .configuration_prm import PRMConfig, has_offset_positions
from .conversation_layout import conversation_layout
from .processing_prm import PRMProcessor
from .scoring import PRMVerifier
from .step_loss import step_loss

if TYPE_CHECKING:
    # A checkpoint takes along the files that relative imports reach, in this block too.
    from .pipeline_prm import StepScoringPipeline  # noqa: F401

logger = logging.get_logger(__name__)


@dataclass
class StepScoringOutput(ModelOutput):
    """What `PRMForStepScoring` returns; S is the most steps of any sequence in the batch.

    Attributes:
        loss: float32 scalar, where labels were given.
        logits: (B, S) float32, or (B, S, K) for K classes; 0 where there is no step.
        step_probs: (B, S) float32, how likely each step is to be correct, at the config's temperature; 0
            where there is no step.
        step_mask: (B, S) bool, True where there is a step.
        past_key_values, hidden_states, attentions: the backbone's own, where asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    step_probs: torch.Tensor | None = None
    step_mask: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ValueHead(nn.Module):
    """Hidden states (..., H) of any dtype to float32 logits (..., K).

    Its weights are float32 and it computes in float32 whatever the backbone's dtype or autocast is.
    """

    def __init__(self, config: PRMConfig) -> None:
        super().__init__()
        hidden_size = config.get_text_config().hidden_size
        self.dropout = nn.Dropout(config.head_dropout if config.head_type == "linear" else 0.0)
        self.dense = nn.Linear(hidden_size, hidden_size, dtype=torch.float32) if config.head_type == "mlp" else None
        self.out = nn.Linear(hidden_size, config.num_labels, dtype=torch.float32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = self.dropout(hidden.float())
            if self.dense is not None:
                hidden = torch.relu(_float32_linear(self.dense, hidden))
            return _float32_linear(self.out, hidden)


class PRMForStepScoring(PreTrainedModel):
    """A backbone that `AutoModel` knows, with a value head read at the end of each reasoning step.

    Make one from a pretrained backbone with `from_backbone`, load a saved one with `from_pretrained`.
    """

    config_class = PRMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Loading reads the strict list for dtypes, quantizers read the other one.
    _keep_in_fp32_modules = ["value_head"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["value_head"]  # noqa: RUF012

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers reads the class's file for an answer; here the backbone is what has experts.
        return True

    def __init__(self, config: PRMConfig) -> None:
        super().__init__(config)
        if config.text_config is None:
            raise ValueError("PRMConfig.text_config is None; give it the configuration of a backbone")
        self.backbone = AutoModel.from_config(config.text_config, **backbone_init_options(config.text_config))
        self.value_head = ValueHead(config)
        self._backbone_arguments = frozenset(inspect.signature(self.backbone.forward).parameters)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        step_positions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **backbone_kwargs: Any,
    ) -> StepScoringOutput:
        """Score every step of B sequences in one pass.

        Args:
            input_ids: (B, L) int64, as `PRMProcessor` writes them.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side.
            step_positions: (B, S) int64, where each step's score is read, padded with -1. Where the
                separator is reserved they may be left out and are found in the ids.
            labels: (B, S) float, 1 correct, 0 incorrect, between them a soft label, -100 ignored; with K
                classes the class index.
            num_items_in_batch: labelled steps in the whole optimizer step, see `step_loss`.
            **backbone_kwargs: given to the backbone as they are (`position_ids`, `past_key_values`,
                `inputs_embeds`, `output_hidden_states`, ...).

        Raises:
            ValueError: `step_positions` are missing where they cannot be found, labels do not match, or the
                input is longer than the backbone can read.
        """
        self._check_length(input_ids, backbone_kwargs)
        if step_positions is None:
            step_positions = self._find_step_positions(input_ids, attention_mask)
        if labels is not None and labels.shape != step_positions.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not match step_positions of shape "
                f"{tuple(step_positions.shape)}; give one label a step, -100 where there is none"
            )
        if "use_cache" in self._backbone_arguments and backbone_kwargs.get("past_key_values") is None:
            # An unused cache costs memory, and with one in play packed rows would see each other.
            backbone_kwargs.setdefault("use_cache", False)
        if attention_mask is not None and self._derives_position_ids(attention_mask, backbone_kwargs):
            backbone_kwargs["position_ids"] = _position_ids(attention_mask, input_ids, backbone_kwargs)
        outputs = self.backbone(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **backbone_kwargs)
        logits, step_probs, step_mask = self._score(outputs.last_hidden_state, step_positions)
        return StepScoringOutput(
            loss=None if labels is None else step_loss(logits, labels, num_items_in_batch),
            logits=logits,
            step_probs=step_probs,
            step_mask=step_mask,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved PRM, as any Transformers model; arguments are those of `PreTrainedModel`.

        Raises:
            ValueError: the checkpoint is another kind of model, or lacks weights, so that a part of the
                PRM would be random.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if missing := sorted(map(str, info["missing_keys"])):
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of this PRM ({shown}), which would "
                "be random; if it is a language model, start a PRM from it with PRMForStepScoring.from_backbone(...)"
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def from_backbone(
        cls,
        backbone: Any,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        head_type: str = PRMConfig.head_type,
        head_dropout: float = PRMConfig.head_dropout,
        num_labels: int = 1,
        class_weights: list[float] | None = None,
        separator_token: str = PRMConfig.separator_token,
        prompt_layout: str = PRMConfig.prompt_layout,
        problem_template: str | None = None,
        step_template: str = PRMConfig.step_template,
        step_joiner: str = PRMConfig.step_joiner,
        conversations: str = "auto",
        max_length: int | None = None,
        aggregation: str = PRMConfig.aggregation,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        gguf_file: str | None = None,
        revision: str = "main",
        token: str | bool | None = None,
    ) -> tuple[PRMForStepScoring, PRMProcessor]:
        """Start a PRM from a pretrained backbone, with a new value head.

        The separator is added to tokenizer and backbone together; its embedding is the mean of the others.

        Args:
            backbone: a Hub id, a folder, a GGUF file or a folder that holds one, or a loaded model,
                which becomes a part of the PRM.
            tokenizer: the tokenizer of a loaded model; read from the folder otherwise.
            head_type, head_dropout, num_labels, class_weights, separator_token, prompt_layout,
            problem_template, step_template, step_joiner, aggregation: as in `PRMConfig`. With
                `prompt_layout="chat"` the tokenizer's chat template is rendered once and kept.
            conversations: how conversations are laid out: `"chat"` as the tokenizer's chat template does, which is
                taken down once and kept; `"plain"` with the role's name before each message; `"auto"` plain where
                there is no chat template, or, with a warning, where it cannot be taken down.
            max_length: most tokens in one input; by default as many as the backbone reads.
            dtype: of the backbone's weights; float32 by default (train with autocast), or as it is for a
                loaded model. The head is float32.
            attn_implementation, gguf_file, revision, token: as in `AutoModel.from_pretrained`.

        Returns:
            The model, in evaluation mode, and its processor.

        Raises:
            TypeError, ValueError: the backbone or an option cannot be used; the message says why.
        """
        backbone, tokenizer = load_backbone(
            backbone,
            tokenizer,
            dtype=dtype,
            attn_implementation=attn_implementation,
            gguf_file=gguf_file,
            revision=revision,
            token=token,
        )
        if problem_template is None:
            chat = prompt_layout == "chat"
            problem_template = chat_problem_template(tokenizer) if chat else PRMConfig.problem_template
        layout, why_plain = conversation_layout(tokenizer, conversations)
        if why_plain is not None and tokenizer.chat_template:
            logger.warning(
                "conversations are laid out plainly, with the role's name before each message: %s", why_plain
            )
        config = PRMConfig(
            text_config=backbone.config,
            head_type=head_type,
            head_dropout=head_dropout,
            num_labels=num_labels,
            class_weights=class_weights,
            separator_token=separator_token,
            prompt_layout=prompt_layout,
            problem_template=problem_template,
            step_template=step_template,
            step_joiner=step_joiner,
            max_length=max_length,
            aggregation=aggregation,
            conversation_layout=layout.to_dict(),
        )
        config.separator_token_id, config.separator_is_reserved = add_separator(backbone, tokenizer, separator_token)
        config.max_length = config.max_length or config.max_positions
        config.dtype = backbone.dtype
        processor = PRMProcessor(tokenizer, **config.layout)
        config.ids_probe = processor.ids_probe
        return cls._around(backbone, config), processor

    def verifier(
        self, processor: PRMProcessor, aggregation: str | None = None, *, threshold: float | None = None
    ) -> PRMVerifier:
        """What scores and ranks solutions with this model; arguments and errors as in `PRMVerifier`."""
        return PRMVerifier(self, processor, aggregation, threshold=threshold)

    @classmethod
    def _around(cls, backbone: PreTrainedModel, config: PRMConfig) -> PRMForStepScoring:
        """A PRM that holds this very backbone, and a freshly initialized head."""
        with torch.device("meta"):
            model = cls(config)
        model.backbone = backbone
        model.value_head = ValueHead(config)
        with torch.no_grad():
            model.value_head.apply(model._init_weights)
        model.value_head.to(backbone.device)
        return model.eval()

    def _check_length(self, input_ids: torch.Tensor | None, backbone_kwargs: dict[str, Any]) -> None:
        """Refuse what the backbone would read past its positions, and score without a word."""
        most = self.config.max_positions
        if most is None or input_ids is None or backbone_kwargs.get("position_ids") is not None:
            return
        if input_ids.shape[1] > most:
            raise ValueError(
                f"the input is {input_ids.shape[1]} tokens long, the backbone reads {most}; score shorter solutions, "
                "or let PRMProcessor check them with max_length"
            )

    def _find_step_positions(self, input_ids: torch.Tensor | None, attention_mask: Any) -> torch.Tensor:
        """Positions (B, S) of the separators in the ids that are not padding, padded with -1."""
        config = self.config
        if input_ids is None or not config.separator_is_reserved or config.separator_token_id is None:
            raise ValueError(
                "step_positions are needed here: "
                + ("without input_ids" if input_ids is None else f"the separator {config.separator_token!r}")
                + " cannot tell where steps end; PRMProcessor returns them"
            )
        length = input_ids.shape[1]
        index = torch.arange(length, device=input_ids.device)
        is_separator = input_ids == config.separator_token_id
        if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == input_ids.shape:
            is_separator &= attention_mask.bool()
        positions = torch.where(is_separator, index, length).sort(dim=1).values
        num_steps = max(int((positions < length).sum(dim=1).max()), 1)
        positions = positions[:, :num_steps]
        return torch.where(positions < length, positions + config.score_offset, -1)

    def _derives_position_ids(self, attention_mask: Any, backbone_kwargs: dict[str, Any]) -> bool:
        """Whether to number the tokens by the mask, so that padding on the left changes nothing."""
        return (
            # Some backbones take a dictionary of masks.
            isinstance(attention_mask, torch.Tensor)
            and attention_mask.dim() == 2
            and "position_ids" in self._backbone_arguments
            and backbone_kwargs.get("position_ids") is None
            and not has_offset_positions(self.config.text_config)
        )

    def _score(
        self, hidden: torch.Tensor, step_positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, probabilities and mask at the step positions of hidden states (B, L, H)."""
        step_positions = step_positions.to(hidden.device)
        step_mask = step_positions >= 0
        index = step_positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        logits = self.value_head(hidden.gather(1, index))
        mask = step_mask.to(logits.device)
        if self.config.num_labels == 1:
            logits = logits.squeeze(-1).masked_fill(~mask, 0.0)
            step_probs = torch.sigmoid(logits / self.config.temperature)
        else:
            logits = logits.masked_fill(~mask.unsqueeze(-1), 0.0)
            probs = (logits / self.config.temperature).softmax(dim=-1).unbind(dim=-1)
            weighted = [weight * prob for weight, prob in zip(self.config.class_weights, probs, strict=True)]
            # Rounded, the classes that count as right can sum to a little more than 1.
            step_probs = torch.stack(weighted).sum(dim=0).clamp(max=1.0)
        return logits, step_probs.masked_fill(~mask, 0.0), mask


def _float32_linear(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    # `.to(torch.bfloat16)` on the whole model reaches the head's weights too.
    if linear.weight.dtype == torch.float32:
        return linear(hidden)
    return nn.functional.linear(hidden, linear.weight.float(), linear.bias.float())


def _position_ids(
    attention_mask: torch.Tensor, input_ids: torch.Tensor | None, backbone_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Positions (B, L) of the tokens given, counted by the mask over cached and given tokens."""
    length = (input_ids if input_ids is not None else backbone_kwargs["inputs_embeds"]).shape[1]
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
