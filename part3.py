"""Tests of results/: the gate, the statistics, the extraction, and that pages and files agree."""

import importlib
import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
sys.path.append(str(RESULTS))
compare = importlib.import_module("compare")
Results = compare.Results
extract = importlib.import_module("extract")
plot = importlib.import_module("plot")

PAGES = [ROOT / "README.md", *sorted(RESULTS.glob("*.md"))]
SUFFIX = r"_(losses|evals|advantage)$"


# === The gate =====================================================================================
@pytest.mark.parametrize(
    ("names", "column"),
    [
        ([compare.ROUNDED[0], compare.EXACT[0]], "twohot_mean"),
        ([compare.FINGER[0], compare.FINGER_EXACT], "twohot_mean"),
        ([compare.CARTPOLE_OFFICIAL, compare.CARTPOLE_16[0]], "envs"),
        ([compare.CARTPOLE_16_OFFICIAL, compare.CARTPOLE_16_LOSSES], "returns"),
        ([compare.CARTPOLE_16_OFFICIAL, compare.CARTPOLE_16[0]], "other"),
        ([compare.CARTPOLE_OFFICIAL, compare.CARTPOLE_DEFAULT], "train_ratio"),
        ([compare.WALKER_OFFICIAL, compare.WALKER[0]], "precision"),
        ([compare.FINGER[0], compare.WALKER[0]], "environment"),
    ],
)
def test_the_gate_refuses_runs_of_different_protocols(names, column):
    results = Results()
    with pytest.raises(ValueError) as error:
        results.check(names, [])
    message = str(error.value)
    assert column in message
    for name in names:
        run = results.runs([name])[0]
        assert name in message
        assert repr(run[column]) in message


def test_the_gate_lets_pass_what_the_rule_tolerates():
    results = Results()
    names = [compare.ROUNDED[0], compare.EXACT[0]]
    runs = results.check(names, compare.ROUNDING_TOLERATES)
    assert [run["run"] for run in runs] == names


def test_the_gate_refuses_a_run_without_a_row():
    with pytest.raises(ValueError, match="no_such_run has no row in protocols.csv"):
        Results().check([compare.FINGER[0], "no_such_run"], [])


@pytest.mark.parametrize("column", compare.PROTOCOL)
def test_every_column_of_a_protocol_is_compared(column):
    (run,) = Results().runs([compare.ROUNDED[0]])
    other = {**run, column: "another value"}
    with pytest.raises(ValueError, match=column):
        compare.check([run, other], [])
    compare.check([run, other], [column])


