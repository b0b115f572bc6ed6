"""What a run will take: the sums are right, and the report says them."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_config import changed
from training_runs import without_curve  # noqa: F401  (fixture)

from ddpm_fast.app import cli, estimate, step_cost
from ddpm_fast.app.estimate import Estimate, Variant
from ddpm_fast.app.memory import SavedActivations, StepMemory, free_memory
from ddpm_fast.training import checkpoint, trainer
from ddpm_fast.training.config import check

CPU = torch.device("cpu")


def test_memory_in_use_is_counted_until_it_is_freed_and_once_for_all_views():
    weight = torch.ones(1000, requires_grad=True)
    with SavedActivations([weight]) as found:
        x = torch.zeros(500)
        view = x.view(50, 10)
        del x
        assert found.bytes == 2000
        y = weight.detach().exp_()  # in place, in memory that was there before
        assert found.bytes == 2000
        del view
        assert found.bytes == 0
        loss = weight.exp().sum()
        assert found.bytes == 4004  # exp is saved for the backward pass
        loss.backward()
        del loss, y
        assert found.bytes == weight.grad.nbytes
    assert max(found.course) == 8008  # exp, the gradient, the loss, and that of the loss


def test_the_memory_of_a_step_is_the_maximum_over_its_operations():
    """Of a + b n, where for few images the gradients decide, and for many what is saved."""
    found = StepMemory(100, ([20, 90, 1000], [30, 130, 1000]))
    assert [found.bytes(n) for n in (1, 20, 25, 100)] == [1100, 1100, 100 + 10 + 40 * 25, 100 + 10 + 40 * 100]
    assert [found.of_an_image(n) for n in (1, 100)] == [0, 40]
    for room in (1100, 1110, 1150, 4110, 4149):
        n = found.largest(room)
        assert found.bytes(n) <= room < found.bytes(n + 1) or found.bytes(n) == 1100
    assert found.largest(4110) == 100
    assert found.largest(1099) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_seven_images_follows_from_those_of_two_and_three(checkpointing):
    config = check(changed(model__gradient_checkpointing=checkpointing))
    step = step_cost._Step(config, CPU)
    found = step.memory()
    static = 2 * step.weights + 2 * sum(p.nbytes for p in step.parameters)
    assert found.bytes(7) == static + max(step._course(7))


def test_memory_that_is_free_is_that_of_the_container(tmp_path):
    free = free_memory(CPU, tmp_path)
    assert free > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5000\n")
    assert free_memory(CPU, tmp_path) > 2**20
    (tmp_path / "memory.max").write_text("6000\n")
    assert free_memory(CPU, tmp_path) == 5000
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("3000\n")
    (tmp_path / "memory" / "memory.stat").write_text("cache 1\ntotal_rss 1000\n")
    assert free_memory(CPU, tmp_path) == 2000
    assert free_memory(torch.device("meta")) is None


def test_the_estimate_of_the_disk_is_what_a_run_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(step_cost, "SECONDS", 0.01)
    config = check(changed(diffusion__timesteps=10, diffusion__beta_schedule="cosine", training__steps=1))
    found = estimate.estimate(config)
    folder = trainer.train(config, tmp_path / "run").folder
    size = sum(path.stat().st_size for path in checkpoint.latest(folder).iterdir())
    # Besides tensors, there are their names in four files, up to 300 bytes each, and sums of losses.
    assert found.checkpoint < size < found.checkpoint + 300 * 4 * len(found.config.model_dump_json()) + 2**17
    assert found.free_disk <= shutil.disk_usage(tmp_path).total


def test_the_command_tells_time_memory_disk_and_variants(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_cost, "SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(
        json.dumps(changed(training__precision="fp32", diffusion__timesteps=10, diffusion__beta_schedule="cosine"))
    )
    cli.main(["estimate", "mine.json"])
    told = capsys.readouterr().out
    for name in ("network", "device", "step", "run", "memory", "disk", "as configured", "recommended:"):
        assert f"\n{name} " in f"\n{told}".replace("recommended: ", "recommended:  ")
    assert "2 checkpoints of " in told
    assert "\ntraining.precision = bf16 " in told
    assert "\nmodel.gradient_checkpointing = true " in told
    assert "more processes: one thread cannot be divided" in told  # tests have one


def test_on_gpus_more_of_them_are_computed_from_the_bytes_of_the_gradients(monkeypatch):
    cost = step_cost.StepCost(
        update=0.1, image=0.01, images=8, memory=StepMemory(100, ([20], [30])), weights=int(estimate.LINK)
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    config = check(changed(training__batch_size=10))
    (found,), note = estimate._several(config, torch.device("cuda"), cost, room=1100.0)
    assert found.name == "4 devices"
    assert found.step == pytest.approx(0.1 + 0.01 * 3 + 2 * 3 / 4)
    assert found.largest == 4 * 100
    assert "20 GB/s" in note


def told(*variants, batch=8):
    values = {field.name: 1 for field in dataclasses.fields(Estimate)}
    config = check(changed(training__batch_size=batch))
    return Estimate(**values | {"config": config, "variants": list(variants)}).recommendation()


def test_what_is_recommended_is_clearly_faster_and_fits():
    own = Variant("as configured (bf16)", 1.0, 1, 1, 100)
    fast = Variant("2 processes", 0.5, 1, 1, 50)
    assert told(own, Variant("fp32", 0.99, 1, 1, 50)) == (
        "recommended: the config as it is; nothing in this table is clearly faster"
    )
    assert told(own, fast) == "recommended: 2 processes, 2 times as fast"
    assert told(own, fast, batch=80) == ("recommended: the config as it is; nothing in this table is clearly faster")
    saving = Variant("checkpointing", 1.3, 1, 1, 300)
    assert told(own, saving, fast, batch=200) == (
        "recommended: checkpointing: as configured, 200 images do not fit into the free memory"
    )
    assert re.search("checkpointing with a training.batch_size of at most 300", told(own, saving, batch=1000))
    assert "a smaller network" in told(dataclasses.replace(own, largest=0))
    assert "as it is" in told(dataclasses.replace(own, largest=None))


@pytest.mark.long
def test_two_processes_are_measured_with_the_threads_divided(monkeypatch):
    monkeypatch.setattr(step_cost, "SECONDS", 0.2)
    config = check(changed(diffusion__timesteps=10, diffusion__beta_schedule="cosine"))
    torch.set_num_threads(2)
    try:
        found = estimate.estimate(config)
    finally:
        torch.set_num_threads(1)
    assert found.variants[-1].name == "2 processes, 1 thread each"
    assert found.variants[-1].step > 0
    assert "2 processes, 1 thread each" in str(found)
