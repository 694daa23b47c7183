"""Small real wheels for tests: files on `sys.path`, found through their metadata as installed ones are."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zcore.core import extensions, ops

AddWheel = Callable[..., None]


def _forget_what_is_cached() -> None:
    for cached in (extensions.offered, extensions.load, ops._load_wheels, ops._choose):
        cached.cache_clear()


@pytest.fixture
def add_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddWheel]:
    """`add_wheel("zcore-fast", "1.2", {"zcore.ops": {"fast": "module:name"}}, module="its source")`."""
    site = tmp_path / "site"
    known = set(sys.modules)
    monkeypatch.setattr(ops, "_registry", dict(ops._registry))

    def add(name: str, version: str, entry_points: dict[str, dict[str, str]], **sources: str) -> None:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        groups = [
            f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
            for group, entries in entry_points.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(groups))
        for module, source in sources.items():
            (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(site)
        _forget_what_is_cached()

    yield add
    for module in set(sys.modules) - known:
        if str(site) in (getattr(sys.modules[module], "__file__", None) or ""):
            del sys.modules[module]
    monkeypatch.undo()
    _forget_what_is_cached()
