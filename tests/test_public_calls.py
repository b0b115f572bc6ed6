"""Every public call gives the right answer, or an error that names what was given: no crash, and no silent NaN.

The right answer is the formula of the paper in float64, of inputs of every dtype and layout. A tolerance is the
rounding of the coefficients and of each operation, times the size of what is added.
"""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_diffusion import images, make

from ddpm_fast import UNet, noise, ops, samplers, schedules

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda x: x[:1].expand(x.shape),
    "one value": lambda x: x.flatten()[0].expand(x.shape),
    "with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "overlapping": lambda x: torch.cat([x.flatten(), x.flatten()]).as_strided(x.shape, [1] * x.ndim),
    "inference": lambda x: _inference(x),
    "differentiated": lambda x: x.clone().requires_grad_(),
}


@torch.inference_mode()
def _inference(x):
    return x.clone()


@st.composite
def data(draw, shape, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(-3, 3)
    x = x.to(draw(st.sampled_from(DTYPES)))
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)


@st.composite
def pairs(draw):
    """Two tensors of one shape (N, 2, ...) and timesteps."""
    n, axes = draw(st.integers(1, 4)), draw(st.lists(st.integers(1, 5), max_size=3))
    shape = (n, 2, *axes)
    t = torch.tensor(draw(st.lists(st.integers(0, 19), min_size=n, max_size=n)))
    t = draw(st.sampled_from([t, torch.stack([t, t], dim=1)[:, 0]]))
    return draw(data(shape, 1)), draw(data(shape, 2)), t


DIFFUSION = make().eval()
SCHEDULE = DIFFUSION.schedule


def columns(t, x, *tables):
    return [table[t].view(-1, *[1] * (x.ndim - 1)) for table in tables]


def assert_sum(found, terms, operations, scale=1.0):
    """found = sum(terms) scale, with so many roundings of each term in the dtype of found or of its arithmetic."""
    exact = sum(terms) * scale
    size = sum(term.abs() for term in terms) * abs(scale)
    eps = torch.finfo(torch.promote_types(found.dtype, torch.float32)).eps
    eps = max(eps, torch.finfo(torch.float32).eps)  # the tables are float32
    bound = (operations * eps + torch.finfo(found.dtype).eps) * size  # what is given may be rounded to its dtype
    bound += torch.finfo(found.dtype).smallest_normal
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= bound).all()


@given(pairs())
def test_the_closed_forms_are_those_of_the_papers_for_any_dtype_and_layout(pair):
    x, y, t = pair
    with torch.no_grad():
        a, s = columns(t, x, SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod)
        x64, y64 = x.detach().double(), y.detach().double()
        d = DIFFUSION
        assert_sum(d.q_sample(x, t, y), [a * x64, s * y64], 4)
        assert_sum(d.predict_start_from_noise(x, t, y), [x64 / a, -s / a * y64], 4)
        assert_sum(d.predict_v(x, t, y), [a * y64, -s * x64], 4)
        assert_sum(d.predict_start_from_v(x, t, y), [a * x64, -s * y64], 4)
        assert_sum(d.predict_noise_from_start(x, t, y), [x64 / s, -a / s * y64], 5)
        coefficients = (SCHEDULE.posterior_mean_coef1, SCHEDULE.posterior_mean_coef2, SCHEDULE.posterior_variance)
        c0, cx, variance = columns(t, x, *coefficients)
        mean, found_variance, log_variance = d.q_posterior(x, y, t)
        assert_sum(mean, [c0 * x64, cx * y64], 4)
        torch.testing.assert_close(found_variance.double(), variance, rtol=1e-6, atol=0)
        assert log_variance.isfinite().all()


