"""ddpm-fast evaluate: distances between samples of a run and real images, and the bound of real images."""

import gzip
import json
import math
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from test_processes import ENVIRONMENT, launch
from threadpoolctl import threadpool_limits
from training_runs import finished, small, without_curve  # noqa: F401

from ddpm_fast.app import cli, distances, features
from ddpm_fast.app import report as reports
from ddpm_fast.app.evaluate import evaluate
from ddpm_fast.app.features import FeatureError, FeatureNetwork
from ddpm_fast.app.generate import write_samples
from ddpm_fast.app.reference import Reference
from ddpm_fast.training import trainer
from ddpm_fast.training.data import DataError, ImageTensor, open_data
from ddpm_fast.training.pictures import save_images
from ddpm_fast.training.run import load_run

REAL = 48  # images


@pytest.fixture(autouse=True)
def hub(tmp_path_factory, monkeypatch):
    """Where torch.hub has its files; empty."""
    home = str(tmp_path_factory.mktemp("torch"))
    monkeypatch.setenv("TORCH_HOME", home)
    monkeypatch.setitem(ENVIRONMENT, "TORCH_HOME", home)


@pytest.fixture
def without_picture(monkeypatch):
    """Plots take matplotlib longer than all else."""
    monkeypatch.setattr(reports, "save_evaluation", lambda *arguments: arguments[-1].touch())


