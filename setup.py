"""Wheels that carry the compiled kernels; everything else is in pyproject.toml.

With nvcc, ninja and torch here (``pip wheel --no-build-isolation .``) the wheel is py3-none-linux_x86_64 and carries
``_kernels.so``; without them, or with HF_FASTPATH_SKIP_CUDA_BUILD=1, it is py3-none-any and the kernels are compiled at
first use. The library goes to the build folder, never to the source tree, where a stale one would be packed again.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def load_build_module():
    """hf_fastpath/build.py by its path: importing the package would need torch and transformers."""
    spec = importlib.util.spec_from_file_location("_build", Path(__file__).parent / "hf_fastpath" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kernels = load_build_module()


def missing_for_kernels() -> str:
    """What keeps this build from compiling the kernels; empty when nothing does."""
    if os.environ.get("HF_FASTPATH_SKIP_CUDA_BUILD", "0") not in ("", "0"):
        return "HF_FASTPATH_SKIP_CUDA_BUILD is set"
    tools = {
        "nvcc": kernels.find_nvcc(),
        "ninja": kernels.find_ninja(),
        "torch": importlib.util.find_spec("torch"),
    }
    missing = [name for name, found in tools.items() if found is None]
    return f"not found: {', '.join(missing)}" if missing else ""


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        library = Path(self.build_lib, "hf_fastpath", kernels.LIBRARY_NAME)
        library.unlink(missing_ok=True)
        missing = missing_for_kernels()
        if missing:
            print(f"hf_fastpath: a wheel without CUDA kernels ({missing}); they are compiled at first use")
        else:
            kernels.build_library(library, kernels.cuda_arch_list(), progress=False)


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return not missing_for_kernels()


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform  # the library knows torch's stable ABI and no Python


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPythonWheel})
