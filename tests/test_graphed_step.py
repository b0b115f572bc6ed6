"""Training steps by graphs, which are recorded here: a replay calls the same ops on the same tensors."""

import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from recorded_graphs import Recorder, tensors
from torch import nn
from training_runs import assert_same_weights, finished, losses, small, without_curve  # noqa: F401  (fixtures)

from ddpm_fast import cuda_graph
from ddpm_fast.training import checkpoint, graphed_step, optimization, trainer
from ddpm_fast.training.graphed_step import GraphedStep


class Capture(Recorder):
    """What is recorded leaves no trace, as in a capture, where the device only takes notes."""

    def __init__(self):
        super().__init__()
        self.before = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        named = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | (kwargs or {})
        written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        self.before += [(x, x.detach().clone()) for name in written for x in tensors(named.get(name))]
        return super().__torch_dispatch__(op, types, args, kwargs)

    def undo(self):
        with torch.no_grad():
            for x, value in reversed(self.before):
                x.copy_(value)


@pytest.fixture
def without(monkeypatch):
    """A function that calls another without graphs, and with the optimizer of a CPU."""
    make_optimizer = trainer.make_optimizer

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "make_optimizer", make_optimizer)
            patch.setattr(graphed_step.cuda_graph, "enabled", lambda x: False)
            return function()

    return call


@pytest.fixture
def captures(without, monkeypatch):
    """Graphs are used on the CPU; a list that grows by one with each capture."""
    made = []

    def capture(step, device, *, warm_up):
        warm_up()
        warm_up()
        with torch.random.fork_rng([]), Capture() as recorder:
            step()
        recorder.undo()
        made.append(device)

        @torch.no_grad()
        def replay():
            for op, args, kwargs, before in recorder.calls:
                for new, old in zip(tensors(op(*args, **kwargs)), tensors(before), strict=True):
                    old.copy_(new)  # for a view or an op in place, onto itself

        return replay

    def make_optimizer(diffusion, c):
        """As on a GPU. Its learning rate has 64 bits, so that it is the number that a CPU is given."""
        lr = torch.tensor(c.lr, dtype=torch.float64)
        how = {"betas": c.betas, "weight_decay": c.weight_decay, "fused": True, "capturable": True}
        return torch.optim.AdamW(optimization.parameter_groups(diffusion), lr=lr, **how)

    # Its own: the previews are sampled without.
    monkeypatch.setattr(graphed_step, "cuda_graph", SimpleNamespace(**vars(cuda_graph)))
    monkeypatch.setattr(graphed_step.cuda_graph, "capture", capture)
    monkeypatch.setattr(graphed_step.cuda_graph, "enabled", lambda x: True)
    monkeypatch.setattr(trainer, "make_optimizer", make_optimizer)
    return made


# Runs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__grad_clip": None},
        {"training__grad_clip": 1e-3},
        {"training__warmup": 5, "training__cosine_decay": True},
        {"training__weight_decay": 0.1, "data__flip": False},
        {"training__precision": "bf16"},
        {"diffusion__objective": "pred_v", "diffusion__loss_type": "huber", "model__dropout": 0.0},
        {"diffusion__variance": "learned_range"},
        {"diffusion__variance": "learnable", "training__weight_decay": 0.1},
        # All losses are known after the first step: on a CPU, where the loss looks at the gradients that it is given,
        # the weights must not be 1 when the step is captured.
        {"training__timestep_sampling": "loss_second_moment", "diffusion__timesteps": 4, "training__batch_size": 96},
    ],
    ids=str,
)
def test_a_captured_run_is_the_run_step_by_step(captures, without, tmp_path, changes):
    config = small(**{"training__precision": "fp32", "training__steps": 7} | changes)
    captured = trainer.train(config, tmp_path / "captured")
    assert len(captures) == 1
    plain = without(lambda: trainer.train(config, tmp_path / "plain"))
    assert len(captures) == 1
    assert_same_weights(tmp_path / "plain", tmp_path / "captured")
    assert losses(captured) == losses(plain)
    assert captured.metrics["loss_by_timestep"] == plain.metrics["loss_by_timestep"]
    of_timesteps = [checkpoint.latest(tmp_path / name) / "timesteps.safetensors" for name in ("plain", "captured")]
    assert of_timesteps[0].read_bytes() == of_timesteps[1].read_bytes()