@pytest.fixture
def wrong_results(tmp_path):
    """The results with another train ratio in every row of ours."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    results = Results(folder)
    for row in results.rows:
        if row["code"] == "ours":
            row["train_ratio"] = "999"
    return results


@pytest.mark.parametrize(
    "name", ["learning", "finger_spin", "cartpole_16envs", "walker_walk", "cartpole"]
)
def test_no_figure_has_official_curves_of_another_protocol(wrong_results, name):
    with pytest.raises(ValueError, match="train_ratio"):
        getattr(plot, name)(wrong_results)


@pytest.mark.parametrize(
    "comparison",
    [
        compare.compare_rounding,
        compare.compare_cartpole_16envs,
        compare.compare_walker,
        compare.compare_finger,
    ],
)
def test_no_table_compares_runs_of_another_protocol(wrong_results, comparison):
    with pytest.raises(ValueError, match="train_ratio"):
        comparison(wrong_results)


# === Statistics ===================================================================================
def test_the_permutation_test_counts_splits():
    # only the observed split and its mirror image differ as much
    three = [1, 2, 3]
    assert compare.permutation_test(three, [11, 12, 13]) == 2 / 20
    five = [1, 2, 3, 4, 5]
    assert compare.permutation_test(five, [11, 12, 13, 14, 15]) == 2 / 252
    assert compare.permutation_test(three, [3, 2, 1]) == 1


def test_the_permutation_test_is_two_sided():
    # differences of 1.5 for 1 against 2 and 3, 0 for 2 and 1.5 for 3
    assert compare.permutation_test([1], [2, 3]) == 2 / 3
    assert compare.permutation_test([3], [1, 2]) == 2 / 3
    assert compare.permutation_test([2], [1, 3]) == 1


def test_the_widened_range_is_three_times_as_wide():
    low, high = compare.widened_range(np.array([[48.5, 1.0], [37.5, 3.0], [48.0, 2.0]]))
    assert low.tolist() == [26.5, -1]
    assert high.tolist() == [59.5, 5]


def test_a_level_is_passed_by_the_mean_of_five_episodes():
    steps = np.arange(100, 800, 100)
    returns = np.array([300.0, 0, 0, 0, 0, 0, 251])
    assert compare.first_passing(steps, returns) == 500
    assert compare.first_passing(steps, returns, level=60) == np.inf
    assert compare.first_passing(steps[1:], returns[1:]) == 700


def test_means_by_steps_include_the_end_of_an_interval():
    steps = np.array([1, 10, 11, 31])
    means = compare.step_means(steps, np.array([1.0, 3, 5, 7]), width=10, count=4)
    np.testing.assert_array_equal(means, [2, 5, np.nan, 7])


def test_update_windows_average_the_records_whose_update_lies_in_them():
    updates = np.array([1.0, 250, 250.5, 500, 800])
    windows = compare.update_windows(updates, np.array([1.0, 2, 3, 5, 9]), count=4)
    np.testing.assert_array_equal(windows, [1.5, 4, np.nan, 9])


def test_the_largest_fall_is_measured_from_the_highest_value_before():
    assert compare.largest_fall(np.array([10.0, 20, 15, 18, 30])) == 0.25
    assert compare.largest_fall(np.array([10.0, 20, 30])) == 0


@pytest.mark.parametrize(
    ("values", "text", "expected"),
    [
        ([1.0, 2, 3], "3 of 3", "agrees"),
        ([1.0, 2, 9], "2 of 3", "agrees"),
        ([1.0, 8, 9], "1 of 3", "fails"),
        ([1.0, 2, np.nan], "2 of 3, incomplete", "incomplete"),
    ],
)
def test_a_verdict_needs_its_share_of_windows(values, text, expected):
    low = np.array([0.0, 0, 0, np.nan])
    count = compare.Count(np.array([*values, 7]), low, low + 5)
    assert str(count) == text
    assert compare.verdict([count], 2 / 3, "agrees", "fails") == expected
    assert compare.verdict([count, None], 2 / 3, "agrees", "fails") == "not run yet"


# === Comparisons with runs made up from the official ones =========================================
def write_columns(path: Path, columns: dict) -> None:
    """Write a CSV from its columns."""
    extract.write(path, [list(columns), *zip(*columns.values(), strict=True)])


@pytest.fixture
def copied(tmp_path):
    """The results without runs of ours, and with one official seed of finger-spin."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    for path in folder.glob("*parity*.csv"):
        path.unlink()
    for path in folder.glob("official/*official_seed[23]*.csv"):
        path.unlink()
    return Results(folder)


def verdict_of(text: str, statistic: str) -> str:
    """The last cell of the row of a statistic."""
    begin = text.index(f"\n| {statistic} |") + 1
    row = text[begin:].splitlines()[0]
    return row.split("|")[-2].strip()


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (0, "p = 1.000: equal"),
        (-100, "p = 0.008: not equal"),
    ],
)
def test_evaluations_equal_to_the_official_ones_are_called_equal(copied, shift, expected):
    statistic = "mean of the evaluations from 12,000 to 24,000 steps"
    text = compare.compare_cartpole_16envs(copied)
    assert verdict_of(text, statistic) == "not run yet"
    curves = compare.official_evaluations(copied)
    for name, (steps, returns) in zip(compare.CARTPOLE_16, curves, strict=True):
        columns = {"global_step": steps, "return": returns + shift}
        write_columns(copied.path(name, "_evals"), columns)
    text = compare.compare_cartpole_16envs(copied)
    assert verdict_of(text, statistic) == expected


def test_losses_with_16_environments_are_compared_as_means_over_our_seeds(copied):
    data = copied.read(compare.CARTPOLE_16_LOSSES, "_losses")
    updates = np.arange(250, 10_001, 250)
    borders = compare.CARTPOLE_16_BORDERS
    window = np.searchsorted(borders, updates - 125) - 1
    for i, name in enumerate(compare.CARTPOLE_16):
        columns = {"updates": updates}
        for ours, theirs in compare.CARTPOLE_16_METRICS.items():
            means = np.append(data["mean"][data["metric"] == theirs], 0)
            shift = 1000 * (i - 2)  # 0 in the mean over seeds
            columns[ours] = means[window] + shift
        columns["losses/dyn"] = columns["losses/dyn"] + 1
        write_columns(copied.path(name, "_losses"), columns)
    text = compare.compare_cartpole_16envs(copied)
    assert verdict_of(text, "losses/dyn") == "fails"
    assert verdict_of(text, "behavior/actor_entropy") == "agrees"


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (1, "in range (weak)"),
        (2, "not in range"),
    ],
)
@pytest.mark.parametrize("pause", [0, 32])
def test_walker_returns_are_compared_by_groups_of_16(copied, factor, expected, pause):
    groups = factor * compare.official_groups(copied)[0, :4]
    ends = np.array([16_000, 32_016, 48_032 + pause, 64_048 + pause])
    for name, count in zip(compare.WALKER, (64, 32), strict=True):
        columns = {
            "global_step": np.repeat(ends, 16)[:count],
            "return": np.repeat(groups, 16)[:count],
        }
        write_columns(copied.path(name), columns)
    text = compare.compare_walker(copied)
    for end in ("16,016", "32,032", "48,048"):
        statistic = f"mean return of the 16 episodes that end at {end}"
        assert verdict_of(text, statistic) == expected


