"""The job of ``peftcore search``."""
