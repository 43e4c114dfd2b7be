"""Device code in Triton: tensors in, tensors out, no autograd. The modules import triton, this package does not."""
