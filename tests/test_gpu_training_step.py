"""What a training step asks of a GPU, counted on tensors that claim to be there."""

from collections import Counter, defaultdict

import pytest
import torch
from step_cost import Costs
from test_gpu_step import Ops, on_a_gpu
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from training_runs import small, without_curve  # noqa: F401  (fixture)

from ddpm_fast import UNet
from ddpm_fast.nn import group_norm
from ddpm_fast.training import optimization, trainer

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch was built without CUDA")


class TrainingOps(Ops):
    def called(self, op, *args, **kwargs):
        if op is torch.ops.aten._fused_adamw_.tensor_lr:  # which has no version for such tensors
            return torch.ops.aten._fused_adamw_.default(*args, **kwargs | {"lr": 0.0})
        return op(*args, **kwargs)


def fitted(gradient, like):
    """The gradient in the shape and dtype of the result that it belongs to."""
    return None if gradient is None else gradient.sum_to_size(like.shape).to(like.dtype)


def backward(loss, gradient=None, *_, **__):
    """As torch.autograd.backward, whose engine looks for a stream of the GPU and does not find one."""
    waiting, nodes = Counter(), [loss.grad_fn]  # how many gradients a node waits for
    for node in nodes:
        for following, _ in node.next_functions:
            waiting[following] += 1
            if following is not None and waiting[following] == 1:
                nodes.append(following)
    gradients = defaultdict(
        dict, {loss.grad_fn: {loss.output_nr: torch.ones_like(loss) if gradient is None else gradient}}
    )
    ready = [loss.grad_fn]
    with torch.no_grad():
        for node in ready:
            given, call = gradients.pop(node), getattr(node, "apply", node)  # of a Function in Python
            found = call(*(fitted(given.get(i), like) for i, like in enumerate(node._input_metadata)))
            found = found if isinstance(found, tuple) else (found,)
            edges = node.next_functions
            if hasattr(node, "needs_input_grad"):  # of a Function in Python: it has edges for tensors alone
                found = [gradient for gradient, need in zip(found, node.needs_input_grad, strict=False) if need]
                edges = [edge for edge in edges if edge[0] is not None]
            for (following, i), gradient in zip(edges, found, strict=False):
                if following is None:
                    continue
                if gradient is not None:
                    before = gradients[following].get(i)
                    gradients[following][i] = gradient if before is None else before + gradient
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)


def gradients_of(outputs, leaves, gradient, create_graph):
    """As torch.autograd.grad, of leaves that have no gradient yet."""
    backward(outputs, gradient)
    return [x.grad for x in leaves]


@pytest.fixture
def steps_on_a_gpu(tmp_path, monkeypatch):
    """A function that takes two steps of a run there, and returns the ops of each."""
    monkeypatch.setenv("DDPM_FAST_GRAPHS", "0")
    monkeypatch.setattr(trainer, "derive_seed", lambda *numbers: 1)  # reads tensors of the CPU
    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", gradients_of)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    def take(precision, **changes):
        config = small(training__precision="fp32", **changes)
        run = trainer.Trainer(config, tmp_path / "run")
        found = []
        with FakeTensorMode(allow_non_fake_inputs=True):
            on_a_gpu(run.diffusion)
            for module in (*run.ema.modules.values(), run.timestep_losses, run.timestep_sampler):
                on_a_gpu(module)
            run.device = torch.device("cuda")
            run._sample_offset = torch.empty((), dtype=torch.int64, device="cuda")
            run.optimizer = torch.optim.AdamW(optimization.parameter_groups(run.diffusion), fused=True, capturable=True)
            for group in run.optimizer.param_groups:
                group["lr"] = torch.empty((), device="cuda")  # of a GPU
            run._set_precision(precision)
            if precision == "fp16":  # it disables itself for GPUs that are not there
                run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
            run.diffusion.train()
            for _ in range(2):  # in the first, moments are allocated and the average is a copy
                images = torch.empty(config.training.batch_size, 1, 8, 8, dtype=torch.uint8)
                with TrainingOps() as ops:
                    run.step(images)
                found.append(ops)
        return found

    return take


@pytest.mark.parametrize("grad_clip", [1.0, None])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_training_step_never_waits_for_the_device_and_sends_it_the_images_alone(steps_on_a_gpu, precision, grad_clip):
    # An op that has to wait for a value raises on such tensors.
    for ops in steps_on_a_gpu(precision, training__grad_clip=grad_clip):
        assert ops.across == ["aten._to_copy.default"]
        assert not [op for op in ops.computing if "item" in op or "_local_scalar_dense" in op or "lift" in op]
        counts = Counter(ops.computing)
        assert counts["aten.convolution_backward.default"] == counts["aten.convolution.default"] > 0
        assert counts["aten._fused_adamw_.tensor_lr"] == 1
        assert counts["aten.linalg_vector_norm.default"] > 1  # which is told, and says whether the gradients are finite
        assert (counts["aten._to_copy.default"] > 10) == (precision != "fp32")  # weights, cast by autocast


@pytest.mark.parametrize(
    "changes",
    [
        {"training__timestep_sampling": "loss_second_moment"},
        {"diffusion__variance": "learnable"},
        {"diffusion__variance": "learned_range"},
        {"training__ema_decay": [0.9, 0.99], "training__ema_snapshot_every": 5},
    ],
    ids=str,
)
def test_neither_samplers_of_timesteps_nor_learned_variances_nor_averages_wait_for_the_device(steps_on_a_gpu, changes):
    for ops in steps_on_a_gpu("fp32", **changes):
        assert ops.across == ["aten._to_copy.default"]
        assert not [op for op in ops.computing if "item" in op or "_local_scalar_dense" in op or "lift" in op]
        # The losses by timestep are added by a sort of the timesteps, and not by atomic additions in any order.
        assert not [op for op in ops.computing if "index_add" in op or "scatter" in op or "bincount" in op]
        assert Counter(ops.computing)["aten.cumsum.default"] == ("training__timestep_sampling" in changes)


def test_the_average_takes_one_op(steps_on_a_gpu):
    first, second = (
        [op for op in ops.computing if "foreach_copy" in op or "lerp" in op] for ops in steps_on_a_gpu("fp32")
    )
    assert first == ["aten._foreach_copy_.default"]
    assert second == ["aten._foreach_lerp_.Scalar"]


@pytest.mark.parametrize(("preset", "size"), [("ddpm-cifar10-32", 32), ("ddpm-256", 256)])
def test_the_output_of_a_norm_is_recomputed_by_one_launch_without_its_statistics(monkeypatch, preset, size):
    """In bfloat16. Prints what the backward pass costs."""
    n = 8
    monkeypatch.setattr(group_norm, "Tensor", FakeTensor)  # outputs of a class that is not PyTorch's own are kept
    model = UNet.preset(preset, dropout=0.0).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_a_gpu(model)
        x, t = torch.empty(n, 3, size, size, device="cuda"), torch.empty(n, device="cuda")
        with Costs(n):  # whose convolutions have channels-last results
            loss = model(x, t).square().mean()
        with Costs(n) as costs:
            backward(loss)
    print(f"the backward pass of {preset}, launches and MiB an image:\n{costs}")
    norms = sum(isinstance(module, group_norm.GroupNorm) for module in model.modules())
    kinds = Counter(launch.kind for launch in costs.launches)
    assert kinds["group norm, recomputed"] == norms - 1  # the last one has its output kept
    assert kinds["group norm"] == 0
