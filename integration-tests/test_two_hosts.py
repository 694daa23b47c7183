"""Four ranks on two hosts, which are network namespaces: `zcore run` starts them, they train, and one is killed.

This file is also the program that they run: `zcore run ... test_two_hosts.py FOLDER [RANK THAT IS KILLED]`.
"""

import hashlib
import json
import os
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
from two_hosts.pair import SENT_BYTES, TwoHosts, make_two_hosts, why_no_hosts  # noqa: E402

from zcore import zero  # noqa: E402
from zcore.core.testing import run_ranks  # noqa: E402

SIZES = GPTConfig(vocab_size=512, context=16, layers=2, width=64, heads=2)
NUM_STEPS = 4
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
}
KILLED = 3
DEADLINE_S = 300.0  # a launch takes 15 s, most of them imports; several times that beside other work
ENDING_S = 20.0  # 3 s, of which launchers and interpreters take most; 5 s beside two other runs on 2 cores


def train(*, is_recorded: bool = True, killed_in: Path | None = None) -> dict[str, object]:
    """What a few steps of ZeRO-3 give this rank. With `killed_in` rank 3 writes the time there, and is killed."""
    config = {**CONFIG, "comms_logger": {"enabled": is_recorded}}
    torch.manual_seed(0)
    with zero.Init(config=config):
        model = GPT(SIZES)
    engine = zero.initialize(model, config=config)
    generator = torch.Generator().manual_seed(engine.dp_rank)
    for traffic in engine.traffic().values():
        traffic.clear()
    sent_bytes, losses = read_sent_bytes(), []
    for _ in range(NUM_STEPS):
        tokens = torch.randint(SIZES.vocab_size, (2, SIZES.context + 1), generator=generator)
        loss = engine(tokens[:, :-1], targets=tokens[:, 1:])
        if killed_in is not None and engine.global_rank == KILLED:
            (killed_in / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    sent_bytes = read_sent_bytes() - sent_bytes
    payload_bytes = sum(sum(traffic.payload_bytes.values()) for traffic in engine.traffic().values())
    rows = engine.comm_report().to_dict()["ops"] if is_recorded else []
    weights = engine.consolidated_state_dict(rank=None)
    raw = b"".join(bytes(each.view(torch.uint8).flatten().tolist()) for each in weights.values())
    return {
        "losses": losses,
        "weights": hashlib.sha256(raw).hexdigest(),
        "algorithms": sorted({row["algorithm"] for row in rows if row["group"] in ("dp gather", "dp reduce")}),
        "sent_per_payload": sent_bytes / payload_bytes,
    }


def read_sent_bytes() -> int:
    """What this host has sent to the other, if there is another."""
    return int(SENT_BYTES.read_text()) if SENT_BYTES.exists() else 0


def train_without_comm(site: Path) -> dict[str, object]:
    """The same where zcore-comm offers nothing: a wheel of its name, and without entry points, comes before it."""
    sys.path.insert(0, str(site))
    return train(is_recorded=False)


def main() -> None:
    """Be a rank."""
    folder = Path(sys.argv[1])
    zero.init_distributed()
    told = train(killed_in=folder if sys.argv[2:] == ["kill"] else None)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    why = why_no_hosts()
    if why is not None:
        pytest.skip(f"no two hosts can be made: {why}")
    with make_two_hosts() as pair:
        yield pair


def launch(hosts: TwoHosts, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = hosts.command(folder, __file__, str(folder), *arguments, num_ranks=2)
    environment, nothing = hosts.environment(), subprocess.DEVNULL
    return subprocess.run(
        command, env=environment, stdin=nothing, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_training_on_two_hosts_is_that_on_one_and_sends_every_byte_once(hosts, tmp_path):
    done = launch(hosts, tmp_path)
    assert done.returncode == 0, done.stderr
    across = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    wheel = tmp_path / "site" / "zcore_comm-0.dist-info"
    wheel.mkdir(parents=True)
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: zcore-comm\nVersion: 0\n")
    on_one = run_ranks(4, train, deadline_s=DEADLINE_S)
    over_gloo = run_ranks(4, train_without_comm, tmp_path / "site", deadline_s=DEADLINE_S)
    assert [rank["algorithms"] for rank in across] == [["two levels"]] * 4
    assert [rank["algorithms"] for rank in on_one] == [["shared memory"]] * 4
    for name in ("losses", "weights"):
        told = [rank[name] for rank in across]
        assert told == [rank[name] for rank in on_one], name
        assert told == [rank[name] for rank in over_gloo], name
    # Half of each buffer has to reach the other host, plus headers. Messages between pairs of ranks would send it all.
    assert all(0.5 < rank["sent_per_payload"] < 0.6 for rank in across), across


def test_a_rank_killed_on_the_other_host_ends_the_run_and_is_named(hosts, tmp_path):
    done = launch(hosts, tmp_path, "kill")
    ended_s = time.time() - float((tmp_path / "killed").read_text())
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    assert f"rank {KILLED} on {hosts.names[1]} failed first: killed by SIGKILL" in done.stderr
    assert ended_s < ENDING_S


def namespaces_of(process: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"zcore-{process}-")]


@pytest.mark.usefixtures("hosts")
def test_what_a_killed_process_left_of_its_hosts_is_removed_by_the_next():
    python = [sys.executable, "-c"]
    make = "import os\nfrom two_hosts.pair import make_two_hosts\nwith make_two_hosts():\n    "
    with subprocess.Popen([*python, f"{make}os.kill(os.getpid(), 9)"], cwd=ROOT / "tools") as killed:
        assert killed.wait(DEADLINE_S) == -signal.SIGKILL
    assert len(namespaces_of(killed.pid)) == 2
    with subprocess.Popen([*python, f"{make}pass"], cwd=ROOT / "tools") as following:
        assert following.wait(DEADLINE_S) == 0
    assert namespaces_of(killed.pid) == namespaces_of(following.pid) == []
    assert len(namespaces_of(os.getpid())) == 2  # those of a process that lives stay


if __name__ == "__main__":
    main()
