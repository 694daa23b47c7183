"""Load the weights of a pretrained model from safetensors files, one tensor at a time, into a model of any kind.

    built in zero.Init, not sharded yet    recorded: read when the model is sharded
    sharded, or an engine                  read by data rank 0, sent to all, of which each keeps its fragment
    any other                              read into the parameters

All names, shapes and dtypes are compared before the first value is read. For models of transformers there is
`from_pretrained` inside `zero.Init`, which also knows how names and layouts changed over the years.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zcore.core.errors import CheckpointError, StateError
from zcore.zero.agreement import Plain, check_agreement
from zcore.zero.bucket_param import FRAGMENT
from zcore.zero.deferred import find_recording, recording_of
from zcore.zero.engine import Engine
from zcore.zero.sharded_parameter import ShardedParameter
from zcore.zero.sharding import Sharding, sharding_of
from zcore.zero.weight_files import StoredTensor, find_weights, some_of

__all__ = ["LoadedKeys", "Match", "load_pretrained", "match_weights"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedKeys:
    """What `load_pretrained` found. Names are the model's; unexpected ones are those of the files."""

    loaded_keys: tuple[str, ...]
    missing_keys: tuple[str, ...]  # of the model, in no file: they keep their values
    unexpected_keys: tuple[str, ...]  # of the files, not in the model
    mismatched_keys: tuple[str, ...]  # in both, of another shape or kind of number: they keep their values


@dataclass(frozen=True, slots=True)
class Match:
    """Which stored tensor goes into which tensor of the model, by the first name of that, and what goes nowhere."""

    sources: Mapping[str, StoredTensor]
    keys: LoadedKeys
    reasons: tuple[str, ...]  # why keys are mismatched, a phrase each
    ties: tuple[tuple[StoredTensor, StoredTensor], ...]  # stored under two names of one tensor: they must be equal


def load_pretrained(
    model: nn.Module | Engine,
    path: str | Path,
    *,
    strict: bool = True,
    rename: Callable[[str], str] | None = None,
) -> LoadedKeys:
    """Load `path`, a safetensors file, the index of several, or a folder that holds either, into `model`.

    Values are cast to the dtypes of the model. A tied parameter may be stored under any of its names. `rename` says for
    a name of the files which name of the model it is. For a sharded model every rank calls it, with files at hand;
    optimizer states stay as they are. Without `strict`, names that are missing, unexpected or mismatched are reported
    and left as they are.

    Raises CheckpointError, before anything is changed, for files that cannot be read or do not fit, MismatchError where
    the files differ between ranks, and StateError inside `GatheredParameters`.
    """
    module = model.module if isinstance(model, Engine) else model
    if any(isinstance(param, ShardedParameter) or hasattr(param, FRAGMENT) for param in module.parameters()):
        sharding = sharding_of(module)
        _refuse_gathered(sharding)
        match = _agree(sharding, module, path, strict=strict, rename=rename)
        _load_sharded(sharding, module, match.sources)
    else:
        match = _find(module, path, strict=strict, rename=rename)
        tensors = _tensors_of(module)
        for name, source in match.sources.items():
            _load_into(module, tensors[name], name, source)
    num_bytes = sum(torch.Size(each.shape).numel() * each.dtype.itemsize for each in match.sources.values())
    logger.info("%s: %d tensors, %.2f GiB.", path, len(match.sources), num_bytes / 2**30)
    return match.keys


def match_weights(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    first_names: Mapping[str, str],
    stored: Mapping[str, StoredTensor],
) -> Match:
    """Compare names, shapes and dtypes. Pure: nothing is read.

    shapes: of the model's tensors by each of their names. first_names: by each name, the first one of the same tensor.
    """
    sources: dict[str, StoredTensor] = {}
    mismatched: dict[str, str] = {}
    ties: list[tuple[StoredTensor, StoredTensor]] = []
    for name, (shape, dtype) in shapes.items():
        source = stored.get(name)
        if source is None:
            continue
        if source.shape != shape:
            mismatched[name] = f"{name} is {list(source.shape)} and the model's {list(shape)}"
        elif source.dtype.is_floating_point != dtype.is_floating_point:
            mismatched[name] = f"{name} is {source.dtype} and the model's {dtype}"
        elif (first := first_names[name]) in sources:
            ties.append((sources[first], source))
        else:
            sources[first] = source
    found = {first_names[name] for name in (*sources, *mismatched)}
    return Match(
        sources,
        LoadedKeys(
            loaded_keys=tuple(sources),
            missing_keys=tuple(name for name, first in first_names.items() if name == first and name not in found),
            unexpected_keys=tuple(name for name in stored if name not in shapes),
            mismatched_keys=tuple(mismatched),
        ),
        tuple(mismatched.values()),
        tuple(ties),
    )


