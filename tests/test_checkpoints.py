"""Checkpoints are complete or absent, and what they hold is compared before it is used."""

import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training_runs import finished, small, weights, without_curve  # noqa: F401  (fixtures)

from ddpm_fast.training import checkpoint, trainer
from ddpm_fast.training.checkpoint import CheckpointError
from ddpm_fast.training.config import build_diffusion
from ddpm_fast.training.run import load_run

NEWEST, OLDER = "step-00000012", "step-00000008"


@pytest.fixture
def folder(finished, tmp_path):  # noqa: F811
    """A copy of a finished run."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def resume(folder, steps=16, **changes):
    return trainer.train(small(training__steps=steps, **changes), folder, resume=True)


def sign(path: Path) -> None:
    """Writes the checksums of a checkpoint anew, so that a changed file gets past them."""
    names = ("state.json", "model.safetensors", "ema.safetensors", "optimizer.pt", "timesteps.safetensors")
    lines = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (path / "SHA256SUMS").write_text("".join(lines))


def unsigned(path: Path) -> None:
    """Makes a checkpoint one of the first format, which had no checksums."""
    (path / "SHA256SUMS").unlink()
    state = json.loads((path / "state.json").read_text())
    del state["format"], state["data"]
    (path / "state.json").write_text(json.dumps(state))


# What belongs to a run


BACKUPS = (f"{OLDER}-best", f"{OLDER}.bak", f"{NEWEST}.old", "step-99999999-copy", "step-0000000099", "step-99")


def test_backups_beside_the_checkpoints_are_neither_used_nor_deleted(folder):
    for name in BACKUPS:
        shutil.copytree(folder / "checkpoints" / OLDER, folder / "checkpoints" / name)
    shutil.copytree(folder / "checkpoints" / OLDER, folder / "checkpoints" / "step-00000099")  # whose state is step 8
    (folder / "checkpoints" / f"{NEWEST}.zip").touch()
    (folder / "checkpoints" / "step-00000500").touch()
    (folder / "checkpoints" / "step-00000600").mkdir()
    (folder / "checkpoints" / "step-00000700").symlink_to(folder / "checkpoints" / OLDER)
    others = {p.name for p in (folder / "checkpoints").iterdir()} - {OLDER, NEWEST}
    assert [p.name for p in checkpoint.steps(folder)] == [OLDER, NEWEST]
    assert torch.equal(load_run(folder).diffusion.model.conv_in.weight, weights(folder, "ema")["conv_in.weight"])
    resume(folder, steps=20)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == others | {"step-00000016", "step-00000020"}


def test_something_else_with_the_name_of_a_coming_checkpoint_is_told_before_the_training(folder):
    (folder / "checkpoints" / "step-00000016").mkdir()
    with pytest.raises(CheckpointError, match="step-00000016 has the name of a checkpoint, but is not one of this run"):
        resume(folder)


def test_a_checkpoint_in_which_somebody_keeps_files_is_not_deleted(folder):
    (folder / "checkpoints" / OLDER / "notes.txt").write_text("the best so far")
    resume(folder, steps=20)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [OLDER, "step-00000016", "step-00000020"]
    assert load_run(folder / "checkpoints" / OLDER).folder.name == OLDER


def test_an_interrupted_deletion_is_completed(folder):
    leftover = folder / "checkpoints" / "step-00000004.tmp"
    shutil.copytree(folder / "checkpoints" / OLDER, leftover)
    (leftover / "state.json").unlink()
    resume(folder)
    assert not leftover.exists()


def test_a_folder_with_an_unfinished_first_checkpoint_is_free(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-00000004.tmp").mkdir(parents=True)
    trainer.train(small(training__steps=4), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


# Saving


def save(folder, step=16, net=None, optimizer=None):
    net = net or build_diffusion(small()).model
    optimizer = optimizer or torch.optim.AdamW(net.parameters())
    tensors = {"model": net.state_dict(), "ema": net.state_dict(), "timesteps": {}}
    return checkpoint.save(folder, step, **tensors, optimizer=optimizer, state={"config": {}})


def test_a_learning_rate_that_is_a_tensor_is_saved_as_a_number(tmp_path):
    net = build_diffusion(small()).model
    path = save(tmp_path, net=net, optimizer=torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.5), fused=True))
    (group,) = torch.load(path / "optimizer.pt", weights_only=True)["param_groups"]
    assert type(group["lr"]) is float
    assert group["lr"] == 0.5
    assert group["params"] == list(range(len([*net.parameters()])))


def test_every_file_and_folder_is_flushed_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename

    def record_flush(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path.resolve()).as_posix())
        fsync(descriptor)

    def record_rename(self, target):
        events.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(Path, "rename", record_rename)
    path = save(tmp_path)
    assert events.count("renamed") == 1
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    temporary = f"checkpoints/{path.name}.tmp"
    assert {f"{temporary}/{file.name}" for file in path.iterdir()} | {temporary} <= set(before)
    assert after == ["checkpoints"]


def test_checkpoints_are_saved_where_folders_cannot_be_flushed(tmp_path, monkeypatch):
    """As on Windows: no folder can be opened, and a file that is open for reading cannot be flushed."""
    flags, real_open, real_fsync = {}, os.open, os.fsync

    def open_files_alone(path, flag, *arguments, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = real_open(path, flag, *arguments, **more)
        flags[descriptor] = flag
        return descriptor

    def fsync(descriptor):
        if flags.get(descriptor) == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "open", open_files_alone)
    monkeypatch.setattr(os, "fsync", fsync)
    assert checkpoint.load_state(save(tmp_path))["step"] == 16


@pytest.mark.parametrize("where", ["save_file", "torch.save", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_everything_as_it_was(folder, monkeypatch, where, error):
    def fail(*_, **__):
        raise error

    target = {
        "save_file": (safetensors.torch, "save_file"),
        "torch.save": (checkpoint.torch, "save"),
        "rename": (Path, "rename"),
    }[where]
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    monkeypatch.setattr(*target, fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected) as raised:
        save(folder)
    if expected is CheckpointError:
        assert "step-00000016: cannot be saved ([Errno 28] No space left" in str(raised.value)
        assert f"the newest checkpoint is {NEWEST}" in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
    assert {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()} == before
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {OLDER, NEWEST}


def test_a_disk_that_fills_while_saving_is_one_line(tmp_path):
    """The limit on a file's size stands in for the disk, in a process of its own."""
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from ddpm_fast.training import checkpoint\n"
        "net = torch.nn.Linear(64, 64)\n"
        "optimizer = torch.optim.AdamW(net.parameters(), fused=True)\n"
        "net(torch.ones(1, 64)).sum().backward()\n"
        "optimizer.step()\n"
        "weights = net.state_dict()\n"
        "for limit in (1 << 12, 1 << 15):  # less than the weights, and more than those but less than the moments\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        tensors = {'model': weights, 'ema': weights, 'timesteps': {}}\n"
        "        checkpoint.save(Path(sys.argv[1]), 1, **tensors, optimizer=optimizer, state={})\n"
        "    except checkpoint.CheckpointError as error:\n"
        "        print(error)\n"
    )
    result = subprocess.run([os.sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all("step-00000001: cannot be saved (" in line for line in lines)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_checkpoint_that_reads_back_otherwise_does_not_replace_the_older_ones(folder, monkeypatch):
    write = safetensors.torch.save_file

    def flip_a_bit(tensors, path):
        write({name: tensor + 1e-3 for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(safetensors.torch, "save_file", flip_a_bit)
    with pytest.raises(CheckpointError, match="the files do not hold what was written"):
        save(folder)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {OLDER, NEWEST}


@pytest.mark.parametrize("what", ["weights", "moments"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_and_moments_that_are_not_finite_are_not_saved(folder, what, value):
    net = build_diffusion(small()).model
    optimizer = torch.optim.AdamW(net.parameters())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    bad = net.conv_out.bias if what == "weights" else optimizer.state[net.conv_out.bias]["exp_avg"]
    with torch.no_grad():
        bad[0] = value
    advice = f"the last good checkpoint is {NEWEST}: lower training.lr .* with --resume, or delete .* from {OLDER}"
    with pytest.raises(CheckpointError, match=f"step 16 is not saved: .* is not finite; {advice}"):
        save(folder, net=net, optimizer=optimizer)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {OLDER, NEWEST}


# Loading


@pytest.mark.parametrize("name", ["ema.safetensors", "model.safetensors", "optimizer.pt", "state.json"])
def test_a_truncated_checkpoint_is_named_and_the_older_one_still_loads(finished, folder, monkeypatch, name):  # noqa: F811
    damaged = folder / "checkpoints" / NEWEST / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    older = folder / "checkpoints" / OLDER
    with pytest.raises(CheckpointError, match=rf"{name}: truncated.*delete {folder}.* to go on from {OLDER}"):
        resume(folder, steps=12)
    assert load_run(older).diffusion.sample(1, seed=0).shape == (1, 1, 8, 8)
    monkeypatch.chdir(damaged.parent)
    model = load_run(older).diffusion.model
    load = {
        "ema.safetensors": load_run,
        "model.safetensors": lambda here: checkpoint.load_weights(here, "model", model.state_dict()),
        "optimizer.pt": lambda here: checkpoint.load_optimizer(here, torch.optim.AdamW(model.parameters())),
        "state.json": load_run,
    }[name]
    with pytest.raises(CheckpointError, match=f"to go on from {OLDER}"):
        load(Path())  # from within
    shutil.rmtree(damaged.parent)
    resume(folder, steps=12)
    assert torch.equal(weights(folder, "ema")["conv_in.weight"], weights(finished.folder, "ema")["conv_in.weight"])


@pytest.mark.parametrize("name", ["ema.safetensors", "model.safetensors", "optimizer.pt", "state.json"])
def test_a_single_flipped_bit_is_noticed(folder, name):
    path = folder / "checkpoints" / NEWEST / name
    content = bytearray(path.read_bytes())
    at = content.index(b'"recent"') + 3 if name == "state.json" else len(content) * 2 // 3
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .*differs from its checksum in SHA256SUMS.*from {OLDER}"):
        resume(folder)


def test_the_checksums_are_those_of_sha256sum(folder):
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    result = subprocess.run(command, cwd=folder / "checkpoints" / NEWEST, capture_output=True, text=True)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 5


def test_checksums_that_were_deleted_are_missed(folder):
    (folder / "checkpoints" / NEWEST / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="SHA256SUMS: truncated, missing or damaged"):
        load_run(folder)


def test_checkpoints_without_checksums_still_load_and_go_on(finished, folder):  # noqa: F811
    for path in (folder / "checkpoints").iterdir():
        unsigned(path)
    assert torch.equal(load_run(folder).diffusion.sample(1, seed=0), finished.diffusion.sample(1, seed=0))
    assert resume(folder).metrics["steps"] == 16


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "step: Field required"),
        ("[]", "the file: Input should be an object"),
        ("{", "the file: Invalid JSON"),
        ("[" * 100_000, "the file: Invalid JSON"),
        ('{"step": -1, "config": {}}', "step: Input should be greater than or equal to 0"),
        ('{"step": 12, "config": {}, "recent": ["a"]}', "recent.0: Input should be a valid number"),
        ('{"step": 12, "config": {}, "seconds": NaN}', "seconds: Input should be a finite number"),
    ],
)
def test_a_state_that_is_not_one_is_named(folder, content, reason):
    path = folder / "checkpoints" / NEWEST
    (path / "state.json").write_text(content)
    sign(path)
    with pytest.raises(CheckpointError, match=rf"state.json: truncated, missing or damaged \({reason}") as raised:
        load_run(folder)
    assert len(str(raised.value).splitlines()) == 1


def test_a_checkpoint_of_a_later_format_is_refused(folder):
    path = folder / "checkpoints" / NEWEST
    state = json.loads((path / "state.json").read_text()) | {"format": 4}
    (path / "state.json").write_text(json.dumps(state))
    sign(path)
    with pytest.raises(CheckpointError, match=r"later version of ddpm_fast \(format 4, known: 3\)"):
        load_run(folder)


@pytest.mark.parametrize("name", ["model", "ema"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "conv_in.bias"}, r"\(conv_in.bias is missing\)"),
        (lambda t: t | {"other": torch.zeros(1)}, r"\(other is unknown\)"),
        (lambda t: t | {"conv_in.bias": torch.zeros(9)}, r"\(conv_in.bias is \(9,\) torch.float32, needed \(8,\)"),
        (
            lambda t: t | {"conv_in.bias": t["conv_in.bias"].half()},
            r"is \(8,\) torch.float16, needed \(8,\)",
        ),
        (lambda t: t | {"conv_in.bias": torch.full((8,), torch.nan)}, f"conv_in.bias is not finite; .* from {OLDER}"),
    ],
)
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(folder, name, change, reason):
    path = folder / "checkpoints" / NEWEST
    file = path / f"{name}.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load(file.read_bytes())), file)
    sign(path)
    with pytest.raises(CheckpointError, match=reason) as raised:
        resume(folder)
    assert len(str(raised.value).splitlines()) == 1
    assert [p.name for p in checkpoint.steps(folder)] == [OLDER, NEWEST]


def change_moments(change):
    def apply(state):
        for moments in state["state"].values():
            change(moments)

    return apply


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_moments(lambda m: m.update(exp_avg=m["exp_avg"].flatten()[:1].clone())), "0.exp_avg is .* needed"),
        (change_moments(lambda m: m.update(exp_avg_sq=m["exp_avg_sq"].expand(2, *m["exp_avg_sq"].shape))), "needed"),
        (change_moments(lambda m: m.update(exp_avg=m["exp_avg"].double())), "torch.float64, needed .* torch.float32"),
        (change_moments(lambda m: m.update(exp_avg=m["exp_avg"].to_sparse())), "(0.exp_avg is|sparse)"),
        (change_moments(lambda m: m.update(step=7)), "0.step is int"),
        (change_moments(lambda m: m["step"].fill_(-1)), "0.step is below what it can be"),
        (change_moments(lambda m: m["exp_avg_sq"].fill_(-1)), "0.exp_avg_sq is below what it can be"),
        (change_moments(lambda m: m["exp_avg"].fill_(torch.inf)), "0.exp_avg is not finite"),
        (change_moments(lambda m: m.pop("exp_avg")), "0.exp_avg is missing"),
        (lambda state: state["state"].pop(0), "0.exp_avg is missing"),
        (lambda state: state.clear(), "damaged"),
        (lambda state: state.update(more=torch.zeros(1 << 20)), "the network in state.json needs at most"),
    ],
)
def test_moments_that_do_not_fit_their_weights_are_refused(folder, change, reason):
    path = folder / "checkpoints" / NEWEST
    state = torch.load(path / "optimizer.pt", weights_only=True)
    change(state)
    torch.save(state, path / "optimizer.pt")
    sign(path)
    with pytest.raises(CheckpointError, match=rf"optimizer\.pt: .*{reason}"):
        resume(folder)


def test_a_compressed_optimizer_is_refused_before_it_is_unpacked(folder):
    path = folder / "checkpoints" / NEWEST
    with zipfile.ZipFile(path / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("optimizer/data/0", bytes(1 << 24))
    sign(path)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: truncated, missing or damaged \(it is compressed\)"):
        resume(folder)


def test_loading_a_checkpoint_cannot_run_code(folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was-run",)

    path = folder / "checkpoints" / NEWEST
    torch.save(Payload(), path / "optimizer.pt")
    sign(path)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        resume(folder)
    assert not (tmp_path / "was-run").exists()
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".pt", ".json", ""}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_moments_take_the_memory_format_of_their_weights(folder, memory_format):
    """As the fused update needs it; the files hold contiguous tensors."""
    model = build_diffusion(small()).model.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.load_optimizer(folder / "checkpoints" / NEWEST, optimizer)
    saved = torch.load(folder / "checkpoints" / NEWEST / "optimizer.pt", weights_only=True)["state"]
    for i, p in enumerate(model.parameters()):
        for key in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][key].stride() == p.stride()
            assert torch.equal(optimizer.state[p][key], saved[i][key])


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no checkpoint here"):
        load_run(str(tmp_path))
