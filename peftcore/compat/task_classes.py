"""Classes of peft for tasks, which some trainers ask for, such as PPO of TRL; and `get_peft_model`, which chooses."""

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
    """An adapted model from text to text."""


class PeftModelForSequenceClassification(
    PeftModel,
    peft.PeftModelForSequenceClassification,  # type: ignore[misc]
    task="SEQ_CLS",
):
    """An adapted model with scores for a text."""


class PeftModelForTokenClassification(
    PeftModel,
    peft.PeftModelForTokenClassification,  # type: ignore[misc]
    task="TOKEN_CLS",
):
    """An adapted model with scores for each token."""


class PeftModelForQuestionAnswering(
    PeftModel,
    peft.PeftModelForQuestionAnswering,  # type: ignore[misc]
    task="QUESTION_ANS",
):
    """An adapted model that finds answers in a text."""


class PeftModelForFeatureExtraction(
    PeftModel,
    peft.PeftModelForFeatureExtraction,  # type: ignore[misc]
    task="FEATURE_EXTRACTION",
):
    """An adapted model without a head."""


def get_peft_model(model: nn.Module, peft_config: Any, adapter_name: str = ALONE, **options: Any) -> PeftModel:
    """Returns a model of peft around a model that is adapted in place, by any method:

        model = get_peft_model(model, "dora", rank=8)
        model = get_peft_model(model, peft.LoraConfig(r=8))

    Args:
        model: the model; changed in place.
        peft_config: a method, as `peftcore.apply` takes it, or a configuration of peft, or of `method_config`.
        adapter_name: the adapter's name.
        options: other arguments of `peftcore.apply`; those of peft, where they say what is so here.

    Returns:
        A model of the class for its task, where it has one: the configuration says which, or the model's own class.

    Raises:
        PeftcoreError: as `peftcore.apply`; the model was not changed.
    """
    return PeftModel.for_task(task_for(model, peft_config))(model, peft_config, adapter_name, **options)


peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TASK] = get_peft_model
"""peft's own function, which trainers call with the configuration that they get, calls ours for `method_config`."""
