"""Write the numbers of a run into results/: python results/extract.py RUN_FOLDER NAME [flags]

NAME.csv: the episodes, as the program wrote them.
NAME_losses.csv: means over windows of 250 updates of losses, behavior and world model metrics, and
of the gradient norm; `updates` and `global_step` are those at the end of a window.
NAME_evals.csv: the evaluations, if there are any.
NAME_advantage.csv, with --advantage: advantage_mag in the first 2,500 updates as TensorBoard has
it, which is a mean over --log-frequency agent steps (50 updates at train ratio 512).
NAME_actions.csv, with --actions: of every 512 agent steps the mean action, as the actor gave it
(not clipped), and the mean reward, from the replay buffer of a run that has not filled it.

A folder with a `metrics.jsonl` is a run of the official code. Its episodes and its losses, which
are means over a minute, go into results/official/.

A killed run makes the updates after its last checkpoint again. The later ones count.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
WINDOW = 250
FIRST_UPDATES = 2_500
PREFIXES = ("losses/", "behavior/", "world_model/", "optim/grad_norm")
ADVANTAGE = "behavior/advantage_mag"
ACTION_WINDOW = 512


class Record(NamedTuple):
    """Means of metrics over updates `begin` + 1 to `end`; `end` is reached at agent step `step`."""

    begin: int
    end: int
    step: int
    values: dict[str, float]


def mean_over(begins, ends, values, begin: float, end: float) -> float:
    """The mean over updates `begin` + 1 to `end` of values that are means over intervals.

    An interval that lies across a border counts with the share of its updates that lies inside.
    Updates that no interval has are left out; nan if there is none at all.
    """
    inside = np.minimum(ends, end) - np.maximum(begins, begin)
    weights = np.maximum(inside, 0)
    total = weights.sum()
    return float((weights * values).sum() / total) if total else float("nan")


def read_events(folder: Path) -> list[EventAccumulator]:
    """The event files of a run in the order of time: one for each time it was started."""
    files = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        files.append(events)
    return files


def read_records(files: list[EventAccumulator]) -> list[Record]:
    """What the program recorded about its updates, each update once."""
    records = []
    for events in files:
        names = events.Tags()["scalars"]
        if "charts/updates" not in names:
            continue
        counts = events.Scalars("charts/updates")
        # the first record of a file begins at a checkpoint; its number of updates follows from
        # the updates per second since the file was begun
        rate = events.Scalars("charts/updates_per_second")[0].value
        seconds = counts[0].wall_time - events.FirstEventTimestamp()
        begin = round(counts[0].value - rate * seconds)
        records = cut(records, begin)
        metrics = {name: events.Scalars(name) for name in names if name.startswith(PREFIXES)}
        for i, count in enumerate(counts):
            values = {name: scalars[i].value for name, scalars in metrics.items()}
            records.append(Record(begin, int(count.value), count.step, values))
            begin = int(count.value)
    return records


def cut(records: list[Record], updates: int) -> list[Record]:
    """The records of the first updates only; the last one may be shortened."""
    kept = []
    for record in records:
        if record.begin < updates:
            kept.append(record._replace(end=min(record.end, updates)))
    return kept


def loss_rows(records: list[Record]) -> list[list]:
    """A header and one row for every complete window of 250 updates."""
    begins = np.array([record.begin for record in records])
    ends = np.array([record.end for record in records])
    steps = np.array([record.step for record in records])
    names = sorted(records[0].values)
    rows = [["updates", "global_step", *names]]
    for end in range(WINDOW, int(ends[-1]) + 1, WINDOW):
        row = [end, round(np.interp(end, ends, steps))]
        for name in names:
            values = np.array([record.values[name] for record in records])
            row.append(f"{mean_over(begins, ends, values, end - WINDOW, end):.6g}")
        rows.append(row)
    return rows


def evaluation_rows(files: list[EventAccumulator], records: list[Record]) -> list[list]:
    """A header and one row for every evaluation."""
    returns = {}
    for events in files:
        if "eval/episodic_return" in events.Tags()["scalars"]:
            for scalar in events.Scalars("eval/episodic_return"):
                returns[scalar.step] = scalar.value
    rows = [["global_step", "updates", "return"]]
    for step in sorted(returns):
        updates = max((x.end for x in records if x.step <= step), default=0)
        rows.append([step, updates, f"{returns[step]:.6g}"])
    return rows


def advantage_rows(records: list[Record]) -> list[list]:
    """A header and one row for every record that begins in the first updates."""
    rows = [["updates", "global_step", "advantage_mag"]]
    for record in records:
        if record.begin < FIRST_UPDATES:
            rows.append([record.end, record.step, f"{record.values[ADVANTAGE]:.6g}"])
    return rows


def action_rows(replay: Path) -> list[list]:
    """A header and one row for every 512 agent steps of a replay buffer's folder."""
    stored = int(np.load(replay / "clock.npy")[0])  # steps of each environment
    action = np.load(replay / "action.npy", mmap_mode="r")  # (environments, slots, A)
    reward = np.load(replay / "reward.npy", mmap_mode="r")  # (environments, slots)
    num_envs, _, size = action.shape
    width = ACTION_WINDOW // num_envs  # slots of a window
    rows = [["global_step", "reward", *(f"action_{i}" for i in range(size))]]
    for end in range(width, stored + 1, width):
        window = slice(end - width, end)
        means = [reward[:, window].mean(), *action[:, window].mean((0, 1))]
        rows.append([end * num_envs, *(f"{mean:.4g}" for mean in means)])
    return rows


