"""What differs between CPU and an accelerator, as far as it can be seen on a machine that may have none."""

import pytest
import torch

from zcore.core.device import (
    backend_for,
    choose_device,
    device_in_use_bytes,
    restore_random_state,
    take_random_state,
)

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_an_accelerator_every_local_rank_has_the_cpu():
    assert choose_device({}) == choose_device({"LOCAL_RANK": "3"}) == CPU


@needs_cuda
def test_local_ranks_share_out_the_accelerators():
    count = torch.cuda.device_count()
    assert choose_device({}) == torch.device("cuda", 0)
    assert choose_device({"LOCAL_RANK": str(count)}) == torch.device("cuda", 0)
    assert choose_device({"LOCAL_RANK": str(count - 1)}) == torch.device("cuda", count - 1)


def test_the_backend_moves_tensors_of_the_device():
    assert backend_for(CPU) == "gloo"
    assert backend_for(torch.device("cuda", 1)) == "nccl"


def grow():
    before = device_in_use_bytes(CPU)
    held = torch.ones(32 * 2**20, dtype=torch.uint8)  # written, so that the pages are really there
    return device_in_use_bytes(CPU) - before, held.numel()


def test_bytes_in_use_follow_what_is_allocated(ranks):
    ((grown, held_bytes),) = ranks(1, grow)
    assert 0.9 * held_bytes < grown < 1.5 * held_bytes


def test_random_numbers_go_on_from_a_state_that_was_taken():
    torch.manual_seed(5)
    torch.rand(3)
    state = take_random_state(CPU)
    expected = torch.rand(4), torch.randint(100, (3,))
    torch.manual_seed(6)
    restore_random_state(state, CPU)
    assert torch.equal(torch.rand(4), expected[0])
    assert torch.equal(torch.randint(100, (3,)), expected[1])


def test_a_state_is_a_copy_of_bytes_by_name():
    state = take_random_state(CPU)
    assert set(state) == {"torch_cpu"}
    before = state["torch_cpu"].clone()
    torch.rand(100)
    assert state["torch_cpu"].dtype is torch.uint8
    assert torch.equal(state["torch_cpu"], before)


@needs_cuda
def test_the_accelerators_generator_is_kept_as_well():
    device = choose_device({})
    torch.cuda.manual_seed(5)
    state = take_random_state(device)
    expected = torch.rand(4, device=device)
    torch.cuda.manual_seed(6)
    restore_random_state(state, device)
    assert torch.equal(torch.rand(4, device=device), expected)
    assert device_in_use_bytes(device) > 0
