"""The routes of the REST API, one module a subject; each has ``router(context)``."""
