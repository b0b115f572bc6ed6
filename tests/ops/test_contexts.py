"""Backend contexts of threads and generators, gradients of scaled losses, what is refused, and dynamic batches."""

import threading

import pytest
import torch
import torch.nn.functional as F
from calls import OPS, arguments, call

from ddpm_fast import ops
from ddpm_fast.ops import dispatch


def test_contexts_that_overlap_leave_nothing_behind():
    first, second = ops.backend("cpu"), ops.backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.chosen() == "reference"
    second.__exit__(None, None, None)
    assert dispatch.chosen() is None


def test_a_thread_keeps_its_own_choice():
    seen = []
    with ops.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.chosen()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_the_choice_before_an_error_holds_after_it():
    with ops.backend("reference"):
        with pytest.raises(KeyError), ops.backend("cpu"):
            raise KeyError
        assert dispatch.chosen() == "reference"


@pytest.mark.parametrize("op", ["q_sample", "weighted_loss", "reverse_step", "vlb_terms"])
def test_a_negative_index_is_an_error_of_the_reference_too(op):
    args, kwargs = arguments(op)
    place = {"q_sample": 1, "weighted_loss": 1, "reverse_step": 2, "vlb_terms": 3}[op]
    args = (*args[:place], args[place] - 30, *args[place + 1 :])
    with ops.backend("reference"), pytest.raises(RuntimeError, match=r"\[0\] is -30, but rows has 20"):
        call(op, args, kwargs)


@pytest.mark.parametrize("op", ["weighted_loss", "vlb_terms"])
def test_integers_other_than_bytes_are_no_images(op):
    (first, *others), kwargs = arguments(op)
    if op == "vlb_terms":
        first = first.int()
    else:
        kwargs["x_start"] = kwargs["x_start"].int()
    with pytest.raises(ValueError, match=f"{op} needs x_start floating or uint8"):
        call(op, (first, *others), kwargs)


def test_a_step_is_not_written_to_the_memory_of_another_input():
    (x, pred, step, rows), kwargs = arguments("reverse_step")
    for name, out in {"pred": pred, "x_start_prev": kwargs["x_start_prev"]}.items():
        with pytest.raises(ValueError, match=rf"cannot write out\.x to the memory of {name}"):
            ops.reverse_step(x, pred, step, rows, **kwargs, out=ops.ReverseStep(out, None, None))
    y = torch.empty_like(x)
    with pytest.raises(ValueError, match=r"cannot write out\.x to the memory of out\.x_start"):
        ops.reverse_step(x, pred, step, rows, **kwargs, out=ops.ReverseStep(y, y, None))


@pytest.mark.parametrize("factor", [2.0, 0.25, -3.0])
def test_the_gradient_of_a_scaled_mean_is_scaled(factor):
    args, kwargs = arguments("weighted_loss")
    pred = args[0].requires_grad_()
    (plain,) = torch.autograd.grad(ops.weighted_loss(*args, **kwargs, reduction="mean"), pred)
    (scaled,) = torch.autograd.grad(factor * ops.weighted_loss(*args, **kwargs, reduction="mean"), pred)
    assert torch.equal(scaled, factor * plain)


def test_a_float16_gradient_is_scaled_before_it_is_rounded():
    shape = (4, 3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(shape, generator=generator)
    base = (target + 0.1 * torch.randn(shape, generator=generator)).half()
    t, rows = torch.zeros(4, dtype=torch.int64), torch.tensor([[0.0, 1.0, 1.0]])

    def gradient(loss_of):
        pred = base.clone().requires_grad_()
        (loss_of(pred) * 65536.0).backward()
        return pred.grad

    ours = gradient(lambda p: ops.weighted_loss(p, t, rows, noise=target, reduction="mean"))
    exact = 65536 * 2 * (base.double() - target.double()) / target.numel()
    # one rounding to float16, and the rounding of float32's difference, which cancels to about a tenth
    assert ((ours.double() - exact).abs() <= 2.0**-11 * exact.abs() + 2.0**-24).float().mean() > 0.999
    theirs = gradient(lambda p: F.mse_loss(p.float(), target))
    assert (ours.double() - exact).norm() <= 1.01 * (theirs.double() - exact).norm()


@pytest.mark.parametrize("op", OPS)
def test_one_graph_serves_every_batch_size(op):
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    args, kwargs = arguments(op)
    places = [i for i, v in enumerate(args) if isinstance(v, torch.Tensor) and v.shape[:1] == args[0].shape[:1]]
    names = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor)]
    compiled = torch.compile(lambda args, kwargs: call(op, args, kwargs), backend=counting, dynamic=True)
    # None of them is another size of the data, which a compiler may take for the same.
    for n in (7, 9, 8, 11, 10, 13, 12):
        index = torch.arange(n) % 3

        def own(v, index=index):
            return v[index].contiguous(memory_format=torch.channels_last if v.dim() == 4 else torch.contiguous_format)

        batch = tuple(own(v) if i in places else v for i, v in enumerate(args))
        result = compiled(batch, kwargs | {k: own(kwargs[k]) for k in names})
        assert result.shape[0] == n
    assert len(graphs) == 1
