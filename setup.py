"""The compiled part of the package; all else is in setup.cfg, which cannot name an extension."""

from setuptools import Extension, setup

# Where launch/setup_env.sh keeps libjpeg-turbo: below a checkout, or below the environment that a wheel was installed into.
# Where neither folder exists, compiler and loader take the system's.
NATIVE_FOLDERS = ["$ORIGIN/../../.venv/native/lib", "$ORIGIN/../../../../../native/lib"]

# A plain shared library that Python loads with ctypes. It is declared as an extension so that an ordinary installation compiles it.
pixels = Extension(
    "vitds.kernels._pixels",
    sources=["vitds/kernels/pixels.c"],
    include_dirs=[".venv/native/include"],
    library_dirs=[".venv/native/lib"],
    libraries=["turbojpeg", "m"],
    extra_compile_args=["-O3", "-ffp-contract=off"],
    # --no-undefined: a missing function stops the installation, not the first run
    extra_link_args=[f"-Wl,--no-undefined,-rpath,{':'.join(NATIVE_FOLDERS)}"],
)

setup(ext_modules=[pixels])