class Network(torch.nn.Module):
    """A feature network: means over quarters of the image after a convolution."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(4, 3, 3, 3, generator=generator) / 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.conv2d(images.float() / 255, self.weight, padding=1).relu()
        return torch.nn.functional.adaptive_avg_pool2d(x, (2, 2)).flatten(1)


@contextmanager
def torchscript():
    """PyTorch warns that TorchScript is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "quarters.pt"
    with torchscript():
        torch.jit.script(Network()).save(str(path))
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder of real images, which are digits."""
    folder = tmp_path_factory.mktemp("real")
    save_images(open_data(small().data)[list(range(REAL))] / 255, folder)
    return folder


def found_in(run):
    return json.loads((run.folder / "report.json").read_text())


def test_the_distances_are_those_of_torch_fidelity_for_folders(finished, network, real, tmp_path, capsys):  # noqa: F811
    fidelity = pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))

    class Extractor(fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            with torchscript():
                self.network = torch.jit.load(str(network))

        @staticmethod
        def get_provided_features_list():
            return ("all",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "all"

        def forward(self, images):
            with torch.jit.optimized_execution(False):
                return (self.network(images),)

    fidelity.register_feature_extractor("quarters", Extractor)
    run = load_run(finished.folder)
    write_samples(run, tmp_path / "samples", n=40, seed=3, steps=5, precision="fp32")
    expected = fidelity.calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(real),
        feature_extractor="quarters",
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=40,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # without processes that load the images
        verbose=False,
    )
    chosen = ["-n", "40", "--seed", "3", "--steps", "5", "--precision", "fp32", "--features", str(network)]
    cli.main(["evaluate", str(finished.folder), "--real", str(real), *chosen, "--bound-steps", "5"])
    captured = capsys.readouterr()
    found = found_in(finished)
    of_samples = found["samples"].pop("distances")
    assert found["samples"].pop("features_sha256") == features._sha256(network)
    assert found["samples"] == {
        "n": 40,
        "real": REAL,
        "sampler": "dpmpp_2m",
        "steps": 5,
        "spacing": None,
        "features": "quarters.pt",
    }
    assert of_samples == {
        "fid": expected["frechet_inception_distance"],
        "kid": expected["kernel_inception_distance_mean"],
        "kid_std": expected["kernel_inception_distance_std"],
        "kid_subset_size": 40,
        "precision": expected["precision"],
        "recall": expected["recall"],
    }
    assert of_samples["fid"] > 0
    assert found["bound"]["n"] == REAL
    assert captured.out.startswith("this will take about ")
    for part in ("seconds for 40 samples", "for the bound of 48 images", "for the features of 88 images"):
        assert part in captured.out
    assert f"{'FID':<18}  {of_samples['fid']:.4g}\n" in captured.out
    assert f"bits/dim, at most   {found['bound']['total']:.4f} +- " in captured.out
    assert "FID of 40 images, fewer than 10,000, is too large" in captured.err
    assert (finished.folder / "report.png").stat().st_size > 10_000


@pytest.mark.long
def test_with_inception_they_are_those_of_torch_fidelitys_command(finished, tmp_path):  # noqa: F811
    """To the bit where the batches are the same. With random weights, since those that count are a large download."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=(ImportError, RuntimeError))

    class Untrained(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            return None

    torch.save({}, tmp_path / "none.pth")
    inception = Untrained("untrained", ["2048"], feature_extractor_weights_path=str(tmp_path / "none.pth"))
    for part in inception.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight)  # features of a size that does not vanish with the depth
    weights = tmp_path / "weights.pth"
    torch.save(inception.state_dict(), weights)

    training = finished.config.training.model_copy(update={"batch_size": 16})
    run = replace(finished, config=finished.config.model_copy(update={"training": training}))
    (tmp_path / "real").mkdir()
    save_images(open_data(run.config.data)[list(range(12))] / 255, tmp_path / "real")
    write_samples(run, tmp_path / "samples", n=16, precision="fp32")
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--silent", "--json", "--no-cache"]
    command += ["--input1", str(tmp_path / "samples"), "--input2", str(tmp_path / "real"), "--fid", "--kid", "--prc"]
    command += ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", str(weights)]
    command += ["--kid-subset-size", "12"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = json.loads(result.stdout)

    with threadpool_limits(1):  # as in the command: the root of a matrix depends on the threads in its last digits
        evaluate(run, real=tmp_path / "real", n=16, precision="fp32", inception_weights=weights, bound_images=0)
    found = found_in(run)
    assert found["samples"]["features"] == "inception-v3-compat"
    assert found["bound"] is None
    of_samples = found["samples"]["distances"]
    assert of_samples["fid"] == expected["frechet_inception_distance"] > 0
    assert of_samples["kid"] == expected["kernel_inception_distance_mean"]
    assert of_samples["kid_std"] == expected["kernel_inception_distance_std"]
    assert of_samples["precision"] == expected["precision"]
    assert of_samples["recall"] == expected["recall"]


@pytest.mark.long
def test_two_processes_find_what_one_finds(finished, network, real):  # noqa: F811
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))
    chosen = ["evaluate", finished.folder, "--real", real, "-n", 21, "--features", network, "--bound-steps", 5]
    cli.main(list(map(str, chosen)))
    one = (finished.folder / "report.json").read_bytes()
    (finished.folder / "report.json").unlink()
    shutil.rmtree(Path(torch.hub.get_dir(), "ddpm_fast"))
    result = launch(2, "-m", "ddpm_fast", *chosen, cwd=finished.folder)
    assert result.returncode == 0, result.stderr
    assert (finished.folder / "report.json").read_bytes() == one
    assert result.stdout.count("this will take about") == result.stdout.count("bits/dim, at most") == 1


def _named(sha256):
    return FeatureNetwork("test", sha256, lambda images: images.flatten(1).float(), torch.device("cpu"))


@pytest.mark.usefixtures("without_picture")
def test_features_of_real_images_are_kept_until_the_images_or_the_network_change(finished, network, real, monkeypatch):  # noqa: F811
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))
    saved = []
    save = Reference.save

    def counted(reference, features):
        saved.append(reference.path)
        save(reference, features)

    monkeypatch.setattr(Reference, "save", counted)

    def found(**changes):
        return evaluate(finished, **({"real": real, "n": 8, "features": network} | changes), bound_images=0).samples

    first = found()
    (path,) = saved
    assert found() == found() == first
    assert len(saved) == 1  # and then it was read
    content = path.read_bytes()
    for damaged in (content[:50], content[:-1], content[:-4] + b"\0\0\0\1", b""):
        path.write_bytes(damaged)
        assert found() == first
        assert len(path.read_bytes()) == len(content)  # the order of what safetensors writes first may differ
    assert saved == [path] * 5
    assert list(path.parent.iterdir()) == [path]  # no temporary files

    other = found(real=True)  # the images of the training
    assert other.real == 1797
    assert saved[5] != path
    data = ImageTensor(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    places = {Reference(data, _named(name)).path for name in ("a", "b")}
    places.add(Reference(ImageTensor(data.images + 1), _named("a")).path)
    assert len(places) == 3


def test_a_folder_that_cannot_be_written_keeps_no_features(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    reference = Reference(ImageTensor(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)), _named("a"))
    reference.save(torch.zeros(3, 64))
    assert "cannot be kept in" in capsys.readouterr().err
    assert reference.load() is None


def test_precision_and_recall_are_of_some_where_all_would_be_too_many(monkeypatch):
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))
    samples, real = torch.rand(9, 3), torch.rand(7, 3)
    found = distances.distances(samples, real)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:8]
    monkeypatch.setattr(distances, "MOST", 8)
    fewer = distances.distances(samples, real)
    expected = distances.distances(samples[order], real)
    assert (fewer.precision, fewer.recall) == (expected.precision, expected.recall)
    assert (fewer.fid, fewer.kid, fewer.kid_subset_size) == (found.fid, found.kid, 7)


