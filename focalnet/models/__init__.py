"""The FocalNet models, from their layers to loading a checkpoint."""
