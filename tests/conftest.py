"""What every test starts from: the same seed, two threads or OMP_NUM_THREADS, no dump folder of the shell."""

from __future__ import annotations

import os

# The model libraries the tests borrow from must not reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tools.models import declare_torchvision_operators

declare_torchvision_operators()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXOPT_DUMP", raising=False)
    torch.manual_seed(0)
