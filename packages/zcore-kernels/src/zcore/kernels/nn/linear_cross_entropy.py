"""The last linear layer of a language model and its loss as one layer, whose logits are never all in memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zcore.core import ops
from zcore.kernels.ops.linear_cross_entropy import OP  # and the op is known to torch

__all__ = ["LinearCrossEntropy"]


class LinearCrossEntropy(nn.Module):
    """torch.nn.CrossEntropyLoss of torch.nn.Linear, with a z-loss (arXiv 2204.02311) and a soft cap (arXiv 2408.00118).

    It holds the settings; the weight stays that of the model, `model.lm_head.weight` in Hugging Face's:

        hidden = model.model(input_ids).last_hidden_state
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # each token is to tell the next one
        loss = LinearCrossEntropy()(hidden, model.lm_head.weight, targets)

    >>> hidden, weight = torch.eye(2), torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 0.0]])
    >>> LinearCrossEntropy()(hidden, weight, torch.tensor([0, -100]))
    tensor(0.0002)
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,  # adds z_loss * logsumexp(logits)^2; PaLM has 1e-4
        logit_softcap: float | None = None,  # logits count as cap * tanh(logits / cap); Gemma 2 has 30
        reduction: str = "mean",  # "mean" over tokens that are not ignored, "sum", or "none"
        chunk_rows: int | None = None,  # tokens whose logits are in memory at once; None to have it chosen
    ) -> None:
        super().__init__()
        self.ignore_index, self.label_smoothing, self.z_loss = ignore_index, label_smoothing, z_loss
        self.logit_softcap, self.reduction, self.chunk_rows = logit_softcap, reduction, chunk_rows

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        """hidden: [..., hidden]; weight: [vocabulary, hidden]; targets: [...] int64; bias: [vocabulary], or none.

        The loss is in fp32 at least. It has first derivatives only, of hidden, weight and bias. Raises LayoutError and
        ConfigError for operands and settings that cannot be served.
        """
        # As zcore.kernels.nn.serving, but that in a graph this op serves every dtype and CUDA, too.
        serve: Callable[..., Tensor] = torch.ops.zcore.linear_cross_entropy
        if not torch.compiler.is_compiling():
            serve = ops.get(OP, device=hidden.device, dtype=hidden.dtype)
        return serve(
            hidden,
            weight,
            targets,
            bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            logit_softcap=self.logit_softcap,
            reduction=self.reduction,
            chunk_rows=self.chunk_rows,
        )

    def extra_repr(self) -> str:
        """As print(model) shows it."""
        names = ("ignore_index", "label_smoothing", "z_loss", "logit_softcap", "reduction", "chunk_rows")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
