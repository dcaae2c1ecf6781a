"""Compare our runs with the official ones by the rules of protocols.md: python results/compare.py

`check` is the gate: it refuses runs whose rows of protocols.csv differ in a column that the rule
does not name as tolerated. Then the statistics and verdicts of the rules are printed, one table for
each comparison, below the protocols of its runs, or one line where runs are missing.

Where a rule leaves something open, it is settled here, before the runs: a rule on windows holds for
every seed, except in comparison 2, which takes the mean over seeds. A mean over 50 updates stands
for the update in its middle, as the official means over a minute do. Our windows of 250 updates
that lie across the border of an official window count with their share of updates. Metrics that
are defined differently there are left out: the imagined reward and the advantage in comparison 2.
"""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
from extract import WINDOW, mean_over

HERE = Path(__file__).parent
MISSING = "not yet"  # not run, or not far enough

# the columns of protocols.csv that a comparison compares; the others say which run it is
PROTOCOL = [
    "environment",
    "size",
    "envs",
    "train_ratio",
    "action_repeat",
    "windows",
    "actor_unimix",
    "twohot_mean",
    "precision",
    "learning_starts",
    "axis",
    "returns",
    "other",
]

ROUNDED = [f"dm_control-finger-spin-v0__parity_rounded_seed{seed}" for seed in (1, 2, 3)]
EXACT = [f"dm_control-finger-spin-v0__parity_exact_seed{seed}" for seed in (1, 2, 3)]
FINGER = [f"finger-spin__official_seed{seed}" for seed in (1, 2, 3)]
FINGER_EXACT = "finger-spin__official_exact_mean_seed1"
CARTPOLE = "CartPole-v1__parity_rounded_seed1"
CARTPOLE_OFFICIAL = "CartPole-v1__official_seed1"
CARTPOLE_DEFAULT = "CartPole-v1__default_seed1"
CARTPOLE_16 = [f"CartPole-v1__parity_16envs_seed{seed}" for seed in (1, 2, 3, 4, 5)]
CARTPOLE_16_OFFICIAL = "cartpole_16envs_official"
CARTPOLE_16_LOSSES = "cartpole_16envs_official_3seeds"
WALKER = [f"dm_control-walker-walk-v0__parity_ratio1024_seed{seed}" for seed in (1, 2)]
WALKER_OFFICIAL = "walker_walk_official_3seeds"
# the figure has their critic losses
WALKER_OTHERS = [
    "walker_walk_official_a6000",
    "walker_walk_official_a100_seed7",
    "walker_walk_official_a100_first",
]
WALKER_ROUNDED = "dm_control-walker-walk-v0__first_steps_rounded_seed1"
WALKER_EXACT = "dm_control-walker-walk-v0__first_steps_exact_seed1"

# what the rule of a comparison tolerates
ROUNDING_TOLERATES = ["twohot_mean"]
CARTPOLE_16_TOLERATES = ["other"]
WALKER_TOLERATES = ["precision", "other", "twohot_mean"]
DEFAULT_TOLERATES = ["train_ratio", "windows", "actor_unimix", "learning_starts", "precision"]

FINGER_METRICS = {
    "behavior/advantage_mag": "adv_mag",
    "behavior/actor_entropy": "ent_action",
    "behavior/value_mean": "val",
    "losses/critic": "loss_value",
}
CARTPOLE_16_METRICS = {
    "losses/recon": "rec_loss",
    "losses/reward": "rew_loss",
    "losses/continue": "con_loss",
    "losses/dyn": "dyn_loss",
    "losses/actor": "actor_loss",
    "losses/critic": "critic_loss",
    "losses/replay_critic": "repval_loss",
    "losses/total": "opt_loss",
    "behavior/actor_entropy": "ent/action/mean",
    "behavior/value_mean": "val/mean",
    "behavior/return_mean": "ret/mean",
    "behavior/return_scale": "retnorm_scale_derived",
    "world_model/prior_entropy": "prior_ent/mean",
    "world_model/posterior_entropy": "post_ent/mean",
    "optim/grad_norm": "opt_grad_norm",
}
# updates at which their windows of 2,000 agent steps end
CARTPOLE_16_BORDERS = [0, *range(480, 10_000, 1000)]
WALKER_METRICS = {
    "losses/recon": ["rec_height", "rec_orientations", "rec_velocity"],
    "losses/reward": ["rew"],
    "losses/continue": ["con"],
    "losses/dyn": ["dyn"],
    "losses/actor": ["policy"],
    "losses/critic": ["value"],
    "losses/replay_critic": ["repval"],
    "losses/total": ["total"],
    "behavior/actor_entropy": ["ent_action"],
    "behavior/advantage_mag": ["adv_mag"],
    "behavior/value_mean": ["val"],
    "behavior/return_mean": ["tar"],
    "behavior/reward_mean": ["rew_pred"],
    "behavior/continue_mean": ["con_pred"],
    "world_model/prior_entropy": ["dyn_ent"],
    "world_model/posterior_entropy": ["rep_ent"],
    "optim/grad_norm": ["grad_norm"],
}

