"""`cache_weights`: a user promises that nothing writes to the weights for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from peftcore.forward.state.slot import slot_of
from peftcore.forward.tensors.cache import caching


@contextmanager
def cache_weights(model: nn.Module) -> Iterator[None]:
    """Context manager in which evaluation computes effective weights once, and not in each forward: a promise that
    nothing writes to the weights of the model and of its adapters until the end of the block.

        with torch.no_grad(), peftcore.cache_weights(unet):
            for t in scheduler.timesteps:
                ...

    For decoding loops of one's own and for the steps of a sampler; ``model.generate`` does it by itself. It holds for
    this thread or task. Methods that change weights (dora, oft, loha) then cost what LoRA costs, and hold a second copy
    of these weights until the block ends. Switching, merging, loading and removing adapters is seen in the block; so
    are changes that torch counts. A forward with gradients empties the cache.

    Args:
        model: the model, or a part of it. A model that is not adapted has nothing to keep.
    """
    slots = [slot for module in model.modules() if (slot := slot_of(module)) is not None]
    with caching({id(slot.state): slot.state for slot in slots}.values()):
        yield
