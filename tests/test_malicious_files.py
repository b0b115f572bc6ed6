"""Files that were made to do harm: none of them runs code, and each is refused before it takes much memory.

Within `little_memory` a process may take a quarter of a gigabyte more than it has, so that what asks for more fails
with another message than the one that a test wants.
"""

import _codecs
import gzip
import json
import shutil
import struct
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_checkpoints import NEWEST, resume, sign
from training_runs import finished, small, without_curve  # noqa: F401

from ddpm_fast.samplers import FittedTable, StepTable
from ddpm_fast.training import config, data
from ddpm_fast.training.checkpoint import CheckpointError
from ddpm_fast.training.fitted_samplers import FittedSamplers, SamplerFileError
from ddpm_fast.training.run import load_run

resource = pytest.importorskip("resource", reason="the system has no limit of address space")

MUCH = 1 << 40  # bytes
pytestmark = pytest.mark.long


@contextmanager
def little_memory(more=1 << 28):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def folder(finished, tmp_path):  # noqa: F811
    return shutil.copytree(finished.folder, tmp_path / "run")


def test_the_limit_of_memory_holds():
    with little_memory(), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(1 << 32, dtype=torch.uint8)


class Call:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def doubled(text, times):
    for _ in range(times):
        text = Call(_codecs.encode, text, "hex")
    return text


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (Call(bytearray, MUCH), "bytearray"),
        (Call(torch.Tensor, MUCH), "torch._tensor Tensor|torch Tensor"),
        (doubled(b"0123456789abcdef", 36), "_codecs encode"),
        (Call(exec, "raise SystemExit"), "exec"),
        (Call(torch.load, "another"), "torch.serialization load"),
    ],
    ids=["bytearray", "tensor", "doubling", "exec", "load"],
)
def test_an_optimizer_that_holds_more_than_tensors_is_refused_before_it_is_unpickled(folder, payload, named):
    path = folder / "checkpoints" / NEWEST
    state = torch.load(path / "optimizer.pt", weights_only=True)
    torch.save(state | {"more": payload}, path / "optimizer.pt")
    sign(path)
    refused = rf"optimizer\.pt: truncated, missing or damaged \(it holds .*({named}), and moments are tensors"
    with little_memory(), pytest.raises(CheckpointError, match=refused):
        resume(folder)


def test_an_optimizer_whose_storages_lie_about_their_size_is_refused(folder):
    path = folder / "checkpoints" / NEWEST / "optimizer.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:1] if "/data/" in name else content)
    sign(path.parent)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: truncated, missing or damaged"):
        resume(folder)


def sparse_file(path, size):
    """A file of so many zeros that takes no room on the disk."""
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "timesteps.safetensors", "optimizer.pt"])
def test_a_file_that_is_longer_than_what_it_can_hold_is_refused_before_it_is_read(folder, name):
    path = folder / "checkpoints" / NEWEST
    sparse_file(path / name, MUCH)  # whose checksum alone would take an hour
    with little_memory(), pytest.raises(CheckpointError, match=f"{name}: truncated, missing or damaged .it has 1,099,"):
        resume(folder)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 99) + b"[" * 99,
        (lambda text: struct.pack("<Q", len(text)) + text)(
            json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
        ),
        (lambda text: struct.pack("<Q", len(text)) + text)(
            json.dumps({"x": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}).encode()
        ),
    ],
    ids=["length", "nested", "data", "overflow"],
)
def test_a_header_of_weights_that_lies_is_refused(folder, header):
    path = folder / "checkpoints" / NEWEST
    size = (path / "ema.safetensors").stat().st_size
    (path / "ema.safetensors").write_bytes(header.ljust(size, b" "))
    sign(path)
    with little_memory(), pytest.raises(CheckpointError, match=r"ema\.safetensors: truncated, missing or damaged"):
        load_run(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 1 << 16},
        {"dim": 1 << 14, "dim_mults": [1 << 14] * 2},
        {"dim": 1 << 16, "dim_mults": [1 << 16] * 3, "channels": 1 << 16},
        {"num_res_blocks": 40, "dim": 256},
    ],
    ids=["wide", "multiplied", "widest", "deep"],
)
def test_a_network_that_the_weights_cannot_fill_is_refused_before_it_is_built(folder, changes):
    path = folder / "checkpoints" / NEWEST
    state = json.loads((path / "state.json").read_text())
    state["config"]["model"] |= {"norm_groups": 1} | changes
    (path / "state.json").write_text(json.dumps(state))
    sign(path)
    with little_memory(), pytest.raises(ValueError, match=r"the network in state\.json needs at least|model: "):
        load_run(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"num_res_blocks": 1 << 60}},
        {"model": {"dim": 10**400}},
        {"model": {"dim_mults": [1] * 100_000}},
        {"diffusion": {"timesteps": 1 << 60}},
        {"training": {"workers": 1 << 60}},
    ],
)
def test_sizes_that_no_network_has_are_refused_by_the_config(change):
    values = small().model_dump(mode="json")
    for section, keys in change.items():
        values[section] |= keys
    with little_memory(), pytest.raises(config.ConfigError, match="needed: "):
        config.check(values)


