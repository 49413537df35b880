"""The part of `PRMTrainer` that writes: checkpoints, saved models, pushes."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from hub_card.errors import without_token
from hub_card.publishing import Publication

from .adapters import has_adapters, save_adapters
from .checkpoints import save_whole, saving_folder
from .guards import check_finite_weights, warn_if_undefined
from .publishing import publish_folder
from .sharding import own_class, whole_weights

logger = logging.getLogger(__name__)


class SavingTrainer(Trainer):
    """Saves checkpoints whole or not at all, models as plain PRMs, and pushes them with `hub_card.publish`."""

    _saving_checkpoint = False

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return saving_folder(folder) if self._saving_checkpoint else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As in `Trainer`, but whole or not at all."""
        check_finite_weights(model, self.state.global_step)
        folder = self._get_output_dir(trial)
        self._saving_checkpoint = True
        try:
            checkpoint = save_whole(self, folder, partial(super()._save_checkpoint, model, trial))
        finally:
            self._saving_checkpoint = False
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; of a model in shards, the whole one."""
        with whole_weights(self):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in `Trainer`; of a model in adapters, checkpoints hold the adapters and other saves the merged PRM."""
        if not has_adapters(self.model):
            with own_class(self.model):
                super()._save(output_dir, state_dict)
            return
        save_adapters(
            super()._save,
            self.model,
            self.processing_class,
            output_dir or self.args.output_dir,
            state_dict,
            is_checkpoint=self._saving_checkpoint,
            is_main_process=self.args.should_save,
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        warn_if_undefined(metrics, self.args, self.state.global_step)
        return bool(super()._determine_best_metric(metrics, trial))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Publication | None:
        """Save the model and publish it to `args.hub_model_id` with `hub_card.publish`, on the main process.

        Args:
            commit_message, token, revision, private: as in `publish`; by default those of the arguments.
            blocking: must be True, since what is published is checked and compared first.

        Returns:
            What was published; None on the other processes.

        Raises:
            ValueError: `blocking=False`.
            CheckpointError, OSError: as `publish`.
        """
        if not blocking:
            raise ValueError("blocking=False would go on before the published model is checked; leave it at True")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return publish_folder(
            self,
            self.args.output_dir,
            commit_message=commit_message or "End of training",
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, by the same way as `push_to_hub`."""
        if self._saving_checkpoint or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return  # what is being saved is pushed when it is whole
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            publish_folder(
                self,
                checkpoint_folder,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                private=self.args.hub_private_repo,
            )
        except Exception as error:
            # Hours of training are worth more than this push, whatever is wrong with it.
            said = without_token(str(error), self.args.hub_token)
            logger.warning("the push at step %d failed, training goes on: %s", self.state.global_step, said)
