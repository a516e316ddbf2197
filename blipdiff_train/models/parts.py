"""The parts of a model as one record: what stages, generation, evaluation and export hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from blipdiff_train.models.alignment import AlignmentHeads
    from blipdiff_train.models.denoiser import Denoiser
    from blipdiff_train.models.image_encoder import ImageEncoder
    from blipdiff_train.models.qformer import QFormer
    from blipdiff_train.models.subject_encoder import SubjectEncoder, SubjectProjection
    from blipdiff_train.models.text_encoder import TextEncoder

CLIP_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class ModelParts:
    """Modules with what is needed to feed them.

    A stage-1 folder has the image tower, the Q-Former and the alignment heads; a complete one also the
    projection, the text encoder and the denoiser, and need not have the heads (the public release has
    dropped them).

    Attributes:
        image_mean, image_std: per channel, applied to images in [0, 1].
        image_size: side in pixels of the square image that the image tower reads.
        metadata: plain data that travels with the folder (provenance, template, step).
        subject_embeds: (Q D) of the one subject that a fine-tuned model was made for.
    """

    image_encoder: ImageEncoder
    qformer: QFormer
    qformer_tokenizer: PreTrainedTokenizerBase
    alignment_heads: AlignmentHeads | None = None
    projection: SubjectProjection | None = None
    text_encoder: TextEncoder | None = None
    denoiser: Denoiser | None = None
    image_size: int = 224
    image_mean: tuple[float, float, float] = CLIP_IMAGE_MEAN
    image_std: tuple[float, float, float] = CLIP_IMAGE_STD
    metadata: dict[str, Any] = field(default_factory=dict)
    subject_embeds: Tensor | None = None

    def require(self, *names: str, purpose: str) -> None:
        """Raise unless every named part is there.

        Raises:
            ValueError: naming the missing parts and what they are needed for.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"{purpose} needs {', '.join(missing)}, which this model does not have; "
                "use a complete BLIP-Diffusion model folder"
            )

    def subject_encoder(self) -> SubjectEncoder:
        """The image tower, Q-Former and projection as one module (the modules are shared, not copied).

        Raises:
            ValueError: there is no projection.
        """
        from blipdiff_train.models.subject_encoder import SubjectEncoder

        self.require("projection", purpose="a subject encoder")
        return SubjectEncoder(self.image_encoder, self.qformer, self.projection, self.qformer_tokenizer)
