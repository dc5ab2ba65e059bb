"""Chat with a model on the terminal; a head drafts its answers, which are streamed.

    python examples/chat.py
    python examples/chat.py --target org/model --head org/head --temperature 0.7

An empty line or Ctrl-D ends the chat, `/new` starts another one, Ctrl-C interrupts an answer. The default is
SmolLM2-135M-Instruct with the head of this repository.
"""

import argparse
import time

import torch
from smollm2 import HEAD, gguf_path
from transformers import TextStreamer

from hf_jetflow import JetFlowHead
from hf_jetflow.prompts import encode_chat
from hf_jetflow.target.loading import load_target


class RecordingStreamer(TextStreamer):
    """Prints an answer as it is generated and records its text, even if it is interrupted."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="Hub id, folder or .gguf file")
    parser.add_argument("--head", default=HEAD, help="Hub id or folder")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--system", help="system message")
    args = parser.parse_args()

    target, tokenizer = load_target(args.target or gguf_path(), "auto")
    head = JetFlowHead.from_pretrained(args.head, dtype=target.dtype).to(target.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(system)
    while prompt := ask():
        if prompt == "/new":
            messages = list(system)
            continue
        messages.append({"role": "user", "content": prompt})
        input_ids = torch.tensor([encode_chat(tokenizer, messages)], device=target.device)
        streamer = RecordingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        start = time.perf_counter()
        try:
            target.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                assistant_model=head,
                streamer=streamer,
                max_new_tokens=args.max_new_tokens,
                **sampling,
            )
        except KeyboardInterrupt:
            print(" (interrupted)")
        else:
            stats, seconds = head.last_stats, time.perf_counter() - start
            print(f"({stats.num_new_tokens / seconds:.1f} tokens/s, {stats.tokens_per_round:.2f} tokens per round)")
        messages.append({"role": "assistant", "content": streamer.text})


def ask() -> str:
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


if __name__ == "__main__":
    main()
