"""`cache_weights`: computes effective weights once, while the user promises that the weights do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from peftcore.forward.state.slot import slot_of
from peftcore.forward.tensors.cache import caching


@contextmanager
def cache_weights(model: nn.Module) -> Iterator[None]:
    """Context manager in which evaluation computes effective weights once, instead of in each forward. The caller
    promises that no code changes the weights of the model and of its adapters until the end of the block.

        with torch.no_grad(), peftcore.cache_weights(unet):
            for t in scheduler.timesteps:
                ...

    Use it for custom decoding loops and for the steps of a sampler; ``model.generate`` does it automatically. It
    applies to this thread or task. Methods that change weights (dora, oft, loha) then cost as much as LoRA, and store a
    second copy of the changed weights until the block ends. Adapters may be switched, merged, loaded and removed in the
    block. Other changes are safe too if torch's version counter records them. A forward with gradients empties the
    cache.

    Args:
        model: the model, or a part of it. With a model without adapters the block does nothing.
    """
    slots = [slot for module in model.modules() if (slot := slot_of(module)) is not None]
    with caching({id(slot.state): slot.state for slot in slots}.values()):
        yield
