"""Which timesteps a step takes: the loss stays unbiased, whatever the probabilities are."""

import pytest
import torch

from ddpm_fast.timestep_sampling import DRAWN, TIMESTEP_SAMPLERS, UNITS, LossSecondMoments, UniformTimesteps

EPS = torch.finfo(torch.float32).eps


class Plain:
    """The same in Python and float64: the last losses of each timestep in a list."""

    def __init__(self, timesteps, history=10, uniform=0.001):
        self.losses = [[] for _ in range(timesteps)]
        self.history, self.uniform = history, uniform

    def update(self, t, losses):
        for at, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if abs(loss) < float("inf"):
                self.losses[at] = [*self.losses[at], loss][-self.history :]

    def probabilities(self):
        n = len(self.losses)
        if not all(len(losses) == self.history for losses in self.losses):
            return torch.full((n,), 1 / n, dtype=torch.float64)
        p = torch.tensor(self.losses, dtype=torch.float64).square().mean(1).sqrt()
        return (1 - self.uniform) * p / p.sum() + self.uniform / n


def assert_probabilities(sampler, plain):
    """Within the roundings of float32: T of the sum, ten squares, and the rest; and the unit of the smallest."""
    expected = plain.probabilities()
    tolerance = (sampler.num_timesteps + sampler.history + 8) * EPS + 1 / (UNITS * expected.min())
    assert ((sampler.probabilities().double() - expected).abs() <= tolerance * expected).all()


def filled(timesteps=13, batches=40, n=12, history=3, **how):
    sampler, plain = LossSecondMoments(timesteps, history, **how), Plain(timesteps, history, **how)
    for _ in range(batches):
        t = torch.randint(0, timesteps, (n,))
        losses = torch.rand(n) * (1 + t) ** 2
        sampler.update(t, losses)
        plain.update(t, losses)
        assert_probabilities(sampler, plain)
    assert (sampler.counts >= history).all()
    return sampler, plain


@pytest.mark.parametrize("how", [{}, {"uniform": 0.3}, {"history": 10, "batches": 60}], ids=str)
def test_probabilities_are_those_of_a_plain_implementation(how):
    sampler, plain = filled(**how)
    for at, losses in enumerate(plain.losses):
        kept = sampler.losses[at * sampler.history : (at + 1) * sampler.history]
        assert sorted(kept.tolist()) == sorted(losses)


def test_until_every_timestep_has_its_losses_all_are_alike():
    sampler = LossSecondMoments(4, history=2)
    for t in ([0, 1, 2, 2], [0, 1, 3, 3]):
        assert sampler.probabilities().tolist() == [0.25] * 4
        sampler.update(torch.tensor(t), torch.arange(4.0))
    assert sampler(6)[1].shape == (6,)
    assert len(set(sampler.probabilities().tolist())) > 1


def test_the_expected_weighted_loss_is_the_mean_over_all_timesteps():
    """Exactly, over the probabilities of the units that are drawn."""
    sampler, _ = filled(timesteps=50)
    units, losses = sampler._units().double(), torch.rand(50, dtype=torch.float64)
    p = units / units.sum()
    t, weights = sampler(5000)
    expected = 1 / (50 * p)
    assert ((weights.double() - expected[t]).abs() <= 3 * EPS * expected[t]).all()
    assert (p * expected * losses).sum().item() == pytest.approx(losses.mean().item(), rel=1e-12)
    for sampled in (sampler, UniformTimesteps(50)):
        t, weights = sampled(100)
        assert (t.dtype, weights.dtype, t.shape, weights.shape) == (torch.int64, torch.float32, (100,), (100,))


def test_a_timestep_is_drawn_as_often_as_its_probability_says():
    """Every unit of the whole belongs to one timestep: those at its borders are checked, not a sample."""
    sampler, _ = filled(timesteps=7)
    units = sampler._units()
    upto = units.cumsum(0)
    assert abs(int(upto[-1]) - UNITS) <= 8 * EPS * UNITS
    assert int(upto[-1]) < DRAWN * 1e-6  # so that the remainder is as good as uniform
    first, last = upto - units, upto - 1
    for drawn in (first, last):
        assert torch.equal(torch.searchsorted(upto, drawn, right=True), torch.arange(7))
    n = 20_000
    counts = sampler(n)[0].bincount(minlength=7)
    p = sampler.probabilities()
    assert ((counts - n * p).abs() < 6 * (n * p * (1 - p)).sqrt()).all()


@pytest.mark.parametrize("t", [[3] * 10, [3, 1, 3, 3, 1, 3, 3, 0, 3, 1]], ids=str)
def test_of_many_losses_of_one_timestep_in_a_batch_the_last_ones_count(t):
    sampler, plain = LossSecondMoments(4, history=3), Plain(4, history=3)
    for k in range(3):
        losses = torch.arange(10.0) + 100 * k
        sampler.update(torch.tensor(t), losses)
        plain.update(torch.tensor(t), losses)
        for at, expected in enumerate(plain.losses):
            found = sampler.losses[3 * at : 3 * at + 3].tolist()
            assert sorted(found) == sorted([0.0] * (3 - len(expected)) + expected)
    assert sampler.counts.tolist() == [3 * t.count(at) for at in range(4)]


def test_losses_that_are_not_finite_and_losses_of_any_size_leave_probabilities():
    sampler, plain = LossSecondMoments(3, history=2), Plain(3, history=2)
    t = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    losses = torch.tensor([1e30, torch.nan, 3e30, 1e30, 2e30, 1e-30, -torch.inf])
    for _ in range(2):
        sampler.update(t, losses)
        plain.update(t, losses)
        assert_probabilities(sampler, plain)
    sampler = LossSecondMoments(3, history=1)
    sampler.update(torch.arange(3), torch.zeros(3))
    torch.testing.assert_close(sampler.probabilities(), torch.full((3,), 1 / 3))
    assert sampler(4)[1].isfinite().all()


def test_a_state_that_is_loaded_goes_on_as_it_would_have():
    sampler, _ = filled()
    other = LossSecondMoments(13, 3)
    other.load_state_dict(sampler.state_dict())
    for each in (sampler, other):
        torch.manual_seed(5)
        t, weights = each(20)
        each.update(t, weights)
    assert all(map(torch.equal, sampler.state_dict().values(), other.state_dict().values()))
    assert not UniformTimesteps(13).state_dict()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"timesteps": 0}, "timesteps must be"),
        ({"history": 0}, "history must be"),
        ({"uniform": 1.5}, r"uniform must be in \[0, 1\], got 1\.5"),
        ({"uniform": -0.1}, "uniform must be"),
    ],
)
def test_values_that_cannot_be_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        LossSecondMoments(**{"timesteps": 5} | how)


def test_the_registry_has_both():
    assert {name: type(make(5)) for name, make in TIMESTEP_SAMPLERS.items()} == {
        "uniform": UniformTimesteps,
        "loss_second_moment": LossSecondMoments,
    }
