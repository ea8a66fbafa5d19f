"""Learning-rate factors: against torch's MultiStepLR, and warm-up."""

import pytest
import torch

from fastat.config.schedule import lr_factor, warmup_length


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7, 100])
def test_step_is_the_authors_multistep(steps_per_epoch: int) -> None:
    """Milestones 2, 3, ..., 10 and gamma 0.5 over ten epochs, stepped once an epoch."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(range(2, 11)), gamma=0.5)
    for epoch in range(10):
        for i in range(steps_per_epoch):
            ours = lr_factor(
                epoch * steps_per_epoch + i,
                schedule="step",
                warmup_steps=0,
                steps_per_epoch=steps_per_epoch,
                epochs=10,
            )
            assert ours == optimizer.param_groups[0]["lr"], (epoch, i)
        optimizer.step()
        theirs.step()


def factors(schedule: str, epochs: int, steps_per_epoch: int = 3) -> list[float]:
    """The factor of each epoch's first step."""
    return [
        lr_factor(
            epoch * steps_per_epoch,
            schedule=schedule,
            warmup_steps=0,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
        )
        for epoch in range(epochs)
    ]


def test_every_schedule_by_epoch() -> None:
    assert factors("step", 10) == [1, 1] + [0.5**n for n in range(1, 9)]
    assert factors("step2", 10) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625]
    assert factors("constant", 10) == [1] * 10


def test_a_shorter_run_is_the_start_of_ten_epochs() -> None:
    assert factors("step", 4) == factors("step", 10)[:4]


@pytest.mark.parametrize("epochs", [20, 30, 600])
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 49])
def test_a_longer_run_stretches_the_halvings(epochs: int, steps_per_epoch: int) -> None:
    stretched = factors("step", epochs, steps_per_epoch)
    assert stretched[:: epochs // 10] == factors("step", 10)
    assert sorted(stretched, reverse=True) == stretched
    assert len(set(stretched)) == 9


def test_warm_up_is_linear_per_step_and_multiplies() -> None:
    def factor(step: int, schedule: str = "constant") -> float:
        return lr_factor(step, schedule=schedule, warmup_steps=1000, steps_per_epoch=300, epochs=10)

    assert factor(0) == 1 / 1000
    assert factor(499) == 0.5
    assert factor(999) == factor(1000) == factor(2999) == 1.0
    assert factor(750, "step") == pytest.approx(0.751 * 0.5)


@pytest.mark.parametrize(
    ("total", "length"), [(10_000, 1000), (9_999, 999), (44_620, 1000), (750, 75), (9, 0), (0, 0)]
)
def test_warm_up_takes_at_most_a_tenth_of_the_run(total: int, length: int) -> None:
    assert warmup_length(1000, total) == length


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 100])
def test_cyclic_is_the_triangle_of_two_epochs(steps_per_epoch: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CyclicLR(
        optimizer,
        base_lr=0.1,
        max_lr=1.0,
        step_size_up=steps_per_epoch,
        mode="triangular",
        cycle_momentum=False,
    )
    rates = []
    for step in range(25 * steps_per_epoch):
        rates.append(
            lr_factor(
                step,
                schedule="cyclic",
                warmup_steps=0,
                steps_per_epoch=steps_per_epoch,
                epochs=25,
            )
        )
        assert rates[-1] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
        optimizer.step()
        theirs.step()
    assert rates[0] == pytest.approx(0.1) and rates[steps_per_epoch] == pytest.approx(1.0)


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'cosine'"):
        lr_factor(0, schedule="cosine", warmup_steps=0, steps_per_epoch=1, epochs=10)