def test_a_group_whose_episodes_end_apart_is_left_out(copied):
    steps = np.repeat([16_000, 32_016], [15, 17])
    columns = {"global_step": steps, "return": np.full(32, 50.0)}
    write_columns(copied.path(compare.WALKER[0]), columns)
    groups = compare.our_groups(copied, compare.WALKER[0])
    assert np.isnan(groups).all()


def test_walker_windows_are_compared_seed_by_seed(copied):
    data = copied.read(compare.WALKER_OFFICIAL, "_losses")
    ends = (data["env_step"] - 2048).reshape(3, 7).mean(0)
    updates = np.arange(250, 29_001, 250)
    window = np.minimum(np.searchsorted(ends, updates - 125), 6)
    for seed, name in enumerate(compare.WALKER):
        columns = {"updates": updates}
        for ours, theirs in compare.WALKER_METRICS.items():
            values = sum(data[key].reshape(3, 7)[seed] for key in theirs)
            columns[ours] = values[window]
        if seed == 1:
            columns["losses/critic"] = 2 * columns["losses/critic"]
        write_columns(copied.path(name, "_losses"), columns)
    text = compare.compare_walker(copied)
    assert verdict_of(text, "losses/dyn") == "agrees"
    assert verdict_of(text, "losses/critic") == "fails"


def write_finger(results, name: str, delay: int, factor: float = 1) -> None:
    """A run on finger-spin like the official seed 1, `delay` agent steps later."""
    official = results.read(compare.FINGER[0])
    steps = official["global_step"]
    returns = factor * np.interp(steps - delay, steps, official["return"])
    write_columns(results.path(name), {"global_step": steps, "return": returns})
    losses = results.read(compare.FINGER[0], "_losses")
    updates = np.arange(250, 11_751, 250)
    if results.runs([name])[0]["code"] == "official":
        write_columns(results.path(name, "_losses"), losses)
        return
    columns = {"updates": updates}
    for ours, theirs in compare.FINGER_METRICS.items():
        columns[ours] = compare.update_windows(losses["opt_updates"], losses[theirs], 47)
    write_columns(results.path(name, "_losses"), columns)
    updates = np.arange(6, 2507, 50)
    advantage = np.interp(updates - 25, losses["opt_updates"], losses["adv_mag"])
    columns = {"updates": updates, "advantage_mag": advantage}
    write_columns(results.path(name, "_advantage"), columns)


@pytest.mark.parametrize(
    ("delay", "rises", "ends"),
    [
        (0, "not separated", "not separated"),
        (3000, "rounded rises earlier", "rounded ends higher"),
    ],
)
def test_rounded_and_exact_are_separated_only_if_all_seeds_are(copied, delay, rises, ends):
    for name in compare.ROUNDED:
        write_finger(copied, name, 0)
    for name in compare.EXACT:
        write_finger(copied, name, delay)
    text = compare.compare_rounding(copied)
    passes = "agent step at which the mean of 5 episodes passes 50: rounded"
    assert verdict_of(text, passes) == rises
    assert verdict_of(text, "mean return of the last 10 episodes: rounded") == ends
    for statistic in [
        "behavior/advantage_mag",
        "losses/critic",
        "behavior/actor_entropy",
        "first update after 500 with advantage_mag below 0.08",
    ]:
        assert verdict_of(text, statistic) == "holds"


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (1, "in range (weak)"),
        (0.4, "not in range"),
    ],
)
def test_finger_spin_is_compared_with_three_official_seeds(copied, factor, expected):
    text = compare.compare_finger(copied)
    assert verdict_of(text, "returns and update windows") == "not run yet"
    for name, other in zip(compare.FINGER[1:], (0.9, 1.1), strict=True):
        write_finger(copied, name, 0, other)
    for name in compare.ROUNDED:
        write_finger(copied, name, 0, factor)
    text = compare.compare_finger(copied)
    assert verdict_of(text, "mean returns by 2,500 agent steps") == expected
    assert verdict_of(text, "losses/critic") == "agrees"


