"""Threads, processes and copies get the images that one thread of one process gets, bit for bit."""

import copy
import io
import multiprocessing
import os
import pickle
import select
import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from small_diffusion import make, put_samples

from ddpm_fast import GaussianDiffusion, UNet, backend, noise, optimize, samplers, schedules

KINDS = {
    "posterior": {},
    "learned": {"variance": "learned_range"},
    "learnable": {"variance": "learnable", "loss_type": "kl"},
    "optimised": {},
    "torch's noise": {"rng": "torch"},
    "a subclass": {},
}


class Shifted(GaussianDiffusion):
    """A method of its own, so that runs go through the methods."""

    def predict_start_from_v(self, x_t, t, v):
        return super().predict_start_from_v(x_t, t, v) + 0.01


def diffusion(kind="posterior"):
    arguments = KINDS[kind]
    learned = arguments.get("variance") == "learned_range"
    size = {"image_size": 8, "channels": 1, "dim": 8, "dim_mults": (1, 2), "num_res_blocks": 1, "norm_groups": 4}
    torch.manual_seed(0)
    model = UNet(**size, attention_resolutions=(4,), learned_variance=learned)
    with torch.no_grad():
        for p in model.parameters():  # some are 0 in a new network, and then so is all that it predicts
            p.add_(torch.randn(p.shape) * 0.1)
    if kind == "optimised":
        optimize(model)
    make_one = Shifted if kind == "a subclass" else GaussianDiffusion
    return make_one(model, image_size=8, timesteps=20, beta_schedule="cosine", **arguments)


def sampled(diffusion, seed=0, **arguments):
    return diffusion.sample(2, seed=seed, **({"steps": 4, "sampler": "ddpm"} | arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_sample_from_one_object_get_what_one_thread_gets(kind):
    steps = {} if kind != "a subclass" else {"sampler": "ddim"}  # whose ancestral steps go through p_sample
    shared = diffusion(kind)
    wanted = [
        {"seed": seed, "steps": 2 + seed, "sampler": sampler} | steps
        for seed, sampler in enumerate(["ddpm", "ddim", "ddpm", "ddim"])
    ]
    expected = [sampled(copy.deepcopy(shared), **arguments) for arguments in wanted]
    barrier = Barrier(len(wanted))

    def thread(arguments):
        barrier.wait()
        return [sampled(shared, **arguments) for _ in range(3)]

    with ThreadPoolExecutor(len(wanted)) as pool:
        for found, image in zip(pool.map(thread, wanted), expected, strict=True):
            assert all(torch.equal(one, image) for one in found)


def test_threads_keep_the_backend_and_the_progress_of_their_own():
    """Runs that take turns step by step, each in its own context."""
    one, other = diffusion(), make()
    with backend("reference"):
        expected = sampled(one)
    expected_other = sampled(other)
    barrier = Barrier(2, timeout=60)

    def thread(name, own):
        with backend(name):
            states = own.sample_progressive(2, seed=0, steps=4, sampler="ddpm")
            for _ in range(5):
                barrier.wait()
                state = next(states)
        return state.x

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(thread, ["reference", None], [one, other]))
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected_other)


def test_a_thread_that_trains_does_not_change_what_another_samples():
    own, trained = diffusion(), diffusion()
    expected = sampled(own)
    images = torch.rand(3, 1, 8, 8)

    def train():
        for seed in range(5):
            trained(images, seed=seed).backward()

    with ThreadPoolExecutor(2) as pool:
        training = pool.submit(train)
        assert all(torch.equal(sampled(own), expected) for _ in range(5))
        training.result()


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "optimised" and kind != "a subclass"])
def test_a_copy_samples_and_trains_as_the_original_which_was_used_before(kind, how):
    original = diffusion(kind)
    images = torch.rand(3, 1, 8, 8)
    expected, loss = sampled(original), original(images, seed=1, times=torch.tensor([0, 5, 19]))
    loss.backward()
    found = COPIES[how](original)
    assert torch.equal(sampled(found), expected)
    assert torch.equal(found(images, seed=1, times=torch.tensor([0, 5, 19])), loss)
    with torch.no_grad():
        for p in found.parameters():
            p.mul_(0.5)
    assert not torch.equal(sampled(found), expected)
    assert torch.equal(sampled(original), expected)  # nothing is shared


@pytest.mark.parametrize("how", COPIES)
def test_tables_schedules_and_sources_of_noise_are_copied_with_their_state(how):
    schedule = schedules.make("cosine", 20)
    assert torch.equal(COPIES[how](schedule).snr, schedule.snr)
    table = samplers.make("dpmpp_2m", schedule, "pred_v", 5)
    assert torch.equal(COPIES[how](table).rows, table.rows)
    for rng in ("philox", "torch"):
        source = noise.NoiseSource(rng, seed=torch.Generator().manual_seed(5))
        source.draw(0, (2, 3))
        found = COPIES[how](source)
        assert torch.equal(found.draw(1, (2, 3)), source.draw(1, (2, 3)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_samples_after_its_parent_has_computed_in_several_threads(threads):
    own = diffusion()
    torch.set_num_threads(threads)
    try:
        expected = sampled(own)
        torch.ones(1 << 20).exp().sum()  # enough for several threads
        end, beginning = os.pipe()
        child = os.fork()
        if not child:  # whatever happens in it, pytest must not go on in it
            try:
                torch.ones(1 << 20).exp().sum()
                os.write(beginning, b"same" if torch.equal(sampled(own), expected) else b"other")
            finally:
                os._exit(0)
        os.close(beginning)
        try:
            assert select.select([end], [], [], 60)[0], "the child does not end"
            assert os.read(end, 10) == b"same"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(end)
    finally:
        torch.set_num_threads(1)


@pytest.mark.long
def test_a_spawned_process_samples_from_what_it_is_given():
    own = diffusion()
    expected = own.sample(2, seed=0, steps=4)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=put_samples, args=(own, results))
    process.start()
    try:
        assert (results.get(timeout=120) == expected.numpy()).all()
    finally:
        process.kill()
        process.join()