# state: the runs of the official program and of ours that continue it
SAME_STATE = {
    "A": ["same_state_A_official", "same_state_A_ours"],
    "B": ["same_state_B_official", "same_state_B_ours"],
}
ENTROPY = "behavior/actor_entropy"
KNOWN_SEED = 11  # its pair was known when the rule was written
LEFT_OUT_IN_B = [
    "losses/actor",
    "behavior/value_mean",
    "behavior/return_mean",
    "behavior/reward_mean",
]


# === The gate =====================================================================================
class Results:
    """The CSVs of a results folder and the rows of its protocols.csv."""

    def __init__(self, folder: Path = HERE):
        self.folder = folder
        with open(folder / "protocols.csv") as file:
            self.rows = list(csv.DictReader(file))

    def runs(self, names: list[str]) -> list[dict[str, str]]:
        """The rows of these runs. A name that stands for several seeds has a row for each."""
        known = {row["run"] for row in self.rows}
        for name in names:
            if name not in known:
                raise ValueError(f"{name} has no row in protocols.csv")
        return [row for name in names for row in self.rows if row["run"] == name]

    def path(self, name: str, suffix: str = "") -> Path:
        """The file {name}{suffix}.csv of a run."""
        official = self.runs([name])[0]["code"] == "official"
        folder = self.folder / "official" if official else self.folder
        return folder / f"{name}{suffix}.csv"

    def read(self, name: str, suffix: str = "") -> dict[str, np.ndarray] | None:
        """The columns of a file of a run by their names; None if there is no such file."""
        path = self.path(name, suffix)
        return read_csv(path) if path.exists() else None

    def exist(self, names: list[str]) -> list[bool]:
        """Whether each of these runs has a file."""
        found = []
        for name in names:
            paths = [self.path(name, suffix) for suffix in ("", "_losses", "_evals")]
            found.append(any(path.exists() for path in paths))
        return found

    def check(self, names: list[str], tolerated: list[str]) -> list[dict[str, str]]:
        """The rows of runs that may be compared; ValueError if they may not."""
        runs = self.runs(names)
        check(runs, tolerated)
        return runs


def check(runs: list[dict[str, str]], tolerated: list[str]) -> None:
    """Raise a ValueError if the protocols of two runs differ in a column that is not tolerated."""
    for column in PROTOCOL:
        if column in tolerated:
            continue
        for run in runs[1:]:
            if run[column] != runs[0][column]:
                raise ValueError(
                    f"{runs[0]['run']} and {run['run']} cannot be compared: {column} is "
                    f"{runs[0][column]!r} and {run[column]!r}"
                )


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns by name, as numbers where they are."""
    with open(path) as file:
        rows = list(csv.reader(file))
    columns = {}
    for i, name in enumerate(rows[0]):
        column = np.array([row[i] for row in rows[1:]])
        try:
            columns[name] = column.astype(float)
        except ValueError:
            columns[name] = column
    return columns


# === Statistics ===================================================================================
def permutation_test(ours: list[float], theirs: list[float]) -> float:
    """The share of all splits whose means differ at least as much as those of the two groups."""
    everything = np.array([*ours, *theirs])
    observed = abs(np.mean(ours) - np.mean(theirs))
    as_large = 0
    splits = list(itertools.combinations(range(len(everything)), len(ours)))
    for split in splits:
        group = everything[list(split)]
        rest = np.delete(everything, list(split))
        as_large += abs(group.mean() - rest.mean()) >= observed - 1e-9
    return as_large / len(splits)


def widened_range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[min - w, max + w] with w = max - min over the first axis, which is that of the seeds."""
    low = np.min(values, 0)
    high = np.max(values, 0)
    width = high - low
    return low - width, high + width


def first_passing(steps: np.ndarray, returns: np.ndarray, level: float = 50) -> float:
    """The step at which the mean of 5 successive episodes is first above the level, or inf."""
    for i in range(4, len(returns)):
        if returns[i - 4 : i + 1].mean() > level:
            return float(steps[i])
    return math.inf


def step_means(steps: np.ndarray, returns: np.ndarray, width: int, count: int) -> np.ndarray:
    """Mean returns of the episodes that end in each of `count` intervals of `width` steps."""
    means = np.full(count, np.nan)
    for i in range(count):
        inside = (steps > i * width) & (steps <= (i + 1) * width)
        if inside.any():
            means[i] = returns[inside].mean()
    return means


