"""What a round asks of the host: counts on a pretended device, and `bench --count` on a real one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_jetflow.bench.counts import check_device, launches_by_step, watched_steps
from hf_jetflow.decoding.session import DecodingSession
from hf_jetflow.errors import JetFlowError


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("ninja") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("nodes", "most"), [("64", {"greedy": 30, "sampled": 40, "usual": 60}), ("auto", {"greedy": 50, "sampled": 60})]
)
def test_a_captured_round_waits_once_and_launches_at_most_60_times(nodes, most, tmp_path):
    """Three layers of the target count as 36: its forward is one launch."""
    command = [sys.executable, "-m", "pretended_cuda", "--layers", "3", "--heads", "ngrams", "--caches", "compiled"]
    command += ["--nodes", nodes, "--modes", *most, "--json", str(tmp_path / "counts.json")]
    subprocess.run(command, cwd=Path(__file__).parent, check=True)
    rows = json.loads((tmp_path / "counts.json").read_text())
    assert [row["mode"] for row in rows] == [*most]
    for counts, launches in zip(rows, most.values(), strict=True):
        assert counts["steps"]["round"]["waits"] == 1
        assert counts["steps"]["round"]["launches"] <= launches


def test_counting_is_refused_without_a_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(JetFlowError, match="torch sees none"):
        check_device()


def event(name: str, start: float, end: float) -> SimpleNamespace:
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=times, device_type=SimpleNamespace(name="CPU"))


def test_launches_belong_to_the_step_around_them():
    events = [
        event("jetflow draft", 0, 10),
        event("jetflow other", 4, 6),
        event("jetflow verify", 10.5, 20),
        event("aten::mm", 1, 2),
        event("cudaLaunchKernel", 1.5, 1.6),
        event("cudaLaunchKernelExC", 5, 5.1),
        event("cudaGraphLaunch", 11, 12),
        event("cudaMemcpyAsync", 13, 14),
        event("cudaStreamSynchronize", 14, 15),
        event("cuLaunchKernel", 30, 31),
    ]
    assert launches_by_step(events) == {"draft": 1, "other": 2, "verify": 2}


def test_watched_steps_are_left_as_they_were():
    before = dict(vars(DecodingSession))
    with watched_steps(lambda _step: torch.no_grad()):
        assert vars(DecodingSession)["draft"] is not before["draft"]
    assert dict(vars(DecodingSession)) == before
