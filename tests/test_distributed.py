"""Several ranks on gloo: the same batches, gradients, scores and files as one."""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastat.config.run import TrainConfig, resolve
from fastat.data.loader import PackedSource
from fastat.evaluation.evaluate import evaluate_checkpoint
from fastat.models.sync_batchnorm import CpuSyncBatchNorm
from fastat.system.display import StatusDisplay
from fastat.system.distributed import ALONE, Ranks
from fastat.system.errors import Failure, RankZeroFailed, UserError
from fastat.training import optim
from fastat.training import step as stepping
from fastat.training.trainer import Trainer, train
from tests.conftest import QUIET, SMALL_MODELS, TINY_MODEL, TinySets
from tests.ranks import free_port, run_ranks
from tests.test_train import assert_same_run, metrics


def config_of(sets: TinySets, model: str = "cnn_trans", **overrides: Any) -> TrainConfig:
    """Three epochs of four steps of eight clips, in float32, every rank's BatchNorm one."""
    options: dict[str, Any] = {
        "data": str(sets.train), "eval": str(sets.eval), "batch": 8, "epochs": 3,
        "precision": "fp32", "sync_batchnorm": True, "rank_timeout": 100.0,
        "model_options": SMALL_MODELS[model],
    }  # fmt: skip
    return resolve("A4", model, options | overrides, num_clips=36, clip_seconds=1.0)


def without_dropout(sets: TinySets, model: str, **overrides: Any) -> TrainConfig:
    config = config_of(sets, model, **overrides)
    options = {k: 0.0 if k == "dropout" else v for k, v in config.model_options.items()}
    return replace(config, model_options=options)


def trainer(
    config: TrainConfig, run: Path, ranks: Ranks = ALONE, *, resume: bool = False
) -> Trainer:
    return Trainer(config, run, StatusDisplay(), resume=resume, ranks=ranks)


ROUNDING = {"resnet50": 0.3}
"""Of gradients, by float32: a fresh ResNet on 40 frames normalises nearly constant maps, and one
rank alone differs by up to 5 % of the largest from float64, in which one and two agree to 1e-7."""


class Taken(Exception):
    """The first step has its gradients."""


def first_step(ranks: Ranks, config: TrainConfig, run: Path) -> dict[str, Any]:
    """Batch, loss and gradients of a run's first step, which is not taken."""
    t = trainer(config, run, ranks)
    seen: dict[str, Any] = {}
    batches = t.data.source.batches

    def kept(plans: Any) -> Any:
        for batch in batches(plans):
            seen.setdefault("rows", batch.rows.tolist())
            seen.setdefault("target", batch.target.tolist())
            yield batch

    def stop(*_: object) -> None:
        seen["grads"] = {n: p.grad for n, p in t.raw_model.named_parameters() if p.grad is not None}
        seen["buffers"] = {n: b.clone() for n, b in t.raw_model.named_buffers()}
        raise Taken

    t.data.source.batches = kept  # type: ignore[method-assign]
    t.optimizer.register_step_pre_hook(stop)
    with pytest.raises(Taken):
        t.run_epochs()
    # By way of numpy: torch would share its tensors' memory, and this process ends.
    return {
        k: {n: x.numpy() for n, x in v.items()} if k in ("grads", "buffers") else v
        for k, v in seen.items()
    }


