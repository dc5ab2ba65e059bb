"""The `environment` of a result: date, versions, processor, and the hash of the head's weights."""

import hashlib
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..head.modeling_jetflow import JetFlowHead


def environment(head: JetFlowHead | None = None) -> dict[str, Any]:
    """The `environment` of a result: date, versions, processor, threads and, given a head, the hash of its weights."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hf_jetflow": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor_name(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        facts["cuda_device"] = torch.cuda.get_device_name()
    if head is not None:
        facts["head_hash"] = weights_hash(head)
    return facts


def weights_hash(head: JetFlowHead) -> str:
    """Hash of names and weights: equal for equal heads, also where one was loaded in a wider dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(head.state_dict().items()):
        wide = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(name.encode())
        digest.update(wide.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
