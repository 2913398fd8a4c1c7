"""A checkpoint folder's safetensors files: one, or several with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsagen.core.errors import InvalidInputError

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInputError(
                f"{index}: must map each tensor to a file under weight_map; got {error!r}; "
                "save the checkpoint again"
            ) from None
        for file in sorted(set(found.values())):
            inside = Path(file).name == file
            if not inside or not (folder / file).is_file():
                raise InvalidInputError(
                    f"{index}: each file must lie in the folder; got {file!r}, which "
                    f"{'does not exist' if inside else 'is a path'}; fetch what is missing"
                )
        return {name: folder / file for name, file in found.items()}
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
        raise InvalidInputError(
            f"{path}: must hold {name}, as the index says; it does not; fetch it again"
        ) from None


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(
            f"{path}: must be a safetensors file; got one that cannot be read ({error}); "
            "fetch it again"
        ) from None


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write tensors to one file or to numbered ones with an index; replaces what was there.

    If it is interrupted, the folder holds the old tensors, or the new ones, or no index, which
    reading refuses; never a mix.

    Raises:
        InvalidInputError: max_shard_bytes is not positive.
    """
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise InvalidInputError(
            f"save_pretrained: max_shard_bytes must be a positive number of bytes; "
            f"got {max_shard_bytes!r}; leave it out for 5 GB"
        )
    shards = _shards(tensors, max_shard_bytes)
    names = [ONE]
    if len(shards) > 1:
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    if len(shards) > 1:
        (folder / INDEX).unlink(missing_ok=True)
    for name, shard in zip(names, shards, strict=True):
        part = folder / f"{name}.tmp"
        save_file(_apart(shard), part, {"format": "pt"})
        os.replace(part, folder / name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        files = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        replace_json(folder / INDEX, content)
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for path in [folder / ONE, *folder.glob("model-?????-of-?????.safetensors")]:
        if path.name not in names:
            path.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; a tensor that layers share is written for each of them."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        found[name] = host.clone() if host.data_ptr() in seen else host
        seen.add(host.data_ptr())
    return found


def replace_json(path: Path, content: object) -> None:
    """Write a file in one step."""
    part = path.with_name(f"{path.name}.tmp")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


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
