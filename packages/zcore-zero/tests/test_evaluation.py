"""Evaluation keeps what it has gathered, within the live limit; training afterwards is as if it had never been."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import TinyModel, batch, digest, settings, train_step, train_steps

from zcore import zero

Ranks = Callable[..., Any]


def options(**changes: Any) -> dict[str, Any]:
    return settings(3, zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 16, **changes})


def num_gathers(engine: zero.Engine) -> int:
    return engine.traffic()["gather"].calls["all_gather"]


@torch.no_grad()
def evaluate(engine: zero.Engine, step: int) -> tuple[float, int]:
    before = num_gathers(engine)
    loss = engine(**batch(step)).item()
    return loss, num_gathers(engine) - before


def evaluate_and_train(limit: float) -> tuple[list[int], int, list[bool]]:
    engine = zero.initialize(TinyModel(), options(stage3_max_live_parameters=limit))
    other = zero.initialize(TinyModel(), options())
    same = []
    for each in (engine, other):
        train_steps(each, range(2))
    engine.eval()
    counts = []
    for _ in range(3):
        loss, count = evaluate(engine, 7)
        counts.append(count)
        same.append(loss == evaluate(other, 7)[0])
    engine.train()
    live_bytes = engine.sharding.ledger.live_bytes
    for each in (engine, other):
        each.module.num_forwards.zero_()
        train_steps(each, range(2, 4))
    same.append(digest(engine) == digest(other))
    engine.eval()
    same.append(evaluate(engine, 8)[0] == evaluate(other, 8)[0])  # with the new values
    train_step(engine, 9)  # without train(): nothing is kept for a forward with a backward
    same.append(evaluate(engine, 8)[0] != evaluate(other, 8)[0])
    return counts, live_bytes, same


def test_a_second_forward_gathers_nothing_where_the_limit_allows(ranks: Ranks) -> None:
    for counts, live_bytes, same in ranks(2, evaluate_and_train, 1e9):
        assert counts[0] > 0 and counts[1:] == [0, 0]
        assert live_bytes == 0
        assert same == [True] * len(same)


def test_beyond_the_limit_some_are_kept(ranks: Ranks) -> None:
    for counts, live_bytes, same in ranks(2, evaluate_and_train, 500):
        assert counts[0] > counts[1] > 0
        assert live_bytes == 0
        assert same == [True] * len(same)


def run_forwards_of_ones_own() -> str:
    engine = zero.initialize(TinyModel(), options())
    train_steps(engine, range(2))
    engine.eval()
    for step in range(1 + 3 * engine.dp_rank):
        evaluate(engine, step)
    engine.train()
    engine.module.num_forwards.zero_()
    train_steps(engine, range(2, 4))
    other = zero.initialize(TinyModel(), options())
    train_steps(other, range(2))
    other.module.num_forwards.zero_()
    train_steps(other, range(2, 4))
    assert digest(engine) == digest(other)
    return digest(engine)


def test_ranks_run_as_many_forwards_as_they_like_once_all_is_gathered(ranks: Ranks) -> None:
    assert len(ranks(2, run_forwards_of_ones_own, group_timeout_s=20.0)) == 2


def generate_texts_of_other_lengths(synced: bool) -> tuple[list[int], list[int]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model, plain = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    limit = 1e9 if not synced else 1
    engine = zero.initialize(model, options(stage3_max_live_parameters=limit))
    prompt = torch.tensor([[1, 5 + engine.dp_rank]])
    kinds = {"do_sample": False, "max_new_tokens": 3 + 4 * engine.dp_rank, "pad_token_id": 0, "eos_token_id": None}
    engine.eval()
    with torch.no_grad():
        found = engine.module.generate(prompt, synced_gpus=synced, **kinds)[0].tolist()
        return found, plain.eval().generate(prompt, **kinds)[0].tolist()


@pytest.mark.parametrize("synced", [True, False])
def test_generate_of_transformers_ends_where_each_rank_does(ranks: Ranks, synced: bool) -> None:
    pytest.importorskip("transformers")
    texts = ranks(2, generate_texts_of_other_lengths, synced, group_timeout_s=30.0)
    assert [len(found) for found, _ in texts] == [5, 9]
    for found, expected in texts:
        assert found == expected