def test_a_captured_run_skips_the_steps_of_a_run_step_by_step(captures, without, monkeypatch, tmp_path):
    forward = trainer.GaussianDiffusion.forward

    def broken(self, images, **arguments):
        bad = arguments["sample_offset"] // len(images) % 3 == 1
        return forward(self, images, **arguments) * torch.where(bad, torch.nan, 1.0)

    monkeypatch.setattr(trainer.GaussianDiffusion, "forward", broken)
    config = small(training__precision="fp32", training__save_every=1)
    captured = trainer.train(config, tmp_path / "captured")
    assert len(captures) == 1
    plain = without(lambda: trainer.train(config, tmp_path / "plain"))
    assert_same_weights(tmp_path / "plain", tmp_path / "captured")
    assert captured.metrics["skipped_steps"] == plain.metrics["skipped_steps"] == 4
    assert losses(captured) == losses(plain)
    assert captured.metrics["loss_by_timestep"] == plain.metrics["loss_by_timestep"]


def test_a_captured_run_is_the_run_of_a_cpu_and_can_be_resumed(finished, captures, tmp_path):  # noqa: F811
    trainer.train(small(training__steps=8), tmp_path / "run")
    result = trainer.train(small(), tmp_path / "run", resume=True)
    assert len(captures) == 2
    assert_same_weights(finished.folder, tmp_path / "run")
    assert losses(result) == losses(finished)


@pytest.mark.parametrize("when", ["before", "while it warms up", "in the capture"])
def test_a_run_that_cannot_be_captured_loses_nothing_and_says_why_once(
    finished,  # noqa: F811
    captures,
    monkeypatch,
    tmp_path,
    when,
):
    def fail(step, device, *, warm_up):
        if when != "before":
            warm_up()
        if when == "in the capture":
            with torch.random.fork_rng([]), Capture() as recorder:
                step()
            recorder.undo()
        raise (torch.OutOfMemoryError if when == "while it warms up" else cuda_graph.CannotCapture)("the reason")

    monkeypatch.setattr(graphed_step.cuda_graph, "capture", fail)
    with pytest.warns(UserWarning, match="launch by launch, since the step cannot be captured: the reason") as told:
        result = trainer.train(small(), tmp_path / "run")
    assert len(told) == 1
    assert_same_weights(finished.folder, tmp_path / "run")
    assert losses(result) == losses(finished)


# One step after the other


class Case:
    """A network with dropout, its optimizer, and a loss of two arguments."""

    def __init__(self, **how):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        how = {"lr": torch.tensor(0.1), "capturable": True} | how
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **how)
        self.step = GraphedStep(self.loss, self.optimizer, clip=0.5)

    def loss(self, x, y):
        return (self.model(x + 0.1 * torch.randn_like(x)) - y).square().mean()

    def take(self, n=4):
        return self.step(torch.randn(n, 3), torch.rand(n, 2))

    def state(self):
        return [*self.model.parameters(), *tensors([*self.optimizer.state.values()])]


def run(actions, **how):
    """The losses, all tensors and the next random numbers after functions of a case; None takes a step."""
    case = Case(**how)
    found = [case.take() if action is None else action(case) for action in actions]
    return [x for x in found if x is not None] + case.state() + [torch.rand(2)]


def set_lr(case):
    case.optimizer.param_groups[0]["lr"].fill_(0.02)


def set_betas(case):
    case.optimizer.param_groups[0]["betas"] = (0.5, 0.6)


def replace_lr(case):
    case.optimizer.param_groups[0]["lr"] = torch.tensor(0.01)


def reload(case):
    case.optimizer.load_state_dict(case.optimizer.state_dict())


