"""Pictures of samples carry a receipt, by which they are made again bit for bit."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from training_runs import small, without_curve  # noqa: F401  (fixture)

from ddpm_fast import samplers
from ddpm_fast.app import cli
from ddpm_fast.app import reproduce as application
from ddpm_fast.app.generate import write_samples
from ddpm_fast.app.reproduce import reproduce
from ddpm_fast.denoiser import clip_bounds
from ddpm_fast.fitting import weights_digest
from ddpm_fast.info import versions
from ddpm_fast.training import checkpoint, report, trainer
from ddpm_fast.training.pictures import save_images
from ddpm_fast.training.plots import save_loss
from ddpm_fast.training.receipt import LONGEST, Receipt, ReceiptError
from ddpm_fast.training.run import load_run, weights_of, write_pictures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in batches of 8, with a preview after each of three steps, of which the last two are kept."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_loss", "save_timestep_losses"):  # which take longer than all else here
            patch.setattr(report, name, lambda *arguments: None)
        often = {"training__save_every": 1, "training__sample_every": 1}
        trainer.train(small(training__steps=3, training__batch_size=8, **often), folder)
    return load_run(folder)


@pytest.fixture(scope="module")
def pictures(run, tmp_path_factory):
    """A hundred pictures of the run, in several batches, precisions and forms."""
    folder = tmp_path_factory.mktemp("pictures")
    write_samples(run, folder / "many", n=50, seed=3)
    write_samples(run, folder / "bf16", n=19, seed=2**64 - 1, sampler="dpmpp_2m", steps=5, precision="bf16")
    write_samples(run, folder / "fp16", n=9, sampler="ddim", steps=4, spacing="karras", precision="fp16")
    write_samples(run, folder / "heun", n=5, sampler="heun", steps=5)
    (folder / "threes").mkdir()
    for first, length in ((0, 3), (3, 3), (6, 1)):  # as three processes divide seven images
        images = run.diffusion.sample(length, seed=5, sample_offset=first, sampler="ddpm")
        save_images(images, folder / "threes", first, run.receipt(7, batch_size=3, seed=5, sampler="ddpm"))
    for n in (1, 2, 4, 8, 9, 17):
        write_samples(run, folder / f"grid-{n}.png", n=n, seed=n, sampler="dpmpp_2m_sde", steps=3)
    write_pictures(run, seed=1, n=10)
    for name in ("samples.png", "denoising.png", "previews/step-00000002.png"):
        (folder / Path(name).name).write_bytes((run.folder / name).read_bytes())
    write_samples(run, folder / "uneven.png", n=6, seed=1)
    return sorted(folder.rglob("*.png"))


def receipt_in(path):
    with Image.open(path) as picture:
        return json.loads(picture.text["ddpm_fast"])


def with_text(path, out, text, keyword="ddpm_fast", **how):
    """A copy of a picture with another receipt."""
    chunks = PngInfo()
    chunks.add_text(keyword, text, **how)
    with Image.open(path) as picture:
        picture.save(out, pnginfo=chunks)
    return out


def changed(path, out, **changes):
    return with_text(path, out, json.dumps(receipt_in(path) | changes))


def test_a_hundred_pictures_are_made_again_bit_for_bit(run, pictures):
    assert len(pictures) == 100
    found = reproduce(pictures[::-1], run.folder)
    assert [each.path for each in found] == pictures[::-1]
    assert [str(each) for each in found] == [f"{path}: equal" for path in pictures[::-1]]


def test_a_receipt_says_what_was_sampled_and_how(run, pictures):
    folder = pictures[0].parent.parent
    found = receipt_in(folder / "bf16" / "000017.png")
    wanted = {"picture": "image", "seed": 2**64 - 1, "index": 17, "count": 1, "sampler": "dpmpp_2m", "steps": 5}
    wanted |= {"spacing": None, "eta": None, "precision": "bf16", "sampled": 19, "batch_size": 8, "threads": 1}
    assert {name: found[name] for name in wanted} == wanted
    saved = weights_of(load_run(run.folder).diffusion)
    assert found["weights"] == weights_digest(saved)
    assert found["environment"]["ddpm_fast"] == versions()["ddpm_fast"]
    assert found["environment"]["torch"] == torch.__version__
    # What the config chooses is written down, since a resumed run may choose something else.
    states = receipt_in(folder / "denoising.png")
    assert (states["sampler"], states["steps"], states["states"]) == ("ddpm", 10, list(range(11)))
    assert receipt_in(folder / "step-00000002.png")["eta"] == 0
    assert receipt_in(folder / "fp16" / "000000.png")["spacing"] == "karras"
    with Image.open(folder / "samples.png") as picture:
        assert picture.text["Software"] == f"ddpm_fast {versions()['ddpm_fast']}"


def test_plots_and_images_of_unknown_origin_name_the_program_alone(tmp_path):
    save_loss([(1, 1.0), (2, 0.5)], tmp_path / "loss.png")
    save_images(torch.rand(1, 3, 8, 8), tmp_path)
    for name in ("loss.png", "000000.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.text == {"Software": f"ddpm_fast {versions()['ddpm_fast']}"}
    for name, wanted in (("000000.png", "no receipt"), ("grid.jpg", "not a PNG file")):
        if name.endswith("jpg"):
            Image.new("L", (8, 8)).save(tmp_path / name)
        with pytest.raises(ReceiptError, match=f"{name}: {wanted}"):
            reproduce([tmp_path / name], tmp_path)


def test_a_changed_picture_is_found_and_what_has_changed_around_it_is_named(run, pictures, tmp_path):
    given = receipt_in(pictures[0])
    with Image.open(pictures[0]) as picture:
        pixels, chunks = np.asarray(picture).copy(), PngInfo()
    chunks.add_text("ddpm_fast", json.dumps(given))
    pixels[2, 3] ^= 4
    Image.fromarray(pixels).save(tmp_path / "pixel.png", pnginfo=chunks)
    Image.fromarray(pixels[:7]).save(tmp_path / "cropped.png", pnginfo=chunks)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "coloured.png", pnginfo=chunks)
    given["environment"] |= {"torch": "1.0"}
    chunks = PngInfo()
    chunks.add_text("ddpm_fast", json.dumps(given))
    Image.fromarray(pixels).save(tmp_path / "older.png", pnginfo=chunks)
    names = ("pixel", "cropped", "coloured", "older")
    found = dict(zip(names, reproduce([tmp_path / f"{name}.png" for name in names], run.folder), strict=True))
    one = "1 of 64 values differ, by at most 4 of 255; "
    assert found["pixel"].told == one + "nothing that the receipt records has changed here"
    assert found["older"].told == one + f"torch was 1.0, now {torch.__version__}"
    assert found["cropped"].told.startswith("not equal: the file has 8 x 7 pixels of mode L, the picture made again")
    assert found["coloured"].told.startswith("not equal: the file has 8 x 8 pixels of mode RGB")
    assert [found[name].differences for name in names] == [1, None, None, 1]


def test_weights_are_looked_for_in_all_checkpoints_of_the_run(run, pictures, tmp_path):
    preview = run.folder / "previews" / "step-00000001.png"  # its checkpoint is no longer there
    message = r"has no checkpoint with the weights of the receipt, [0-9a-f]{12}: .*step-00000003 .*; .*step-00000002 "
    with pytest.raises(ReceiptError, match=message):
        reproduce([preview], run.folder)
    (newest,) = (path for path in checkpoint.steps(run.folder) if path.name == "step-00000003")
    assert reproduce([pictures[0]], newest)[0].differences == 0
    with pytest.raises(ReceiptError, match="has no checkpoint with the weights"):
        reproduce([run.folder / "previews" / "step-00000002.png"], newest)


def test_pictures_of_other_averages_are_made_again(tmp_path):
    config = small(training__steps=2, training__ema_decay=[0.9, 0.05], training__ema_snapshot_every=1)
    folder = trainer.train(config, tmp_path / "run").folder
    names, digests = ("default", "0.05", "sigma_rel=0.08", "none"), set()
    for name in names:
        write_samples(load_run(folder, ema=name), tmp_path / f"{name}.png", n=2, sampler="ddim", steps=2)
        digests.add(receipt_in(tmp_path / f"{name}.png")["weights"])
    assert len(digests) == 4
    found = reproduce([tmp_path / f"{name}.png" for name in names], folder)
    assert [each.told for each in found] == ["equal"] * 4


def test_threads_are_those_of_the_receipt_and_put_back(run, pictures, tmp_path, monkeypatch):
    taken, set_num_threads = [], torch.set_num_threads
    monkeypatch.setattr(application.torch, "set_num_threads", lambda n: (taken.append(n), set_num_threads(n)))
    reproduce([changed(pictures[0], tmp_path / "three.png", threads=3)], run.folder)
    assert taken == [3, 1]


def test_a_picture_of_a_fitted_sampler_says_when_the_sampler_is_another(run, tmp_path):
    diffusion = load_run(run.folder).diffusion
    fitted_to = samplers.conditions(diffusion.schedule, diffusion.objective, clip_bounds(diffusion.clip_denoised))
    fitted_to["weights"] = weights_digest(diffusion.model.state_dict())[:32]

    def fit(steps):
        table = samplers.dpmpp_2m(diffusion.schedule, diffusion.objective, steps)
        columns = {name: getattr(table, name) for name in ("t", "u", "w", "A", "B", "C", "sigma")}
        diffusion.fitted.save(samplers.FittedTable(**columns, fitted_to=fitted_to, start_distance=1.0, distance=1.0))

    fit([9, 5, 0])
    write_samples(load_run(run.folder), tmp_path / "grid.png", n=2, sampler="fitted", steps=3)
    assert reproduce([tmp_path / "grid.png"], run.folder)[0].differences == 0
    fit([8, 5, 0])
    assert "the coefficients of fitted were others" in reproduce([tmp_path / "grid.png"], run.folder)[0].told


def test_the_command_compares_and_writes_what_it_made(run, pictures, tmp_path, capsys):
    image, out = str(pictures[0]), tmp_path / "again.png"
    cli.main(["reproduce", image, "--run", str(run.folder), "--out", str(out)])
    assert capsys.readouterr().out == f"{image}: equal\n"
    assert out.read_bytes() == pictures[0].read_bytes()
    bad = tmp_path / "bad.png"
    with Image.open(image) as picture:
        Image.fromarray(255 - np.asarray(picture)).save(bad)
    for arguments, told in (
        ([image, str(bad)], f"{bad}: no receipt"),
        ([image, image, "--out", str(out)], "--out is NAME.png for the one picture"),
        ([image, "--out", str(tmp_path / "x.jpg")], "--out is NAME.png for the one picture"),
        ([str(tmp_path / "nowhere.png")], "No such file"),
    ):
        with pytest.raises(SystemExit, match=told):
            cli.main(["reproduce", *arguments, "--run", str(run.folder)])
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(bad, pnginfo=Receipt(**receipt_in(image)).chunks())
    with pytest.raises(SystemExit) as ended:
        cli.main(["reproduce", image, str(bad), "--run", str(run.folder)])
    assert ended.value.code == 1
    assert capsys.readouterr().out.endswith("\n1 of 2 pictures are equal\n")


# What anyone may have written into a picture


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": 2}, "format: "),
        ({"unknown": 1}, "unknown: "),
        ({"seed": 2**64}, "seed: "),
        ({"seed": "1"}, "seed: "),
        ({"index": -1}, "index: "),
        ({"index": 50}, "50 images have none with the index 50"),
        ({"count": 2}, "an image is one"),
        ({"picture": "grid", "index": 1}, "a grid begins with index 0"),
        ({"states": [1]}, "only a picture of states has them"),
        ({"picture": "states", "index": 0, "count": 50, "states": [1, 1]}, "the steps of states rise"),
        ({"picture": "states", "index": 0, "count": 50, "states": [1]}, "states are those of one batch"),
        ({"picture": "states", "index": 0, "count": 9, "states": list(range(101))}, "states: "),
        ({"weights": "0" * 63 + "\n"}, "weights: "),
        ({"weights": "../" * 16}, "weights: "),
        ({"threads": 10**6}, "threads: "),
        ({"eta": -1.0}, "eta: "),
        ({"sampler": "x" * 201}, "sampler: "),
        ({"sampler": "os.system"}, "unknown sampler 'os.system'"),
        ({"steps": 11}, "steps must be an integer in"),
        ({"spacing": "none"}, "unknown spacing 'none'"),
        ({"batch_size": 10**9, "sampled": 10**9}, "its batches had 1000000000 images"),
        ({"environment": {str(i): "" for i in range(21)}}, "environment: "),
    ],
    ids=str,
)
def test_receipts_that_cannot_be_are_refused_before_anything_is_sampled(
    run, pictures, tmp_path, monkeypatch, changes, told
):
    monkeypatch.setattr(type(run.diffusion), "sample", None)
    path = changed(next(p for p in pictures if p.parent.name == "many"), tmp_path / "bad.png", **changes)
    with pytest.raises(ValueError, match=told):
        reproduce([path], run.folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 10000, "9" * 5000, "null", '{"seed": 1}', "é", " " * (LONGEST + 1)])
def test_texts_that_are_no_receipts_are_refused(pictures, tmp_path, text):
    with pytest.raises(ReceiptError, match=r"bad\.png: the receipt"):
        reproduce([with_text(pictures[0], tmp_path / "bad.png", text)], tmp_path)


def test_a_text_that_grows_when_it_is_read_and_a_size_that_no_picture_has_take_no_memory(run, pictures, tmp_path):
    bomb = with_text(pictures[0], tmp_path / "bomb.png", "x" * (1 << 24), zip=True)
    assert bomb.stat().st_size < 1 << 15
    with pytest.raises(ReceiptError, match="not a readable PNG file"):
        reproduce([bomb], run.folder)
    content = bytearray(pictures[0].read_bytes())
    content[16:24] = (50_000).to_bytes(4, "big") * 2  # width and height in the header
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(content)
    with pytest.raises(ReceiptError, match=r"huge\.png: not a readable PNG file"):
        reproduce([tmp_path / "huge.png"], run.folder)
    huge = changed(pictures[0], tmp_path / "count.png", picture="grid", index=0, count=2**31 - 1, sampled=2**31 - 1)
    assert reproduce([huge], run.folder)[0].told.startswith("not equal: the file has 8 x 8 pixels")


@pytest.mark.parametrize("length", [10, 40, -60])
def test_damaged_files_are_named(run, pictures, tmp_path, length):
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:length])
    with pytest.raises(ReceiptError, match=r"cut\.png: n"):
        reproduce([tmp_path / "cut.png"], run.folder)
