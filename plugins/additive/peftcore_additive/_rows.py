"""The start of soft prompts from embeddings of given or randomly drawn tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcore.author import SequenceSite
from peftcore.errors import ConfigError


def embedded_tokens(site: SequenceSite, length: int, ids: Sequence[int] = ()) -> Tensor:
    """Return the embeddings ``[length, width]`` of given tokens, repeated or cut to the length. Without `ids`, tokens
    are drawn randomly, all different if the vocabulary is large enough. The result is a new float32 tensor.

    Raises:
        ConfigError: an id is outside of the vocabulary.
    """
    if unknown := [each for each in ids if each >= site.in_features]:
        raise ConfigError(f"init_ids= has ids outside of the vocabulary of {site.in_features} tokens: {unknown[:4]}")
    chosen = torch.tensor(ids).repeat(-(-length // len(ids)))[:length] if ids else None
    if chosen is None:
        enough = length <= site.in_features
        chosen = torch.randperm(site.in_features)[:length] if enough else torch.randint(site.in_features, (length,))
    return site.embedded(chosen).to(torch.float32, copy=True)
