"""Perfusion: key-locked rank-one editing.   Tewel et al. 2023, arXiv 2305.01644.

    r = e' inv(C) i / (i' inv(C) i),   C = E[e e'] of the encodings e of texts
    y = W e + b - r W i + sigmoid((r - beta) / tau) o     i the concept's encoding,   o what W makes of it instead
    keys:  o = W s,   locked,   s the super-class;      values:  o = W s + v,   v [out] = 0 at first, which trains

A token that is the concept has r = 1: o replaces W's output for the word. Keys decide where a concept appears, so it
appears where its class does ("a cat"); values decide how it looks. i is a moving average of the concept's encodings, of
which the newest, a mean over the batch, has the gradient; s is the class's encoding in data, of keys an average too.

``data=`` contains the texts for C, 100,000 captions in the paper, and texts with the word of the class, whose position
is in the labels of the batch; i and s start from the latter. In training calls pass the concept's position in each
text; they may also pass the encoding of the text with the class in its place, for the keys:

    texts = [{"sample": noisy, "timestep": 0, "encoder_hidden_states": states}, ...]
    peftcore.apply(unet, "perfusion", data=[*texts, peftcore.Labelled(texts_of_class, positions)])
    with peftcore.call(unet, concept=positions, superclass=encoder(ids_of_class)[0]):   # [batch], [batch, tokens, dim]
        loss = mse(unet(noisy, t, encoder(ids)[0]).sample, noise)

The word starts as the class's and is taught by `textual_inversion` in the text encoder; in a model that holds both, by
`tokens`. One concept trains at a time; several that are active at once edit the same text, and their edits add up; the
exact way by Cholesky roots is not here, nor is the mask of the subject in the loss, which is the loop's business.

This follows lucidrains/perfusion-pytorch, which the authors reviewed. There the first step sets i and o, which here the
data does; o itself trains, so that weight decay pulls to 0, and here to the class; C is not damped; and `parameters`,
which its optimizer takes, leaves out those of values, which cannot be meant.

Parameters: out a matrix of values; n * dim for words, n ids. The file has inv(C) besides, [dim, dim].

Use it to teach a subject that prompts shall go on changing; not for likeness at any price (`custom_diffusion`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    Batches,
    Method,
    MethodConfig,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    full_precision,
    sees_vectors,
)
from peftcore.errors import CalibrationError, UnsupportedSite
from peftcore_diffusion import textual_inversion
from peftcore_diffusion._concepts import Concept, Texts, check_alone, seen_texts

RAW = Tap()
"""The text as a module is given it, while concepts edit it one after the other."""


class PerfusionConfig(MethodConfig):
    """Options of Perfusion."""

    method: Literal["perfusion"] = "perfusion"
    beta: float = 0.75
    """The share r of the concept from which on the gate is rather open, in training."""
    tau: PositiveFloat = 0.1
    """How softly the gate opens, in training."""
    beta_eval: float = 0.7
    """The `beta` of evaluation: lower values show more of the concept's looks, higher ones follow the rest of the
    prompt more closely."""
    tau_eval: PositiveFloat = 0.15
    """The `tau` of evaluation."""
    ema: Share = 0.99
    """How much of the moving averages a step keeps."""
    text_gradient: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Share of the gradient that is passed on to the text, so that the word learns more slowly."""
    damping: NonNegativeFloat = 1e-3
    """The number that is added to the diagonal of C, relative to its mean."""
    tokens: list[int] = Field(default_factory=list)
    """Ids of words for the concept that train along; negative ones count from the end."""
    initializer: NonNegativeInt | None = None
    """Id of the class, from which they start."""

    @model_validator(mode="after")
    def _of_a_class(self) -> PerfusionConfig:
        if self.tokens and self.initializer is None:
            raise ValueError("tokens start as their class, as i does: give its id as initializer")
        return self


