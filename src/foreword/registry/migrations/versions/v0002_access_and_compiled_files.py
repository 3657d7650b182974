"""The registry's identity and revision, compiled files, and who may do what."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    registry = op.create_table(
        "registry",
        sa.Column("one", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("one = 1", name=op.f("ck_registry_one_row")),
        sa.PrimaryKeyConstraint("one", name="pk_registry"),
    )
    op.bulk_insert(registry, [{"one": 1, "id": str(uuid.uuid4()), "revision": 1}])
    op.create_table(
        "compiled",
        sa.Column("source", sa.String(64), nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("base_weights_sha256", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("num_positions", sa.Integer(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_compiled_sha256_is_hex")),
        sa.PrimaryKeyConstraint("source", "dtype", "base_weights_sha256", name="pk_compiled"),
    )
    op.create_index("ix_compiled_sha256", "compiled", ["sha256"])
    _create_access_tables()
    _create_traffic_tables()
    op.create_table(
        "audit",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_action_id", "audit", ["action", "id"])
    op.create_index("ix_audit_subject_id", "audit", ["subject", "id"])


def _create_access_tables() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("tokens_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("concurrent", sa.BigInteger(), nullable=True),
        sa.Column("max_prompt_tokens", sa.BigInteger(), nullable=True),
        sa.Column("max_new_tokens", sa.BigInteger(), nullable=True),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("expires", TIME, nullable=True),
        sa.Column("revoked", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_index("ix_api_keys_tenant", "api_keys", ["tenant"])
    op.create_table(
        "grants",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("task", sa.String(64), nullable=False),
        sa.Column("right", sa.String(16), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_grants_tenant_tenants"),
        sa.PrimaryKeyConstraint("tenant", "task", "right", name="pk_grants"),
    )
    op.create_table(
        "usage",
        sa.Column("gateway", sa.String(200), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("minute", sa.BigInteger(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("running", sa.BigInteger(), nullable=False),
        sa.Column("seen", TIME, nullable=False),
        sa.PrimaryKeyConstraint("gateway", "tenant", name="pk_usage"),
    )


def _create_traffic_tables() -> None:
    op.create_table(
        "routes",
        sa.Column("task", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("fraction", sa.Float(53), nullable=False),
        sa.Column("salt", sa.Text(), nullable=False),
        sa.Column("keep_inputs", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name="fk_routes_task_tasks"),
        sa.ForeignKeyConstraint(
            ["task", "number"], ["versions.task", "versions.number"], name="fk_routes_task_number_versions"
        ),
        sa.PrimaryKeyConstraint("task", "kind", name="pk_routes"),
    )
    op.create_table(
        "draining",
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("since", TIME, nullable=False),
        sa.PrimaryKeyConstraint("url", name="pk_draining"),
    )
    op.create_table(
        "shadow_pairs",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("task", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("candidate", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("input", sa.Text(), nullable=True),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("candidate_answer", sa.Text(), nullable=False),
        sa.Column("agrees", sa.Boolean(), nullable=False),
        sa.Column("seconds", sa.Float(53), nullable=False),
        sa.Column("candidate_seconds", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_shadow_pairs"),
    )
    op.create_index("ix_shadow_pairs_task_id", "shadow_pairs", ["task", "id"])


def downgrade() -> None:
    for table in (
        "shadow_pairs",
        "draining",
        "routes",
        "usage",
        "grants",
        "api_keys",
        "tenants",
        "audit",
        "compiled",
        "registry",
    ):
        op.drop_table(table)
