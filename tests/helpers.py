"""Small heads, trees and inputs that several test files share; the targets come from `conftest.py`."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_jetflow import JetFlowCandidateGenerator, JetFlowConfig, JetFlowHead
from hf_jetflow.cli.main import parse, run
from hf_jetflow.target.prefilled import TargetStates
from hf_jetflow.target.target import Target
from hf_jetflow.trees.tree import DraftTree


ROOT = Path(__file__).resolve().parents[1]
HIDDEN = 32
NUM_TAPS = 2


def tiny_config(**overrides: Any) -> JetFlowConfig:
    settings: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        block_size=4,
        mask_token_id=3,
        num_target_layers=6,
        hidden_state_indices=[2, 4],
    )
    return JetFlowConfig(**{**settings, **overrides})


def tiny_head(attn_implementation: str = "sdpa", **overrides: Any) -> JetFlowHead:
    """A head none of whose tensors has its initial value, norms included."""
    head = JetFlowHead._from_config(tiny_config(**overrides), attn_implementation=attn_implementation).eval()
    alter(head)
    return head


@torch.no_grad()
def alter(head: JetFlowHead) -> None:
    """Give every tensor that is saved a value of its own."""
    generator = torch.Generator().manual_seed(5)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    if head.config.draft_vocab_size is not None:
        chosen = torch.randperm(head.config.vocab_size, generator=generator)[: head.config.draft_vocab_size]
        head.d2t.copy_(chosen.sort().values)


def block_inputs(num_context: int, num_rows: int = 4, start: int = 0, seed: int = 6) -> dict[str, torch.Tensor]:
    """One block whose anchor follows `num_context` context rows, the first of them at position `start`."""
    generator = torch.Generator().manual_seed(seed)
    anchor = start + num_context
    return dict(
        inputs_embeds=torch.randn(1, num_rows, HIDDEN, generator=generator),
        features=torch.randn(1, num_context, NUM_TAPS * HIDDEN, generator=generator),
        position_ids=torch.arange(anchor, anchor + num_rows)[None],
        context_position_ids=torch.arange(start, anchor)[None],
    )


def make_tree(tokens: list[int], parents: list[int]) -> DraftTree:
    """A tree written by hand; the root's parent is -1."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    links = torch.tensor(parents)
    return DraftTree(
        tokens=torch.tensor(tokens),
        parents=links,
        depths=torch.tensor(depths),
        logprobs=torch.zeros(len(tokens)),
        max_depth=max(depths),
    )


def as_batch(*trees: DraftTree) -> DraftTree:
    """Trees of equally many nodes as those of a batch."""
    parts = {
        field.name: torch.stack([getattr(tree, field.name) for tree in trees])
        for field in fields(DraftTree)
        if isinstance(getattr(trees[0], field.name), torch.Tensor)
    }
    return DraftTree(**parts, max_depth=max(tree.max_depth for tree in trees))


def random_parents(num_nodes: int, generator: torch.Generator) -> list[int]:
    """Links of a random tree, ordered by depth as `build_tree` orders them."""
    parents, depths = [-1], [0]
    for node in range(1, num_nodes):
        lowest = parents[-1] if node > 1 else 0  # a later node hangs from the same or a later parent
        parents.append(int(torch.randint(lowest, node, (1,), generator=generator)))
        depths.append(depths[parents[-1]] + 1)
    return parents


def tiny_tokenizer(vocab_size: int, eos_id: int | None = None) -> PreTrainedTokenizerFast:
    """
    A tokenizer of the words t000, t001, ... with a chat template.

    Three digits keep one word from being found inside another.
    """
    words = Tokenizer(models.WordLevel({word(token): token for token in range(vocab_size)}, unk_token=word(1)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    eos_token = None if eos_id is None else word(eos_id)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=word(1), eos_token=eos_token)
    tokenizer.chat_template = (
        "{% for message in messages %}t003 {{ message.content }} t004 {% endfor %}"
        "{% if add_generation_prompt %}t005{% endif %}"
    )
    return tokenizer


def save_pair(folder: Path, target: PreTrainedModel, head: JetFlowHead | None = None) -> list[Any]:
    """Save a target with its tokenizer, and a head; the options of a command that name them."""
    target.save_pretrained(folder / "target")
    tiny_tokenizer(target.config.vocab_size).save_pretrained(folder / "target")
    if head is None:
        return ["--target", folder / "target"]
    head.save_pretrained(folder / "head")
    return ["--target", folder / "target", "--head", folder / "head"]


def dotted_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token 7 reads ".7": a stop string can end inside a token and span several. The first ids are letters."""
    letters = {letter: index for index, letter in enumerate("abcdef")}
    words = {f".{token}": token for token in range(len(letters), vocab_size)}
    backend = Tokenizer(models.BPE(vocab=letters | words, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def word(token: int) -> str:
    return f"t{token:03d}"


def write_lines(path: Path, *records: object, end: str = "\n") -> Path:
    """A JSON lines file; a record that is text is written as it is."""
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records) + end)
    return path


def answer(record_id: str, num_prompt: int, num_answer: int) -> dict:
    """An answer whose token ids count up from 1."""
    ids = list(range(1, 1 + num_prompt + num_answer))
    return {"id": record_id, "prompt_ids": ids[:num_prompt], "answer_ids": ids[num_prompt:]}


@dataclass
class Finished:
    """A command of `hf-jetflow` that ended."""

    exit_code: Any
    output: str


def run_command(*arguments: Any) -> Finished:
    """Run `hf-jetflow` in this process; what it prints on stdout and stderr comes in one text."""
    output, status = io.StringIO(), 0
    with redirect_stdout(output), redirect_stderr(output):
        try:
            run(parse([str(argument) for argument in arguments]))
        except SystemExit as exit:
            status = exit.code
    return Finished(status, output.getvalue())


def run_processes(command: list[Any], folder: Path, limit: float) -> None:
    """
    Run a launcher of several processes. Where it takes too long, they say where they stand, and all are ended.

    Args:
        command: The launcher and its script, which ends itself `limit` seconds after its start.
        folder: Folder of the log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w+") as log:  # a pipe would be waited for as long as any process holds it
        launcher = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = launcher.wait(limit + 30)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        log.seek(0)
        assert status == 0, f"status {status}: {log.read()[-8000:]}"


def build_wheel(project: Path, folder: Path) -> Path:
    """Builds the wheel of a project of this repository in `folder`, from a copy of its tracked files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=project, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True)
    return next(folder.glob("*.whl"))


def drafter_of(head: JetFlowHead, target, ids: torch.Tensor) -> JetFlowCandidateGenerator:
    """A drafter that was shown all but the last tokens of ids (batch, seq)."""
    view = Target(target, head.config)
    drafter = JetFlowCandidateGenerator(head, view)
    features = torch.cat([view.states(row[None, :-1])[0] for row in ids])
    positions = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
    drafter.observe(TargetStates(torch.empty(len(ids), 0, 1), (features,), positions))
    return drafter