@pytest.mark.parametrize(
    "content", [b"[" * 500_000, b'{"a":' * 150_000, b"1" * 900_000, b'"' + b"\\" * 900_000, b" " * (1 << 21)]
)
def test_a_config_that_is_no_config_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with little_memory(), pytest.raises(config.ConfigError, match=r"config\.json: ") as raised:
        config.load(path)
    assert len(str(raised.value)) < 1000


def test_a_config_is_not_read_beyond_what_a_config_can_have(tmp_path):
    path = tmp_path / "config.json"
    path.touch()
    sparse_file(path, MUCH)
    with little_memory(), pytest.raises(config.ConfigError, match="a config has at most 1,048,576 bytes"):
        config.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"t":' * 100_000,
        json.dumps({name: [1e999] for name in "tuwABC"} | {"sigma": [0.0]}),
        json.dumps({name: [10**400] for name in "tuwABC"} | {"sigma": [0.0]}),
        json.dumps({name: [[[[0]]]] for name in "tuwABC"} | {"sigma": [0.0]}),
        json.dumps({name: [0] * n for n, name in enumerate("tuwABC")} | {"sigma": []}),
        '{"t": ' + "9" * 10_000 + "}",
    ],
)
@pytest.mark.parametrize("table", [StepTable, FittedTable])
def test_a_table_that_is_no_table_is_an_error(table, text):
    with little_memory(), pytest.raises(ValueError, match=" "):
        table.from_json(text)


def test_a_fitted_sampler_is_not_read_beyond_what_a_table_can_have(folder):
    (folder / "samplers").mkdir()
    (folder / "samplers" / "fitted-3.json").touch()
    sparse_file(folder / "samplers" / "fitted-3.json", MUCH)
    fitted = FittedSamplers(folder, torch.nn.Linear(1, 1))
    with little_memory(), pytest.raises(SamplerFileError, match="it has more than 1,048,576 characters"):
        fitted[3]


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *more):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + rows + chunk(b"IEND", b"")


def tiff(tags):
    """A TIFF file of one directory; tags as (number, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


SIZE = [(256, 4, 1, 1 << 15), (257, 4, 1, 1 << 15)]  # width and height of a TIFF file
PLAIN = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
BOMB = zlib.compress(bytes(1 << 27), 9)
IMAGES = {
    "png.png": png(1 << 16, 1 << 16),
    "text.png": png(8, 8, chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    "profile.png": png(8, 8, chunk(b"iCCP", b"profile\0\0" + BOMB)),
    "chunk.png": png(8, 8)[:33] + struct.pack(">I", (1 << 31) - 1) + b"IDAT",
    "gif.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b"," + bytes(9) + b"\x02\x00;",
    "bmp.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm.ppm": b"P6 99999 99999 255\n",
    "digits.ppm": b"P6 " + b"9" * 100_000,
    "size.tif": tiff([*SIZE, *PLAIN[2:], (273, 4, 1, 8), (278, 4, 1, 1 << 15), (279, 4, 1, 1 << 30)]),
    "strips.tif": tiff([*PLAIN, (273, 4, (1 << 31) - 1, 8), (278, 4, 1, 8), (279, 4, (1 << 31) - 1, 8)]),
    "count.tif": tiff([(270, 2, (1 << 32) - 1, 8), *PLAIN]),
    "circle.tif": tiff(PLAIN)[:-4] + struct.pack("<I", 8),
    "riff.webp": b"RIFF" + struct.pack("<I", 0xFFFFFFF0) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xff" * 6,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_lies_is_refused_or_read_in_little_memory(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(IMAGES[name])
    with little_memory():
        try:
            found = data.ImageFiles([path], 8)[[0]]
        except data.DataError as error:
            assert str(error).startswith(f"{path}: not a readable image")  # noqa: PT017
            assert "memory" not in str(error)  # noqa: PT017
        else:
            assert found.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("shape", [(1 << 31, 1 << 15, 1 << 15), (1 << 14, 1 << 14, 1 << 10), (60_000, 280, 280)])
@pytest.mark.parametrize("content", [b"", gzip.compress(bytes(1 << 26))], ids=["empty", "bomb"])
def test_an_idx_file_whose_header_lies_is_refused(tmp_path, shape, content):
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape)
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(header) + content)  # a second member goes on where the first one ends
    with little_memory(), pytest.raises(data.DataError, match=r"images: truncated|images: cannot be read"):
        data.read_idx(path)


def test_weights_that_fit_load_within_the_same_memory(folder):
    with little_memory():
        found = load_run(folder)
    stored = safetensors.torch.load_file(folder / "checkpoints" / NEWEST / "ema.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found.diffusion.model.state_dict().items())
