"""What Triton's kernels use of the machine, and how many bytes and launches they take.

That they compute the right values, in every dtype, layout and shape, is in tests/ops.
"""

import functools
from pathlib import Path

import architectures
import pytest
import torch
from budgets import measure, most_of_a_reverse_step, settle

pytest.importorskip("triton")

from compiled import simulated
from kernel_calls import (
    BF16,
    F32,
    LARGE,
    LAYOUTS,
    SLABS,
    TYPES,
    N,
    add_group_norm,
    elementwise,
    group_norm,
    images,
    make_keys,
    recomputed_group_norm,
)
from ptxsim import inductor, toolchain

from ddpm_fast import ops

needs_ptxas = pytest.mark.skipif(not toolchain.has_tool("cuobjdump"), reason="no CUDA toolkit")
everywhere = pytest.mark.parametrize("cc", architectures.chosen)


# What a kernel uses of the machine


@functools.cache
def elementwise_kernels(cc):
    """(op, layout, types) -> what was launched."""
    kernels = {}
    for types, (wide, narrow) in TYPES.items():
        for layout, memory_format in LAYOUTS.items():
            for name, (call, *_) in elementwise(wide, narrow, n=1, size=16, layout=memory_format).items():
                with simulated(cc) as launched:
                    call()
                (kernels[name, layout, types],) = launched
    return kernels


def elements_of_a_thread(name, layout, types, warps):
    if layout == "planar" and name != "vlb_terms":
        return 3 * (8 if types == "bfloat16" else 4)
    return 1024 // (32 * warps)


def norms(cc):
    """ "what, dtype" -> what the forward and the backward pass have launched, or the recomputation between them."""
    found = {}
    for dtype in (F32, BF16):
        calls = {
            "planar": group_norm(dtype, torch.contiguous_format, (1, 64, 16, 32))[1],
            "channels-last": group_norm(dtype, torch.channels_last, (1, 64, 48, 48))[1],
            "256 x 8 x 8": group_norm(dtype, torch.channels_last, (1, 256, 8, 8))[1],
        }
        calls |= {f"adding, {name}": add_group_norm(dtype, *case)[1] for name, case in (SLABS | LARGE).items()}
        for name in ("128 x 32 x 32", "256 x 8 x 8"):
            calls[f"recomputed, {name}"] = recomputed_group_norm(dtype, SLABS[name][0])[0]
        for name, call in calls.items():
            with simulated(cc) as launched:
                call()
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = launched
    return found


@needs_ptxas
def test_no_kernel_spills_or_uses_more_of_the_machine_than_its_budget(request):
    rows = {}
    for cc in architectures.chosen:
        for case, one in elementwise_kernels(cc).items():
            row = measure(one.report, elements_of_a_thread(*case, one.warps)) | {"shared": one.shared}
            rows.setdefault(", ".join(case), {})[f"sm_{cc}"] = row
        for case, launched in norms(cc).items():
            for one in launched:
                name = f"group_norm_silu{one.stats.kernel}, {case}"
                rows.setdefault(name, {})[f"sm_{cc}"] = measure(one.report) | {"shared": one.shared}
    spilling = [(name, arch) for name, row in rows.items() for arch in row if row[arch]["spills"]]
    assert not spilling
    settle("triton", rows, update=request.config.getoption("update_budgets"))


@needs_ptxas
@everywhere
def test_a_reverse_step_with_its_noise_takes_60_instructions_an_element(cc):
    for (name, layout, types), one in elementwise_kernels(cc).items():
        if name == "reverse_step" and layout == "channels-last":
            instructions = one.report.instructions.total() - one.report.instructions["NOP"]
            most = most_of_a_reverse_step(cc, types.partition("-")[0])
            assert instructions <= most * elements_of_a_thread(name, layout, types, one.warps), types


@everywhere
def test_no_data_go_from_thread_to_thread_but_for_sums(cc):
    for (name, *_), one in elementwise_kernels(cc).items():
        assert one.shared <= (16 if name in ("weighted_loss", "vlb_terms") else 0), name


