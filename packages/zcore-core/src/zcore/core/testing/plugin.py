"""The pytest plugin `zcore`: the fixture `ranks`. It imports no torch, so that it costs other suites nothing.

A body is found again in the rank by its file and name, and the rank has pytest's `sys.path`. Modules that tests share
lie beside them and are imported by name; the one line `pythonpath = ["packages/zcore-x/tests"]` under
`[tool.pytest.ini_options]` makes that work here and in every rank, also with `--import-mode=importlib`.
"""

from collections.abc import Callable

import pytest

from zcore.core.testing.ranks import run_ranks

__all__ = ["ranks"]


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[object]]:
    """`ranks(2, body, *args, **kwargs)` runs `body` in 2 fresh processes; see `zcore.core.testing.run_ranks`."""
    return run_ranks
