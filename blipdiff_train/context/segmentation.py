"""Where the subject is: a probability for every pixel, from CLIPSeg, GrabCut, or a mask that is already there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from PIL import Image

from blipdiff_train.context.rejection import Rejection


class Segmenter(Protocol):
    """Photographs and category words to probabilities."""

    def segment(self, images: Sequence[np.ndarray], subject_texts: Sequence[str]) -> list[np.ndarray | Rejection]:
        """``seg_prob`` (H W float32 in [0, 1]) for each image (H W 3 uint8, sizes may differ), or why there is none."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the provenance of a sample says about the segmenter: name, settings, versions."""
        ...


class CLIPSegSegmenter:
    """CLIPSeg (Lüddecke & Ecker 2022): the category word asks, the probability answers.

    Args:
        model: local folder, or a hub id such as ``CIDAS/clipseg-rd64-refined``; a ``CLIPSegForImageSegmentation`` with
            its tokenizer and image processor.
        device: of torch.
        batch_size: photographs a forward; a last bit of an answer may depend on it.
        prompt: what is asked; ``{}`` is the category.

    Raises:
        OSError: the folder or id has no such model.
    """

    def __init__(self, model: str | Path, *, device: str = "cpu", batch_size: int = 8, prompt: str = "{}") -> None:
        from transformers import AutoTokenizer, CLIPSegForImageSegmentation
        from transformers.image_processing_base import ImageProcessingMixin

        self.model_name, self.device, self.batch_size, self.prompt = str(model), device, batch_size, prompt
        self.model = CLIPSegForImageSegmentation.from_pretrained(model).float().to(device).eval()
        self.model.requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        # the processor classes of transformers 5 need torchvision; its three numbers do not
        settings, _ = ImageProcessingMixin.get_image_processor_dict(model)
        self.size_px = _square_size(settings["size"])
        self.mean = np.asarray(settings["image_mean"], np.float32)
        self.std = np.asarray(settings["image_std"], np.float32)
        self._text_embeds: dict[str, Any] = {}

    def segment(self, images: Sequence[np.ndarray], subject_texts: Sequence[str]) -> list[np.ndarray | Rejection]:
        squares = [to_square(image, self.size_px) for image in images]
        answers = self.probabilities(squares, subject_texts)
        return [to_photograph(answer, image) for answer, image in zip(answers, images, strict=True)]

    def probabilities(self, squares: Sequence[np.ndarray], subject_texts: Sequence[str]) -> list[np.ndarray]:
        """The model's answers (s s float32 in [0, 1]) to squares from :func:`to_square`, ``batch_size`` at a time.

        Every forward has exactly ``batch_size`` rows: matrix products of other heights add up in another order, and a
        photograph's matte must not depend on which photographs were asked about with it, or when.
        """
        import torch

        answers: list[np.ndarray] = []
        for start in range(0, len(squares), self.batch_size):
            part = slice(start, start + self.batch_size)
            num_rows = len(squares[part])
            pixels = np.zeros((self.batch_size, self.size_px, self.size_px, 3), np.float32)
            pixels[:num_rows] = (np.stack(squares[part]).astype(np.float32) / 255 - self.mean) / self.std
            embeds = [self._embed(text) for text in subject_texts[part]]
            with torch.inference_mode():
                logits = self.model(
                    pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(self.device),
                    conditional_embeddings=torch.cat(embeds + embeds[:1] * (self.batch_size - num_rows)),
                ).logits
            # some versions drop the batch axis of a single image
            rows = logits.reshape(self.batch_size, *logits.shape[-2:]).sigmoid().float().cpu().numpy()
            answers += list(rows[:num_rows])
        return answers

    def _embed(self, subject_text: str) -> Any:
        """Text embedding 1 E, one forward a category."""
        import torch

        if subject_text not in self._text_embeds:
            prompt = self.prompt.format(subject_text)
            tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                self._text_embeds[subject_text] = self.model.get_conditional_embeddings(
                    batch_size=1, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                )
        return self._text_embeds[subject_text]

    def describe(self) -> dict[str, Any]:
        import transformers

        return {
            "name": "clipseg",
            "model": Path(self.model_name).name if Path(self.model_name).is_dir() else self.model_name,
            "weights": _short_hash(self.model.state_dict()),
            "size_px": self.size_px,
            "prompt": self.prompt,
            "transformers": transformers.__version__,
        }


