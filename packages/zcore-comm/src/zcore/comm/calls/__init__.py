"""What plain torch programs call, and in which order calls of any program go out.

flat       all_gather, reduce_scatter and the others, as torch spells them
served     the collectives that serve a process group of torch
ddp        a communication hook for DistributedDataParallel
requests   calls that have not started yet
blocks     coalescing: calls that wait for the end of a block
joins      which of these make one call, and in which order           pure
work       a call on its way, and what is done once with what it brings
flow       a limit on bytes in flight, over all groups
"""
