"""Make the tables: what was read, runs, verdicts with their cells, passports."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "edgedeploy_files",
        sa.Column("lab", sa.Text, primary_key=True),
        sa.Column("path", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("mtime_ns", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("problem", sa.Text, nullable=False),
    )
    op.create_table(
        "edgedeploy_runs",
        sa.Column("digest", sa.Text, primary_key=True),
        *_required("lab", "name", "path", "cell_id", "cell", "model", "target", "backend", "precision", "device"),
        *_required("options", "session", "side", "started_utc", "artifact_sha256", "edgedeploy", "runtime", "kernel"),
        *_required("driver", "system", "hostname", "machine"),
        sa.Column("visits", sa.Integer, nullable=False),
        *_required("evaluation", "sentinel"),
        sa.Column("sentinel_s", sa.Double),
        *_figures("latency_p50", "latency_p95", "latency_p99", "load_time", "first_inference"),
        *_figures("peak_memory", "artifact_size", "accuracy"),
    )
    op.create_index("edgedeploy_runs_of_cell", "edgedeploy_runs", ["lab", "cell_id", "started_utc"])
    op.create_index("edgedeploy_runs_by_name", "edgedeploy_runs", ["name"])
    op.create_index("edgedeploy_runs_of_device", "edgedeploy_runs", ["lab", "device", "started_utc"])
    op.create_table(
        "edgedeploy_verdicts",
        sa.Column("digest", sa.Text, primary_key=True),
        *_required("lab", "path", "name", "decision", "judged_utc"),
        sa.Column("document", sa.LargeBinary, nullable=False),
    )
    op.create_index("edgedeploy_verdicts_by_time", "edgedeploy_verdicts", ["judged_utc", "digest"])
    op.create_table(
        "edgedeploy_verdict_cells",
        sa.Column("digest", sa.Text, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        *_required("cell", "baseline_cell", "device", "target", "decision", "baseline_run", "candidate_run"),
    )
    op.create_index("edgedeploy_verdict_cells_by_candidate", "edgedeploy_verdict_cells", ["candidate_run"])
    op.create_index("edgedeploy_verdict_cells_by_baseline", "edgedeploy_verdict_cells", ["baseline_run"])
    op.create_table(
        "edgedeploy_passports",
        sa.Column("digest", sa.Text, primary_key=True),
        *_required("lab", "path", "name", "device", "started_utc"),
        sa.Column("run_to_run_cv", sa.Double),
    )
    op.create_index("edgedeploy_passports_of_device", "edgedeploy_passports", ["lab", "device", "started_utc"])


def downgrade() -> None:
    """Drop them; what they hold can be read from the JSON files again."""
    for table in ("passports", "verdict_cells", "verdicts", "runs", "files"):
        op.drop_table(f"edgedeploy_{table}")


def _required(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def _figures(*names: str) -> list[sa.Column[float]]:
    return [sa.Column(name, sa.Double) for name in names]
