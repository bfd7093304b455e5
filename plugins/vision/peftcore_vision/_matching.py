"""Access to the logits of models that compare images with texts, and ways to change them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftcore.errors import SequenceError
from peftcore_vision._features import FeatureSite

MATCH = "match"
"""The form of a site at the whole model, which returns logits of images and texts."""
PER_IMAGE, PER_TEXT = "logits_per_image", "logits_per_text"


@dataclass(frozen=True, eq=False)
class MatcherSite(FeatureSite):
    """The module that returns image features, in a model that compares images with texts."""

    @property
    def separable(self) -> bool:
        """Always False: rows cannot be routed to different adapters, since they are images in one part of the model and
        texts in another."""
        return False


def with_logits(output: Any, change: Callable[[Tensor], Tensor], classes: int = 1) -> Any:
    """Return a model's output with `change` applied to its logits ``[images, texts]``. The logits of the texts become
    the transpose of the result.

    Raises:
        SequenceError: the output lacks logits, contains the loss of image-text pairs, or has fewer texts than classes.
    """
    logits = _logits(output)
    if logits.shape[1] < classes:
        raise SequenceError(
            f"the model got {logits.shape[1]} texts, but there are {classes} classes: pass the texts of all classes, "
            "in order"
        )
    changed = change(logits)
    return type(output)(**{**output, PER_IMAGE: changed, PER_TEXT: changed.T})


def of_own_texts(output: Any) -> Any:
    """Return the output of a model that got separate texts for each image, with the texts ordered by image. Its logits
    ``[images, texts]`` compare each image with its own texts only. Its text features have the shape ``[images, texts,
    d]``.

    Raises:
        SequenceError: the output lacks logits, or contains the loss of image-text pairs.
    """
    logits = _logits(output)
    own = logits.unflatten(1, (len(logits), -1)).diagonal().T  # [images, images, texts] -> [images, texts]
    embeds = output["text_embeds"].unflatten(0, (len(logits), -1))
    return type(output)(**{**output, PER_IMAGE: own, PER_TEXT: own.T, "text_embeds": embeds})


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Mapping) or output.get(PER_IMAGE) is None:
        raise SequenceError(
            f"the model's {type(output).__name__} has no {PER_IMAGE}: call it with texts and images and "
            'return_dict=True; if it has a classifier instead of texts, set features="input" where the method has '
            "this option"
        )
    if output.get("loss") is not None:
        raise SequenceError(
            "return_loss=True computes the loss of pairs of images and texts, but these texts are classes: leave it "
            "out, and compute the loss from the logits"
        )
    logits: Tensor = output[PER_IMAGE]
    return logits
