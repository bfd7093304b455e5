"""Perfusion: key-locked rank-one editing.   Tewel et al. 2023, arXiv 2305.01644.

Equation:
    r = e' inv(C) i / (i' inv(C) i),   C = E[e e'] of the encodings e of texts
    y = W e + b - r W i + sigmoid((r - beta) / tau) o     i the concept's encoding,   o what W makes of it instead
    keys:  o = W s,   locked,   s the super-class;      values:  o = W s + v,   v [out] trains

For a token whose encoding is i, r = 1, so o replaces W's output for the word. Keys determine where a concept appears;
since they are locked to the class ("a cat"), the concept appears where the class would. Values determine how it looks.
i is a moving average of the concept's encodings; only the newest encoding, a mean over the batch, carries a gradient. s
is the encoding of the class in the data; for keys it is a moving average too.

``data=`` contains two kinds of batches: texts from which C is computed (100,000 captions in the paper), and texts that
contain the word of the class. Wrap the latter in `peftcore.Labelled` with the position of that word in each text. In
training, each call passes `concept`, the position of the concept in each text. It may also pass `superclass`, the
encodings of the same texts with the class's word in place of the concept; they update s for keys:

    texts = [{"sample": noisy, "timestep": 0, "encoder_hidden_states": states}, ...]
    peftcore.apply(unet, "perfusion", data=[*texts, peftcore.Labelled(texts_of_class, positions)])
    with peftcore.call(unet, concept=positions, superclass=encoder(ids_of_class)[0]):   # [batch], [batch, tokens, dim]
        loss = mse(unet(noisy, t, encoder(ids)[0]).sample, noise)

To train the embedding of the concept's word too, apply `textual_inversion` to the text encoder, or, if the model
contains the text encoder, set `tokens`. Only one concept trains at a time. In evaluation, edits of several active
concepts add up. Your training loop may mask the loss, so that it covers only the subject.

Parameters: out for each matrix of values, and n * dim for n ids in `tokens`. The file also contains inv(C), [dim, dim].

Start: i, s and the word start at the class's encodings in the data and embedding, v at zero. No start is an identity.

Differs from the authors' code: This follows lucidrains/perfusion-pytorch, which the authors reviewed. There the first
training step sets i and o, here the data do. There o itself trains, so weight decay pulls it to 0, here to the class.
That code does not damp C, and its optimizer lacks the parameters of values, probably by mistake. The exact combination
of several concepts by Cholesky roots is not implemented.

Use it: `peftcore.apply(model, "perfusion", data=data)`, to teach a subject that prompts can still change; not where
likeness matters most (`custom_diffusion`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    Batches,
    Checked,
    Method,
    MethodConfig,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    forward_context,
    full_precision,
    sees_vectors,
    watched_inputs,
)
from peftcore.errors import CalibrationError, SequenceError, TrainingError, UnsupportedSite
from peftcore_diffusion import textual_inversion
from peftcore_diffusion._told import told

RAW = Tap()
"""The text that a module reads, before concepts edit it one after the other."""


class PerfusionConfig(MethodConfig):
    """Options of Perfusion."""

    method: Literal["perfusion"] = "perfusion"
    beta: float = 0.75
    """The similarity r to the concept at which the gate is half open, in training."""
    tau: PositiveFloat = 0.1
    """Temperature tau of the gate in training: the larger it is, the more gradually the gate opens."""
    beta_eval: float = 0.7
    """The value of `beta` in evaluation: lower values show more of the concept, higher ones more of the prompt."""
    tau_eval: PositiveFloat = 0.15
    """The value of `tau` in evaluation."""
    ema: Share = 0.99
    """Decay of the moving averages: the share of the old average that a training step keeps."""
    text_gradient: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Factor on the gradient that reaches the text, so that the word learns more slowly."""
    damping: NonNegativeFloat = 1e-3
    """The number that is added to the diagonal of C, relative to the diagonal's mean."""
    tokens: list[int] = Field(default_factory=list)
    """Ids of the concept's words, whose embeddings train too; negative ids count from the end of the table."""
    initializer: NonNegativeInt | None = None
    """Token id of the class's word, whose embedding the words in `tokens` start from."""

    @model_validator(mode="after")
    def _of_a_class(self) -> PerfusionConfig:
        if self.tokens and self.initializer is None:
            raise ValueError(
                "the new tokens and i start as those of the concept's class: set initializer= to the token id of the "
                "class"
            )
        return self


