import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddpm_fast import UNet
from ddpm_fast.app.memory import SavedActivations
from ddpm_fast.nn import group_norm, layers
from ddpm_fast.nn.layers import Attention, Dropout, ResidualBlock


def randomise(model):
    """Fresh networks predict 0: give every layer a say."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 / max(p[0].numel(), 4) ** 0.5))
    return model.eval()


def small(**changes):
    arguments = {
        "image_size": 16,
        "dim": 32,
        "dim_mults": (1, 2),
        "attention_resolutions": (8,),
        "norm_groups": 8,
    }
    return randomise(UNet(**(arguments | changes)))


@pytest.mark.parametrize(("name", "parameters"), [("ddpm-cifar10-32", 35_746_307), ("ddpm-256", 113_673_219)])
def test_presets_of_the_paper_have_its_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = UNet.preset(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["digits-8", "mnist-28"])
def test_small_presets_run(name):
    model = UNet.preset(name)
    x = torch.randn(2, model.channels, model.image_size, model.image_size)
    assert model(x, torch.tensor([0, 999])).shape == x.shape
    assert sum(p.numel() for p in model.parameters()) < 2_000_000


def test_presets_can_be_changed_and_unknown_ones_are_named():
    model = UNet.preset("digits-8", dropout=0.5, channels=3)
    assert model.channels == 3
    assert all(m.p == 0.5 for m in model.modules() if isinstance(m, nn.Dropout))
    with pytest.raises(ValueError, match="unknown preset 'cifar'; there are ddpm-cifar10-32"):
        UNet.preset("cifar")


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_images_within_the_network_are_channels_last(batch, dtype):
    """Also at 64 images and above, where others' upsampling drops the format."""
    model = small().to(dtype)
    seen = []

    def look(module, inputs, output):
        seen.append(type(module).__name__)
        assert output.is_contiguous(memory_format=torch.channels_last), module

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm | ResidualBlock | Attention):
            module.register_forward_hook(look)
    x = torch.randn(batch, 3, 16, 16)
    with torch.no_grad():
        y = model(x, torch.arange(batch))
    assert {"Conv2d", "GroupNorm", "ResidualBlock", "Attention"} <= set(seen)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == dtype


def test_memory_format_of_the_input_does_not_matter():
    model, x, t = small(), torch.randn(2, 3, 16, 16), torch.tensor([5, 6])
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x.contiguous(memory_format=torch.channels_last), t))


def test_each_timestep_reaches_its_own_sample():
    model, x = small(), torch.randn(1, 3, 16, 16).expand(3, -1, -1, -1)
    with torch.no_grad():
        y = model(x, torch.tensor([0, 500, 999]))
        assert not torch.allclose(y[0], y[1])
        alone = model(x[:1], torch.tensor([500]))
    torch.testing.assert_close(y[1:2], alone, rtol=1e-4, atol=1e-5)


def test_one_product_projects_time_for_all_blocks():
    model = small()
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    assert model.time_projection.out_features == sum(b.out_channels for b in blocks)
    assert not any(isinstance(m, nn.Linear) for b in blocks for m in b.modules())


def test_fresh_networks_predict_zero_and_have_gradients_everywhere_after_a_step():
    model = UNet(image_size=8, channels=1, dim=32, dim_mults=(1, 2), attention_resolutions=(4,), norm_groups=8)
    x, t = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert (model(x, t) == 0).all()
    for p in randomise(model).parameters():
        assert p.grad is None
    model.train()
    model(x, t).square().mean().backward()
    for name, p in model.named_parameters():
        # The softmax does not move when all keys do, so its bias for k has no gradient.
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_initial_weights_are_the_papers():
    """Xavier-uniform, each projection of t and each of q, k, v being its own layer; zero where a branch ends."""
    model = UNet(image_size=16, dim=64, dim_mults=(1, 2), attention_resolutions=(8,))
    layers = [
        (m.weight, m.weight[0].numel() + m.weight[:, 0].numel()) for m in (model.conv_in, model.up[0].blocks[0].conv1)
    ]
    layers += [(w, w.shape[0] + w.shape[1]) for w in model.time_projection.weight.split(model.blocks_out)]
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            assert not module.conv2.weight.any()
        if isinstance(module, Attention):
            assert not module.out.weight.any()
            layers += [(w, 2 * w.shape[1]) for w in module.qkv.weight.chunk(3)]
        if isinstance(module, nn.GroupNorm):
            assert module.eps == 1e-6
    for weight, fans in layers:
        bound = (6 / fans) ** 0.5
        assert 0.97 * bound < weight.abs().max() <= bound


