"""The benchmark of a training step: its statistics by hand, its turns, and its verdict."""

from __future__ import annotations

import statistics
from types import ModuleType

import pytest
import torch

from test_examples import load_example


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_example("benchmarks/step_cost")


@pytest.mark.parametrize(
    ("n", "rank"),
    [
        (6, 1),  # missed: 2 / 64 = 0.031
        (8, 1),  # 2 / 256 = 0.008, and without one more at each side 2 (1 + 8) / 256 = 0.070
        (9, 2),  # 2 (1 + 9) / 512 = 0.039
        (20, 6),  # 2 (1 + 20 + 190 + 1140 + 4845 + 15504) / 2**20 = 0.041, and next 0.115
    ],
)
def test_interval_of_the_median_by_hand(script: ModuleType, n: int, rank: int) -> None:
    values = [float(7 * k % n if n % 7 else k) for k in range(n)]  # 0 to n - 1 in some order
    assert sorted(values) == list(range(n))
    assert script.median_interval(values) == ((n - 1) / 2, rank - 1, n - rank)


@pytest.mark.parametrize("n", [1, 5])
def test_too_few_values_for_an_interval(script: ModuleType, n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} values are too few for a 95% interval of their median"):
        script.median_interval([1.0] * n)


def test_interval_holds_the_median_as_often_as_it_says(script: ModuleType) -> None:
    draws = torch.rand(2000, 20, generator=torch.Generator().manual_seed(0)).exp()  # skewed; the median is sqrt(e)
    intervals = [script.median_interval(row.tolist()) for row in draws]
    held = statistics.mean(low <= 1.6487 <= high for _, low, high in intervals)
    assert 0.945 < held < 0.972  # 0.959 expected, with a deviation of 0.0044


def test_steps_take_turns_and_the_warm_up_is_not_counted(script: ModuleType) -> None:
    turns: list[str] = []
    seconds = script.take_turns(lambda: turns.append("a"), lambda: turns.append("b"), 4)
    assert "".join(turns) == "baabba" + "abbaabba"
    assert [len(times) for times in seconds] == [4, 4]
    assert all(time > 0 for times in seconds for time in times)


def test_a_step_trains(script: ModuleType) -> None:
    model = torch.nn.Linear(2, 2).eval()
    x, y = torch.eye(2), torch.tensor([0, 1])
    before = [p.detach().clone() for p in model.parameters()]
    step = script.make_step(model, x, y)
    step()
    gradient = model.weight.grad.clone()
    assert model.training
    torch.testing.assert_close(model.weight.detach(), before[0] - 1e-3 * gradient)
    step()
    torch.testing.assert_close(model.weight.grad, gradient, rtol=0.02, atol=0)  # of one step, not of two added up


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "code"), [("1000", 0), ("0.001", 1)])
def test_table_and_verdict(script: ModuleType, capsys: pytest.CaptureFixture[str], limit: str, code: int) -> None:
    with torch.random.fork_rng(devices=[]):
        assert script.main(["--only", "test_vit", "--batch", "4", "--repeats", "6", "--limit", limit]) == code
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    row = next(line.split() for line in out.splitlines() if line.strip().startswith("test_vit"))
    base, converted, ratio, low, high = (float(row[i]) for i in (1, 3, 5, 6, 8))
    assert 0 < base < 10 and 0 < converted < 10 and low <= ratio <= high
    assert ("More than 0.001 times the base model: test_vit" in err) == (code == 1)


def test_repeats_that_have_no_interval(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--repeats", "5"])
    assert "--repeats: fewer than 6 pairs have no 95% interval" in capsys.readouterr().err
