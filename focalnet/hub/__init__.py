"""focalnet as a kernel of huggingface's `kernels`: the layer, and the script that lays out its repository."""