class PerfusionOperator(Operator):
    """The edit of one matrix: i and s of the concept, and v [out] where the matrix makes values."""

    changes_inputs = True
    training_only = Operator.training_only | {"train_gate", "text_gradient"}

    def __init__(self, site: Site, config: PerfusionConfig, texts: Shared) -> None:
        super().__init__(site)
        self.texts, self.text_gradient = texts, config.text_gradient
        self.train_gate, self.gate = (config.beta, config.tau), (config.beta_eval, config.tau_eval)
        self.concept = Concept(site.in_features, config.ema, follows=site.role == "cross.k")
        self.v = nn.Parameter(torch.zeros(site.out_features)) if site.role == "cross.v" else None

    def forward(self, call: Callable[..., Tensor], e: Tensor) -> Tensor:
        outermost = (text := RAW.get()) is None
        if text is None:
            e = text = e.detach() + self.text_gradient * (e - e.detach())
        if self.training:
            check_alone(self.texts, text.shape[-1], outermost)
        i, s = self.concept(text)  # [in]
        beta, tau = self.train_gate if self.training else self.gate
        with full_precision(i):
            direction = self.texts.module.inverse.to(i) @ i
            r = (text.to(i.dtype) @ (direction / (i @ direction))).unsqueeze(-1)  # [..., tokens, 1]
            gate = torch.sigmoid((r - beta) / tau)
        r, gate, i, s = self.cast(e, r, gate, i, s)
        try:
            if outermost:
                RAW.put(text)
            y = call(e - r * i + gate * s)
        finally:
            if outermost:
                RAW.take()
        return y if self.v is None else y + gate.to(y.dtype) * self.v.to(y.dtype)


class Perfusion(Method):
    """Edit what cross-attention reads of a concept.

    Example:
        data = [batch, peftcore.Labelled(batch, torch.tensor([2]))]  # captions, and where they have the class
        injection = peftcore.apply(model, "perfusion", data=data)
        peftcore.call(model, concept=torch.tensor([2]))  # where the concept is; with `with`, for a while
    """

    name = "perfusion"
    Config = PerfusionConfig
    tags = Tags(category="diffusion", paper="2305.01644", identity_at_init=False, needs_data=True, exact_gradient=False)
    target = ("cross.k", "cross.v")

    def inject(self, model: nn.Module, config: PerfusionConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            if site.role not in ("cross.k", "cross.v") or not sees_vectors(site):
                raise UnsupportedSite(f"{site.path} is no linear layer for the keys or values of a text: exclude it")
            texts = surgeon.own(f"texts_{site.in_features}", partial(Texts, site.in_features))
            surgeon.graft(site, PerfusionOperator, config, texts=texts)
        if config.tokens:
            words = textual_inversion.TextualInversionConfig(tokens=config.tokens, initializer=config.initializer)
            surgeon.include("words", textual_inversion.TextualInversion(), words, "embed")

    def calibrate(self, model: nn.Module, data: Batches, config: PerfusionConfig, injection: AppliedMethod) -> None:
        edits: list[Any] = [graft for graft in injection.grafts if isinstance(graft.operator, PerfusionOperator)]
        model.eval()
        with injection.whole.disabled():
            C, encodings = seen_texts(model, {edit.site.module for edit in edits}, data)
        for edit in edits:
            if edit.site.module not in encodings:
                raise CalibrationError(f"no text of the data reached {edit.site.path}: exclude it, or give other data")
            edit.operator.concept.i.copy_(encodings[edit.site.module])
            edit.operator.concept.s.copy_(encodings[edit.site.module])
        for width, texts in {edit.site.in_features: edit.operator.texts.module for edit in edits}.items():
            texts.learn(C[width], config.damping)

    @staticmethod
    def parameter_count(site: Site, config: PerfusionConfig) -> int:
        if site.layer.one_hot:
            return len(config.tokens) * site.out_features
        return site.out_features if site.role == "cross.v" else 0
