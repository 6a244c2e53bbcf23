"""G-SGD for PyTorch models."""

from gsgd.torch.optimizer import GSGD, GAdam, GRMSprop, PathSGD
from gsgd.torch.trace import trace
from gsgd.torch.verify import SymmetryError, verify

__all__ = ["GSGD", "GAdam", "GRMSprop", "PathSGD", "SymmetryError", "trace", "verify"]