# === Extraction ===================================================================================
def write_events(folder: Path, begin: int, records: list[tuple[int, float]]) -> None:
    """An event file of the program: (updates, value) of each record, the first after `begin`."""
    start = time.time()
    writer = SummaryWriter(folder)
    for i, (updates, value) in enumerate(records):
        now = start + 1000 * (i + 1)
        step = 1000 + 2 * updates
        scalars = {
            "losses/reward": value,
            "behavior/advantage_mag": value / 10,
            "charts/updates": updates,
            "charts/updates_per_second": (updates - begin) / 1000,
        }
        for name, scalar in scalars.items():
            writer.add_scalar(name, scalar, step, walltime=now)
    writer.close()


def numbers(path: Path) -> list[list[float]]:
    """The rows of a CSV without its header."""
    rows = path.read_text().splitlines()[1:]
    return [[float(value) for value in row.split(",")] for row in rows]


@pytest.fixture
def run(tmp_path):
    """A run folder without events."""
    folder = tmp_path / "run"
    folder.mkdir()
    rows = ["global_step,frames,return,length,seconds"]
    rows.append("500,1000,2,500,1.4")
    rows.append("1001,2002,0.5,500,3.0\n")
    (folder / "episodes.csv").write_text("\n".join(rows))
    return folder


def test_windows_weigh_records_by_their_updates(run, tmp_path):
    write_events(run, 0, [(100, 1.0), (200, 2.0), (300, 3.0), (600, 4.0)])
    extract.extract(run, "name", tmp_path)
    header = (tmp_path / "name_losses.csv").read_text().splitlines()[0]
    assert header == "updates,global_step,behavior/advantage_mag,losses/reward"
    # (100 * 1 + 100 * 2 + 50 * 3) / 250 = 1.8 and (50 * 3 + 200 * 4) / 250 = 3.8; 501 to 600 is
    # not complete
    rows = numbers(tmp_path / "name_losses.csv")
    np.testing.assert_allclose(rows[0], [250, 1500, 0.18, 1.8])
    np.testing.assert_allclose(rows[1], [500, 2000, 0.38, 3.8])
    assert len(rows) == 2
    episodes = (run / "episodes.csv").read_text()
    assert (tmp_path / "name.csv").read_text() == episodes
    assert not (tmp_path / "name_evals.csv").exists()
    assert not (tmp_path / "name_advantage.csv").exists()


def test_updates_that_are_made_again_after_a_kill_count_once(run, tmp_path):
    write_events(run, 0, [(100, 1.0), (200, 2.0), (300, 3.0), (400, 4.0)])
    write_events(run, 150, [(250, 7.0), (500, 8.0)])
    extract.extract(run, "name", tmp_path)
    # (100 * 1 + 50 * 2 + 100 * 7) / 250 = 3.6
    rows = numbers(tmp_path / "name_losses.csv")
    np.testing.assert_allclose(rows[0], [250, 1500, 0.36, 3.6])
    np.testing.assert_allclose(rows[1], [500, 2000, 0.8, 8])


def test_updates_without_a_record_are_left_out(run, tmp_path):
    write_events(run, 0, [(100, 1.0)])
    write_events(run, 150, [(250, 7.0)])
    extract.extract(run, "name", tmp_path)
    # (100 * 1 + 100 * 7) / 200 = 4
    rows = numbers(tmp_path / "name_losses.csv")
    np.testing.assert_allclose(rows, [[250, 1500, 0.4, 4]])


def test_evaluations_have_the_updates_made_until_then(run, tmp_path):
    write_events(run, 0, [(100, 1.0), (300, 2.0)])
    writer = SummaryWriter(run)
    for step, value in ((800, 10), (1200, 20), (1600, 30)):
        writer.add_scalar("eval/episodic_return", value, step)
    writer.close()
    extract.extract(run, "name", tmp_path)
    rows = numbers(tmp_path / "name_evals.csv")
    assert rows == [[800, 0, 10], [1200, 100, 20], [1600, 300, 30]]


def test_first_updates_are_written_as_they_were_recorded(run, tmp_path):
    write_events(run, 0, [(6, 1.0), (56, 2.0), (2506, 3.0), (2556, 4.0)])
    extract.extract(run, "name", tmp_path, advantage=True)
    rows = numbers(tmp_path / "name_advantage.csv")
    expected = [[6, 1012, 0.1], [56, 1112, 0.2], [2506, 6012, 0.3]]
    np.testing.assert_allclose(rows, expected)


