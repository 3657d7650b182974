"""What Alembic runs: the migrations, on the connection that `migrations/__init__.py` hands over."""

from typing import Any, Literal

from alembic import context

from foreword.registry.tables import Base, UTCDateTime


def _render(kind: str, item: Any, _: object) -> str | Literal[False]:
    # A migration stands by itself: it must not change when tables.py does.
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UTCDateTime) else False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a column in place
    render_item=_render,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
