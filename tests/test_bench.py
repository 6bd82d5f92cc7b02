"""Measurements side by side: their statistics by hand, their turns, and memory that is known beforehand."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from masksurgery import bench, memory
from masksurgery.bench import Bench, Measurement, count_parameters, measure, paired_ratio, take_turns
from masksurgery.memory import cpu_peaks, weight_bytes
from masksurgery.types import ConfigError
from masksurgery.variants import Conditions, Variant

MIB = 2**20
ONE = Conditions(threads=1)


def vectors(samples: int) -> dict[str, Any]:
    return {"args": [{"shape": [samples, 8], "dtype": "float32"}], "kwargs": {}}


class Slow(nn.Linear):
    """Takes so many seconds, or more."""

    def __init__(self, seconds: float) -> None:
        super().__init__(8, 4)
        self.pause = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.pause)
        return super().forward(x)


class Hungry(nn.Module):
    """Needs a MiB for each sample at its peak, and returns next to nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), MIB // 4).sum(1)


def killed() -> nn.Module:
    os.kill(os.getpid(), signal.SIGKILL)
    return nn.Identity()


def slow(*pauses: float, again: Callable[[], nn.Module] | None = None) -> list[Variant]:
    names = ("base", "repeat", "packed")
    return [Variant(name, Slow(pause), vectors, again) for name, pause in zip(names, pauses, strict=False)]


# --- time ------------------------------------------------------------------------------------------------------------


def test_calls_take_turns_and_another_one_begins_each_round() -> None:
    made: list[str] = []
    told: list[int] = []
    seconds = take_turns([partial(made.append, name) for name in "abc"], 4, told.append)
    assert "".join(made) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"  # warm-up, then each twice in a row
    assert [len(times) for times in seconds] == [4, 4, 4]
    assert told == [1, 2, 3, 4]


def test_only_the_second_call_of_a_turn_is_timed() -> None:
    pauses = iter([0, 0] + [0.03, 0] * 4)
    (seconds,) = take_turns([lambda: time.sleep(next(pauses))], 4)
    assert max(seconds) < 0.03


def test_ratio_is_of_pairs() -> None:
    # The second round met a busy moment: medians alone would say 6 / 2.
    assert paired_ratio([2.0, 60.0, 6.0], [1.0, 20.0, 2.0]) == 3.0


def test_figures_of_a_measurement_by_hand() -> None:
    found = Measurement("packed", 8, (4.0, 1.0, 3.0, 2.0), 5 * MIB, 3 * MIB, 100, 10)
    assert (found.latency, found.spread, found.per_second, found.memory) == (2.5, 1.5, 3.2, 8 * MIB)
    assert replace(found, peak=None).memory is None


def test_models_are_measured_side_by_side() -> None:
    before = torch.get_num_threads()
    told: list[tuple[str, int, int | None]] = []
    found = measure(slow(0.002, 0.02), [1, 3], ONE, repeats=4, observer=lambda *what: told.append(what))
    assert torch.get_num_threads() == before
    assert [(m.variant, m.batch) for m in found.measurements] == [
        ("base", 1), ("repeat", 1), ("base", 3), ("repeat", 3)
    ]  # fmt: skip
    for m in found.measurements:
        assert (m.macs, m.parameters, m.weights, m.peak) == (32, 36, 4 * 36, None)
        assert len(m.seconds) == 4
    repeat = found.find("repeat", 3)
    assert repeat is not None and repeat.latency >= 0.02
    ratio = found.ratio(repeat)
    assert ratio is not None and 2 < ratio <= 11
    assert found.ratio(repeat, "repeat") == 1
    assert found.ratio(repeat, "late") is None and found.find("late", 3) is None
    assert ("batches of 3", 4, 4) in told and ("counting the MACs of base", 0, None) in told


def test_threads_are_set_and_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fail(*args: Any) -> None:
        seen.append(torch.get_num_threads())
        raise KeyError

    monkeypatch.setattr(bench, "take_turns", fail)
    with pytest.raises(KeyError):
        measure(slow(0.0), [1], Conditions(threads=2))
    assert seen == [2] and torch.get_num_threads() == 1


def test_json_has_every_figure(tmp_path: Path) -> None:
    rows = (
        Measurement("base", 2, (0.001,) * 4, MIB, 2 * MIB, 100, 10),
        Measurement("packed", 2, (0.001, 0.002, 0.003, 0.004), None, MIB, 150, 20),
    )
    made = Bench(
        rows, Conditions(2, channels_last=True), {"packed": {"layout": "grouped"}}, {"cpus": 2}, {"torch": "2"}
    )
    made.write_json(tmp_path / "bench.json", directory="dir")
    found = json.loads((tmp_path / "bench.json").read_text())
    base, packed = found.pop("measurements")
    assert found == {
        "directory": "dir", "conditions": {"threads": 2, "device": "cpu", "channels_last": True},
        "details": {"packed": {"layout": "grouped"}}, "machine": {"cpus": 2}, "versions": {"torch": "2"},
    }  # fmt: skip
    assert base == {
        "variant": "base", "batch": 2, "latency_ms": 1.0, "iqr_ms": 0.0, "images_per_second": 2000.0,
        "ratio_to_base": 1.0, "peak_memory_mib": 3.0, "forward_memory_mib": 1.0, "weights_mib": 2.0, "macs": 100,
        "parameters": 10, "seconds": [0.001] * 4,
    }  # fmt: skip
    assert (packed["latency_ms"], packed["iqr_ms"], packed["ratio_to_base"]) == pytest.approx((2.5, 1.5, 2.5))
    assert packed["peak_memory_mib"] is None and packed["forward_memory_mib"] is None


