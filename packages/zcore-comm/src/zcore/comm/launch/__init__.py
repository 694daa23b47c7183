"""`zcore run`: one command that starts the same program on a laptop, over ssh, under SLURM or under MPI.

    command   the options           -> a Job
    hosts     hostfile, node list   -> Hosts                    pure
    plan      Job, Hosts            -> Commands                 pure; --dry-run prints them
    mpi       a rank's environment  -> the Command to become    pure
    follow    runs Commands, shows lines on a `screen`, ends all when one fails
    failure   what the ranks said   -> which failed first, and its traceback    pure

Each Command starts one `agent` on one host: torchrun, with the output of its ranks (`rank_streams`) as `lines` that say
whose they are, and with ends of its ranks that are told at once (`rank_ends`).
"""
