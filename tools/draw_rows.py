"""Draw what each rank holds in each row of the placement table, from the table itself: docs/images/rows.png.

python tools/draw_rows.py [FILE]      needs zcore-zero and matplotlib
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from zcore.core.mesh import DataParallel
from zcore.zero.placement import TABLE, Placement, Row, owned_slices

RANKS = 4
COLOURS = {"parameters": "#4c78a8", "gradients": "#f58518", "optimizer": "#54a24b", "second copy": "#9ecae9"}
ROWS: dict[str, tuple[Row, int, int]] = {  # name: row, ranks of a shard group, ranks of hpZ's groups
    **{f"stage {stage}": (row, RANKS, 0) for stage, row in TABLE.items()},
    "stage 3, hpZ 2": (TABLE[3], RANKS, 2),
    "stage 1, MiCS 2": (TABLE[1], 2, 0),
    "stage 2, MiCS 2": (TABLE[2], 2, 0),
    "stage 3, MiCS 2": (TABLE[3], 2, 0),
}


def place_of(rank: int, shard_size: int) -> DataParallel:
    """Where a rank is among the data ranks."""
    return DataParallel(
        "dp_shard", "dp_replicate", shard_size, RANKS // shard_size, rank % shard_size, rank // shard_size
    )


def held(row: Row, rank: int, shard_size: int, secondary_size: int) -> dict[str, range]:
    """The slices of each bucket that a rank holds between steps, by what they are of."""
    own = owned_slices(TABLE[3], place_of(rank, shard_size))
    placements = {"parameters": row.parameters, "gradients": row.gradients, "optimizer": row.optimizer}
    found = {name: own if each is Placement.SHARD else range(RANKS) for name, each in placements.items()}
    if secondary_size:
        width = RANKS // secondary_size
        start = rank % secondary_size * width
        found["second copy"] = range(start, start + width)
    return found


def main() -> None:
    """Draw all rows."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images" / "rows.png")
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots(2, 4)
    for plot, (name, (row, shard_size, secondary_size)) in zip(axes.flat, ROWS.items(), strict=True):
        for rank in range(RANKS):
            for line, (what, slices) in enumerate(held(row, rank, shard_size, secondary_size).items()):
                for each in range(RANKS):
                    corner = rank * (RANKS + 1) + each, -line
                    colour = COLOURS[what] if each in slices else "white"
                    plot.add_patch(Rectangle(corner, 1, 0.8, facecolor=colour, edgecolor="#bbbbbb", linewidth=0.6))
            plot.text(rank * (RANKS + 1) + RANKS / 2, 1.05, f"rank {rank}", ha="center", fontsize=8, color="#555555")
        plot.set_xlim(-0.3, RANKS * (RANKS + 1) - 0.7)
        plot.set_ylim(-3.2, 1.6)
        plot.set_title(name, fontsize=11, loc="left")
        plot.axis("off")
    figure.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr]
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
