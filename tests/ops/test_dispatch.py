"""The ops as PyTorch sees them: schemas, fake kernels, autograd and compiled graphs."""

import pytest
import torch
from calls import OPS, arguments, call
from harness import Case
from hypothesis import given, settings
from strategies import STRATEGIES

from ddpm_fast import ops


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


TENSORS_THAT_LEARN = {"q_sample": (0, 1), "weighted_loss": (0,), "vlb_terms": (1, 2), "group_norm_silu": (0, 1, 2)}
TENSORS_THAT_LEARN["add_group_norm_silu"] = (0, 1, 2, 3, 4, 5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself looks at it
@pytest.mark.parametrize("op", STRATEGIES)
def test_the_strict_op_passes_opcheck(op):
    @settings(max_examples=max(1, settings.default.max_examples // 10))
    @given(case=STRATEGIES[op](200))
    def check(case: Case):
        function = getattr(torch.ops.ddpm_fast, op).default
        torch.library.opcheck(function, case.arguments)
        arguments = list(case.arguments)
        for place in TENSORS_THAT_LEARN.get(op, ()):
            if arguments[place] is not None and arguments[place].is_floating_point():
                arguments[place] = arguments[place].detach().requires_grad_()
        if op == "weighted_loss":
            arguments[-1] = True
        torch.library.opcheck(function, tuple(arguments))

    check()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_public_op_compiles_into_a_full_graph(op, dtype):
    args, kwargs = arguments(op, dtype)
    result = call(op, args, kwargs)
    compiled = torch.compile(lambda *args: call(op, args, kwargs), fullgraph=True)(*args)
    assert torch.equal(compiled, result)
    assert compiled.stride() == result.stride()


def test_the_noise_compiles_into_a_full_graph():
    from ddpm_fast import noise

    def draw(n):
        return noise.gaussian((n, 3, 4, 4), seed=3)

    assert torch.equal(torch.compile(draw, fullgraph=True)(2), draw(2))


@pytest.mark.parametrize("op", OPS)
def test_a_compiled_op_follows_the_chosen_backend(op):
    args, kwargs = arguments(op)
    compiled = torch.compile(lambda *args: call(op, args, kwargs), fullgraph=True)
    own = compiled(*args)
    with ops.backend("reference"):
        other = compiled(*args)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_a_step_in_place_compiles_into_a_full_graph():
    (x, pred, step, rows), kwargs = arguments("reverse_step", torch.bfloat16)
    del kwargs["return_x_start"]
    expected = ops.reverse_step(x, pred, step, rows, **kwargs, return_model_input=True)
    state, model_input = x.clone(), torch.empty_like(pred)

    def take(x, model_input):
        return ops.reverse_step(x, pred, step, rows, **kwargs, out=ops.ReverseStep(x, None, model_input)).x

    found = torch.compile(take, fullgraph=True)(state, model_input)
    assert torch.equal(found, expected.x)
    assert torch.equal(state, expected.x)
    assert torch.equal(model_input, expected.model_input)
