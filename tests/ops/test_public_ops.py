"""The public ops: what they accept, what they refuse, and which backend computes them."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from calls import OPS, arguments, call

import ddpm_fast
from ddpm_fast import ops
from ddpm_fast.ops import dispatch, native

LAYOUTS = {
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "reversed axes": lambda x: x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_any_strides_give_the_same_result(op, layout):
    args, kwargs = arguments(op, layout="contiguous")
    change = LAYOUTS[layout]
    strided = tuple(change(x) if isinstance(x, torch.Tensor) else x for x in args)
    strided_kwargs = {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    assert torch.equal(call(op, strided, strided_kwargs), call(op, args, kwargs))


@pytest.mark.parametrize("op", ["q_sample", "reverse_step", "group_norm_silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_results_lie_in_memory_as_the_input_does(op, layout):
    args, kwargs = arguments(op, layout=layout)
    assert call(op, args, kwargs).stride() == args[0].stride()


@pytest.mark.parametrize("op", OPS)
def test_channels_last_and_contiguous_hold_the_same_numbers(op):
    """The noise of keys too: it belongs to the pixel, not to where that lies."""
    results = [call(op, *arguments(op, layout=layout)) for layout in ("contiguous", "channels last")]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_the_data(dtype):
    args, kwargs = arguments("group_norm_silu", dtype)
    args = (args[0], args[1].float(), args[2].float(), args[3])  # parameters stay float32 under autocast
    with torch.autocast("cpu", dtype):
        assert ops.group_norm_silu(*args, **kwargs).dtype == dtype
        pred, t, rows = arguments("weighted_loss", dtype)[0]
        x_start, keys = arguments("weighted_loss")[1].values()
        assert ops.weighted_loss(pred, t, rows, x_start=x_start, keys=keys).dtype == torch.float32


def test_bytes_are_scaled_to_the_range_of_the_network():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    t, rows = torch.zeros(1, dtype=torch.int64), torch.tensor([[1.0, 0.0]])
    x_t = ops.q_sample(pixels, t, rows, noise=torch.zeros(1, 1, 16, 16))
    torch.testing.assert_close(x_t.flatten(), torch.linspace(-1, 1, 256))


def test_a_dtype_may_be_asked_for():
    args, kwargs = arguments("q_sample")
    assert ops.q_sample(*args, **kwargs, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("op", ["q_sample", "vlb_terms", "reverse_step"])
def test_float64_may_be_mixed_with_others(op):
    args, kwargs = arguments(op)
    if op == "q_sample":
        assert ops.q_sample(*args, **kwargs, dtype=torch.float64).dtype == torch.float64
        return
    place = {"vlb_terms": 2, "reverse_step": 1}[op]  # pred
    mixed = (*args[:place], args[place].double(), *args[place + 1 :])
    assert torch.equal(call(op, mixed, kwargs), call(op, args, kwargs))


def test_the_next_input_of_the_network_is_x_in_its_dtype():
    args, kwargs = arguments("reverse_step", torch.bfloat16)
    step = ops.reverse_step(*args, **kwargs, return_model_input=True)
    assert (step.x.dtype, step.model_input.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(step.model_input, step.x.bfloat16())


def test_what_was_not_asked_for_is_none():
    args, kwargs = arguments("reverse_step")
    step = ops.reverse_step(*args, **kwargs | {"return_x_start": False})
    assert step.x_start is None
    assert step.model_input is None


def test_keys_of_all_steps_are_indexed_like_the_rows():
    (x, pred, _, rows), kwargs = arguments("reverse_step")
    keys = torch.randint(2**62, (len(rows), len(x), 2))
    t = torch.tensor([7, 0, 19])
    whole = ops.reverse_step(x, pred, t, rows, **kwargs | {"keys": keys}).x
    for n, step in enumerate(t.tolist()):
        own = {"keys": keys[step, n : n + 1]} | {k: v[n : n + 1] for k, v in kwargs.items() if k in NAMES}
        alone = ops.reverse_step(x[n : n + 1], pred[n : n + 1], torch.tensor(step), rows, **own).x
        assert torch.equal(alone[0], whole[n])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_step_writes_to_what_it_is_given_to_write_to(backend):
    args, kwargs = arguments("reverse_step", torch.bfloat16)
    with ddpm_fast.backend(backend):
        expected = ops.reverse_step(*args, **kwargs, return_model_input=True)
        out = ops.ReverseStep(*map(torch.zeros_like, expected))
        version = out.x._version
        assert ops.reverse_step(*args, **kwargs, out=out) is out
        assert all(map(torch.equal, out, expected))
        assert out.x._version > version  # so that autograd finds what it has saved, changed
        only = ops.ReverseStep(torch.zeros_like(expected.x), None, None)
        assert torch.equal(ops.reverse_step(*args, **kwargs, out=only).x, expected.x)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("x", None),
        ("x", torch.zeros(3, 4, 6, 5)),  # not channels-last
        ("x_start", torch.zeros(3, 4, 6, 6).to(memory_format=torch.channels_last)),
        ("model_input", torch.zeros(3, 4, 6, 5, dtype=torch.float16).to(memory_format=torch.channels_last)),
    ],
)
def test_what_cannot_be_written_to_is_an_error(field, value):
    args, kwargs = arguments("reverse_step", torch.bfloat16)
    out = ops.ReverseStep(*ops.reverse_step(*args, **kwargs, return_model_input=True))._replace(**{field: value})
    with pytest.raises(ValueError, match=rf"reverse_step needs out.{field} in .*; got x"):
        ops.reverse_step(*args, **kwargs, out=out)


def test_nothing_is_written_where_a_gradient_is_wanted():
    (x, *args), kwargs = arguments("reverse_step")
    out = ops.ReverseStep(torch.zeros_like(x), None, None)
    with pytest.raises(ValueError, match="only where no gradient is wanted"):
        ops.reverse_step(x.requires_grad_(), *args, **kwargs, out=out)
    assert not out.x.any()


NAMES = ("x_start_prev", "variance")

WRONG = {
    "q_sample": {
        "x_start": [torch.zeros(3, 4, 6, 5, dtype=torch.int32), torch.zeros(())],
        "t": [torch.zeros(4, dtype=torch.int64), torch.zeros(3)],
        "rows": [torch.zeros(20, 3), torch.zeros(20)],
        "keys": [None, torch.zeros(4, 2, dtype=torch.int64), torch.zeros(3, 2)],
        "noise": [torch.zeros(3, 4, 6, 5)],  # beside the keys
    },
    "weighted_loss": {
        "pred": [torch.zeros(3, 4, dtype=torch.int64)],
        "t": [torch.zeros(3)],
        "rows": [torch.zeros(20, 2)],
        "x_start": [torch.zeros(3, 4, 6, 4)],
        "noise": [torch.zeros(3, 4, 6, 5)],
    },
    "reverse_step": {
        "x": [torch.zeros(3, 4, 6, 5, dtype=torch.int32)],
        "pred": [torch.zeros(3, 4, 6, 4)],
        "step": [torch.zeros(2, dtype=torch.int64), torch.zeros(())],
        "rows": [torch.zeros(20, 6)],  # with a variance, 8
        "keys": [torch.zeros(19, 3, 2, dtype=torch.int64)],
        "clip": [torch.zeros(3, 3)],
        "variance": [torch.zeros(3)],
    },
    "vlb_terms": {"x_start": [torch.zeros(2)], "pred": [torch.zeros(2)], "rows": [torch.zeros(20, 6)]},
    "group_norm_silu": {
        "x": [torch.zeros(3)],
        "weight": [torch.zeros(5)],
        "groups": [3, 0],
        "scale": [None, torch.zeros(4)],
    },
    "add_group_norm_silu": {
        "x": [torch.zeros(3), torch.zeros(3, 4, 6, 5, dtype=torch.int32)],
        "weight": [torch.zeros(4)],
        "groups": [4, 0],
        "scale": [None, torch.zeros(3, 4)],
        "input_bias": [torch.zeros(6), torch.zeros(2, 4), torch.zeros(4, dtype=torch.int64)],
        "residual": [torch.zeros(3, 6, 6, 5), torch.zeros(3, 4, 6, 5, dtype=torch.int32)],
        "skip": [torch.zeros(3, 3, 6, 5), torch.zeros(3, 2, 5, 5), torch.zeros(3, 2, 30)],
    },
}
POSITIONAL = {
    "q_sample": ("x_start", "t", "rows"),
    "weighted_loss": ("pred", "t", "rows"),
    "reverse_step": ("x", "pred", "step", "rows"),
    "vlb_terms": ("x_start", "x_t", "pred", "t", "rows"),
    "group_norm_silu": ("x", "weight", "bias", "groups"),
    "add_group_norm_silu": ("x", "weight", "bias", "groups"),
}


@pytest.mark.parametrize(
    ("op", "name", "value"), [(op, name, value) for op in WRONG for name in WRONG[op] for value in WRONG[op][name]]
)
def test_what_does_not_fit_is_an_error_that_says_what_is_needed(op, name, value):
    args, kwargs = arguments(op)
    everything = dict(zip(POSITIONAL[op], args, strict=True)) | kwargs | {name: value}
    with pytest.raises(ValueError, match=rf"^{op} needs .*; got "):
        getattr(ops, op)(**everything)


def test_an_unknown_loss_or_reduction_is_an_error_that_names_the_known():
    args, kwargs = arguments("weighted_loss")
    with pytest.raises(ValueError, match="unknown loss_type 'l3'; there are l2, l1, huber"):
        ops.weighted_loss(*args, **kwargs, loss_type="l3")
    with pytest.raises(ValueError, match="unknown reduction 'sum'; there are none, mean"):
        ops.weighted_loss(*args, **kwargs, reduction="sum")


@pytest.mark.parametrize("wrong", [-1, 20, 2**40])
@pytest.mark.parametrize("backend", [None, "default"])
@pytest.mark.parametrize(
    ("op", "place", "name"),
    [("q_sample", 1, "t"), ("weighted_loss", 1, "t"), ("reverse_step", 2, "step"), ("vlb_terms", 3, "t")],
)
def test_an_index_outside_the_rows_is_an_error_that_names_it(op, place, name, backend, wrong, monkeypatch):
    args, kwargs = arguments(op)
    index = args[place].clone()
    index[2] = wrong
    args = (*args[:place], index, *args[place + 1 :])
    if backend == "default":  # the kernel of devices that have no other
        monkeypatch.setattr(dispatch.Op, "__call__", lambda self, like, **_: self.kernel)
    with pytest.raises(RuntimeError, match=rf"{op}: {name}\[2\] is {wrong}, but rows has 20, counted from 0"):
        call(op, args, kwargs)


# Which backend computes an op


def test_the_reference_can_be_asked_for():
    args, kwargs = arguments("group_norm_silu")
    with ddpm_fast.backend("reference"):
        y = ops.group_norm_silu(args[0].requires_grad_(), *args[1:], **kwargs)
    assert "ddpm_fast" not in y.grad_fn.name()
    if native.modules["cpu"].available:
        assert "ddpm_fast" in ops.group_norm_silu(*args, **kwargs).grad_fn.name()


def test_float64_is_always_served_by_the_reference():
    args, kwargs = arguments("group_norm_silu", torch.float64)
    assert "ddpm_fast" not in ops.group_norm_silu(args[0].requires_grad_(), *args[1:], **kwargs).grad_fn.name()


def test_an_unknown_backend_is_an_error_that_names_the_known():
    match = "unknown backend 'metal'; there are reference, cpu, triton, cuda"
    with pytest.raises(ValueError, match=match), ddpm_fast.backend("metal"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_serve_is_an_error_with_the_reason(name):
    args, kwargs = arguments("q_sample")
    with ddpm_fast.backend(name), pytest.raises(RuntimeError, match=rf"q_sample: backend '{name}' was asked for, but"):
        ops.q_sample(*args, **kwargs)
    ops.q_sample(*args, **kwargs)


def test_the_choice_ends_with_its_context_even_by_an_error():
    with pytest.raises(KeyError), ddpm_fast.backend("reference"), ddpm_fast.backend(None):
        raise KeyError
    assert dispatch.chosen() is None


def test_the_environment_can_choose():
    code = "from ddpm_fast.ops import dispatch; print(dispatch.chosen())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DDPM_FAST_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "reference"
    wrong = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"DDPM_FAST_BACKEND": "metal"}, capture_output=True, text=True
    )
    assert "unknown backend 'metal'; there are" in wrong.stderr


def test_a_fallback_is_said_once(monkeypatch):
    monkeypatch.setitem(native.modules, "cpu", native.Module(False, "the module was not built: no C++ compiler"))
    monkeypatch.setattr(dispatch, "_unannounced", {"cpu"})
    monkeypatch.setattr(dispatch, "_told", set())
    args, kwargs = arguments("q_sample")
    with pytest.warns(UserWarning, match="plain PyTorch on cpu tensors: the module was not built: no C\\+\\+ compiler"):
        ops.q_sample(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.q_sample(*args, **kwargs)


@pytest.fixture
def an_old_gpu(monkeypatch):
    """A CUDA module without kernels for cuda:1, one of two GPUs; gives what stands for a tensor on each of them."""
    fault = "the CUDA module was compiled for GPUs of compute capability 7.5, and Tesla V100 has 7.0"
    monkeypatch.setitem(native.modules, "cuda", native.Module(True, "", "_cuda.abi3.so"))
    monkeypatch.setattr(dispatch, "_unannounced", set())
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch, "_unserved", {1: fault})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return [SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32) for index in (0, 1)]


def test_a_gpu_without_kernels_is_served_in_plain_pytorch_and_the_reason_is_said_once(an_old_gpu):
    op, (new, old) = dispatch.OPS["q_sample"], an_old_gpu
    with pytest.warns(UserWarning, match="plain PyTorch on cuda:1 tensors: .* 7.5, and Tesla V100 has 7.0"):
        assert op(old) is op.reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op(old) is op.reference
        assert op(new) is op.automatic
        assert op(torch.zeros(2)) is op.automatic
        with ddpm_fast.backend("triton"):
            assert op.kernel_of("triton") is op.triton


def test_the_cuda_backend_asked_for_on_a_gpu_without_kernels_is_an_error_with_the_reason(an_old_gpu):
    op, (new, old) = dispatch.OPS["q_sample"], an_old_gpu
    with ddpm_fast.backend("cuda"):
        assert op(new) is op.automatic
        with pytest.raises(
            RuntimeError, match="q_sample: backend 'cuda' was asked for, but the CUDA module was compiled"
        ):
            op(old)


def test_the_cuda_backend_is_unavailable_only_where_no_gpu_has_kernels(an_old_gpu, monkeypatch):
    assert dispatch.availability("cuda") == (True, "")
    monkeypatch.setattr(dispatch, "_unserved", dict.fromkeys((0, 1), dispatch._unserved[1]))
    assert dispatch.availability("cuda") == (False, dispatch._unserved[1])


def test_compiled_code_calls_the_reference_on_a_gpu_without_kernels(monkeypatch):
    """The CPU, whose index is None, stands for the GPU."""
    monkeypatch.setattr(dispatch, "_fault_of_gpu", lambda tensor: dispatch._unserved.get(tensor.device.index, ""))
    args, kwargs = arguments("group_norm_silu")

    def graph_for(unserved):
        monkeypatch.setattr(dispatch, "_unserved", unserved)
        torch._dynamo.reset()
        graphs = []

        def keep(graph, _):
            graphs.append(graph.code)
            return graph.forward

        torch.compile(lambda *args: call("group_norm_silu", args, kwargs), fullgraph=True, backend=keep)(*args)
        return graphs[0]

    assert "ddpm_fast.group_norm_silu" in graph_for({})
    assert "ddpm_fast" not in graph_for({None: "no kernels"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has a GPU")
def test_triton_can_be_asked_for_where_a_simulator_is_its_driver():
    pytest.importorskip("triton")
    import ptxsim.triton

    args, kwargs = arguments("q_sample")
    with ptxsim.triton.simulate(cc=90) as launches, ddpm_fast.backend("triton"):
        dispatch.triton_fault("cpu")  # launches a kernel when it is called first
        launches.clear()
        x_t = ops.q_sample(*args, **kwargs)
    assert len(launches) == 1
    torch.testing.assert_close(x_t, ops.q_sample(*args, **kwargs), rtol=1e-5, atol=1e-5)


def test_where_triton_cannot_launch_the_reference_serves_and_the_reason_is_said_once(monkeypatch):
    calls = []

    def no_compiler(name, *args):
        calls.append(name)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(dispatch, "by_triton", no_compiler)
    monkeypatch.setattr(dispatch, "_triton_device", lambda: "cpu")
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_told", set())
    dispatch.triton_fault.cache_clear()
    x, args = torch.rand(2, 3), (None, None)
    try:
        with pytest.warns(UserWarning, match="plain PyTorch on cpu tensors: .*RuntimeError: Failed to find C compiler"):
            assert dispatch.by_triton_if_it_works("q_sample", lambda x, *rest: x + 1, x, *args).equal(x + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dispatch.by_triton_if_it_works("q_sample", lambda x, *rest: x + 1, x, *args).equal(x + 1)
        assert calls == ["fold_in"]  # asked once, and with the smallest kernel
        args, kwargs = arguments("q_sample")
        with ddpm_fast.backend("triton"), pytest.raises(RuntimeError, match="Failed to find C compiler"):
            ops.q_sample(*args, **kwargs)
    finally:
        dispatch.triton_fault.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has a GPU")
def test_the_probe_launches_one_kernel():
    pytest.importorskip("triton")
    import ptxsim.triton

    dispatch.triton_fault.cache_clear()
    with ptxsim.triton.simulate(cc=90) as launches:
        assert dispatch.triton_fault("cpu") == ""
        assert dispatch.triton_fault("cpu") == ""
    assert len(launches) == 1
