"""Base of the trainers whose model has a value head: adapters go on the model inside, and the head is saved beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from trl.models.score import unwrap
from trl.models.value_heads.auto_models import WithValueHead
from trl.models.value_heads.heads import ValueModel
from trl.models.value_heads.storage import VALUE_MODEL, stored_head, without_copies
from trl.trainers.base import BaseTrainer


class ValueHeadTrainer(BaseTrainer):
    """A trainer of a model with a value head; it adds one to a model without."""

    head_class: ClassVar[type[WithValueHead]] = WithValueHead

    def _with_head(self, model: nn.Module) -> WithValueHead:
        """Put a new value head on the language model."""
        raise NotImplementedError

    def _with_adapters(self, model: nn.Module, peft_config: Any) -> WithValueHead:
        if not isinstance(model, self.head_class):
            return self._with_head(super()._with_adapters(model, peft_config))
        model.pretrained_model = super()._with_adapters(model.pretrained_model, peft_config)
        return model

    def _adapted(self) -> nn.Module:
        return self.model.pretrained_model

    def _set_adapted(self, model: nn.Module) -> None:
        self.model.pretrained_model = model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, self.model.pretrained_model)
        if isinstance(self.model.v_head, ValueModel):
            super()._load_from_checkpoint(str(Path(resume_from_checkpoint) / VALUE_MODEL), self.model.v_head.model)
        head = stored_head(resume_from_checkpoint, {})
        assert head is not None, "checkpoints are written by save_pretrained, with the head"
        self.model.v_head.take(head)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the model with its value head, and the tokenizer."""
        self.accelerator.unwrap_model(self.model).save_pretrained(save_directory, **kwargs)
        self.processing_class.save_pretrained(save_directory)

    _save_pretrained = save_pretrained

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            state = None if state_dict is None else without_copies(unwrap(self.model), state_dict)
            self.save_pretrained(output_dir or self.args.output_dir, state_dict=state)

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> Any:
        """Upload model, value head and tokenizer to `repo_id`; without it, as `transformers.Trainer` does."""
        if repo_id is None:
            return super().push_to_hub(**kwargs)
        self.processing_class.push_to_hub(repo_id, **kwargs)
        return self.accelerator.unwrap_model(self.model).push_to_hub(repo_id, **kwargs)
