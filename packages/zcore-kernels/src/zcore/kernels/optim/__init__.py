"""Optimizers for any training loop, with torch.optim's signatures and `state_dtype`: see `flat_optimizer`."""

from zcore.kernels.optim.adagrad import Adagrad
from zcore.kernels.optim.adam import Adam
from zcore.kernels.optim.adamw import AdamW
from zcore.kernels.optim.flat_optimizer import StateDtype
from zcore.kernels.optim.lamb import LAMB
from zcore.kernels.optim.lion import Lion
from zcore.kernels.optim.sgd import SGD

__all__ = ["LAMB", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "StateDtype"]