def test_timesteps_are_embedded_in_float32_whatever_the_weights():
    """bfloat16 holds no odd number above 256."""
    model, seen = small(), []
    model.time_embedding.linear_1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([997, 999])
    model(x, t)
    model.bfloat16()(x, t)
    assert torch.equal(seen[0].bfloat16(), seen[1])


def test_attention_is_softmax_attention_of_each_head():
    attention = randomise(Attention(32, heads=4, groups=8, eps=1e-6))
    x = torch.randn(2, 32, 3, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        tokens = nn.functional.group_norm(x, 8, attention.norm.weight, attention.norm.bias, 1e-6)
        tokens = tokens.flatten(2).transpose(1, 2)  # (N, H * W, C)
        q, k, v = attention.qkv(tokens).chunk(3, dim=2)
        heads = []
        for h in range(4):
            of_head = slice(8 * h, 8 * h + 8)
            scores = q[:, :, of_head] @ k[:, :, of_head].transpose(1, 2) / 8**0.5
            heads.append(scores.softmax(dim=2) @ v[:, :, of_head])
        expected = x + attention.out(torch.cat(heads, dim=2)).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_heads_and_dropout_are_used():
    assert {m.heads for m in small(num_heads=4).modules() if isinstance(m, Attention)} == {4}
    model = small(dropout=0.3)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t))
        assert not torch.equal(model.train()(x, t), model(x, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_drops_each_element_with_its_probability_and_scales_the_others(p, dtype):
    dropout = Dropout(p)
    x = torch.ones(16, 36, 33, 31, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(1)
    y = dropout(x)
    kept = y != 0
    assert (y[kept] == torch.tensor(1 / (1 - round(p * 2**16) / 2**16)).to(dtype)).all()
    lanes = kept.permute(0, 2, 3, 1).reshape(-1, 4).double().mean(0)  # a draw decides on four neighbours
    deviation = (p * (1 - p) / (x.numel() / 4)) ** 0.5
    assert ((lanes - (1 - p)).abs() < 5 * deviation + 2**-17).all()
    samples = kept.flatten(1).double()
    shared = (samples[0] * samples[1]).mean()  # of two samples: independent
    assert (shared - (1 - p) ** 2).abs() < 5 * ((1 - p) ** 2 / samples.shape[1]) ** 0.5
    y.sum().backward()
    assert torch.equal(x.grad, y)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p):
    x = torch.ones(2, 4, 3, 3)
    assert torch.equal(Dropout(p)(x), (1 - p) * x)


def test_dropout_is_made_where_the_images_are():
    x = torch.ones(2, 4, 3, 3)
    with torch.device("meta"):
        assert Dropout(0.5)(x).device == x.device


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18, "dim_mults": (1, 2, 4)}, "image_size=18 cannot be halved 2 times.*multiple of 4"),
        ({"dim": 30}, "dim=30 must be even and a multiple of norm_groups=8"),
        ({"attention_resolutions": (7,)}, r"attention_resolutions has 7, but the levels have H = \[16, 8\]"),
        ({"dim_mults": (0, 1)}, "dim_mults must be an integer of at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, got 0"),
        ({"image_size": (8, 16)}, "image_size must be an integer"),
        ({"num_heads": 3}, "num_heads=3 must divide the 64 channels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_inputs_that_do_not_fit_are_refused_when_it_is_called():
    model = small(dim_mults=(1, 2, 2))
    t = torch.tensor([1])
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\); got \(1, 1, 16, 16\)"):
        model(torch.randn(1, 1, 16, 16), t)
    with pytest.raises(ValueError, match="divisible by 4; got 16 x 18"):
        model(torch.randn(1, 3, 16, 18), t)
    with pytest.raises(ValueError, match=r"shape \(1,\), one timestep a sample; got \(2,\)"):
        model(torch.randn(1, 3, 16, 16), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"t must be timesteps, a tensor \(1,\) or one number; got None"):
        model(torch.randn(1, 3, 16, 16), None)
    with pytest.raises(ValueError, match=r"t must be on the device of x, cpu; got meta"):
        model(torch.randn(1, 3, 16, 16), t.to("meta"))
    with pytest.raises(ValueError, match=r"x must be floating, with images scaled to \[-1, 1\]; got torch.uint8"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), t)
    with pytest.raises(ValueError, match=r"x must be a tensor \(N, 3, H, W\); got list"):
        model([[0.0]], t)
    assert model(torch.randn(1, 3, 32, 20), t).shape == (1, 3, 32, 20)


