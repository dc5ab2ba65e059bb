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
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for panel, name, title in (
        (panels[0], "top1", "same first choice as the target"),
        (panels[1], "kl", "KL in nats"),
    ):
        for depth in range(1, num_depths + 1):
            color = plt.get_cmap("viridis")((depth - 1) / num_depths)
            panel.plot(
                updates, [log[f"{name}_depth_{depth}"] for log in logs], label=f"depth {depth}", color=color, lw=1
            )
        panel.set(title=title, xlabel="update", ylim=(0, 1) if name == "top1" else (0, 8))
        panel.grid(alpha=0.3)
    panels[1].legend()
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
