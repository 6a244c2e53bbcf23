"""G-SGD for PyTorch models."""

from gsgd.torch.optimizer import GSGD, GAdam, GRMSprop
from gsgd.torch.trace import trace
from gsgd.torch.verify import SymmetryError, verify

__all__ = ["GSGD", "GAdam", "GRMSprop", "SymmetryError", "trace", "verify"]
