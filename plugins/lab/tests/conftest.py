"""The fixtures that tests of the library share: tiny models and data, and searches whose runs take no time."""

from comparisons import comparison
from on_this_machine import cluster
from searches import file, instant
from tiny import (
    away_from_the_checkout,
    chats,
    csv_file,
    decoder,
    encoder,
    jsonl_file,
    one_thread,
    poolerless,
    rows,
    still,
    talker,
)

__all__ = [
    "away_from_the_checkout",
    "chats",
    "cluster",
    "comparison",
    "csv_file",
    "decoder",
    "encoder",
    "file",
    "instant",
    "jsonl_file",
    "one_thread",
    "poolerless",
    "rows",
    "still",
    "talker",
]
