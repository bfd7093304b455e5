"""Names for methods that act on blocks and their branches, run a network in parallel with the model, or add rows to the
tokens of a diffusion model."""

from peftcore.authoring.activations import ACTIVATIONS
from peftcore.authoring.block_sites import (
    MIXERS,
    BlockSite,
    block_around,
    block_depths,
    block_sites,
    stack_path,
    stream_width,
    with_blocks,
)
from peftcore.authoring.borrowed_layers import BorrowedLayer, borrow
from peftcore.authoring.branches import (
    AtBranchEnd,
    BranchSite,
    Bypass,
    Joins,
    branch,
    branch_end,
    is_post_norm,
    reads_stream,
)
from peftcore.authoring.feed_forwards import FeedForwardSite, feed_forward_around
from peftcore.authoring.guests import GuestNetwork, GuestOperator, guest_network
from peftcore.authoring.streams import RowStream, StreamSite, Turn, add_stream, stream_sites

__all__ = [
    "ACTIVATIONS",
    "MIXERS",
    "AtBranchEnd",
    "BlockSite",
    "BorrowedLayer",
    "BranchSite",
    "Bypass",
    "FeedForwardSite",
    "GuestNetwork",
    "GuestOperator",
    "Joins",
    "RowStream",
    "StreamSite",
    "Turn",
    "add_stream",
    "block_around",
    "block_depths",
    "block_sites",
    "borrow",
    "branch",
    "branch_end",
    "feed_forward_around",
    "guest_network",
    "is_post_norm",
    "reads_stream",
    "stack_path",
    "stream_sites",
    "stream_width",
    "with_blocks",
]
