"""Networks of JAX functions: traced, and verified."""

from gsgd.jax.symmetry import balance, equivalence, rescale
from gsgd.jax.trace import names, trace
from gsgd.jax.verify import verify
from gsgd.symmetry import SymmetryError

__all__ = ["SymmetryError", "balance", "equivalence", "names", "rescale", "trace", "verify"]
