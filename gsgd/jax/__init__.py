"""Networks of JAX functions: traced, and verified."""

from gsgd.jax.trace import names, trace
from gsgd.jax.verify import verify
from gsgd.symmetry import SymmetryError

__all__ = ["SymmetryError", "names", "trace", "verify"]
