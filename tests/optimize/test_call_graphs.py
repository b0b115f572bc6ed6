"""Calls of optimised networks by graphs, which are recorded here: see recorded_graphs.py."""

import copy
import gc
import pickle
import threading
import warnings
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import recorded_graphs
import torch
from optimized_networks import NETWORKS, Calls, diffusers_unet, inputs, make, predict
from torch import nn

import ddpm_fast
from ddpm_fast import GaussianDiffusion, cuda_graph, graph_keys, kept_graphs, optimize, restore
from ddpm_fast.nn.optimized_modules import SHARED

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:diffusers.*")


@pytest.fixture
def captures(monkeypatch):
    yield recorded_graphs.use(monkeypatch)
    kept_graphs._graphs.clear()


@pytest.fixture
def without(monkeypatch):
    """A function that calls another without graphs."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(cuda_graph, "enabled", lambda x: False)
            return function(*args, **kwargs)

    return call


def graphs_of(model):
    return vars(model)[SHARED].graphs


class Small(nn.Module):
    channels = 3

    def __init__(self):
        super().__init__()
        self.gain = 1.0
        self.conv_in, self.conv_out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm, self.act = nn.GroupNorm(2, 8), nn.SiLU()
        self.register_buffer("offset", torch.full((8, 1, 1), 0.1))

    def forward(self, x, t, gain=1.0, extra=None):
        t = torch.as_tensor(t, device=x.device).reshape(-1, 1, 1, 1) / 1000
        h = self.act(self.norm(self.conv_in(x) + t.to(x.dtype) + self.offset)) * self.gain * gain
        return self.conv_out(h if extra is None else h + extra["label"])


@pytest.fixture
def small():
    return optimize(Small().eval(), torch.float32)


def calls(model, n, *args, **kwargs):
    with torch.no_grad():
        return [model(*args, **kwargs) for _ in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_replayed_calls_have_the_bits_of_plain_ones(captures, without, name, dtype):
    model = optimize(make(name), dtype)
    for k, seed in enumerate((1, 2, 3, 4)):
        x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)), torch.tensor([seed, 97 * seed])
        assert torch.equal(predict(model, x, t), without(predict, model, x, t))
        assert len(captures) == (k > 0)


def test_a_result_that_is_kept_does_not_change_with_the_next_call(captures, small):
    x, t = inputs()
    calls(small, 2, x, t)
    with torch.no_grad():
        first = small(x, t)
        before = first.clone()
        second = small(-x, t)
    assert torch.equal(first, before)
    assert not torch.equal(first, second)
    assert len(captures) == 1


def test_inputs_are_left_as_they_are(captures, small):
    x, t = inputs()
    before = x.clone()
    calls(small, 3, x, t)
    calls(small, 1, -x, t)
    assert torch.equal(x, before)


def test_tensors_are_copied_wherever_they_are_and_everything_else_is_the_form(captures, without, small):
    x, t = inputs()
    for k, (gain, value) in enumerate([(1.0, 0.1), (1.0, 0.2), (2.0, 0.3), (2.0, 0.4), (True, 0.4), (True, 0.5)]):
        label = {"label": torch.full((2, 8, 1, 1), value)}
        (found,) = calls(small, 1, x, t, gain=gain, extra=label)
        assert torch.equal(found, without(calls, small, 1, x, t, gain=gain, extra=label)[0])
        assert len(captures) == (k + 1) // 2
    for times in (t.float(), t[:1], torch.tensor(5), t.float()[::2]):
        for found, expected in zip(calls(small, 3, x, times), without(calls, small, 3, x, times), strict=True):
            assert torch.equal(found, expected)
    assert len(captures) == 7


def test_a_number_that_is_another_one_in_every_call_is_never_captured(captures, without, small):
    x, _ = inputs()
    for _ in range(2):
        for t in range(3):
            assert torch.equal(*calls(small, 1, x, t), *without(calls, small, 1, x, t))
    assert not captures
    for _ in range(3):  # as with and without classifier-free guidance
        for n in (1, 2):
            calls(small, 1, x[:n], 7)
    assert len(captures) == 2
    assert len(graphs_of(small)._kept) == graph_keys.MOST


def test_the_backend_and_inference_mode_are_captured_by_themselves(captures, small):
    x, t = inputs()
    plain = calls(small, 2, x, t)[0]
    with torch.inference_mode():
        assert torch.equal(calls(small, 2, x, t)[0], plain)
        assert small(x, t).is_inference()
    assert not calls(small, 1, x, t)[0].is_inference()
    with ddpm_fast.backend("reference"):
        torch.testing.assert_close(calls(small, 2, x, t)[0], plain)
    assert len(captures) == 3


def test_weights_that_are_written_to_are_followed(captures, without, small):
    x, t = inputs()
    before = calls(small, 2, x, t)[0]
    with torch.no_grad():
        small.offset.mul_(5)
        for p in small.parameters():
            p.data.mul_(1.5)
    (found,) = calls(small, 1, x, t)
    assert not torch.equal(found, before)
    assert len(captures) == 1


def replace_data(model):
    model.norm.weight.data = model.norm.weight.data * 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "gain", 0.5),
        lambda m: setattr(m, "offset", m.offset + 1),
        lambda m: setattr(m.norm, "weight", nn.Parameter(m.norm.weight * 0.5)),
        replace_data,
        lambda m: setattr(m, "act", nn.Tanh().eval()),
        lambda m: setattr(m.act, "__class__", nn.Tanh),
        lambda m: m.add_module("conv_in", nn.Sequential(m.conv_in, nn.Tanh()).eval()),
    ],
    ids=["setting", "buffer", "weight", "data", "module", "class", "deeper module"],
)
def test_a_changed_network_forgets_its_graphs(captures, without, small, change):
    x, t = inputs()
    before = calls(small, 3, x, t)[0]
    change(small)
    for found in calls(small, 3, x, t):
        assert torch.equal(found, *without(calls, small, 1, x, t))
        assert not torch.equal(found, before)
    assert len(captures) == 2
    assert len(graphs_of(small)._kept) == 1


def test_hooks_of_the_network_are_called_and_those_within_it_keep_it_from_being_captured(captures, without, small):
    x, t = inputs()
    seen = []
    small.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    doubled = calls(small, 4, x, t)
    assert len(seen) == 4
    assert len(captures) == 1
    assert torch.equal(doubled[3], *without(calls, small, 1, x, t))
    hook = small.act.register_forward_hook(lambda module, args, output: seen.append(output) or output * 0)
    with pytest.warns(UserWarning, match="without a CUDA graph, which cannot be captured: act has a hook"):
        calls(small, 1, x, t)
    seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the reason was given
        calls(small, 2, x, t)
    assert len(seen) == 4
    hook.remove()
    assert torch.equal(calls(small, 3, x, t)[2], doubled[0])
    assert len(captures) == 2


def watched(model, x, t):
    counts = []
    for _ in range(3):
        with Calls() as mode:
            model(x, t)
        counts.append(mode.counts)
    assert [count["ddpm_fast::group_norm_silu(silu)"] for count in counts] == [1] * 3


@pytest.mark.parametrize(
    "plain",
    [
        lambda m, x, t: [m.train()(x, t) for _ in range(3)],
        lambda m, x, t: [torch.enable_grad()(m)(x, t) for _ in range(3)],
        lambda m, x, t: [torch.func.vmap(m)(x[:, None], t) for _ in range(3)],
        lambda m, x, t: [torch.func.jvp(lambda x: m(x, t), (x,), (x,)) for _ in range(3)],
        lambda m, x, t: [cuda_graph.without()(m)(x, t) for _ in range(3)],
        watched,
    ],
    ids=["training", "gradients", "vmap", "jvp", "another capture", "a mode"],
)
def test_other_calls_are_as_ever(captures, small, plain):
    with torch.no_grad():
        plain(small, *inputs())
    assert not captures


@pytest.mark.parametrize("training", [False, True])
def test_there_is_no_graph_in_the_graph_of_a_sampling_run(captures, without, small, training):
    diffusion = GaussianDiffusion(small.train(training), image_size=8, timesteps=6, objective="pred_v")
    for seed in (1, 2):
        found = diffusion.sample(2, seed=seed)
        assert torch.equal(found, without(diffusion.sample, 2, seed=seed))
    assert len(captures) == 1
    assert not graphs_of(small)._kept


def test_a_run_step_by_step_uses_the_graph_of_the_network(captures, without, small, monkeypatch):
    diffusion = GaussianDiffusion(small.train(), image_size=8, timesteps=6, objective="pred_v")
    monkeypatch.setattr("ddpm_fast.sampling_run.kept_graph", lambda *args: None)
    found = diffusion.sample(2, seed=1)
    assert len(captures) == 1  # by the copy in evaluation mode that the run makes, and for later runs too
    assert torch.equal(diffusion.sample(2, seed=1), found)
    assert torch.equal(without(diffusion.sample, 2, seed=1), found)
    assert len(captures) == 1


class Writes(Small):
    def forward(self, x, t):
        return super().forward(x.mul_(0.5), t)


class Odd(Small):
    def forward(self, x, t):
        return SimpleNamespace(sample=super().forward(x, t))


class Subclass(torch.Tensor):
    pass


class Labels:
    def __getitem__(self, name):
        return 0


class Typed(Small):
    def forward(self, x, t):
        return super().forward(x, t).as_subclass(Subclass)


@pytest.mark.parametrize(
    ("network", "argument", "reason"),
    [
        (Writes, {}, "it writes to its inputs"),
        (Odd, {}, "it takes or returns a SimpleNamespace"),
        (Typed, {}, "it takes or returns a Subclass"),
        (Small, {"extra": Labels()}, "it takes or returns a Labels"),
        (Small, {"gain": torch.ones(()).as_subclass(Subclass)}, "it takes or returns a Subclass"),
    ],
)
def test_what_a_graph_would_get_wrong_is_called_as_it_is(captures, network, argument, reason):
    model = optimize(network().eval(), torch.float32)
    x, t = inputs()
    start, results = x.clone(), []
    with pytest.warns(UserWarning, match=f"cannot be captured: {reason}"):
        results += calls(model, 2, x, t, **argument)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results += calls(model, 2, x, t, **argument)
    assert len(captures) == 0
    if network is Writes:
        assert torch.equal(x, start / 16)


@pytest.mark.parametrize("error", [cuda_graph.CannotCapture("it waits"), torch.OutOfMemoryError("it waits")])
def test_what_cannot_be_captured_is_tried_once_and_the_reason_is_given_once(
    captures, without, small, monkeypatch, error
):
    tried = []

    def fail(step, device):
        step()
        tried.append(device)
        raise error

    monkeypatch.setattr(cuda_graph, "capture", fail)
    x, t = inputs()
    with pytest.warns(UserWarning, match="without a CUDA graph, which cannot be captured: it waits"):
        results = calls(small, 5, x, t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(small, 3, x[:1], t[:1])
    assert len(tried) == 2
    assert all(torch.equal(y, *without(calls, small, 1, x, t)) for y in results)


def test_weights_on_another_device_are_a_reason(captures, small):
    small.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    with pytest.warns(UserWarning, match="not all of its weights are on cpu"):
        calls(small, 3, *inputs())
    assert not captures


def test_a_module_in_training_mode_is_a_reason(captures, small):
    small.act.train()
    with pytest.warns(UserWarning, match="act is in training mode"):
        calls(small, 3, *inputs())
    assert not captures
    small.eval()
    calls(small, 3, *inputs())
    assert len(captures) == 1


def test_restore_forgets_the_graphs(captures, small):
    x, t = inputs()
    calls(small, 2, x, t)
    graph = weakref.ref(*graphs_of(small)._kept.values())
    restore(small)
    assert graph() is None
    calls(small, 3, x, t)
    assert len(captures) == 1


def test_graphs_are_not_kept_beyond_the_network(captures):
    model = optimize(Small().eval(), torch.float32)
    calls(model, 3, *inputs())
    gone = weakref.ref(model.conv_in)
    graph = weakref.ref(*graphs_of(model)._kept.values())
    gc.collect()
    gc.disable()
    try:
        vars(model)["_ddpm_fast_state"] = None  # which refers to the modules, as they to it
        del model
        assert graph() is None
        assert gone() is None
    finally:
        gc.enable()


def test_copies_and_pickles_have_no_graphs(captures):
    model = optimize(make("plain"), torch.bfloat16)
    x, t = inputs()
    expected = calls(model, 2, x, t)[1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not graphs_of(other)._kept
        assert torch.equal(calls(other, 3, x, t)[2], expected)
    assert len(captures) == 3


def test_threads_may_call_one_network(captures, without, small):
    x, t = inputs()
    calls(small, 2, x, t)
    results = {}

    def work(k):
        results[k] = [calls(small, 1, x * k, t)[0] for _ in range(20)]

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, found in results.items():
        (expected,) = without(calls, small, 1, x * k, t)
        assert all(torch.equal(y, expected) for y in found)
    assert len(captures) == 1


class Pair(NamedTuple):
    y: torch.Tensor
    half: torch.Tensor
    name: str


def test_results_of_several_tensors_keep_their_classes(captures, without):
    class Several(Small):
        def forward(self, x, t):
            y = super().forward(x, t)
            return {"pair": Pair(y, y[:, ::2], "both"), "list": [y, None], "x": x}

    model, (x, t) = optimize(Several().eval(), torch.float32), inputs()
    for _ in range(3):
        found, expected = calls(model, 1, x, t)[0], without(calls, model, 1, x, t)[0]
        assert type(found["pair"]) is Pair
        assert found["pair"].name == "both"
        assert torch.equal(found["pair"].half, expected["pair"].half)
        assert torch.equal(found["list"][0], expected["list"][0])
        assert found["list"][1] is None
        assert torch.equal(found["x"], x)
    assert len(captures) == 1


def test_a_pipeline_of_diffusers_replays_one_graph(captures, without):
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    model = optimize(diffusers_unet().eval(), torch.bfloat16)
    pipe = diffusers.DDIMPipeline(unet=model, scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images():
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(2, generator=generator, num_inference_steps=5, output_type="np").images)

    assert torch.equal(images(), without(images))
    assert len(captures) == 1
