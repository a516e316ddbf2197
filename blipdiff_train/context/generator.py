"""Prompted context generation: photograph + category → seg_prob → trimap → alpha matte → foreground colours."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blipdiff_train.context.matting import estimate_alpha, estimate_foreground, to_u8
from blipdiff_train.context.rejection import Rejected, Rejection
from blipdiff_train.context.segmentation import Segmenter
from blipdiff_train.context.trimap import make_trimap, unknown_share


@dataclass
class AnnotatedSample:
    """A photograph with its subject cut out. Everything is H W; ``seconds`` is the time each step took."""

    image: np.ndarray  # H W 3 uint8
    subject_text: str
    seg_prob: np.ndarray  # H W float32 [0, 1]
    trimap: np.ndarray  # H W float32 {0, 0.5, 1}
    alpha_matte: np.ndarray  # H W uint8
    foreground: np.ndarray | None  # H W 3 uint8, None if not asked for
    seconds: dict[str, float] = field(default_factory=dict)


class ContextGenerator:
    """The steps of BLIP-Diffusion §3.3 in order, for a batch of photographs.

    Args:
        segmenter: see :mod:`blipdiff_train.context.segmentation`.
        foreground_threshold, background_threshold, margin: see :func:`make_trimap`.
        engine: of the matting, see :func:`estimate_alpha`.
        foreground_colours: also estimate the subject's own colours.
        max_unknown_share: a trimap with more unknown pixels is rejected before time is spent on a guess; None: never.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        *,
        foreground_threshold: float = 0.7,
        background_threshold: float = 0.1,
        margin: float = 0.01,
        engine: str = "fast",
        foreground_colours: bool = True,
        max_unknown_share: float | None = None,
    ) -> None:
        self.segmenter = segmenter
        self.foreground_threshold, self.background_threshold = foreground_threshold, background_threshold
        self.margin, self.engine, self.foreground_colours = margin, engine, foreground_colours
        self.max_unknown_share = max_unknown_share

    def annotate(
        self, images: Sequence[np.ndarray], subject_texts: Sequence[str], names: Sequence[str] | None = None
    ) -> list[AnnotatedSample | Rejection]:
        """One sample or rejection a photograph, in order.

        Args:
            images: each H W 3 uint8; sizes may differ.
            subject_texts: the category of each, e.g. ``"dog"``.
            names: stand in the messages.
        """
        names = list(names) if names is not None else [""] * len(images)
        if not len(images) == len(subject_texts) == len(names):
            raise ValueError(
                f"{len(images)} images, {len(subject_texts)} subject_texts, {len(names)} names: expected equal"
            )
        started = time.perf_counter()
        probabilities = self.segmenter.segment(images, subject_texts)
        seconds = (time.perf_counter() - started) / max(1, len(images))
        return [
            self.cut_out(image, seg_prob, text, name=name, segment_seconds=seconds)
            if not isinstance(seg_prob, Rejection)
            else seg_prob
            for image, seg_prob, text, name in zip(images, probabilities, subject_texts, names, strict=True)
        ]

    def cut_out(
        self,
        image: np.ndarray,
        seg_prob: np.ndarray,
        subject_text: str,
        *,
        name: str = "",
        segment_seconds: float = 0.0,
    ) -> AnnotatedSample | Rejection:
        """From the segmenter's probability to the matte, for one photograph."""
        clock = time.perf_counter
        start = clock()
        try:
            trimap = make_trimap(
                seg_prob,
                foreground_threshold=self.foreground_threshold,
                background_threshold=self.background_threshold,
                margin=self.margin,
                subject_text=subject_text,
                sample=name,
            )
        except Rejected as error:
            return error.rejection
        unknown = unknown_share(trimap)
        if self.max_unknown_share is not None and unknown > self.max_unknown_share:
            limit = f"expected ≤ {self.max_unknown_share:.1%} (filters.unknown_share)"
            return Rejection("too_uncertain", f"{unknown:.1%} of the trimap is unknown, {limit}", unknown)
        after_trimap = clock()
        alpha = estimate_alpha(image, trimap, engine=self.engine)
        alpha_u8 = to_u8(alpha)
        after_matting = clock()
        foreground = estimate_foreground(image, alpha) if self.foreground_colours else None
        return AnnotatedSample(
            image=image,
            subject_text=subject_text,
            seg_prob=seg_prob,
            trimap=trimap,
            alpha_matte=alpha_u8,
            foreground=foreground,
            seconds={
                "segment": segment_seconds,
                "trimap": after_trimap - start,
                "matte": after_matting - after_trimap,
                "foreground": clock() - after_matting,
            },
        )

    def describe(self) -> dict[str, Any]:
        """Provenance: the segmenter, the thresholds and the versions that made a matte."""
        from importlib.metadata import version

        return {
            "segmenter": self.segmenter.describe(),
            "foreground_threshold": self.foreground_threshold,
            "background_threshold": self.background_threshold,
            "margin": self.margin,
            "matting": self.engine,
            "foreground_colours": self.foreground_colours,
            "pymatting": version("pymatting"),
        }