LEARNING = Tap()
"""The `Texts` of the adapter whose concept trains in this forward, by the width of the encodings."""


class Texts(Checked):
    """The inverse of C = E[e e'] of the encodings of texts, [dim, dim]; the identity before `learn` is called."""

    inverse: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.eye(width))

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        inverse = values.get("inverse")
        if inverse is not None and not (inverse.isfinite().all() and inverse.diagonal().gt(0).all()):
            yield "inverse holds numbers that no inverse of E[e e'] has"

    @torch.no_grad()
    def learn(self, C: Tensor, damping: float) -> None:
        """Set the inverse to that of ``C + damping * mean(diag C) I``, with C in float64.

        Raises:
            CalibrationError: the matrix is singular or not finite.
        """
        root, failed = torch.linalg.cholesky_ex(C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype))
        if failed or not root.isfinite().all():
            raise CalibrationError(
                "E[e e'] of these texts has no inverse: pass more texts with finite embeddings, or set a larger "
                "damping="
            )
        self.inverse.copy_(torch.cholesky_inverse(root))


class Concept(Checked):
    """The mean encodings of a concept, i [dim], and of its class in the same texts, s [dim].

    Args:
        width: the width of the encodings.
        decay: the share of the old averages that a training step keeps.
        follows: True if calls that pass class encodings update s; False if s keeps the encoding of the data.
    """

    i: Tensor
    s: Tensor

    def __init__(self, width: int, decay: float, follows: bool) -> None:
        super().__init__()
        self.decay, self.follows, self.used = decay, follows, Tap(until_backward=True)
        self.register_buffer("i", torch.zeros(width))
        self.register_buffer("s", torch.zeros(width))

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        if "i" in values and not values["i"].any():
            yield "i holds zeros, of which no text has a share"

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return i and s for a text [batch, tokens, dim]. In training, both averages are first updated with the text's
        encodings, and i carries their gradient; in evaluation they are returned as stored.

        Raises:
            MissingContext: a call in training does not pass the concept's positions.
            RouteError: the positions are for another number of rows.
            SequenceError: a position is outside the text.
        """
        if not self.training:
            return self.i, self.s
        where = told("concept", len(text))
        new = picked(text, where).to(self.i.dtype)
        # What a checkpoint repeats in backward is computed with the averages of then.
        held = self.used.get() if forward_context().repeating else None
        if held is None:
            held = self._moved(new.detach(), where)
            self.used.put(held)
        i, s = held
        return i + (new - new.detach()), s

    @torch.no_grad()
    def _moved(self, new: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        i, s = torch.lerp(new, self.i, self.decay), self.s.clone()
        if self.follows and "superclass" in forward_context().context:
            s = torch.lerp(picked(told("superclass", len(where)), where).to(s), s, self.decay)
        self.i.copy_(i)
        self.s.copy_(s)
        return i, s


def check_alone(texts: Shared, width: int, first: bool) -> None:
    """Check that a call trains only one concept, unless rows are routed to adapters.

    Args:
        texts: the `Texts` of the adapter.
        width: the width of their encodings.
        first: whether this concept is the first to edit the text.

    Raises:
        TrainingError: several concepts would train.
    """
    learning = LEARNING.get() or {}
    if not first or (forward_context().rows is None and learning.get(width, texts) is not texts):
        raise TrainingError(
            "two concepts are active in training, but calls name the positions of only one: activate one concept to "
            "train it; several can be active in evaluation"
        )
    LEARNING.put({**learning, width: texts})


def picked(states: Tensor, where: Tensor) -> Tensor:
    """Return the mean encoding of the tokens at `where` [batch] in states [batch, tokens, dim].

    Raises:
        SequenceError: the states have another shape, or fewer tokens (on an accelerator, torch's error for the latter).
    """
    known = where.device.type == "cpu"
    if states.dim() != 3 or (known and not 0 <= int(where.min()) <= int(where.max()) < states.shape[1]):
        raise SequenceError(
            f"the concept's positions {where.tolist()} do not fit states of shape {tuple(states.shape)}: [batch, "
            "tokens, dim]"
        )
    places = where.to(states.device).view(-1, 1, 1).expand(-1, 1, states.shape[-1])
    return states.gather(1, places).mean((0, 1))


def seen_texts(
    model: nn.Module, modules: Iterable[nn.Module], data: Batches
) -> tuple[dict[int, Tensor], dict[nn.Module, Tensor]]:
    """Return two statistics of the modules' inputs. The first is the sum of e e' over all texts, by the width of the
    encodings; it is C up to a factor, which cancels in r. The second is the mean encoding of the class, by module, at
    the positions in the labels of the batches. Tokens that the model's `attention_mask` excludes are left out.

    Raises:
        CalibrationError: all batches lack labels, or a label is not a position in its text.
    """
    sums: dict[int, Tensor] = {}
    last: dict[int, Any] = {}
    found: dict[nn.Module, list[Tensor]] = {}
    where: Tensor | None = None

    def look(module: nn.Module, given: Tensor, x: Tensor) -> None:
        width = x.shape[-1]
        if given is not last.get(width):  # most layers are given one and the same tensor
            with full_precision(x):
                sums[width] = sums.get(width, 0) + (x.mT @ x).cpu().double()
            last[width] = given
        if where is not None:
            if given.dim() != 3 or where.shape != given.shape[:1] or not all(0 <= n < given.shape[1] for n in where):
                raise CalibrationError(
                    f"the class positions {where.tolist()}, one for each text, do not fit texts of shape "
                    f"{tuple(given.shape)}"
                )
            found.setdefault(module, []).extend(given.to(x.dtype)[torch.arange(len(where)), where])

    with torch.no_grad(), watched_inputs(model, modules, look):
        for batch in data:
            where = batch.beside
            batch.output()
    if sums and not found:
        raise CalibrationError(
            "data= must contain the position of the concept's class in some texts: pass peftcore.Labelled(batch, "
            "positions)"
        )
    return sums, {module: torch.stack(encodings).mean(0) for module, encodings in found.items()}


class PerfusionOperator(Operator):
    """Edits one matrix with the concept's encodings i and s, and with v [out] if the matrix computes values."""

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
    """Edits the keys and values that cross-attention computes for a concept.

    Example:
        data = [batch, peftcore.Labelled(batch, torch.tensor([2]))]  # captions, and the class's position in each
        injection = peftcore.apply(model, "perfusion", data=data)
        peftcore.call(model, concept=torch.tensor([2]))  # the concept's position in each text
    """

    name = "perfusion"
    Config = PerfusionConfig
    tags = Tags(category="diffusion", paper="2305.01644", identity_at_init=False, needs_data=True, exact_gradient=False)
    target = ("cross.k", "cross.v")

    def inject(self, model: nn.Module, config: PerfusionConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            if site.role not in ("cross.k", "cross.v") or not sees_vectors(site):
                raise UnsupportedSite(f"{site.path} is not a linear layer for keys or values of a text: exclude it")
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
                raise CalibrationError(f"no text of data= reached {edit.site.path}: exclude it, or pass other data")
            edit.operator.concept.i.copy_(encodings[edit.site.module])
            edit.operator.concept.s.copy_(encodings[edit.site.module])
        for width, texts in {edit.site.in_features: edit.operator.texts.module for edit in edits}.items():
            texts.learn(C[width], config.damping)

    @staticmethod
    def parameter_count(site: Site, config: PerfusionConfig) -> int:
        if site.layer.one_hot:
            return len(config.tokens) * site.out_features
        return site.out_features if site.role == "cross.v" else 0
