"""Telemetry in: MQTT to Postgres, each batch once. ``ingest.py`` has the loop, ``decode.py`` and ``plan.py`` decide."""
