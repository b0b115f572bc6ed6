import pytest
import torch
from PIL import Image

from ddpm_fast.training.pictures import PictureError, save_grid, save_images, to_uint8
from ddpm_fast.training.plots import save_loss


def test_values_are_rounded_to_the_nearest_and_clipped():
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 1.0, 7.0]).view(1, 1, 1, 7)
    assert to_uint8(values).flatten().tolist() == [0, 0, 0, 1, 127, 255, 255]
    assert to_uint8(values.to(torch.bfloat16)).dtype == torch.uint8
    assert to_uint8(values[:0]).shape == (0, 1, 1, 7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_no_picture_can_show_are_refused_and_leave_what_was_there(tmp_path, value):
    images = torch.rand(3, 1, 8, 8)
    for path in ("grid.png", "loss.png", "000000.png"):
        (tmp_path / path).write_bytes(b"before")
    images[1, 0, 2, 3] = value
    with pytest.raises(PictureError, match="1 of 3 images have values that are NaN or infinite"):
        save_grid(images, tmp_path / "grid.png")
    with pytest.raises(PictureError, match="1 of 3 images"):
        save_images(images, tmp_path)
    with pytest.raises(PictureError, match=f"the loss at step 20 is {value}"):
        save_loss([(10, 1.0), (20, value)], tmp_path / "loss.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("grid.png", "loss.png", "000000.png"), b"before"
    )


def test_paths_may_be_strings(tmp_path):
    images = torch.rand(2, 3, 8, 8)
    save_grid(images, f"{tmp_path}/grid.jpg")
    save_images(images, str(tmp_path), first=7)
    save_loss([(1, 1.0), (2, 0.5)], f"{tmp_path}/loss.png")
    kinds = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            kinds[path.name] = picture.format
    assert kinds == {"grid.jpg": "JPEG", "000007.png": "PNG", "000008.png": "PNG", "loss.png": "PNG"}
