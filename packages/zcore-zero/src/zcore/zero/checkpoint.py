"""Save and load a run: each rank its own fragments, safetensors and JSON only, committed as a whole or not at all.

    directory/
      latest                      the tag of the newest complete checkpoint
      global_step120/             appears by one rename, after every rank has written and flushed its files
        manifest.json             format, world, stage, plan, and each file's size and SHA-256
        rank_00000.safetensors    master/<parameter>, optimizer/<parameter>/<state>, buffer/<name>, random/<generator>
        rank_00000.json           groups, schedule, counters, client state: what is not a tensor

A checkpoint loads into the same model, stage and number of ranks, and goes on bit for bit.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zcore.core.device import restore_random_state, take_random_state
from zcore.core.errors import CheckpointError
from zcore.zero.sharding import Sharding

__all__ = ["RunState", "load", "save"]

FORMAT = 1
T = TypeVar("T")


@dataclass(slots=True)
class RunState:
    """What a checkpoint holds, apart from the counters and client state that pass through as JSON."""

    model: nn.Module
    sharding: Sharding
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None


def save(directory: str | Path, tag: str, run: RunState, extra: Mapping[str, Any]) -> Path:
    """Write a checkpoint of `run` and of `extra` (JSON data); every rank calls it. Returns its folder.

    Raises CheckpointError on every rank if one cannot write; what was there before is untouched.
    """
    final = Path(directory) / tag
    staging = Path(directory) / f".{tag}.partial"
    rank, stem = run.sharding.dp.rank, _stem(run.sharding.dp.rank)
    if "/" in tag or tag.startswith("."):
        raise CheckpointError(f"The tag {tag!r} is to be a folder's name; use letters, digits, '-' and '_'.")

    def begin() -> None:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

    def write() -> None:
        save_file(_tensors(run), staging / f"{stem}.safetensors")
        _write_json(staging / f"{stem}.json", {**_plain(run), "extra": dict(extra)})
        for name in (f"{stem}.safetensors", f"{stem}.json"):
            _flush(staging / name)

    def commit() -> None:
        if rank != 0:
            return
        files = {path.name: _fingerprint(path) for path in sorted(staging.iterdir())}
        _write_json(staging / "manifest.json", {**_facts(run.sharding), "files": files})
        _flush(staging / "manifest.json")
        replaced = final.with_name(f".{tag}.replaced")
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # of a save that was cut short
            final.rename(replaced)
        staging.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        latest = Path(directory) / ".latest.partial"
        latest.write_text(tag + "\n", encoding="utf-8")
        _flush(latest)
        latest.replace(Path(directory) / "latest")

    for phase, act in (("begin", begin), ("write", write), ("commit", commit)):
        _all_or_none(act, run.sharding, doing=f"{phase} of checkpoint {final}")
    return final


def load(directory: str | Path, tag: str | None, run: RunState) -> dict[str, Any]:
    """Put a checkpoint into `run` and return the `extra` it was saved with; every rank calls it.

    Without a tag the newest complete one. Raises CheckpointError on every rank, before anything is changed, if it is
    missing, damaged, or of another model, stage or number of ranks.
    """
    stem = _stem(run.sharding.dp.rank)

    def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
        folder = _find(Path(directory), tag)
        manifest = _read_json(folder / "manifest.json")
        if not isinstance(manifest.get("files"), dict):
            raise CheckpointError(f"{folder / 'manifest.json'} is damaged: it names no files. Load an earlier tag.")
        _compare(manifest, _facts(run.sharding), folder)
        for name in (f"{stem}.safetensors", f"{stem}.json"):
            if manifest["files"].get(name) != _fingerprint(folder / name):
                raise CheckpointError(
                    f"{folder / name} is not what was saved: its size or SHA-256 differs from the manifest. The file "
                    "was changed or cut; restore it from a copy, or load an earlier tag."
                )
        tensors = load_file(folder / f"{stem}.safetensors")
        plain = _read_json(folder / f"{stem}.json")
        _check_names(tensors, run, folder)
        _check_kinds(plain, run, folder)
        return tensors, plain

    tensors, plain = _all_or_none(read, run.sharding, doing=f"loading a checkpoint from {directory}")
    _restore_tensors(tensors, run)
    _restore_plain(plain, run)
    extra: dict[str, Any] = plain["extra"]
    return extra


def _tensors(run: RunState) -> dict[str, Tensor]:
    """This rank's tensors; cloned, since safetensors refuses tensors that share memory."""
    tensors: dict[str, Tensor] = {}
    masters = run.sharding.masters
    for name, fragment in run.sharding.fragments.items():
        tensors[f"master/{name}"] = masters[name].clone()
        for key, value in _state_of(run.optimizer, fragment).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value.detach().clone().contiguous()
    for name, buffer in _buffers(run.model):
        tensors[f"buffer/{name}"] = buffer.detach().clone().contiguous()
    for name, state in take_random_state(run.sharding.device).items():
        tensors[f"random/{name}"] = state
    return tensors


