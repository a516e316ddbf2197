"""Key tables: complete both ways, and every kind of misfit is named."""

import pytest
import torch
from torch import nn

from blipdiff_train.checkpoints.keys import Gaps, assign, linear, prefixed, row, state_shapes, to_ours, to_theirs

ROWS = [
    *linear("fused", "q", "k", "v"),
    row("table", "embedding.weight", leading=1),
    row("head.weight", "embedding.weight", alias=True),
]


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(3, 3) for name in "qkv"} | {"embedding": nn.Embedding(5, 3)})


def test_there_and_back_is_bit_exact():
    module = model()
    theirs = to_theirs(module.state_dict(), ROWS)
    assert theirs["fused.weight"].shape == (9, 3)
    assert theirs["table"].shape == (1, 5, 3)
    assert torch.equal(theirs["fused.weight"][3:6], module["k"].weight)
    back = to_ours(theirs, ROWS, state_shapes(module), file="x.safetensors")
    assert back.keys() == module.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=torch.zeros(1)), "unknown keys: extra"),
        (lambda t: t.pop("table"), "missing keys: table"),
        (lambda t: t.update(table=torch.zeros(5, 3)), r"table has shape \(5, 3\), expected \(1, 5, 3\)"),
        (lambda t: t.update({"fused.bias": torch.zeros(3)}), r"fused\.bias has shape \(3,\), expected \(9,\)"),
        (lambda t: t.update({"head.weight": torch.zeros(5, 3)}), r"head\.weight differs from the tensor it is tied to"),
    ],
)
def test_misfits_are_named_with_the_file(change, message):
    theirs = to_theirs(model().state_dict(), ROWS)
    change(theirs)
    with pytest.raises(ValueError, match=rf"^x\.safetensors: does not fit the model\. .*{message}"):
        to_ours(theirs, ROWS, state_shapes(model()), file="x.safetensors")


def test_all_problems_come_at_once():
    theirs = to_theirs(model().state_dict(), ROWS)
    theirs["surplus"] = theirs.pop("table")
    theirs["fused.bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing keys: table; unknown keys: surplus; fused\.bias has shape"):
        to_ours(theirs, ROWS, state_shapes(model()), file="x")


def test_gaps_hold_for_the_names_they_list_only():
    shapes = state_shapes(model())
    theirs = to_theirs(model().state_dict(), ROWS)
    gaps = Gaps(ignored=frozenset({"ids"}), ignored_prefixes=("other.",), absent_parts=("fused.",))
    to_ours(theirs | {"ids": torch.zeros(1), "other.x": torch.zeros(1)}, ROWS, shapes, file="x", gaps=gaps)
    with pytest.raises(ValueError, match="unknown keys: another"):
        to_ours(theirs | {"another": torch.zeros(1)}, ROWS, shapes, file="x", gaps=gaps)
    without = {name: tensor for name, tensor in theirs.items() if not name.startswith("fused.")}
    assert set(to_ours(without, ROWS, shapes, file="x", gaps=gaps)) == {"embedding.weight"}
    half = {name: tensor for name, tensor in theirs.items() if name != "fused.bias"}
    with pytest.raises(ValueError, match=r"missing keys: fused\.bias"):
        to_ours(half, ROWS, shapes, file="x", gaps=gaps)


def test_half_precision_becomes_fp32_and_integers_stay():
    shapes = {"a": (2,), "n": (1,)}
    ours = to_ours({"a": torch.ones(2).half(), "n": torch.tensor([3])}, [row("a"), row("n")], shapes, file="x")
    assert ours["a"].dtype == torch.float32
    assert ours["n"].dtype == torch.int64


def test_writing_refuses_a_model_that_the_table_does_not_cover():
    state = model().state_dict()
    with pytest.raises(ValueError, match="Not in the table: new"):
        to_theirs(state | {"new": torch.zeros(1)}, ROWS)
    state.pop("q.bias")
    with pytest.raises(ValueError, match=r"Not in the model: q\.bias"):
        to_theirs(state, ROWS)


def test_prefixes_are_put_on_both_sides():
    assert prefixed([row("a", "b")], "x.", "y.") == [row("x.a", "y.b")]


def test_a_module_with_memory_keeps_its_parameters_and_one_without_takes_the_tensors():
    source = model().state_dict()
    real = model()
    before = real["q"].weight
    assign(real, source)
    assert real["q"].weight is before
    assert torch.equal(before, source["q.weight"])
    with torch.device("meta"):
        empty = model()
    empty["k"].weight.requires_grad_(False)
    assign(empty, source)
    assert torch.equal(empty["v"].bias, source["v.bias"])
    assert not empty["k"].weight.requires_grad
    assert empty["q"].weight.requires_grad
