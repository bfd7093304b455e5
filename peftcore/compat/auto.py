"""peftcore's versions of peft's Auto classes. They load an adapter together with the base that its file names."""

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
    """Loads an adapter, together with the base that its file names, as a `PeftModel`."""

    task: ClassVar[str | None] = None
    """peft's task type that the base must have; None for any task."""

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
        """Returns a `PeftModel` with the adapter and the base that the adapter's file names.

        Args:
            pretrained_model_name_or_path: the path or repository of the adapter, as in `peftcore.load`.
            adapter_name: the adapter's name.
            is_trainable: whether the adapter trains.
            revision: as in `peftcore.load`.
            options: arguments of `peftcore.load_base`: ``fetch=True`` downloads a base that is not available locally;
                ``dtype=``, ``device_map=`` and others are passed to transformers. Arguments of peft are accepted with
                values that peftcore supports.

        Raises:
            CheckpointError, HubError, HostMismatch, NewerFormat, UnknownMethod: as `peftcore.load_base`.
            HostMismatch: the base is for another task.
            ConfigError: an argument of peft has a value that peftcore does not support.
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
    """Loads a language model with its adapter."""

    task = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads a sequence-to-sequence model with its adapter."""

    task = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads a classifier of sequences with its adapter."""

    task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads a classifier of tokens with its adapter."""

    task = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads a model for question answering with its adapter."""

    task = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads a model without a head, with its adapter."""

    task = "FEATURE_EXTRACTION"
