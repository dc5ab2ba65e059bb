"""Estimate memory and time of a training run with the formulas of docs/training-cost.md.

    python examples/training_cost.py --target Qwen/Qwen3-8B --num-layers 5 --block-size 16 --draft-vocab 32768 \
        --batch-size 8 --max-length 2048 --anchors 32 --max-steps 20000

The options are those of `hf-jetflow train`. Only the target's configuration is read. The time is that of the updates
alone, without answers, evaluation and saving, and assumes the share of the GPU's peak that is reached.
"""

import argparse

from hf_jetflow import JetFlowConfig
from hf_jetflow.head.configuration_jetflow import spaced_layer_ids
from hf_jetflow.target.loading import load_target_config
from hf_jetflow.training.cost import head_parameters, training_flops, training_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="Hub id, folder, config.json or .gguf file")
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--num-taps", type=int, default=5)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--draft-vocab", type=int, default=0)
    parser.add_argument("--branch-correction", choices=("path", "parent", "none"), default="path")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--anchors", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=4000)
    parser.add_argument(
        "--peak-tflops", type=float, default=990, help="of the GPU in bf16, dense; an H100's if not given"
    )
    parser.add_argument("--share-of-peak", type=float, default=0.4, help="of it that is reached; an assumption")
    args = parser.parse_args()

    target = load_target_config(args.target)
    num_layers = target.get_text_config(decoder=True).num_hidden_layers
    head = JetFlowConfig.for_target(
        target,
        num_hidden_layers=args.num_layers,
        block_size=args.block_size,
        hidden_state_indices=[layer + 1 for layer in spaced_layer_ids(num_layers, args.num_taps)],
        draft_vocab_size=args.draft_vocab or None,
        branch_correction=None if args.branch_correction == "none" else args.branch_correction,
    )
    shape = dict(batch_size=args.batch_size, seq=args.max_length, anchors=args.anchors)
    peak = training_memory(target, head, **shape)["peak"]
    seconds = training_flops(target, head, **shape)["total"] / (args.share_of_peak * args.peak_tflops * 1e12)
    print(
        f"head of {head_parameters(head) / 1e9:.2f} B parameters; on each GPU {peak / 1e9:.1f} GB at the peak and "
        f"{seconds:.2f} s per update, {args.max_steps * seconds / 3600:.1f} h for {args.max_steps} updates "
        f"({args.share_of_peak:.0%} of {args.peak_tflops:g} TFLOP/s); computed, not measured"
    )


if __name__ == "__main__":
    main()
