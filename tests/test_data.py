import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.training import data
from ddpm_fast.training.config import Cifar10Data, DigitsData, FolderData, IdxData

FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")  # where Debian's package puts it


def idx_bytes(images):
    return b"\x00\x00\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 4, 6), dtype=np.uint8)


def test_digits_are_all_there_and_use_the_whole_range():
    digits = data.open_data(DigitsData(name="digits"))
    batch = digits[[0, 1796]]
    assert len(digits) == 1797
    assert batch.shape == (2, 1, 8, 8)
    assert batch.dtype == torch.uint8
    assert (digits.images.min(), digits.images.max()) == (0, 255)


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress], ids=["plain", "gzipped"])
def test_idx_files_give_their_images(tmp_path, images, pack):
    (tmp_path / "images").write_bytes(pack(idx_bytes(images)))
    opened = data.open_data(IdxData(name="idx", path=tmp_path / "images"))
    assert torch.equal(opened[[0, 1, 2, 3, 4]], torch.from_numpy(images)[:, None])


@pytest.mark.skipif(not FASHION.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_is_read_as_it_is_shipped():
    opened = data.open_data(IdxData(name="idx", path=FASHION))
    assert len(opened) == 60_000
    assert opened[[0]].shape == (1, 1, 28, 28)
    assert opened.images.float().mean().item() == pytest.approx(72.94, abs=0.01)  # 0.2860, as published


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "not an IDX file of images"),
        (b"\x89PNG\r\n", "begins with 89 50 4e 47, needed 00 00 08 03"),
        (b"\x00\x00\x08\x01" + bytes(20), "begins with 00 00 08 01"),  # the labels
        (idx_bytes(np.zeros((5, 4, 6), np.uint8))[:-1], r"truncated: 119 bytes of data for the shape \(5, 4, 6\)"),
        (gzip.compress(idx_bytes(np.zeros((5, 4, 6), np.uint8)))[:-9], "cannot be read"),
        (b"\x00\x00\x08\x03\x00", "truncated"),
        (idx_bytes(np.zeros((0, 4, 6), np.uint8)), "truncated"),
    ],
)
def test_idx_files_that_are_not_whole_are_named(tmp_path, content, message):
    path = tmp_path / "images"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.DataError, match=message) as raised:
        data.read_idx(path)
    assert str(path) in str(raised.value)


def test_labels_are_read_with_one_axis(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x03" + bytes([7, 0, 9]))
    assert data.read_idx(path, axes=1).tolist() == [7, 0, 9]
    path.write_bytes(idx_bytes(np.zeros((5, 4, 6), np.uint8)))
    with pytest.raises(data.DataError, match=r"not an IDX file of labels.*needed 00 00 08 01"):
        data.read_idx(path, axes=1)


def test_folders_are_resized_and_cropped_at_the_centre(tmp_path):
    (tmp_path / "deep").mkdir()
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (255, 0, 100)  # the square in the middle
    Image.fromarray(wide).save(tmp_path / "deep" / "a.png")
    Image.fromarray(wide).convert("L").save(tmp_path / "b.JPG")
    for name in ("notes.txt", "paper.pdf", "film.mpg", ".hidden.png"):
        (tmp_path / name).write_text("no image to open")
    opened = data.open_data(FolderData(name="folder", path=tmp_path, image_size=8))
    assert [p.name for p in opened.paths] == ["b.JPG", "a.png"]
    batch = opened[[1, 0]]
    assert batch.shape == (2, 3, 8, 8)
    assert (batch[0, :, :, 2:6] == torch.tensor([255, 0, 100])[:, None, None]).all()
    grey = data.open_data(FolderData(name="folder", path=tmp_path, image_size=8, channels=1))
    assert grey[[0]].shape == (1, 1, 8, 8)


def test_images_of_every_depth_and_transparency_keep_their_brightness(tmp_path):
    def read(name, image):
        image.save(tmp_path / name)
        return data.ImageFiles([tmp_path / name], 16)[[0]].float()

    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert read("deep.png", Image.fromarray(ramp)).mean().item() == pytest.approx(127.5, abs=0.5)
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[:8] = (200, 100, 50, 255)
    half = read("clear.png", Image.fromarray(clear))[0]
    assert (half[:, 8:] == 255).all()  # on white
    assert (half[:, 0, 0] == torch.tensor([200.0, 100, 50])).all()
    for mode, expected in {"P": 90, "1": 0, "CMYK": 90, "LA": 90}.items():
        image = Image.new("L", (16, 16), 90).convert("RGB").convert(mode) if mode != "1" else Image.new("1", (16, 16))
        name = "cmyk.tif" if mode == "CMYK" else f"{mode}.png"
        assert read(name, image).mean().item() == pytest.approx(expected, abs=1)
    with pytest.raises(data.DataError, match=r"float.tif: not a readable image \(mode F: 32-bit"):
        read("float.tif", Image.fromarray(np.ones((16, 16), np.float32)))
    rotated = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 8, axis=0).repeat(16, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    rotated.save(tmp_path / "rotated.png", exif=exif)
    assert data.ImageFiles([tmp_path / "rotated.png"], 16, 1)[[0]][0, 0, 0, 0] == 255


def test_folders_that_cannot_be_used_are_named(tmp_path):
    def opened():
        return data.open_data(FolderData(name="folder", path=tmp_path / "images", image_size=8))

    with pytest.raises(data.DataError, match="images: no such folder"):
        opened()
    (tmp_path / "images").mkdir()
    with pytest.raises(data.DataError, match="images: no images in this folder"):
        opened()
    (tmp_path / "images" / "good.png").write_bytes(b"")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "images" / "whole.png")
    whole = (tmp_path / "images" / "whole.png").read_bytes()
    (tmp_path / "images" / "half.png").write_bytes(whole[: len(whole) // 2])
    for i, name in enumerate(["good.png", "half.png"]):
        with pytest.raises(data.DataError, match=f"{name}: not a readable image"):
            opened()[[i]]
    loader = data.batches(opened(), data.ShuffledBatches(3, 3, seed=0, first_step=0, last_step=1))
    with pytest.raises(data.DataError, match="not a readable image") as raised:
        next(loader)  # from another process
    assert len(str(raised.value).splitlines()) == 1


def test_batches_show_every_image_once_an_epoch_and_follow_from_the_step():
    def batches(first, last, seed=0):
        return list(data.ShuffledBatches(10, 4, seed=seed, first_step=first, last_step=last))

    whole = batches(0, 10)
    assert all(len(batch) == 4 for batch in whole)
    shown = [index for batch in whole for index in batch]
    epochs = [shown[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert batches(3, 7) == whole[3:7]
    assert batches(0, 10, seed=1) != whole


def test_torchvision_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(data.DataError, match=r'pip install "ddpm_fast\[vision\]"'):
        data.open_data(Cifar10Data(name="cifar10", path=tmp_path))


def test_cifar10_is_read_through_torchvision(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", exc_type=(ImportError, RuntimeError))

    class Fake:
        def __init__(self, root, train, download):
            assert (Path(root), train, download) == (tmp_path, True, True)
            self.data = np.arange(2 * 32 * 32 * 3, dtype=np.uint64).astype(np.uint8).reshape(2, 32, 32, 3)

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    opened = data.open_data(Cifar10Data(name="cifar10", path=tmp_path))
    assert opened[[1]].shape == (1, 3, 32, 32)
    assert opened[[0]][0, :, 0, 1].tolist() == [3, 4, 5]
