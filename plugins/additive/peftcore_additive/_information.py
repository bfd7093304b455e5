"""InfoNCE bounds on mutual information between soft prompts and features of the model, and between soft prompts and its
head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Operator, Site, Tap, forward_context

HIDDEN = -100.0
"""The number that is added to the scores of padding."""


def info_nce(positive: Tensor, negatives: Tensor, ceiling: float | None) -> Tensor:
    """Return the mean over a batch of ``-log softmax`` at the positive, of shape ``[]``.

    Args:
        positive: the score of the positive, ``[batch, 1]``.
        negatives: the scores of the negatives, ``[batch, k]``.
        ceiling: the largest loss of a text; a larger loss is clamped and has no gradient.
    """
    scores = torch.cat([positive, negatives], -1)
    loss = -scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)[:, 0]
    return (loss if ceiling is None else loss.clamp(max=ceiling)).mean()


class FeatureCritic(nn.Module):
    """Scores features of a text, drawn from Gaussians, against its prompt."""

    def __init__(self, width: int, hidden: int, draws: int) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.up, self.of_prompt = nn.Linear(hidden, width, bias=False), nn.Linear(width, width)
        self.draws = draws

    def forward(self, without: Tensor, within: Tensor, prompt: Tensor, ceiling: float | None) -> tuple[Tensor, Tensor]:
        """Return the bound's loss, and how far the Gaussians are from N(0, 1); both ``[]``.

        Args:
            without: the state of each text without the prompt ``[batch, width]``, from which negatives are drawn.
            within: the same behind the prompt, from which positives are drawn.
            prompt: the mean of the prompt's rows ``[batch, width]``, which is detached.
            ceiling: as in `info_nce`.
        """
        batch, width = within.shape
        asked = self.of_prompt(prompt.detach()) @ self.up.weight / width**0.5  # [batch, hidden]
        scores: list[Tensor] = []
        divergence = within.new_zeros(())
        for state, count in ((within, 1), (without, self.draws * batch)):
            mean, log_std = self.mean(state), self.log_std(state).clamp(-2.0, 10.0)
            noise = torch.randn(batch, count, mean.shape[-1], dtype=mean.dtype, device=mean.device)
            features = mean[:, None] + noise * log_std.exp()[:, None]  # [batch, count, hidden]
            scores.append((features @ asked[..., None]).squeeze(-1))
            divergence = divergence + (mean.square() + (2 * log_std).exp() - 1).mean() / 2 - log_std.mean()
        positive, negatives = scores
        return info_nce(positive, negatives, ceiling), divergence


class HeadLoss(Operator):
    """Wraps the head and adds a loss in training: how badly the head discriminates between the prompt and embedded
    tokens."""

    def __init__(self, site: Site, told: Tap, weight: float, outputs: Sequence[int], ceiling: float | None) -> None:
        super().__init__(site)
        self.told, self.weight, self.outputs, self.ceiling = told, weight, list(outputs), ceiling

    def forward(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        told = self.told.take()
        if told is not None:
            with forward_context().aside():
                scores = self.scores(call, [told[0].to(x), told[1].to(x), told[2]], self.outputs)
            forward_context().add_loss(self.weight * info_nce(*scores, self.ceiling), self)
        return call(x, *args, **kwargs)

    @staticmethod
    def scores(call: Callable[..., Tensor], told: Sequence[Tensor], outputs: list[int]) -> tuple[Tensor, Tensor]:
        """Return the scores of the prompt ``[batch, 1]`` and of the tokens ``[batch, tokens]``.

        Args:
            call: the head's forward.
            told: the mean of the prompt's rows ``[batch, width]``, embedded tokens ``[batch, tokens, width]``, and
                which tokens belong to the text ``[batch, tokens]``.
            outputs: indices of the head's outputs whose mean is the score; all outputs if empty.
        """
        prompt, embeds, text = told
        logits = call(torch.cat([prompt[:, None], embeds], 1))
        logits = logits[..., outputs] if outputs else logits
        scores = logits.mean(-1) / prompt.shape[-1] ** 0.5  # biases move all of them alike
        return scores[:, :1], scores[:, 1:] + HIDDEN * ~text.to(scores.device)
