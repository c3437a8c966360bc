"""The command that waits for a GPU: every part of it runs on the CPU, and one that fails costs no other."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

from experiments import gpu, gpu_costs
from experiments.gpu_tables import LIMITS, SECONDS, Run
from lfu import lora
from lfu.data.batches import IGNORED
from lfu.io.files import read_json
from lfu.loss import sft_loss
from lfu.model import forward
from lfu.profiling import bench

TITLES = (
    "Gradients of the miniature", "Where the host waits", "The miniature's answers", "The precision", "A run of",
    "A step at the shape of Llama-3.1-8B, 2 x 16", "A step at the shape of Llama-3.1-8B, 1 x 32", "One lfu-lora step",
    "The same with float32 parts in bfloat16", "Decoding at the shape", "The miniature, for a rehearsal",
)  # fmt: skip


def small(out: Path, *arguments: str) -> int:
    return gpu.main([f"--out={out}", "--small", *(arguments or ["--device=cpu"])])


def test_every_part_runs_and_fills_its_tables(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert small(out) == 0
    tables = read_json(out / "results.json")["tables"]
    assert [title for title, table in zip(TITLES, tables, strict=True) if table["title"].startswith(title)] == [*TITLES]
    assert all(len(row) == len(table["head"]) for table in tables for row in table["rows"])
    assert not [row for table in tables for row in table["rows"] if "nan" in row or "not done in time" in row]
    gradients, _, answers, _, run, *steps = tables[:7]
    assert all(row[2:] == ["0.0e+00", "yes"] for row in gradients["rows"])  # here the device is the CPU itself
    assert [row[1] for row in answers["rows"]] == ["8 of 8", "8 of 8"]
    assert run["rows"][0][1].startswith("yes")
    assert all(len(each["rows"]) == 9 for each in steps)
    text = (out / "results.md").read_text(encoding="utf-8")
    assert text.endswith("Parts that failed: none.\n\n")
    assert all(f"## {table['title']}\n\n| {table['head'][0]} |" in text for table in tables)
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "results.md"]


def test_a_folder_that_exists_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small(tmp_path) == 2
    assert capsys.readouterr().err == f"{tmp_path} exists: give another --out.\n"


def test_no_gpu_is_a_line_for_each_part(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert small(tmp_path / "out", "--device=cuda", "--only", "profile", "decoding") == 1
    said = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "profile: The device 'cuda' cannot be used here" in said
    assert "decoding: The device 'cuda' cannot be used here" in said
    assert "Parts that failed: profile, decoding." in said


def test_a_part_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "share", lambda left, parts: 0.2)
    assert small(tmp_path / "out", "--device=cpu", "--only", "steps", "profile") == 1
    said = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "steps: stopped at its limit of 0.2 seconds." in said
    assert "profile: stopped at its limit of 0.2 seconds." in said


def test_the_chosen_parts_share_eight_minutes() -> None:
    assert sum(LIMITS.values()) == SECONDS == 480
    assert [gpu.share(480, [*LIMITS][index:]) for index in (0, 4)] == [LIMITS["right"], 480]
    assert gpu.share(420, [*LIMITS][1:]) == LIMITS["steps"]  # where the first took all of its time
    assert gpu.share(480, ["decoding", "real"]) == pytest.approx(480 * 65 / 215)


def run_on_cpu(out: Path) -> Run:
    return Run(out, torch.device("cpu"), True, None, None, None, micro_batch_size=16, until=math.inf)


def test_what_does_not_fit_is_a_row(tmp_path: Path) -> None:
    def too_large() -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB.")

    peaks, faults = gpu_costs.tried({"large": too_large, "small": lambda: torch.ones(1000)}, torch.device("cpu"))
    assert faults == {"large": "out of memory"}
    assert peaks == {"small": 4000}


def test_the_peers_hold_the_same_model(tmp_path: Path) -> None:
    here = gpu_costs.large(run_on_cpu(tmp_path))
    here = here._replace(base=tree_map(lambda leaf: None if leaf is None else leaf.float(), here.base))
    peers, batch = gpu_costs.peers_of(here), bench.random_batch(here.config, 2, 16, 10, 0, torch.device("cpu"))
    assert peers is not None
    expected = sft_loss(forward(here.config, here.base, batch.tokens)[0], batch.labels)
    for module in peers:
        found = module(input_ids=batch.tokens, labels=batch.labels).loss
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert peers.plain.lm_head.weight.data_ptr() == here.base.lm_head.data_ptr()
    trained = [name for name, parameter in peers.adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(lora.TARGETS) * here.config.num_hidden_layers
    assert (batch.labels != IGNORED).sum() == 20


def test_the_idle_share_is_what_no_kernel_covers() -> None:
    class Event:
        device_type = torch.autograd.DeviceType.CUDA

        def __init__(self, start: float, end: float) -> None:
            self.time_range = type("Range", (), {"start": start, "end": end})

    class Record:
        def events(self) -> list[Event]:
            return [Event(6, 8), Event(0, 2), Event(1, 4), Event(2, 3)]

    assert gpu_costs.idle_share(Record()) == pytest.approx(2 / 8)