@pytest.mark.parametrize("one", [7, 7.0, torch.tensor(7), torch.tensor(7.0)])
def test_one_timestep_can_be_given_for_all_samples(one):
    model, x = small(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x, one), model(x, torch.tensor(7).expand(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_six_tenths_of_what_diffusers_keeps_are_kept_for_the_backward_pass(dtype):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
    blocks["up_block_types"] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    sizes = {"sample_size": 32, "block_out_channels": (128, 256, 256, 256), "attention_head_dim": None}
    peer = diffusers.UNet2DModel(**blocks, **sizes, downsample_padding=0).to(memory_format=torch.channels_last)

    def kept(model, batch):
        x = torch.randn(batch, 3, 16, 16).to(memory_format=torch.channels_last)  # a quarter of the network's own size
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), SavedActivations() as memory:
            result = model(x, torch.arange(batch))
        torch.clear_autocast_cache()
        assert result.requires_grad
        return memory.bytes

    def an_image(model):  # without the weights in lower precision
        return (kept(model, 3) - kept(model, 1)) / 2

    ours = an_image(UNet.preset("ddpm-cifar10-32", dropout=0.0))
    least = an_image(UNet.preset("ddpm-cifar10-32", dropout=0.0, gradient_checkpointing=True))
    theirs = an_image(lambda x, t: peer(x, t).sample)
    sizes = ", ".join(f"{size / 2**20:.1f}" for size in (ours, least, theirs))
    print(f"MiB kept for backward an image, {dtype}; with checkpointing; diffusers: {sizes}")
    assert ours <= 0.6 * theirs
    assert least <= 0.5 * ours


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_recomputed_in_the_backward_pass_changes_no_bit(monkeypatch, dropout, checkpointing):
    model, x, t = small(dropout=dropout).train(), torch.randn(2, 3, 16, 16), torch.tensor([5, 600])
    model.gradient_checkpointing = checkpointing

    def gradients():
        torch.manual_seed(0)
        return torch.autograd.grad(model(x, t).square().sum(), list(model.parameters()))

    found = gradients()
    monkeypatch.setattr(layers, "recomputed", lambda *_: contextlib.nullcontext())
    model.gradient_checkpointing = False
    assert all(map(torch.equal, found, gradients()))


def test_the_network_compiles_into_a_full_graph_forwards_and_backwards():
    torch._dynamo.reset()
    model = small(num_res_blocks=1, dim_mults=(1,), attention_resolutions=(16,))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 600])
    compiled = torch.compile(model, fullgraph=True)

    def with_gradients(network):
        y = network(x, t)
        return y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))

    torch.testing.assert_close(with_gradients(compiled), with_gradients(model), rtol=1e-4, atol=1e-4)
    shared = torch.tensor(7).expand(2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, shared), model(x, shared), rtol=1e-4, atol=1e-5)


# Under the tools of others


