"""The job of ``peftcore compare``, and its report."""
