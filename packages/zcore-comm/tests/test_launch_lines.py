"""Lines of ranks survive the way through one stream, however they were cut into chunks."""

from hypothesis import given
from hypothesis import strategies as st

from zcore.comm.launch.lines import Ended, LineReader, LineSplitter, Said, mark, mark_end

texts = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))
ranks = st.integers(0, 3) | st.integers(0, 2**20)


@given(st.lists(st.tuples(ranks, texts)), st.data())
def test_lines_are_read_as_they_were_marked_though_many_share_a_stream(lines, data):
    lines += [(rank, 300 * text) for rank, text in lines]
    waiting = {
        rank: [piece for own, text in lines if own == rank for piece in mark(own, text.encode())] for rank, _ in lines
    }
    reader, seen = LineReader(), []
    while any(waiting.values()):  # ranks write in any order, each its own pieces in theirs
        rank = data.draw(st.sampled_from([rank for rank, pieces in waiting.items() if pieces]))
        piece = waiting[rank].pop(0)
        assert len(piece) <= 512
        seen += reader.feed(piece, now_s=0.0)
    for rank in waiting:
        assert [said for said in seen if said.rank == rank] == [Said(*line) for line in lines if line[0] == rank]


@given(ranks, st.integers(-64, 255))
def test_an_end_is_read_as_it_was_marked(rank, exitcode):
    ended = Ended(rank, exitcode, "worker-1")
    assert LineReader().feed(mark_end(ended), now_s=0.0) == [ended]


def test_what_no_rank_wrote_stays_as_it_is_and_a_last_line_needs_no_end():
    reader = LineReader()
    assert reader.feed(b"motd\n\x1enone\n\x1e7 la", now_s=0.0) == [Said(None, "motd"), Said(None, "\x1enone")]
    assert reader.feed(b"st", now_s=0.0) == []
    assert reader.feed(b"", now_s=0.0) == [Said(7, "last")]


@given(st.lists(st.binary().map(lambda line: line.replace(b"\n", b"").replace(b"\r", b""))), st.data())
def test_lines_come_out_whole_however_they_come_in(lines, data):
    ends = [data.draw(st.sampled_from([b"\n", b"\r\n"])) for _ in lines]
    written = b"".join(line + end for line, end in zip(lines, ends, strict=True))
    splitter, seen = LineSplitter(), []
    while written:
        size = data.draw(st.integers(1, len(written)))
        seen += splitter.feed(written[:size], now_s=0.0)
        written = written[size:]
    assert seen + splitter.flush() == lines


def test_a_last_line_without_an_end_is_shown():
    splitter = LineSplitter()
    assert splitter.feed(b"a\nb", now_s=0.0) == [b"a"]
    assert splitter.flush() == [b"b"]
    assert splitter.flush() == []


def test_of_a_progress_bar_a_state_is_shown_now_and_then_and_the_last():
    splitter, shown = LineSplitter(), []
    for percent in range(100):
        shown += splitter.feed(b"\r%d%%" % percent, now_s=percent / 10)
    shown += splitter.feed(b"\rdone\n", now_s=10.0)
    assert shown == [b"0%", b"50%", b"done"]


def test_a_bar_that_ends_its_states_with_the_carriage_return_overwrites_too():
    splitter = LineSplitter()
    chunks = (b"1%\r", b"2%\r", b"3%\r", b"\n")
    assert [splitter.feed(chunk, now_s=0.0) for chunk in chunks] == [[], [b"1%"], [], [b"3%"]]


def test_what_never_ends_is_cut():
    splitter = LineSplitter()
    (cut,) = splitter.feed(b"x" * 2**16 + b"yz", now_s=0.0)
    assert cut == b"x" * 2**16
    assert splitter.flush() == [b"yz"]
