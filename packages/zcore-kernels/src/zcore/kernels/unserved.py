"""Kinds of layers that patch() never swaps, though zcore.kernels.nn has something for their place, and why.

They are recognised by name, to be told of: what is wanted of them is put into a model by hand.
"""

from torch import nn

__all__ = ["loss_of", "why_never"]

WHY_LOSS = "whose logits are made before a loss sees them; to do without call LinearCrossEntropy with its weight"
WHY_ROTARY = "which only makes tables for attention of its own; Rotary is a layer for attention that you write"
WHY_EXPERTS = "which is called in another way than ExpertMLPs, a layer for models that you write"
WHY_ROUTER = "whose results have another form than those of TopKRouter, a layer for models that you write"
WHY_MLP = "whose projections are not of the known names; BiasGELU, SwiGLU and GeGLU are layers to put between them"

# Names of projections: GPT-NeoX, OPT and Phi, T5, GPT-J and others. BERT and its kin have intermediate_act_fn.
MLPS = (
    {"dense_h_to_4h", "dense_4h_to_h"},
    {"fc1", "fc2"},
    {"wi", "wo"},
    {"wi_0", "wi_1", "wo"},
    {"fc_in", "fc_out"},
    {"lin1", "lin2"},
    {"ffn", "ffn_output"},
    {"w1", "w2"},
)


def why_never(name: str, module: nn.Module) -> str | None:
    """Why a layer of that name in its owner is of a kind that stays; None for other layers."""
    if type(module).__module__.startswith("zcore.kernels."):
        return None
    title, parts = type(module).__name__, {part for part, _ in module.named_children()}
    if "Rotary" in title:
        return WHY_ROTARY
    if "Router" in title:
        return WHY_ROUTER
    if name == "experts" or title.endswith("Experts"):
        return WHY_EXPERTS
    is_named = title.endswith("MLP") and "experts" not in parts  # a mixture is told of by its parts
    is_mlp = is_named or hasattr(module, "intermediate_act_fn") or any(each <= parts for each in MLPS)
    return WHY_MLP if is_mlp else None


def loss_of(model: nn.Module) -> tuple[str, nn.Module, str] | None:
    """The head of a language model of Hugging Face, by name, and why its loss stays; None where there is none."""
    find = getattr(model, "get_output_embeddings", None)
    if not callable(find):
        return None
    head = find()
    return next(((name, each, WHY_LOSS) for name, each in model.named_modules() if each is head), None)