@needs_ptxas
@everywhere
def test_the_widest_type_goes_by_128_bits_and_the_others_element_by_element_with_it(cc):
    for (name, _, types), one in elementwise_kernels(cc).items():
        wide, narrow = TYPES[types]
        if name == "weighted_loss":
            wide = narrow
        loads, stores = (set(one.report.accesses[opcode]) for opcode in ("LDG", "STG"))
        together = {16, 16 * narrow.itemsize // wide.itemsize}
        if name == "vlb_terms":
            assert loads >= {16, 4 * narrow.itemsize}
            assert stores == {4}  # one sum
        else:
            assert loads >= together - ({8} if name == "q_sample" else set())
            assert 16 in stores
            assert stores <= together | ({4} if name == "weighted_loss" else set())  # and the loss


# Bytes and launches


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_op_moves_the_least_bytes_in_one_launch(layout, types):
    tables = N * (8 + 16 + 32) + 8 * 32  # t, keys, rows; and tensors that begin or end within a sector
    for name, (call, loads, stores) in elementwise(*TYPES[types], layout=LAYOUTS[layout]).items():
        with simulated(90) as launched:
            call()
        ((stats, *_),) = launched
        assert loads <= stats.unique_loaded_bytes <= loads + tables, name
        assert stores <= stats.unique_stored_bytes <= stores + tables, name


@pytest.mark.parametrize("name", SLABS)
def test_a_slab_is_read_and_written_once_in_one_launch_forward_and_two_backward(name):
    shape, of_skip = SLABS[name]
    forward, backward, size = add_group_norm(BF16, shape, of_skip)
    of_x = size * (shape[1] - of_skip) // shape[1]
    small = 2**14  # parameters, statistics, sums
    with torch.no_grad(), simulated(90) as launched:
        forward()
    assert [one.stats.kernel for one in launched] == ["_norm_of_slab"]
    stats = launched[0].stats
    assert size + of_x <= stats.unique_loaded_bytes <= size + of_x + small  # x, skip and the residual
    assert 2 * size <= stats.unique_stored_bytes <= 2 * size + small  # y and h
    with simulated(90) as launched:
        backward()
    assert [one.stats.kernel for one in launched[1:]] == ["_gradients_of_slab", "_add_samples"]
    stats = launched[1].stats
    assert 3 * size <= stats.unique_loaded_bytes <= 3 * size + small  # h and the two gradients
    assert size <= stats.unique_stored_bytes <= size + small
    assert launched[2].stats.unique_loaded_bytes <= small


def test_a_plane_too_large_for_a_slab_is_added_by_the_launch_that_reads_it_first():
    shape, of_skip = LARGE["32 + 32 x 48 x 48"]
    forward, backward, size = add_group_norm(BF16, shape, of_skip)
    of_x, small = size // 2, 2**15
    with torch.no_grad(), simulated(90) as launched:
        forward()
    assert [one.stats.kernel for one in launched] == ["_statistics", "_merge", "_apply"]
    first, _, last = (one.stats for one in launched)
    assert size + of_x <= first.unique_loaded_bytes <= size + of_x + small
    assert size <= first.unique_stored_bytes <= size + small  # h
    assert size <= last.unique_loaded_bytes <= size + small
    assert size <= last.unique_stored_bytes <= size + small  # y
    with simulated(90) as launched:
        backward()
    sums, spread, apply = (one.stats for one in launched[3:])
    assert all(3 * size <= s.unique_loaded_bytes <= 3 * size + small for s in (sums, apply))
    assert spread.unique_loaded_bytes <= small
    assert size <= apply.unique_stored_bytes <= size + small


@pytest.mark.parametrize("name", SLABS | LARGE)
def test_an_output_is_recomputed_by_one_read_and_one_write_whatever_its_size(name):
    call, size = recomputed_group_norm(BF16, (SLABS | LARGE)[name][0])
    with simulated(90) as launched:
        call()
    ((stats, *_),) = launched
    assert size <= stats.unique_loaded_bytes <= size + 2**14  # parameters and statistics
    assert stats.unique_stored_bytes == size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_of_large_groups_moves_the_least_bytes_in_two_launches_and_three(layout):
    forward, backward, x = group_norm(BF16, LAYOUTS[layout], (1, 160, 32, 32))
    small = 2**14  # parameters, statistics, sums
    with torch.no_grad(), simulated(90) as launched:
        forward()
    assert [one.stats.kernel for one in launched] == ["_statistics", "_apply"]
    assert all(x.nbytes <= one.stats.unique_loaded_bytes <= x.nbytes + small for one in launched)
    assert x.nbytes <= launched[1].stats.unique_stored_bytes <= x.nbytes + small
    with simulated(90) as launched:
        backward()
    sums, spread, apply = (one.stats for one in launched[2:])
    assert all(2 * x.nbytes <= s.unique_loaded_bytes <= 2 * x.nbytes + small for s in (sums, apply))
    assert spread.unique_loaded_bytes <= small
    assert x.nbytes <= apply.unique_stored_bytes <= x.nbytes + small


def test_samples_of_several_parts_take_one_launch_more():
    pred, keys = images(1, 3, 64, 64, dtype=BF16).requires_grad_(), make_keys(1)
    with simulated(90) as launched:
        ops.weighted_loss(pred, torch.zeros(1, dtype=torch.int64), torch.rand(1, 3), keys=keys)
    assert [one.stats.kernel for one in launched] == ["_weighted_loss", "_add_parts"]
    with torch.no_grad(), simulated(90) as launched:
        group_norm(BF16, torch.channels_last, (1, 128, 40, 40))[0]()
    assert [one.stats.kernel for one in launched] == ["_statistics", "_merge", "_apply"]


def test_torchinductor_needs_as_many_bytes_and_launches_or_more(capsys):
    x, keys, t, rows = images(N, 3, 32, 32, dtype=BF16), make_keys(N), torch.arange(N), torch.rand(N, 6)
    forward, backward, y = group_norm(BF16, torch.channels_last)
    y, grad, weight = y.detach(), images(*y.shape, dtype=BF16), torch.ones(128)
    mean = torch.zeros(2, 32)
    parts = [images(2, n, 32, 32, dtype=BF16) for n in (256, 256, 128)]
    of_x, of_sum = torch.randn(256), torch.ones(384)
    calls = {name: call for name, (call, *_) in elementwise(BF16, BF16).items()}
    cases = {
        "q_sample": (calls["q_sample"], (x, keys, t, rows[:, :2].contiguous())),
        "weighted_loss": (calls["weighted_loss"], (x, keys, t, rows[:, :3].contiguous())),
        "reverse_step": (calls["reverse_step"], (x, x, keys, t, rows)),
        "vlb_terms": (calls["vlb_terms"], (x.float(), x.float().clone(), x, t, rows)),
        "group_norm_silu": (forward, (y, weight, weight)),
        "group_norm_silu_backward": (backward, (grad, y, mean, mean, weight, weight)),
        "add_group_norm_silu": (
            lambda: ops.add_group_norm_silu(
                parts[0], of_sum, of_sum, 32, input_bias=of_x, residual=parts[1], skip=parts[2]
            ),
            (parts[0], of_x, *parts[1:], of_sum, of_sum),
        ),
    }
    lines = [
        f"{'':26}{'launches':>20}{'bytes':>22}",
        f"{'':26}{'here':>10}{'inductor':>10}{'here':>11}{'inductor':>11}",
    ]
    functions = Path(__file__).with_name("inductor_functions.py")
    baselines = inductor.baselines([(f"{functions}:{name}", inputs) for name, (_, inputs) in cases.items()])
    for (name, (call, _)), theirs in zip(cases.items(), baselines, strict=True):
        with simulated(90) as launched:
            call()
        stats = [one.stats for one in launched]
        if name == "group_norm_silu_backward":
            stats = stats[1:]
        bytes_ = sum(s.unique_loaded_bytes + s.unique_stored_bytes for s in stats)
        lines.append(f"{name:26}{len(stats):10}{theirs.launches:10}{bytes_:11}{theirs.bytes:11}")
        assert len(stats) <= theirs.launches, name
        assert bytes_ <= 1.02 * theirs.bytes, name
    with capsys.disabled():
        print("\n" + "\n".join(lines))
