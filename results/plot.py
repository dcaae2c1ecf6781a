"""Draw results/*.png, one figure per suite, from results/*.csv, and print the table of ranks: python results/plot.py

Colored: one run each; dots are episodes, lines their mean over the last 20. Black: the official code's run of
CartPole-v1, or the mean of the authors' five seeds; gray: each of these seeds. Crosses: the authors' means (Atari).
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
SUITES = {  # figure -> environments, with the authors' mean return after so many environment steps
    "parity": {"CartPole-v1__parity": {}},
    "demo": {"CartPole-v1__demo": {}},
    "classic_control": {"CartPole-v1__seed": {}},
    "dm_control": {f"dm_control-{x}-v0": {} for x in ("finger-spin", "reacher-easy", "ball_in_cup-catch")}
    | {f"dm_control-{x}-v0": {} for x in ("cartpole-balance", "walker-walk")},
    "atari": {"BoxingNoFrameskip-v4": {120_000: 33, 200_000: 47}, "ALE-Pong-v5": {200_000: -16}},
    "minatar": {"MinAtar-Breakout-v1": {}},
}


def read(path: Path, *columns: int) -> np.ndarray:
    """Columns of a CSV with numbers: (columns, rows)."""
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=columns, ndmin=2).T


def authors_seeds(task: str) -> list[np.ndarray]:
    """The authors' five curves of a DeepMind Control task: (environment steps, return) each, (2, points)."""
    name = task.removeprefix("dm_control-").removesuffix("-v0").replace("-", "_")
    rows = [row.split(",") for row in (HERE / "published" / "dmc_proprio.csv").read_text().split()[1:]]
    seeds = sorted({row[1] for row in rows})
    curves = [np.array([row[2:] for row in rows if row[:2] == [name, seed]], float).T for seed in seeds]
    return [curve for curve in curves if curve.size]


def compare(folder: Path, until: int) -> None:
    """Print for every DeepMind Control log that is long enough: the mean of the training episodes that end in the last
    10,000 environment steps before `until`, the authors' scores there, and the rank of ours among the six."""
    print(f"| task at {until:,} environment steps | run | mean (episodes) | the authors' seeds | rank |")
    print("|---|---|---|---|---|")
    for path in sorted(folder.glob("dm_control-*.csv")):
        frames, returns = read(path, 1, 2)
        if frames[-1] >= until - 2_000:
            task, run = path.stem.split("__")
            near = returns[(frames > until - 10_000) & (frames <= until)]
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
            theirs = authors_seeds(task)
            for steps, score in theirs:
                ax.plot(steps, score, color="silver", linewidth=0.8)
            if theirs:
                ax.plot(theirs[0][0], np.mean([score for _, score in theirs], 0), color="black", label="authors")
            for run, (frames, returns) in runs.items():
                means = np.array([returns[max(0, j - 19) : j + 1].mean() for j in range(len(returns))])
                ends = np.flatnonzero(np.diff(frames, append=math.inf))  # parallel environments end together
                style = {"color": "black"} if run == "official" else {}
                (line,) = ax.plot(frames[ends], means[ends], label=run, **style)
                ax.plot(frames, returns, ".", color=line.get_color(), alpha=0.2, markersize=4)
            if tasks[task]:
                ax.plot(*zip(*tasks[task].items(), strict=True), "kx", label="authors' mean")
            last = max(frames[-1] for frames, _ in runs.values())
            ax.set(title=task.split("__")[0], xlabel="environment steps", ylabel="return", xlim=(0, 1.05 * last))
            ax.locator_params(axis="x", nbins=5)
            ax.legend(fontsize="small")
        figure.savefig(folder / f"{suite}.png")


if __name__ == "__main__":
    draw(HERE)
    compare(HERE, 50_000)
    compare(HERE, 100_000)
