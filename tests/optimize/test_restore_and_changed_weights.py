"""`restore`, and weights that change while a network is optimised."""

import copy

import pytest
import torch
from optimized_networks import (
    NETWORKS,
    gradients,
    inputs,
    make,
    predict,
    relative,
    tensor_of,
)

from ddpm_fast import optimize, restore
from ddpm_fast.nn import packed_weights as packing

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fused_in_training")]


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


def test_restore_gives_back_what_was(name):
    model, (x, t) = make(name), inputs()
    before = {k: (v.clone(), v.stride(), v.dtype) for k, v in model.state_dict().items()}
    kinds, expected, ids = [type(m) for m in model.modules()], predict(model, x, t), [id(p) for p in model.parameters()]
    optimize(model, torch.bfloat16)
    assert list(model.state_dict()) == list(before)
    assert [id(p) for p in model.parameters()] == ids
    predict(model, x, t)
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert [id(p) for p in model.parameters()] == ids
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key][0])
        assert (value.stride(), value.dtype) == before[key][1:]
    assert torch.equal(predict(model, x, t), expected)
    assert not [key for key in vars(model) if "ddpm_fast" in key]


def test_weights_that_need_no_change_keep_their_memory():
    model = make("plain")
    before = {k: p.data_ptr() for k, p in model.named_parameters()}
    optimize(model, torch.float32)
    assert {k: p.data_ptr() for k, p in model.named_parameters()} == before
    restore(model)
    assert {k: p.data_ptr() for k, p in model.named_parameters()} == before


def test_changed_weights_are_converted_back_and_others_restored():
    model = make("plain")
    first, second = model[0].weight.clone(), model[3].weight.clone()
    optimize(model, torch.bfloat16)
    with torch.no_grad():
        model[0].weight.mul_(2)
    changed = model[0].weight.float()
    restore(model)
    assert torch.equal(model[0].weight, changed)
    assert not torch.equal(changed, 2 * first)
    assert model[0].weight.is_contiguous()
    assert torch.equal(model[3].weight, second)


def test_gradients_follow_their_weights():
    model = make("plain")
    gradients(model, *inputs())
    before = model[0].weight.grad.clone()
    optimize(model, torch.bfloat16)
    assert torch.equal(model[0].weight.grad, before.bfloat16())
    restore(model)
    assert model[0].weight.grad.dtype == torch.float32


def test_training_changes_the_weights_and_inference_sees_it(name):
    model, (x, t) = optimize(make(name), torch.float32), inputs()
    before = predict(model, x, t)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tensor_of(model(x, t)).square().mean().backward()
    optimizer.step()
    model.eval()
    after = predict(model, x, t)
    assert relative(after, before) > 1e-2
    torch.testing.assert_close(after, predict(restore(model), x, t), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["copy_", "lerp_", "assign", "load_state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_written_through_data_are_seen(how, dtype):
    model, (x, t) = optimize(make("openai"), dtype), inputs()
    predict(model, x, t)
    if how == "load_state_dict":
        model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    for p in model.parameters() if how != "load_state_dict" else ():
        if how == "assign":
            p.data = p.data * 1.5
        elif how == "copy_":
            p.data.copy_(p.data * 1.5)
        else:
            p.data.lerp_(p.data * 6, 0.1)
    actual = predict(model, x, t)
    fresh = copy.deepcopy(model)
    assert torch.equal(actual, predict(fresh, x, t))


def test_an_unchanged_model_is_packed_once(monkeypatch):
    model, (x, t) = optimize(make("openai"), torch.float32), inputs()
    predict(model, x, t)

    def refuse(*args):
        raise AssertionError("packed again")

    monkeypatch.setattr(packing, "_some_of", refuse)
    for _ in range(3):
        predict(model, x, t)
    restore(model)
