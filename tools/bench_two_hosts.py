"""Measures collectives and a ZeRO-3 step over two hosts whose link `tc` slows down, as root on any Linux machine.

    python tools/bench_two_hosts.py [--quick] [--out docs/benchmarks/two-hosts.json]

For each rate and number of ranks one `zcore run --hostfile` starts tools/two_hosts/rank.py on two network namespaces.
Writes the JSON file, and beside it the plot (needs matplotlib). The file: {"schema": 1, "is_benchmark", "machine",
"versions", "commit", "has_local_changes", "command", "started", "rates_bytes_per_s", "runs": [{"rate", "num_ranks",
"took_s", "load" (of the last minute, before and after), "collectives", "zero_step"}]}; rank.py says what the last two
hold.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from two_hosts.pair import TwoHosts, make_two_hosts, why_no_hosts
from two_hosts.plot import draw

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tools" / "two_hosts" / "rank.py"
RATES = {"1 Gbit/s": ("1gbit", 1e9 / 8), "100 Mbit/s": ("100mbit", 1e8 / 8)}  # as tc takes it, bytes per second
NUM_RANKS = (4, 8)
DEADLINE_S = 1800.0


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "two-hosts.json")
    parser.add_argument("--quick", action="store_true", help="test size: no benchmark")
    args = parser.parse_args()
    why = why_no_hosts()
    if why is not None:
        raise SystemExit(f"No two hosts can be made: {why}.")
    report: dict[str, object] = {
        "schema": 1,
        "is_benchmark": not args.quick,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": f"Linux {platform.release()}"},
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
        "commit": _git("rev-parse", "HEAD"),
        "has_local_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(["python", "tools/bench_two_hosts.py", *(["--quick"] if args.quick else [])]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "rates_bytes_per_s": {name: bytes_per_s for name, (_, bytes_per_s) in RATES.items()},
    }
    runs = []
    with make_two_hosts() as hosts:
        for rate, (told, _) in RATES.items():
            hosts.limit(told)
            for num_ranks in NUM_RANKS[:1] if args.quick else NUM_RANKS:
                print(f"{num_ranks} ranks over {rate} ...", flush=True)
                runs.append({"rate": rate, "num_ranks": num_ranks, **measure(hosts, num_ranks, is_quick=args.quick)})
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({**report, "runs": runs}, indent=1) + "\n")
    draw({**report, "runs": runs}, args.out.with_suffix(".png"))


def measure(hosts: TwoHosts, num_ranks: int, *, is_quick: bool) -> dict[str, object]:
    """Figures of one run, half of the ranks on each host."""
    paths = [str(ROOT / "tools"), str(ROOT / "docs" / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**hosts.environment(), "PYTHONPATH": os.pathsep.join(paths)}
    began, load = time.monotonic(), [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [str(PROGRAM), str(folder), *(["quick"] if is_quick else [])]
        command = hosts.command(folder, *words, num_ranks=num_ranks // 2)
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False, timeout=DEADLINE_S)
        if done.returncode:
            raise SystemExit(f"The run of {num_ranks} ranks failed; what it says stands above.")
        figures = json.loads((folder / "figures.json").read_text())
    return {"took_s": time.monotonic() - began, "load": [*load, os.getloadavg()[0]], **figures}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
