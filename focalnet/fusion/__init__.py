"""Several modules as one operator: whether their parts are what the operator takes them for, and the call."""