@given(pairs(), st.sampled_from(["pred_noise", "pred_x0", "pred_v"]))
def test_a_loss_is_that_of_the_paper_for_any_dtype_and_layout(pair, objective):
    x, y, t = pair
    d = make(objective=objective, loss_weight="uniform", size=tuple(x.shape[2:]))
    with torch.no_grad():
        a, s = columns(t, x, d.schedule.sqrt_alphas_cumprod, d.schedule.sqrt_one_minus_alphas_cumprod)
        # The network is given x_t as the op rounds it; the rest is in float64.
        given = d.q_sample(x.detach().float() if x.dtype != torch.float64 else x.detach(), t, y).float()
        predicted = d.model.eval()(given, t).double()
        target = {
            "pred_noise": y.detach().double(),
            "pred_x0": x.detach().double(),
            "pred_v": a * y.detach().double() - s * x.detach().double(),
        }[objective]
        expected = (predicted - target).square().flatten(1).mean(1)
        found = d.p_losses(x, t, y, loss_reduction="none")
    # All is float32: the inputs, each of whose errors is a few roundings, and the sum over the sample.
    eps = torch.finfo(torch.float32).eps
    error = 16 * eps * float(1 + x.detach().abs().max() + y.detach().abs().max())
    bound = 2 * expected.sqrt() * error + error**2 + x[0].numel() * eps * expected
    assert ((found.double() - expected).abs() <= bound).all()


@given(pairs(), st.integers(0, 19))
def test_a_step_is_that_of_the_paper_for_any_dtype_and_layout(pair, t):
    x, z, _ = pair
    x, z, d = x.detach(), z.detach(), DIFFUSION
    with torch.no_grad():
        pred = d.predict(x, torch.full((len(x),), t)).pred.double()
        a, s = (table[t] for table in (SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod))
        ax, sp = a * x.double(), s * pred
        x_start = (ax - sp).clamp(-1, 1)
        c0, cx = SCHEDULE.posterior_mean_coef1[t], SCHEDULE.posterior_mean_coef2[t]
        sigma = SCHEDULE.posterior_variance[t].sqrt()
        found, found_start = d.p_sample(x, t, noise=z)
        inner = [ax, -ax, sp, -sp]  # which add nothing, but whose roundings x_start has
        assert_sum(found, [cx * x.double(), c0 * x_start, sigma * z.double(), *(c0 * term for term in inner)], 12)
        assert_sum(found_start, [x_start, *inner], 6)


# What may be given by mistake


X = images(3)
CENTRED = X * 2 - 1
T = torch.tensor([0, 5, 19])
NOT_DATA = {
    "a list": CENTRED.tolist(),
    "None": None,
    "a number": 0.5,
    "an array": CENTRED.numpy(),
    "0 axes": torch.tensor(0.5),
    "integers": CENTRED.long(),
    "bools": CENTRED > 0,
    "complex numbers": CENTRED.to(torch.complex64),
}
TAKING_DATA = {
    "forward": (lambda d, x: d(x), "images|floating"),
    "likelihood": (lambda d, x: d.likelihood(x, steps=3), "images|floating"),
    "init": (lambda d, x: d.sample(init=x, strength=0.5, steps=2), "images"),
    "encode": (lambda d, x: d.encode(x, steps=2), "images"),
    "inpaint": (lambda d, x: d.inpaint(x, X > 0.5, steps=2), "images"),
    "q_sample": (lambda d, x: d.q_sample(x, T), "x_start"),
    "q_sample's noise": (lambda d, x: d.q_sample(CENTRED, T, x), "noise"),
    "p_losses": (lambda d, x: d.p_losses(x, T), "x_start"),
    "p_losses' noise": (lambda d, x: d.p_losses(CENTRED, T, x), "noise"),
    "interpolate": (lambda d, x: d.interpolate(x, CENTRED), "x1"),
    "interpolate, 2nd": (lambda d, x: d.interpolate(CENTRED, x), "x2"),
    "p_sample": (lambda d, x: d.p_sample(x, 3), "x must"),
    "p_sample's noise": (lambda d, x: d.p_sample(CENTRED, 3, noise=x), "noise"),
    "model_predictions": (lambda d, x: d.model_predictions(x, T), "x must"),
    "p_mean_variance": (lambda d, x: d.p_mean_variance(x, T), "x must"),
    "q_posterior": (lambda d, x: d.q_posterior(x, CENTRED, T), "x_start"),
    "q_posterior, 2nd": (lambda d, x: d.q_posterior(CENTRED, x, T), "x_t"),
    "predict_start_from_noise": (lambda d, x: d.predict_start_from_noise(x, T, CENTRED), "x_t"),
    "predict_start_from_noise, 2nd": (lambda d, x: d.predict_start_from_noise(CENTRED, T, x), "noise"),
    "predict_noise_from_start": (lambda d, x: d.predict_noise_from_start(CENTRED, T, x), "x0"),
    "predict_v": (lambda d, x: d.predict_v(x, T, CENTRED), "x_start"),
    "predict_start_from_v": (lambda d, x: d.predict_start_from_v(CENTRED, T, x), "v must"),
    "normalize": (lambda d, x: d.normalize(x), "img"),
    "x_T": (lambda d, x: d.sample(3, noise=x, steps=2), "noise"),
}
MAY_BE_NONE = {"init", "q_sample's noise", "p_losses' noise", "p_sample's noise", "x_T"}