def test_a_feature_network_takes_grey_and_large_batches_and_its_results_are_checked():
    shapes = []

    def function(images):
        shapes.append(tuple(images.shape))
        return images.flatten(1)[:, ::64].to(torch.float64)

    images = torch.randint(256, (100, 1, 8, 8), dtype=torch.uint8)
    found = FeatureNetwork("mine.pt", "", function, torch.device("cpu"))(images)
    assert shapes == [(64, 3, 8, 8), (36, 3, 8, 8)]
    assert torch.equal(found, images[:, :, 0, 0].expand(-1, 3).float())

    def told(function):
        with pytest.raises(FeatureError) as raised:
            FeatureNetwork("mine.pt", "", function, torch.device("cpu"))(images[:5])
        return str(raised.value)

    assert "must return features of shape (5, D), got (5, 3, 8, 8)" in told(lambda images: images)
    assert "must return features of shape (5, D), got tuple" in told(lambda images: (images,))
    assert "at least 2 features an image, got 1" in told(lambda images: images.flatten(1)[:, :1])
    assert "not finite for 5 of 5 images" in told(lambda images: images.flatten(1) / 0.0 * 0.0)
    assert "mine.pt fails for images of shape (5, 3, 8, 8): " in told(lambda images: images @ images[:, 0, :3])


class WithLogits(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.flatten(1) if return_features else images.flatten(1)[:, :2]


def test_torchscript_networks_that_can_return_features_are_told_to(tmp_path):
    with torchscript():
        torch.jit.script(WithLogits()).save(str(tmp_path / "logits.pt"))
    network = features.torchscript(tmp_path / "logits.pt", torch.device("cpu"))
    assert network(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).shape == (2, 48)


def test_feature_networks_that_cannot_be_loaded_are_errors(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))
    cpu = torch.device("cpu")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pt").write_text("text")
    torch.save(cli.main, tmp_path / "code.pth")  # the name of a function
    for load, name, message in (
        (features.torchscript, "none.pt", "none.pt: no such file"),
        (features.torchscript, "text.pt", "text.pt: not a TorchScript file"),
        (features.inception, "none.pth", "none.pth: no such file"),
        (features.inception, "text.pt", "not the Inception weights of torch-fidelity, https://github.com/"),
        (features.inception, "other.pth", "not the Inception weights of torch-fidelity"),
        (features.inception, "code.pth", "Weights only load failed"),
    ):
        with pytest.raises(FeatureError, match=message):
            load(tmp_path / name, cpu)

    def offline(url, path):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FeatureError) as raised:
        features.inception(None, cpu)
    path = f"{torch.hub.get_dir()}/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    assert f"the Inception weights are not in {path}, and cannot be downloaded" in str(raised.value)
    assert "give it by --inception-weights; or give another network by --features" in str(raised.value)


