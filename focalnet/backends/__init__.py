"""The backends that run the operators: the registry that chooses one, and a file for each backend."""
