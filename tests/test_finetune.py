"""The command finetune, as its user runs it."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetuning import command, environment, make_converted, make_images, metrics_of, run, tensors_of

RICH = (
    "--mixup",
    0.4,
    "--ema-decay",
    0.9,
    "--lr",
    0.003,
    "--workers",
    1,
    "--random-erasing",
    0.3,
    "--warmup-epochs",
    0.5,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("converted") / "dir", drop_rate=0.2, drop_path_rate=0.1)


def kill_and_resume(arguments: list[object], folder: Path, kills: int, seed: int) -> list[float]:
    """Kill a run at random moments after it has begun to train, and let it end; returns when it was killed."""
    draws, done = np.random.default_rng(seed), []
    marker = folder / "run" / "metrics.csv"
    while len(done) < kills:
        before = marker.stat().st_mtime_ns if marker.exists() else 0
        process = subprocess.Popen(
            command(*arguments, "--resume"), env=environment(), cwd=folder, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None and (marker.stat().st_mtime_ns if marker.exists() else 0) == before:
            time.sleep(0.005)  # until it has read its state
        delay = float(draws.uniform(0, 0.6))
        time.sleep(delay)
        if process.poll() is not None:
            break  # it was quicker
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done.append(delay)
    run(*arguments, "--resume", folder=folder)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("kills", [int(os.environ.get("MASKSURGERY_KILLS", 5))])
def test_a_killed_run_ends_with_bitwise_the_same_weights(
    images: Path, converted: Path, tmp_path: Path, kills: int
) -> None:
    arguments = ["finetune", converted, "--data", images, "--epochs", 3 * kills, "--batch-size", 8]
    arguments += ["--checkpoint-every", 2, "--log-every", 1, *RICH, "-o"]
    run(*arguments, tmp_path / "whole", folder=tmp_path)
    killed = kill_and_resume([*arguments, tmp_path / "run"], tmp_path, kills, seed=kills)
    assert len(killed) == kills
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")
    timeless = [metrics_of(tmp_path / name) for name in ("run", "whole")]
    for row in (*timeless[0], *timeless[1]):
        del row["seconds"], row["images_per_second"]
    assert timeless[0] == timeless[1]
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.slow
def test_two_processes_follow_the_losses_of_one(images: Path, tmp_path: Path) -> None:
    vit = make_converted(tmp_path / "vit", "test_vit", img_size=32)
    arguments = ["finetune", vit, "--data", images, "--max-train", 36, "--epochs", 17, "--batch-size", 12]
    for processes in (1, 2):
        out, _ = run(*arguments, "--log-every", 1, "-o", f"by{processes}", processes=processes, folder=tmp_path)
        assert out.count("On 2 processes.") == processes - 1
    one, two = (metrics_of(tmp_path / name) for name in ("by1", "by2"))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    steps = [k for k, row in enumerate(one) if not row["val_nll"]]
    assert len(steps) == 51  # 6 images for each process, which is no multiple of 4 members
    for name in ("train_loss", "train_accuracy"):
        assert [float(two[k][name]) for k in steps] == pytest.approx([float(one[k][name]) for k in steps], abs=1e-4)
    assert float(two[-1]["val_nll"]) == pytest.approx(float(one[-1]["val_nll"]), abs=1e-4)
    assert float(one[-1]["train_loss"]) < float(one[0]["train_loss"]) - 0.05  # it learns: the curve is one


def begin(
    arguments: list[object], folder: Path, steps: int = 3, processes: int = 1, **more: Any
) -> subprocess.Popen[str]:
    """A run that has done so many steps, in a process of its own."""
    process = subprocess.Popen(
        command(*arguments, processes=processes), env=environment(), cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip
    marker = folder / "run" / "metrics.csv"
    while process.poll() is None and (not marker.exists() or len(metrics_of(folder / "run")) < steps):
        time.sleep(0.005)
    return process


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(images: Path, converted: Path, tmp_path: Path) -> None:
    arguments = ["finetune", converted, "--data", images, "--epochs", 8, "--batch-size", 8, "--log-every", 1, *RICH]
    run(*arguments, "-o", "whole", folder=tmp_path)
    process = begin([*arguments, "-o", "run"], tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    line = errors.strip().splitlines()[-1]
    assert line.startswith("masksurgery: stopped: SIGINT: stopped after step ") and "Go on with: masksurgery " in line
    again = line.partition("Go on with: masksurgery ")[2]
    assert again.endswith("--resume")
    out, _ = run(*shlex.split(again), folder=tmp_path)
    assert out.startswith("Going on after step ")
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_vanished_folder_stops_and_the_last_state_is_kept(converted: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    arguments = ["finetune", converted, "--data", "images", "-o", "run", "--epochs", 200, "--batch-size", 8]
    process = begin([*arguments, "--log-every", 1, "--checkpoint-every", 2], tmp_path)
    shutil.move(tmp_path / "images", tmp_path / "elsewhere")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "is gone or empty, with the " in errors.strip().splitlines()[-1]
    state = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert state["step"] >= 2
    _, errors = run(*arguments, "--resume", folder=tmp_path, status=2)
    assert errors.startswith("masksurgery: error: ") and "images" in errors
    shutil.move(tmp_path / "elsewhere", tmp_path / "images")
    process = begin([*arguments, "--resume"], tmp_path, steps=state["step"] + 2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 130 and out.startswith("Going on after step ")


def limit_files() -> None:
    """As if the disk had room for a model, but not for the state beside it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))


