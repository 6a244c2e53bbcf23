"""Training ReLU networks in the space that their symmetry leaves over (Meng et al., "G-SGD", ICLR 2019)."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import numpy as np

try:
    from gsgd.compare import NotEquivalent, equivalence
    from gsgd.network import Features, Network
    from gsgd.optimizer import GSGD, GAdam, GRMSprop, Stats
    from gsgd.paths import PathSGD, balance, path_norm, rescale, symmetry_residual
    from gsgd.skeleton import Skeleton
except ImportError as error:
    if find_spec("gsgd._core") is None:
        raise ImportError(
            f"{__path__[0]} is a checkout in which the C core is not built. Start Python in another folder, "
            "to import the gsgd that is installed, or build it here: python setup.py build_ext --inplace"
        ) from error
    if int(np.__version__.split(".")[0]) < 2:
        raise ImportError(
            f"gsgd needs NumPy 2.1 or later, and this is {np.__version__}: pip install 'numpy>=2.1'"
        ) from error
    raise

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
