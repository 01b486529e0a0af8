"""``python -m focalnet`` is the ``focalnet`` command."""

from .cli import main

main()
