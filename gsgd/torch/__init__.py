"""G-SGD for PyTorch models."""

from gsgd.symmetry import SymmetryError
from gsgd.torch.optimizer import GSGD, GAdam, GRMSprop, PathSGD
from gsgd.torch.trace import trace
from gsgd.torch.verify import verify

__all__ = ["GSGD", "GAdam", "GRMSprop", "PathSGD", "SymmetryError", "trace", "verify"]
