"""Exponential moving average of named parameters, for evaluation and for the final model.

Its state is a dict of tensors. It assumes that each process holds whole parameters (one process or DDP).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ParameterAverage:
    """Keeps ``average ← decay · average + (1 − decay) · parameter`` in fp32 for every trainable parameter.

    Args:
        named_parameters: (name, parameter); those without ``requires_grad`` are left out.
        decay: in (0, 1); early on it is lowered to (1 + n) / (10 + n) at update n, so that the initial values fade.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay={decay}, expected a number between 0 and 1, e.g. 0.999; null for no average")
        self.decay = decay
        self.num_updates = 0
        self._parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.average = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current values; call once after each optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, parameter in self._parameters.items():
            average = self.average[name] = self.average[name].to(parameter.device)
            average.lerp_(parameter.detach().float(), 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block the parameters hold their averages; afterwards their own values again, exactly."""
        self.swap_in()
        try:
            yield
        finally:
            self.swap_out()

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the averages in place; :meth:`swap_out` undoes it. For hooks, which cannot span a ``with`` block."""
        if hasattr(self, "_kept"):
            raise RuntimeError("the averages are in place already")
        self._kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.copy_(self.average[name])

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put back what :meth:`swap_in` kept; nothing if the averages are not in place."""
        for name, value in getattr(self, "_kept", {}).items():
            self._parameters[name].copy_(value)
        self.__dict__.pop("_kept", None)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, and ``num_updates``."""
        return {**self.average, "num_updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: the names or shapes are not those of this run's trainable parameters.
        """
        found = {name: tensor for name, tensor in state.items() if name != "num_updates"}
        wrong = sorted(set(found) ^ set(self.average))
        wrong += [name for name in found if name in self.average and found[name].shape != self.average[name].shape]
        if wrong or "num_updates" not in state:
            raise ValueError(
                f"the saved average is not of this run's trainable parameters; {len(wrong)} names differ: "
                f"{', '.join(wrong[:5])}; resume with the same `trainable` list, or start anew with resume=never"
            )
        self.num_updates = int(state["num_updates"])
        for name, tensor in found.items():
            self.average[name] = tensor.detach().to(self.average[name].device, torch.float32).clone()
