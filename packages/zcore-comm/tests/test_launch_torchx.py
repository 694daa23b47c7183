"""The commands of docs/launch.md for TorchX are ones it takes, and would start what the page says; nothing is sent."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchx")

PAGE = Path(__file__).parents[3] / "docs" / "launch.md"

if not PAGE.exists():
    pytest.skip("the documentation is not beside these tests", allow_module_level=True)


def documented(scheduler: str) -> list[str]:
    """The one command of the page for a scheduler, as words."""
    joined = PAGE.read_text().replace("\\\n", " ")
    (command,) = (line for line in joined.splitlines() if line.startswith("torchx run") and f"-s {scheduler}" in line)
    return command.split("#")[0].split()[2:]


def dry_run(scheduler: str, folder: Path) -> str:
    """What TorchX would hand to the scheduler."""
    (folder / "train.py").touch()
    words = [word for word in documented(scheduler) if word != "--dryrun"]
    command = [sys.executable, "-c", "from torchx.cli.main import main; main()", "run", "--dryrun", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return " ".join(done.stdout.partition("=== SCHEDULER REQUEST ===")[2].split())


def test_on_kubernetes_each_host_is_a_pod_that_runs_torchrun_and_meets_at_the_first(tmp_path):
    request = dry_run("kubernetes", tmp_path)
    assert "schedulerName: volcano" in request
    assert request.count("replicas: 1") == 2
    assert request.count("nvidia.com/gpu: '8'") == 4  # requests and limits
    for host in ("${TORCHX_RANK0_HOST:=localhost}", "${VC_TRAIN_0_HOSTS:=localhost}"):
        assert f"torchrun --rdzv_backend c10d --rdzv_endpoint {host}:29500" in request
    assert request.count("--nnodes 2 --nproc_per_node 8 --tee 3 --role '' train.py --lr 3") == 2


def test_in_this_directory_it_is_one_torchrun(tmp_path):
    request = dry_run("local_cwd", tmp_path).replace("' '", "")  # long strings are shown in parts
    assert "--nnodes 1 --nproc_per_node 2" in request
    assert "train.py --lr 3" in request
