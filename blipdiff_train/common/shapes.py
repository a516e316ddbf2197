"""Shape checks at the boundaries, in the letters of the docstrings.

Letters: B batch, G batch × processes, Q query tokens, P patches, L text tokens, D width, E embedding, C channels,
H W image, h w latent.
"""

from __future__ import annotations

from torch import Tensor


def check_shape(tensor: Tensor, pattern: str, *, name: str, **sizes: int) -> dict[str, int]:
    """Check ``tensor`` against ``pattern``, e.g. ``"B Q D"`` or ``"B 3 S S"``, and return the size of each letter.

    A number in the pattern must be met exactly, a letter that occurs twice must have one size, and a letter named in
    ``sizes`` must have that size.

    Raises:
        ValueError: with the name, the shape found and the shape expected.
    """
    letters = pattern.split()
    found = dict(sizes)
    good = tensor.ndim == len(letters)
    if good:
        for letter, size in zip(letters, tensor.shape, strict=True):
            expected = int(letter) if letter.isdigit() else found.setdefault(letter, size)
            good = good and size == expected
    if not good:
        known = " with " + ", ".join(f"{letter}={size}" for letter, size in sizes.items()) if sizes else ""
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({pattern}){known}")
    return found
