"""What each part of a model is: `derive` reads a model, `HostMap` answers by role, `probe` refines with one forward.

It may import `layers`, and what is below. The rules by which a map is derived, R1 to R14, are in `docs/roles.md`. In
the order of reading:

- `vocabulary`: the roles, and the names by which rules know them.
- `entries`: what one module or bare parameter is.
- `tree`: the map as text.
- `virtual`: roles that no single weight has.
- `hostmap`: the map, which answers by role.
- `alike`: modules that are built alike.
- `survey`: one walk over the model.
- `mixers`: attention and state space.
- `blocks`: what repeats along the depth.
- `mlps`: feed-forward branches, experts, routers.
- `rest`: embeddings, norms, convolutions, heads.
- `towers`: sub-models.
- `layouts`: the order of rows in fused projections.
- `stacks`: what takes token ids and runs blocks.
- `find_roles`: from a model to its map, rule by rule.
- `recording`: one forward, watched.
- `tracing`: what that says about the map.
"""

from peftcore.roles.entries import HostEntry, Layout, Slices
from peftcore.roles.find_roles import derive
from peftcore.roles.hostmap import HostMap
from peftcore.roles.tracing import probe
from peftcore.roles.vocabulary import ROLES

__all__ = ["ROLES", "HostEntry", "HostMap", "Layout", "Slices", "derive", "probe"]
