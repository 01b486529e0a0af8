"""``python -m focalnet.cli`` is the ``focalnet`` command."""

from . import main

main()