@pytest.mark.slow
def test_a_state_that_finds_no_room_leaves_the_one_before(images: Path, converted: Path, tmp_path: Path) -> None:
    arguments = ["finetune", converted, "--data", images, "--epochs", 3, "--batch-size", 8, "--log-every", 1, "-o"]
    run(*arguments, "whole", folder=tmp_path)
    process = begin([*arguments, "run"], tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.communicate() and process.returncode == 130
    before = (tmp_path / "run" / "resume.pt").read_bytes()
    full = subprocess.run(
        command(*arguments, "run", "--resume"), env=environment(), cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=limit_files,
    )  # fmt: skip
    check_full(full, tmp_path / "run")
    assert (tmp_path / "run" / "resume.pt").read_bytes() == before
    run(*arguments, "run", "--resume", folder=tmp_path)
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_state(images: Path, converted: Path, tmp_path: Path) -> None:
    arguments = ["finetune", converted, "--data", images, "--epochs", 3, "--batch-size", 8, "-o"]
    run(*arguments, "whole", folder=tmp_path)
    disk, files = tmp_path / "disk", (tmp_path / "whole").rglob("*")
    disk.mkdir()
    size = sum(file.stat().st_size for file in files if file.is_file()) + 2_000_000  # no room for a second state
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root mounts a file system; the test above has a quota instead")
    try:
        full = subprocess.run(
            command(*arguments, disk / "run"), env=environment(), cwd=tmp_path, capture_output=True, text=True
        )
        check_full(full, disk / "run")
        assert torch.load(disk / "run" / "resume.pt", weights_only=True)["step"] == 6
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        run(*arguments, disk / "run", "--resume", folder=tmp_path)
        assert tensors_of(disk / "run") == tensors_of(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def check_full(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    """It has ended with one line that says so, and left no half file."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "resume.pt: cannot be written" in done.stderr.strip().splitlines()[-1]
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_signal_to_the_whole_group_saves(images: Path, converted: Path, tmp_path: Path) -> None:
    """As batch systems send it: to the run and to the processes that read images for it."""
    arguments = ["finetune", converted, "--data", images, "--epochs", 200, "--batch-size", 8, "-o", "run"]
    arguments += ["--workers", 2, "--log-every", 1]
    state = tmp_path / "run" / "resume.pt"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        before = torch.load(state, weights_only=True)["step"] if state.exists() else 0
        process = begin([*arguments, "--resume"], tmp_path, steps=before + 3, start_new_session=True)
        os.killpg(process.pid, number)
        _, errors = process.communicate()
        assert process.returncode == 130, errors
        assert f"{signal.Signals(number).name}: stopped" in errors and "Traceback" not in errors
        assert torch.load(state, weights_only=True)["step"] > before


@pytest.mark.slow
def test_two_killed_processes_go_on(images: Path, tmp_path: Path) -> None:
    vit = make_converted(tmp_path / "vit", "test_vit", img_size=32)
    arguments = ["finetune", vit, "--data", images, "--epochs", 4, "--batch-size", 8, "--checkpoint-every", 2]
    arguments += ["--log-every", 1, "--ema-decay", 0.9, "--mixup", 0.4, "-o"]
    run(*arguments, "whole", processes=2, folder=tmp_path)
    process = begin([*arguments, "run"], tmp_path, steps=5, processes=2, start_new_session=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    out, _ = run(*arguments, "run", "--resume", processes=2, folder=tmp_path)
    assert "On 2 processes." in out and "Going on after step " in out
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")
