"""How a step is captured, told by a stand-in for torch.cuda that writes down what it is asked for."""

import threading
from contextlib import contextmanager

import pytest
import torch

from ddpm_fast import cuda_graph
from ddpm_fast.cuda_graph import CannotCapture, capture

DEVICE = torch.device("cuda:1")


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class Cuda:
    """One device is current, 0, and each has a current stream. `fails` raises at the n-th of what it logs."""

    def __init__(self, end_fails=False):
        self.log, self.device_index, self.mode = [], 0, 0
        self.streams = {i: Stream(self, f"stream of {i}") for i in (0, 1)}
        self.capturing, self.end_fails = False, end_fails
        self.CUDAGraph = lambda: self

    @contextmanager
    def device(self, device):
        before, self.device_index = self.device_index, device.index
        try:
            yield
        finally:
            self.device_index = before

    def current_stream(self):
        return self.streams[self.device_index]

    def set_stream(self, stream):
        self.streams[self.device_index] = stream

    def Stream(self):
        return Stream(self, f"side stream of {self.device_index}")

    @contextmanager
    def stream(self, stream):
        before = self.current_stream()
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        """As torch.cuda.graph, which leaves its stream the current one where a capture cannot be ended."""
        before = self.current_stream()
        self.set_stream(stream)
        self.capturing = capture_error_mode
        failed = True
        try:
            yield
            failed = False
        finally:
            self.capturing = False
            if self.end_fails or failed:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.set_stream(before)

    def is_current_stream_capturing(self):
        return bool(self.capturing)

    def replay(self):
        self.log.append(f"replay on {self.current_stream().name}")

    def step(self):
        state = f"capture {self.capturing}" if self.capturing else f"call, mode {self.mode}"
        self.log.append(f"{state}, {self.current_stream().name}")


@pytest.fixture
def use(monkeypatch):
    def use(cuda):
        monkeypatch.setattr(cuda_graph, "cuda", cuda)
        return cuda

    return use


def assert_as_before(cuda):
    assert cuda.device_index == 0
    assert {i: s.name for i, s in cuda.streams.items()} == {0: "stream of 0", 1: "stream of 1"}
    assert not cuda.capturing
    assert cuda.mode == 0
    assert not cuda_graph._lock.locked()


def test_a_step_is_captured_on_a_side_stream_of_the_device_of_its_tensors(use):
    cuda = use(Cuda())
    replay = capture(cuda.step, DEVICE)
    assert_as_before(cuda)
    assert cuda.log == [
        "side stream of 1 waits for stream of 1",
        "call, mode 0, side stream of 1",
        "call, mode error, side stream of 1",
        "capture thread_local, side stream of 1",
        "stream of 1 waits for side stream of 1",
    ]
    cuda.log.clear()
    replay()
    assert cuda.log == ["replay on stream of 1"]
    assert_as_before(cuda)


def test_a_step_that_must_not_be_repeated_is_called_in_the_capture_alone(use):
    cuda = use(Cuda())
    taken = []

    def step():
        cuda.step()
        taken.append(cuda.capturing)

    capture(step, DEVICE, warm_up=cuda.step)
    assert taken == ["thread_local"]
    assert cuda.log[1:4] == [
        "call, mode 0, side stream of 1",
        "call, mode error, side stream of 1",
        "capture thread_local, side stream of 1",
    ]
    assert_as_before(cuda)


def test_what_is_captured_keeps_no_casts_of_autocast_and_captures_nothing_itself(use):
    seen, x = [], torch.zeros(1)
    use(Cuda())

    def step():
        seen.append((torch.is_autocast_cache_enabled(), cuda_graph.capturing(x)))

    with torch.autocast("cpu", torch.bfloat16):
        capture(step, DEVICE)
        assert torch.is_autocast_cache_enabled()
    assert seen == [(False, True)] * 3
    assert not cuda_graph.capturing(x)


def test_work_on_a_stream_that_is_captured_by_others_is_told(use):
    class OnGpu:
        is_cuda = True

    cuda = use(Cuda())
    for cuda.capturing in (False, "global"):
        assert cuda_graph.capturing(OnGpu()) == bool(cuda.capturing)


@pytest.mark.parametrize(
    ("call", "error", "raised"),
    [
        (1, torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (1, ValueError("wrong shape"), ValueError),
        (2, RuntimeError("called a synchronizing CUDA operation"), CannotCapture),
        (2, torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (3, RuntimeError("operation not permitted when stream is capturing"), CannotCapture),
        (3, torch.OutOfMemoryError("CUDA out of memory"), CannotCapture),
    ],
)
def test_whatever_fails_leaves_no_capture_and_no_stream_behind(use, call, error, raised):
    cuda, calls = use(Cuda()), []

    def step():
        cuda.step()
        calls.append(1)
        if len(calls) == call:
            raise error

    with pytest.raises(raised):
        capture(step, DEVICE)
    assert_as_before(cuda)
    assert cuda.log[-1] == "stream of 1 waits for side stream of 1"
    assert len(calls) == call
    capture(Cuda().step, DEVICE)  # another one can be captured


def test_a_capture_that_cannot_be_ended_leaves_the_stream_as_it_was(use):
    cuda = use(Cuda(end_fails=True))
    with pytest.raises(CannotCapture, match="during capture"):
        capture(cuda.step, DEVICE)
    assert_as_before(cuda)


def test_the_reason_says_that_the_step_waits_for_the_device(use):
    cuda = use(Cuda())

    def step():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(CannotCapture, match="it waits for the device: called a synchronizing CUDA operation"):
        capture(step, DEVICE)


def test_a_process_captures_one_step_at_a_time(use):
    cuda = use(Cuda())
    inside, most = [], []

    def step():
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.02)
        inside.pop()

    threads = [threading.Thread(target=capture, args=(step, DEVICE)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 9
    assert_as_before(cuda)


def test_an_environment_variable_switches_graphs_off(monkeypatch):
    class OnGpu:
        is_cuda = True

    assert cuda_graph.enabled(OnGpu())
    assert not cuda_graph.enabled(torch.zeros(1))
    monkeypatch.setenv("DDPM_FAST_GRAPHS", "0")
    assert not cuda_graph.enabled(OnGpu())
