"""From subject word and prompt to the sentence that the text encoder reads, and the subject's place in it.

Two templates:

* ``release`` — "a ⟨subject embeddings⟩ dog swimming underwater": the embeddings stand after BOS and "a",
  before the category word. This is what the released code does (LAVIS ``blip_diffusion.py``: ``ctx_begin_pos
  = 2``; diffusers ``pipeline_blip_diffusion.py`` ``_build_prompt``), and what the public weights expect.
* ``paper`` — "a dog swimming underwater, the dog is ⟨subject embeddings⟩": "[text prompt], the [subject
  text] is [subject prompt]" (paper, section 3.2).

Differences from the references: a repetition count of zero is refused (theirs gives an empty prompt), and the
``paper`` template is never repeated: the paper repeats nothing, and the copies would push the words before
the embeddings out of the text encoder's window.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from blipdiff_train.models.text_encoder import AT_END

TEMPLATES = ("release", "paper")


@dataclass(frozen=True)
class PromptTemplate:
    """How subject and prompt become one sentence.

    Attributes:
        name: ``release`` or ``paper``.
        subject_position: index among the token ids (BOS is 0) where the embeddings are spliced in, or
            :data:`~blipdiff_train.models.text_encoder.AT_END`, just before EOS.
    """

    name: str
    subject_position: int

    def text(self, subject: str, prompt: str, *, repetitions: int = 1, is_sentence: bool = False) -> str:
        """The sentence beside which the subject embeddings stand.

        Args:
            subject: category words ("dog", "teddy bear").
            prompt: the rest ("swimming underwater"); may be empty.
            repetitions: copies of the sentence, joined by ", " (``release`` only): the references' way to
                make the text weigh more against the subject at inference.
            is_sentence: ``prompt`` is a whole caption ("a dog under water") and stays as it is; LAVIS trains on such.

        Raises:
            ValueError: ``repetitions`` < 1.
        """
        if repetitions < 1:
            raise ValueError(
                f"the prompt would be repeated {repetitions} times; prompt_strength × prompt_reps must be at least 1"
            )
        if self.name == "paper":
            return f"{self._sentence(subject, prompt, is_sentence)}, the {subject.strip()} is"
        return ", ".join([self._sentence(subject, prompt, is_sentence)] * repetitions)

    def text_without_subject(
        self, subject: str, prompt: str, *, repetitions: int = 1, is_sentence: bool = False
    ) -> str:
        """The sentence for a sample whose subject embeddings are dropped: the text prompt alone guides.

        The category word stays in both templates: it is part of the text prompt, only the picture is taken
        away.
        """
        if self.name == "paper":
            return self._sentence(subject, prompt, is_sentence)
        return self.text(subject, prompt, repetitions=repetitions, is_sentence=is_sentence)

    @staticmethod
    def _sentence(subject: str, prompt: str, is_sentence: bool) -> str:
        return prompt.strip() if is_sentence else f"a {subject.strip()} {prompt.strip()}".strip()


def get_template(name: str) -> PromptTemplate:
    """The template called ``name``.

    Raises:
        ValueError: no such template.
    """
    if name == "release":
        return PromptTemplate("release", subject_position=2)  # after BOS and "a"
    if name == "paper":
        return PromptTemplate("paper", subject_position=AT_END)
    raise ValueError(f"prompt template {name!r} is unknown; choose one of {', '.join(TEMPLATES)}")


def repetitions(prompt_strength: float, prompt_reps: int) -> int:
    """How often the references write the prompt: ``int(prompt_strength * prompt_reps)``."""
    return int(prompt_strength * prompt_reps)


def clean_caption(caption: str, *, max_words: int = 50) -> str:
    """A caption as the references' text processor ``blip_caption`` leaves it.

    Lower case; each of ``.!"()*#:;~`` becomes a space; runs of white space become one; at most ``max_words``
    words (LAVIS ``processors/blip_processors.py`` ``BlipCaptionProcessor.pre_caption``).
    """
    caption = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def names_subject(caption: str, subject: str) -> bool:
    """Whether a caption has the subject's words in it, as whole words next to each other, in any case."""
    return re.search(rf"\b{re.escape(clean_caption(subject))}\b", clean_caption(caption)) is not None
