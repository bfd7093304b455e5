"""For the check of faults a method that fails it."""

from __future__ import annotations

from typing import Any

from mutant_base import Entry, graft_all, mutant
from torch import nn

from peftcore.author import Method
from peftcore.contract.surgeon_protocol import Surgeon


def tidies_up_after_errors_only(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    """Notes something at the host meanwhile, and forgets that Ctrl-C is no `Exception`."""
    vars(model)["adapting"] = True
    try:
        graft_all(self, model, config, surgeon)
    except Exception:
        del vars(model)["adapting"]
        raise
    del vars(model)["adapting"]


MUTANTS: dict[str, Entry] = {
    "faults_leave_nothing_half_done": (mutant("forgets_the_interrupt", inject=tidies_up_after_errors_only), "mlp"),
}
