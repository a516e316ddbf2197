"""The models that a job can put on an accelerator, CLIPSeg and a captioner, in this process or in another one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from blipdiff_train.context.rejection import Rejection
from blipdiff_train.context.segmentation import CLIPSegSegmenter
from blipdiff_train.prepare.settings import Settings

if TYPE_CHECKING:
    from blipdiff_train.prepare.captioning import Captioner


class Models:
    """What the settings ask for, loaded onto ``device`` (of torch). It is a segmenter too, if there is a CLIPSeg.

    ``busy_seconds`` is the time that the last call took on the device.

    Raises:
        ValueError: a model cannot be loaded; the key is named.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        if device == "cpu":
            import torch

            # as in every process of a job: sums are made in one order, and processes do not fight over cores
            torch.set_num_threads(1)
        self._clipseg: CLIPSegSegmenter | None = None
        self._captioner: Captioner | None = None
        self.busy_seconds = 0.0
        segmenter, captioner = settings.segmenter, settings.captioner
        if segmenter.name == "clipseg":
            self._clipseg = _load(
                "segmenter.model",
                segmenter.model,
                lambda: CLIPSegSegmenter(segmenter.model, device=device, batch_size=segmenter.batch_size),
            )
        if captioner.model is not None:
            from blipdiff_train.prepare.captioning import Captioner

            self._captioner = _load(
                "captioner.model",
                captioner.model,
                lambda: Captioner(
                    captioner.model,
                    device=device,
                    dtype=captioner.dtype,
                    batch_size=captioner.batch_size,
                    max_new_tokens=captioner.max_new_tokens,
                ),
            )

    def segment(self, images: Sequence[np.ndarray], subject_texts: Sequence[str]) -> list[np.ndarray | Rejection]:
        """See :class:`blipdiff_train.context.segmentation.Segmenter`."""
        return self._timed(lambda: self._clipseg.segment(images, subject_texts))

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """See :meth:`Captioner.caption`."""
        return self._timed(lambda: self._captioner.caption(images))

    def describe(self) -> dict[str, Any]:
        """Provenance of the segmenter."""
        return self._clipseg.describe()

    def describe_captioner(self) -> dict[str, Any]:
        """Provenance of the captioner."""
        return self._captioner.describe()

    def call(self, method: str, *arguments: Any) -> tuple[Any, float]:
        """A method's result with the time it took on the device: what :class:`RemoteModels` asks for."""
        self.busy_seconds = 0.0
        return getattr(self, method)(*arguments), self.busy_seconds

    def _timed(self, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        self.busy_seconds = time.perf_counter() - started
        return result


class RemoteModels:
    """:class:`Models` in another process. ``call(method, *arguments)`` gives what :meth:`Models.call` gives there."""

    def __init__(self, call: Callable[..., tuple[Any, float]]) -> None:
        self._call = call
        self.busy_seconds = 0.0

    def segment(self, images: Sequence[np.ndarray], subject_texts: Sequence[str]) -> list[np.ndarray | Rejection]:
        return self._ask("segment", images, subject_texts)

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        return self._ask("caption", images)

    def describe(self) -> dict[str, Any]:
        return self._ask("describe")

    def describe_captioner(self) -> dict[str, Any]:
        return self._ask("describe_captioner")

    def _ask(self, method: str, *arguments: Any) -> Any:
        result, self.busy_seconds = self._call(method, *arguments)
        return result


def _load(key: str, model: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{key}={model}: cannot be loaded: {first}") from error
