"""`ddpm-fast watch`: what it reads of a run, and what it draws."""

import io
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from training_runs import trained, without_curve  # noqa: F401  (fixtures)

from ddpm_fast.app import cli, watch, watched
from ddpm_fast.training.progress_log import ProgressLog


@pytest.fixture
def going(trained, tmp_path):  # noqa: F811
    """The files of a run that goes on: its points are of now, two seconds apart, and 988 steps are left."""
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    values = json.loads((folder / "config.json").read_text())
    values["training"]["steps"] = 1000
    (folder / "config.json").write_text(json.dumps(values))
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()][:-1]
    for line in lines[1:]:
        line["time"] = time.time() - 2 * (12 - line["step"])
    (folder / "progress.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def drawn(run, columns, rows):
    console = Console(width=columns, height=rows, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(watch.frame(run, columns, rows))
    lines = console.render_lines(watch.frame(run, columns, rows), pad=False)
    assert len(lines) <= rows
    assert all(sum(segment.cell_length for segment in line) <= columns for line in lines)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


@pytest.mark.parametrize(("columns", "rows"), [(80, 23), (60, 16), (131, 47), (400, 100)])
def test_a_run_that_goes_on_fits_a_terminal(going, columns, rows):
    lines = drawn(watched.read(going), columns, rows)
    assert lines[0].startswith(str(going)[:10])
    assert lines[0].endswith("step 12 of 1,000")
    assert lines[2].startswith("loss 0.")
    assert lines[3].startswith("33 min left, last point ")
    assert any("⠉" <= c <= "⣿" for line in lines for c in line)  # a curve
    assert any("▄▄▄▄▄" in line for line in lines)  # samples
    for title in ("loss by step", "loss by timestep"):
        assert any(line.startswith(title) for line in lines)


def test_the_loss_by_timestep_is_the_mean_of_the_last_points(going):
    run = watched.read(going)
    for t, mean in run.by_timestep:
        of_t = [point[name] for point in run.points[-10:] if (name := f"loss_by_timestep/{int(t)}-{int(t)}") in point]
        assert mean == pytest.approx(sum(of_t) / len(of_t))


def test_a_run_whose_points_stay_away_may_have_been_killed(going):
    path = going / "progress.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        line["time"] -= 600
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert drawn(watched.read(going), 80, 23)[3].startswith("no point for 10 min: the training is slow, or it was")


def test_a_run_without_a_point_or_a_preview_is_drawn(going):
    (going / "progress.jsonl").write_text('{"id": "a"}\n')
    (going / "metrics.json").unlink()
    shutil.rmtree(going / "previews")
    lines = drawn(watched.read(going), 80, 23)
    assert lines[0].endswith("step 0 of 1,000")
    assert "no loss so far" in lines[2]
    assert "loss by step: nothing yet" in lines


def test_a_run_from_before_there_was_a_course_shows_its_metrics(trained, going):  # noqa: F811
    (going / "progress.jsonl").unlink()
    run = watched.read(going)
    assert [[point["step"], point["loss"]] for point in run.points] == [list(p) for p in trained.metrics["history"]]
    assert [t for t, _ in run.by_timestep] == [t for t, _ in trained.metrics["loss_by_timestep"]]
    assert run.ended is None
    drawn(run, 80, 23)
    log = ProgressLog(going, 12)  # the run goes on today
    log.point(13, {"loss": 0.5})
    assert [point["step"] for point in watched.read(going).points] == list(range(1, 14))


def test_watch_draws_a_run_again_until_it_has_ended(going, monkeypatch, capsys):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            log = ProgressLog(going, 12)
            log.point(13, {"loss": 0.5})
            log.end("stopped", 13, "stopped after step 13; go on with --resume")

    screen = Console(width=80, height=24, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(watch, "Console", lambda: screen)
    monkeypatch.setattr(watch.time, "sleep", sleep)
    cli.main(["watch", str(going)])
    assert slept == [watch.EVERY] * 2
    shown = screen.file.getvalue()
    assert shown.count("step 12 of 1,000") == 2
    assert "step 13 of 1,000" in shown.rpartition("\x1b[?1049l")[2]  # what stays when the screen is left
    assert "stopped: stopped after step 13; go on with --resume" in shown


def test_ctrl_c_leaves_watch_and_not_the_training(going, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    screen = Console(width=80, height=24, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(watch, "Console", lambda: screen)
    monkeypatch.setattr(watch.time, "sleep", interrupt)
    cli.main(["watch", str(going)])
    assert "step 12 of 1,000" in screen.file.getvalue().rpartition("\x1b[?1049l")[2]


def test_watch_writes_one_picture_if_asked_to(going, tmp_path, capsys):
    cli.main(["watch", str(going), "--png", str(tmp_path / "course.png")])
    assert capsys.readouterr().out == f"{tmp_path / 'course.png'}\n"
    with watch.Image.open(tmp_path / "course.png") as picture:
        assert picture.size == (1440, 960)


def test_watch_needs_a_run_and_the_packages_that_draw(tmp_path, monkeypatch, going):
    with pytest.raises(SystemExit, match=r"nowhere: no run here, since its config\.json cannot be read"):
        cli.main(["watch", str(tmp_path / "nowhere")])
    monkeypatch.delitem(sys.modules, "ddpm_fast.app.watch")
    monkeypatch.delattr("ddpm_fast.app.watch")
    monkeypatch.setitem(sys.modules, "plotille", None)
    with pytest.raises(SystemExit, match=r'ddpm-fast watch needs plotille: pip install "ddpm_fast\[watch\]"'):
        cli.main(["watch", str(going)])