def test_machine_and_versions_are_told() -> None:
    found = measure(slow(0.0), [1], ONE, repeats=4)
    assert found.machine["cpus"] == os.cpu_count() and found.machine["cpu"]
    assert found.versions["torch"] == torch.__version__.split("+")[0]
    assert re.fullmatch(r"3\.\d+\.\d+\S*", found.versions["python"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": []}, r"variants=\[\] is empty or has something twice"),
        ({"variants": [*slow(0.0), *slow(0.0)]}, r"variants=\['base', 'base'\] is empty or has something twice"),
        ({"batches": [8, 8]}, r"batches=\[8, 8\] is empty or has something twice. Pass each of them once"),
        ({"batches": [1, 0]}, r"batch=0 is too small. Pass at least 1"),
        ({"repeats": 3}, r"repeats=3 is too small. Pass at least 4"),
    ],
)
def test_what_cannot_be_measured(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"variants": slow(0.0), "batches": [1], "conditions": ONE, **change}
    with pytest.raises(ConfigError, match=message):
        measure(**arguments)


def test_conditions_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"threads=0 is too small. Pass at least 1"):
        Conditions(0)
    with pytest.raises(ConfigError, match=r"device='abacus' cannot be used: .*Pass 'cpu'"):
        Conditions(1, "abacus")


def test_channels_last_reaches_weights_and_images() -> None:
    conditions = Conditions(1, channels_last=True)
    model = conditions.prepare(nn.Conv2d(4, 8, 3).train())
    description = {"args": [{"shape": [2, 4, 5, 5], "dtype": "float32"}], "kwargs": {"t": vectors(1)["args"][0]}}
    (image,), kwargs = conditions.draw(description)
    assert not model.training
    assert model.weight.is_contiguous(memory_format=torch.channels_last) and not model.weight.is_contiguous()
    assert image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    assert torch.equal(image, ONE.draw(description)[0][0])
    assert kwargs["t"].shape == (1, 8)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_what_it_is_known_to_be() -> None:
    peaks = cpu_peaks(Hungry, [vectors(samples) for samples in (48, 8, 24)], ONE)
    if not os.access(memory.CLEAR_REFS, os.W_OK):
        assert peaks == [None] * 3
        return
    # What an earlier, larger forward has freed does not hide a later one.
    assert [peak / MIB for peak in peaks if peak is not None] == pytest.approx([48, 8, 24], abs=0.5)


def test_measure_asks_for_the_memory_of_what_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def peaks(make: Callable[[], nn.Module], inputs: list[Any], conditions: Conditions) -> list[int]:
        asked.append((make, inputs, conditions))
        return [10, 20]

    monkeypatch.setattr(bench, "cpu_peaks", peaks)
    found = measure([*slow(0.0, again=Hungry), Variant("late", Slow(0.0), vectors)], [1, 2], ONE, repeats=4)
    assert asked == [(Hungry, [vectors(1), vectors(2)], ONE)]
    assert [m.peak for m in found.measurements] == [10, None, 20, None]


def test_no_memory_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "none")
    monkeypatch.setattr(memory, "ProcessPoolExecutor", None)  # no process is started
    assert cpu_peaks(Hungry, [vectors(1), vectors(2)], ONE) == [None, None]


@pytest.mark.slow
@pytest.mark.skipif(not os.access(memory.CLEAR_REFS, os.W_OK), reason="memory cannot be measured on this system")
def test_no_memory_where_the_process_is_killed() -> None:
    assert cpu_peaks(killed, [vectors(1)], ONE) == [None]


@pytest.mark.parametrize(("seen", "right"), [(memory.KNOWN, True), (0, False), (2 * memory.KNOWN, False)])
def test_a_measurement_that_does_not_see_a_known_tensor_is_none(
    monkeypatch: pytest.MonkeyPatch, seen: int, right: bool
) -> None:
    monkeypatch.setattr(memory, "_peak_of", lambda run, trim: seen)
    assert memory._measures_right(lambda _: None) is right


def test_no_memory_where_the_peak_cannot_be_reset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path)  # cannot be written to, whatever its mode
    assert memory._measures_right(lambda _: None) is False


def test_peak_on_cuda_is_above_what_stood_before(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 30),
                        ("max_memory_allocated", 100)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, n=name, v=value: (done.append(n), v)[1])
    assert memory.cuda_peak(lambda: done.append("run"), "cuda:1") == 70
    assert done == ["synchronize", "reset_peak_memory_stats", "memory_allocated", "run", "synchronize",
                    "max_memory_allocated"]  # fmt: skip


def test_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    model[1].weight = model[0].weight
    assert count_parameters(model) == 64 + 2 * 8
    assert weight_bytes(model) == 4 * (64 + 4 * 8) + 8  # and the int64 that counts batches
