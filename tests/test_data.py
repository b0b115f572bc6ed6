import gzip
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.training import data, loading
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
        (idx_bytes(np.zeros((0, 4, 6), np.uint8)), r"empty: its shape is \(0, 4, 6\)"),
        (idx_bytes(np.zeros((5, 4, 6), np.uint8)) + b"x", r"more data than the shape \(5, 4, 6\) takes"),
        (gzip.compress(idx_bytes(np.zeros((5, 4, 6), np.uint8)) + b"x"), "more data than the shape"),
        (gzip.compress(idx_bytes(np.zeros((5, 4, 6), np.uint8)))[:20] + bytes(40), "cannot be read"),
    ],
)
def test_idx_files_that_are_not_whole_are_named(tmp_path, content, message):
    path = tmp_path / "images"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.DataError, match=message) as raised:
        data.read_idx(path)
    assert str(path) in str(raised.value)


def test_an_idx_file_is_decompressed_only_as_far_as_its_header_says(tmp_path):
    header = b"\x00\x00\x08\x03" + struct.pack(">3I", 1, 2, 2)
    (tmp_path / "long").write_bytes(gzip.compress(header + bytes(20_000_000)))  # 20 KB
    tracemalloc.start()
    try:
        with pytest.raises(data.DataError, match=r"more data than the shape \(1, 2, 2\) takes, 4 bytes"):
            data.read_idx(tmp_path / "long")
        (tmp_path / "huge").write_bytes(gzip.compress(b"\x00\x00\x08\x03" + struct.pack(">3I", *[2**32 - 1] * 3)))
        with pytest.raises(data.DataError, match=r"truncated: the shape .* and the file cannot hold over"):
            data.read_idx(tmp_path / "huge")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


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