@pytest.mark.parametrize(
    ("model", "num_ranks", "options"),
    [
        ("cnn_trans", 1, {}),
        ("cnn_trans", 2, {}),
        ("cnn_trans", 4, {}),
        ("transformer", 2, {}),
        ("cnn_trans", 2, {"accumulate": 2, "sync_batchnorm": False, "freeze": ["talnet.*"]}),
        *(
            pytest.param(model, ranks, {}, marks=pytest.mark.full)
            for model in ("ast", "transformer", "conformer", "resnet50", "crnn")
            for ranks in (2, 4)
        ),
    ],
)
def test_the_first_step_is_that_of_one_rank(
    tiny_sets: TinySets, tmp_path: Path, model: str, num_ranks: int, options: dict[str, Any]
) -> None:
    """The same clips and labels, and gradients equal to float32 rounding."""
    config = without_dropout(tiny_sets, model, **options)
    whole = first_step(ALONE, config, tmp_path / "one")
    largest = max(np.abs(grad).max() for grad in whole["grads"].values())
    parts = run_ranks(num_ranks, first_step, config, tmp_path / "many")
    assert sum((part["rows"] for part in parts), []) == whole["rows"]
    assert sum((part["target"] for part in parts), []) == whole["target"]
    for part in parts:
        assert part["grads"].keys() == whole["grads"].keys()
        for name, grad in whole["grads"].items():
            # Biases before a BatchNorm have no gradient, only rounding: hence the floor.
            bar = ROUNDING.get(model, 2e-4) * np.abs(grad).max() + 2e-5 * largest
            assert np.abs(part["grads"][name] - grad).max() <= bar, name
        for name, buffer in whole["buffers"].items():
            np.testing.assert_allclose(part["buffers"][name], buffer, rtol=1e-4, atol=1e-5)


def bfloat16_step(ranks: Ranks, config: TrainConfig, run: Path) -> tuple[Any, Any]:
    exact = first_step(ranks, config, run / "a")["grads"]
    return exact, first_step(ranks, replace(config, gradient_dtype="bfloat16"), run / "b")["grads"]


