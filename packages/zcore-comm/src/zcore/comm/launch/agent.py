"""torchrun on one host, for `zcore run`: `python -m zcore.comm.launch.agent OPTIONS OF TORCHRUN -- PROGRAM ...`.

Rendezvous, ranks and restarts are torch's elastic launcher. This adds to it:

    ranks     without --nproc-per-node one for each accelerator, else one
    threads   OMP_NUM_THREADS, unless set, is the host's cores shared out among its ranks
    restarts  ranks that start again meet at a store of their own: in the old one they would find dead addresses
    output    marked lines (`lines`)
    ends      ranks that failed are told at once, and the others ended in time (`rank_ends`)
    its end   a word on stdin ("SIGINT") is that signal; end of file, when stdin is a pipe, is SIGTERM

The last holds on any host, however it was reached: when the front is gone, killed even, its pipe closes, ssh passes
that on, and the ranks are ended. A terminal (`ssh -tt`) would do it too, and would mix stdout with stderr.
"""

import logging
import os
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Sequence

from zcore.comm.launch.plan import SHUTDOWN_S, SHUTDOWN_VARIABLE
from zcore.core.cores import num_cores

__all__ = ["EXPLAINED", "main"]

EXPLAINED = 69  # exit code of a launcher that started no rank and has said why


def main(argv: Sequence[str]) -> int:
    """Run the ranks of this host to their end; the exit code."""
    # Until torch takes over signals there is no rank to end, and no reason to stay.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _obey_stdin()
    os.environ.setdefault(SHUTDOWN_VARIABLE, str(SHUTDOWN_S))
    if "LOGLEVEL" not in os.environ:
        # What torchrun says of a failed rank the front tells in fewer words.
        logging.disable(logging.ERROR)
        warnings.simplefilter("ignore")
    at = list(argv).index("--")
    return _launch(argv[:at], argv[at + 1], argv[at + 2 :])


def _launch(options: Sequence[str], program: str, arguments: Sequence[str]) -> int:
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api as launcher
    from torch.distributed.run import config_from_args, determine_local_world_size, parse_args

    from zcore.comm.launch.rank_ends import EndingAgent
    from zcore.comm.launch.rank_streams import RankStreams

    if not any(option.startswith("--nproc-per-node") for option in options):
        options = [*options, f"--nproc-per-node={_num_accelerators() or 1}"]
    parsed = parse_args([*options, f"--log-dir={os.devnull}", program])
    # Not parsed: argparse would take a `--` among them as its own.
    parsed.training_script_args = list(arguments)
    if parsed.max_restarts:
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    num_ranks = determine_local_world_size(parsed.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))
    config, entrypoint, entry_arguments = config_from_args(parsed)
    streams = RankStreams()
    config.logs_specs = streams
    vars(launcher)["LocalElasticAgent"] = EndingAgent  # torch takes an agent from nobody; it looks this name up
    try:
        launcher.elastic_launch(config, entrypoint)(*entry_arguments)
    except ChildFailedError:
        return 1  # which rank, and how, is told by then
    except SignalException as error:
        return 128 + error.sigval
    except (RendezvousError, dist.DistError) as error:
        streams.note(
            f"The hosts did not meet: {type(error).__name__}: {error} Each host has to reach "
            f"{parsed.rdzv_endpoint or f'{parsed.master_addr}:{parsed.master_port}'}: look for a firewall, a name that "
            "means another address there (--master-addr), a port in use (--master-port)."
        )
        return EXPLAINED
    except OSError as error:
        streams.note(f"{program} does not start: {error}.")
        return EXPLAINED
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # no rank is left to end; torch's handler would raise in Python's end
        streams.close()
    return 0


def _obey_stdin() -> None:
    """Take signals from stdin; ranks get an empty one, so that one that reads ends instead of hanging."""
    mode = os.fstat(0).st_mode
    if not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):  # a shell's, or /dev/null
        return
    orders = os.fdopen(os.dup(0), "r")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)

    def obey() -> None:
        word = orders.readline().strip()
        os.kill(os.getpid(), signal.Signals[word] if word else signal.SIGTERM)  # only one: torch is then ending ranks

    threading.Thread(target=obey, daemon=True).start()


def _num_accelerators() -> int:
    import torch

    return torch.accelerator.device_count()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