def _plain(run: RunState) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    return {
        "groups": [] if run.optimizer is None else [_hyper(group) for group in run.optimizer.param_groups],
        "optimizer": {
            name: {k: v for k, v in _state_of(run.optimizer, fragment).items() if not isinstance(v, Tensor)}
            for name, fragment in run.sharding.fragments.items()
        },
        "kinds": _kinds(run),
        "lr_scheduler": None if run.lr_scheduler is None else run.lr_scheduler.state_dict(),
        "python_random": [version, list(internal), gauss],
    }


def _restore_tensors(tensors: Mapping[str, Tensor], run: RunState) -> None:
    device = run.sharding.device
    with torch.no_grad():
        for name, master in run.sharding.masters.items():
            master.copy_(tensors[f"master/{name}"])
        for name, buffer in _buffers(run.model):
            buffer.copy_(tensors[f"buffer/{name}"])
    run.sharding.note_update()
    prefix = "random/"
    restore_random_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, device)
    if run.optimizer is None:
        return
    run.optimizer.state.clear()
    fragments = run.sharding.fragments
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, state = rest.rpartition("/")
            on_device = value if value.dim() == 0 else value.to(device)
            run.optimizer.state[fragments[name]][state] = on_device


def _restore_plain(plain: Mapping[str, Any], run: RunState) -> None:
    version, internal, gauss = plain["python_random"]
    random.setstate((version, tuple(internal), gauss))
    if run.optimizer is not None:
        for group, saved in zip(run.optimizer.param_groups, plain["groups"], strict=True):
            for key, value in saved.items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for name, state in plain["optimizer"].items():
            if state:
                run.optimizer.state[run.sharding.fragments[name]].update(state)
    if run.lr_scheduler is not None and plain["lr_scheduler"] is not None:
        now = run.lr_scheduler.state_dict()
        run.lr_scheduler.load_state_dict({k: _like(now.get(k), v) for k, v in plain["lr_scheduler"].items()})


def _like(now: Any, saved: Any) -> Any:
    """What JSON made of a value, in the type that the run has: tuples, and counters with numbers as keys."""
    if isinstance(now, tuple):
        return tuple(saved)
    if isinstance(now, dict) and isinstance(saved, dict) and all(isinstance(key, int) for key in now):
        return type(now)({int(key): value for key, value in saved.items()})
    return saved


def _kinds(run: RunState) -> dict[str, Any]:
    return {
        "optimizer": type(run.optimizer).__name__,
        "number of parameter groups": 0 if run.optimizer is None else len(run.optimizer.param_groups),
        "learning-rate schedule": type(run.lr_scheduler).__name__,
    }


def _check_kinds(plain: Mapping[str, Any], run: RunState, folder: Path) -> None:
    for kind, here in _kinds(run).items():
        if plain["kinds"][kind] != here:
            raise CheckpointError(
                f"{folder} was saved with {kind} {plain['kinds'][kind]!r}, and this run has {here!r}. Start the run as "
                "it was."
            )


