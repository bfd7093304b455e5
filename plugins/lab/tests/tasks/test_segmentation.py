"""The score of classes of pixels, held against scikit-learn's."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional

from peftcore_lab.tasks.segmentation import NOTHING, _mean_iou, _overlaps

metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("absent", [False, True])
def test_the_mean_over_classes_is_that_of_all_pixels(absent: bool) -> None:
    """In batches, with logits smaller than masks, pixels of no class, and a class that nothing has."""
    torch.manual_seed(0)
    logits = [torch.randn(2, 4, 4, 4) for _ in range(3)]
    labels = [torch.randint(2 if absent else 4, (2, 8, 8)) for _ in range(3)]
    for each, scores in zip(labels, logits, strict=True):
        each[:, 0] = NOTHING
        if absent:
            scores[:, 2:] = -9.0
    found = torch.cat([_overlaps(pair[0], pair[1]) for pair in zip(logits, labels, strict=True)])
    ours = _mean_iou(transformers.EvalPrediction(found.numpy(), torch.cat(labels).numpy()))["mean_iou"]
    whole = functional.interpolate(torch.cat(logits), (8, 8), mode="bilinear", align_corners=False).argmax(1)
    counts = torch.cat(labels) != NOTHING
    assert ours == pytest.approx(
        metrics.jaccard_score(torch.cat(labels)[counts].numpy(), whole[counts].numpy(), average="macro")
    )
