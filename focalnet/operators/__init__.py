"""The operators registered with torch.library, one file each: schema, fake tensors, autograd."""
