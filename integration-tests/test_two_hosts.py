"""Four ranks on two hosts, which are network namespaces: `zcore run` starts them, they train, and one is killed.

This file is also the program that they run: `zcore run ... test_two_hosts.py FOLDER [RANK THAT DIES]`.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

for needed in ("typer", "zcore.comm", "zcore.zero"):
    pytest.importorskip(needed)
ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "docs" / "examples"), str(ROOT / "tools")]

from gpt import GPT, GPTConfig  # noqa: E402 - found on the path above
from two_hosts import LINK, TwoHosts, make_two_hosts, why_no_hosts  # noqa: E402

from zcore import zero  # noqa: E402
from zcore.core.testing import run_ranks  # noqa: E402

SIZES = GPTConfig(vocab_size=512, context=16, layers=2, width=64, heads=2)
NUM_STEPS = 4
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
    "comms_logger": {"enabled": True},
}
DEADLINE_S = 120.0
ENDING_S = 15.0  # 1 s without other load, of which the launchers take most
SENT_BYTES = Path("/sys/class/net", LINK, "statistics", "tx_bytes")


def train(*, is_recorded: bool = True, dying_rank: int | None = None, folder: Path = Path()) -> dict[str, object]:
    """What a few steps of ZeRO-3 give this rank."""
    config = {**CONFIG, "comms_logger": {"enabled": is_recorded}}
    torch.manual_seed(0)
    with zero.Init(config=config):
        model = GPT(SIZES)
    engine = zero.initialize(model, config=config)
    generator = torch.Generator().manual_seed(engine.dp_rank)
    sent_bytes = int(SENT_BYTES.read_text()) if SENT_BYTES.exists() else 0
    engine_bytes = payload_bytes(engine)
    losses = []
    for step in range(NUM_STEPS):
        tokens = torch.randint(SIZES.vocab_size, (2, SIZES.context + 1), generator=generator)
        loss = engine(tokens[:, :-1], targets=tokens[:, 1:].contiguous())
        if engine.global_rank == dying_rank:
            (folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine_bytes = payload_bytes(engine) - engine_bytes
    sent_bytes = int(SENT_BYTES.read_text()) - sent_bytes if SENT_BYTES.exists() else 0
    rows = engine.comm_report().to_dict()["ops"] if is_recorded else []
    weights = engine.consolidated_state_dict()
    digest = hashlib.sha256(b"".join(bytes(each.view(torch.uint8).flatten().tolist()) for each in weights.values()))
    return {
        "losses": losses,
        "weights": digest.hexdigest() if weights else None,
        "algorithms": sorted({row["algorithm"] for row in rows if row["group"] in ("dp gather", "dp reduce")}),
        "engine_bytes": engine_bytes,
        "sent_bytes": sent_bytes,
    }


def payload_bytes(engine: zero.Engine) -> int:
    """Of all that was gathered and scattered so far, whole buffers counted."""
    return sum(sum(traffic.payload_bytes.values()) for traffic in engine.traffic().values())


def train_without_comm(folder: Path) -> dict[str, object]:
    """The same where zcore-comm offers nothing: a wheel of its name, and without entry points, comes before it."""
    sys.path.insert(0, str(folder))
    return train(is_recorded=False)


def main() -> None:
    """Be a rank."""
    folder = Path(sys.argv[1])
    zero.init_distributed()
    told = train(dying_rank=int(sys.argv[2]) if len(sys.argv) > 2 else None, folder=folder)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    why = why_no_hosts()
    if why is not None:
        pytest.skip(f"no two hosts: {why}")
    with make_two_hosts() as pair:
        yield pair


def start(hosts: TwoHosts, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = hosts.command(folder, __file__, str(folder), *arguments, num_ranks=2)
    return subprocess.run(
        command,
        env=hosts.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_training_across_hosts_is_training_on_one_bit_for_bit_on_two_levels(hosts, tmp_path):
    done = start(hosts, tmp_path)
    assert done.returncode == 0, done.stderr
    across = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    on_one = run_ranks(4, train)
    wheel = tmp_path / "site" / "zcore_comm-0.dist-info"
    wheel.mkdir(parents=True)
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: zcore-comm\nVersion: 0\n")
    over_gloo = run_ranks(4, train_without_comm, tmp_path / "site")
    assert [rank["algorithms"] for rank in across] == [["two levels"]] * 4
    assert [rank["algorithms"] for rank in on_one] == [["shared memory"]] * 4
    for name in ("losses", "weights"):
        told = [rank[name] for rank in across]
        assert told == [rank[name] for rank in on_one] == [rank[name] for rank in over_gloo], name
    print(across)


def test_a_rank_killed_on_the_other_host_ends_the_run_and_is_named(hosts, tmp_path):
    done = start(hosts, tmp_path, "3")
    ended_s = time.time() - float((tmp_path / "died").read_text())
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    assert f"rank 3 on {hosts.names[1]} failed first: killed by SIGKILL" in done.stderr
    assert ended_s < ENDING_S
    print(ended_s, done.stderr)


if __name__ == "__main__":
    main()
