"""The names of all contenders, each with the stage of ZeRO that it is a peer of; contenders.py says what they are."""

__all__ = ["DDP", "FSDP2", "NO_COMMUNICATION", "STAGE_OF", "peers_of", "zcore_at"]

DDP, FSDP2, NO_COMMUNICATION = "DDP", "FSDP2", "no communication"

STAGE_OF = {
    "zcore 0": 0,
    "zcore 1": 1,
    "zcore 2": 2,
    "zcore 3": 3,
    "zcore 3 pairwise": 3,
    "zcore 3 core": 3,
    "zcore 3 plain gloo": 3,
    DDP: 0,
    "ZeroRedundancyOptimizer": 1,
    "FSDP2 kept whole": 2,
    FSDP2: 3,
    "DeepSpeed 1": 1,
    "DeepSpeed 2": 2,
    "DeepSpeed 3": 3,
}


def zcore_at(stage: int) -> str:
    """The name of zcore at `stage`, over what it chooses by itself."""
    return f"zcore {stage}"


def peers_of(stage: int) -> list[str]:
    """Who else shards what `stage` does."""
    return [name for name, own in STAGE_OF.items() if own == stage and not name.startswith("zcore")]
