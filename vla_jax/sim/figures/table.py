"""The result table: one column per policy, one row per quantity, as markdown."""

from collections.abc import Mapping
from typing import Any

# key of the report (or of its details), what the row is called, how its value is written
ROWS = (
    ("success", "success", "percent"),
    ("wrong_instruction_success", "success with another task's instruction", "percent"),
    ("collision", "collisions", "percent"),
    ("symmetric_collision", "collisions in symmetric scenes", "percent"),
    ("left_share", "left in symmetric scenes", "percent"),
    ("path_error", "mean distance to the expert's path (mm)", "millimetres"),
    ("path_length_m", "length of the path, of successes (m)", "number"),
    ("time_s", "time, of successes (s)", "seconds"),
    ("chunk_diversity", "diversity of sampled chunks", "number"),
    ("swapped_success", "instruction swapped: ends at the newly named object", "percent"),
    ("plan_accuracy", "decoded plan names the right object", "percent"),
    ("forced_plan_followed", "forced plan: passes on the forced side", "percent"),
    ("latency_ms_p50", "latency of a chunk, median (ms)", "milliseconds"),
    ("latency_ms_p95", "latency of a chunk, 95th percentile (ms)", "milliseconds"),
)

FORMATS = {
    "percent": lambda x: f"{100 * x:.1f} %",
    "millimetres": lambda x: f"{1e3 * x:.1f}",
    "number": lambda x: f"{x:.3f}",
    "seconds": lambda x: f"{x:.1f}",
    "milliseconds": lambda x: f"{x:.1f}",
}


def cell(report: Mapping[str, Any], key: str, kind: str) -> str:
    """One value as text; success with its interval; "–" where it does not apply."""
    if report.get(key) is None:
        return "–"
    text = FORMATS[kind](report[key])
    if key == "success":
        low, high = report["success_ci"]
        text += f" ({100 * low:.1f}–{100 * high:.1f})"
    return text


def result_rows(reports: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The table without its head: a name and one cell per report; rows that no report has are left out."""
    reports = {name: dict(report.get("details", {}), **report) for name, report in reports.items()}
    rows = [["episodes", *(str(report["episodes"]) for report in reports.values())]]
    for key, name, kind in ROWS:
        if any(report.get(key) is not None for report in reports.values()):
            rows.append([name, *(cell(report, key, kind) for report in reports.values())])
    tasks = dict.fromkeys(task for report in reports.values() for task in report.get("per_task", {}))
    for task in tasks if len(tasks) > 1 else ():
        found = [report.get("per_task", {}).get(task, {}) for report in reports.values()]
        rows.append([f"success: {task}", *(cell(summary, "success", "percent") for summary in found)])
    return rows


def markdown_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown with one column per report (its key is the column's head) and aligned cells."""
    table = [["", *reports], *result_rows(reports)]
    widths = [max(len(row[c]) for row in table) for c in range(len(table[0]))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in table]
    rule = (
        "|" + "|".join("-" * (width + 1) + ("-" if c == 0 else ":") for c, width in enumerate(widths)) + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"
