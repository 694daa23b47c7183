"""Architectures of Hugging Face from tiny configs, each with its kind of batch, as recipes of `parity`.

Nothing here touches a model's code. Sizes divide by little, start values are the library's own but for their spread: at
its 0.02 a model this narrow has gradients near zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from parity import ROWS, Recipe
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 61, 9
IMAGE_TOKEN = 60  # where a vision-language model puts what it sees; never drawn
NUM_PATCHES = 4  # an image of 8 by 8 in patches of 4 by 4
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS = {"hidden_size": 24, "intermediate_size": 40, "initializer_range": 0.1}
TEXT = {
    **DEPTH,
    **WIDTHS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}  # heads share keys and values
SEEN = {**DEPTH, **WIDTHS, "image_size": 8, "patch_size": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True))


def qwen2_moe() -> nn.Module:
    """All experts of a layer in one parameter."""
    config = transformers.Qwen2MoeConfig(
        **GROUPED,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=20,
        num_experts=8,
        num_experts_per_tok=2,
        output_router_logits=True,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def switch() -> nn.Module:
    """A module for each expert, called where it has a token."""
    config = transformers.SwitchTransformersConfig(
        **ENCODER_DECODER,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        router_jitter_noise=0.0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=5))


def gemma2() -> nn.Module:
    """Soft-capped logits; every second layer sees a window."""
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4))


def gpt2() -> nn.Module:
    """Conv1D in place of Linear; learned positions."""
    ends = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


def gpt_neox() -> nn.Module:
    """Attention beside the MLP; rotary on a part of each head."""
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT))


def phi() -> nn.Module:
    return transformers.PhiForCausalLM(transformers.PhiConfig(**TEXT, partial_rotary_factor=0.7))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, **NO_DROPOUT))


def t5() -> nn.Module:
    """The first layer's relative positions serve all; the embedding has three places."""
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**ENCODER_DECODER))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SEEN, **NO_DROPOUT, num_labels=5))


def llava() -> nn.Module:
    """CLIP beside Llama; CLIP's last norm is used by nobody."""
    seeing = transformers.CLIPVisionConfig(**SEEN, projection_dim=8)
    config = transformers.LlavaConfig(
        vision_config=seeing,
        text_config=transformers.LlamaConfig(**GROUPED),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build
    for build in (
        llama,
        qwen2,
        qwen2_moe,
        switch,
        mistral,
        gemma2,
        gpt2,
        gpt_neox,
        phi,
        bert,
        t5,
        vit,
        llava,
    )
}


@dataclass(frozen=True)
class ZooRecipe(Recipe):
    """A training of one of `MODELS`. Of those with experts the second half of the rows leaves some without a token."""

    recomputes: bool = False  # the library's own checkpointing of activations

    def build(self) -> nn.Module:
        """The model, from the seed."""
        torch.manual_seed(self.seed)
        model = MODELS[self.model]()
        if self.recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        """The rows of one micro-batch over all ranks."""
        generator = torch.Generator().manual_seed(10_000 * self.seed + 100 * step + micro + 1)
        images = torch.randn(ROWS, 3, 8, 8, generator=generator)
        if self.model == "vit":
            return {"pixel_values": images, "labels": torch.randint(5, (ROWS,), generator=generator)}
        tokens = torch.randint(3, IMAGE_TOKEN, (ROWS, LENGTH), generator=generator)
        if self.model in ("qwen2_moe", "switch"):
            tokens[ROWS // 2 :] = tokens[ROWS // 2, 0]  # over and over: all of them go to the same experts
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}
        if self.model == "llava":
            tokens[:, 1 : 1 + NUM_PATCHES] = IMAGE_TOKEN
            batch |= {"pixel_values": images, "labels": tokens.masked_fill(tokens == IMAGE_TOKEN, -100)}
        else:
            batch["attention_mask"][::3, -2:] = 0  # some rows are shorter
            batch["labels"][::3, -2:] = -100
        return batch

    def loss(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        """What the model says itself."""
        return model(**batch).loss
