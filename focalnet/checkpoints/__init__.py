"""Checkpoints in every published format.

files.py reads and writes tensors without running code; key_maps.py says what they are called in each format;
structure.py tells a configuration from their shapes; reading.py puts these together; loading.py makes models of it.
"""
