"""The operators as torch.library knows them, one file each: schema, fake tensors, autograd."""
