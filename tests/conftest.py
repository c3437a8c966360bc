"""Shared by all tests: the CPU and one thread of it, and one transformers model of each kind, written to disk once."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

# What is expected here, dtypes and bits, is expected of a CPU. Processes that tests start see no other device either.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from tiny import KINDS, save_reference

# The models are so small that more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a folder with a random model of that kind, as transformers writes it. To be read, not changed."""

    @cache
    def folder(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        save_reference(kind, path)
        return path

    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param
