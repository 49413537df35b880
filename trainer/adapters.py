"""LoRA adapters (2106.09685) on a PRM's backbone, with the `peft` library.

model = add_adapters(model, AdapterArguments(lora_r=16))
trainer = PRMTrainer(model, ...)  # its save_model writes the merged PRM, and the adapters beside it

Of the rest, the value head is trained whole and the separator's embedding as a row of its own, since a new PRM has
both from scratch.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from hub_card.publishing import plain_model
from modeling_prm import PRMConfig

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
_HEAD = "value_head"
# What an adapter is, beside its weights; dropout may change when training goes on.
_SAME = ("r", "lora_alpha", "target_modules")


@dataclass
class AdapterArguments:
    """Options of LoRA adapters, which leave the backbone's own weights as they are.

    Args:
        lora_r: rank of the adapters, at least 1; None trains all weights and no adapters.
        lora_alpha: the adapters' output is scaled by `lora_alpha / lora_r`; twice the rank where left out.
        lora_dropout: dropout before the adapters, at least 0 and below 1.
        lora_target_modules: names of the linear layers that get adapters, or `["all-linear"]` for all of the backbone.

    Raises:
        ValueError: a value outside those allowed, or options of adapters without `lora_r`.
    """

    _argument_group_name = "adapters"

    lora_r: int | None = field(
        default=None,
        metadata={"help": "Rank of LoRA adapters; all weights are trained, without adapters, if left out."},
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the adapters times their rank; twice the rank if left out."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers with adapters, such as q_proj v_proj; all-linear for every linear one."},
    )

    def __post_init__(self) -> None:
        if self.lora_r is None:
            if (self.lora_alpha, self.lora_dropout, self.lora_target_modules) != (None, 0.0, ["all-linear"]):
                raise ValueError(
                    "lora_alpha, lora_dropout and lora_target_modules are options of adapters, which lora_r asks for; "
                    "give --lora-r, or leave them out"
                )
            return
        if self.lora_r < 1 or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"lora_r must be at least 1 and lora_dropout in [0, 1), got {self.lora_r} and {self.lora_dropout}"
            )
        if not (self.lora_alpha is None or self.lora_alpha > 0.0) or not self.lora_target_modules:
            raise ValueError(
                "lora_alpha must be above 0 and lora_target_modules must not be empty, got "
                f"{self.lora_alpha} and {self.lora_target_modules}"
            )


def import_peft() -> ModuleType:
    """The module `peft`, or an ImportError that says how to install it."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(
            'adapters need peft, which is not installed: run `pip install "modeling-prm[train]"`'
        ) from error


def add_adapters(model: Any, options: Any) -> Any:
    """Put a PRM into LoRA adapters; the model given becomes a part of what is returned.

    Args:
        model: a `PRMForStepScoring`.
        options: `AdapterArguments` with a rank, or a `peft.LoraConfig`, to which the value head and the separator's
            row are added, and whose `task_type` is left out since the PRM's own forward is the one to call.

    Returns:
        A `peft.PeftModel`, whose adapters change no score yet.

    Raises:
        TypeError: options of another type, such as those of another kind of adapters.
        ValueError: the model has adapters already, no rank was given, or no layer has one of the names.
    """
    peft = import_peft()
    if has_adapters(model):
        raise ValueError("the model has adapters already; give it as it is, without options for new ones")
    if isinstance(options, AdapterArguments):
        if options.lora_r is None:
            raise ValueError("lora_r is None, which asks for no adapters; give a rank such as 16")
        targets = options.lora_target_modules
        if targets != ["all-linear"]:
            _check_targets(model.backbone, targets)
        options = peft.LoraConfig(
            r=options.lora_r,
            lora_alpha=2 * options.lora_r if options.lora_alpha is None else options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
        )
    if not isinstance(options, peft.LoraConfig):
        raise TypeError(f"options must be AdapterArguments or peft.LoraConfig, got {type(options).__name__}")
    # Of what it saves whole, peft makes no adapters.
    config = dataclasses.replace(
        options,
        task_type=None,
        modules_to_save=sorted({*(options.modules_to_save or ()), _HEAD}),
        trainable_token_indices=_trained_rows(options, model),
    )
    return peft.get_peft_model(model, config)


def _trained_rows(options: Any, model: Any) -> Any:
    """The rows of embeddings that peft trains: those of its config, and the separator's."""
    given, separator = options.trainable_token_indices, model.config.separator_token_id
    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)

    def is_embedding(name: str) -> bool:
        return f".{path}".endswith(f".{name}")

    if any(map(is_embedding, options.modules_to_save or ())):
        return given  # all rows are trained
    if isinstance(given, dict):
        name = next(filter(is_embedding, given), path.rpartition(".")[2])
        return {**given, name: sorted({*given.get(name, ()), separator})}
    return sorted({*(given or ()), separator})


def _check_targets(backbone: torch.nn.Module, targets: list[str]) -> None:
    """Refuse a name that no layer of the backbone has, which peft passes over if another one is found."""
    names = [f".{name}" for name, _ in backbone.named_modules()]
    if absent := [target for target in targets if not any(name.endswith(f".{target}") for name in names)]:
        linear = {name for name, module in backbone.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"no layer of the backbone is named {', '.join(absent)}; its linear layers are {', '.join(known)}; name "
            "some of them, or all-linear alone"
        )


