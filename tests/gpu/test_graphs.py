"""Sampling by CUDA graphs on a GPU: the same bits as step by step, and no memory that grows."""

import threading

import pytest
import torch

from ddpm_fast import GaussianDiffusion, UNet, kept_graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def diffusion():
    torch.manual_seed(0)
    model = UNet(image_size=16, dim=64, dim_mults=(1, 2), attention_resolutions=(8,))
    yield GaussianDiffusion(model, image_size=16, objective="pred_noise", beta_schedule="linear").cuda()
    kept_graphs._graphs.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_captured_run_has_the_bits_of_a_run_step_by_step(diffusion, monkeypatch, batch, dtype):
    diffusion.model.to(dtype)
    for how in (
        {"steps": 12},
        {"sampler": "ddim", "steps": 9, "eta": 0.5},
        {"sampler": "ddpm", "steps": 20},
        {"sampler": "heun", "steps": 12},
        {"steps": 12, "dynamic_threshold": 0.9},
    ):
        monkeypatch.setenv("DDPM_FAST_GRAPHS", "0")
        expected = diffusion.sample(batch, seed=3, **how)
        assert not kept_graphs._graphs.get(diffusion.model)
        monkeypatch.delenv("DDPM_FAST_GRAPHS")
        for _ in range(2):  # captured, and kept
            assert torch.equal(diffusion.sample(batch, seed=3, **how), expected)
        assert kept_graphs._graphs[diffusion.model]
        kept_graphs._graphs.clear()


def test_images_are_encoded_and_inpainted_as_step_by_step(diffusion, monkeypatch):
    images = torch.rand(4, 3, 16, 16, device="cuda")
    for edit in (
        lambda: diffusion.sample(init=images, strength=0.5, steps=20, seed=1),
        lambda: diffusion.encode(images, steps=10),
        lambda: diffusion.inpaint(images, images[:, :1] > 0.5, steps=10, jump=2, resample=3, seed=1),
    ):
        monkeypatch.setenv("DDPM_FAST_GRAPHS", "0")
        expected = edit()
        monkeypatch.delenv("DDPM_FAST_GRAPHS")
        assert torch.equal(edit(), expected)
        kept_graphs._graphs.clear()


def test_torch_noise_is_drawn_as_step_by_step(diffusion, monkeypatch):
    diffusion.rng = "torch"
    torch.manual_seed(1)
    found, after = diffusion.sample(4, steps=10), torch.rand(1, device="cuda")
    monkeypatch.setenv("DDPM_FAST_GRAPHS", "0")
    torch.manual_seed(1)
    assert torch.equal(diffusion.sample(4, steps=10), found)
    assert torch.equal(torch.rand(1, device="cuda"), after)


def test_thirty_runs_take_the_memory_of_two(diffusion):
    for n in (8, 16):
        diffusion.sample(n, steps=10)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for k in range(30):
        diffusion.sample(8 * (1 + k % 2), steps=10 + k, seed=k)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_a_network_that_waits_for_the_device_samples_step_by_step(diffusion):
    expected = diffusion.sample(4, steps=10, seed=1)
    hook = diffusion.model.register_forward_hook(
        lambda module, args, output: output * float(output.new_ones(()).item())
    )
    with pytest.warns(UserWarning, match="it waits for the device"):
        found = diffusion.sample(4, steps=10, seed=1)
    hook.remove()
    torch.testing.assert_close(found, expected)
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.equal(diffusion.sample(4, steps=10, seed=1), expected)


def test_a_thread_that_pins_memory_meanwhile_does_no_harm(diffusion):
    expected, done, errors = diffusion.sample(4, steps=10, seed=1), threading.Event(), []

    def pin():
        try:
            while not done.is_set():
                torch.empty(1 << 16).pin_memory()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for _ in range(5):
            kept_graphs._graphs.clear()
            assert torch.equal(diffusion.sample(4, steps=10, seed=1), expected)
    finally:
        done.set()
        thread.join()
    assert not errors


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_model_on_another_device_than_the_current_one(diffusion):
    expected = diffusion.sample(4, steps=10, seed=1)
    assert torch.equal(diffusion.to("cuda:1").sample(4, steps=10, seed=1).to("cuda:0"), expected)
    assert torch.cuda.current_device() == 0
