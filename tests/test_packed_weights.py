"""Weights packed for oneDNN: of the right tensor, in the right version, in every thread."""

import threading

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.nn.packed_weights import DTYPES, Conv2d, Linear, PackedWeights, packed

pytestmark = pytest.mark.skipif(torch.float32 not in DTYPES, reason="PyTorch was built without oneDNN")


def layers():
    torch.manual_seed(0)
    conv, linear = Conv2d(16, 16, 3, padding=1), Linear(16, 16)
    return [
        (conv, torch.randn(2, 16, 4, 4), lambda x: F.conv2d(x, conv.weight, conv.bias, padding=1)),
        (linear, torch.randn(2, 16), lambda x: F.linear(x, linear.weight, linear.bias)),
    ]


@pytest.mark.parametrize("layer", [0, 1], ids=["conv", "linear"])
@pytest.mark.parametrize("change", ["in place", "replaced", "through data", "data replaced"])
@torch.no_grad()
def test_weights_that_changed_between_two_runs_are_packed_again(layer, change):
    module, x, expected = layers()[layer]
    weights = PackedWeights()
    for factor in (1, 3, -2):
        if change == "in place":  # counts as a new version, which needs no refresh
            module.weight.mul_(factor)
        elif change == "replaced":
            module.weight = torch.nn.Parameter(module.weight * factor)
        else:
            if change == "through data":
                module.weight.data.mul_(factor)
            else:
                module.weight.data = module.weight.data * factor
            weights.refresh()
        for _ in range(2):
            with packed(weights):
                torch.testing.assert_close(module(x), expected(x), rtol=1e-5, atol=1e-5)
    assert len(weights._entries) == 1


@torch.no_grad()
def test_weights_that_did_not_change_are_packed_once(monkeypatch):
    module, x, _ = layers()[0]
    weights = PackedWeights()
    with packed(weights):
        module(x)
        monkeypatch.setattr(PackedWeights, "get", lambda self, module, pack: self._entries[module].packed)
        weights.refresh()
        module(x)


def test_threads_that_share_packed_weights_get_the_results_of_one():
    """While weights are packed, compared and forgotten by all of them."""
    conv, x, expected = layers()[0]
    modules = [Conv2d(16, 16, 3, padding=1) for _ in range(8)]
    modules_of_all = [conv, *modules]
    weights, wanted, failures = PackedWeights(), expected(x).detach(), []

    def work():
        try:
            with torch.no_grad(), packed(weights):
                for i in range(40):
                    weights.refresh()
                    for module in modules_of_all:
                        y = module(x)
                        if module is conv:
                            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
                    # The same values in other memory: everything is forgotten and packed again.
                    modules[i % 8].weight.data = modules[i % 8].weight.data.clone()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@torch.no_grad()
def test_a_refresh_while_another_thread_forgets_all_is_harmless(monkeypatch):
    conv, x, expected = layers()[0]
    weights = PackedWeights()
    with packed(weights):
        conv(x)
        weights.refresh()
        equal = torch.equal

        def forgetting(*tensors):
            with monkeypatch.context() as inner:  # a second refresh within the first, which sees a change
                inner.setattr(torch, "equal", lambda *_: False)
                weights.refresh()
            return equal(*tensors)

        monkeypatch.setattr(torch, "equal", forgetting)
        weights.refresh()
        monkeypatch.undo()
        torch.testing.assert_close(conv(x), expected(x), rtol=1e-5, atol=1e-5)
