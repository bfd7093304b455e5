"""The fixtures that tests of models share."""

from tiny import away_from_the_checkout, decoder, encoder, still

__all__ = ["away_from_the_checkout", "decoder", "encoder", "still"]
