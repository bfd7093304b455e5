"""peft's Auto classes: the base that an adapter's file names, and the adapter on it, in one call."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from peftcore.compat.arguments import without_peft_arguments
from peftcore.compat.folders import config_in
from peftcore.compat.peft_model import ALONE, PeftModel, task_for
from peftcore.errors import HostMismatch
from peftcore.files.auto_classes import peft_task_of
from peftcore.files.bases import load_base


class AutoPeftModel:
    """The base that an adapter's file names, adapted, as a `PeftModel`."""

    task: ClassVar[str | None] = None
    """peft's name of the task that the base has to be for."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = ALONE,
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        **options: Any,
    ) -> PeftModel:
        """Returns the base with the adapter.

        Args:
            pretrained_model_name_or_path: what `peftcore.load` takes.
            adapter_name: the adapter's name.
            is_trainable: whether it trains.
            revision: as of `peftcore.load`.
            options: arguments of `peftcore.load_base`: ``fetch=True`` fetches a base that is not here, ``dtype=``,
                ``device_map=`` and others are passed to transformers; arguments of peft with the values that peftcore
                always uses.

        Raises:
            CheckpointError, HubError, HostMismatch, NewerFormat, UnknownMethod: as `peftcore.load_base`.
            HostMismatch: the base is for another task.
            ConfigError: an argument of peft has another value.
        """
        options = without_peft_arguments(options)
        path = pretrained_model_name_or_path
        model = load_base(path, revision=revision, name=adapter_name, trainable=is_trainable, **options)
        if cls.task not in (None, found := peft_task_of(model)):
            raise HostMismatch(f"the base is for {found}, and {cls.__name__} is for {cls.task}: use AutoPeftModel")
        config = config_in(path)
        wrapped = PeftModel.for_task(task_for(model, config) or found)(model)
        wrapped._note_config(adapter_name, config)
        wrapped.set_adapter(adapter_name, inference_mode=not is_trainable)
        return wrapped if is_trainable else wrapped.eval()


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A language model with its adapter."""

    task = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """A model from text to text with its adapter."""

    task = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A model with scores for a text, with its adapter."""

    task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A model with scores for each token, with its adapter."""

    task = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """A model that finds answers in a text, with its adapter."""

    task = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """A model without a head, with its adapter."""

    task = "FEATURE_EXTRACTION"
