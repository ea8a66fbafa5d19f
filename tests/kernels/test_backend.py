"""Which operators run their kernels, and on what."""

import pytest
import torch

from fastat_kernels import backend
from fastat_kernels.attention import attention, attention_ref
from fastat_kernels.backend import assume_target, chosen_kernels, kernels, target, use_kernel
from fastat_kernels.choice import OPERATORS, WINNERS, parse_kernels


def test_choices_by_name() -> None:
    assert parse_kernels("auto") == WINNERS <= parse_kernels("all") == set(OPERATORS)
    assert parse_kernels("none") == frozenset()
    assert parse_kernels("attention, log_mel") == {"attention", "log_mel"}
    with pytest.raises(ValueError, match=r"bn_relu_pool.*'attention,flash'"):
        parse_kernels("attention,flash")


def test_kernels_run_on_cuda_only(device: torch.device) -> None:
    with kernels(OPERATORS):
        assert use_kernel("attention", torch.ones(1, device=device)) == (device.type == "cuda")
        assert chosen_kernels() == sorted(OPERATORS)
    assert not use_kernel("attention", torch.ones(1)) and chosen_kernels() == sorted(WINNERS)


def test_target_of_a_tensor_on_no_gpu() -> None:
    with assume_target(100):
        assert target(torch.ones(1)) == 100
    assert target(torch.empty(1, device="meta")) == 90


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_kernel_runs_on_the_gpu_of_its_tensors() -> None:
    with kernels(OPERATORS), torch.cuda.device(0):
        qkv = torch.randn(2, 9, 3, 2, 16, device="cuda:1")
        got = attention(qkv)
    torch.testing.assert_close(got, attention_ref(qkv), rtol=1e-2, atol=1e-2)


def test_operators_run_outside_autocast() -> None:
    """As when compiled: a product of float32 tensors in an operator is one of float32."""

    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    op = backend.operator("test_product", plain=product, kernel=product, fake=torch.empty_like)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert op(torch.ones(2, 2)).dtype == torch.float32
    finally:
        del backend.REGISTERED["test_product"]
