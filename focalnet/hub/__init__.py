"""focalnet as a kernel for huggingface's `kernels`: the layer, and the script that generates its repository."""
