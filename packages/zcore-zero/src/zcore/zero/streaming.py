"""Files of safetensors that are opened inside `zero.Init` give tensors without memory, which are read later.

Whoever loads inside the block (transformers' `from_pretrained`, `safetensors.torch.load_file`, a loop of one's own)
goes on as ever: casts, stacks experts, ties, assigns. All that is recorded (see `deferred.py`):

    record   a = read(file, "q"); b = read(file, "k"); w = cat(a, b).to(bfloat16)       no values, no memory
    replay   the same three operations, on data rank 0, when the bucket of w is filled

`safe_open` is a class of Rust's that cannot be edited, and programs bind its name when they are imported; so for the
length of the block that name stands for `open_later`, in every module that has it. Other threads read at once, as
operations there are not recorded; transformers has a switch against its own.
"""

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from safetensors import safe_open
from torch import Tensor

from zcore.core.errors import CheckpointError
from zcore.zero.deferred import Recording
from zcore.zero.weight_files import StoredTensor, describe_file

__all__ = ["open_later", "streamed_files"]

NAME = "safe_open"
LOADS_IN_THIS_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers
RECORDING: ContextVar[Recording | None] = ContextVar("recording", default=None)  # each thread has its own


@contextmanager
def streamed_files(recording: Recording) -> Generator[None]:
    """Inside, tensors of safetensors files are operations of `recording`, in this thread."""
    is_outermost = RECORDING.get() is None
    token = RECORDING.set(recording)
    loads_in_this_thread = os.environ.get(LOADS_IN_THIS_THREAD)
    os.environ[LOADS_IN_THIS_THREAD] = "1"
    _rebind(safe_open, open_later)
    try:
        yield
    finally:
        RECORDING.reset(token)
        if is_outermost:
            _rebind(open_later, safe_open)  # also where a module was imported inside the block
        if loads_in_this_thread is None:
            os.environ.pop(LOADS_IN_THIS_THREAD, None)
        else:
            os.environ[LOADS_IN_THIS_THREAD] = loads_in_this_thread


def open_later(filename: str | os.PathLike[str], framework: str, device: Any = "cpu", **settings: Any) -> Any:
    """As `safe_open`; inside `streamed_files` its tensors have no values yet."""
    recording = RECORDING.get()
    if recording is None or framework not in ("pt", "torch", "pytorch") or str(device) != "cpu":
        return safe_open(filename, framework=framework, device=device, **settings)
    try:
        stored = {each.name: each for each in describe_file(os.fspath(filename))}
    except CheckpointError:  # whoever opens the file knows better: quantised weights, or safe_open's own error
        return safe_open(filename, framework=framework, device=device, **settings)
    return _File(filename, framework, settings, stored, recording)


class _File:
    """What `safe_open` gives, with the tensors left to be read."""

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        settings: dict[str, Any],
        stored: dict[str, StoredTensor],
        recording: Recording,
    ) -> None:
        self._file: Any = safe_open(filename, framework=framework, **settings)
        self._stored = stored
        self._recording = recording

    def __enter__(self) -> "_File":
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Tensor:
        """The tensor `name`, to be read when its values are wanted."""
        stored = self._stored.get(name)
        if stored is None or RECORDING.get() is not self._recording:
            value: Tensor = self._file.get_tensor(name)  # or its error, for a name that is not there
            return value
        return self._recording.later(stored.read, shape=stored.shape, dtype=stored.dtype)

    def get_tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: self.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118 - no mapping

    def get_slice(self, name: str) -> "_Slice":
        """The tensor `name`, to be indexed."""
        return _Slice(self, self._file.get_slice(name), name)


class _Slice:
    """What `get_slice` gives."""

    def __init__(self, file: _File, known: Any, name: str) -> None:
        self._file = file
        self._known = known
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._known, name)

    def __getitem__(self, index: Any) -> Tensor:
        whole = self._file.get_tensor(self._name)
        return whole if index is Ellipsis else whole[index].contiguous()


def _rebind(old: object, new: object) -> None:
    for module in _modules():
        if module.__dict__.get(NAME) is old:
            module.__dict__[NAME] = new


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        # Those of this package mean the real one.
        if isinstance(module, ModuleType) and not name.startswith("zcore.zero."):
            yield module
