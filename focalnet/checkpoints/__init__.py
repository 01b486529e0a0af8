"""Reading and writing checkpoints in every published format.

files.py reads and writes tensors without running code. key_maps.py holds the names of the tensors in each format.
structure.py infers a configuration from their shapes. reading.py combines these; models/loading.py builds models.
"""
