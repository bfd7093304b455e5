"""Wraps an adapted model as a ``PeftModel`` of peft, for trainers that require one, such as those of TRL.

    model = peftcore.compat.get_peft_model(model, "dora", rank=8)  # or a configuration of peft
    trl.DPOTrainer(model=model, ...)

This package needs peft, and imports it. It may import `trainers` and the layers below. In the order of reading:

- `arguments`: checks arguments of peft's functions for which peftcore supports only one behaviour.
- `configs`: the configurations in ``peft_config``, adapters that are created from them, and `method_config`.
- `folders`: saves adapters in folders that transformers' Trainer and peft recognize.
- `schedules`: raises an error if the schedule of a method is not advanced in training.
- `training_state`: saves and loads an adapter's state between training steps.
- `tuner`: the module between a `PeftModel` and the adapted model.
- `peft_model`: `PeftModel`.
- `task_classes`: a subclass of `PeftModel` for each task of peft, and `get_peft_model`.
- `auto`: peft's ``AutoPeftModel`` classes, which load a base and its adapter in one call.
"""

from peftcore.compat.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from peftcore.compat.configs import method_config
from peftcore.compat.peft_model import PeftModel
from peftcore.compat.task_classes import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "get_peft_model",
    "method_config",
]