def test_episodes_of_steps_that_were_made_again_count_once(run, tmp_path):
    with open(run / "episodes.csv", "a") as file:
        file.write("1502,3004,9,500,5.0\n")
        file.write("1400,2800,3,399,6.0\n")
        file.write("1901,3802,4,500,7.0\n")
    write_events(run, 0, [(250, 1.0)])
    extract.extract(run, "name", tmp_path)
    steps = [row[0] for row in numbers(tmp_path / "name.csv")]
    assert steps == [500, 1001, 1400, 1901]


def test_minutes_of_the_official_code_get_the_columns_of_its_first_run(run, tmp_path):
    path = RESULTS / "official" / "finger-spin__official_seed1_losses.csv"
    columns = path.read_text().splitlines()[0].split(",")
    lines = [json.dumps({"step": 501, "episode/score": 4.0})]
    # the last minute follows a checkpoint before step 1,300
    for step in (1200, 1300, 1250):
        metrics = {"step": step}
        for name in columns[1:]:
            key = name.replace("_", "/", 1)
            metrics[f"train/{key}"] = step / 100
        lines.append(json.dumps(metrics))
    (run / "metrics.jsonl").write_text("\n".join(lines))
    extract.extract_official(run, "name", tmp_path)
    rows = numbers(tmp_path / "name_losses.csv")
    assert rows == [[1200, *[12] * 25], [1250, *[12.5] * 25]]
    assert len(numbers(tmp_path / "name.csv")) == 2


# === Files and pages ==============================================================================
def test_every_csv_has_a_row_in_protocols():
    results = Results()
    places = {"ours": RESULTS, "official": RESULTS / "official"}
    for row in results.rows:
        assert row["code"] in places
    for code, folder in places.items():
        known = {row["run"] for row in results.rows if row["code"] == code}
        for path in folder.glob("*.csv"):
            stem = re.sub(SUFFIX, "", path.stem)
            assert stem in known | {"protocols"}


def test_every_run_that_took_hours_has_its_files():
    results = Results()
    for row in results.rows:
        if row["code"] == "ours" and row["hours"]:
            assert results.path(row["run"]).exists(), row["run"]
            assert row["commit"], row["run"]


def test_every_run_of_ours_with_a_file_has_hours_and_a_commit():
    results = Results()
    for row in results.rows:
        path = results.path(row["run"])
        if row["code"] == "ours" and path.exists():
            assert row["hours"], row["run"]
            assert row["commit"], row["run"]


def test_no_run_has_two_rows():
    rows = Results().rows
    keys = [(row["run"], row["seed"]) for row in rows]
    assert len(set(keys)) == len(keys)


def test_logs_of_ours_are_logs_of_the_program():
    for path in RESULTS.glob("*.csv"):
        if path.stem != "protocols" and not re.search(SUFFIX, path.stem):
            header = path.read_text().splitlines()[0]
            assert header == "global_step,frames,return,length,seconds"


def test_the_tables_of_the_results_are_those_that_are_printed():
    page = (RESULTS / "results.md").read_text()
    text = compare.compare(Results())
    for line in text.splitlines():
        assert line in page, "results.md lacks what compare.py prints"


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("results.md", 14_000),
        ("rounding.md", 4096),
    ],
)
def test_a_page_is_short_enough_to_be_finished(name, limit):
    assert (RESULTS / name).stat().st_size <= limit


def figures(page: Path) -> set[Path]:
    """The pictures that a page shows."""
    names = re.findall(r"!\[[^]]*\]\(([^)]+\.png)\)", page.read_text())
    return {(page.parent / name).resolve() for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_of_a_page_exists(page):
    for path in figures(page):
        assert path.exists(), path.name


def test_every_figure_is_shown_on_a_page():
    shown = set().union(*(figures(page) for page in PAGES))
    assert {path.resolve() for path in RESULTS.glob("*.png")} <= shown


def test_figures_are_drawn_from_the_committed_numbers(tmp_path):
    plot.draw(Results(), tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    committed = {path.name for path in RESULTS.glob("*.png")}
    assert drawn <= committed
    assert committed - drawn <= {"Boxing_dream.png", "parity.png"}


def test_a_figure_of_runs_that_do_not_exist_is_not_drawn(copied, tmp_path):
    for path in copied.folder.glob("*demo*.csv"):
        path.unlink()
    plot.draw(copied, tmp_path)
    assert not (tmp_path / "demo.png").exists()
    assert (tmp_path / "learning.png").exists()


def test_every_link_of_a_page_leads_to_a_file():
    for page in PAGES:
        for link in re.findall(r"\]\(([^):#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
