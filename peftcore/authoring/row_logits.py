"""The logits of a model at the rows (virtual tokens) of a soft prompt, for losses on these logits.

The stack's output for the rows is removed before the head computes logits, so labels need no change. In training it is
stored, and the head also computes the logits of the rows that the method has chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from peftcore.contract.operators import Operator
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import TargetError, UnsupportedSite
from peftcore.forward.context.context import forward_context
from peftcore.forward.context.taps import Tap
from peftcore.forward.sequence.sequence import SequenceOperator
from peftcore.surgery.defaults import default_sites
from peftcore.targets.sequence_sites import SequenceSite
from peftcore.targets.sites import BesideSite, Site

AFTER = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Names of options in configs of transformers by which a model changes its logits after the head."""


def row_logits(surgeon: Surgeon, site: SequenceSite, operator: SequenceOperator, rows: Sequence[int]) -> Tap:
    """Make the head also compute the logits of some rows (virtual tokens) of a soft prompt, in training.

    Args:
        surgeon: the argument `surgeon` of `Method.inject`, which has already recorded the soft prompt at the site.
        site: the stack with the soft prompt.
        operator: the operator of the soft prompt.
        rows: the numbers of the rows whose logits are computed, in order.

    Returns:
        A `Tap`, which stores a value during a forward. In training it contains the logits, for use in
            `Method.output_loss`: a `Rows` whose states are ``[batch, rows, vocabulary]``. It is empty if the rows come
            from a cache.

    Raises:
        UnsupportedSite: the model is not a causal language model with one head, or it changes the logits after the
            head.
    """
    name = type(surgeon.model).__name__
    heads = [head for head in head_sites(surgeon) if head.out_features >= site.in_features]
    if len(heads) != 1 or not site.stack.causal or site.stack.reads or site.stack.readers:
        raise UnsupportedSite(
            f"{name} does not predict tokens with one head over one causal stack, which this method needs; use a "
            "decoder"
        )
    config = vars(surgeon.model).get("config")
    changed = [each for each in AFTER if getattr(config, each, None) not in (None, 0, 1)]
    if changed:
        raise UnsupportedSite(
            f"{name} changes logits after its head ({changed[0]}), which the logits of the rows would lack; use "
            "another model"
        )
    operator.states, logits = Tap(), Tap()
    states = operator.states
    surgeon.graft(heads[0], lambda at: RowScorer(at, states, logits, rows))
    return logits


def head_sites(surgeon: Surgeon) -> list[Site]:
    """Returns the sites of the model's heads, whatever the user's targets are. For operators that use a head without
    adapting it."""
    try:
        found = default_sites(surgeon.resolver, ("head",)).sites
    except TargetError:
        return []
    return [BesideSite(**{**vars(head), "meta": surgeon.dry}) for head in found]


class RowScorer(Operator):
    """Computes the logits of some rows of a soft prompt, in addition to the logits of the tokens."""

    def __init__(self, site: Site, states: Tap, logits: Tap, rows: Sequence[int]) -> None:
        super().__init__(site)
        self.states, self.logits, self.rows = states, logits, list(rows)

    def forward(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        made = self.states.take()
        if made is not None:
            with forward_context().aside():
                logits = call(made.states[:, self.rows])
            self.logits.put(made._replace(states=logits))
        return call(*args, **kwargs)