class GrabCutSegmenter:
    """GrabCut (Rother et al. 2004, OpenCV) from a centre prior; needs no weights and does not read the category.

    The frame's border is background, the prior is contrast to the border's colours weighted towards the centre; the cut
    is made at ``size_px``, loose parts are dropped, and the outline is softened into a probability.

    Args:
        size_px: longest side at which the cut is computed.
        iterations: of GrabCut.
        softness: standard deviation of the outline's blur, share of the longest side.
    """

    def __init__(self, *, size_px: int = 256, iterations: int = 5, softness: float = 0.01) -> None:
        self.size_px, self.iterations, self.softness = size_px, iterations, softness

    def segment(self, images: Sequence[np.ndarray], subject_texts: Sequence[str]) -> list[np.ndarray | Rejection]:
        return [self._segment(image) for image in images]

    def _segment(self, image: np.ndarray) -> np.ndarray | Rejection:
        rows, columns = image.shape[:2]
        small = shrink(image, self.size_px)
        mask = initial_mask(small)
        try:
            cut = grab_cut(small, mask, self.iterations)
        except cv2.error as error:
            return Rejection("segmenter_failed", f"GrabCut: {str(error).strip().splitlines()[-1]}; drop the sample")
        if not cut.any():
            return Rejection("no_foreground", "GrabCut found nothing; use segmenter.name=clipseg or drop the sample")
        soft = cv2.resize(cut.astype(np.float32), (columns, rows), interpolation=cv2.INTER_LINEAR)
        sigma = self.softness * max(rows, columns)
        return np.clip(cv2.GaussianBlur(soft, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE), 0, 1)

    def describe(self) -> dict[str, Any]:
        return {
            "name": "grabcut",
            "size_px": self.size_px,
            "iterations": self.iterations,
            "softness": self.softness,
            "opencv": cv2.__version__,
        }


class AlphaSegmenter:
    """The mask that came with the photograph; its values are the probability.

    The masks are handed over with :meth:`set_masks` before each call, in the order of the images: where they come from
    (an alpha channel, a file beside the photograph) is the reader's business.
    """

    def __init__(self) -> None:
        self._masks: list[np.ndarray | None] = []

    def set_masks(self, masks: Sequence[np.ndarray | None]) -> None:
        """H W uint8 for each of the next images, or None where there is none."""
        self._masks = list(masks)

    def segment(self, images: Sequence[np.ndarray], subject_texts: Sequence[str]) -> list[np.ndarray | Rejection]:
        if len(self._masks) != len(images):
            raise ValueError(f"{len(self._masks)} masks for {len(images)} images: call set_masks first")
        results: list[np.ndarray | Rejection] = []
        for image, mask in zip(images, self._masks, strict=True):
            if mask is None:
                results.append(Rejection("no_mask", "no alpha channel and no mask file beside the photograph"))
            elif mask.shape != image.shape[:2]:
                detail = f"mask is {mask.shape}, the photograph {image.shape[:2]} (rows, columns)"
                results.append(Rejection("bad_mask", detail))
            else:
                results.append(mask.astype(np.float32) / np.float32(255))
        return results

    def describe(self) -> dict[str, Any]:
        return {"name": "alpha"}


def to_square(image: np.ndarray, size_px: int) -> np.ndarray:
    """What CLIPSeg looks at (S S 3 uint8): its own processor squeezes the whole photograph into a square too."""
    return np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BILINEAR))


def to_photograph(answer: np.ndarray, image: np.ndarray) -> np.ndarray:
    """CLIPSeg's answer (s s float32) at the photograph's size (H W float32 in [0, 1])."""
    return np.clip(cv2.resize(answer, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_LINEAR), 0, 1)


def shrink(image: np.ndarray, size_px: int) -> np.ndarray:
    """``image`` (H W 3 uint8) with its longest side at most ``size_px`` and its shortest at least 8."""
    rows, columns = image.shape[:2]
    factor = min(1.0, size_px / max(rows, columns))
    shape = max(8, round(columns * factor)), max(8, round(rows * factor))
    return cv2.resize(image, shape, interpolation=cv2.INTER_AREA)


def grab_cut(small: np.ndarray, mask: np.ndarray, iterations: int = 5) -> np.ndarray:
    """GrabCut of H W 3 uint8 from a start (H W uint8 of its four labels), without specks and parts far from the centre.

    Returns:
        H W uint8, 1 for the subject.

    Raises:
        cv2.error: a start without probable subject or without background.
    """
    cv2.setRNGSeed(0)  # GrabCut's k-means draws from OpenCV's global generator
    background_model, foreground_model = np.zeros((1, 65)), np.zeros((1, 65))
    bgr = np.ascontiguousarray(small[..., ::-1])
    mask = mask.copy()
    cv2.grabCut(bgr, mask, None, background_model, foreground_model, iterations, cv2.GC_INIT_WITH_MASK)
    return keep_central_parts(np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8))


