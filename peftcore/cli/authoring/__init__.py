"""The job of ``peftcore new``, and its templates."""
