"""Compat: an adapted model as a ``PeftModel`` of peft, for trainers that ask for one, such as those of TRL.

    model = peftcore.compat.get_peft_model(model, "dora", rank=8)  # or a configuration of peft
    trl.DPOTrainer(model=model, ...)

It needs peft, which nothing else imports. It may import `trainers`, and what is below. In the order of reading:

- `configs`: what stands in ``peft_config`` for an adapter, and adapters made of that again.
- `folders`: the folders that the Trainer and peft look for.
- `tuner`: what peft has between its model and the adapted one.
- `peft_model`: `PeftModel` and `get_peft_model`.
"""

from peftcore.compat.peft_model import PeftModel, get_peft_model

__all__ = ["PeftModel", "get_peft_model"]
