"""The folder of a checkpoint: each rank its own files, safetensors and JSON, committed as a whole or not at all.

    directory/
      latest                      the tag of the newest complete checkpoint
      global_step120/             appears by one rename, after every rank has written and flushed its files
        manifest.json             format, facts of the run, and each file's size and SHA-256
        rank_00000.safetensors    tensors of data-parallel rank 0 (see run_state.py)
        rank_00000.json           its plain data, counters and client state

A checkpoint loads into the same model, stage and number of ranks, and goes on bit for bit.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zcore.core.errors import CheckpointError
from zcore.zero.run_state import RunState
from zcore.zero.sharding import Sharding

__all__ = ["load", "save"]

FORMAT = 1
T = TypeVar("T")


def save(directory: str | Path, tag: str, run: RunState, extra: Mapping[str, Any]) -> Path:
    """Write a checkpoint of `run` and of `extra` (JSON data); every rank calls it. Returns its folder.

    Raises CheckpointError on every rank if one cannot write; what was there before is untouched.
    """
    final = Path(directory) / tag
    staging = Path(directory) / f".{tag}.partial"
    rank, stem = run.sharding.dp.rank, _stem(run.sharding.dp.rank)

    def begin() -> None:
        if "/" in tag or tag.startswith("."):
            raise CheckpointError(f"The tag {tag!r} is to be a folder's name; use letters, digits, '-' and '_'.")
        _refuse_what_json_changes(extra)
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

    def write() -> None:
        if not staging.is_dir():
            raise CheckpointError(
                f"{staging}, which rank 0 has made, is not there on this rank. Pass the same directory and tag on "
                "every rank, on a file system that all of them share."
            )
        save_file(run.tensors(), staging / f"{stem}.safetensors")
        _write_json(staging / f"{stem}.json", {**run.plain(), "extra": dict(extra)})
        for name in (f"{stem}.safetensors", f"{stem}.json"):
            _flush(staging / name)

    def commit() -> None:
        if rank == 0:
            _commit(staging, final, run.facts())

    try:
        for phase, act in (("begin", begin), ("write", write), ("commit", commit)):
            _all_or_none(act, run.sharding, doing=f"{phase} of checkpoint {final}")
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
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
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder} has format {manifest.get('format')}, and this version of zcore-zero reads {FORMAT}. Load it "
                "with the version that saved it."
            )
        run.check_facts(manifest, str(folder))
        for name in (f"{stem}.safetensors", f"{stem}.json"):
            _check_file(folder / name, manifest["files"].get(name))
        tensors = load_file(folder / f"{stem}.safetensors")
        plain = _read_json(folder / f"{stem}.json")
        run.check_contents(tensors, plain, str(folder))
        return tensors, plain

    tensors, plain = _all_or_none(read, run.sharding, doing=f"loading a checkpoint from {directory}")
    run.restore(tensors, plain)
    extra: dict[str, Any] = plain["extra"]
    return extra


def _commit(staging: Path, final: Path, facts: Mapping[str, Any]) -> None:
    """Make what all ranks have written the newest checkpoint; a crash at any point leaves an earlier one whole."""
    files = {path.name: _fingerprint(path) for path in sorted(staging.iterdir())}
    _write_json(staging / "manifest.json", {"format": FORMAT, **facts, "files": files})
    _flush(staging / "manifest.json")
    _flush(staging)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # of a save that was cut short
        final.rename(replaced)
    staging.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    latest = final.with_name(".latest.partial")
    latest.write_text(final.name + "\n", encoding="utf-8")
    _flush(latest)
    latest.replace(final.with_name("latest"))
    _flush(final.parent)


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
    sharding.groups.all_reduce(failed, label="who cannot go on with the checkpoint")  # paths may differ
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
        raise CheckpointError(
            f"{directory / tag} is no complete checkpoint: it has no manifest.json. Check path and tag."
        )
    return folder


def _check_file(path: Path, saved: object) -> None:
    if not path.exists():
        raise CheckpointError(f"{path} is missing. A checkpoint has files of every rank; restore it from a copy.")
    if saved != _fingerprint(path):
        raise CheckpointError(
            f"{path} is not what was saved: its size or SHA-256 differs from the manifest. The file was changed or "
            "cut; restore it from a copy, or load an earlier tag."
        )


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _refuse_what_json_changes(extra: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(extra)
    except TypeError as error:
        raise CheckpointError(
            f"client_state is to be JSON data, and is not: {error}. Save tensors in a file of their own."
        ) from error
    if json.loads(text) != extra:
        raise CheckpointError(
            "client_state does not come back from JSON as it is. Use text keys, lists in place of tuples, and numbers "
            "that are finite."
        )


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
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
