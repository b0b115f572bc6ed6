import math

import pytest
import torch

from ddpm_fast import noise

# Four float32 roundings of r cos(phi), log, root, angle and product, on either side, of values up to sqrt(2 ln 2^33).
BOUND = 2 * 4 * 6.8 * 2**-24


def test_philox_gives_its_known_answer():
    """Random123's test vector for philox4x32-10 with key and counter 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = noise.fold_in(noise.key(0), 0).tolist()
    expected = [0xE169C58D6627E8D5, 0x9B00DBD8BC57AC4C]
    assert [w % 2**64 for w in words] == expected


@pytest.fixture
def random():
    module = pytest.importorskip("torch.func._random")
    try:
        module.fold_in(module.key(0), 0)
    except NotImplementedError:
        pytest.skip("this torch has no CPU kernel for it; 2.14 has")
    return module


@pytest.mark.parametrize("key", [(0, 0), (7, 0), (2**64 - 3, 2**33 - 2), (5, 2**64 - 1)])
def test_keys_and_numbers_are_those_of_torch_func_random(random, key):
    theirs = torch.tensor(key, dtype=torch.uint64)
    ours = theirs.view(torch.int64)
    for data in (0, 1, 2**32 + 5, 2**63 + 1, 2**64 - 1):
        assert torch.equal(noise.fold_in(ours, data), random.fold_in(theirs, data).view(torch.int64))
    torch.testing.assert_close(noise.normal(ours, 1_000_003), random.normal(theirs, 1_000_003), rtol=0, atol=BOUND)


def test_contract_of_an_image_is_the_published_one(random):
    eps = noise.gaussian((3, 2, 5, 7), seed=9, stream=4, sample_offset=20)
    for row in range(3):
        key = random.fold_in(random.fold_in(random.key(9), 20 + row), 4)
        expected = random.normal(key, (5, 7, 2)).permute(2, 0, 1)
        torch.testing.assert_close(eps[row], expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("shape", [(64, 3, 8, 8), (64, 1, 5, 7), (64, 3, 11), (64, 6), (64,), (64, 2, 3, 4, 5)])
def test_noise_of_an_image_does_not_depend_on_its_batch(shape):
    whole = noise.gaussian(shape, seed=3, stream=2)
    for n in (0, 17, 63):
        alone = noise.gaussian((1, *shape[1:]), seed=3, stream=2, sample_offset=n)
        assert torch.equal(alone[0], whole[n])


def test_images_are_channels_last_and_counted_so():
    image = noise.gaussian((2, 3, 4, 5), seed=1)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(image.permute(0, 2, 3, 1).reshape(2, 60), noise.gaussian((2, 60), seed=1))
    sequence = noise.gaussian((2, 3, 20), seed=1)
    assert sequence.is_contiguous()
    assert torch.equal(sequence.reshape(2, 60), noise.gaussian((2, 60), seed=1))


def test_dtypes_round_the_same_numbers():
    eps = noise.gaussian((4, 100), seed=1)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(noise.gaussian((4, 100), seed=1, dtype=dtype), eps.to(dtype))


def test_moments_tails_and_independence():
    n = 4_000_000
    x = noise.gaussian((4, n // 4), seed=123).double().flatten()
    standard_error = 1 / math.sqrt(n)
    assert abs(x.mean()) < 5 * standard_error
    assert abs(x.var() - 1) < 5 * math.sqrt(2) * standard_error
    assert abs((x**3).mean()) < 5 * math.sqrt(15) * standard_error
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96) * standard_error
    for bound in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(bound / math.sqrt(2))
        assert abs((x.abs() > bound).double().mean() - share) < 5 * math.sqrt(share / n)
    for lag in (1, 2, 3, 4, 1000):
        assert abs((x[:-lag] * x[lag:]).mean()) < 5 * standard_error
    samples = noise.gaussian((2, n // 4), seed=123)
    others = [noise.gaussian((1, n // 4), seed=123, stream=1)[0], noise.gaussian((1, n // 4), seed=124)[0]]
    for other in [samples[1], *others]:
        assert abs((samples[0] * other).mean()) < 5 / math.sqrt(n // 4)


def test_no_draw_is_infinite_or_exactly_past_the_largest():
    """u is at least 2^-33, so that |x| is at most sqrt(2 ln 2^33)."""
    x = noise.gaussian((8, 500_000), seed=5)
    assert x.isfinite().all()
    assert x.abs().max() <= math.sqrt(2 * 33 * math.log(2)) * (1 + 2**-22)


@pytest.mark.parametrize(
    "arguments",
    [
        {"shape": ()},
        {"shape": (2, -1)},
        {"seed": 1.0},
        {"seed": 2**64},
        {"seed": True},
        {"stream": -1},
        {"sample_offset": -1},
        {"sample_offset": 0.5},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        noise.gaussian(**({"shape": (2, 3), "seed": 0} | arguments))


def test_derived_seeds_differ_in_the_bits_that_the_cpus_generator_takes():
    seeds = [noise.derive_seed(0, purpose, step) % 2**32 for purpose in range(2) for step in range(100)]
    assert len(set(seeds)) == 200
    assert max(seeds) > 2**31
    assert max(noise.draw_seed() for _ in range(20)) > 2**60
    draws = {torch.rand((), generator=torch.Generator().manual_seed(seed)).item() for seed in seeds}
    assert len(draws) == 200


def test_empty_batches_are_empty():
    assert noise.gaussian((0, 3, 4, 4), seed=0).shape == (0, 3, 4, 4)
    assert noise.gaussian((3, 0), seed=0).shape == (3, 0)


def test_a_hundred_million_draws_have_the_moments_tails_and_independence_of_a_normal():
    """Bounds of five standard errors of the estimates, n = 1e8."""
    n, chunks = 10**8, 20
    size = n // chunks
    sums, products, beyond, square_products = torch.zeros(6, dtype=torch.float64), 0.0, torch.zeros(5), 0.0
    thresholds = torch.arange(1.0, 6.0)
    for chunk in range(chunks):
        keys = noise.sample_keys(100, seed=11, streams=3, sample_offset=100 * chunk)
        x = noise.normal(keys, size // 100).flatten()
        wide = x.double()
        square = wide * wide
        sums += torch.stack(
            [wide.sum(), square.sum(), (square * wide).sum(), square.square().sum(), (square**3).sum(), x.abs().max()]
        )
        pairs = wide[0::2] * wide[1::2]  # the two of one Box-Muller pair
        products += float(pairs.sum())
        square_products += float(((square[0::2] - 1) * (square[1::2] - 1)).sum())
        beyond += torch.stack([(x.abs() > threshold).sum() for threshold in thresholds])
    moments = sums[:5] / n
    variances = torch.tensor([1.0, 2.0, 15.0, 96.0, 10395.0 - 225.0])  # of x, x^2, x^3, x^4, x^6
    expected = torch.tensor([0.0, 1.0, 0.0, 3.0, 15.0])
    assert ((moments - expected).abs() < 5 * (variances / n).sqrt()).all()
    tails = torch.erfc(thresholds.double() / 2**0.5)
    assert ((beyond.double() / n - tails).abs() < 5 * (tails / n).sqrt()).all()
    assert abs(products / (n / 2)) < 5 / (n / 2) ** 0.5
    assert abs(square_products / (n / 2)) < 5 * 2 / (n / 2) ** 0.5
