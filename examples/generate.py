"""Answer a prompt with a draft head.

    python examples/generate.py "Why is the sky blue?"
    python examples/generate.py --target org/model --head org/head "Why is the sky blue?"

The default is SmolLM2-135M-Instruct with the head of this repository.
"""

import argparse

import torch
from smollm2 import HEAD, gguf_path

from hf_jetflow import JetFlowHead
from hf_jetflow.prompts import encode_chat
from hf_jetflow.target.loading import load_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--target", help="Hub id, folder or .gguf file")
    parser.add_argument("--head", default=HEAD, help="Hub id or folder")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()

    target, tokenizer = load_target(args.target or gguf_path(), "auto")
    head = JetFlowHead.from_pretrained(args.head, dtype=target.dtype).to(target.device)
    input_ids = torch.tensor([encode_chat(tokenizer, [{"role": "user", "content": args.prompt}])]).to(target.device)
    output = target.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        assistant_model=head,
        max_new_tokens=args.max_new_tokens,
    )
    print(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))
    print(f"({head.last_stats.tokens_per_round:.2f} tokens per round)")


if __name__ == "__main__":
    main()
