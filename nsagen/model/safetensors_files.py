"""A checkpoint folder's safetensors files: one, or several with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.core.files import TEMPORARY, locked_folder, replace_file, replacing
from nsagen.core.version import __version__

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_NUMBERED = "model-?????-of-?????.safetensors"

_MARK = "nsagen_version"
"""Key in the metadata of each file that nsagen writes: it replaces and removes no others."""


def tensor_names(folder: Path) -> dict[str, Path]:
    """Every tensor of a folder and the file that holds it.

    A single file takes precedence over an index, which an earlier checkpoint may have left;
    Transformers reads them the same way.

    Raises:
        InvalidInputError: no safetensors, a damaged file, or an index that leaves the folder.
    """
    index = folder / INDEX
    if not (folder / ONE).is_file() and index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            found = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidInputError(
                f"{index}: must map each tensor to a file under weight_map; got {error!r}; "
                "save the checkpoint again"
            ) from None
        return _held_by(index, found)
    if not (folder / ONE).is_file():
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        raise InvalidInputError(
            f"{folder}: a checkpoint must have {ONE} or {INDEX}; got neither; "
            + (
                f"{pickled.name} may hold code: convert it with Transformers' save_pretrained"
                if pickled
                else "check the path"
            )
        )
    with _opened(folder / ONE) as file:
        return dict.fromkeys(file.keys(), folder / ONE)


def _held_by(index: Path, found: Mapping[str, str]) -> dict[str, Path]:
    """Every tensor in the files that an index names, and its file.

    As in Transformers, the index says which files there are, and the files what is in them. If two
    hold the same name, the index decides.
    """
    held: dict[str, Path] = {}
    for name in sorted(set(found.values())):
        path, rule = index.parent / name, f"{index}: each file must lie in the folder"
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InvalidInputError(f"{rule}; got {name!r}; save the checkpoint again")
        if not path.is_file():
            raise InvalidInputError(f"{rule}; got {name!r}, which does not exist; fetch it")
        with _opened(path) as file:
            inside = file.keys()
        held |= {tensor: path for tensor in inside if found.get(tensor, name) == name}
        held = dict.fromkeys(inside, path) | held
    for tensor in sorted(found.keys() - held.keys()):
        raise _lacking(index.parent / found[tensor], tensor)
    return held


def _lacking(path: Path, name: str) -> InvalidInputError:
    return InvalidInputError(
        f"{path}: must hold {name}, as the index says; it does not; fetch it again"
    )


def read_tensors(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of one file, one after another, on the CPU.

    Raises:
        InvalidInputError: the file is damaged or lacks one of them.
    """
    with _opened(path) as file:
        for name in names:
            _check_held(path, file, name)
            yield name, file.get_tensor(name)


def stored_dtype(path: Path, name: str) -> str:
    """The dtype of a tensor as the file names it, such as BF16, without reading the tensor.

    Raises:
        InvalidInputError: the file is damaged or lacks the tensor.
    """
    with _opened(path) as file:
        _check_held(path, file, name)
        return str(file.get_slice(name).get_dtype())


def _check_held(path: Path, file: safe_open, name: str) -> None:
    try:
        file.get_slice(name)
    except SafetensorError:
        raise _lacking(path, name) from None


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(
            f"{path}: must be a safetensors file; got one that cannot be read ({error}); "
            "fetch it again"
        ) from None


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], max_shard_bytes: int
) -> None:
    """Write tensors to one file or to numbered ones with an index, and config.json.

    It replaces an earlier checkpoint of nsagen in the folder and refuses any other before it
    writes. If it is interrupted, the folder holds the old tensors, or the new ones, or no index,
    which reading refuses; never a mix. Of several processes, one writes at a time.

    Raises:
        InvalidInputError: max_shard_bytes is not positive, or the folder holds another program's
            checkpoint.
    """
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise InvalidInputError(
            f"save_pretrained: max_shard_bytes must be a positive number of bytes; "
            f"got {max_shard_bytes!r}; leave it out for 5 GB"
        )
    _check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder):
        _check_free(folder)
        for path in folder.glob(TEMPORARY):  # of a save that was killed
            path.unlink()
        _write_tensors(folder, tensors, max_shard_bytes)
        _write_json(folder / CONFIG, {**config, _MARK: __version__})


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    shards = _shards(tensors, max_shard_bytes)
    names = [ONE]
    if len(shards) > 1:
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        (folder / INDEX).unlink(missing_ok=True)
    for name, shard in zip(names, shards, strict=True):
        with replacing(folder / name) as part:
            save_file(_apart(shard), part, {"format": "pt", _MARK: __version__})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        files = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        about = {"total_size": total, _MARK: __version__}
        _write_json(folder / INDEX, {"metadata": about, "weight_map": dict(sorted(files.items()))})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for path in [folder / ONE, *folder.glob(_NUMBERED)]:
        if path.name not in names:
            path.unlink(missing_ok=True)


def _check_free(folder: Path) -> None:
    """Refuse a folder with a checkpoint of another program, or of an nsagen that left no mark."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise InvalidInputError(
            f"save_pretrained: must be given a folder; got the file {folder}; give another path"
        )
    paths = [folder / CONFIG, folder / INDEX, folder / ONE, *sorted(folder.glob(_NUMBERED))]
    foreign = [path.name for path in paths if os.path.lexists(path) and not _is_own(path)]
    if foreign:
        more = f" and {len(foreign) - 4} more" if len(foreign) > 4 else ""
        raise InvalidInputError(
            f"save_pretrained: {folder} must have no checkpoint but one that nsagen wrote; "
            f"got {', '.join(foreign[:4])}{more}, which it did not write; nothing was changed; "
            "give another folder, or remove them"
        )


def _is_own(path: Path) -> bool:
    """Whether nsagen wrote a file of a checkpoint: the file says so itself."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                about = file.metadata()
        else:
            about = json.loads(path.read_text(encoding="utf-8"))
            about = about.get("metadata") if path.name == INDEX else about
        return isinstance(about, dict) and _MARK in about
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError):
        return False


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; a tensor that layers share is written for each of them."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        found[name] = host.clone() if host.data_ptr() in seen else host
        seen.add(host.data_ptr())
    return found


def _write_json(path: Path, content: object) -> None:
    replace_file(path, json.dumps(content, indent=2) + "\n")


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Tensors in order, as many per shard as fit; one larger than the limit has its own shard."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards
