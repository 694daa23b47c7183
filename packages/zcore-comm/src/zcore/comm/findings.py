"""What `zcore doctor` says of zcore-comm: which of its ways would serve on this machine, and what others would give.

How much faster a way is was measured on 2 ranks of one host (docs/benchmarks); `zcore comm bench` measures it here.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from zcore.comm.memory.pages import MAX_FILE_BYTES, available_bytes
from zcore.comm.pairs.algorithms import read_table, table_path
from zcore.comm.ranks.meeting import make_boards
from zcore.core import compat
from zcore.core.doctor import Finding
from zcore.core.errors import ConfigError
from zcore.core.quantities import shown_bytes

__all__ = ["find"]

APART = "ZCORE_COMM_HOST"


def find() -> Sequence[Finding]:
    """One finding for each kind of group."""
    found = [_on_one_host(), _over_hosts(), _uneven()]
    if dist.is_nccl_available():
        found.append(_on_accelerators())
    return found


def _on_one_host() -> Finding:
    case = "one host"
    _, refusal = make_boards()
    if refusal is not None:
        return Finding(case, _pairs(), f"shared memory would be 2 to 60 times as fast; what keeps it: {refusal}")
    otherwise = "gloo takes 2 to 60 times as long, by op and size"
    if not compat.CAN_SWAP_MEMORY:
        otherwise += f"; torch 2.13 would gather without a copy, {torch.__version__} cannot"
    if os.environ.get(APART):
        otherwise += f"; ${APART} is set: ranks where it differs share no memory"
    num_bytes = available_bytes()
    served_by = "shared memory"
    if num_bytes < MAX_FILE_BYTES:  # else the system does not say
        served_by += f" ({shown_bytes(num_bytes)} available)"
    return Finding(case, served_by, otherwise)


def _over_hosts() -> Finding:
    return Finding(
        "more hosts",
        "two levels, if each has equally many ranks: 2, 4, 8, ...",
        "gloo sends 1.5 to 3.5 times as many bytes from host to host",
    )


def _uneven() -> Finding:
    return Finding(
        "other ranks", _pairs(), "gloo takes up to 7 times as long to sum; small parts it may move 1.5 times as fast"
    )


def _on_accelerators() -> Finding:
    if os.environ.get("ZCORE_COMM_REGISTER") == "1":
        return Finding("GPUs", "NCCL, watched, from registered buffers", "")
    return Finding("GPUs", "NCCL, watched", "ZCORE_COMM_REGISTER=1 registers buffers; not measured")


def _pairs() -> str:
    path = table_path()
    if not path.exists():
        return "pairs, by the built-in table; `zcore comm tune` measures yours"
    try:
        read_table()
    except ConfigError as error:
        return f"nothing: all refuse their table. {error}"
    return f"pairs, by the table {path}"
