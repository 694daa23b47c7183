"""What all tests of the wheel share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tensors here are small, and torch's threads wait by spinning; a test that is about threads asks for its own."""
    torch.set_num_threads(1)
