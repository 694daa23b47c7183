"""The build asks for CUTLASS where a CUDA compiler will want it, and nowhere else."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("scikit_build_core", reason="needs scikit-build-core, which builds the wheel")

FILE = Path(__file__).parent.parent / "building" / "with_cutlass.py"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The build backend, in the folder that it builds, where no CUDA compiler is to be found."""
    spec = spec_from_file_location("with_cutlass", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDACXX", *module.FOLDERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "USUAL", tmp_path)
    monkeypatch.chdir(FILE.parent.parent)
    monkeypatch.setattr(sys, "argv", ["build"])
    return module


def asks(backend: ModuleType, settings: dict[str, str | list[str]] | None = None) -> bool:
    wheel, editable = (
        any(each.startswith("nvidia-cutlass==") for each in ask(settings))
        for ask in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable)
    )
    assert wheel == editable
    return wheel


def test_a_build_for_the_cpu_does_not_ask(backend: ModuleType) -> None:
    assert not asks(backend)
    assert not asks(backend, {"cmake.define.ZCORE_CUDA": "OFF"})
    assert not any("cutlass" in each for each in backend.get_requires_for_build_sdist())


def test_one_that_is_to_have_cuda_asks(backend: ModuleType) -> None:
    assert asks(backend, {"cmake.define.ZCORE_CUDA": "ON"})
    assert asks(backend, {"cmake.define.ZCORE_CUDA": ["OFF", "ON"]})
    assert not asks(backend, {"cmake.define.ZCORE_CUDA": "ON", "cmake.define.ZCORE_CUTLASS": "OFF"})
    assert not asks(backend, {"cmake.define.ZCORE_CUDA": "ON", "cmake.define.ZCORE_CUTLASS": "/opt/cutlass/include"})


@pytest.mark.parametrize("where", ["CUDACXX", "CUDA_PATH", "PATH"])
def test_one_where_a_compiler_is_asks(
    backend: ModuleType, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    backend.USUAL = tmp_path / "nowhere"
    monkeypatch.setenv(where, str({"CUDACXX": compiler, "CUDA_PATH": tmp_path, "PATH": compiler.parent}[where]))
    assert asks(backend)
    assert not asks(backend, {"cmake.define.ZCORE_CUDA": "OFF"})


def test_the_version_is_the_one_that_cmake_wants(backend: ModuleType) -> None:
    text = (FILE.parent.parent / "native" / "cutlass" / "headers.cmake").read_text()
    version = backend.CUTLASS.partition("==")[2]
    assert f"nvidia-cutlass=={version} " in text
    assert f"set(zcore_cutlass_version {version.rsplit('.', 2)[0]})" in text