def replace_moment(case):
    state = case.optimizer.state[case.model[0].weight]
    state["exp_avg"] = state["exp_avg"].clone()


def move(case):
    case.model[0].weight.data = case.model[0].weight.data.clone()


def take_two(case):
    return case.take(2)


@pytest.mark.parametrize(
    ("actions", "count"),
    [
        ([None], 0),
        ([None] * 6, 1),
        ([None, None, set_lr, None, None], 1),
        ([None, None, take_two, None, None, take_two, None], 1),  # the last batch of an epoch
        ([None, None, set_betas, None, None, None], 2),
        ([None, None, set_betas, None], 1),
        ([None, None, replace_lr, None, None], 2),
        ([None, None, reload, None, None], 2),
        ([None, None, replace_moment, None, None], 2),
        ([None, None, move, None, None], 2),
    ],
    ids=lambda value: "-".join("step" if a is None else a.__name__ for a in value) if isinstance(value, list) else None,
)
def test_steps_are_those_without_graphs_whatever_changes_between_them(captures, without, actions, count):
    found = run(actions)
    assert len(captures) == count
    expected = without(lambda: run(actions))
    assert all(map(torch.equal, found, expected))


def test_gradients_that_are_there_before_a_step_are_added_to(captures, without):
    def accumulate(case):
        case.loss(torch.ones(4, 3), torch.ones(4, 2)).backward()

    actions = [None, None, None, accumulate, None, None, accumulate, accumulate, None, None]
    assert all(map(torch.equal, run(actions), without(lambda: run(actions))))
    assert len(captures) == 1


def test_a_loss_stays_what_it_was(captures):
    case = Case()
    found = [case.take() for _ in range(5)]
    copies = [loss.clone() for loss in found]
    case.take()
    assert all(map(torch.equal, found, copies))
    assert not any(loss.requires_grad for loss in found)
    assert all(p.grad is None for p in case.model.parameters())


class Told(Case):
    """Its loss returns that of each sample too, and `after` adds them up."""

    def __init__(self, clip=0.5, optimizer=torch.optim.AdamW, **how):
        super().__init__(**how)
        if optimizer is not torch.optim.AdamW:
            self.optimizer = optimizer(self.model.parameters(), lr=0.1)
        self.sums = torch.zeros(4)
        self.step = GraphedStep(self.loss, self.optimizer, clip=clip, after=self.add)

    def loss(self, x, y):
        each = (self.model(x + 0.1 * torch.randn_like(x)) - y).square().mean(1)
        size = (x[0, 0] * self.model[0].weight[0, 0]).square().sqrt()  # whose gradient is NaN at 0
        return each.mean() + size, each, x[:, 0]

    def add(self, loss, each, first):
        assert not torch.is_grad_enabled()
        self.sums += each

    def take(self, bad=None):
        x = torch.randn(4, 3)
        if bad == "loss":
            x[1] = torch.nan
        if bad == "gradients":
            x[0, 0] = 0
        return self.step(x, torch.rand(4, 2))


def test_further_tensors_are_returned_and_what_may_not_be_repeated_is_done_once(captures, without):
    def run():
        case = Told()
        found = [case.take() for _ in range(6)]
        assert not any(x.requires_grad for returned in found for x in returned)
        torch.testing.assert_close(case.sums, sum(each for _, each, _ in found))
        return [*(x for returned in found for x in returned), case.sums, *case.state(), torch.rand(2)]

    found = run()
    assert len(captures) == 1
    assert all(map(torch.equal, found, without(run)))


