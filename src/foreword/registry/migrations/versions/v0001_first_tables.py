"""First tables: tasks, versions, aliases and their moves."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tasks",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_tasks"),
    )
    op.create_table(
        "versions",
        sa.Column("task", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("method", sa.String(16), nullable=False),
        sa.Column("num_vectors", sa.Integer(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("base_model_type", sa.Text(), nullable=False),
        sa.Column("base_shapes_sha256", sa.Text(), nullable=False),
        sa.Column("base_quantisation", sa.Text(), nullable=False),
        sa.Column("base_weights_sha256", sa.Text(), nullable=False),
        sa.Column("base_tokenizer_sha256", sa.Text(), nullable=False),
        sa.Column("base_chat_template_sha256", sa.Text(), nullable=False),
        sa.Column("parent", sa.String(64), nullable=True),
        sa.Column("evaluation", sa.JSON(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_by", sa.Text(), nullable=True),
        sa.Column("deleted_why", sa.Text(), nullable=True),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_versions_sha256_is_hex")),
        sa.CheckConstraint("number >= 1", name=op.f("ck_versions_number_from_1")),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name="fk_versions_task_tasks"),
        sa.PrimaryKeyConstraint("task", "number", name="pk_versions"),
    )
    op.create_index("ix_versions_sha256", "versions", ["sha256"])
    live = sa.text("deleted IS NULL")
    op.create_index(
        "uq_versions_live_task_sha256",
        "versions",
        ["task", "sha256"],
        unique=True,
        sqlite_where=live,
        postgresql_where=live,
    )
    _create_alias_tables()


def _create_alias_tables() -> None:
    op.create_table(
        "aliases",
        sa.Column("task", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name="fk_aliases_task_tasks"),
        _version("number", "fk_aliases_task_number_versions"),
        sa.PrimaryKeyConstraint("task", "name", name="pk_aliases"),
    )
    op.create_table(
        "alias_moves",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("task", sa.String(64), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("from_number", sa.Integer(), nullable=True),
        sa.Column("to_number", sa.Integer(), nullable=True),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("moved", sa.DateTime(timezone=True), nullable=False),
        sa.Column("evaluation", sa.JSON(), nullable=False),
        sa.Column("forced", sa.Boolean(), nullable=False),
        sa.Column("overruled", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name="fk_alias_moves_task_tasks"),
        _version("from_number", "fk_alias_moves_task_from_number_versions"),
        _version("to_number", "fk_alias_moves_task_to_number_versions"),
        sa.PrimaryKeyConstraint("id", name="pk_alias_moves"),
    )
    op.create_index("ix_alias_moves_task_alias", "alias_moves", ["task", "alias"])


def _version(column: str, name: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["task", column], ["versions.task", "versions.number"], name=name)


def downgrade() -> None:
    for table in ("alias_moves", "aliases", "versions", "tasks"):
        op.drop_table(table)
