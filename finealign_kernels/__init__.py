"""Fused kernels and autograd functions for fine-grained LLM alignment."""
