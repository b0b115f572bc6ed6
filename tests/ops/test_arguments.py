"""An op's arguments have the same names in its schema, its NamedTuple and the C++ struct that the kernels receive."""

import pytest
import torch
from simulated_cuda import structures

from ddpm_fast.ops.dispatch import OPS

# Arguments that are no field of the struct, and why.
WITHOUT_A_FIELD = {
    ("q_sample", "dtype"),  # a dtype of PyTorch, which the struct holds as out_type, the Type of the result
    ("weighted_loss", "with_grad"),  # whether grad, a pointer to the result, is null
    ("add_group_norm_silu", "keep"),  # whether h is null
}


def schema(op: str) -> torch.FunctionSchema:
    return getattr(torch.ops.ddpm_fast, op).default._schema


def fields(op: str) -> list[str]:
    """The fields of the op's struct in csrc/common/arguments.h, in their order."""
    struct = getattr(structures(), op.title().replace("_", ""))
    return [name for name, _ in struct._fields_]


@pytest.mark.parametrize("op", OPS)
def test_the_named_tuple_has_the_arguments_of_the_schema(op):
    assert OPS[op].arguments._fields == tuple(argument.name for argument in schema(op).arguments)


@pytest.mark.parametrize("op", OPS)
def test_the_struct_has_the_arguments_of_the_schema(op):
    missing = {(op, argument.name) for argument in schema(op).arguments} - {(op, name) for name in fields(op)}
    assert missing == {exception for exception in WITHOUT_A_FIELD if exception[0] == op}


@pytest.mark.parametrize("op", OPS)
def test_the_struct_has_the_named_results_of_the_schema(op):
    assert {result.name for result in schema(op).returns if result.name} <= set(fields(op))


@pytest.mark.parametrize("op", OPS)
def test_the_struct_has_the_tensors_in_the_order_of_the_schema(op):
    tensors = [argument.name for argument in schema(op).arguments if "Tensor" in str(argument.type)]
    assert [name for name in fields(op) if name in tensors] == tensors
