"""A check of adapted models that share modules.

A module uses the active adapters and the forward context of a single adapted model. So if two adapted models share a
module (an actor and a critic on one backbone, or a model and a part of it), only one of them may have operators in this
module. One adapted model may be a part of another as long as the operators of the outer model are all outside of the
inner model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcore.errors import UnsupportedHost
from peftcore.forward.state.host_state import state_of
from peftcore.forward.state.slot import slot_of

if TYPE_CHECKING:
    from peftcore.contract.surgeon_protocol import Surgeon

ADVICE = (
    "apply all adapters, with different names, to one model that contains these modules, or remove() the other "
    "adapters first"
)


def check_apart(surgeon: Surgeon) -> None:
    """Check that no module would have operators of two adapted models: the recorded ones and those of another model.

    Raises:
        UnsupportedHost: a module would have both.
    """
    own = state_of(surgeon.model)
    modules = surgeon.resolver.modules
    inside = {path: state for path, module in modules.items() if path and (state := state_of(module)) is not None}
    for path, module in modules.items():
        slot = slot_of(module)
        if slot is not None and slot.state is not own and all(slot.state is not state for state in inside.values()):
            adapters = ", ".join(map(repr, slot.mounts)) or "another model"
            raise UnsupportedHost(
                f"{path or 'this module'} also belongs to another adapted model ({adapters}), and a module follows the "
                f"active adapters of one model; {ADVICE}"
            )
    for graft in surgeon.grafts:
        for site in graft.holders:
            for root in inside:
                if f"{site.module_path}.".startswith(f"{root}."):
                    raise UnsupportedHost(f"{site.path} is inside {root}, which is itself an adapted model; {ADVICE}")