def whole_frame_cut(image: np.ndarray, size_px: int = 128) -> np.ndarray:
    """A second opinion on where the subject is: GrabCut as Rother et al. (2004) start it, with a rectangle.

    The rectangle is the frame without its border; no prior says where in it the subject is.

    Args:
        image: H W 3 uint8.
        size_px: longest side at which the cut is computed. At 128 px it tells good mattes from others as well as at
            256 and costs a sixth.

    Returns:
        h w uint8, 1 for the subject, at the size of the cut; all 0 where GrabCut finds none.
    """
    small = shrink(image, size_px)
    mask = np.where(frame_border(small), cv2.GC_BGD, cv2.GC_PR_FGD).astype(np.uint8)
    try:
        return grab_cut(small, mask)
    except cv2.error:
        return np.zeros_like(mask)


def frame_border(small: np.ndarray) -> np.ndarray:
    """H W bool: the outer 4 % of the shortest side, which GrabCut takes for background."""
    rows, columns = small.shape[:2]
    edge_px = max(1, round(0.04 * min(rows, columns)))
    border = np.zeros((rows, columns), bool)
    border[:edge_px], border[-edge_px:], border[:, :edge_px], border[:, -edge_px:] = True, True, True, True
    return border


def initial_mask(small: np.ndarray) -> np.ndarray:
    """GrabCut's start (H W uint8 of its four labels) from contrast to the border and nearness to the centre."""
    rows, columns = small.shape[:2]
    lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).astype(np.float32)
    border = frame_border(small)
    cv2.setRNGSeed(0)
    _, _, centres = cv2.kmeans(
        lab[border], min(6, int(border.sum())), None, (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 1.0), 1,
        cv2.KMEANS_PP_CENTERS,
    )  # fmt: skip
    contrast = np.linalg.norm(lab[:, :, None] - centres, axis=-1).min(axis=-1)
    contrast = cv2.GaussianBlur(contrast, (0, 0), 0.01 * max(rows, columns))
    contrast /= max(float(np.percentile(contrast, 99)), 1e-3)
    y = (np.arange(rows, dtype=np.float32)[:, None] - (rows - 1) / 2) / (0.5 * rows)
    x = (np.arange(columns, dtype=np.float32)[None] - (columns - 1) / 2) / (0.5 * columns)
    nearness = np.exp(-(x**2 + y**2) / (2 * 0.5**2))
    score = nearness * (0.4 + contrast)
    mask = np.full((rows, columns), cv2.GC_PR_BGD, np.uint8)
    mask[score >= 0.45 * np.percentile(score, 98)] = cv2.GC_PR_FGD
    mask[border] = cv2.GC_BGD
    if not (mask == cv2.GC_PR_FGD).any():
        mask[rows // 4 : -(rows // 4), columns // 4 : -(columns // 4)] = cv2.GC_PR_FGD
    return mask


def keep_central_parts(cut: np.ndarray) -> np.ndarray:
    """``cut`` (0 or 1 uint8) with holes and specks closed and with the parts that weigh most at the centre only."""
    rows, columns = cut.shape
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    cut = cv2.morphologyEx(cut, cv2.MORPH_OPEN, kernel)
    count, labels = cv2.connectedComponents(cut, connectivity=8)
    if count <= 1:
        return cut
    y = (np.arange(rows)[:, None] - (rows - 1) / 2) / (0.5 * rows)
    x = (np.arange(columns)[None] - (columns - 1) / 2) / (0.5 * columns)
    weights = np.bincount(labels.ravel(), np.exp(-(x**2 + y**2) / (2 * 0.4**2)).ravel(), minlength=count)
    weights[0] = 0.0
    kept = np.isin(labels, np.flatnonzero(weights >= 0.2 * weights.max())).astype(np.uint8)
    # a hole smaller than 0.2 % of the frame is a highlight, not a gap
    holes, hole_labels, stats, _ = cv2.connectedComponentsWithStats(1 - kept, connectivity=4)
    small = [index for index in range(1, holes) if stats[index, cv2.CC_STAT_AREA] < 0.002 * rows * columns]
    kept[np.isin(hole_labels, small)] = 1
    return kept


def _square_size(size: Any) -> int:
    """Side in pixels from any spelling of a processor's ``size``."""
    if isinstance(size, int):
        return size
    values = {int(value) for key, value in dict(size).items() if key in ("height", "width", "shortest_edge")}
    if len(values) != 1:
        raise ValueError(f"preprocessor_config.json: size={json.dumps(size)}, expected one square size")
    return values.pop()


def _short_hash(tensors: dict[str, Any]) -> str:
    from blipdiff_train.common.files import sha256_tensors

    return sha256_tensors(tensors)[:12]
