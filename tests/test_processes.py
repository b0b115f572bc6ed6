"""Several processes: sampling is shared, training is refused. On the CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_config import changed

import ddpm_fast
from ddpm_fast.app.generate import write_samples
from ddpm_fast.training import checkpoint, trainer
from ddpm_fast.training.config import build_diffusion, check
from ddpm_fast.training.pictures import save_images
from ddpm_fast.training.run import load_run, pick_device, weights_of

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",  # as in this process
    "PYTHONPATH": str(Path(ddpm_fast.__file__).parents[1]),  # wherever a process is started, it is this package
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run in batches of 4, whose network has not been trained, but has an output other than 0."""
    folder, config = tmp_path_factory.mktemp("runs") / "run", check(changed(diffusion__timesteps=25))
    torch.manual_seed(0)
    diffusion = build_diffusion(config)
    torch.nn.init.normal_(diffusion.model.conv_out.weight, std=0.1)
    checkpoint.save(
        folder,
        1,
        model=weights_of(diffusion),
        ema=weights_of(diffusion),
        optimizer=trainer.make_optimizer(diffusion, config.training),
        timesteps={},
        state={"config": config.model_dump(mode="json")},
    )
    return folder


def launch(count: int, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*launcher, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, cwd=cwd, timeout=120, env=ENVIRONMENT)
    result.stdout, result.stderr = (
        result.stdout.decode(),
        result.stderr.decode(),
    )  # text=True would lose the \\r of bars
    return result


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_write_the_files_of_one_and_show_one_bar(folder, tmp_path):
    write_samples(load_run(folder), tmp_path / "one", n=11, seed=3)
    result = launch(2, "-m", "ddpm_fast", "sample", folder, "-n", 11, "--seed", 3, "--out", "two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(files(tmp_path / "one")) == [f"{i:06d}.png" for i in range(11)]
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert result.stdout.splitlines() == ["two: 11 images"]
    (bar,) = (line for line in result.stderr.split("\n") if "sampling:" in line)
    assert "| 11/11 [" in bar.split("\r")[-1]


THREE = """
import sys
from pathlib import Path
from ddpm_fast.training.pictures import save_images
from ddpm_fast.app.generate import write_samples
from ddpm_fast.training.run import load_run

run, out = load_run(Path(sys.argv[1])), Path(sys.argv[2])
write_samples(run, out / "many", n=14, sampler="ddpm")
assert len(list((out / "many").iterdir())) == 14  # in every process
write_samples(run, out / "grid.png", n=14, steps=5)
assert (out / "grid.png").exists()
write_samples(run, out / "two", n=2)
"""


def test_three_processes_give_the_images_and_the_grid_of_one_and_may_be_more_than_the_images(folder, tmp_path):
    run = load_run(folder)
    one, three = tmp_path / "one", tmp_path / "three"
    write_samples(run, one / "many", n=14, sampler="ddpm")
    write_samples(run, one / "grid.png", n=14, steps=5)
    (one / "two").mkdir()
    run = run.in_precision("auto")
    for i in range(2):  # as they are dealt to three processes
        images = run.diffusion.sample(1, seed=0, sample_offset=i)
        save_images(images, one / "two", i, run.receipt(2, batch_size=1))
    (tmp_path / "script.py").write_text(THREE)
    result = launch(3, "script.py", folder, three, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert files(three / "many") == files(one / "many")
    assert (three / "grid.png").read_bytes() == (one / "grid.png").read_bytes()
    assert files(three / "two") == files(one / "two")


def test_training_in_two_processes_is_refused_by_both(folder, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(changed()))
    result = launch(2, "-m", "ddpm_fast", "train", "mine.json", "--out", "run", cwd=tmp_path)
    assert result.returncode == 1
    assert "ddpm-fast train: training runs in one process, but a launcher has started 2" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_mistake_ends_all_processes_with_a_message(folder, tmp_path):
    started = time.monotonic()
    result = launch(2, "-m", "ddpm_fast", "sample", folder, "--steps", 26, cwd=tmp_path)
    assert time.monotonic() - started < 60  # two imports of PyTorch, on whatever machine; a process that hangs has 1800
    assert result.returncode == 1
    assert "ddpm-fast sample: steps must be an integer in [1, 26), got 26" in result.stderr
    assert not (tmp_path / "samples.png").exists()


FAILING = """
import sys
from pathlib import Path
import torch.distributed as dist
from ddpm_fast.app import generate
from ddpm_fast.training.run import RunError, load_run

def full(images, folder, first, receipt):
    raise OSError("the disk is full")

run, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
if rank == 1:
    generate.save_images = full
try:
    generate.write_samples(load_run(run), out / "images", n=8)
except (OSError, RunError) as error:
    print(error, flush=True)
sys.stdin.read()  # and the process goes on
"""


def test_nobody_waits_for_a_process_that_has_failed(folder, tmp_path):
    """Without a launcher that would end them all."""
    (tmp_path / "script.py").write_text(FAILING)
    processes = [
        subprocess.Popen(
            [sys.executable, "script.py", folder, tmp_path, str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=tmp_path,
            env=ENVIRONMENT,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.stdout.readline().strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert said == ["another process has ended before its work was done", "the disk is full"]
    assert len(files(tmp_path / "images")) == 4


@pytest.mark.parametrize(("local_rank", "index"), [("1", 1), ("5", 1)])
def test_each_process_takes_an_accelerator_of_its_own(monkeypatch, local_rank, index):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: chosen[-1])
    assert pick_device() == torch.device("cuda", index)
