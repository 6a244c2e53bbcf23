"""Training ReLU networks in the space that their symmetry leaves over (Meng et al., "G-SGD", ICLR 2019)."""

from importlib.metadata import PackageNotFoundError, version

from gsgd.compare import NotEquivalent, equivalence
from gsgd.network import Features, Network
from gsgd.optimizer import GSGD, GAdam, GRMSprop, Stats
from gsgd.paths import PathSGD, balance, path_norm, rescale, symmetry_residual
from gsgd.skeleton import Skeleton

__all__ = [
    "GSGD",
    "Features",
    "GAdam",
    "GRMSprop",
    "Network",
    "NotEquivalent",
    "PathSGD",
    "Skeleton",
    "Stats",
    "balance",
    "equivalence",
    "path_norm",
    "rescale",
    "symmetry_residual",
]

try:
    __version__ = version("gsgd")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