def tiff(values, bits, white_is_zero=False):
    """An uncompressed little-endian TIFF file of grey pixels, as the specification (TIFF 6.0) describes it."""
    height, width = values.shape
    packed = "".join(f"{v:0{bits}b}" for v in values.flat) if bits == 12 else None
    strip = bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8)) if packed else values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: height}
    tags[279] = len(strip)
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()
    )
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)  # of 8 bits; those of more bits are multiples of it


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("16.pgm", b"P5 16 16 65535\n" + (RAMP * 257).astype(">u2").tobytes()),
        ("12.pgm", b"P5 16 16 4095\n" + (RAMP * 16 + RAMP // 16).astype(">u2").tobytes()),
        ("8.pgm", b"P5 16 16 255\n" + RAMP.astype(np.uint8).tobytes()),
        ("plain.pgm", b"P2 16 16 4095\n" + " ".join(map(str, (RAMP * 16 + RAMP // 16).flat)).encode()),
        ("16.tif", tiff(RAMP * 257, 16)),
        ("12.tif", tiff(RAMP * 16 + RAMP // 16, 12)),
        ("inverted.tif", tiff((255 - RAMP) * 257, 16, white_is_zero=True)),
    ],
)
def test_pixels_of_12_and_16_bits_are_scaled_by_what_the_file_says(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    pixels = data.ImageFiles([tmp_path / name], 16, 1)[[0]]
    assert torch.equal(pixels[0, 0], torch.from_numpy(RAMP.astype(np.uint8)))


def test_a_transparent_value_of_a_16_bit_png_is_white(tmp_path):
    values = np.full((16, 16), 257 * 90, np.uint16)
    values[3] = 5
    Image.fromarray(values).save(tmp_path / "clear.png", transparency=5)
    pixels = data.ImageFiles([tmp_path / "clear.png"], 16, 1)[[0]][0, 0]
    assert (pixels[3] == 255).all()
    assert (pixels[4:] == 90).all()


def test_pixels_of_12_bits_that_the_file_does_not_tell_from_16_are_warned_about_once(tmp_path):
    for i in range(2):
        Image.fromarray(RAMP * 16).save(tmp_path / f"{i}.png")
    opened = data.ImageFiles(sorted(tmp_path.iterdir()), 16, 1)
    with pytest.warns(UserWarning, match=r"0.png: the largest of its 16-bit pixels is 4080 of 65535") as warned:
        assert opened[[0, 1]].max() == 16  # 4080 / 257
    assert len(warned) == 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_are_no_image_of_a_listed_kind_or_too_large_are_refused(tmp_path, monkeypatch):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "eps.png").write_bytes(eps)
    with pytest.raises(data.DataError, match=r"eps.png: not a readable image \(its content is none of .*PNG"):
        data.ImageFiles([tmp_path / "eps.png"], 8)[[0]]
    Image.new("L", (20, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)  # Pillow alone warns from here on, and refuses twice as many
    with pytest.raises(data.DataError, match=r"large.png: not a readable image \(20 x 20 pixels are more than 399"):
        data.ImageFiles([tmp_path / "large.png"], 8)[[0]]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    with pytest.raises(data.DataError, match=r"large.png: not a readable image .*decompression bomb"):
        data.ImageFiles([tmp_path / "large.png"], 8)[[0]]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert data.ImageFiles([tmp_path / "large.png"], 8)[[0]].shape == (1, 3, 8, 8)


def test_damaged_files_of_every_kind_are_errors_with_their_names(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for ending in (".bmp", ".gif", ".jpg", ".png", ".ppm", ".tif", ".webp"):
        path = tmp_path / f"image{ending}"
        image.save(path)
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:20], b"", whole[: len(whole) // 3] + bytes(200)):
            path.write_bytes(content)
            try:
                pixels = data.ImageFiles([path], 8)[[0]]  # zeros can be pixels as well
            except data.DataError as error:
                assert str(error).startswith(f"{path}: not a readable image")  # noqa: PT017
            else:
                assert len(content) > len(whole) // 3
                assert pixels.shape == (1, 3, 8, 8)


def put(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)
    return path


def names(folder):
    opened = data.open_data(FolderData(name="folder", path=folder, image_size=8))
    return [path.relative_to(folder).as_posix() for path in opened.paths]


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path, capsys):
    put(tmp_path / "disk" / "cats" / "0.png")
    put(tmp_path / "disk" / "1.png")
    photos = tmp_path / "photos"
    put(photos / "dogs" / "0.png")
    (photos / "cats").symlink_to(tmp_path / "disk" / "cats")
    (photos / "one.png").symlink_to(tmp_path / "disk" / "1.png")
    (photos / "dogs" / "again").symlink_to(photos)  # a loop
    (photos / "more").symlink_to(photos / "cats")
    assert names(photos) == ["cats/0.png", "dogs/0.png", "one.png"]
    told = f"{photos}: 3 images; skipped folders reached again by a link: 2 (dogs/again, more)\n"
    assert capsys.readouterr().err == told
    (photos / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(data.DataError, match=r"lost.png: a link to .*nowhere.png, which does not exist"):
        names(photos)


def test_hidden_files_and_training_runs_in_the_folder_are_not_training_data(tmp_path, capsys):
    for name in (".ipynb_checkpoints/0-checkpoint.png", ".thumbnails/0.png", "__MACOSX/0.png", "deep/._0.png"):
        put(tmp_path / name)
    put(tmp_path / "deep" / "0.png")
    put(tmp_path / "previews" / "1.png")  # a folder of this name alone is not a run
    run = tmp_path / "runs" / "mine"
    for name in ("previews/step-00000001.png", "loss.png", "samples.png", "generated/000000.png"):
        put(run / name)
    (run / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    assert names(tmp_path) == ["deep/0.png", "previews/1.png"]
    told = capsys.readouterr().err
    assert f"{tmp_path}: 2 images; skipped hidden files and folders: 4 (.ipynb_checkpoints, .thumbnails, " in told
    assert "files of other kinds: 1 (notes.txt), folders of training runs: 1 (runs/mine)" in told
    assert len(told.splitlines()) == 1
    put(tmp_path / ".cache" / "photos" / "0.png")
    assert names(tmp_path / ".cache" / "photos") == ["0.png"]  # hidden itself, but named by the user
    put(run / "mine.png")
    assert names(run) == ["generated/000000.png", "mine.png"]  # what the run itself has not written


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch, images):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "photos" / "0.png")
    (tmp_path / "idx").write_bytes(idx_bytes(images))
    for path in ("~/photos", Path("~/photos")):
        assert len(data.open_data(FolderData(name="folder", path=path, image_size=8))) == 1
    assert len(data.open_data(IdxData(name="idx", path=Path("~/idx")))) == 5


def test_folders_that_cannot_be_used_are_named(tmp_path):
    def opened():
        return data.open_data(FolderData(name="folder", path=tmp_path / "images", image_size=8))

    with pytest.raises(data.DataError, match="images: no such folder"):
        opened()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.heic").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"images: no images in this folder.*other kinds: 1 \(a.heic\)"):
        opened()
    whole = put(tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    (tmp_path / "images" / "half.png").write_bytes(whole[: len(whole) // 2])
    for i, name in enumerate(["empty.png", "half.png"], 1):
        with pytest.raises(data.DataError, match=f"{name}: not a readable image"):
            opened()[[i]]
    for workers in (0, 1):
        order = data.ShuffledBatches(3, 3, seed=0, first_step=0, last_step=1)
        with pytest.raises(data.DataError, match=r"images/\w+.png: not a readable image") as raised:
            next(data.batches(opened(), order, workers=workers))
        assert len(str(raised.value).splitlines()) == 1
        assert str(raised.value).startswith(str(tmp_path))


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


class Numbers(torch.utils.data.Dataset):
    """Batches that are their indices; `do` runs before each in a worker."""

    def __init__(self, do=lambda: None):
        self.do = do

    def __getitem__(self, indices):
        if torch.utils.data.get_worker_info() is not None:
            self.do()
        return torch.tensor(indices)


def steps(count):
    return data.ShuffledBatches(10, 4, seed=0, first_step=0, last_step=count)


def test_batches_do_not_depend_on_the_number_of_workers():
    expected = list(steps(9))
    for workers in (None, 0, 2):
        assert [batch.tolist() for batch in data.batches(Numbers(), steps(9), workers=workers)] == expected
    assert not multiprocessing.active_children()


def test_image_files_are_read_by_workers_and_images_in_memory_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "cores", lambda: 2)
    files = data.ImageFiles([put(tmp_path / f"{i}.png", i) for i in range(10)], 8, 1)
    for opened, expected in ((files, 2), (data.ImageTensor(files[list(range(10))]), 0)):
        loaded = data.batches(opened, steps(3))
        first = next(loaded)
        assert len(multiprocessing.active_children()) == expected
        assert first.shape == (4, 1, 8, 8)
        loaded.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("free", "expected"), [(6, 2), (5, 1), (4, 1), (3, 0), (0, 0)])
def test_workers_whose_batches_do_not_fit_into_the_shared_memory_are_not_started(monkeypatch, free, expected):
    """A worker has two batches in it, and training one and the next: 2 x workers + 2 of 32 bytes each."""
    monkeypatch.setattr(loading.os, "statvfs", lambda _: SimpleNamespace(f_bavail=free * 4, f_frsize=8), raising=False)
    if expected < 2:
        with pytest.warns(
            UserWarning, match=f"/dev/shm has 0 MiB free, and 2 worker .* {expected or 'none'} (is|are) used"
        ):
            loaded = data.batches(Numbers(), steps(9), workers=2)
    else:
        loaded = data.batches(Numbers(), steps(9), workers=2)
    first = next(loaded)
    assert len(multiprocessing.active_children()) == expected
    assert [first.tolist(), *(batch.tolist() for batch in loaded)] == list(steps(9))


def test_shared_memory_that_is_full_all_the_same_is_an_error(monkeypatch):
    def full(batch):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # before the worker is forked
    with pytest.raises(data.DataError, match=r"is full \(unable to .*No space left.*training.workers sets"):
        next(data.batches(Numbers(), steps(9), workers=1))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_workers_leave_it_to_the_training_process_what_a_signal_means(name):
    """Ctrl-C reaches all processes of a terminal, and a scheduler's SIGTERM all of a job."""
    loaded = data.batches(Numbers(), steps(30), workers=1)
    found = [next(loaded).tolist()]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, getattr(signal, name))
    found += [batch.tolist() for batch in loaded]
    assert found == list(steps(30))


def test_a_worker_that_dies_is_an_error():
    with pytest.raises(data.DataError, match=r"loads images has failed: DataLoader worker.*training.workers sets"):
        list(data.batches(Numbers(lambda: os._exit(1)), steps(9), workers=1))


def test_a_worker_that_is_stuck_is_an_error_and_is_ended(monkeypatch):
    monkeypatch.setattr(loading, "TIMEOUT", 0.1)
    with pytest.raises(data.DataError, match=r"failed: DataLoader timed out after 0.1 seconds; training.workers sets"):
        list(data.batches(Numbers(lambda: time.sleep(0.5)), steps(9), workers=1))
    assert not multiprocessing.active_children()


def _leave_a_loader():
    loaded = data.batches(Numbers(), steps(99), workers=1)
    next(loaded)
    keep = [loaded]
    keep.append(keep)  # so that nothing closes it


def test_a_program_can_end_while_workers_are_loading():
    program = multiprocessing.get_context("fork").Process(target=_leave_a_loader)
    program.start()
    program.join(30)
    try:
        assert program.exitcode == 0
    finally:
        program.kill()


def test_the_fingerprint_is_that_of_the_images_wherever_they_are(tmp_path, monkeypatch):
    def fingerprint(folder):
        return data.fingerprint(data.ImageFiles(sorted(folder.rglob("*.png")), 8))

    first = tmp_path / "here" / "cats"
    for i in range(20):
        put(first / f"{i:02d}.png", i)
    expected = fingerprint(first)
    second = shutil.copytree(first, tmp_path / "elsewhere")
    os.utime(second / "00.png", (0, 0))
    assert fingerprint(second) == expected
    changes = [
        lambda: put(second / "19.png", 200),  # other pixels in a file of the same size
        lambda: (second / "00.png").rename(second / "000.png"),
        lambda: (second / "05.png").unlink(),
        lambda: put(second / "new.png"),
    ]
    seen = {expected}
    for small in (True, False):
        monkeypatch.setattr(data, "HASHED_BYTES", 10**6 if small else 0)
        seen = {fingerprint(first)}
        for number, change in enumerate(changes, 1):
            shutil.rmtree(second)
            shutil.copytree(first, second)
            change()
            seen.add(fingerprint(second))
            assert len(seen) == number + 1
    (second / "00.png").unlink()
    opened = data.ImageFiles([second / "00.png"], 8)
    with pytest.raises(data.DataError, match=r"00.png: cannot be read"):
        data.fingerprint(opened)


def test_the_fingerprint_of_images_in_memory_is_that_of_their_pixels():
    images = torch.randint(0, 256, (6, 4, 4, 3), dtype=torch.uint8)
    expected = data.fingerprint(data.ImageTensor(images.permute(0, 3, 1, 2)))  # channels-last
    assert data.fingerprint(data.ImageTensor(images.permute(0, 3, 1, 2).contiguous())) == expected
    changed = images.clone()
    changed[5, 3, 3, 2] ^= 1
    others = [changed, images[:5], images.flip(0), images.reshape(6, 2, 8, 3)]
    found = {data.fingerprint(data.ImageTensor(other.permute(0, 3, 1, 2))) for other in others}
    assert len(found | {expected}) == 5


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

    def offline(root, train, download):
        raise RuntimeError("Dataset not found or corrupted.")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(data.DataError, match=f"{tmp_path}: CIFAR10 cannot be loaded: Dataset not found or corrupted"):
        data.open_data(Cifar10Data(name="cifar10", path=tmp_path))