def _find(module: nn.Module, path: str | Path, *, strict: bool, rename: Callable[[str], str] | None) -> Match:
    """The match of `module` with the files. Raises CheckpointError for what does not fit."""
    stored = find_weights(path)
    if rename is not None:
        stored = _renamed(stored, rename)
    tensors = _tensors_of(module)
    firsts: dict[int, str] = {}
    for name, tensor in tensors.items():
        firsts.setdefault(id(tensor), name)
    match = match_weights(
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        {name: firsts[id(tensor)] for name, tensor in tensors.items()},
        stored,
    )
    for one, other in match.ties:
        if not torch.equal(one.read(), other.read()):
            raise CheckpointError(
                f"{other.name} and {one.name} are one tied parameter in this {type(module).__name__}, and {path} has "
                "different values for them. Build the model without tying them, or leave one of them out of the file."
            )
    if strict:
        _refuse_misfit(match, path, type(module).__name__)
    return match


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by every name they have, as in `state_dict()`."""
    found: dict[str, Tensor] = {}
    for module_name, each in module.named_modules(remove_duplicate=False):
        prefix = f"{module_name}." if module_name else ""
        found |= {prefix + name: param for name, param in each._parameters.items() if param is not None}
        found |= {
            prefix + name: buffer
            for name, buffer in each._buffers.items()
            if buffer is not None and name not in each._non_persistent_buffers_set
        }
    return found


def _renamed(stored: Mapping[str, StoredTensor], rename: Callable[[str], str]) -> dict[str, StoredTensor]:
    result: dict[str, StoredTensor] = {}
    for name, source in stored.items():
        new = rename(name)
        if new in result:
            raise CheckpointError(
                f"`rename` makes {new!r} of both {result[new].name!r} and {name!r}. Each name of the files needs "
                "a name of its own; leave those that are not wanted as they are, and pass strict=False."
            )
        result[new] = source
    return result


def _refuse_misfit(match: Match, path: str | Path, kind: str) -> None:
    keys = match.keys
    told = [
        f"{len(names)} {what}: {some_of(names)}"
        for what, names in (
            ("missing", keys.missing_keys),
            ("unexpected", keys.unexpected_keys),
            ("mismatched", match.reasons),
        )
        if names
    ]
    if not told:
        return
    raise CheckpointError(
        f"{path} does not fit this {kind}. {'; '.join(told)}.{_prefix_hint(keys)} Nothing was loaded. Build the model "
        "with the sizes it was trained with, say with `rename` what its names are here, or pass strict=False to load "
        "what fits."
    )


def _prefix_hint(keys: LoadedKeys) -> str:
    """A sentence if names differ by a prefix only."""
    if not keys.missing_keys or not keys.unexpected_keys:
        return ""
    ours, theirs = keys.missing_keys[0], set(keys.unexpected_keys)
    for longer in theirs:
        if longer.endswith(f".{ours}"):
            return f" Those in the files start with {longer.removesuffix(ours)!r}."
    for shorter in theirs:
        if ours.endswith(f".{shorter}"):
            return f" Those of the model start with {ours.removesuffix(shorter)!r}."
    return ""


def _load_into(module: nn.Module, tensor: Tensor, name: str, source: StoredTensor) -> None:
    """Into a tensor of this process, or as an operation on one that has no memory yet."""
    recording = find_recording(module, tensor)
    with torch.no_grad():
        if recording is None and not tensor.is_meta:
            tensor.copy_(source.read())
            return
        recording = recording or recording_of(module, tensor, name)
        with recording.resumed():
            tensor.copy_(recording.later(source.read, shape=source.shape, dtype=source.dtype))


def _agree(
    sharding: Sharding, module: nn.Module, path: str | Path, *, strict: bool, rename: Callable[[str], str] | None
) -> Match:
    """`_find` on every rank, or an error on every rank."""
    facts: dict[str, Plain]
    found: Match | CheckpointError
    try:
        found = _find(module, path, strict=strict, rename=rename)
        facts = {name: f"{each.name} {list(each.shape)} {each.dtype}" for name, each in found.sources.items()}
        facts = {"files of weights": "fit", "weight": facts}
    except CheckpointError as error:
        found = error
        facts = {"files of weights": str(error)}
    dp = sharding.dp
    check_agreement(facts, rank=dp.rank, num_ranks=dp.size, groups=sharding.groups, device=sharding.device)
    if isinstance(found, CheckpointError):
        raise found
    return found


def _load_sharded(sharding: Sharding, module: nn.Module, sources: Mapping[str, StoredTensor]) -> None:
    """Rank 0 reads a tensor, all get it, and each keeps what is its own."""
    for bucket in sharding.buckets:
        for index, spec in enumerate(bucket.plan.params):
            if (source := sources.get(spec.fqn)) is not None:
                value = _send(sharding, source, dtype=spec.dtype)
                bucket.write(index, value)
    tensors = _tensors_of(module)
    for name, source in sources.items():
        if name not in sharding.fragments:
            buffer = tensors[name]
            with torch.no_grad():
                buffer.copy_(_send(sharding, source, dtype=buffer.dtype).view(buffer.shape))
    sharding.note_update()


def _send(sharding: Sharding, source: StoredTensor, *, dtype: torch.dtype) -> Tensor:
    """The values of `source` from data rank 0, flat and as `dtype`, on the device of every rank."""
    if sharding.dp.rank == 0:
        flat = torch.empty(source.shape, dtype=dtype, device=sharding.device).copy_(source.read()).view(-1)
    else:
        flat = torch.empty(source.shape, dtype=dtype, device=sharding.device).view(-1)
    if flat.numel():
        sharding.groups.broadcast(flat.view(torch.uint8), src=0, label=f"weights of {source.name}")
    return flat


def _refuse_gathered(sharding: Sharding) -> None:
    if gathered := [bucket.plan.name for bucket in sharding.buckets if bucket.is_pinned]:
        raise StateError(
            f"load_pretrained() was called while parameters of {gathered[0]!r} are gathered by GatheredParameters, "
            "which would not see the new values. Call it outside the block."
        )
