"""Our text encoder, stage-2 loss and generation against the recorded reference implementations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blipdiff_train.models.denoiser import Denoiser
from blipdiff_train.models.subject_encoder import SubjectProjection
from blipdiff_train.models.text_encoder import TextEncoder

from .runner import find_cases, kind_of, run_case

GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = ("text encoder with a subject", "stage 2", "generation", "generation with a ControlNet")
SHARED = GOLDENS.parents[2] / "shared" / "golden" / "controlnet"  # too large to be kept here; run where it is at hand
CASES = [case for root in (GOLDENS, SHARED) for case in find_cases(root) if kind_of(case) in KINDS]


def test_each_kind_has_a_case() -> None:
    assert {kind_of(case) for case in CASES} >= set(KINDS[:3])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.info["case"])
def test_agrees_with_the_reference(case) -> None:
    found = run_case(case)
    assert found
    wrong = [f"{name}: {c.error:.2e} > {c.tolerance:.0e}" for name, c in found.items() if not c.good]
    assert not wrong, "\n".join(wrong)


# ---- such a test can fail: each of these mistakes must be seen ------------------------------------------------------


def _case(kind: str):
    return next(case for case in CASES if kind_of(case) == kind)


def test_a_text_encoder_without_causal_mask_is_seen(monkeypatch) -> None:
    def both_ways(self, embeds):
        positions = torch.arange(embeds.shape[1])[None]
        states = self.model.embeddings(inputs_embeds=embeds, position_ids=positions)
        return self.model.final_layer_norm(self.model.encoder(inputs_embeds=states, is_causal=False).last_hidden_state)

    monkeypatch.setattr(TextEncoder, "_encode_embeds", both_ways)
    found = run_case(_case("text encoder with a subject"))
    assert not any(comparison.good for comparison in found.values())


def test_a_projection_normed_at_the_end_is_seen(monkeypatch) -> None:
    def post_norm(self, states):
        hidden = self.dense1(states)
        return self.LayerNorm(states + self.dense2(hidden * torch.sigmoid(1.702 * hidden)))

    monkeypatch.setattr(SubjectProjection, "forward", post_norm)
    found = run_case(_case("stage 2"))
    assert not found["ctx_embeddings"].good
    assert not found["loss"].good
    assert found["latents"].good


def test_a_detached_subject_is_seen_in_the_gradients_alone(monkeypatch) -> None:
    forward = SubjectProjection.forward
    monkeypatch.setattr(SubjectProjection, "forward", lambda self, states: forward(self, states).detach())
    found = run_case(_case("stage 2"))
    assert found["loss"].good
    assert not found["gradients (relative)"].good


def test_an_unscaled_posterior_is_seen(monkeypatch) -> None:
    sample_latents = Denoiser.sample_latents
    monkeypatch.setattr(
        Denoiser, "sample_latents", lambda self, *args: sample_latents(self, *args) / self.scaling_factor
    )
    found = run_case(_case("stage 2"))
    assert not found["latents"].good
    assert not found["loss"].good
