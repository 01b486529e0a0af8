"""Who can run an operator: the registry, and a file for each backend."""
