"""Arguments of transformers' Trainer, as the installed version calls them."""

from dataclasses import dataclass
from typing import Any

import pytest
import transformers

from peftcore_lab.training.run_trainer import _checkpointing


def test_blocks_that_run_again_are_asked_for_by_the_name_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Older:
        """The arguments before 5.23, as far as they matter."""

        gradient_checkpointing: bool = False
        gradient_checkpointing_kwargs: dict[str, Any] | None = None

    assert _checkpointing(True) == {"activation_checkpointing": True}
    monkeypatch.setattr(transformers, "TrainingArguments", Older)
    found = Older(**_checkpointing(True))
    assert found.gradient_checkpointing and found.gradient_checkpointing_kwargs == {"use_reentrant": False}
