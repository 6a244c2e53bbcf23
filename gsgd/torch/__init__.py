"""G-SGD for PyTorch models."""

from gsgd.symmetry import SymmetryError
from gsgd.torch.optimizer import GSGD, GAdam, GRMSprop
from gsgd.torch.path_sgd import PathSGD
from gsgd.torch.symmetry import balance, equivalence, rescale
from gsgd.torch.trace import trace
from gsgd.torch.verify import verify

__all__ = [
    "GSGD",
    "GAdam",
    "GRMSprop",
    "PathSGD",
    "SymmetryError",
    "balance",
    "equivalence",
    "rescale",
    "trace",
    "verify",
]