def latest(rows: list[list], column: int = 0) -> list[list]:
    """Rows in the order of time, without those that a later row of an earlier step replaces."""
    kept = []
    for row in rows:
        while kept and float(kept[-1][column]) > float(row[column]):
            kept.pop()
        kept.append(row)
    return kept


def episode_rows(path: Path) -> list[list]:
    """A header and one row for every episode."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    return [rows[0], *latest(rows[1:])]


def official_rows(path: Path, columns: list[str]) -> list[list]:
    """A header and one row for every minute of the official code's metrics.jsonl."""
    rows = []
    for line in path.read_text().splitlines():
        metrics = json.loads(line)
        values = {"global_step": metrics["step"]}
        for name, value in metrics.items():
            values[name.removeprefix("train/").replace("/", "_")] = f"{value:.6g}"
        if "opt_updates" in values:
            rows.append([values[name] for name in columns])
    return [columns, *latest(rows)]


def write(path: Path, rows: list[list]) -> None:
    """Write rows as a CSV."""
    lines = [",".join(str(value) for value in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path.name}: {len(rows) - 1} rows")


def extract(
    folder: Path, name: str, to: Path, advantage: bool = False, actions: bool = False
) -> None:
    """Write the CSVs of a run of this repository."""
    files = read_events(folder)
    records = read_records(files)
    write(to / f"{name}.csv", episode_rows(folder / "episodes.csv"))
    write(to / f"{name}_losses.csv", loss_rows(records))
    evaluations = evaluation_rows(files, records)
    if len(evaluations) > 1:
        write(to / f"{name}_evals.csv", evaluations)
    if advantage:
        write(to / f"{name}_advantage.csv", advantage_rows(records))
    if actions:
        write(to / f"{name}_actions.csv", action_rows(folder / "replay"))


def extract_official(folder: Path, name: str, to: Path) -> None:
    """Write the CSVs of a run of the official code, with the columns of its first run."""
    with open(HERE / "official" / "finger-spin__official_seed1_losses.csv") as file:
        columns = file.readline().strip().split(",")
    write(to / f"{name}.csv", episode_rows(folder / "episodes.csv"))
    write(to / f"{name}_losses.csv", official_rows(folder / "metrics.jsonl", columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--advantage", action="store_true")
    parser.add_argument("--actions", action="store_true")
    args = parser.parse_args()
    if (args.folder / "metrics.jsonl").exists():
        extract_official(args.folder, args.name, HERE / "official")
    else:
        extract(args.folder, args.name, HERE, args.advantage, args.actions)


if __name__ == "__main__":
    main()
