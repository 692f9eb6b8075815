"""What a rank tells torch about its GPU, on fakes: there is none here."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from learner.ranks import Ranks, own_device


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is asked of torch. A device without an index is refused, as torch does with a GPU."""
    seen: dict[str, Any] = {}

    def set_device(device: torch.device) -> None:
        if device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        seen["device"] = device

    def init_process_group(backend: str, **options: Any) -> None:
        seen.update(options, backend=backend)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    return seen


def test_a_rank_takes_the_one_gpu_that_it_sees_and_both_backends(calls: dict[str, Any]) -> None:
    ranks = Ranks.join(3, 8, "tcp://host:1", own_device("cuda"), timeout=60.0)
    assert ranks.device == calls["device"] == torch.device("cuda", 0)
    assert calls["backend"] == "cpu:gloo,cuda:nccl" and calls["timeout"] == timedelta(seconds=60)
    assert (calls["rank"], calls["world_size"], calls["init_method"]) == (3, 8, "tcp://host:1")


def test_a_rank_without_a_gpu_sets_none(calls: dict[str, Any]) -> None:
    assert Ranks.join(0, 2, "tcp://host:1", own_device("cpu"), timeout=60.0).device == torch.device("cpu")
    assert "device" not in calls and calls["backend"] == "gloo"


def test_torch_refuses_a_gpu_without_an_index() -> None:
    with pytest.raises(ValueError, match="index"):
        torch.cuda.set_device(torch.device("cuda"))
