"""Completes the checkpoints of a Trainer that saves the model in a custom way (sentence-transformers).

Tensors that such a Trainer omits are stored in an extra file in the checkpoint's folder, and read from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftcore.errors import TrainingError
from peftcore.files.safe_io import TensorFile
from peftcore.trainers.trainer_checkpoints import state_between_steps

FILE = "peftcore_adapters.safetensors"


def save_beside(tensors: Mapping[str, Any], folder: Path) -> None:
    """Write tensors of a model's state dict into the folder of a checkpoint."""
    found = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in found.items()}, folder / FILE)


def read_beside(model: nn.Module, folder: Path) -> set[str]:
    """Load the tensors in the extra file of a checkpoint into the model. Returns their keys, or an empty set if the
    checkpoint has no such file.

    Raises:
        CheckpointError: the file is damaged.
        TrainingError: the file belongs to other adapters.
    """
    if not (folder / FILE).exists():
        return set()
    values = TensorFile(folder / FILE).read()
    held = {each.key: each.buffer for each in state_between_steps(model) if each.key in values}
    ours = model.state_dict()
    known = {**ours, **held}
    strange = [key for key, value in values.items() if key not in known or known[key].shape != value.shape]
    if strange:
        raise TrainingError(f"{folder / FILE} belongs to other adapters: this model has no {strange[0]} of that shape")
    for key, buffer in held.items():
        buffer.copy_(values[key])
    model.load_state_dict({key: value for key, value in values.items() if key not in held}, strict=False)
    return {*values}


def of_run(args: Any, state: TrainerState, optimizer: Any) -> Path | None:
    """Returns the folder of the checkpoint that the Trainer loaded. Callbacks do not get its path, so the folder of the
    current step in `output_dir` is returned if its state and its optimizer state equal the Trainer's; otherwise None.
    """
    folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
    if not (folder / TRAINER_STATE_NAME).exists():
        return None
    saved = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    if (saved.log_history, saved.best_metric) != (state.log_history, state.best_metric):
        return None
    if (folder / OPTIMIZER_NAME).exists():
        theirs = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        one, other = ([each for each in tree_leaves(it) if isinstance(each, Tensor)]
                      for it in (theirs, optimizer.state_dict()))  # fmt: skip
        if len(one) != len(other) or not all(torch.equal(a, b.cpu()) for a, b in zip(one, other, strict=True)):
            return None
    return folder
