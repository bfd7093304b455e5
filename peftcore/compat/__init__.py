"""Compat: an adapted model as a ``PeftModel`` of peft, for trainers that ask for one, such as those of TRL.

    model = peftcore.compat.get_peft_model(model, "dora", rank=8)  # or a configuration of peft
    trl.DPOTrainer(model=model, ...)

It needs peft, which is imported only here. It may import `trainers` and the layers below. In the order of reading:

- `arguments`: arguments of peft that may only have the value that peftcore always uses.
- `configs`: entries of ``peft_config`` for adapters, and adapters made from such entries; `method_config`.
- `folders`: the folders that the Trainer and peft look for.
- `schedules`: an error for method schedules that are not advanced in training.
- `training_state`: the state of a training between steps, in such a folder.
- `tuner`: the module between peft's model and the adapted one.
- `peft_model`: `PeftModel`.
- `task_classes`: peft's classes for tasks, and `get_peft_model`.
- `auto`: the base and its adapter in one call, as peft's ``AutoPeftModel``.
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
