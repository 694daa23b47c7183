"""Hostfiles and node lists become hosts; nonsense is refused by line, with what to write instead."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcore.comm.launch.hosts import Host, expand_nodelist, parse_hostfile, select_hosts
from zcore.core.errors import ConfigError

HOSTS = (Host("a", 4), Host("me@b", 4), Host("c"))

names = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
slots = st.none() | st.integers(1, 16)


@given(
    st.dictionaries(names, slots, min_size=1),
    st.sampled_from(
        ["{} slots={}", "{}:{}", "  {}   slots = {} # big", "{} slots={} max_slots=99", "{} slots={} max-slots = 99"]
    ),
)
def test_every_host_is_read_as_it_was_written_in_its_order(hosts, form):
    lines = [form.format(name, count) if count else name for name, count in hosts.items()]
    text = "# cluster\n\n" + "\n".join(lines)
    assert parse_hostfile(text, path="hosts") == tuple(Host(*item) for item in hosts.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=two", "hosts:1: `a slots=two` is no host; expected `NAME` or `NAME slots=NUMBER`."),
        ("a,b", "hosts:1: `a,b` is no host; expected `NAME` or `NAME slots=NUMBER`. Give each host a line of its own."),
        ("a\nb 4", "hosts:2: `b 4` is no host"),
        ("a slots=4 b", "hosts:1: `a slots=4 b` is no host"),
        ("a slots=0", "hosts:1: a has no slot; expected 1 or more. Leave its line out."),
        ("a slots=4\n\n me@a slots=2", "hosts:3: a is named twice; give all its slots on one line."),
        ("# nothing\n", "hosts names no host; expected lines such as `worker-1 slots=4`."),
    ],
)
def test_nonsense_is_refused_by_its_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(text, path="hosts")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, HOSTS),
        ({"include": "b"}, (HOSTS[1],)),
        ({"include": "c:1,0@a:2"}, (Host("a", 4, (2,)), Host("c", None, (0, 1)))),
        ({"exclude": "a:0@c"}, (Host("a", 4, (1, 2, 3)), HOSTS[1])),
        ({"exclude": "a:0,1,2,3"}, HOSTS[1:]),
    ],
)
def test_hosts_and_slots_are_picked_and_left_out(chosen, expected):
    assert select_hosts(HOSTS, **chosen) == expected


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"include": "a", "exclude": "b"}, "expected one of them"),
        ({"include": "A@b"}, "`A` of `A@b` is not in the hostfile; did you mean a?"),
        ({"include": "worker"}, "`worker` is not in the hostfile; it has a, b, c."),
        ({"include": "a:x"}, "expected `HOST` or `HOST:SLOT,SLOT`, such as a:0,2"),
        ({"exclude": "a:4"}, "`a:4` names slot 4; a has slots 0 to 3."),
        ({"exclude": "c:0"}, "say `slots=` in its line"),
        ({"exclude": "a@b@c"}, "leaves no host"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(chosen, message):
    with pytest.raises(ConfigError) as caught:
        select_hosts(HOSTS, **chosen)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1", ["node1"]),
        ("node[01-03,7],gpu-a[1-2]b", ["node01", "node02", "node03", "node7", "gpu-a1b", "gpu-a2b"]),
        ("rack[0-1]n[9-10]", ["rack0n9", "rack0n10", "rack1n9", "rack1n10"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("10.0.0.[1-2],login.site", ["10.0.0.1", "10.0.0.2", "login.site"]),
    ],
)
def test_a_node_list_expands_in_its_order(text, expected):
    assert expand_nodelist(text) == tuple(expected)


@given(st.integers(1, 4), st.integers(0, 50), st.integers(0, 1024))
def test_a_range_holds_every_number_once_and_in_one_width(width, first, more):
    expanded = expand_nodelist(f"n[{first:0{width}}-{first + more}]")
    assert [int(name[1:]) for name in expanded] == list(range(first, first + more + 1))
    assert {len(name) - 1 for name in expanded} <= {max(width, len(str(number))) for number in range(first + more + 1)}


@pytest.mark.parametrize("text", ["", "node[1-", "node[a-b]", "a,,b", "node[1-2]]", "a b", "n[]"])
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(ConfigError, match="no node list of SLURM; expected one such as"):
        expand_nodelist(text)
