"""G-SGD for PyTorch models."""

from gsgd.torch.optimizer import GSGD
from gsgd.torch.trace import trace
from gsgd.torch.verify import SymmetryError, verify

__all__ = ["GSGD", "SymmetryError", "trace", "verify"]
