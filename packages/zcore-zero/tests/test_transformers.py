"""The recipe for Hugging Face models in docs/zero.md: built inside Init, trained, saved whole, read by plain torch."""

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
