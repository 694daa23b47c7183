"""What a wheel weighs, and how much longer it takes to import than what it stands on.

    python tools/wheel_facts.py dist/zcore_kernels-0.1.0-cp312-abi3-linux_x86_64.whl zcore.kernels torch

The second import is of a process that has imported the last argument; each runs in processes of its own, in turns.
"""

import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

ROUNDS = 7
LARGEST = 5  # files that are named


def main() -> None:
    """Print the facts."""
    file, module, base = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    with zipfile.ZipFile(file) as wheel:
        members = sorted(wheel.infolist(), key=lambda member: -member.file_size)
    print(
        f"{file.name}: {file.stat().st_size / 2**20:.2f} MiB, {sum(m.file_size for m in members) / 2**20:.2f} unpacked"
    )
    for member in members[:LARGEST]:
        print(f"    {member.file_size / 2**20:6.2f} MiB  {member.filename}")
    code = f"import time, {base}; began_s = time.perf_counter(); import {module}; print(time.perf_counter() - began_s)"
    times_s = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(ROUNDS)
    ]
    print(
        f"import {module} after {base}: {statistics.median(times_s):.3f} s, "
        f"{min(times_s):.3f} to {max(times_s):.3f} in {ROUNDS} processes"
    )


if __name__ == "__main__":
    main()
