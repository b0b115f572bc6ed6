"""Times the ops on the CPU beside the code that they replace: `pytest benchmarks/`.

64 images of 3 x 256 x 256 in float32, in one thread. Tensors are channels-last for ddpm_fast and contiguous for the
peers, as their users have them (PyTorch's randn is several times slower on channels-last tensors, and that of
torch.compile slower still). Peers keep the noise of a training step for the loss; ddpm_fast recomputes it from keys.

Bytes are the fewest that an op can move: each of its tensors is read or written once. Weights, tables and keys are left
out, since they are small beside the images.
"""

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import noise, ops, samplers, schedules

N, C, H, W = SHAPE = (64, 3, 256, 256)
BYTES = N * C * H * W * 4  # of a tensor of images in float32
SCHEDULE = schedules.make("linear", 1000)
T = 500


def image(seed, shape=SHAPE, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def x():
    return image(0)


@pytest.fixture(scope="module")
def pred():
    return image(1)


class Network(torch.nn.Module):
    """Takes the place of a network: returns the prediction that it was made with."""

    channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 3, 3, False, False

    def __init__(self, pred):
        super().__init__()
        self.pred = pred

    def forward(self, x, t, x_self_cond=None):
        return self.pred


def lucidrains(pred):
    module = pytest.importorskip("denoising_diffusion_pytorch")
    return module.GaussianDiffusion(
        Network(pred), image_size=H, timesteps=1000, objective="pred_noise", beta_schedule="linear"
    )


def diffusers_scheduler():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DDPMScheduler(1000, variance_type="fixed_small", clip_sample=True)


def copying(x):
    out = torch.empty_like(x)
    return lambda: out.copy_(x)


@torch.inference_mode()
def test_reverse_step(compare, x, pred):
    rows = samplers.ancestral(SCHEDULE, "pred_noise").rows.float()
    step = torch.tensor(len(SCHEDULE) - 1 - T)
    keys, eps = noise.sample_keys(N, seed=0), image(2)
    x_nchw, pred_nchw = x.contiguous(), pred.contiguous()
    peer, scheduler = lucidrains(pred_nchw), diffusers_scheduler()

    u, w, A, B, _, sigma = rows[step].tolist()

    def plain(x, pred, eps):
        return A * x + B * (u * x + w * pred).clamp(-1, 1) + sigma * eps

    def stepping(x, pred, *, in_place=False, **noise):
        state = x.clone() if in_place else x
        out = ops.ReverseStep(state, None, None) if in_place else None
        return lambda: ops.reverse_step(state, pred, step, rows, **noise, clip=(-1, 1), out=out)

    compiled = torch.compile(plain)
    contenders = {
        "copy": copying(x),
        "ddpm_fast in place, noise made inside": stepping(x, pred, in_place=True, keys=keys),
        "ddpm_fast in place, noise given": stepping(x, pred, in_place=True, noise=eps),
        "ddpm_fast in place, contiguous, noise inside": stepping(x_nchw, pred_nchw, in_place=True, keys=keys),
        "ddpm_fast, noise made inside": stepping(x, pred, keys=keys),
        "ddpm_fast, noise given": stepping(x, pred, noise=eps),
        "denoising_diffusion_pytorch p_sample": lambda: peer.p_sample(x_nchw, T),
        "diffusers DDPMScheduler.step": lambda: scheduler.step(pred_nchw, T, x_nchw),
        "torch.compile of the step, eager randn": lambda: compiled(x_nchw, pred_nchw, torch.randn_like(x_nchw)),
        "randn alone": lambda: torch.randn_like(x_nchw),
    }
    read_x_pred_write_x, read_noise = 3 * BYTES, BYTES
    moved = {"copy": 2 * BYTES} | {
        name: read_x_pred_write_x + read_noise * ("given" in name)
        for name in contenders
        if name.startswith("ddpm_fast")
    }
    compare("reverse_step", contenders, "ddpm_fast in place, noise made inside", moved)


@torch.inference_mode()
def test_q_sample(compare, x, pred):
    a, s = SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod
    rows = torch.stack([a, s], dim=1).float()
    t = torch.arange(N) * 15
    keys, eps = noise.sample_keys(N, seed=0), image(2)
    x_nchw = x.contiguous()
    peer, scheduler = lucidrains(pred), diffusers_scheduler()

    def plain(x, eps):
        a, s = rows[t].view(N, 2, 1, 1, 1).unbind(1)
        return a * x + s * eps

    compiled = torch.compile(plain)
    contenders = {
        "copy": copying(x),
        "ddpm_fast, noise made inside": lambda: ops.q_sample(x, t, rows, keys=keys),
        "ddpm_fast, noise given": lambda: ops.q_sample(x, t, rows, noise=eps),
        "denoising_diffusion_pytorch q_sample": lambda: peer.q_sample(x_nchw, t, torch.randn_like(x_nchw)),
        "diffusers add_noise": lambda: scheduler.add_noise(x_nchw, torch.randn_like(x_nchw), t),
        "torch.compile, eager randn": lambda: compiled(x_nchw, torch.randn_like(x_nchw)),
    }
    moved = {
        "copy": 2 * BYTES,
        "ddpm_fast, noise made inside": 2 * BYTES,  # reads x_0, writes x_t
        "ddpm_fast, noise given": 3 * BYTES,
    }
    compare("q_sample", contenders, "ddpm_fast, noise made inside", moved)


def test_weighted_loss(compare, x, pred):
    rows = torch.stack([torch.zeros(1000), torch.ones(1000), torch.rand(1000)], dim=1)
    t = torch.arange(N) * 15
    keys, eps = noise.sample_keys(N, seed=0), image(2)
    pred_nchw, eps_nchw = pred.contiguous().requires_grad_(), eps.contiguous()
    pred = pred.clone().requires_grad_()

    def backward(loss, pred=pred):
        return torch.autograd.grad(loss, pred)

    def eager():
        loss = F.mse_loss(pred_nchw, eps_nchw, reduction="none").flatten(1).mean(1)
        return backward((loss * rows[t, 2]).mean(), pred_nchw)

    def plain(pred, eps):
        return ((pred - eps).square().flatten(1).mean(1) * rows[t, 2]).mean()

    compiled = torch.compile(plain)
    contenders = {
        "copy": copying(x),
        "ddpm_fast, noise recomputed": lambda: backward(ops.weighted_loss(pred, t, rows, keys=keys, reduction="mean")),
        "ddpm_fast, noise given": lambda: backward(ops.weighted_loss(pred, t, rows, noise=eps, reduction="mean")),
        "eager mse_loss, mean, weight, mean": eager,
        "torch.compile of the same": lambda: backward(compiled(pred_nchw, eps_nchw), pred_nchw),
    }
    moved = {
        "copy": 2 * BYTES,
        "ddpm_fast, noise recomputed": 2 * BYTES,  # reads pred, writes its gradient
        "ddpm_fast, noise given": 3 * BYTES,
    }
    compare("weighted_loss, forward and backward", contenders, "ddpm_fast, noise recomputed", moved)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("shape", [(8, 128, 32, 32), (8, 256, 16, 16), (1, 128, 256, 256)], ids=str)
def test_group_norm_silu(compare, shape, backward):
    x = image(0, shape, torch.bfloat16).requires_grad_(backward)
    grad = image(1, shape, torch.bfloat16)
    weight, bias = (torch.rand(shape[1], dtype=torch.bfloat16, requires_grad=backward) for _ in range(2))

    def fused():
        return ops.group_norm_silu(x, weight, bias, 32)

    def eager():
        return F.silu(F.group_norm(x, 32, weight, bias))

    compiled = torch.compile(eager)

    def run(function):
        if not backward:
            return function
        return lambda: torch.autograd.grad(function(), (x, weight, bias), grad)

    contenders = {
        "copy": copying(x.detach()),
        "ddpm_fast": run(fused),
        "eager": run(eager),
        "torch.compile": run(compiled),
    }
    forward_bytes = 3 * x.nbytes  # reads x for the statistics and again for y, writes y
    backward_bytes = 4 * x.nbytes  # reads x and grad, for the sums, reads x again and writes its gradient
    moved = {"copy": 2 * x.nbytes, "ddpm_fast": forward_bytes + backward * backward_bytes}
    compare(
        f"group_norm_silu, bfloat16 {shape}{', and backward' if backward else ''}",
        contenders,
        "ddpm_fast",
        moved,
    )
