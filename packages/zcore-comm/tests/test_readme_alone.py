"""Every program in the README's section on using this wheel alone runs as it is printed there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Alone\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
PROGRAMS = re.findall(r"^```python\n(.*?)^```", SECTION[1] if SECTION else "", re.MULTILINE | re.DOTALL)


def run(program):
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})


def test_there_is_a_program_for_each_part():
    assert len(PROGRAMS) == 4
    names = ("reduce_scatter", "ddp_hook", "coalescing", "limit_in_flight")
    assert [name for name, program in zip(names, PROGRAMS, strict=True) if name not in program] == []


@pytest.mark.parametrize("program", PROGRAMS, ids=["calls", "DDP", "small calls", "limit"])
def test_the_program_runs_as_it_is_printed(ranks, program):
    ranks(2, run, program, init_process_group=False)