class Adapter(nn.Module):
    """A low-rank adapter around a layer, as peft's LoRA: other layers, and a forward that takes x alone."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        if isinstance(base, nn.Conv2d):
            self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)
            self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def replace_layers(model, wrap):
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name in layers:
        parent, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, attribute, wrap(getattr(parent, attribute)))
    return model


@pytest.mark.parametrize("wrap", [Adapter, nn.Sequential])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_convolution_and_linear_layer_can_be_wrapped(wrap, dtype):
    model, x = small(num_res_blocks=1).to(dtype), torch.randn(2, 3, 16, 16)
    own, shared = torch.tensor([5, 600]), torch.tensor(7).expand(2)
    with torch.no_grad():
        expected = model(x, own), model(x, shared), model(x, 0, model.time_rows(own)[1])
    wrapped = replace_layers(model, wrap).to(dtype)
    with torch.no_grad():
        found = wrapped(x, own), wrapped(x, shared), wrapped(x, 0, wrapped.time_rows(own)[1])
    unit = torch.finfo(dtype).eps  # a sum that was rounded once is rounded twice
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=16 * unit, atol=16 * unit)
    with torch.no_grad():
        assert torch.equal(wrapped(x, shared), wrapped(x, own, time_row=wrapped.time_rows(shared[:1])[0]))
    wrapped(x, own).square().sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters())


def test_hooks_see_and_change_what_a_convolution_alone_returns():
    model, x, t, seen = small(), torch.randn(2, 3, 16, 16), torch.tensor(7).expand(2), []
    block = model.mid_block1
    for conv in (block.conv1, block.conv2):
        conv.register_forward_hook(lambda conv, inputs, output: seen.append((conv, inputs[0], output)))
    with torch.no_grad():
        model(x, t)
        for conv, inputs, output in seen:
            assert torch.equal(output, nn.functional.conv2d(inputs, conv.weight, conv.bias, padding=1))
        assert len(seen) == 2
        block.conv2.register_forward_hook(lambda conv, inputs, output: torch.zeros_like(output))
        h = torch.randn(2, 64, 8, 8)
        assert torch.equal(block(h, torch.zeros(1, 64)), h)


def test_parameters_and_gradients_are_contiguous():
    model = small().train()
    model(torch.randn(2, 3, 16, 16), torch.tensor([5, 600])).square().sum().backward()
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in model.parameters())
    assert nn.utils.parameters_to_vector(model.parameters()).numel() == sum(p.numel() for p in model.parameters())


def test_a_network_loaded_by_assignment_trains_on_with_fused_adamw_in_the_same_bits():
    """Whatever the format of the weights in the file: the moments lie as the weights do."""

    def steps(model, optimizer, count):
        for i in range(count):
            generator = torch.Generator().manual_seed(i)
            x, t = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([5, 600])
            optimizer.zero_grad()
            model(x, t).square().sum().backward()
            optimizer.step()

    sizes = {"dim": 8, "num_res_blocks": 1, "attention_resolutions": ()}
    model = small(**sizes)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    steps(model, optimizer, 1)
    weights = {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in model.state_dict().items()}
    resumed = small(**sizes)
    resumed.load_state_dict(weights, assign=True)
    moments = torch.optim.AdamW(resumed.parameters(), fused=True)
    moments.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 1)
    steps(resumed, moments, 1)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_one_graph_serves_all_batch_sizes(monkeypatch):
    """Of the network itself; the group norm is PyTorch's here."""

    def norm(x, weight, bias, groups, eps, *, silu=True):
        y = nn.functional.group_norm(x, groups, weight, bias, eps)
        return nn.functional.silu(y) if silu else y

    monkeypatch.setattr(group_norm, "ops", SimpleNamespace(group_norm_silu=norm))
    torch._dynamo.reset()
    graphs = []
    model = small(image_size=8, dim=8, dim_mults=(1,), num_res_blocks=1, attention_resolutions=())
    compiled = torch.compile(
        model, backend=lambda graph, _: graphs.append(graph) or graph, dynamic=True, fullgraph=True
    )
    with torch.no_grad():
        for n in (4, 7, 3):
            x, t = torch.randn(n, 3, 8, 8), torch.arange(n)
            torch.testing.assert_close(compiled(x, t), model(x, t))  # conv1 may keep its bias when it is compiled
    assert len(graphs) == 1
