"""What `same_defaults` finds."""

import pytest

from peftcore import method
from peftcore.testing import CheckFailed, same_defaults

LORA = method("lora").Config()


def test_options_are_the_same() -> None:
    same_defaults(LORA, {"rank": LORA.rank})
    with pytest.raises(CheckFailed, match="rank is 8 by default here, 4 in their code: change it"):
        same_defaults(LORA, {"rank": 4})


def test_what_is_otherwise_says_why_and_only_then() -> None:
    same_defaults(LORA, {"rank": 4}, otherwise={"rank": "as in peft"})
    with pytest.raises(CheckFailed, match="remove it from `otherwise`"):
        same_defaults(LORA, {"rank": 8}, otherwise={"rank": "as in peft"})


def test_what_is_given_is_no_default() -> None:
    with pytest.raises(CheckFailed, match="rank: was given a value"):
        same_defaults(method("lora").Config(rank=8), {"rank": 8})


def test_options_are_ours_and_told() -> None:
    with pytest.raises(CheckFailed, match="ranks: not in LoRAConfig"):
        same_defaults(LORA, {"ranks": 8})
    with pytest.raises(CheckFailed, match=r"alpha: not in .*, or without a default"):
        same_defaults(LORA, {"rank": 8}, otherwise={"alpha": "as in peft"})
