"""Subclasses of `PeftModel` for peft's tasks, which some trainers require, such as PPO of TRL; and `get_peft_model`,
which chooses the class."""

from __future__ import annotations

from typing import Any

import peft
from torch import nn

from peftcore.compat.configs import TASK
from peftcore.compat.peft_model import ALONE, PeftModel, task_for


class PeftModelForCausalLM(
    PeftModel,
    peft.PeftModelForCausalLM,  # type: ignore[misc]
    task="CAUSAL_LM",
):
    """An adapted language model."""


class PeftModelForSeq2SeqLM(
    PeftModel,
    peft.PeftModelForSeq2SeqLM,  # type: ignore[misc]
    task="SEQ_2_SEQ_LM",
):
    """An adapted sequence-to-sequence model."""


class PeftModelForSequenceClassification(
    PeftModel,
    peft.PeftModelForSequenceClassification,  # type: ignore[misc]
    task="SEQ_CLS",
):
    """An adapted classifier of sequences."""


class PeftModelForTokenClassification(
    PeftModel,
    peft.PeftModelForTokenClassification,  # type: ignore[misc]
    task="TOKEN_CLS",
):
    """An adapted classifier of tokens."""


class PeftModelForQuestionAnswering(
    PeftModel,
    peft.PeftModelForQuestionAnswering,  # type: ignore[misc]
    task="QUESTION_ANS",
):
    """An adapted model for question answering."""


class PeftModelForFeatureExtraction(
    PeftModel,
    peft.PeftModelForFeatureExtraction,  # type: ignore[misc]
    task="FEATURE_EXTRACTION",
):
    """An adapted model without a head."""


def get_peft_model(model: nn.Module, peft_config: Any, adapter_name: str = ALONE, **options: Any) -> PeftModel:
    """Adapts a model in place, by any method, and returns a `PeftModel` that wraps it:

        model = get_peft_model(model, "dora", rank=8)
        model = get_peft_model(model, peft.LoraConfig(r=8))

    Args:
        model: the model; changed in place.
        peft_config: a method, as `peftcore.apply` accepts it, a configuration of peft, or the result of
            `method_config`.
        adapter_name: the adapter's name.
        options: other arguments of `peftcore.apply`, and arguments of peft with values that peftcore supports.

    Returns:
        An instance of the `PeftModel` subclass for the model's task. The task is taken from the configuration, or else
        from the model's class. If the task is unknown, a plain `PeftModel`.

    Raises:
        PeftcoreError: as `peftcore.apply`; the model was not changed.
    """
    return PeftModel.for_task(task_for(model, peft_config))(model, peft_config, adapter_name, **options)


peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TASK] = get_peft_model
"""Trainers call peft's own `get_peft_model` with the user's configuration. Because of this entry, it calls the function
above if the configuration was made by `method_config`."""
