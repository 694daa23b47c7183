"""What is proved here, much of it to the bit, is zcore-zero with plain torch, whatever wheels of faster ops are there.

With them integration-tests/ prove it.
"""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def references() -> Iterator[None]:
    """Of all ops, here and in ranks, which have this environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZCORE_OPS", "reference")
        yield
