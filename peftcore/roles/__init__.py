"""Roles of the parts of a model: `derive` finds them, `HostMap` maps them to modules, `probe` refines the map by a
forward.

It may import `layers` and lower packages. `docs/roles.md` describes the rules that derive a map, R1 to R17.
The modules, in the order of reading:

- `vocabulary`: the roles, and the names by which the rules recognize them.
- `entries`: the entry of one module or bare parameter.
- `tree`: the map as text.
- `virtual_roles`: roles that no single weight has, such as "all-linear".
- `hostmap`: the map of roles to modules.
- `equal_modules`: modules of equal structure.
- `survey`: one walk over the model.
- `mixers`: attention and state space.
- `repeated_blocks`: the blocks that repeat along the depth.
- `mlps`: feed-forward branches, experts, routers.
- `embeddings_norms_heads`: embeddings, norms, convolutions, heads.
- `towers`: sub-models.
- `layouts`: the order of slices in fused projections.
- `token_tables`: tables with one row for each token.
- `weight_readers`: modules that read a weight without calling the weight's module.
- `source_code`: the source of forwards, and the values of the names in it.
- `code_frames`: follows values through the source code of functions, for `branch_ends` and `block_calls`.
- `branch_ends`: finds where the output of a branch is added to the hidden states.
- `stacks`: modules that take token ids and run blocks.
- `block_calls`: the dimension of the batch in the arguments of modules, and how often blocks run.
- `find_roles`: derives the map of a model, rule by rule.
- `recording`: records one forward.
- `tracing`: refines the map by the recording.
"""

from peftcore.roles.entries import HostEntry, Layout, Slices
from peftcore.roles.find_roles import derive
from peftcore.roles.hostmap import HostMap
from peftcore.roles.tracing import probe
from peftcore.roles.vocabulary import ROLES

__all__ = ["ROLES", "HostEntry", "HostMap", "Layout", "Slices", "derive", "probe"]
