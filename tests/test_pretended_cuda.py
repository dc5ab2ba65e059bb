"""The pretended CUDA device: what raises there, and how often a round makes the host wait."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


TESTS = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("c++") and shutil.which("ninja")), reason="needs a C++ compiler and ninja"),
]


def run_python(*arguments: str) -> str:
    """In a process of its own: the device cannot be taken out again."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, text=True, check=True, capture_output=True
    ).stdout


def test_operations_that_mix_devices_raise_and_others_give_the_cpu_s_numbers():
    run_python(
        "-c",
        """if True:
        import torch
        from pretended_cuda import install

        install()
        host, there = torch.arange(6.0).view(2, 3), torch.arange(6.0, device="cuda").view(2, 3)
        assert there.is_cuda and there[0].data_ptr() == there.data_ptr() and there.is_set_to(there.view(2, 3))
        mixes = [
            lambda: there + host,
            lambda: there @ host.T,
            lambda: torch.cat([there, host]),
            lambda: there.gather(1, torch.zeros(2, 1, dtype=torch.long)),
            lambda: host[there.long()],
            lambda: there + there.to("cuda:1"),
            lambda: there.numpy(),
        ]
        for mix in mixes:
            try:
                mix()
            except (RuntimeError, TypeError):
                continue
            raise AssertionError("a mix of devices did not raise")
        there[:, 1:] = 7
        host[:, 1:] = 7
        assert (there @ there.T).tolist() == (host @ host.T).tolist()
        assert torch.multinomial(there + 1, 1).is_cuda and there[there > 2].tolist() == host[host > 2].tolist()
        """,
    )


def test_a_round_waits_once_whatever_scores_the_branches(tmp_path):
    output = tmp_path / "counts.json"
    run_python("-m", "pretended_cuda", "--layers", "5", "--nodes", "32", "--json", str(output))
    rows = json.loads(output.read_text())
    assert {(row["head"], row["cache"]) for row in rows} == {
        (head, cache) for head in ("plain", "path", "ngrams") for cache in ("growing", "static", "compiled")
    }
    for row in rows:
        waits = {step: numbers["waits"] for step, numbers in row["steps"].items()}
        assert waits["walk"] == 1, row
        # The first draft checks the head's numbers once; a tree below its budget is continued on the host.
        assert waits["round"] <= 1.2, row


def test_no_suite_mixes_devices():
    """A few tests of each; `make pretended-cuda` runs all of them."""
    tests = [
        "exact_greedy.py::test_a_prompt_given_as_ids_and_embeddings_gives_the_plain_text",
        "exact_sampling.py::test_every_node_budget_draws_the_same_text_from_the_same_seed",
        "batch.py::test_the_auto_policy_takes_batches",
        "static_cache.py::test_the_text_is_the_plain_one[noisy-auto-True]",
        "static_cache.py::test_the_text_is_the_plain_one[path-64-False]",
        "chains.py::test_a_branch_correction_ranks_chains",
        "reuse.py::test_a_padded_chat_goes_on",
        "show.py::test_recording_does_not_change_the_text",
    ]
    output = run_python("-m", "pytest", "-q", "--pretend-cuda", *(str(TESTS / f"test_{test}") for test in tests))
    assert "'with a head'" in output, "nothing ran on the pretended device"