@pytest.mark.usefixtures("without_picture")
def test_without_real_images_it_prints_the_mean_of_the_bound_and_writes_its_terms(finished, capsys):  # noqa: F811
    cli.main(["evaluate", str(finished.folder), "--bound-images", "40", "--bound-steps", "0", "--precision", "fp32"])
    out = capsys.readouterr().out
    report = found_in(finished)
    found = report["bound"]
    assert report["samples"] is None
    assert report["checkpoint"] == "step-00000012"
    assert "\n40 images of digits: 10 timesteps each, float32\n" in out
    assert f"{found['total']:.4f} +- {found['total_error']:.4f}" in out

    run = load_run(finished.folder)
    chosen = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:40]
    bound = run.diffusion.likelihood(open_data(run.config.data)[chosen.tolist()], seed=0)
    # The same noise in other batches: float32 networks differ by rounding.
    close = {"rel": 1e-4}
    assert found["total"] == pytest.approx(bound.total_bpd.mean().item(), **close)
    assert found["total_error"] == pytest.approx(bound.total_bpd.std().item() / math.sqrt(40), **close)
    assert found["reconstruction"] == pytest.approx(bound.vb[:, 0].mean().item(), **close)
    parts = found["prior"] + found["transitions"] + found["reconstruction"]
    assert parts == pytest.approx(found["total"])
    assert found["nats"] == pytest.approx(bound.total_nats.mean().item(), **close)
    # With all timesteps, the ranges hold each once.
    curve = found["curve"]
    assert [t for first, last, *_ in curve for t in range(first, last + 1)] == list(range(10))
    total = sum((last - first + 1) * term for first, last, term, *_ in curve)
    assert total + found["prior"] == pytest.approx(found["total"])


@pytest.mark.usefixtures("without_picture")
def test_the_bound_of_other_images_and_fewer_timesteps(tmp_path, capsys):
    """An estimate lies within five of its standard errors of all timesteps' mean."""
    header = (0x0803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (60, 8, 8))
    for name in ("train", "test"):
        pixels = torch.randint(0, 256, (60, 8, 8), dtype=torch.uint8)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + pixels.numpy().tobytes()))
    config = small(data={"name": "idx", "path": str(tmp_path / "train.gz")}, training__steps=4)
    run = trainer.train(config, tmp_path / "run")
    cli.main(["evaluate", str(tmp_path / "run"), "--real", str(tmp_path / "test.gz"), "-n", "0", "--bound-steps", "5"])
    assert f"60 images of {tmp_path / 'test.gz'}: 5 timesteps each" in capsys.readouterr().out
    some, every = (
        evaluate(run, real=tmp_path / "test.gz", n=0, bound_steps=steps, precision="fp32").bound for steps in (5, None)
    )
    assert abs(some.total - every.total) < 5 * some.total_error
    assert some.total != every.total
    assert evaluate(run, bound_steps=5).data == str(tmp_path / "train.gz")


def test_what_cannot_be_evaluated_is_an_error(finished, real, network, tmp_path, capsys, monkeypatch):  # noqa: F811
    def told(*arguments):
        with pytest.raises(SystemExit) as raised:
            cli.main(["evaluate", str(finished.folder), *arguments])
        return f"{raised.value.code}{capsys.readouterr().err}"

    for arguments in (["-n", "100"], ["--steps", "5"], ["--features", str(network)]):
        assert "are for samples, which are compared with real images: add --real" in told(*arguments)
    assert "at least 2, or 0 for no bound; got 1" in told("--bound-images", "1")
    assert "nothing to evaluate" in told("--bound-images", "0")
    assert "at least 4, or 0 for none; got 3" in told("--real", "-n", "3")
    assert "steps must be an integer in [3, 11), got 2" in told("--bound-images", "4", "--bound-steps", "2")
    assert "steps must be an integer in [1, 11), got 11" in told("--real", "--steps", "11")
    assert "no images in this folder" in told("--real", str(tmp_path))
    assert "none.gz" in told("--real", str(tmp_path / "none.gz"))
    assert "not allowed with" in told("--features", "a.pt", "--inception-weights", "b.pth")
    few = tmp_path / "few"
    few.mkdir()
    save_images(torch.zeros(3, 1, 8, 8), few)
    assert "few: an evaluation needs at least 4 real images, got 3" in told("--real", str(few), "-n", "4")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    message = 'distances need torch-fidelity: pip install "ddpm_fast[evaluate]"'
    assert message in told("--real", str(real), "--features", str(network))
    monkeypatch.setattr(finished.diffusion, "image_size", (16, 16))
    with pytest.raises(DataError, match=r"the images are \(1, 8, 8\) .* and the model takes \(1, 16, 16\)"):
        evaluate(finished)
