"""The tables of the history's store, one definition for SQLite and PostgreSQL; `migrations/` makes them."""

from __future__ import annotations

import sqlalchemy as sa

# The newest revision in migrations/versions; a test compares the two.
HEAD = "0001"
# What `reading.py` makes of a file; one more whenever that changes, so that an index made before is made anew.
READER = 1

# The prefix, because a shared database may have other tables.
VERSION_TABLE = "edgedeploy_version"

metadata = sa.MetaData()

# What was read. `digest` is of the file's bytes; `problem` is why it is left out, "" where it is not.
files = sa.Table(
    "edgedeploy_files",
    metadata,
    sa.Column("lab", sa.Text, primary_key=True),
    sa.Column("path", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("mtime_ns", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("problem", sa.Text, nullable=False),
)

# One row a run; its figures are None where a run does not have them. `cell_id` stands for the words of a CellKey.
runs = sa.Table(
    "edgedeploy_runs",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("lab", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("cell_id", sa.Text, nullable=False),
    sa.Column("cell", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("backend", sa.Text, nullable=False),
    sa.Column("precision", sa.Text, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("options", sa.Text, nullable=False),
    sa.Column("session", sa.Text, nullable=False),
    sa.Column("side", sa.Text, nullable=False),
    sa.Column("started_utc", sa.Text, nullable=False),
    sa.Column("artifact_sha256", sa.Text, nullable=False),
    sa.Column("edgedeploy", sa.Text, nullable=False),
    sa.Column("runtime", sa.Text, nullable=False),
    sa.Column("kernel", sa.Text, nullable=False),
    sa.Column("driver", sa.Text, nullable=False),
    sa.Column("system", sa.Text, nullable=False),
    sa.Column("hostname", sa.Text, nullable=False),
    sa.Column("machine", sa.Text, nullable=False),
    sa.Column("visits", sa.Integer, nullable=False),
    sa.Column("evaluation", sa.Text, nullable=False),
    sa.Column("sentinel", sa.Text, nullable=False),
    sa.Column("sentinel_s", sa.Double),
    sa.Column("latency_p50", sa.Double),
    sa.Column("latency_p95", sa.Double),
    sa.Column("latency_p99", sa.Double),
    sa.Column("load_time", sa.Double),
    sa.Column("first_inference", sa.Double),
    sa.Column("peak_memory", sa.Double),
    sa.Column("artifact_size", sa.Double),
    sa.Column("accuracy", sa.Double),
    sa.Index("edgedeploy_runs_of_cell", "lab", "cell_id", "started_utc"),
    sa.Index("edgedeploy_runs_by_name", "name"),
    sa.Index("edgedeploy_runs_of_device", "lab", "device", "started_utc"),
)

# `document` is the whole verdict, zlib-compressed: a shared store's readers do not have the file.
verdicts = sa.Table(
    "edgedeploy_verdicts",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("lab", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("decision", sa.Text, nullable=False),
    sa.Column("judged_utc", sa.Text, nullable=False),
    sa.Column("document", sa.LargeBinary, nullable=False),
    sa.Index("edgedeploy_verdicts_by_time", "judged_utc", "digest"),
)

# `baseline_run` and `candidate_run` are names of runs, which may be in the store or not.
verdict_cells = sa.Table(
    "edgedeploy_verdict_cells",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("cell", sa.Text, nullable=False),
    sa.Column("baseline_cell", sa.Text, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("decision", sa.Text, nullable=False),
    sa.Column("baseline_run", sa.Text, nullable=False),
    sa.Column("candidate_run", sa.Text, nullable=False),
    sa.Index("edgedeploy_verdict_cells_by_candidate", "candidate_run"),
    sa.Index("edgedeploy_verdict_cells_by_baseline", "baseline_run"),
)

passports = sa.Table(
    "edgedeploy_passports",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("lab", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("started_utc", sa.Text, nullable=False),
    sa.Column("run_to_run_cv", sa.Double),
    sa.Index("edgedeploy_passports_of_device", "lab", "device", "started_utc"),
)