def update_windows(updates: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """The first `count` update windows: means of the values whose update lies in each, or nan."""
    means = np.full(count, np.nan)
    window = np.ceil(updates / WINDOW) - 1
    for i in range(count):
        if (window == i).any():
            means[i] = values[window == i].mean()
    return means


def largest_fall(values: np.ndarray) -> float:
    """The largest fall of a value below an earlier one, as a share of that one."""
    highest = np.maximum.accumulate(values)
    return float(np.max(1 - values / highest))


class Count:
    """How many of our values lie in a range; values that official runs do not have are left out."""

    def __init__(self, values: np.ndarray, low: np.ndarray, high: np.ndarray):
        wanted = np.isfinite(low)
        values = values[wanted]
        self.needed = len(values)
        self.known = int(np.isfinite(values).sum())  # our runs may not be that far
        self.complete = self.known == self.needed
        self.hits = int(((values >= low[wanted]) & (values <= high[wanted])).sum())

    def __str__(self) -> str:
        if self.complete:
            return f"{self.hits} of {self.needed}"
        return f"{self.hits} of {self.known} so far"


def verdict(counts: list[Count | None], share: float, yes: str, no: str) -> str:
    """`yes` if each count is at least this share of what is needed."""
    if None in counts:
        return MISSING
    if not all(count.complete for count in counts):
        return "incomplete"
    holds = all(count.hits >= share * count.needed for count in counts)
    return yes if holds else no


# === Tables =======================================================================================
def table(rows: list[list]) -> str:
    """A Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def protocol_table(runs: list[dict[str, str]]) -> str:
    """The protocols of the runs of a comparison; runs that differ only in seed share a row."""
    groups = {}
    for run in runs:
        key = (run["code"], run["commit"], *(run[column] for column in PROTOCOL))
        groups.setdefault(key, []).append(run["seed"])
    columns = [column for column in PROTOCOL if any(run[column] for run in runs)]
    rows = [["runs", *columns]]
    for key, seeds in groups.items():
        protocol = dict(zip(PROTOCOL, key[2:], strict=True))
        plural = "seeds" if len(seeds) > 1 else "seed"
        name = f"{key[0]} {key[1]}".strip() + f", {plural} " + ", ".join(seeds)
        rows.append([name, *(protocol[column] for column in columns)])
    return table(rows)


def listing(values: list) -> str:
    """The values of several seeds in one cell: numbers, counts, or None for missing runs."""
    if all(value is None for value in values):
        return MISSING
    return "; ".join(number(value) for value in values)


def number(value: float | Count | None) -> str:
    """A number of at most four digits, or of thousands with a comma."""
    if value is None:
        return MISSING
    if isinstance(value, Count):
        return str(value)
    if math.isnan(value):
        return "left out"
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def interval(low: float, high: float) -> str:
    """A range in one cell."""
    return f"{number(low)} to {number(high)}"


HEADER = ["statistic", "official", "rule", "ours, by seed", "verdict"]
NOT_RUN = "Not run yet."


# === 1. The rounding in the mean of a twohot ======================================================
def compare_rounding(results: Results) -> str:
    """The ablation on finger-spin, the fall of the value on CartPole, walker-walk's actions."""
    results.check([FINGER[0], *ROUNDED], [])
    results.check([FINGER_EXACT, *EXACT], [])
    names = [FINGER[0], FINGER_EXACT, *ROUNDED, *EXACT]
    runs = results.check(names, ROUNDING_TOLERATES)
    rows = [HEADER, *first_updates(results), *ablation_returns(results), value_fall(results)]
    runs += results.check([CARTPOLE_OFFICIAL, CARTPOLE], [])
    rows += mean_actions(results)
    rows += official_form(results)
    names = [WALKER_OFFICIAL, WALKER_ROUNDED, WALKER_EXACT]
    results.check(names, WALKER_TOLERATES)  # their protocols are in the table of 3
    tables = [protocol_table(runs), table(rows), ablation_table(results)]
    return "\n\n".join(["## 1. The rounding in the mean of a twohot", *tables])


def first_updates(results: Results) -> list[list]:
    """Rows on the first 1,000 updates, rounded seeds against the official seed 1."""
    official = results.read(FINGER[0], "_losses")
    rows = []
    rules = [
        ("behavior/advantage_mag", "within 15 % in each window to 1,000", 0, "15 %"),
        ("losses/critic", "within 20 % in each window from 250 to 1,000", 1, "20 %"),
        ("behavior/actor_entropy", "within 0.02 in each window to 1,000", 0, "0.02"),
    ]
    for name, rule, first, limit in rules:
        theirs = update_windows(official["opt_updates"], official[FINGER_METRICS[name]], 4)[first:]
        width = np.full(len(theirs), 0.02)
        if limit.endswith("%"):
            width = theirs * float(limit.removesuffix(" %")) / 100
        counts = []
        for run in ROUNDED:
            ours = our_windows(results, run, name, 4)
            inside = None
            if ours is not None:
                inside = Count(ours[first:], theirs - width, theirs + width)
            counts.append(inside)
        holds = verdict(counts, 1, "holds", "fails")
        rows.append([name, listing(list(theirs)), rule, listing(counts), holds])
    updates = [advantage_falls(results, run) for run in ROUNDED]
    holds = MISSING
    if None not in updates:
        holds = "holds" if all(abs(x - 1280) <= 150 for x in updates) else "fails"
    name = "first update after 500 with advantage_mag below 0.08"
    rows.append([name, "1,280", "within 150", listing(updates), holds])
    return rows


def our_windows(results: Results, run: str, name: str, count: int) -> np.ndarray | None:
    """The first `count` update windows of a metric of one of our runs."""
    losses = results.read(run, "_losses")
    if losses is None:
        return None
    return update_windows(losses["updates"], losses[name], count)


def advantage_falls(results: Results, run: str) -> float | None:
    """The middle of the first 50 updates after 500 in which advantage_mag is below 0.08."""
    records = results.read(run, "_advantage")
    if records is None:
        return None
    begins = np.concatenate([[0], records["updates"][:-1]])
    low = (begins >= 500) & (records["advantage_mag"] < 0.08)
    if not low.any():
        return math.inf
    first = int(np.argmax(low))
    return float((begins[first] + records["updates"][first]) / 2)


def passing_and_end(
    results: Results, run: str, until: float = math.inf, least: float = 24_000
) -> tuple:
    """The step at which the mean of 5 episodes passes 50, and the mean of the last 10 episodes;
    None where a run that has not come to `least` agent steps does not tell yet."""
    episodes = results.read(run)
    if episodes is None:
        return None, None
    inside = episodes["global_step"] <= until
    steps = episodes["global_step"][inside]
    returns = episodes["return"][inside]
    passes = first_passing(steps, returns)
    if episodes["global_step"][-1] < least:
        return None if math.isinf(passes) else passes, None
    return passes, float(returns[-10:].mean())


def least_end(results: Results, run: str) -> float | None:
    """The least that the mean of the last 10 episodes of a finger-spin run can be at 25,000 agent
    steps: episodes of 501 steps that it has not come to count 0, since no reward is negative."""
    episodes = results.read(run)
    if episodes is None:
        return None
    missing = max(0, int((25_000 - episodes["global_step"][-1]) // 501))
    if missing >= 10:
        return 0.0
    return float(episodes["return"][missing - 10 :].sum() / 10)


def end_cell(end: float | None, least: float | None) -> str:
    """The mean of a run's last 10 episodes, or its bound where the run ended early."""
    if end is None and least is not None:
        return f"at least {number(least)}"
    return number(end)


def separation(low: list[float | None], high: list[float | None], yes: str) -> str:
    """`yes` if every number of `low` is below every one of `high`; one pair that is not decides."""
    pairs = itertools.product(low, high)
    if any(None not in pair and pair[0] >= pair[1] for pair in pairs):
        return "not separated"
    return MISSING if None in low + high else yes


def ablation_returns(results: Results) -> list[list]:
    """Rows on the returns of rounded and exact runs."""
    rounded = [passing_and_end(results, run) for run in ROUNDED]
    exact = [passing_and_end(results, run) for run in EXACT]
    official = passing_and_end(results, FINGER[0])
    crossed = passing_and_end(results, FINGER_EXACT, least=14_500)
    rises = [[run[0] for run in rounded], [run[0] for run in exact]]
    ends = [[run[1] for run in rounded], [run[1] for run in exact]]
    earlier = separation(rises[0], rises[1], "rounded rises earlier")
    higher = separation(ends[1], ends[0], "rounded ends higher")
    least = [least_end(results, run) for run in ROUNDED]
    if separation(ends[1], least, "higher") == "higher":  # whatever the missing episodes are
        higher = "rounded ends higher"
    cells = [end_cell(end, bound) for end, bound in zip(ends[0], least, strict=True)]
    passes = "agent step at which the mean of 5 episodes passes 50"
    last = "mean return of the last 10 episodes"
    rows = [
        [f"{passes}: rounded", number(official[0]), "each before each exact", listing(rises[0])],
        [f"{passes}: exact", number(crossed[0]), "", listing(rises[1])],
        [f"{last}: rounded", number(official[1]), "each above each exact", "; ".join(cells)],
        [f"{last}: exact", number(crossed[1]), "", listing(ends[1])],
    ]
    verdicts = [earlier, "", higher, ""]
    episodes = results.read(FINGER_EXACT)
    if episodes is not None:
        until = float(episodes["global_step"][-1])
        if crossed[0] == math.inf:
            rows[1][1] = f"not by step {number(until)}"
        there = passing_and_end(results, FINGER[0], until)[1]
        rows[3][1] += f" at step {number(until)}, where the official seed 1 has {number(there)}"
    return [[*row, verdict] for row, verdict in zip(rows, verdicts, strict=True)]


def ablation_table(results: Results) -> str:
    """Training returns of every run on finger-spin: means of the episodes that end in each 2,500
    agent steps, and the step at which the mean of 5 episodes passes 100 and 150."""
    groups = [
        ("official, rounded", FINGER[:1]),
        ("ours, rounded", ROUNDED),
        ("official, exact", [FINGER_EXACT]),
        ("ours, exact", EXACT),
    ]
    ends = [f"{end:,}" for end in range(2500, 25_001, 2500)]
    rows = [["mean return to step", *ends, "passes 100", "150"]]
    for kind, runs in groups:
        for seed, run in enumerate(runs, 1):
            episodes = results.read(run)
            if episodes is None:
                continue
            means = finger_steps(results, run)
            cells = ["" if math.isnan(mean) else f"{mean:.0f}" for mean in means]
            for level in (100, 150):
                step = first_passing(episodes["global_step"], episodes["return"], level)
                cells.append("" if math.isinf(step) else number(step))
            rows.append([f"{kind}, seed {seed}", *cells])
    return table(rows)


def value_fall(results: Results) -> list:
    """A row: does the value of CartPole fall between 3,000 and 4,500 updates?"""
    official = results.read(CARTPOLE_OFFICIAL, "_losses")
    windows = update_windows(official["updates"], official["value_mean"], 18)[12:]
    theirs = largest_fall(windows)
    ours = our_windows(results, CARTPOLE, "behavior/value_mean", 18)
    name = "CartPole-v1: fall of value_mean between 3,000 and 4,500 updates"
    if ours is None:
        return [name, f"{100 * theirs:.0f} %", "15 % or more", MISSING, MISSING]
    fall = largest_fall(ours[12:])
    comes_back = "comes back" if fall >= 0.15 else "does not come back"
    return [name, f"{100 * theirs:.0f} %", "15 % or more", f"{100 * fall:.0f} %", comes_back]


def mean_actions(results: Results) -> list[list]:
    """Rows on walker-walk's mean action after 2,000 updates, with and without the rounding."""
    rows = []
    for form, run in (("rounded", WALKER_ROUNDED), ("exact", WALKER_EXACT)):
        actions = results.read(run, "_actions")
        largest = None
        if actions is not None:
            (last,) = np.flatnonzero(actions["global_step"] == 4096)
            means = [actions[name][last] for name in actions if name.startswith("action_")]
            largest = float(np.abs(means).max())
        name = f"walker-walk: largest component of the mean action, steps 3,585 to 4,096: {form}"
        rows.append([name, "not known", "none", number(largest), "none"])
    return rows


def official_form(results: Results) -> list[list]:
    """Rows on the form of the mean in official runs on a GPU: two means of their first window."""
    data = results.read(WALKER_OFFICIAL, "_losses")
    noise = data["adv_mag"] - data["adv"]
    entropies = data["ent_action"].reshape(3, 7)[:, 0]
    noises = noise.reshape(3, 7)[:, 0]
    rounded = first_window(results, WALKER_ROUNDED)
    exact = first_window(results, WALKER_EXACT)
    form = MISSING
    cells = [MISSING, MISSING]
    if rounded is not None and exact is not None:
        form = nearer_form(entropies, noises, rounded, exact)
        cells = []
        for i in range(2):
            cells.append(f"rounded {number(rounded[i])}; exact {number(exact[i])}")
    name = "walker-walk, updates 1 to 3,808: "
    return [
        [name + "actor_entropy", listing(list(entropies)), "nearer to a form", cells[0], form],
        [name + "adv_mag - adv", listing(list(noises)), "nearer to the same", cells[1], ""],
    ]


def first_window(results: Results, run: str) -> tuple[float, float] | None:
    """The actor's entropy and the noise of the advantage over updates 1 to 3,808, of which our
    windows have those to 3,750 at least."""
    losses = results.read(run, "_losses")
    if losses is None or losses["updates"][-1] < 3750:
        return None
    ends = losses["updates"]
    gain = losses["behavior/return_mean"] - losses["behavior/value_mean"]
    noise = losses["behavior/advantage_mag"] - gain / losses["behavior/return_scale"]
    means = []
    for values in (losses["behavior/actor_entropy"], noise):
        means.append(mean_over(ends - WINDOW, ends, values, 0, 3808))
    return means[0], means[1]


def nearer_form(
    entropies: np.ndarray,
    noises: np.ndarray,
    rounded: tuple[float, float],
    exact: tuple[float, float],
) -> str:
    """The form that all official seeds are nearer to; entropy and noise of each of our forms."""
    to_rounded = abs(entropies - rounded[0])
    to_exact = abs(entropies - exact[0])
    noise_to_rounded = abs(noises - rounded[1])
    noise_to_exact = abs(noises - exact[1])
    if (3 * to_exact < to_rounded).all() and (noise_to_exact < noise_to_rounded).all():
        return "exact"
    if (3 * to_rounded < to_exact).all() and (noise_to_rounded < noise_to_exact).all():
        return "rounded"
    return "undecided"


# === 2. CartPole-v1 with 16 environments ==========================================================
def compare_cartpole_16envs(results: Results) -> str:
    """Evaluations against five official seeds, losses against three."""
    runs = results.check([CARTPOLE_16_OFFICIAL, *CARTPOLE_16], CARTPOLE_16_TOLERATES)
    # no returns are compared with these three
    losses = [CARTPOLE_16_LOSSES, *CARTPOLE_16]
    results.check(losses, [*CARTPOLE_16_TOLERATES, "returns"])
    title = "## 2. CartPole-v1 with 16 environments"
    if not any(results.exist(CARTPOLE_16)):
        return f"{title}\n\n{NOT_RUN}"
    official = official_evaluations(results)
    theirs = [late_mean(steps, returns) for steps, returns in official]
    ours = []
    for run in CARTPOLE_16:
        evaluations = results.read(run, "_evals")
        mean = None
        if evaluations is not None:
            mean = late_mean(evaluations["global_step"], evaluations["return"])
        ours.append(mean)
    equal = MISSING
    if None not in ours:
        p = permutation_test(ours, theirs)
        equal = f"p = {p:.3f}: " + ("equal" if p > 0.05 else "not equal")
    name = "mean of the evaluations from 12,000 to 24,000 steps"
    rows = [HEADER, [name, listing(theirs), "p > 0.05", listing(ours), equal]]
    rows.append(cartpole_16envs_windows(results))
    tables = [protocol_table(runs), table(rows)]
    return "\n\n".join([title, *tables])


def official_evaluations(results: Results) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps and evaluations of each official seed."""
    data = results.read(CARTPOLE_16_OFFICIAL, "_evals")
    curves = []
    for seed in np.unique(data["seed"]):
        rows = data["seed"] == seed
        curves.append((data["agent_step"][rows], data["mean_return"][rows]))
    return curves


def late_mean(steps: np.ndarray, returns: np.ndarray) -> float | None:
    """The mean of the 31 evaluations from 12,000 to 24,000 steps; None if one is missing."""
    late = (steps >= 12_000) & (steps <= 24_000)
    return float(returns[late].mean()) if late.sum() == 31 else None


def cartpole_16envs_windows(results: Results) -> list:
    """A row on the windows of 2,000 steps: of each metric, how many means over our seeds are in the
    widened range of three official seeds."""
    data = results.read(CARTPOLE_16_LOSSES, "_losses")
    losses = [results.read(run, "_losses") for run in CARTPOLE_16]
    losses = [x for x in losses if x is not None]  # of the runs that are there
    counts = {}
    for name, key in CARTPOLE_16_METRICS.items():
        here = data["metric"] == key
        low, high = widened_range(np.stack([data["min"][here], data["max"][here]]))
        if losses:
            seeds = [between(run, name, CARTPOLE_16_BORDERS) for run in losses]
            counts[name.split("/")[1]] = Count(np.mean(seeds, 0), low, high)
    cell = MISSING
    if counts:
        hits = ", ".join(f"{name} {count.hits}" for name, count in counts.items())
        known = min(count.known for count in counts.values())
        cell = f"{hits} of {known} windows, seeds: {len(losses)}"
    failed = [x for x, count in counts.items() if verdict([count], 0.8, "yes", "no") == "no"]
    agree = "fails: " + ", ".join(failed) if failed else "all agree"
    complete = all(count.complete for count in counts.values())
    if len(losses) < len(CARTPOLE_16) or not complete:
        agree = MISSING
    name = "windows of 2,000 steps in range, by metric"
    return [name, "", "8 of 10", cell, agree]


def between(losses: dict[str, np.ndarray], name: str, borders: list[float]) -> np.ndarray:
    """Means of one of our metrics over the updates between successive borders; nan if not all."""
    ends = losses["updates"]
    means = []
    for begin, end in itertools.pairwise(borders):
        mean = mean_over(ends - WINDOW, ends, losses[name], begin, end)
        means.append(mean if end <= ends[-1] else math.nan)
    return np.array(means)


# === 3. walker-walk ===============================================================================
# agent steps after which the episodes of all 16 environments end together; the program writes an
# episode down 16 steps before, when its last action is taken, and a run that was paused after the
# end of its episodes is up to 64 steps late
GROUP = 16_016


def compare_walker(results: Results) -> str:
    """Groups of training returns, and windows to 30,000 steps, against three official seeds."""
    title = "## 3. walker-walk with 16 environments, train ratio 1,024"
    runs = results.check([WALKER_OFFICIAL, *WALKER], WALKER_TOLERATES)
    runs += results.check([*WALKER_OTHERS, WALKER_ROUNDED, WALKER_EXACT], WALKER_TOLERATES)
    if not any(results.exist(WALKER)):
        return f"{title}\n\n{protocol_table(runs)}\n\n{NOT_RUN}"
    theirs = official_groups(results)
    low, high = widened_range(theirs)
    ours = [our_groups(results, run) for run in WALKER]
    rows = [HEADER]
    for i in range(4):
        wanted = ours if i < 2 else ours[:1]
        means = [None if groups is None else groups[i] for groups in wanted]
        counts = []
        for mean in means:
            value = (
                None if mean is None else Count(np.array([mean]), low[i : i + 1], high[i : i + 1])
            )
            counts.append(value)
        name = f"mean return of the 16 episodes that end at {GROUP * (i + 1):,}"
        rule = f"each in {interval(low[i], high[i])}"
        holds = verdict(counts, 1, "in range (weak)", "not in range")
        rows.append([name, listing(list(theirs[:, i])), rule, listing(means), holds])
    rows += walker_windows(results)
    tables = [protocol_table(runs), table(rows)]
    return "\n\n".join([title, *tables])


def official_groups(results: Results) -> np.ndarray:
    """Mean returns of the first 12 groups of 16 episodes: (seeds, groups)."""
    data = results.read(WALKER_OFFICIAL)
    groups = []
    for seed in np.unique(data["seed"]):
        rows = data["seed"] == seed
        groups.append(step_means(data["agent_step"][rows], data["return"][rows], GROUP, 12))
    return np.array(groups)


def our_groups(results: Results, run: str) -> np.ndarray | None:
    """Mean returns of four groups of 16 episodes; nan where they do not end together."""
    episodes = results.read(run)
    if episodes is None:
        return None
    means = np.full(4, np.nan)
    steps = episodes["global_step"]
    for i in range(4):
        together = np.abs(steps - GROUP * (i + 1)) <= 64
        if together.sum() == 16 and len(np.unique(steps[together])) == 1:
            means[i] = episodes["return"][together].mean()
    return means


def walker_windows(results: Results) -> list[list]:
    """Rows on the seven windows to 30,000 steps."""
    data = results.read(WALKER_OFFICIAL, "_losses")
    ends = (data["env_step"] - 2048).reshape(3, 7).mean(0)
    borders = [0, *ends]
    losses = [results.read(run, "_losses") for run in WALKER]
    rows = []
    for name, keys in WALKER_METRICS.items():
        values = np.sum([data[key] for key in keys], 0)
        low, high = widened_range(values.reshape(3, 7))
        counts = []
        for run in losses:
            count = None
            if run is not None:
                count = Count(between(run, name, borders), low, high)
            counts.append(count)
        agrees = verdict(counts, 5 / 7, "agrees", "fails")
        rows.append([name, "", "5 of 7 windows", listing(counts), agrees])
    return rows


# === 4. finger-spin ===============================================================================
def compare_finger(results: Results) -> str:
    """Rounded runs against three official seeds: returns by 2,500 steps, and update windows."""
    runs = results.check([*FINGER, *ROUNDED], [])
    title = "## 4. finger-spin with one environment"
    if not all(results.exist(FINGER)):
        return f"{title}\n\n{NOT_RUN}"
    rows = [HEADER, *finger_returns(results), *finger_windows(results)]
    tables = [protocol_table(runs), table(rows)]
    return "\n\n".join([title, *tables])


def finger_steps(results: Results, run: str) -> np.ndarray | None:
    """The mean returns of ten intervals of 2,500 agent steps."""
    episodes = results.read(run)
    if episodes is None:
        return None
    return step_means(episodes["global_step"], episodes["return"], 2500, 10)


def finger_returns(results: Results) -> list[list]:
    """Two rows: returns in ten intervals, and the step at which they pass 50."""
    low, high = widened_range(np.array([finger_steps(results, run) for run in FINGER]))
    counts = []
    for run in ROUNDED:
        ours = finger_steps(results, run)
        counts.append(None if ours is None else Count(ours, low, high))
    name = "mean returns by 2,500 agent steps"
    holds = verdict(counts, 0.8, "in range (weak)", "not in range")
    steps = [name, "", "8 of 10 in range", listing(counts), holds]

    theirs = [passing_and_end(results, run)[0] for run in FINGER]
    ours = [passing_and_end(results, run)[0] for run in ROUNDED]
    low, high = widened_range(np.array(theirs))
    holds = MISSING
    if None not in ours:
        inside = all(low <= value <= high for value in ours)
        holds = "in range (weak)" if inside else "not in range"
    name = "agent step at which the mean of 5 episodes passes 50"
    rule = f"each in {interval(low, high)}"
    return [steps, [name, listing(theirs), rule, listing(ours), holds]]


def finger_windows(results: Results) -> list[list]:
    """Rows on the update windows to 10,000 updates."""
    rows = []
    for name, key in FINGER_METRICS.items():
        theirs = []
        for run in FINGER:
            data = results.read(run, "_losses")
            theirs.append(update_windows(data["opt_updates"], data[key], 40))
        low, high = widened_range(np.array(theirs))
        counts = []
        for run in ROUNDED:
            ours = our_windows(results, run, name, 40)
            counts.append(None if ours is None else Count(ours, low, high))
        agrees = verdict(counts, 0.8, "agrees", "fails")
        rows.append([name, "", "80 % of windows", listing(counts), agrees])
    return rows


# === 5. What users run ============================================================================
def compare_default(results: Results) -> str:
    """CartPole-v1 with every other flag at its default, shown with the official run; no rule."""
    names = [CARTPOLE_OFFICIAL, CARTPOLE_DEFAULT]
    runs = results.check(names, DEFAULT_TOLERATES)
    official = results.read(CARTPOLE_OFFICIAL)
    ours = results.read(CARTPOLE_DEFAULT)
    rows = [HEADER]
    for first in range(0, 20_000, 4000):
        cells = []
        for episodes in (official, ours):
            mean = None
            if episodes is not None:
                steps = episodes["global_step"] - first
                mean = step_means(steps, episodes["return"], 4000, 1)[0]
            cells.append(number(mean))
        name = f"mean return of the episodes that end from {first:,} to {first + 4000:,}"
        rows.append([name, cells[0], "none", cells[1], "none" if ours else MISSING])
    tables = [protocol_table(runs), table(rows)]
    title = "## 5. What users run: CartPole-v1, one environment, other flags at their defaults"
    return "\n\n".join([title, *tables])


# === 6. One state, both programs ==================================================================
def compare_same_state(results: Results) -> str:
    """Both programs continued from one state of an official run, on its buffer, without acting."""
    runs = []
    rows = [["state", "rule", "equal", "smallest ours / official", "largest", "verdict"]]
    for state, names in SAME_STATE.items():
        runs += results.check(names, [])
        official = seed_means(results, names[0])
        ours = seed_means(results, names[1])
        cells = [MISSING, MISSING, MISSING, MISSING]
        if official and ours:
            cells = same_state(state, official, ours)
        rows.append([state, "each within 5 %, the entropy within 0.05", *cells])
    tables = [protocol_table(runs), table(rows)]
    return "\n\n".join(["## 6. One state, both programs", *tables])


def seed_means(results: Results, run: str) -> dict[str, float] | None:
    """The mean of every metric over the first 400 updates of all seeds of the rule."""
    data = results.read(run, "_losses")
    if data is None:
        return None
    rows = (data["updates"] <= 400) & (data["seed"] != KNOWN_SEED)
    metrics = [name for name in data if name not in ("seed", "updates")]
    return {metric: float(data[metric][rows].mean()) for metric in metrics}


def same_state(state: str, official: dict[str, float], ours: dict[str, float]) -> list[str]:
    """The cells of a state: how many metrics are equal, and the two that are the furthest apart."""
    metrics = [m for m in official if state == "A" or m not in LEFT_OUT_IN_B]
    equal = 0
    ratios = []
    for metric in metrics:
        limit = 0.05 if metric == ENTROPY else 0.05 * abs(official[metric])
        equal += abs(ours[metric] - official[metric]) <= limit
        ratios.append((ours[metric] / official[metric], metric))
    smallest = f"{min(ratios)[0]:.3f} ({min(ratios)[1]})"
    largest = f"{max(ratios)[0]:.3f} ({max(ratios)[1]})"
    verdict = "equal" if equal == len(metrics) else "not equal"
    return [f"{equal} of {len(metrics)}", smallest, largest, verdict]


def compare(results: Results) -> str:
    """All comparisons, as Markdown."""
    parts = [
        compare_rounding(results),
        compare_cartpole_16envs(results),
        compare_walker(results),
        compare_finger(results),
        compare_default(results),
        compare_same_state(results),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(compare(Results()))
