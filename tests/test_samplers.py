import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_fast import samplers, schedules
from ddpm_fast.parameterization import OBJECTIVES

SCHEDULE = schedules.make("linear", 1000)


def test_full_ancestral_rows_are_the_posterior():
    table = samplers.ancestral(SCHEDULE, "pred_noise", variance="posterior")
    assert table.t.tolist() == list(range(999, -1, -1))
    order = table.t
    # 1 - abar / abar' against beta: rounding of abar, relative to the smallest beta, 1e-4.
    close = {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(table.A, SCHEDULE.posterior_mean_coef2[order], **close)
    torch.testing.assert_close(table.B, SCHEDULE.posterior_mean_coef1[order], **close)
    torch.testing.assert_close(table.sigma**2, SCHEDULE.posterior_variance[order], **close)
    beta = samplers.ancestral(SCHEDULE, "pred_noise", variance="beta").sigma ** 2
    torch.testing.assert_close(beta[:-1], SCHEDULE.betas[order[:-1]], **close)
    assert beta[-1] == 0


@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_ddim_with_eta_1_is_ancestral_with_the_posterior_variance(steps):
    """Song et al. (2021), sec. 4.1."""
    ddim = samplers.ddim(SCHEDULE, "pred_v", steps, eta=1.0)
    ancestral = samplers.ancestral(SCHEDULE, "pred_v", steps)
    torch.testing.assert_close(ddim.rows, ancestral.rows, rtol=1e-9, atol=1e-10)


def test_every_sampler_keeps_the_marginals_where_it_should():
    """A x_t + B x_0 + sigma z must be distributed as q(x_t' | x_0): Song et al. (2021), lemma 1."""
    abar = SCHEDULE.alphas_cumprod
    tables = [samplers.ddim(SCHEDULE, "pred_noise", 20, eta=eta) for eta in (0.0, 0.5, 1.0)]
    for table in [*tables, samplers.ancestral(SCHEDULE, "pred_noise", 20)]:
        here, after = abar[table.t], torch.cat([abar[table.t][1:], torch.ones(1, dtype=torch.float64)])
        torch.testing.assert_close(table.A * here.sqrt() + table.B, after.sqrt())
        torch.testing.assert_close(table.A**2 * (1 - here) + table.sigma**2, 1 - after, rtol=1e-9, atol=1e-12)
    none, half, whole = (table.sigma for table in tables)
    assert not none.any()
    torch.testing.assert_close(half, whole / 2)


MULTISTEP = (samplers.dpmpp_2m, samplers.dpmpp_2m_sde)


@pytest.mark.parametrize("sde", [False, True])
def test_dpm_solver_pp_is_the_papers_recursion(sde):
    """Lu et al. (2022), algorithm 2 and its SDE form, on numbers for what the network and the noise would be."""
    steps = [999, 900, 850, 500, 320, 100]
    alpha = [math.sqrt(SCHEDULE.alphas_cumprod[t]) for t in steps]
    sigma = [math.sqrt(1 - SCHEDULE.alphas_cumprod[t]) for t in steps]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    x0, z = torch.randn(2, len(steps), generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

    table = MULTISTEP[sde](SCHEDULE, "pred_noise", steps)
    assert table.t.tolist() == steps
    expected = x = 1.7
    for i in range(1, len(steps)):
        h, D = lam[i] - lam[i - 1], x0[i - 1]
        if i > 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * x0[i - 1] - 1 / (2 * r) * x0[i - 2]
        if sde:
            expected = sigma[i] / sigma[i - 1] * math.exp(-h) * expected + alpha[i] * (1 - math.exp(-2 * h)) * D
            expected += sigma[i] * math.sqrt(1 - math.exp(-2 * h)) * z[i]
        else:
            expected = sigma[i] / sigma[i - 1] * expected - alpha[i] * (math.exp(-h) - 1) * D
        A, B, C, deviation = table.rows[i - 1, 2:].tolist()
        x = A * x + B * x0[i - 1] + C * (x0[i - 2] if i > 1 else math.nan if C else 0) + deviation * z[i]
        assert x == pytest.approx(expected, rel=1e-12)
    assert table.rows[-1, 2:].tolist() == [0, 1, 0, 0]  # lambda = infinity: x0_hat, without noise


@pytest.mark.parametrize("steps", [1000, 50, 3, 2, 1])
@pytest.mark.parametrize("sde", [False, True])
def test_dpm_solver_pp_with_two_equal_guesses_is_ddim(sde, steps):
    """Its first order is DDIM, with eta = 1 for the SDE: Lu et al. (2022). One step or two are all of first order."""
    table = MULTISTEP[sde](SCHEDULE, "pred_v", steps)
    ddim = samplers.ddim(SCHEDULE, "pred_v", table.t.tolist(), eta=float(sde))
    close = {"rtol": 1e-9, "atol": 1e-10}
    for a, b in ((table.A, ddim.A), (table.B + table.C, ddim.B), (table.sigma, ddim.sigma)):
        torch.testing.assert_close(a, b, **close)
    assert torch.equal(table.rows[:, :2], ddim.rows[:, :2])
    assert table.C[0] == table.C[-1] == 0
    assert (table.C[1:-1] < 0).all()


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_dpm_solver_pp_rows_are_finite(name, objective):
    schedule = schedules.make(name, 100)
    for steps in (1, 2, 3, 20, 100):
        for sde in (False, True):
            assert MULTISTEP[sde](schedule, objective, steps).rows.isfinite().all()


def test_dpm_solver_pp_of_a_schedule_that_ends_without_signal_begins_at_x0_hat():
    """lambda -> -infinity: x_T says nothing of x_0, and v says -x_0. Lin et al. (2024)."""
    schedule = schedules.NoiseSchedule([*SCHEDULE.betas.tolist(), 1 - 2**-53])
    a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    assert a[-1] < 1e-9
    for sde in (False, True):
        table = MULTISTEP[sde](schedule, "pred_v", 20)
        assert table.rows.isfinite().all()
        signal, noise = a[table.t[1]].item(), s[table.t[1]].item()
        noisy = [0.0, signal, 0.0, noise] if sde else [noise, signal, 0.0, 0.0]
        assert table.rows[0].tolist() == pytest.approx([0.0, -1.0, *noisy], abs=1e-6)


def test_karras_timesteps_are_even_in_the_seventh_root_of_the_noise():
    """Karras et al. (2022), eq. 5, with sigma = s / a: nearest timesteps, each once."""
    assert samplers.karras_timesteps(SCHEDULE, [3, 9]).tolist() == [9, 3]
    with torch.device("meta"):
        assert samplers.karras_timesteps(SCHEDULE, 5).device.type == "cpu"
    for name in schedules.SCHEDULES:
        schedule = schedules.make(name, 1000)
        sigma = [((1 - abar) / abar) ** 0.5 for abar in schedule.alphas_cumprod.tolist()]
        largest, smallest = min(sigma[-1], 80), sigma[0]
        for steps in (1, 2, 10, 25):
            found = samplers.karras_timesteps(schedule, steps).tolist()
            assert (len(found), found[0]) == (steps, 999)
            assert found == sorted(set(found), reverse=True)
            for i in range(1, steps):
                root = largest ** (1 / 7) + i / (steps - 1) * (smallest ** (1 / 7) - largest ** (1 / 7))
                nearest = min(range(1000), key=lambda t: abs(math.log(sigma[t]) - 7 * math.log(root)))
                assert found[i] == min(nearest, found[i - 1] - 1)
        for steps in (100, 500, 999, 1000):  # more than there are timesteps in places
            found = samplers.karras_timesteps(schedule, steps)
            assert len(found) == steps
            assert (found.diff() < 0).all()
            assert (found[0], found[-1] >= 0) == (999, True)


def test_unipc_is_the_papers_predictor_and_corrector():
    """Zhao et al. (2023): UniP-1 and UniC-1 with B_2, each by itself, on numbers for what the network would be."""
    steps = [999, 900, 850, 500, 320, 100]
    alpha = [math.sqrt(SCHEDULE.alphas_cumprod[t]) for t in steps]
    sigma = [math.sqrt(1 - SCHEDULE.alphas_cumprod[t]) for t in steps]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    x0 = torch.randn(len(steps), generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

    table = samplers.unipc(SCHEDULE, "pred_noise", steps)
    assert table.t.tolist() == steps
    corrected = x = 1.7
    for i in range(1, len(steps)):
        if i > 1:  # the corrector, now that x0[i - 1] is there
            h = lam[i - 1] - lam[i - 2]
            B_h = math.exp(-h) - 1
            without = sigma[i - 1] / sigma[i - 2] * corrected - alpha[i - 1] * (math.exp(-h) - 1) * x0[i - 2]
            corrected = without - alpha[i - 1] * B_h * 0.5 * (x0[i - 1] - x0[i - 2])
        h = lam[i] - lam[i - 1]
        predicted = sigma[i] / sigma[i - 1] * corrected - alpha[i] * (math.exp(-h) - 1) * x0[i - 1]
        A, B, C, deviation = table.rows[i - 1, 2:].tolist()
        x = A * x + B * x0[i - 1] + (C * x0[i - 2] if i > 1 else 0)
        assert x == pytest.approx(predicted, rel=1e-12)
        assert deviation == 0
    assert table.C[0] == 0
    assert table.rows[-1, 2:].tolist() == [0, 1, 0, 0]


def test_heun_is_the_papers_algorithm():
    """Karras et al. (2022), algorithm 1 without noise, on numbers for what the network would be."""
    steps = [900, 700, 400, 150, 3]
    a = [math.sqrt(SCHEDULE.alphas_cumprod[t]) for t in steps] + [1.0]
    e = [1 / math.sqrt(SCHEDULE.snr[t]) for t in steps] + [0.0]
    D = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

    table = samplers.heun(SCHEDULE, "pred_noise", steps)
    assert table.t.tolist() == [900, 700, 700, 400, 400, 150, 150, 3, 3]
    assert not table.sigma.any()
    x, call, exact = 1.7, 0, 1.7 / a[0]

    def step():
        A, B, C = table.rows[call, 2:5].tolist()
        return A * x + B * D[call] + C * (D[call - 1] if call else math.nan if C else 0)

    for i in range(5):
        slope = (exact - D[call]) / e[i]
        euler = exact + (e[i + 1] - e[i]) * slope
        x, call = step(), call + 1
        assert x == pytest.approx(a[i + 1] * euler, rel=1e-12)
        if e[i + 1] == 0:
            break
        exact = exact + (e[i + 1] - e[i]) * (slope + (euler - D[call]) / e[i + 1]) / 2
        x, call = step(), call + 1
        assert x == pytest.approx(a[i + 1] * exact, rel=1e-12)
    assert call == 9


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_heun_counts_calls_of_the_network(name, spacing):
    """K rows for any K; Heun's steps are the last ones, none begins beyond s / a = 80, and the last is Euler's."""
    schedule = schedules.make(name, 100)
    noise = schedule.snr.rsqrt()
    most = len(samplers.heun(schedule, "pred_v", list(range(100))))
    assert most == 199 - int((noise > 80).sum())
    for calls in (1, 2, 3, 4, 9, 10, 100, 150, most):
        table = samplers.heun(schedule, "pred_v", calls, spacing=spacing)
        assert len(table) == calls
        heun = table.C != 0
        assert (table.A[heun] == 1).all()
        assert not heun[-1]
        assert (noise[table.t[heun.roll(-1)]] <= 80).all()  # where the step begins, in the row before
        assert (table.t.diff() <= 0).all()
        assert (table.t.diff() == 0).sum() == heun.sum()
    with pytest.raises(ValueError, match=f"heun takes at most {most} calls"):
        samplers.heun(schedule, "pred_v", most + 1, spacing=spacing)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_rows_of_every_sampler_and_spacing_are_finite_and_end_at_x0_hat(name, sampler):
    schedule = schedules.make(name, 100)
    for steps, objective, spacing in itertools.product((1, 2, 3, 20, 99, 100), OBJECTIVES, samplers.SPACINGS):
        table = samplers.make(sampler, schedule, objective, steps, spacing=spacing)
        assert len(table) == steps
        assert table.rows.isfinite().all()
        assert table.rows[-1, 2:].tolist() == pytest.approx([0, 1, 0, 0], abs=1e-12)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_schedules_that_end_without_signal_have_rows_of_every_sampler(sampler, spacing):
    schedule = SCHEDULE.with_zero_terminal_snr()
    for steps in (1, 2, 9, 100):
        assert samplers.make(sampler, schedule, "pred_v", steps, spacing=spacing).rows.isfinite().all()
        up = samplers.ddim_inversion(schedule, "pred_v", samplers.spaced_timesteps(schedule, steps, spacing))
        assert up.rows.isfinite().all()


def test_euler_in_sigma_is_ddim():
    """x / a + (e' - e) (x / a - x0_hat) / e, with e = s / a: why there is no sampler of that name."""
    table = samplers.make("ddim", SCHEDULE, "pred_v", 20, spacing="karras")
    a = torch.cat([SCHEDULE.sqrt_alphas_cumprod[table.t], torch.ones(1, dtype=torch.float64)])
    e = torch.cat([SCHEDULE.snr[table.t].rsqrt(), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(table.A, a[1:] * e[1:] / (a[:-1] * e[:-1]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(table.B, a[1:] * (1 - e[1:] / e[:-1]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 7, [0, 5, 30, 99]])
def test_ddim_inversion_undoes_ddim_where_eps_does_not_change(steps):
    """With one eps for all timesteps both go along x_t = a x_0 + s eps."""
    schedule = schedules.make("cosine", 100)
    up = samplers.ddim_inversion(schedule, "pred_noise", steps)
    down = samplers.ddim(schedule, "pred_noise", steps)
    assert up.t.tolist() == [down.t[-1].item(), *down.t.flip(0)[:-1].tolist()]
    eps, x = 0.7, 0.3
    for table in (up, down):
        for k, t in enumerate(table.t.tolist()):
            u, w, A, B, C, sigma = table.rows[k].tolist()
            assert (C, sigma) == (0, 0)
            x = A * x + B * (u * x + w * eps)
            if table is up and k == 0:  # at x_0, where the network's x0_hat is not x_0
                a, s = schedule.sqrt_alphas_cumprod[t].item(), schedule.sqrt_one_minus_alphas_cumprod[t].item()
                assert x == pytest.approx(a * 0.3 + s * eps, rel=1e-12)
        if table is up:
            end = int(down.t[0])
            a, s = (v[end].item() for v in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod))
            assert x == pytest.approx(a * 0.3 + s * eps, rel=1e-12)
    assert x == pytest.approx(0.3, rel=1e-9)


@given(st.data())
def test_spacings_give_k_distinct_timesteps(data):
    """For every T and K: where they begin and end, and that none comes twice."""
    T = data.draw(st.integers(1, 400))
    K = data.draw(st.integers(1, T))
    schedule = schedules.make(data.draw(st.sampled_from(["cosine", "sigmoid", "jsd", "constant"])), T)
    for name in samplers.SPACINGS:
        t = samplers.spaced_timesteps(schedule, K, name)
        assert (t.shape, t.dtype) == ((K,), torch.int64)
        assert (t.diff() < 0).all()
        first = (K - 1) * (T // K) if name == "leading" else T - 1
        assert t[0] == first
        last = t[-1].item()
        if K == 1:
            continue
        if name in ("even", "trailing"):
            assert abs(last - (T / K - 1)) < 1
            assert ((t - (T - 1 - torch.arange(K) * (T / K))).abs() < 1).all()
        elif name == "quadratic":
            assert last == max(T // K**2 - 1, 0)
        else:
            assert last == 0
        assert samplers.spaced_timesteps(schedule, T, name).tolist() == list(range(T))[::-1]


def test_spacings_are_even_in_what_they_say():
    noise = SCHEDULE.snr.rsqrt()
    t = samplers.spaced_timesteps(SCHEDULE, 10, "lambda")
    log_noise = noise[t[1:]].log()
    wanted = torch.linspace(math.log(80), noise[0].log().item(), 10, dtype=torch.float64)[1:]
    assert ((log_noise - wanted).abs() < 0.2).all()  # the distance of neighbours where the noise is least is 0.37
    assert samplers.spaced_timesteps(SCHEDULE, 5, "quadratic").tolist() == [999, 639, 359, 159, 39]
    assert samplers.spaced_timesteps(SCHEDULE, 7, "trailing").tolist() == [999, 856, 713, 570, 428, 285, 142]
    assert samplers.spaced_timesteps(SCHEDULE, 7, "even").tolist() == [999, 856, 713, 570, 427, 284, 141]
    assert samplers.spaced_timesteps(SCHEDULE, 7, "leading").tolist() == [852, 710, 568, 426, 284, 142, 0]
    karras = samplers.spaced_timesteps(SCHEDULE, 7, "karras")
    assert torch.equal(karras, samplers.karras_timesteps(SCHEDULE, 7))


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_sampler_takes_any_spacing_and_has_its_own(name):
    own = samplers.make(name, SCHEDULE, "pred_v", 12)
    default = "even" if name in ("ddpm", "ddim") else "karras"
    assert torch.equal(own.rows, samplers.make(name, SCHEDULE, "pred_v", 12, spacing=default).rows)
    for spacing in samplers.SPACINGS:
        table = samplers.make(name, SCHEDULE, "pred_v", 12, spacing=spacing)
        visited = table.t.unique().flip(0)
        assert torch.equal(visited, samplers.spaced_timesteps(SCHEDULE, len(visited), spacing))
    with pytest.raises(ValueError, match="unknown spacing 'uneven'; there are even, trailing"):
        samplers.make(name, SCHEDULE, "pred_v", 12, spacing="uneven")
    with pytest.raises(ValueError, match="timesteps that are given have their own spacing"):
        samplers.make(name, SCHEDULE, "pred_v", [3, 9], spacing="even")


def test_strided_timesteps_end_with_the_noisiest_and_may_be_given():
    assert samplers.strided_timesteps(1000, 4).tolist() == [999, 749, 499, 249]
    assert samplers.strided_timesteps(10, 1).tolist() == [9]
    assert samplers.strided_timesteps(10, [3, 9, 0]).tolist() == [9, 3, 0]
    assert samplers.ddim(SCHEDULE, "pred_x0", [10, 500, 999]).t.tolist() == [999, 500, 10]


@pytest.mark.parametrize("steps", [0, 1001, -3, [0, 0], [1000], [-1], [], [0.5], True, "ddim50"])
def test_steps_that_cannot_be_are_refused(steps):
    with pytest.raises((ValueError, TypeError)):
        samplers.strided_timesteps(1000, steps)


def test_eta_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        samplers.ddim(SCHEDULE, "pred_noise", 10, eta=-0.1)
    with pytest.raises(ValueError, match="more noise"):
        samplers.ddim(SCHEDULE, "pred_noise", 10, eta=3.0)