@pytest.mark.parametrize("name", TAKING_DATA)
def test_what_is_no_data_is_refused_by_name(name):
    call, names = TAKING_DATA[name]
    for kind, x in NOT_DATA.items():
        if not (x is None and name in MAY_BE_NONE):
            with pytest.raises(ValueError, match=names):
                pytest.fail(f"{name} took {kind}: {call(DIFFUSION, x)}")


@pytest.mark.parametrize("other", [CENTRED[:, :1], CENTRED[:1], CENTRED[..., :1], CENTRED[:, 0], CENTRED[None]])
@pytest.mark.parametrize("name", [name for name in TAKING_DATA if "2nd" in name or "noise" in name or name == "x_T"])
def test_tensors_that_would_be_broadcast_are_refused(name, other):
    call, _ = TAKING_DATA[name]
    with pytest.raises(ValueError, match=r"must have the shape of|must have the shape \(|timesteps must have"):
        call(DIFFUSION, other)


NOT_TIMESTEPS = {
    "floats": T.float(),
    "int32": T.int(),
    "too few": T[:2],
    "two axes": T[:, None],
    "too large": torch.tensor([0, 5, 20]),
    "negative": torch.tensor([0, -1, 5]),
    "a number": 5,
    "a list": [0, 5, 19],
}


@pytest.mark.parametrize("kind", NOT_TIMESTEPS)
def test_what_are_no_timesteps_is_refused(kind):
    t = NOT_TIMESTEPS[kind]
    d = DIFFUSION
    for call in (
        lambda: d.q_sample(CENTRED, t),
        lambda: d.p_losses(CENTRED, t),
        lambda: d(X, times=t),
        lambda: d.model_predictions(CENTRED, t),
        lambda: d.p_mean_variance(CENTRED, t),
        lambda: d.q_posterior(CENTRED, CENTRED, t),
        lambda: d.predict_v(CENTRED, t, CENTRED),
        lambda: d.predict_noise_from_start(CENTRED, t, CENTRED),
    ):
        with pytest.raises(ValueError, match="timesteps must"):
            call()


def unet(**changes):
    size = {"image_size": 8, "channels": 1, "dim": 8, "dim_mults": [1], "num_res_blocks": 1, "norm_groups": 4}
    model = UNet(**(size | {"attention_resolutions": []} | changes))
    return model.eval()(torch.ones(1, model.channels, 8, 8), torch.zeros(1, dtype=torch.int64))


def a_diffusion(**changes):
    return make(**changes).sample(1, seed=0)


def arguments_of(label, function, names, **fixed):
    """By a label each, calls of a function that is given another value for one of its arguments."""
    return {f"{label}: {key}": (lambda v, key=key: function(**(fixed | {key: v})), key) for key in names}


def visited(name):
    return lambda v: samplers.make(name, SCHEDULE, "pred_v", v)


