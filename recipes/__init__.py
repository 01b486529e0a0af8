"""Recipes for training, as YAML; installed as focalnet.recipes and read by focalnet.training.recipes."""