@pytest.mark.parametrize("clip", [0.5, None])
@pytest.mark.parametrize("bad", ["loss", "gradients"])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(captures, without, clip, bad, first):
    def run():
        case, found = Told(clip), []
        for k in range(6):
            before = [x.detach().clone() for x in case.state()]
            loss, *_ = case.take(bad if k == first else None)
            found += [loss.clone(), case.step.skipped.clone()]
            assert case.step.skipped == (k == first)
            if k == first:
                # In the first step, the optimizer makes its moments: they are zero.
                assert all(map(torch.equal, case.state()[: len(before)], before))
                assert all(x.isfinite().all() for x in case.state())
                assert loss.isfinite() == (bad == "gradients")
            else:
                assert not all(map(torch.equal, [*case.model.parameters()], before))
            assert all(p.grad is None for p in case.model.parameters())
            assert not hasattr(case.optimizer, "found_inf")
        return found + case.state()

    found = run()
    assert len(captures) == 1
    assert all(torch.equal(*map(torch.nan_to_num, pair)) for pair in zip(found, without(run), strict=True))


def test_an_optimizer_that_cannot_skip_takes_every_step():
    case = Told(optimizer=torch.optim.Adagrad)
    case.take("loss")
    assert case.step.skipped == 0
    assert case.model[0].weight.isnan().any()


@pytest.mark.filterwarnings("ignore:training runs launch by launch")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", [1e-3, None])
def test_the_norm_of_the_gradients_is_told_as_it_was_before_clipping(captures, clip, scaled):
    case = Told(clip)
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        case.step = GraphedStep(case.loss, case.optimizer, clip=clip, scaler=scaler)
    for seed in range(4):
        inputs = torch.randn(4, 3), torch.rand(4, 2)
        torch.manual_seed(seed)
        gradients = torch.autograd.grad(case.loss(*inputs)[0], list(case.model.parameters()))
        torch.manual_seed(seed)
        case.step(*inputs)
        expected = torch.cat([gradient.flatten().double() for gradient in gradients]).norm()
        assert case.step.norm.item() == pytest.approx(expected.item(), rel=1e-6)  # a few roundings of float32
    assert len(captures) == (not scaled)


def test_a_scaler_decides_alone_which_steps_are_skipped():
    case = Told()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    case.step = GraphedStep(case.loss, case.optimizer, clip=0.5, scaler=scaler)
    before = [p.detach().clone() for p in case.model.parameters()]
    case.take("loss")
    assert case.step.skipped == 0
    assert scaler.get_scale() == 2.0
    assert all(map(torch.equal, case.model.parameters(), before))


@pytest.mark.parametrize(
    ("how", "reason"),
    [({"lr": 0.1}, "the learning rate is a number"), ({"capturable": False}, "give it capturable=True")],
    ids=str,
)
def test_an_optimizer_whose_settings_a_graph_would_keep_is_not_captured(captures, without, how, reason):
    with pytest.warns(UserWarning, match=reason) as told:
        found = run([None] * 4, **how)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert not captures
    assert all(map(torch.equal, found, without(lambda: run([None] * 4, **how))))


def test_a_loss_that_draws_on_the_host_is_not_captured(captures, without):
    class Host(Case):
        def loss(self, x, y):
            return super().loss(x, y) * random.random()

    def run():
        random.seed(1)
        case = Host()
        return [*(case.take() for _ in range(4)), *case.state()]

    expected = without(run)
    with pytest.warns(UserWarning, match="it draws random numbers on the host"):
        assert all(map(torch.equal, run(), expected))


def test_scaled_gradients_are_not_captured(captures):
    case = Case()
    case.step = GraphedStep(case.loss, case.optimizer, scaler=torch.amp.GradScaler("cpu"))
    case.take()
    with pytest.warns(UserWarning, match="its gradients are scaled"):
        case.take()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.take()
    assert not captures


def test_an_error_of_the_loss_reaches_the_caller_and_leaves_no_gradient(captures):
    case, shapes = Case(), []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("no gradient today")

    def loss(x, y):
        shapes.append(x.shape)
        hidden = case.model[0](x)
        return (case.model[2](Fails.apply(hidden) if len(shapes) == 2 else hidden) - y).square().mean()

    case.step = GraphedStep(loss, case.optimizer)
    case.take()
    before = [x.clone() for x in case.state()]
    with pytest.raises(ValueError, match="no gradient today"):
        case.take()
    assert all(map(torch.equal, case.state(), before))
    assert all(p.grad is None for p in case.model.parameters())
