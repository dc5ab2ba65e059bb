"""Plot a training run: agreement with the target by depth, and the divergence, over updates.

python examples/plot_training.py runs/my-head/checkpoint-3300/trainer_state.json --output training.png
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path, help="trainer_state.json of a checkpoint")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    logs = [log for log in json.loads(args.state.read_text(encoding="utf-8"))["log_history"] if "top1_depth_1" in log]
    if not logs:
        raise SystemExit(f"error: {args.state} holds no training log of a head")
    updates = [log["step"] for log in logs]
    num_depths = sum(name.startswith("top1_depth_") for name in logs[0])
    panels = [("top1", "corrected_top1", "same first choice as the target"), ("kl", None, "KL in nats")]
    if "sibling_corrected_top1_depth_2" in logs[0]:
        panels.insert(1, ("sibling_top1", "sibling_corrected_top1", "the same after an accepted sibling"))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), constrained_layout=True)
    for axis, (name, corrected, title) in zip(axes, panels, strict=True):
        for depth in range(1 + name.startswith("sibling"), num_depths + 1):
            color = plt.get_cmap("viridis")((depth - 1) / num_depths)
            is_corrected = f"{corrected}_depth_{depth}" in logs[0]
            values = [log[f"{name}_depth_{depth}"] for log in logs]
            axis.plot(updates, values, ":" if is_corrected else "-", color=color, lw=1, label=f"depth {depth}")
            if is_corrected:
                axis.plot(updates, [log[f"{corrected}_depth_{depth}"] for log in logs], color=color, lw=1)
        axis.set(title=title, xlabel="update", ylim=(0, 1) if name != "kl" else (0, None))
        axis.grid(alpha=0.3)
    if len(panels) > 2:
        axes[0].set_title("same first choice as the target; dotted: before correction")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
