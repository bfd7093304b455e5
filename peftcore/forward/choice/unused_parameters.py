"""Checks for inactive adapters with trainable parameters under DistributedDataParallel.

In backward, DistributedDataParallel waits for a gradient of each trainable parameter, and parameters of an inactive
adapter get none. So an error is raised at the first forward, before a reduction hangs or fails one step later. The
check needs no record of earlier forwards. Therefore it is a function, and not a part of
`peftcore.surgery.watched_sites`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn.parallel.distributed import DistributedDataParallel

from peftcore.contract.installed_methods import Installed
from peftcore.errors import TrainingError


def check_all_act(model: nn.Module, injections: Mapping[str, Installed], acting: Collection[str]) -> None:
    """Check that every adapter with trainable parameters is active, if DistributedDataParallel waits for all gradients.

    Args:
        model: the adapted model.
        injections: the injections of the model by name.
        acting: the names of the active injections that are not merged.

    Raises:
        TrainingError: an adapter with trainable parameters is inactive.
    """
    # A private attribute, the only one that tells: torch.compile finds the wrapper in the same way.
    runner = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if runner is None or not torch.is_grad_enabled() or not runner.require_backward_grad_sync:
        return
    if runner.find_unused_parameters or runner.static_graph or runner.parameters_to_ignore:
        return
    used = {id(parameter) for name in acting for parameter in injections[name].parameters()}
    for name, injection in injections.items():
        unused = (each for each in injection.parameters() if each.requires_grad and id(each) not in used)
        if name not in acting and any(True for _ in unused) and any(each is model for each in runner.modules()):
            raise TrainingError(
                f"{name!r} trains but is not active, and DistributedDataParallel waits for gradients of all trainable "
                f"parameters: call injection.trainable(False) before you wrap the model, activate {name!r}, or wrap "
                "the model with find_unused_parameters=True"
            )
