"""Build the extension `gsgd._core`; everything else is in pyproject.toml.

Environment: ``GSGD_OPENMP=0`` builds without OpenMP, ``GSGD_WERROR=1`` makes warnings errors, ``GSGD_SANITIZE=1``
builds with address and undefined-behaviour sanitizers.
"""

import os
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

if int(numpy.__version__.split(".")[0]) < 2:
    sys.exit(f"gsgd is built against NumPy 2, and this is {numpy.__version__}: pip install 'numpy>=2.1'")

LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")

# errno of sqrt is never read, and without it loops over it can be vectorized
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno"]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
WARNING_FLAGS = ["-Wall", "-Wextra", "-Werror"]
MACROS = [("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION")]


class BuildExt(build_ext):
    """Adds the flags that only the compiler at hand can tell."""

    def build_extensions(self) -> None:
        if not self.links("int main(void) { return 0; }"):
            raise CompileError("no C compiler was found that works: install one (apt install gcc), or set CC")
        if not self.links("#include <Python.h>\nint main(void) { return 0; }"):
            raise CompileError("Python's C headers are missing: install them (apt install python3-dev)")
        if os.environ.get("GSGD_OPENMP") != "0" and self.has_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        super().build_extensions()

    def has_openmp(self) -> bool:
        return self.links("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }", "-fopenmp")

    def links(self, code: str, *flags: str) -> bool:
        """Whether a program compiles and links."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(code + "\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[*flags])
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=[*flags])
            except (CompileError, LinkError):
                return False
        return True


compile_args, link_args = list(FLAGS), []
if os.environ.get("GSGD_SANITIZE") == "1":
    compile_args += SANITIZE_FLAGS
    link_args += SANITIZE_FLAGS
if os.environ.get("GSGD_WERROR") == "1":
    compile_args += WARNING_FLAGS

setup(
    ext_modules=[
        Extension(
            "gsgd._core",
            sources=sorted(glob("csrc/**/*.c", recursive=True)),
            depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/*.inc")),
            include_dirs=["csrc", numpy.get_include()],
            define_macros=[*MACROS, ("Py_LIMITED_API", "0x030B0000")] if LIMITED_API else MACROS,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            py_limited_api=LIMITED_API,
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED_API else {},
)
