"""Compiles the kernels into a wheel, where there is a compiler; without one the wheel has their sources alone.

Hatchling calls this when it builds a wheel: ``pip install .``, ``python -m build``. With LIGHTNING_NOISY_BUILD=0 it
makes a wheel for all platforms.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelKernels(BuildHookInterface):
    """Adds ``lightning_noisy/kernels/built`` to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile a library for each instruction set; not for an editable install, whose sources change."""
        if version == "editable" or os.environ.get("LIGHTNING_NOISY_BUILD") == "0":
            return
        path = Path(self.root, "lightning_noisy", "kernels", "compiler.py")
        spec = importlib.util.spec_from_file_location("compiler", path)
        compiler = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiler)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        self._folder = tempfile.TemporaryDirectory()
        for capability in compiler.VECTORS if x86 else ["DEFAULT"]:
            made = Path(self._folder.name, compiler.library_name(capability))
            try:
                compiler.compile_library(made, capability)
            except compiler.CompileError as error:
                self.app.display_warning(f"The kernels are compiled on first use, since this failed: {error}")
                build_data["force_include"].clear()
                return
            build_data["force_include"][str(made)] = f"lightning_noisy/kernels/built/{made.name}"
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data.update(pure_python=False, tag=f"py3-none-{system}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the libraries, which are in the wheel now."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