def has_adapters(model: Any) -> bool:
    """Whether a model is one that `add_adapters` or peft made."""
    return hasattr(model, "merge_and_unload")


def check_adapters(model: Any, *, freeze_backbone: bool) -> None:
    """Check that a model in adapters can be trained as a PRM; one without adapters always passes.

    Raises:
        ValueError: the value head would not be trained, or the option takes the adapters out of training.
    """
    if not has_adapters(model):
        return
    if freeze_backbone:
        raise ValueError("freeze_backbone trains the head alone, so that adapters do nothing; leave out one of the two")
    if not any(_HEAD in name and parameter.requires_grad for name, parameter in model.named_parameters()):
        raise ValueError(
            "the value head of this model in adapters would stay as it is; make it with "
            f"trainer.adapters.add_adapters(model, config), or with modules_to_save=[{_HEAD!r}] in peft's config"
        )


def save_adapters(
    save: Callable[..., None],
    model: Any,
    processor: Any,
    folder: str,
    state_dict: dict[str, Any] | None,
    *,
    is_checkpoint: bool,
    is_main_process: bool,
) -> None:
    """Save a model in adapters, as a checkpoint of training or as a PRM.

    A checkpoint of training holds adapters, head and separator row, and the PRM's config. Other folders hold the
    PRM with its adapters merged, which loads like any other, and those files in the folder `adapter`.

    Args:
        save: `Trainer._save`.
        model: the model in adapters.
        processor: its processor.
        folder: where to.
        state_dict: the weights, where they are sharded and were gathered; they are saved without merging.
        is_checkpoint: whether training goes on from there.
        is_main_process: the one that writes.
    """
    merges = not is_checkpoint and state_dict is None
    adapter_folder = str(Path(folder) / ADAPTER_FOLDER) if merges else folder
    save(adapter_folder, state_dict)
    if not is_main_process:
        return
    model.config.to_json_file(str(Path(adapter_folder) / "config.json"))
    if merges:
        plain_model(model).save_pretrained(folder)
        processor.save_pretrained(folder)
    elif not is_checkpoint:
        logger.warning(
            "%s holds the adapters alone, since the weights are sharded; merge them in one process with "
            "trainer.adapters.load_adapters(model, folder).merge_and_unload()",
            folder,
        )


def load_adapters(model: Any, folder: str | Path, *, trainable: bool = False) -> Any:
    """Put a PRM into saved adapters.

    Args:
        model: the PRM that they were trained on: from the same backbone by `from_backbone` with the same options, or
            the PRM that training went on from.
        folder: a checkpoint of training, or the folder `adapter` beside a merged PRM.
        trainable: whether to go on training them.

    Returns:
        A `peft.PeftModel`, in evaluation mode unless trainable; its `merge_and_unload()` gives the plain PRM.

    Raises:
        ValueError: the folder holds no adapters, or those of a PRM with another layout or head.
    """
    peft = import_peft()
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} holds no adapters; give a folder with {ADAPTER_CONFIG}")
    saved = PRMConfig.from_pretrained(folder)
    names = [*model.config.layout, "separator_token_id", "head_type", "num_labels"]
    different = [name for name in names if name != "max_length" and getattr(saved, name) != getattr(model.config, name)]
    if different:
        shown = "; ".join(f"{name} is {getattr(saved, name)!r} there" for name in different)
        raise ValueError(f"the adapters in {folder} are of another PRM: {shown}. Give the model they were trained on")
    # The calibration of the model that was trained, which its config holds.
    model.config.temperature, model.config.error_threshold = saved.temperature, saved.error_threshold
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)


def check_same_adapters(model: Any, checkpoint: str) -> None:
    """Check that a checkpoint of training has the adapters of this model, or none as it.

    Raises:
        ValueError: it has others; the message names the options.
    """
    path = Path(checkpoint) / ADAPTER_CONFIG
    if not path.is_file():
        if has_adapters(model):
            raise ValueError(f"{checkpoint} was trained without adapters; leave out --lora-r to go on from it")
        return
    saved = _adapter_options(json.loads(path.read_text(encoding="utf-8")))
    if not has_adapters(model):
        raise ValueError(
            f"{checkpoint} holds LoRA adapters; give --lora-r {saved['r']} and their other options to go on from it"
        )
    config = _active_config(model)
    given = _adapter_options({name: getattr(config, name) for name in _SAME})
    different = [f"{name} was {saved[name]!r}" for name in _SAME if saved[name] != given[name]]
    if different:
        raise ValueError(
            f"{checkpoint} was trained with other adapters: {'; '.join(different)}. Give the same options to go on"
        )


def describe_adapters(model: Any) -> dict[str, int | float]:
    """The adapters' rank, scale and dropout by the names of `AdapterArguments`; nothing without adapters."""
    if not has_adapters(model):
        return {}
    config = _active_config(model)
    return {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}


def _active_config(model: Any) -> Any:
    return model.peft_config[model.active_adapters[0]]


def _adapter_options(values: dict[str, Any]) -> dict[str, Any]:
    targets = values["target_modules"]
    return {
        **{name: values[name] for name in _SAME},
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
    }
