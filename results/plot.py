"""Draw results/*.png, one figure per suite, from results/*.csv, and print the table of ranks: python results/plot.py

Colored: one run each; dots are episodes, lines their mean over the last 20 (of 16 environments: over the last 16).
Black: the official code's run of CartPole-v1, or the mean of the authors' five seeds; gray: each of these seeds (Atari:
means over 20 episodes).
"""

import math
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
TASKS = "reacher-easy walker-walk finger-spin ball_in_cup-catch cartpole-balance cheetah-run".split()
SUITES = {  # figure -> what the names of its logs begin with, one plot each
    "parity": ["CartPole-v1__parity"],
    "demo": ["CartPole-v1__demo"],
    "classic_control": ["CartPole-v1__seed"],
    "dm_control": [f"dm_control-{task}-v0" for task in TASKS],
    "atari": ["BoxingNoFrameskip-v4", "ALE-Pong-v5"],
    "minatar": ["MinAtar-Breakout-v1"],
}


def read(path: Path, *columns: int) -> np.ndarray:
    """Columns of a CSV with numbers: (columns, rows)."""
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=columns, ndmin=2).T


def running_mean(returns: np.ndarray, window: int = 20) -> np.ndarray:
    """Of the last `window` episodes, at every episode."""
    return np.array([returns[max(0, j + 1 - window) : j + 1].mean() for j in range(len(returns))])


def authors_seeds(task: str) -> list[np.ndarray]:
    """The authors' five curves of a DeepMind Control task or Atari game: (environment steps, return) each, (2, points);
    [] for other environments."""
    control = task.startswith("dm_control")
    name = re.sub(r"^(dm_control|ALE)-|(NoFrameskip)?-v\d$", "", task).replace("-", "_").lower()
    file = HERE / "published" / ("dmc_proprio.csv" if control else "atari100k.csv")
    rows = [row.split(",") for row in file.read_text().split()[1:]]
    seeds = sorted({row[1] for row in rows if row[0] == name})
    curves = [np.array([row[2:] for row in rows if row[:2] == [name, seed]], float).T for seed in seeds]
    return curves if control else [np.stack([steps, running_mean(returns)]) for steps, returns in curves]


def compare(folder: Path, until: int) -> None:
    """Print for every DeepMind Control log with training episodes that end in the last 10,000 environment steps before
    `until`: their mean, the authors' scores there, and the rank of ours among the six."""
    print(f"| task at {until:,} environment steps | run | mean (episodes) | the authors' seeds | rank |")
    print("|---|---|---|---|---|")
    for path in sorted(folder.glob("dm_control-*.csv")):
        frames, returns = read(path, 1, 2)
        near = returns[(frames > until - 10_000) & (frames <= until)]
        if len(near):
            task, run = path.stem.split("__")
            theirs = [float(score[steps == until][0]) for steps, score in authors_seeds(task)]
            rank = 1 + sum(x > near.mean() for x in theirs)
            scores = ", ".join(f"{x:.0f}" for x in sorted(theirs, reverse=True))
            print(f"| {task} | {run} | {near.mean():.0f} ({len(near)}) | {scores} | {rank} of {len(theirs) + 1} |")


def draw(folder: Path) -> None:
    """Draw every suite that has logs in the folder, `{environment}__{run}.csv`, into it."""
    for suite, tasks in SUITES.items():
        logs = {task: sorted(folder.glob(f"{task}*.csv")) for task in tasks}
        logs = {task: paths for task, paths in logs.items() if paths}
        if not logs:
            continue
        columns = min(2, len(logs))
        rows = -(-len(logs) // columns)
        figure = Figure((5 * columns, 3.5 * rows), dpi=100, layout="constrained")
        for i, (task, paths) in enumerate(logs.items()):
            ax = figure.add_subplot(rows, columns, i + 1)
            runs = {path.stem.split("__", 1)[1]: read(path, 1, 2) for path in paths}
            if suite == "parity":
                runs["official"] = read(HERE / "official" / "CartPole-v1__official_seed1.csv", 0, 1)
            end = 1.05 * max(frames[-1] for frames, _ in runs.values())
            theirs = [curve[:, curve[0] <= end] for curve in authors_seeds(task)]
            for steps, score in theirs:
                ax.plot(steps, score, color="silver", linewidth=0.8)
            if theirs:
                steps = theirs[0][0]
                mean = np.mean([np.interp(steps, *curve) for curve in theirs], 0)
                ax.plot(steps, mean, color="black", label="authors")
            for run, (frames, returns) in runs.items():
                means = running_mean(returns, 16 if "16envs" in run else 20)
                ends = np.flatnonzero(np.diff(frames, append=math.inf))  # parallel environments end together
                style = {"color": "black"} if run == "official" else {}
                (line,) = ax.plot(frames[ends], means[ends], label=run, **style)
                ax.plot(frames, returns, ".", color=line.get_color(), alpha=0.2, markersize=4)
            ax.set(title=task.split("__")[0], xlabel="environment steps", ylabel="return", xlim=(0, end))
            ax.locator_params(axis="x", nbins=5)
            ax.legend(fontsize="small")
        figure.savefig(folder / f"{suite}.png")


if __name__ == "__main__":
    draw(HERE)
    compare(HERE, 50_000)
    compare(HERE, 100_000)
