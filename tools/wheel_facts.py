"""What a wheel weighs, and how much longer its modules take to import than what it stands on.

    python tools/wheel_facts.py dist/zcore_kernels-0.1.0-cp312-abi3-linux_x86_64.whl zcore.kernels.nn --base torch

Each import is of a process that has imported the base; the modules take turns. A machine that does other work makes
imports slower and never faster, so the best of all rounds is judged: beyond LIMIT_S the command fails.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

ROUNDS = 7
LIMIT_S = 0.15  # a user waits for torch anyway, and should not notice the wheel beside it
LARGEST = 5  # files that are named


def main() -> None:
    """Print the facts; exit with 1 and the reason where an import takes too long."""
    parser = argparse.ArgumentParser(description="What a wheel weighs, and how long its modules take to import.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("modules", nargs="+", help="each in processes of its own")
    parser.add_argument("--base", required=True, help="what is imported before, and not counted")
    given = parser.parse_args()
    print_sizes(given.wheel)
    times_s: dict[str, list[float]] = {module: [] for module in given.modules}
    for _ in range(ROUNDS):
        for module, found_s in times_s.items():
            found_s.append(import_s(module, base=given.base))
    for module, found_s in times_s.items():
        print(f"import {module} after {given.base}: {min(found_s):.3f} to {max(found_s):.3f} s in {ROUNDS} processes")
    slow = [module for module, found_s in times_s.items() if min(found_s) > LIMIT_S]
    if slow:
        sys.exit(
            f"{', '.join(slow)} took more than {LIMIT_S} s beyond {given.base} at best. "
            "Look with python -X importtime for what it brings."
        )


def print_sizes(file: Path) -> None:
    """Of the wheel, and of its largest files."""
    with zipfile.ZipFile(file) as wheel:
        members = sorted(wheel.infolist(), key=lambda member: -member.file_size)
    print(
        f"{file.name}: {file.stat().st_size / 2**20:.2f} MiB, {sum(m.file_size for m in members) / 2**20:.2f} unpacked"
    )
    for member in members[:LARGEST]:
        print(f"    {member.file_size / 2**20:6.2f} MiB  {member.filename}")


def import_s(module: str, *, base: str) -> float:
    """How long one fresh process imports `module` that has imported `base`."""
    code = f"import time, {base}; began_s = time.perf_counter(); import {module}; print(time.perf_counter() - began_s)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
