"""The fine-tuning program of docs/examples on two ranks: the loss falls, and transformers reads what it exports."""

import math
import sys
from pathlib import Path

import pytest

for needed in ("zcore.zero", "peft", "rich", "tokenizers", "transformers"):
    pytest.importorskip(needed)
EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402 - found on the path above
from text import SEPARATOR, encode_corpus, train_tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from zcore.core.testing import run_ranks  # noqa: E402

SOURCE = "".join(f"def add_{n}(x):\n    return x + {n}\n\n\n" for n in range(40))
HELD_OUT = "".join(f"def add_{n}(y):\n    return y + {n}\n\n\n" for n in range(40, 50))
# Matrices above stage3_param_persistence_threshold, so that base and adapters are really gathered.
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
MODES = {"full": ["--lr", "0.003"], "lora": ["--lora", "80", "--lr", "0.01"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as a pretrained model is published in: random weights in bf16, tied embeddings, a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([SOURCE], vocab_size=300)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR).save_pretrained(folder)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=2, tie_word_embeddings=True, **SIZES)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def arguments_of(mode: str, folder: Path) -> list[str]:
    return [*MODES[mode], "--steps", "12", "--context", "16", "--out", str(folder / mode)]


def run_modes(base: Path, out: Path) -> dict[str, finetune.Result]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    corpus = encode_corpus(tokenizer.backend_tokenizer, [SOURCE], [HELD_OUT], separator=tokenizer.eos_token)
    every = {mode: finetune.parse_arguments(arguments_of(mode, out)) for mode in MODES}
    return {mode: finetune.finetune(args, base, tokenizer, corpus) for mode, args in every.items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def runs(base: Path, out: Path) -> list[dict[str, finetune.Result]]:
    """By rank; both modes in one start of ranks, as importing takes longer than training."""
    return run_ranks(2, run_modes, base, out, deadline_s=180)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_and_what_is_exported_has_it_too(runs, out, mode):
    first, other = (results[mode] for results in runs)
    assert first.loss_after < first.loss_before - 0.3
    assert (other.loss_before, other.loss_after) == (first.loss_before, first.loss_after)
    assert math.isclose(first.loss_exported, first.loss_after, abs_tol=finetune.EXPORT_TOLERANCE)
    exported = AutoModelForCausalLM.from_pretrained(out / mode)
    assert type(exported) is LlamaForCausalLM  # adapters are merged
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(out / mode).eos_token == SEPARATOR


@pytest.mark.parametrize("mode", MODES)
def test_each_rank_holds_half_and_the_report_says_so(runs, out, mode, capsys):
    result = runs[0][mode]
    assert 2 * result.memory.ranks[0].states_bytes < 1.1 * result.memory.data_parallel.states_bytes
    finetune.show(result, finetune.parse_arguments(arguments_of(mode, out)))
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("plain DDP ", "as pretrained", "after 12 steps", f"{result.loss_after:.4f}"))


def test_adapters_alone_are_trained(runs):
    assert runs[0]["full"].trained_numel == runs[0]["full"].total_numel
    base_numel = runs[0]["full"].total_numel
    assert runs[0]["lora"].total_numel == base_numel + runs[0]["lora"].trained_numel
