"""Threads that call one optimised network at the same time get the results of one thread."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from optimized_networks import inputs, make, tensor_of

from ddpm_fast import optimize

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fused_in_training")]
THREADS = 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["openai", "lucidrains", "diffusers-scale-shift"])
def test_eight_threads_get_the_results_of_one(name, train, dtype):
    model = make(name).train(train)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # threads share the generator
    optimize(model, dtype)
    x, t = inputs(THREADS)

    def call(network, i):
        with torch.set_grad_enabled(train):
            y = tensor_of(network(x[i : i + 1], t[i : i + 1]))
            gradients = (
                torch.autograd.grad(y.square().sum(), [*network.parameters()], allow_unused=True) if train else ()
            )
        return [y.detach(), *(g for g in gradients if g is not None)]

    # A copy packs its own weights, so that the threads below find none that are packed.
    alone = copy.deepcopy(model)
    expected = [call(alone, i) for i in range(THREADS)]
    barrier = Barrier(THREADS)

    def thread(i):
        barrier.wait()
        return [call(model, i) for _ in range(3)]

    with ThreadPoolExecutor(THREADS) as pool:
        for i, calls in enumerate(pool.map(thread, range(THREADS))):
            for found in calls:
                torch.testing.assert_close(found, expected[i], rtol=0, atol=0)