def _state_of(optimizer: torch.optim.Optimizer | None, fragment: Tensor) -> Mapping[str, Any]:
    return {} if optimizer is None else optimizer.state.get(fragment, {})


def _hyper(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.item() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"
    }


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield (f"{name}.{key}" if name else key), buffer


def _facts(sharding: Sharding) -> dict[str, Any]:
    """What a run must share with a checkpoint."""
    plan = [
        [
            bucket.plan.name,
            bucket.plan.layout.slice_numel,
            [[spec.fqn, list(spec.shape)] for spec in bucket.plan.params],
        ]
        for bucket in sharding.buckets
    ]
    return {
        "format": FORMAT,
        "data-parallel ranks": sharding.dp.size,
        "ranks that share one copy": sharding.dp.shard_size,
        "ZeRO stage": sharding.zero_stage,
        "parameters and their layout": hashlib.sha256(json.dumps(plan).encode()).hexdigest(),
    }


def _compare(manifest: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> None:
    for fact, here in facts.items():
        if manifest.get(fact) != here:
            raise CheckpointError(
                f"{folder} was saved with {fact} {manifest.get(fact)!r}, and this run has {here!r}. A checkpoint loads "
                "into the same model, stage, bucket settings and number of ranks; start the run as it was."
            )


def _check_names(tensors: Mapping[str, Tensor], run: RunState, folder: Path) -> None:
    expected = {f"master/{name}" for name in run.sharding.fragments} | {
        f"buffer/{name}" for name, _ in _buffers(run.model)
    }
    if missing := sorted(expected - set(tensors)):
        raise CheckpointError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more tensors that this model has.")
    for name, buffer in _buffers(run.model):
        if tensors[f"buffer/{name}"].shape != buffer.shape:
            raise CheckpointError(f"{folder} holds buffer {name} in another shape than this model has.")
    for name, master in run.sharding.masters.items():
        saved = tensors[f"master/{name}"]
        if saved.shape != master.shape or saved.dtype != master.dtype:
            raise CheckpointError(
                f"{folder} holds {name} as {list(saved.shape)} {saved.dtype} on this rank; the model has "
                f"{list(master.shape)} {master.dtype}. Load it into the model and precision it was saved from."
            )


def _all_or_none(act: Callable[[], T], sharding: Sharding, *, doing: str) -> T:
    """Run `act` and wait for the other ranks; if one rank fails, all raise. Nobody goes on alone and hangs the rest."""
    failure: CheckpointError | None = None
    result: T | None = None
    try:
        result = act()
    except CheckpointError as error:
        failure = error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        failure = CheckpointError(f"{doing} failed: {error}. Nothing was changed; mend the cause and call again.")
        failure.__cause__ = error
    dp = sharding.dp
    failed = torch.zeros(dp.size, dtype=torch.int32, device=sharding.device)
    failed[sharding.dp.rank] = failure is not None
    sharding.groups.all_reduce(failed, label=doing)
    if failure is not None:
        raise failure
    if ranks := failed.nonzero().view(-1).tolist():
        raise CheckpointError(f"{doing} failed on data ranks {ranks}, so no rank goes on; their own messages say why.")
    return result  # type: ignore[return-value]  # None only where T is None


def _stem(rank: int) -> str:
    return f"rank_{rank:05d}"


def _find(directory: Path, tag: str | None) -> Path:
    if tag is None:
        latest = directory / "latest"
        if not latest.exists():
            raise CheckpointError(f"{directory} has no complete checkpoint (no file `latest`). Check the path.")
        tag = latest.read_text(encoding="utf-8").strip()
    folder = directory / tag
    if not folder.exists():
        folder = directory / f".{tag}.replaced"  # a crash came between the two renames of a save that replaces it
    if not (folder / "manifest.json").exists():
        raise CheckpointError(f"{folder} is no complete checkpoint: it has no manifest.json. Check path and tag.")
    return folder


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Restore it from a copy, or load an earlier tag.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object. Restore it, or load an earlier tag.")
    return value


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