NUMBERS = {
    **arguments_of(
        "sample",
        DIFFUSION.sample,
        ["batch_size", "steps", "eta", "sampler", "spacing", "seed", "sample_offset", "dynamic_threshold"],
        batch_size=1,
        steps=2,
        sampler="ddim",
        seed=0,
    ),
    **arguments_of("init", DIFFUSION.sample, ["strength"], init=X, steps=2, seed=0),
    **arguments_of("interpolate", DIFFUSION.interpolate, ["t", "lam"], x1=CENTRED, x2=CENTRED, seed=0),
    **arguments_of("likelihood", DIFFUSION.likelihood, ["steps"], images=(X * 255).byte(), seed=0),
    **arguments_of("inpaint", DIFFUSION.inpaint, ["jump"], images=X, mask=X > 0.5, steps=2, seed=0),
    **arguments_of("forward", DIFFUSION.forward, ["offset_noise_strength"], img=X, seed=0),
    **arguments_of(
        "GaussianDiffusion",
        a_diffusion,
        ["sampling_timesteps", "ddim_sampling_eta", "offset_noise_strength", "clip_denoised", "loss_weight"],
    ),
    **arguments_of("min_snr", a_diffusion, ["min_snr_gamma"], loss_weight="min_snr"),
    **arguments_of("p2", a_diffusion, ["p2_gamma", "p2_k"], loss_weight="p2"),
    **arguments_of("image_size", a_diffusion, ["size"]),
    **arguments_of("UNet", unet, ["dim", "dim_mults", "num_heads", "dropout", "norm_groups", "norm_eps", "channels"]),
    **arguments_of("linear", schedules.make, ["beta_start", "beta_end"], name="linear", timesteps=30),
    **arguments_of("cosine", schedules.make, ["s", "timesteps"], name="cosine", timesteps=30),
    **arguments_of("sigmoid", schedules.make, ["start", "end", "tau"], name="sigmoid", timesteps=30),
    **arguments_of("schedule", schedules.NoiseSchedule, ["betas"]),
    **{f"make: {name}": (visited(name), "steps") for name in samplers.SAMPLERS},
    **arguments_of("gaussian", noise.gaussian, ["shape", "seed", "stream", "sample_offset"], shape=(2, 3), seed=0),
    "key": (noise.key, "seed"),
    "fold_in": (lambda v: noise.fold_in(noise.key(0), v), "data"),
    "normal": (lambda v: noise.normal(noise.key(0), v), "size"),
    "sample_keys": (lambda v: noise.sample_keys(v, seed=0), "samples"),
    "derive_seed": (lambda v: noise.derive_seed(1, v), "data"),
    "group_norm": (lambda v: ops.group_norm_silu(CENTRED, torch.ones(2), torch.ones(2), 1, v), "eps"),
    "clip": (
        lambda v: ops.reverse_step(CENTRED, CENTRED, T[0], torch.ones(20, 6), clip=v).x,
        "clip",
    ),
}  # fmt: skip
# Other words for what was given: sizes and channels follow from one argument, and what is a tensor from another.
WORDS = "integer|number|shape|unknown|timesteps|beta|tensor|needs|allocate|overflow|eta = "
MISTAKES = st.one_of(
    st.sampled_from([None, "1", "", b"1", [], {}, [None], ["1"], 1j, object(), math.nan, math.inf, -math.inf]),
    st.sampled_from([torch.tensor(math.nan), torch.zeros(2), torch.zeros(0), torch.tensor([[1]]), 10**400, -(2**70)]),
    st.floats(-4, 4),
    st.integers(-4, 4),
    st.integers(2**62, 2**70),
    st.booleans(),
)


def is_finite(result):
    if isinstance(result, torch.Tensor):
        return not result.is_floating_point() or bool(result.isfinite().all())
    if isinstance(result, samplers.StepTable):
        return is_finite(result.rows)
    if isinstance(result, schedules.NoiseSchedule):
        return is_finite(result.betas) and is_finite(result.alphas_cumprod)
    return all(map(is_finite, vars(result).values())) if hasattr(result, "total_bpd") else True


@pytest.mark.long
@pytest.mark.parametrize("name", NUMBERS)
@given(value=MISTAKES)
def test_a_number_is_used_or_refused_by_name(name, value):
    call, argument = NUMBERS[name]
    try:
        result = call(value)
    except (ValueError, TypeError, RuntimeError) as error:
        assert re.search(f"{argument}|{WORDS}", str(error), re.IGNORECASE), f"{value!r}: {error}"  # noqa: PT017
    else:
        overflows = isinstance(value, int) and abs(value) > 1 << 60  # whose square float32 does not hold
        assert is_finite(result) or overflows, f"{value!r} leads to what is not finite"