def test_gradients_may_be_exchanged_in_bfloat16(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = without_dropout(tiny_sets, "cnn_trans")
    (exact, rounded), (_, others) = run_ranks(2, bfloat16_step, config, tmp_path)
    for name, grad in exact.items():
        assert np.array_equal(rounded[name], others[name]), name
        assert np.abs(rounded[name] - grad).max() <= 0.01 * np.abs(grad).max() + 2e-6, name
    assert any(not np.array_equal(rounded[name], exact[name]) for name in exact)


def synchronised_norm(ranks: Ranks, x: Tensor) -> list[Any]:
    """Two steps of a BatchNorm on this rank's part of x: outputs, gradients, statistics."""
    bn = nn.BatchNorm2d(3)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
    if ranks.device_group is not None:
        bn = CpuSyncBatchNorm(bn, ranks.device_group)  # type: ignore[assignment]
    part = x.chunk(ranks.size)[ranks.rank].clone().requires_grad_()
    for _ in range(2):
        out = bn(part)
        (out * torch.arange(out[0].numel()).view(out[0].shape)).sum().backward()
    bn.eval()
    tensors = (out, part.grad, bn.weight.grad, bn.running_mean, bn.running_var, bn(part))
    return [x.detach().numpy() for x in tensors if x is not None]


def test_batchnorm_over_ranks_is_that_of_the_whole_batch() -> None:
    x = torch.randn(4, 3, 5, 2) * torch.tensor([1.0, 5, 0.1]).view(3, 1, 1) + 3
    out, dx, dweight, mean, var, evaluated = synchronised_norm(ALONE, x)
    first, second = run_ranks(2, synchronised_norm, x)
    for i, whole in ((0, out), (1, dx), (5, evaluated)):
        np.testing.assert_allclose(
            np.concatenate([first[i], second[i]]), whole, rtol=1e-3, atol=1e-4
        )
    np.testing.assert_allclose(first[2] + second[2], dweight, rtol=1e-3, atol=1e-3)
    for part in (first, second):
        np.testing.assert_allclose(part[3], mean, rtol=1e-5)
        np.testing.assert_allclose(part[4], var, rtol=1e-5)


# ------------------------------------------------------------------------------------- evaluation
def scores(ranks: Ranks, config: TrainConfig, run: Path, rows: list[int]) -> tuple[Any, ...]:
    t = trainer(config, run, ranks)
    t.data.eval_rows = np.array(rows)
    result = t._evaluate()
    assert result is not None
    return result.rows.tolist(), result.logits, result.targets, result.metrics.mAP


@pytest.mark.parametrize(("num_ranks", "num_clips"), [(2, 15), (4, 15), (4, 3)])
def test_evaluation_takes_every_clip_once(
    tiny_sets: TinySets, tmp_path: Path, num_ranks: int, num_clips: int
) -> None:
    """However unequal the ranks' parts, empty ones included."""
    config = config_of(tiny_sets, eval_batch=2)
    rows = list(range(num_clips))
    whole = scores(ALONE, config, tmp_path / "one", rows)
    for part in run_ranks(num_ranks, scores, config, tmp_path / "many", rows):
        assert part[0] == whole[0]
        np.testing.assert_allclose(part[1], whole[1], atol=1e-5)
        assert np.array_equal(part[2], whole[2])
        assert part[3] == pytest.approx(whole[3], abs=1e-9)


# ------------------------------------------------------------------------------------- whole runs
def whole(ranks: Ranks, config: TrainConfig, run: Path, resume: bool = False) -> str:
    """A run whose ranks but the first have a run folder of their own; what this rank logged."""
    log, messages = logging.getLogger("fastat"), StringIO()
    log.handlers = [logging.StreamHandler(messages)]
    log.setLevel("INFO")
    t = trainer(config, run if ranks.first else run / "of another rank", ranks, resume=resume)
    t.run_epochs()
    return messages.getvalue()


@pytest.fixture(scope="module")
def two_ranks(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs, undisturbed, on two ranks, with dropout."""
    run = tmp_path_factory.mktemp("two") / "run"
    run_ranks(2, whole, config_of(tiny_sets), run)
    return run


def test_only_rank_0_writes(two_ranks: Path) -> None:
    assert [line["epoch"] for line in metrics(two_ranks)] == [1, 2, 3]
    assert not (two_ranks / "of another rank").exists()
    assert len(list((two_ranks / "tb").iterdir())) == 1


def test_the_loss_is_that_of_all_ranks(
    two_ranks: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    config = without_dropout(tiny_sets, "cnn_trans", epochs=1)
    whole(ALONE, config, tmp_path / "one")
    run_ranks(2, whole, config, tmp_path / "two")
    (one,), (two,) = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for key in ("train_loss", "eval_loss"):
        # Adam makes whole steps of biases whose gradient is only rounding.
        assert two[key] == pytest.approx(one[key], rel=3e-3)


def test_the_scores_are_those_of_the_checkpoint(tiny_sets: TinySets, tmp_path: Path) -> None:
    """Also where every rank normalises by its own part of the batch."""
    run_ranks(2, whole, config_of(tiny_sets, sync_batchnorm=False), tmp_path)
    best = max(metrics(tmp_path), key=lambda line: line["mAP"])
    options: dict[str, Any] = {"predictions": None, "per_class": None}
    again = evaluate_checkpoint(tmp_path, tiny_sets.eval, batch=64, precision="fp32", **options)
    assert again["eval_loss"] == pytest.approx(best["eval_loss"], abs=1e-6)
    assert again["mAP"] == pytest.approx(best["mAP"], abs=1e-9)


def with_a_bad_step(ranks: Ranks, config: TrainConfig, run: Path) -> list[int]:
    """A run whose sixth step is not finite whenever it is taken; the steps left out."""
    t = trainer(config, run, ranks)
    real = optim.train_step

    def step(*args: Any) -> Any:
        loss, norm, flag = real(*args)
        return loss, norm, flag + (t.progress.step == 5 and not t.progress.skipped)

    vars(stepping)["train_step"] = step  # of this process, which ends
    t.run_epochs()
    return t.progress.skipped


def test_two_ranks_skip_the_same_step(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = config_of(tiny_sets, on_nan="skip", checkpoint_every_steps=2)
    assert run_ranks(2, with_a_bad_step, config, tmp_path) == [[5], [5]]
    assert [line["epoch"] for line in metrics(tmp_path)] == [1, 2, 3]


def with_an_overflow(ranks: Ranks, config: TrainConfig, run: Path) -> tuple[list[int], Any]:
    """A run in half precision whose sixth step overflows on the second rank alone."""
    t = trainer(config, run, ranks)
    scale = t.step.loss_scale
    assert scale is not None
    scale.scale.fill_(64)
    if not ranks.first:
        last = t.network.params[-1]
        last.register_hook(lambda grad: grad * (torch.inf if t.progress.step == 5 else 1))
    t.run_epochs()
    return t.progress.skipped, (scale.scale.item(), scale.good.item())


def test_an_overflow_on_one_rank_is_one_on_all(tiny_sets: TinySets, tmp_path: Path) -> None:
    """No rank takes the step, and both scales are halved."""
    config = config_of(tiny_sets, precision="fp16")
    assert run_ranks(2, with_an_overflow, config, tmp_path) == [([], (32, 6))] * 2
    assert [line["overflows"] for line in metrics(tmp_path)] == [0, 1, 0]


@pytest.mark.parametrize("steps", [3, 8])
def test_two_ranks_resume_bit_for_bit(
    two_ranks: Path, tiny_sets: TinySets, tmp_path: Path, steps: int
) -> None:
    config = config_of(tiny_sets)
    run_ranks(2, whole, replace(config, steps=steps), tmp_path / "run")
    run_ranks(2, whole, config, tmp_path / "run", True)
    assert_same_run(tmp_path / "run", two_ranks)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_the_number_of_ranks_may_change_on_resume(
    tiny_sets: TinySets, tmp_path: Path, before: int, after: int
) -> None:
    config = config_of(tiny_sets)
    run_ranks(before, whole, replace(config, steps=4), tmp_path / "run")
    messages = run_ranks(after, whole, config, tmp_path / "run", True)
    assert f"had {before} ranks and has {after} now" in messages[0]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [4, 8, 12]


def compiled_step(ranks: Ranks, config: TrainConfig, run: Path) -> dict[str, Any]:
    """A first step under torch.compile without a compiler: its graphs, computed eagerly."""
    compile_of = torch.compile
    torch.compile = lambda model, **_: compile_of(model, backend="aot_eager")  # type: ignore[assignment]
    return first_step(ranks, replace(config, compile=True), run)


@pytest.mark.full
@pytest.mark.parametrize("model", ["cnn_trans", "ast", "crnn"])
def test_compiled_ranks_have_the_same_gradients(
    tiny_sets: TinySets, tmp_path: Path, model: str
) -> None:
    config = without_dropout(tiny_sets, model, sync_batchnorm=False)
    eager = run_ranks(2, first_step, config, tmp_path / "a")[0]["grads"]
    compiled = run_ranks(2, compiled_step, config, tmp_path / "b")[0]["grads"]
    for name, grad in eager.items():
        bar = 2e-4 * np.abs(grad).max() + 2e-6
        assert np.abs(compiled[name] - grad).max() <= bar, name


# ----------------------------------------------------------------------------------------- faults
def error_of(ranks: Ranks, config: TrainConfig, run: Path) -> str:
    try:
        train(config, run, resume=False, ranks=ranks)
    except (UserError, Failure, RankZeroFailed) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_batch_that_ranks_cannot_share(tiny_sets: TinySets, tmp_path: Path) -> None:
    first, second = run_ranks(2, error_of, config_of(tiny_sets, batch=9), tmp_path / "run")
    assert first.startswith("UserError: batch must be a multiple of ranks x accumulate: got")
    assert second == "RankZeroFailed: 2"
    assert not (tmp_path / "run").exists()


def damaged_on_both(ranks: Ranks, config: TrainConfig, run: Path) -> str:
    """Each rank finds a row of its own damaged."""
    t = trainer(config, run, ranks)
    assert isinstance(t.data.source, PackedSource)
    t.data.source.bad[ranks.rank] = "its checksum differs"
    try:
        t.run_epochs()
    except Failure as error:
        return str(error)
    except RankZeroFailed as error:
        return f"exit code {error.exit_code}"
    return "trained"


def test_damaged_clips_of_all_ranks_count(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = config_of(tiny_sets, epochs=1, max_bad=1.5 / 36)
    first, second = run_ranks(2, damaged_on_both, config, tmp_path / "run")
    assert "2 of 36 clips are damaged, more than --max-bad" in first
    assert second == "exit code 1"


def with_other_data(ranks: Ranks, config: TrainConfig, run: Path, other: str) -> str:
    return error_of(ranks, replace(config, data=other) if ranks.rank else config, run)


def test_hosts_that_hold_different_sets(tiny_sets: TinySets, tmp_path: Path) -> None:
    args = (config_of(tiny_sets), tmp_path / "run", str(tiny_sets.eval))
    for error in run_ranks(2, with_other_data, *args):
        assert error.startswith("UserError: ") and "not the same set on every host" in error


def frozen_rank(ranks: Ranks, config: TrainConfig, run: Path) -> str:
    if ranks.rank:
        steps = []

        def freeze(*_: object) -> None:
            steps.append(1)
            if len(steps) == 3:
                time.sleep(8)

        t = trainer(config, run, ranks)
        t.raw_model.register_forward_pre_hook(freeze)
        with pytest.raises(RuntimeError):
            t.run_epochs()
        return ""
    return error_of(ranks, config, run)


def test_a_rank_that_hangs_is_given_up(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = config_of(tiny_sets, rank_timeout=4.0, sync_batchnorm=False)
    error = run_ranks(2, frozen_rank, config, tmp_path / "run")[0]
    assert error.startswith("Failure: another rank did not answer in time (rank_timeout)")


def slow_work(ranks: Ranks) -> list[int]:
    """One rank works for longer than ranks wait in a step, in each exchange that allows it."""
    ranks = ranks.with_timeout(1)

    def slow() -> int:
        time.sleep(2)
        return 7

    found = [ranks.from_first(slow)]
    with ranks.first_goes_ahead():
        time.sleep(2 if ranks.first else 0)
    for late in range(ranks.size):
        time.sleep(2 if ranks.rank == late else 0)
        found += ranks.gather(ranks.rank, patient=True)
    return found


def test_ranks_wait_for_work_that_is_no_step() -> None:
    assert run_ranks(2, slow_work) == [[7, 0, 1, 0, 1]] * 2


def first_fails(ranks: Ranks) -> str:
    def make() -> str:
        raise UserError("no")

    try:
        return ranks.from_first(make)
    except UserError:
        return "says why"
    except RankZeroFailed:
        return "leaves in silence"


def test_what_rank_0_cannot_make_is_said_once() -> None:
    assert run_ranks(3, first_fails)[0] == "says why"


# ------------------------------------------------------------------------------- real commands
def torchrun(
    sets: TinySets, out: Path, *more: object, nproc: int = 2, restarts: int = 0
) -> list[str]:
    agent = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    sizes = ("--nproc-per-node", nproc, "--max-restarts", restarts, "-m", "fastat.cli", "train")
    run = ("--proc", "A4", "--model", "cnn_trans", *TINY_MODEL, "--data", sets.train)
    settings = (
        "--eval",
        sets.eval,
        "--out",
        out,
        "--epochs",
        3,
        "--batch",
        8,
        "--precision",
        "fp32",
    )
    batchnorm = ("--set", "sync_batchnorm=true")
    return [str(x) for x in (*agent, *sizes, *run, *settings, *batchnorm, *more)]


def ranks_of(agent: int) -> list[int]:
    """The processes that an agent started."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [pid for pid in map(int, children) if b"fastat.cli" in _command(pid)]


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    link, deadline = run / "checkpoints" / "last", time.monotonic() + 120
    while not (link.is_symlink() and int(link.readlink().name.removeprefix("step-")) >= step):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_a_killed_rank_is_started_again_and_the_run_ends_the_same(
    two_ranks: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = torchrun(tiny_sets, out, "--set", "checkpoint_every_steps=1", restarts=1)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | QUIET)
    wait_for(out, 2, process)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "resuming" in stderr
    assert_same_run(out, two_ranks)


def test_sigterm_saves_and_leaves_and_gpus_starts_the_ranks(
    two_ranks: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    """--gpus on a machine that claims two, whose ranks find none and train on the processor."""
    out = tmp_path / "run"
    arguments = torchrun(tiny_sets, out, "--set", "checkpoint_every_steps=1")
    arguments = [*arguments[arguments.index("train") :], "--gpus", "2"]
    program = (
        "import torch; torch.cuda.device_count = lambda: 2; from fastat.cli.app import main; main()"
    )
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | QUIET)
    wait_for(out, 2, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert stderr.count(f"go on with: fastat train --resume --out {out}") == 1
    assert "Traceback" not in stderr
    run_ranks(2, whole, config_of(tiny_sets), out, True)
    assert_same_run(out, two_ranks)


def test_mistakes_are_said_once_by_all_ranks(tiny_sets: TinySets, tmp_path: Path) -> None:
    command = torchrun(tiny_sets, tmp_path / "run", "--set", "model.embeding=64")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastat")]
    assert len([line for line in lines if "did you mean 'embedding'" in line]) == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gpus", [2, 0])
def test_gpus_that_are_not_there(
    gpus: int, tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastat.system.torchrun import run_ranks as start

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match="1 to 2, the GPUs" if gpus else "no GPU; without --gpus"):
        start(4, [])


@pytest.fixture
def two_hosts() -> Any:
    """Two network namespaces joined by a cable; each command's prefix."""
    names = [f"fastat-{os.getpid()}-{i}" for i in range(2)]
    setup = [
        *(f"ip netns add {n}" for n in names),
        f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}",
        *(f"ip -n {n} addr add 10.99.99.{i}/24 dev veth0" for i, n in enumerate(names, 1)),
        *(f"ip -n {n} link set {dev} up" for n in names for dev in ("veth0", "lo")),
    ]
    try:
        for line in setup:
            try:
                subprocess.run(line.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces: {getattr(error, 'stderr', '') or error}")
        yield [f"ip netns exec {n}".split() for n in names]
    finally:
        for n in names:
            subprocess.run(["ip", "netns", "del", n], capture_output=True, check=False)


def test_two_hosts_train_as_two_ranks(
    two_ranks: Path, tiny_sets: TinySets, tmp_path: Path, two_hosts: list[list[str]]
) -> None:
    endpoint = ("--rdzv-endpoint", f"10.99.99.1:{free_port()}", "--rdzv-id", "test")
    rendezvous = ("--rdzv-backend", "c10d", *endpoint)
    hosts = []
    for i, host in enumerate(two_hosts, 1):
        command = torchrun(tiny_sets, tmp_path / "run", nproc=1)
        place = command.index("--standalone")
        address = ("--local-addr", f"10.99.99.{i}", "--rdzv-conf", f"is_host={int(i == 1)}")
        command[place : place + 1] = ("--nnodes", "2", *rendezvous, *address)
        env = os.environ | QUIET | {"GLOO_SOCKET_IFNAME": "veth0"}
        hosts.append(
            subprocess.Popen([*host, *command], stderr=subprocess.PIPE, text=True, env=env)
        )
    for process in hosts:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert_same_run(tmp_path / "run", two_ranks)
