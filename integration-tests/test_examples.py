"""The parts of docs/examples: the text is split and batched as promised, and the model is what plain torch says."""

import gzip
import lzma
import sys
from itertools import islice
from pathlib import Path, PurePath

import pytest
import torch

pytest.importorskip("tokenizers")
EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))

import text  # noqa: E402 - found on the path above
from gpt import GPT, GPTConfig, generate  # noqa: E402

SIZES = GPTConfig(vocab_size=300, context=16, layers=2, width=32, heads=2)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    for number in range(60):
        (root / f"module_{number}.py").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 5)
    (root / "test").mkdir()
    (root / "test" / "test_it.py").write_text("assert True\n")
    return root


@pytest.fixture(scope="module")
def corpus(library: Path) -> text.Corpus:
    return text.load_corpus(vocab_size=300, root=library)


def test_tests_and_generated_tables_are_no_sources(library):
    paths = text.source_files(library)
    assert len(paths) == 60
    assert paths == sorted(paths)
    assert PurePath("test/test_it.py") not in paths


def test_files_are_held_out_by_path_alone():
    held_out = [
        path
        for path in ("ast.py", "html/parser.py", "json/decoder.py", "traceback.py")
        if text.is_held_out(PurePath(path))
    ]
    assert held_out == ["html/parser.py", "traceback.py"]


def test_a_corpus_is_the_same_each_time(library, corpus):
    again = text.load_corpus(vocab_size=300, root=library)
    assert torch.equal(again.train, corpus.train)
    assert again.tokenizer.to_str() == corpus.tokenizer.to_str()


@pytest.mark.parametrize("source", ["", "x = 1\n", "\tif a:\n        b  # \u00fc \u4e16\U0001f30d\r\n", "<|file"])
def test_any_text_survives_the_tokenizer(corpus, source):
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(source).ids) == source


def test_a_stream_separates_files(corpus):
    stream = text.encode(corpus.tokenizer, ["def", "x = 1"])
    assert (stream == 0).nonzero().flatten().tolist() == [
        0,
        len(corpus.tokenizer.encode("def").ids) + 1,
        len(stream) - 1,
    ]


def train_batches(stream, *, rank=0, dp_size=1, batch_size=4, first=0, number=12):
    batches = text.train_batches(
        stream, context=7, batch_size=batch_size, rank=rank, dp_size=dp_size, seed=3, first=first
    )
    return list(islice(batches, number))


def test_the_parts_of_the_ranks_are_the_batch_of_one_rank():
    stream = torch.arange(200, dtype=torch.int32)
    whole = [tokens for tokens, _ in train_batches(stream, number=6)]
    parts = [train_batches(stream, rank=rank, dp_size=2, batch_size=2, number=6) for rank in range(2)]
    assert all(torch.equal(torch.cat((a, b)), c) for (a, _), (b, _), c in zip(*parts, whole, strict=True))


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order():
    stream = torch.arange(7 * 28 + 1, dtype=torch.int32)
    starts = torch.stack([tokens[:, 0] for tokens, _ in train_batches(stream, number=14)])
    first, second = starts[:7].flatten(), starts[7:].flatten()
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(0, 7 * 28, 7))
    assert not torch.equal(first, second)


def test_batches_go_on_at_the_exact_batch():
    stream = torch.arange(200, dtype=torch.int32)
    for (tokens, targets), (again, _) in zip(train_batches(stream)[8:], train_batches(stream, first=8), strict=False):
        assert torch.equal(tokens, again)
        assert torch.equal(targets, tokens + 1)


@pytest.mark.parametrize("length", [2, 57, 58, 200])
@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_held_out_tokens_are_targets_exactly_once(length, dp_size):
    stream = torch.arange(length, dtype=torch.int32)
    per_rank = [
        list(text.held_out_batches(stream, context=7, batch_size=4, rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    targets = torch.cat([wanted.flatten() for batches in per_rank for _, wanted in batches])
    assert sorted(targets[targets != text.IGNORED].tolist()) == list(range(1, length))
    assert all(tokens.shape == (4, 7) and tokens.min() >= 0 for batches in per_rank for tokens, _ in batches)


def test_compressors_are_measured_at_their_best():
    sample = (EXAMPLES / "text.py").read_bytes()
    bits = text.compressed_bits_per_byte(sample)
    assert lzma.decompress(lzma.compress(sample, preset=9)) == sample
    assert bits["gzip -9"] == 8 * len(gzip.compress(sample, 9)) / len(sample)
    assert 1 < bits["gzip -9"] < 4
    assert 1 < bits["xz -9"] < 4


def test_the_model_returns_logits_or_the_loss_of_those_logits():
    torch.manual_seed(0)
    model = GPT(SIZES)
    tokens = torch.randint(0, 300, (3, 16))
    logits = model(tokens)
    assert logits.shape == (3, 16, 300)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert torch.equal(model(tokens, targets=tokens), expected)


def test_no_position_sees_what_comes_after_it():
    torch.manual_seed(0)
    model = GPT(SIZES)
    tokens = torch.randint(0, 300, (1, 16))
    changed = tokens.clone()
    changed[0, 9:] = 7
    torch.testing.assert_close(model(tokens)[0, :9], model(changed)[0, :9])


def test_the_default_model_has_a_few_million_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert 3e6 < sum(param.numel() for param in model.parameters()) < 6e6


def test_generation_continues_past_the_context_and_repeats_with_its_seed():
    torch.manual_seed(0)
    model = GPT(SIZES)
    prompt = torch.tensor([1, 2, 3])
    first = generate(model, prompt, num_tokens=20, temperature=1.0, seed=5)
    assert first[:3].tolist() == [1, 2, 3]
    assert len(first) == 23
    assert torch.equal(first, generate(model, prompt, num_tokens=20, temperature=1.0, seed=5))
    assert not torch.equal(first, generate(model, prompt, num_tokens=20, temperature=1.0, seed=6))
