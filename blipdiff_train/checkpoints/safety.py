"""Weights and configurations that came from elsewhere: found by name, read as data, never executed.

Three rules hold for every file a loader opens. Tensors come from safetensors, or from a pickle under
``weights_only=True``. A JSON is data: a file that asks for code (``auto_map``, ``_target_``, ``trust_remote_code``) is
refused instead of ignored, because whoever wrote it expected that code to run. A class name in a file is compared with
a list of names, it never chooses what is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODE_KEYS = frozenset({"auto_map", "_target_", "trust_remote_code", "custom_pipelines", "custom_pipeline"})
MAX_JSON_BYTES = 64 * 1024 * 1024  # the largest real one, a 49,408-entry tokenizer.json, has 2.2 MB
HUB_ID = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w.-]+))?$")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
INDEX_SUFFIX = ".index.json"  # of the list of files that one part's weights are spread over


def read_json(path: str | Path, *, allowed_class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """The object in a JSON file, after checking that it asks for no code.

    Args:
        allowed_class_names: where given, ``_class_name`` (diffusers), or else the last of ``architectures``
            (transformers), must be one of these if the file has it.

    Raises:
        ValueError: not a JSON object, too large, a key that would run code, or another class; the file is named.
    """
    path = Path(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path}: {path.stat().st_size:,} bytes is too large for a configuration (at most {MAX_JSON_BYTES:,})"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: is not valid JSON ({error}); the file is damaged or was not downloaded whole"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    found = sorted(_code_keys(value))
    if found:
        raise ValueError(
            f"{path}: {', '.join(found)} asks for code to be run; weights from elsewhere are read as data only. "
            "Remove the key if the model is one of the standard classes"
        )
    if allowed_class_names is not None:
        names = [value["_class_name"]] if "_class_name" in value else list(value.get("architectures") or [])
        for name in names:
            if name not in allowed_class_names:
                raise ValueError(f"{path}: class {name!r} is not one of {', '.join(allowed_class_names)}")
    return value


def _code_keys(value: Any) -> set[str]:
    """Names of the keys, at any depth, that ask for code."""
    if isinstance(value, dict):
        # a vocabulary may contain any word: its values are numbers, a request for code is not
        here = {key for key, item in value.items() if key in CODE_KEYS and item and not _is_index(item)}
        return here.union(*(_code_keys(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(_code_keys(item) for item in value))
    return set()


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Names and tensors, on the CPU and in the stored dtype, of a ``.safetensors`` file or a pickle of tensors only.

    Args:
        path: the file, or the ``.index.json`` that says over which files beside it the tensors are spread.

    Raises:
        ValueError: truncated or damaged, of an unknown kind, or a pickle with anything but tensors; or files that do
            not hold what their index says. The file is named.
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: is not a whole safetensors file ({error}); fetch or write it again") from error
    value = read_pickle(path)
    return tensor_mapping(value, path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    expected = read_weight_map(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(expected.values())):
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index}: names {shard}, which is not beside it; fetch the missing file")
        found = read_tensors(index.parent / shard)
        listed = {name for name, file in expected.items() if file == shard}
        if found.keys() != listed:
            odd = sorted(found.keys() ^ listed)
            raise ValueError(
                f"{index.parent / shard}: {odd[0]} is in one of it and {index.name} only; fetch both again"
            )
        tensors |= found
    return tensors


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name of an ``.index.json``.

    Raises:
        ValueError: not such a list, or a name that is not that of a weights file beside it.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map, which says where each tensor stands")
    for name, shard in weight_map.items():
        is_plain = isinstance(shard, str) and shard == Path(shard).name and shard not in ("", ".", "..")
        if not is_plain or not shard.endswith((".safetensors", *PICKLE_SUFFIXES)):
            raise ValueError(
                f"{index}: {name} is said to be in {shard!r}, expected the name of a weights file beside it"
            )
    return weight_map


def read_pickle(path: str | Path) -> Any:
    """What a ``torch.save`` file holds, under ``weights_only=True``: tensors and plain containers.

    Raises:
        ValueError: damaged, of another kind, or with objects that would need their code to be run; the file is named.
    """
    path = Path(path)
    if path.suffix not in PICKLE_SUFFIXES:
        raise ValueError(f"{path}: unknown kind of weights; expected .safetensors or {', '.join(PICKLE_SUFFIXES)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises a dozen kinds here, from EOFError to RuntimeError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as plain tensors ({reason}). It is damaged, or holds objects whose loading would "
            "run code; where you trust its source, re-save only its tensors (torch.save of a dict of tensors)"
        ) from error


def tensor_mapping(value: Any, path: str | Path) -> dict[str, Tensor]:
    """``value`` if it is a mapping of names to tensors.

    Raises:
        ValueError: naming the file and the first thing that is not a tensor.
    """
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected names with tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(tensor).__name__}, expected a tensor")
    return dict(value)


def find_file(source: str | Path, names: Sequence[str], *, subfolder: str = "", required: bool = True) -> Path | None:
    """The first of ``names`` that exists in a local folder or in a repository of the Hugging Face hub.

    Args:
        source: a folder, or a hub id such as ``openai/clip-vit-large-patch14``, optionally ``id@revision``.
        names: file names in order of preference.

    Raises:
        ValueError: ``source`` is neither a folder nor a hub id, or has none of the files and ``required`` is set.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        place = folder / subfolder
        for name in names:
            if (place / name).is_file():
                return place / name
        if not required:
            return None
        there = ", ".join(sorted(child.name for child in place.iterdir())[:12]) if place.is_dir() else "no such folder"
        raise ValueError(f"{place}: has none of {', '.join(names)} (found: {there or 'nothing'})")
    match = HUB_ID.match(str(source))
    if match is None or folder.is_absolute():
        raise ValueError(f"{source}: no such folder, and not a hub id such as openai/clip-vit-large-patch14")
    return _find_on_hub(match["name"], match["revision"], names, subfolder, required)


def _find_on_hub(
    repository: str, revision: str | None, names: Sequence[str], subfolder: str, required: bool
) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason = ""
    for name in names:
        try:
            found = Path(hf_hub_download(repository, name, subfolder=subfolder or None, revision=revision))
            if name.endswith(INDEX_SUFFIX):  # the files it names land beside it
                for shard in sorted(set(read_weight_map(found).values())):
                    hf_hub_download(repository, shard, subfolder=subfolder or None, revision=revision)
            return found
        except LocalEntryNotFoundError as error:  # offline, and not in the cache
            reason = str(error).splitlines()[0]
        except EntryNotFoundError:
            continue
        except Exception as error:  # network, permissions, no such repository
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            break
    if not required:
        return None
    where = f"{repository}/{subfolder}".rstrip("/")
    raise ValueError(
        f"{where}: {', '.join(names)} is neither a local folder's nor could it be had from the hub"
        + (f" ({reason})" if reason else "")
        + "; give the path of a downloaded copy"
    )


def weight_names(stem: str) -> list[str]:
    """Names under which a library stores one part's weights: full precision first, safetensors before pickles."""
    pickle_stem = "pytorch_model" if stem == "model" else stem
    return [
        f"{stem}.safetensors",
        f"{stem}.safetensors{INDEX_SUFFIX}",
        f"{pickle_stem}.bin",
        f"{pickle_stem}.bin{INDEX_SUFFIX}",
        f"{stem}.fp16.safetensors",
        f"{pickle_stem}.fp16.bin",
    ]
