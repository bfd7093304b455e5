"""Videos in image models: the frames of a clip are consecutive rows of the batch."""

from __future__ import annotations

from torch import Tensor

from peftcore.errors import UnsupportedSite


def clips(x: Tensor, frames: int, pictures: int | None) -> int:
    """Return how many clips a batch contains.

    Args:
        x: the input of a block, ``[rows, ...]``.
        frames: the number of frames of a clip.
        pictures: the number of pictures that the model embedded; None if it is unknown.

    Raises:
        UnsupportedSite: a row is not a picture, or the rows do not divide into whole clips.
    """
    if pictures is not None and pictures != len(x):
        raise UnsupportedSite(
            f"a block got {len(x)} rows, but the model got {pictures} pictures: each row must be one whole frame"
        )
    if len(x) % frames:
        raise UnsupportedSite(
            f"{len(x)} rows are not a multiple of frames={frames}: fold clips into the batch, with the frames of each "
            "clip next to each other, or set frames="
        )
    return len(x) // frames


def dropped(added: Tensor, p: float, training: bool) -> Tensor:
    """Return ``[rows, tokens, d]`` with random token positions set to zero in training, the same positions in all
    rows."""
    if not training or not p:
        return added
    return added * added.new_empty(1, added.shape[1], 1).bernoulli_(1 - p).div_(1 - p)
