"""Draw results/*.png, one figure per suite, from results/*.csv: python results/plot.py

Dots are episodes, lines their mean over the last 20 (of one seed), black lines the official code, crosses published
means. Logs named parity are runs under the protocol of the official code's run.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

SUITES = {  # figure -> environment -> published mean return after so many environment steps
    "parity": {"CartPole-v1__parity": {}},
    "classic_control": {"CartPole-v1__seed": {}},
    "dm_control": {
        "dm_control-finger-spin-v0": {50_000: 483, 100_000: 748},
        "dm_control-reacher-easy-v0": {50_000: 558, 100_000: 740},
        "dm_control-ball_in_cup-catch-v0": {50_000: 523},
        "dm_control-cartpole-balance-v0": {50_000: 488},
        "dm_control-walker-walk-v0": {50_000: 253, 100_000: 461},
    },
    "atari": {"BoxingNoFrameskip-v4": {120_000: 33, 200_000: 47}, "ALE-Pong-v5": {200_000: -16}},
    "minatar": {"MinAtar-Breakout-v1": {}},
}


def draw(folder: Path) -> None:
    """Draw every suite that has logs in the folder, `{environment}__seed{number}.csv`, into it."""
    for suite, tasks in SUITES.items():
        logs = {task: sorted(folder.glob(f"{task}_*.csv")) for task in tasks}
        logs = {task: paths for task, paths in logs.items() if paths}
        if not logs:
            continue
        columns = min(2, len(logs))
        rows = -(-len(logs) // columns)
        figure = Figure((5 * columns, 3.5 * rows), dpi=100, layout="constrained")
        for i, (task, paths) in enumerate(logs.items()):
            ax = figure.add_subplot(rows, columns, i + 1)
            official = Path(__file__).parent / "official" / "CartPole-v1__official_seed1.csv"
            for path in [official, *paths] if suite == "parity" else paths:
                columns_of = (0, 1) if path == official else (1, 2)  # environment steps, return
                frames, returns = np.loadtxt(path, delimiter=",", skiprows=1, usecols=columns_of, ndmin=2).T
                means = [returns[max(0, i - 19) : i + 1].mean() for i in range(len(returns))]
                style = {"color": "black"} if path == official else {}
                (line,) = ax.plot(frames, means, label=path.stem.split("__", 1)[1], **style)
                ax.plot(frames, returns, ".", color=line.get_color(), alpha=0.2, markersize=4)
            if tasks[task]:
                ax.plot(*zip(*tasks[task].items(), strict=True), "kx", label="published")
            ax.set(title=task.split("__")[0], xlabel="environment steps", ylabel="return")
            ax.locator_params(axis="x", nbins=5)
            ax.legend(fontsize="small")
        figure.savefig(folder / f"{suite}.png")


if __name__ == "__main__":
    draw(Path(__file__).parent)
