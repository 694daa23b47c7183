"""The build backend: scikit-build-core's, which asks for CUTLASS where a CUDA compiler will want its headers.

nvidia-cutlass needs scipy and more, some 100 MB that a build for the CPU alone has no use for. Where CMake finds a
compiler that this does not, it says what to install.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from scikit_build_core import build
from scikit_build_core.build import build_editable, build_sdist, build_wheel, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

CUTLASS = "nvidia-cutlass==4.2.0.0"  # native/cutlass/headers.cmake refuses others than 4.2
FOLDERS = ("CUDA_HOME", "CUDA_PATH")
USUAL = Path("/usr/local/cuda")

Settings = Mapping[str, str | list[str]] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What to install before a wheel is built."""
    return [*build.get_requires_for_build_wheel(_as_given(config_settings)), *_cutlass(config_settings)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """The same before an editable installation."""
    return [*build.get_requires_for_build_editable(_as_given(config_settings)), *_cutlass(config_settings)]


def _cutlass(settings: Settings) -> list[str]:
    cuda, headers = (_defined(settings, name) for name in ("ZCORE_CUDA", "ZCORE_CUTLASS"))
    is_wanted = headers == "AUTO" and cuda != "OFF" and (cuda != "AUTO" or _has_compiler())
    return [CUTLASS] if is_wanted else []


def _defined(settings: Settings, name: str) -> str:
    """A CMake variable as the command line sets it."""
    for key in (f"cmake.define.{name}", f"skbuild.cmake.define.{name}"):
        given = (settings or {}).get(key)
        if given:
            return given if isinstance(given, str) else given[-1]
    return "AUTO"


def _has_compiler() -> bool:
    folders = [Path(os.environ[name]) for name in FOLDERS if os.environ.get(name)]
    return (
        bool(os.environ.get("CUDACXX"))
        or shutil.which("nvcc") is not None
        or any((folder / "bin" / "nvcc").exists() for folder in (*folders, USUAL))
    )


def _as_given(settings: Settings) -> dict[str, str | list[str]] | None:
    return None if settings is None else dict(settings)
