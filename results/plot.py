"""Draw the figures of results/ from its CSVs: python results/plot.py

Gray and black: runs of the official code. Color: runs of this repository. An official curve is
drawn in a figure with ours only if `check` of compare.py lets their protocols pass. Runs that do
not exist yet are left out.
"""

import math
from collections.abc import Callable
from pathlib import Path

import compare
import numpy as np
from compare import Results
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
Curve = tuple[np.ndarray, np.ndarray]  # x and y
OFFICIAL = "0.6"
OURS = "tab:blue"
EXACT = "tab:orange"
DEFAULT = "tab:green"
LINESTYLES = ["-", "--", ":"]  # of successive seeds


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Of the last `window` values, at every value."""
    means = []
    for i in range(len(values)):
        means.append(values[max(0, i + 1 - window) : i + 1].mean())
    return np.array(means)


def returns(results: Results, names: list[str], window: int) -> list[Curve]:
    """Agent steps and running means of training returns, of the runs that exist."""
    curves = []
    for name in names:
        episodes = results.read(name)
        if episodes is not None:
            means = running_mean(episodes["return"], window)
            curves.append((episodes["global_step"], means))
    return curves


def metric(results: Results, names: list[str], x: str, y: str) -> list[Curve]:
    """Two columns of the losses, of the runs that exist."""
    curves = []
    for name in names:
        losses = results.read(name, "_losses")
        if losses is not None:
            curves.append((losses[x], losses[y]))
    return curves


def draw_curves(ax: Axes, curves: list[Curve], label: str, color: str, **style) -> None:
    """Draw runs of one kind, with one label for all."""
    for i, (x, y) in enumerate(curves):
        ax.plot(x, y, label=None if i else label, color=color, linewidth=1.2, **style)


def draw_seeds(ax: Axes, curves: list[list[Curve]], label: str, color: str) -> None:
    """Draw seeds 1, 2 and 3 solid, dashed and dotted; one that does not exist has no curve."""
    for i, found in enumerate(curves):
        name = f"{label}, seed {i + 1}"
        for x, y in found:
            ax.plot(x, y, label=name, color=color, linewidth=1.2, linestyle=LINESTYLES[i])


def finish(ax: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    """Titles and a legend."""
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.locator_params(axis="x", nbins=6)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="small")


# === finger-spin ==================================================================================
def returns_by_seed(results: Results, names: list[str]) -> list[list[Curve]]:
    """Running means of 5 training returns, for each name one curve, or none."""
    return [returns(results, [name], 5) for name in names]


def finger_returns(ax: Axes, results: Results) -> None:
    """Training returns of official and rounded runs."""
    results.check([*compare.FINGER, *compare.ROUNDED], [])
    draw_seeds(ax, returns_by_seed(results, compare.FINGER), "official", OFFICIAL)
    draw_seeds(ax, returns_by_seed(results, compare.ROUNDED), "ours", OURS)
    title = "finger-spin, 1 environment, ratio 512"
    finish(ax, title, "agent steps", "return, mean of 5 episodes")


def finger_ablation(ax: Axes, results: Results) -> None:
    """Training returns of official, rounded and exact runs."""
    draw_seeds(ax, returns_by_seed(results, compare.FINGER), "official", OFFICIAL)
    crossed = returns_by_seed(results, [compare.FINGER_EXACT])
    draw_seeds(ax, crossed, "official, exact mean", "black")
    draw_seeds(ax, returns_by_seed(results, compare.ROUNDED), "ours, rounded", OURS)
    draw_seeds(ax, returns_by_seed(results, compare.EXACT), "ours, exact", EXACT)
    finish(ax, "finger-spin, training returns", "agent steps", "return, mean of 5 episodes")


def finger_metric(ax: Axes, results: Results, name: str) -> None:
    """A metric of official, rounded and exact runs."""
    key = compare.FINGER_METRICS[name]
    official = [metric(results, [run], "opt_updates", key) for run in compare.FINGER]
    draw_seeds(ax, official, "official", OFFICIAL)
    crossed = metric(results, [compare.FINGER_EXACT], "opt_updates", key)
    draw_seeds(ax, [crossed], "official, exact mean", "black")
    rounded = [middle(metric(results, [run], "updates", name)) for run in compare.ROUNDED]
    draw_seeds(ax, rounded, "ours, rounded", OURS)
    exact = [middle(metric(results, [run], "updates", name)) for run in compare.EXACT]
    draw_seeds(ax, exact, "ours, exact", EXACT)
    finish(ax, name, "updates", "", legend=False)


def middle(curves: list[Curve]) -> list[Curve]:
    """The same with each window at its middle, where the official ones are drawn."""
    return [(updates - compare.WINDOW / 2, values) for updates, values in curves]


def finger_spin(results: Results) -> Figure:
    """The ablation: returns, advantage, entropy and value."""
    names = [*compare.FINGER, compare.FINGER_EXACT, *compare.ROUNDED, *compare.EXACT]
    results.check(names, compare.ROUNDING_TOLERATES)
    figure, axes = panels(4, columns=2)
    finger_ablation(axes[0], results)
    finger_metric(axes[1], results, "behavior/advantage_mag")
    finger_metric(axes[2], results, "behavior/actor_entropy")
    finger_metric(axes[3], results, "behavior/value_mean")
    return figure


# === CartPole =====================================================================================
def cartpole_evaluations(ax: Axes, results: Results) -> None:
    """Evaluations of the runs with 16 environments."""
    names = [compare.CARTPOLE_16_OFFICIAL, *compare.CARTPOLE_16]
    results.check(names, compare.CARTPOLE_16_TOLERATES)
    official = []
    for steps, values in compare.official_evaluations(results):
        official.append((steps, running_mean(values, 5)))
    draw_curves(ax, official, "official, exact mean", OFFICIAL)
    ours = []
    for name in compare.CARTPOLE_16:
        evaluations = results.read(name, "_evals")
        if evaluations is not None:
            means = running_mean(evaluations["return"], 5)
            ours.append((evaluations["global_step"], means))
    draw_curves(ax, ours, "ours", OURS)
    title = "CartPole-v1, 16 environments, ratio 512"
    finish(ax, title, "agent steps", "return, mean of 5 evaluations")


def cartpole_metric(ax: Axes, results: Results, name: str) -> None:
    """A metric of our runs with 16 environments in the range of the official ones."""
    names = [compare.CARTPOLE_16_LOSSES, *compare.CARTPOLE_16]
    results.check(names, [*compare.CARTPOLE_16_TOLERATES, "returns"])
    data = results.read(compare.CARTPOLE_16_LOSSES, "_losses")
    here = data["metric"] == compare.CARTPOLE_16_METRICS[name]
    borders = np.array(compare.CARTPOLE_16_BORDERS)
    middles = (borders[1:] + borders[:-1]) / 2
    ax.fill_between(middles, data["min"][here], data["max"][here], color="0.85")
    draw_curves(ax, [(middles, data["mean"][here])], "official, exact mean, 3 seeds", OFFICIAL)
    ours = metric(results, compare.CARTPOLE_16, "updates", name)
    draw_curves(ax, middle(ours), "ours", OURS)
    finish(ax, name, "updates", "")


def cartpole_16envs(results: Results) -> Figure | None:
    """Evaluations, value and entropy of the runs with 16 environments."""
    figure, axes = panels(3)
    cartpole_evaluations(axes[0], results)
    cartpole_metric(axes[1], results, "behavior/value_mean")
    cartpole_metric(axes[2], results, "behavior/actor_entropy")
    return figure if any(results.exist(compare.CARTPOLE_16)) else None


def cartpole_returns(ax: Axes, results: Results) -> None:
    """Training returns of the official run and of ours by its protocol."""
    results.check([compare.CARTPOLE_OFFICIAL, compare.CARTPOLE], [])
    draw_curves(ax, returns(results, [compare.CARTPOLE_OFFICIAL], 20), "official", OFFICIAL)
    draw_curves(ax, returns(results, [compare.CARTPOLE], 20), "ours", OURS)
    title = "CartPole-v1, 1 environment, ratio 512"
    finish(ax, title, "agent steps", "return, mean of 20 episodes")


def cartpole_value(ax: Axes, results: Results) -> None:
    """The imagined value of the official run and of ours by its protocol."""
    results.check([compare.CARTPOLE_OFFICIAL, compare.CARTPOLE], [])
    name = "behavior/value_mean"
    theirs = metric(results, [compare.CARTPOLE_OFFICIAL], "updates", "value_mean")
    draw_curves(ax, theirs, "official", OFFICIAL)
    ours = metric(results, [compare.CARTPOLE], "updates", name)
    draw_curves(ax, middle(ours), "ours", OURS)
    finish(ax, f"CartPole-v1, {name}", "updates", "")


def cartpole(results: Results) -> Figure:
    """Returns and value of the runs with one environment, also of the one with default flags."""
    default = [compare.CARTPOLE_DEFAULT]
    results.check([compare.CARTPOLE_OFFICIAL, *default], compare.DEFAULT_TOLERATES)
    figure, axes = panels(2)
    draw_curves(axes[0], returns(results, default, 20), "ours, default flags", DEFAULT)
    cartpole_returns(axes[0], results)
    value = metric(results, default, "updates", "behavior/value_mean")
    draw_curves(axes[1], middle(value), "ours, default flags", DEFAULT)
    cartpole_value(axes[1], results)
    return figure


# === walker-walk ==================================================================================
def walker_returns(ax: Axes, results: Results) -> None:
    """Mean returns of the 16 episodes that end together."""
    names = [compare.WALKER_OFFICIAL, *compare.WALKER]
    results.check(names, compare.WALKER_TOLERATES)
    official = []
    for groups in compare.official_groups(results)[:, :4]:
        official.append((compare.GROUP * np.arange(1, 5), groups))
    draw_curves(ax, official, "official", OFFICIAL, marker=".")
    ours = []
    for name in compare.WALKER:
        groups = compare.our_groups(results, name)
        if groups is not None:
            ours.append((compare.GROUP * np.arange(1, 5), groups))
    draw_curves(ax, ours, "ours", OURS, marker=".")
    title = "walker-walk, 16 environments, ratio 1,024"
    finish(ax, title, "agent steps", "return, mean of 16 episodes")


def walker_metric(ax: Axes, results: Results, name: str, others: list[str]) -> None:
    """A metric of our runs and of the official ones that have it, which are means over windows of
    up to 4,000 updates; windows that begin before update 10,000."""
    our_runs = [*compare.WALKER, compare.WALKER_ROUNDED]
    names = [compare.WALKER_OFFICIAL, *others, *our_runs, compare.WALKER_EXACT]
    results.check(names, compare.WALKER_TOLERATES)
    (key,) = compare.WALKER_METRICS[name]
    data = results.read(compare.WALKER_OFFICIAL, "_losses")
    windows = []
    for seed in range(3):
        rows = data["seed"] == seed
        windows.append((data["env_step"][rows], data[key][rows]))
    for other in others:
        data = results.read(other, "_losses")
        windows.append((data["env_step"], data[key]))
    for i, (steps, values) in enumerate(windows):
        edges = np.append(0, steps - 2048)  # one update a step
        count = np.searchsorted(edges, 10_000)  # windows that begin before
        label = None if i else "official, means over windows"
        ax.stairs(values[:count], edges[: count + 1], baseline=None, color=OFFICIAL, label=label)
    ours = middle(metric(results, our_runs, "updates", name))
    draw_curves(ax, ours, "ours, rounded", OURS)
    exact = middle(metric(results, [compare.WALKER_EXACT], "updates", name))
    draw_curves(ax, exact, "ours, exact", EXACT)
    finish(ax, name, "updates", "")


def walker_walk(results: Results) -> Figure:
    """Returns, critic loss and entropy of walker-walk."""
    figure, axes = panels(3)
    walker_returns(axes[0], results)
    walker_metric(axes[1], results, "losses/critic", compare.WALKER_OTHERS)
    walker_metric(axes[2], results, "behavior/actor_entropy", [])
    return figure


# === Figures without official runs ================================================================
def episodes_figure(results: Results, names: list[str], title: str, window: int) -> Figure | None:
    """Returns of training episodes as dots, and means of `window` of them as lines; None if there
    are no runs."""
    figure, (ax,) = panels(1)
    notes = []
    for name in names:
        episodes = results.read(name)
        if episodes is None:
            continue
        (run,) = results.runs([name])
        notes.append(run["notes"])
        steps = episodes["frames"]
        means = running_mean(episodes["return"], window)
        (line,) = ax.plot(steps, means, label=f"seed {run['seed']}")
        ax.plot(steps, episodes["return"], ".", color=line.get_color(), alpha=0.4, markersize=4)
    if not notes:
        return None
    if notes[0].startswith("older run"):
        title += " (older run)"
    finish(ax, title, "environment steps", f"return, mean of {window} episodes")
    return figure


def demo(results: Results) -> Figure | None:
    """The first command of the README."""
    names = [f"CartPole-v1__demo_seed{seed}" for seed in (1, 2, 3)]
    return episodes_figure(results, names, "The demo of the README", window=5)


def pong(results: Results) -> Figure | None:
    """A run of Atari Pong."""
    return episodes_figure(results, ["ALE-Pong-v5__seed1_12m"], "ALE/Pong-v5, 12m", window=20)


def learning(results: Results) -> Figure:
    """The overview of the README."""
    figure, axes = panels(3)
    cartpole_returns(axes[0], results)
    cartpole_value(axes[1], results)
    finger_returns(axes[2], results)
    return figure


def panels(count: int, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure with panels, row by row."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure((4.5 * columns, 3.4 * rows), dpi=100, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    return figure, axes


FIGURES: list[Callable[[Results], Figure | None]] = [
    learning,
    finger_spin,
    cartpole_16envs,
    walker_walk,
    cartpole,
    demo,
    pong,
]


def draw(results: Results, folder: Path) -> None:
    """Draw every figure into the folder."""
    for function in FIGURES:
        figure = function(results)
        if figure is not None:
            figure.savefig(folder / f"{function.__name__}.png")


if __name__ == "__main__":
    draw(Results(), HERE)
