"""The job of ``peftcore train``, and what comparing and searching share with it."""
