"""Stage 1, its features and the Q-Former against the recorded reference, and proof that such a test can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from blipdiff_train.models import qformer as qformer_module
from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.qformer import QFormer
from blipdiff_train.stages import stage1

from .cases import build_stage, compare_outputs, compare_single_losses, forward, gradients, run_stage1_case, trimmed
from .runner import compare_gradients, find_cases, kind_of, run_case

GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = ("stage 1, one process", "stage 1, several processes", "features", "Q-Former of diffusers")
# what would make a clone large is left out of it, and run where the whole collection is at hand
SHARED = GOLDENS.parents[2] / "shared" / "golden"
KEPT = {case.folder.relative_to(GOLDENS) for case in find_cases(GOLDENS)}
MORE = [case for case in find_cases(SHARED) if case.folder.relative_to(SHARED) not in KEPT]
CASES = [case for case in [*find_cases(GOLDENS), *MORE] if kind_of(case) in KINDS]
SINGLE = [case for case in find_cases(GOLDENS) if kind_of(case) == "stage 1, one process"]


def outside(found) -> list[str]:
    return [f"{name}: {c.error:.2e} > {c.tolerance:.0e}" for name, c in found.items() if not c.good]


def test_each_kind_has_a_case() -> None:
    assert {kind_of(case) for case in CASES} == set(KINDS)


@pytest.mark.slow  # the cases of several processes wait for imports
@pytest.mark.parametrize("case", CASES, ids=lambda case: "/".join(case.folder.parts[-2:]))
def test_agrees_with_the_reference(case) -> None:
    found = run_case(case)
    assert len(found) >= 6
    assert not outside(found), "\n".join(outside(found))


def test_a_folder_is_enough() -> None:
    assert not outside(run_stage1_case(SINGLE[0].folder))


@pytest.mark.parametrize("length", ["longest", "recorded", "longer"])
def test_padding_changes_no_number(length) -> None:
    """LAVIS pads to max_txt_len, we to the longest: losses and gradients are the same."""
    case = SINGLE[0]
    inputs = case.tensors("inputs.safetensors")
    inputs = {name: tensor[:5] for name, tensor in inputs.items()}  # the sixth text is as long as is allowed
    negatives = (torch.tensor([1, 2, 3, 4, 0]), torch.tensor([4, 0, 1, 2, 3]))
    short = trimmed(inputs)
    extra = {"longest": 0, "recorded": 12 - short["input_ids"].shape[1], "longer": 7}[length]
    results = []
    for pad in (0, extra):
        module = build_stage(case)
        ids, mask = (F.pad(short[name], (0, pad)) for name in ("input_ids", "attention_mask"))
        losses = module(short["image"], ids, mask, negatives=negatives).losses
        sum(losses.values()).backward()
        results.append(([loss.item() for loss in losses.values()], gradients(case, module)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert not outside(compare_gradients(results[1][1], results[0][1]))


def test_masking_same_captions_is_the_only_change_of_the_draw() -> None:
    """With all captions different the option changes nothing: the reference's weights either way."""
    for case in SINGLE:
        inputs, recorded = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
        module = build_stage(case, mask_same_caption=True)
        outputs = forward(module, inputs, recorded)
        assert not outside(compare_outputs(case, module, inputs, recorded, outputs))


def _no_causal_mask(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "tril", lambda self: self)


def _no_pad_mask(monkeypatch) -> None:
    key_mask = qformer_module._key_mask
    monkeypatch.setattr(
        qformer_module, "_key_mask", lambda mask, num_before=0: key_mask(torch.ones_like(mask), num_before)
    )


def _detached_cache(monkeypatch) -> None:
    image_pass = QFormer.image_pass
    monkeypatch.setattr(
        QFormer,
        "image_pass",
        lambda self, context: (lambda out, cache: (out, [(k.detach(), v.detach()) for k, v in cache]))(
            *image_pass(self, context)
        ),
    )


def _cls_for_dec(monkeypatch) -> None:
    monkeypatch.setattr(qformer_module.QFormerConfig, "dec_token_id", 2)


def _tanh_gelu(monkeypatch) -> None:
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: gelu(x, approximate="tanh"))


def _gathered_with_gradient(monkeypatch) -> None:
    monkeypatch.setattr(stage1.distributed, "gather_no_grad", lambda tensor: tensor)


def _best_query(monkeypatch) -> None:
    monkeypatch.setattr(
        AlignmentHeads, "match_logits", lambda self, query_output: self.itm_head(query_output).amax(dim=1)
    )


def _shared_feed_forward(monkeypatch) -> None:
    layer_forward = qformer_module.Layer.forward

    def forward_shared(self, *arguments):
        own = dict(self._modules)
        self._modules |= {"intermediate_query": self.intermediate, "output_query": self.output}
        try:
            return layer_forward(self, *arguments)
        finally:
            self._modules.update(own)

    monkeypatch.setattr(qformer_module.Layer, "forward", forward_shared)


@pytest.mark.parametrize(
    "break_it",
    [
        _no_causal_mask,
        _no_pad_mask,
        _detached_cache,
        _cls_for_dec,
        _tanh_gelu,
        _gathered_with_gradient,
        _best_query,
        _shared_feed_forward,
    ],
)
def test_wrong_variants_are_noticed(break_it, monkeypatch) -> None:
    """Each of these mistakes must make the comparison of losses, activations and gradients fail."""
    case = SINGLE[0]
    inputs, recorded = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    break_it(monkeypatch)
    module = build_stage(case)
    outputs = forward(module, inputs, recorded)
    sum(outputs.losses.values()).backward()
    found = compare_outputs(case, module, inputs, recorded, outputs)
    theirs = case.tensors("grads.safetensors")
    mine = {name: grad for name, grad in gradients(case, module).items() if "_query" not in name}
    found |= compare_gradients(mine, {name: grad for name, grad in theirs.items() if "_query" not in name})
    worst = max(c.error / c.tolerance for c in found.values())
    assert worst > 10, f"{break_it.__name__} moved nothing by more than {worst:.1f} tolerances"


def test_other_smoothing_and_swapped_negatives_are_noticed() -> None:
    case = SINGLE[0]
    inputs, recorded = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    plain = build_stage(case, label_smoothing=0.0)
    found = compare_outputs(case, plain, inputs, recorded, forward(plain, inputs, recorded))
    assert not found["loss_itc"].good
    assert not found["loss_lm"].good
    module = build_stage(case)
    swapped = recorded | {"neg_image_idx": recorded["neg_text_idx"], "neg_text_idx": recorded["neg_image_idx"]}
    found = compare_outputs(case, module, inputs, recorded, forward(module, inputs, swapped))
    assert not found["loss_itm"].good


def test_single_losses_are_compared_where_recorded() -> None:
    case = next(case for case in SINGLE if case.has("grads_per_loss.safetensors"))
    found = compare_single_losses(case, case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors"))
    assert {name.split(" ")[0] for name in found} == {"itc", "itm", "itg"}
    assert not outside(found)
