"""Why a deployment runs where it runs, from what the controllers stored: for servers without a live explainer."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db import manifests, objects, tables
from controlplane.domain.selectors import parse_selector


class StoredExplainer:
    """Reads assignments, labels and selectors; knows nothing of scores."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def explain(self, name: str) -> list[dict[str, Any]]:
        """``{node, chosen, reason}`` for each node, by name. Raises KeyError when there is no deployment ``name``."""
        async with self._engine.connect() as connection:
            declared = await manifests.load(connection)
            nodes = (await connection.execute(objects.nodes().order_by(tables.nodes.c.name))).all()
            query = objects.replicas().where(tables.assignments.c.deployment == name)
            held = {row.node_id: row for row in await connection.execute(query)}
        spec = declared.deployments[name].spec
        texts = {f'selector "{spec.selector}"': spec.selector}
        if spec.group is not None and spec.group in declared.groups:
            texts[f"group {spec.group}"] = declared.groups[spec.group].selector
        selectors = {what: parse_selector(text) for what, text in texts.items()}
        return [_explained(node, held.get(node.id), selectors) for node in nodes]


def _explained(node: sa.Row[Any], replica: sa.Row[Any] | None, selectors: dict[str, Any]) -> dict[str, Any]:
    if replica is not None:
        return {"node": node.name, "chosen": True, "reason": replica.reason or "it holds a replica"}
    for what, selector in selectors.items():
        if not selector.matches(node.labels):
            return {"node": node.name, "chosen": False, "reason": f"its labels do not match {what}"}
    if node.drained:
        return {"node": node.name, "chosen": False, "reason": "it is drained"}
    return {"node": node.name, "chosen": False, "reason": f"it could hold a replica; it is {node.state}"}
