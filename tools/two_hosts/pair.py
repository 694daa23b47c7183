"""Two hosts on one machine: two network namespaces joined by a veth pair, whose rate `tc` may limit. Needs root.

    zcore-PID-a                                            zcore-PID-b
    10.77.0.1 on "link"  <------- veth pair ------->       10.77.0.2 on "link"

A namespace counts as a host of its own for zcore, as it has a network of its own; ranks are started in it by `zcore
run --hostfile` with another command than ssh. What two machines have and this has not: processors, memory and a clock
of their own, and a link with latency. PID is the process that made the pair: whoever finds one whose process is gone
removes it.
"""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import environ, geteuid, getpid
from pathlib import Path
from shutil import which

__all__ = ["LINK", "SENT_BYTES", "TwoHosts", "make_two_hosts", "why_no_hosts"]

LINK = "link"  # the name of the device in either namespace
SENT_BYTES = Path("/sys/class/net", LINK, "statistics", "tx_bytes")  # as ranks on either host see it
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # no pair sees another, so all may have the same
# `ip netns exec` would do; with a name of its own for each host, what is told of a rank says on which it was.
REACH = "ip netns exec {host} unshare --uts sh -c 'hostname {host}; exec sh -c \"$0\"'"
BURST, PATIENCE = "72kb", "100ms"  # of tbf: over the 64 KiB that TCP hands down at once; how long a byte may queue


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """A pair of namespaces, `names[0]` being where ranks meet."""

    names: tuple[str, str]

    def command(self, folder: Path, *words: str, num_ranks: int) -> list[str]:
        """`zcore run` with `num_ranks` on each host; `words` follow the options. Writes a hostfile into `folder`."""
        hostfile = folder / "hosts"
        hostfile.write_text("".join(f"{name} slots={num_ranks}\n" for name in self.names))
        zcore = str(Path(sys.executable).with_name("zcore"))
        return [zcore, "run", "--hostfile", str(hostfile), "--ssh", REACH, "--master-addr", ADDRESSES[0], *words]

    def environment(self) -> Mapping[str, str]:
        """What that command needs: gloo would look for the network by the host's name, which leads nowhere here."""
        return {**environ, "GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1"}

    def limit(self, rate: str) -> None:
        """Have the link send `rate`, as tc takes it ("100mbit"), in each direction."""
        for name in self.names:
            words = ["root", "tbf", "rate", rate, "burst", BURST, "latency", PATIENCE]
            _run("tc", "-n", name, "qdisc", "replace", "dev", LINK, *words)


@contextmanager
def make_two_hosts() -> Iterator[TwoHosts]:
    """A pair of hosts as long as the context lasts; what killed processes left of theirs is removed first."""
    for name in _namespaces():
        if not Path("/proc", name.split("-")[1]).exists():
            _run("ip", "netns", "del", name, check=False)  # another process may do the same
    first, second = names = f"zcore-{getpid()}-a", f"zcore-{getpid()}-b"
    with ExitStack() as removal:
        for name in names:
            # Before it is made: Ctrl-C may come between.
            removal.callback(_run, "ip", "netns", "del", name, check=False)
            _run("ip", "netns", "add", name)
        ends = [["name", LINK, "netns", name] for name in names]
        _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            for device in ("lo", LINK):
                _run("ip", "-n", name, "link", "set", "dev", device, "up")
        yield TwoHosts((first, second))


def why_no_hosts() -> str | None:
    """Why `make_two_hosts` cannot work here; None if it can."""
    if sys.platform != "linux" or geteuid():
        return "network namespaces need Linux and root"
    missing = [command for command in ("ip", "tc", "unshare", "hostname") if which(command) is None]
    if missing:
        return f"there is no {missing[0]} here"
    try:
        with make_two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` fails: {error.stderr.strip()}"


def _namespaces() -> Sequence[str]:
    """Those of any process that this module has made."""
    names = (line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip())
    return [name for name in names if re.fullmatch(r"zcore-\d+-[ab]", name)]


def _run(*words: str, check: bool = True) -> str:
    return subprocess.run(words, check=check, capture_output=True, text=True).stdout
