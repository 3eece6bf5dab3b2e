"""The compiled part of the package; all else is in setup.cfg, which cannot name an extension."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

# Where libjpeg-turbo is: beside the kernels in a wheel of launch/pack_offline.sh; where launch/setup_env.sh
# keeps it, below a checkout, or below the environment that a wheel was installed into. Where none of them
# has it, compiler and loader take the system's.
NATIVE_FOLDERS = ["$ORIGIN", "$ORIGIN/../../.venv/native/lib", "$ORIGIN/../../../../../native/lib"]

# Plain shared libraries that Python loads with ctypes. They are declared as extensions so that an ordinary
# installation compiles them.
pixels = Extension(
    "vitds.kernels._pixels",
    sources=["vitds/kernels/pixels.c"],
    depends=sorted(str(header) for header in Path("vitds/kernels").glob("*.h")),
    include_dirs=[".venv/native/include"],
    library_dirs=[".venv/native/lib"],
    libraries=["turbojpeg", "m"],
    extra_compile_args=["-O3", "-ffp-contract=off"],
    # --no-undefined: a missing function stops the installation, not the first run
    extra_link_args=[f"-Wl,--no-undefined,-rpath,{':'.join(NATIVE_FOLDERS)}"],
)

# Its OpenMP is torch's: that library is loaded before this one and goes by the same name.
softmax = Extension(
    "vitds.kernels._softmax",
    sources=["vitds/kernels/softmax.c"],
    depends=["vitds/kernels/processor.h"],
    libraries=["m"],
    extra_compile_args=["-O3", "-fopenmp"],
    extra_link_args=["-fopenmp", "-Wl,--no-undefined"],
)

# Mixing's bits are fixed: no sum and product may become one rounding.
mix = Extension(
    "vitds.kernels._mix",
    sources=["vitds/kernels/mix.c"],
    depends=["vitds/kernels/processor.h"],
    libraries=["m"],
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off"],
    extra_link_args=["-fopenmp", "-Wl,--no-undefined"],
)


class AnyPythonsWheel(bdist_wheel):
    """Plain shared libraries know nothing of Python, so the wheel fits any Python on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[pixels, softmax, mix], cmdclass={"bdist_wheel": AnyPythonsWheel})
