"""Which tensor of a pretrained model lies in which safetensors file, and the values of one of them.

    folder/model.safetensors                     one file, or
    folder/model.safetensors.index.json          {"weight_map": {"embed.weight": "model-00001-of-00002.safetensors"}}
    folder/model-00001-of-00002.safetensors      and the files that it names

Finding reads headers, some KB of each file. Values are read one tensor at a time, when they are wanted.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zcore.core.errors import CheckpointError

__all__ = ["StoredTensor", "describe_file", "find_weights", "some_of"]

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}  # that a model can be built in; what is quantised has scales beside it and is not a weight yet
INDEX = ".safetensors.index.json"
OF_TORCH = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of one file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stamp: tuple[int, int]  # the file's size and time of change when its header was read

    def read(self) -> Tensor:
        """The values, on the CPU, as mapped pages of the file: they take no memory of the process unless written to.

        Raises CheckpointError if the file is gone, or another one by now.
        """
        # Opened for each tensor: an open file would keep all pages that were ever read mapped.
        if not self.path.exists() or _stamp(self.path) != self.stamp:
            raise CheckpointError(
                f"{self.path} was written to or removed after its header was read, and before {self.name} was. Weights "
                "that are loaded inside `zero.Init` are read when the model is sharded: leave the files as they are "
                "until `zero.initialize` or `zero.shard` has returned."
            )
        try:
            # Inside zero.Init, too, where what it does to make a tensor would be recorded.
            with torch._C._DisableTorchDispatch(), safe_open(self.path, framework="pt") as file:
                value: Tensor = file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error
        return value


def find_weights(path: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, of an index of several, or of a folder that holds either, by its name.

    Raises CheckpointError if there is none, a file that the index names is missing or damaged, or the index and the
    files disagree.
    """
    path = Path(path)
    if path.is_dir():
        path = _choose(path)
    if not path.name.endswith(INDEX):
        return {each.name: each for each in describe_file(path)}
    weight_map = _read_index(path)
    found = {
        each.name: each
        for file in sorted(set(weight_map.values()))
        for each in describe_file(path.parent / file)
        if weight_map.get(each.name) == file
    }
    lacking = [name for name in weight_map if name not in found]
    if lacking:
        raise CheckpointError(
            f"{path} says that {lacking[0]} lies in {weight_map[lacking[0]]}, which has no tensor of that name "
            f"({len(lacking)} of {len(weight_map)} are lacking). Index and files are of different models, or the "
            "download is not whole: fetch the folder again."
        )
    return found


def describe_file(path: str | Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, from its header."""
    path = Path(path).absolute()  # they are read later, perhaps from another working directory
    stamp = _stamp(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            dtypes = {name: each.get_dtype() for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    if unknown := [name for name, dtype in dtypes.items() if dtype not in DTYPES]:
        raise CheckpointError(
            f"{unknown[0]} in {path} is stored as {dtypes[unknown[0]]}, a quantised or unusual format. Weights to be "
            f"trained are one of {', '.join(DTYPES)}: dequantise the model and save it again."
        )
    return [StoredTensor(path, name, shapes[name], DTYPES[dtypes[name]], stamp) for name in slices]


def _choose(folder: Path) -> Path:
    """The index of `folder`, or its one file."""
    names = sorted(each.name for each in folder.iterdir())
    for suffix in (INDEX, ".safetensors"):
        fitting = [name for name in names if name.endswith(suffix)]
        preferred = [name for name in fitting if name == f"model{suffix}"] or fitting
        if len(preferred) == 1:
            return folder / preferred[0]
        if fitting:
            raise CheckpointError(
                f"{folder} has {len(fitting)} files that end with {suffix} ({some_of(fitting)}), and it is not clear "
                f"which hold the model. Pass the path of the file, or of an index ({INDEX}) that says which tensor "
                "lies in which file."
            )
    raise CheckpointError(
        f"{folder} has no safetensors file; it holds {some_of(names) or 'nothing'}. Weights are streamed from "
        "safetensors only: save those of another format with safetensors.torch.save_file, or with transformers' "
        "`save_pretrained`."
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f'{path} cannot be read as an index of weights, which is JSON with a "weight_map" from names of tensors to '
            f"names of files: {type(error).__name__}: {error}. Fetch or write it again."
        ) from error


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Expected a safetensors file, on every rank. Check the "
            "path; a name of Hugging Face's hub is none, download it before."
        ) from error
    return status.st_size, status.st_mtime_ns


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if path.suffix in OF_TORCH:
        return CheckpointError(
            f"{path} is no safetensors file, but by its name one of torch.save, whose pickles may run any code. Where "
            "you trust it, load it with torch.load(..., weights_only=True), and save it by safetensors.torch.save_file."
        )
    return CheckpointError(
        f"{path} cannot be read as safetensors: {error}. The file is damaged or not whole, as after a download that "
        "broke off: compare its size with the original, and fetch it again."
    )


def some_of(names: Iterable[str], limit: int = 5) -> str:
    """The first of `names`, for a message."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
