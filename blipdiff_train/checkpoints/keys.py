"""Key tables: which tensor of a file is which tensor of ours, both ways, with nothing left over.

A table is a list of rows. A row names one tensor of the file and the tensor(s) of ours it corresponds to; layers are
templates expanded over their number. Reading checks that every name in the file is in the table (or is listed as
ignored), that every row is there (or belongs to a group listed as absent as a whole) and that every shape fits, and
reports all of it at once with the file's own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

SHOWN = 6  # names listed in an error before "and N more"


@dataclass(frozen=True)
class Row:
    """One tensor of a file.

    Attributes:
        theirs: name in the file.
        ours: name in our state dict; several where the file stores them joined along the first axis (fused q, k, v).
        leading: axes of size 1 the file has in front and we have not.
        trailing: likewise at the end.
        alias: a second name of a tensor that another row already carries (tied weights): written out, and on reading
            compared with that row instead of loaded; it may be absent.
    """

    theirs: str
    ours: tuple[str, ...]
    leading: int = 0
    trailing: int = 0
    alias: bool = False


def row(theirs: str, *ours: str, leading: int = 0, trailing: int = 0, alias: bool = False) -> Row:
    """A ``Row``; without ``ours`` the two names are equal."""
    return Row(theirs, ours or (theirs,), leading, trailing, alias)


def linear(theirs: str, *ours: str) -> list[Row]:
    """Rows for ``weight`` and ``bias`` of a module (a linear layer, a norm, a convolution)."""
    return [row(f"{theirs}.{leaf}", *(f"{name}.{leaf}" for name in ours)) for leaf in ("weight", "bias")]


def prefixed(rows: Iterable[Row], theirs: str = "", ours: str = "") -> list[Row]:
    """The same rows with a prefix on each side."""
    return [Row(theirs + r.theirs, tuple(ours + name for name in r.ours), r.leading, r.trailing, r.alias) for r in rows]


@dataclass(frozen=True)
class Gaps:
    """Differences between a file and its table that are expected, each by name.

    Attributes:
        ignored: names in the file that nothing of ours needs (constant buffers, a head of the original task).
        ignored_prefixes: likewise whole parts.
        absent_parts: prefixes (of the file's names) of parts that may be missing, each only as a whole.
    """

    ignored: frozenset[str] = frozenset()
    ignored_prefixes: tuple[str, ...] = ()
    absent_parts: tuple[str, ...] = ()


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def to_ours(
    tensors: Mapping[str, Tensor],
    rows: Sequence[Row],
    shapes: Mapping[str, Sequence[int]],
    *,
    file: str | Path,
    gaps: Gaps | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> dict[str, Tensor]:
    """Our names with the file's tensors.

    Args:
        tensors: what the file holds.
        rows: the table.
        shapes: shape of each of our tensors the table names.
        dtype: floating-point tensors are cast to this (public files are often half precision); None keeps them.

    Raises:
        ValueError: unknown names, missing names, shapes that do not fit, tied weights that differ: all in one message
            that begins with the file.
    """
    gaps = gaps or Gaps()
    table = {r.theirs: r for r in rows}
    unknown = sorted(
        name
        for name in tensors
        if name not in table and name not in gaps.ignored and not name.startswith(gaps.ignored_prefixes)
    )
    absent = [part for part in gaps.absent_parts if not any(name.startswith(part) for name in tensors)]
    missing = sorted(
        r.theirs for r in rows if r.theirs not in tensors and not r.alias and not r.theirs.startswith(tuple(absent))
    )
    ours: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, r in table.items():
        if name not in tensors or r.alias:
            continue
        found = tuple(tensors[name].shape)
        expected = _shape_in_file(r, shapes)
        if found != expected:
            problems.append(f"{name} has shape {found}, expected {expected}")
            continue
        tensor = tensors[name]
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensor = tensor.reshape(tensor.shape[r.leading : tensor.ndim - r.trailing])
        pieces = tensor.split([shapes[name][0] for name in r.ours]) if len(r.ours) > 1 else [tensor]
        ours.update({name: piece.contiguous() for name, piece in zip(r.ours, pieces, strict=True)})
    for name, r in table.items():
        if r.alias and name in tensors and r.ours[0] in ours:
            original = tensors[name].to(ours[r.ours[0]].dtype)
            if original.shape != ours[r.ours[0]].shape or not torch.equal(original, ours[r.ours[0]]):
                problems.append(f"{name} differs from the tensor it is tied to")
    if unknown:
        problems.insert(0, f"unknown keys: {_list(unknown)}")
    if missing:
        problems.insert(0, f"missing keys: {_list(missing)}")
    if problems:
        raise ValueError(
            f"{file}: does not fit the model. {'; '.join(problems[:SHOWN])}"
            + (f"; and {len(problems) - SHOWN} more problems" if len(problems) > SHOWN else "")
        )
    return ours


def _shape_in_file(r: Row, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    first = tuple(shapes[r.ours[0]])
    if len(r.ours) > 1:
        first = (sum(shapes[name][0] for name in r.ours), *first[1:])
    return (1,) * r.leading + first + (1,) * r.trailing


def to_theirs(tensors: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """The file's names with our tensors, each one contiguous and with memory of its own.

    Raises:
        ValueError: a tensor of ``tensors`` is in no row, or a row's tensor is not in ``tensors``.
    """
    wanted = {name for r in rows for name in r.ours}
    if wanted != set(tensors):
        left, lacking = sorted(set(tensors) - wanted), sorted(wanted - set(tensors))
        raise ValueError(
            "the model does not fit the key table."
            + (f" Not in the table: {_list(left)}." if left else "")
            + (f" Not in the model: {_list(lacking)}." if lacking else "")
        )
    theirs = {}
    for r in rows:
        pieces = [tensors[name].detach().cpu() for name in r.ours]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        shape = (1,) * r.leading + tuple(tensor.shape) + (1,) * r.trailing
        theirs[r.theirs] = tensor.reshape(shape).contiguous().clone()
    return theirs


def state_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a module's state dict (the module may be on the meta device)."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def part_tensors(modules: Mapping[str, nn.Module | None]) -> dict[str, Tensor]:
    """State of several modules, each name prefixed with its part's: our side of the tables."""
    return {
        f"{part}.{name}": tensor
        for part, module in modules.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }


def part_shapes(modules: Mapping[str, nn.Module | None]) -> dict[str, tuple[int, ...]]:
    """Shapes of :func:`part_tensors`."""
    return {name: tuple(tensor.shape) for name, tensor in part_tensors(modules).items()}


@torch.no_grad()
def fill_parts(modules: Mapping[str, nn.Module], ours: Mapping[str, Tensor]) -> None:
    """Copy tensors named as in :func:`part_tensors` into their modules; a tensor that is not named stays as it is."""
    state = part_tensors(modules)
    for name, tensor in ours.items():
        state[name].copy_(tensor)


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put ``tensors`` into ``module`` under its own names, all of them, also where it is on the meta device.

    A module with real memory keeps its parameter objects (and so its ties), a module on the meta device takes the
    tensors as they are, which spares a large model the time and the memory of an initialisation.
    """
    on_meta = any(parameter.is_meta for parameter in module.parameters())
    module.load_state_dict(dict(tensors), strict=True, assign=on_meta)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # not in state dicts: only the constant position indices of transformers are like that
            if not name.endswith("position_ids"):
                raise ValueError(f"{type(module).__name__}: buffer {name} has no value in any file")
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
