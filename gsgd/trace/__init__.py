"""What the tracers of PyTorch and JAX share."""
