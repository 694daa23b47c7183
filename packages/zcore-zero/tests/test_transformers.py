"""The recipes for Hugging Face models in docs/zero.md: built inside Init, trained, saved whole, read by plain torch.

And adapters on a frozen base, where PEFT edits the model before it is sharded.
"""

import pytest
import torch
import torch.distributed as dist
from tiny_models import settings

from zcore import zero

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def train_and_save(zero_stage, folder):
    config = settings(zero_stage)
    torch.manual_seed(0)
    with zero.Init(config=config):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    engine = zero.initialize(model, config=config)
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(dist.get_rank()))
    losses = []
    for _ in range(3):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = engine.consolidated_state_dict()
    if engine.global_rank == 0:
        model.save_pretrained(folder, state_dict=weights)
    with torch.no_grad():
        return losses, engine.eval()(input_ids=tokens).logits.tolist()


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_model_of_transformers_trains_and_is_read_back_with_the_same_logits(ranks, tmp_path, zero_stage):
    (losses, logits), _ = ranks(2, train_and_save, zero_stage, tmp_path)
    assert losses[-1] < losses[0]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=tokens).logits, torch.tensor(logits))


def with_adapters(dtype):
    """A frozen base of `dtype` with adapters of fp32, all of them trained from the first step on."""
    import peft

    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)).to(dtype)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(base, lora)


def rows_of(step, part):
    return torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(10 * step + part))


def train_adapters_plainly(dtype, parts):
    """Without zcore, the batch in `parts`; losses by step and part, and the trained weights."""
    model = with_adapters(dtype).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01, fused=True)
    losses = []
    for step in range(5):
        for part in range(parts):
            tokens = rows_of(step, part)
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / parts).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.state_dict()


def train_adapters_sharded(dtype):
    engine = zero.initialize(with_adapters(dtype), config=settings(zero_stage=3)).train()
    losses = []
    for step in range(5):
        tokens = rows_of(step, engine.dp_rank)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, engine.consolidated_state_dict(), engine.memory_report()


def in_both_dtypes(train, *args):
    """In one start of ranks, as importing PEFT takes longer than training."""
    return {dtype: train(dtype, *args) for dtype in (torch.float32, torch.bfloat16)}


def test_adapters_on_a_frozen_base_train_as_in_plain_torch_bit_for_bit(ranks):
    pytest.importorskip("peft")
    (plain,) = ranks(1, in_both_dtypes, train_adapters_plainly, 2)
    first, second = ranks(2, in_both_dtypes, train_adapters_sharded)
    for dtype, (losses, weights) in plain.items():
        (own, whole, memory), (other, _, _) = first[dtype], second[dtype]
        assert losses == [loss for pair in zip(own, other, strict=True) for loss in pair]
        assert weights.keys() == whole.keys()
        assert [name for name in weights if not torch.equal(weights[name], whole[name])] == []
        held = memory.ranks[0]
        assert held.gradients_bytes < held.parameters_bytes  # none of the base


def generate_with_adapters(stage):
    """From below the root, as PEFT does: adapters are cast to the dtype that those beside them show."""
    engine = zero.initialize(with_adapters(torch.bfloat16), {**settings(stage), "bf16": {"enabled": True}}).eval()
    engine.train().backward(engine(input_ids=rows_of(0, 0), labels=rows_of(0, 0)).loss)
    engine.step()
    engine.eval()
    with torch.no_grad():
        expected = engine(input_ids=rows_of(1, 0)).logits[:, -1].argmax(-1)
    found = engine.module.generate(input_ids=rows_of(1, 0), max_new_tokens=1, do_sample=False)[:, -1]
    return found.tolist(), expected.tolist()


def generate_at_stages_1_and_3():
    return [generate_with_adapters(stage) for stage in (1, 3)]


def test_adapters_in_bf16_generate_what_the_engine_computes(ranks):
    pytest.importorskip("peft")
    for by_stage in ranks(2, generate_at_stages_1_and_3):
        for found, expected in by_stage:
            assert found == expected
