"""The composition root of agentd: makes the parts, runs them in one TaskGroup, stops them in order.

Start: state folder locked, database, what is on disk offered to the host, local API (ready now, network or not), then
the session and telemetry. Stop: new requests refused, running ones drained, session and telemetry ended, workers
stopped, API closed, database closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sqlite3
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from agentd import statefolder
from agentd.agents import router
from agentd.api.app import Api
from agentd.api.guard import host_filter
from agentd.api.prometheus import Snapshot, render
from agentd.api.server import ApiServer, address_of, bind
from agentd.api.serving import Serving
from agentd.artifacts.attempt import Fetched, Stop
from agentd.artifacts.marks import Marks
from agentd.artifacts.store import ArtifactStore
from agentd.board import StatusBoard
from agentd.config import Config
from agentd.convergence.facts import Plan
from agentd.converger import Converger, NodeLimits
from agentd.desired import FEATURES, DesiredOwner
from agentd.device import inventory
from agentd.device.clock import boot_id, boottime_s, wall_s
from agentd.device.power import Sensors
from agentd.enrolling import ensure_enrolled
from agentd.identity import files as identity_files
from agentd.identity.files import Endpoints, Identity
from agentd.identity.renewal import keep_renewed
from agentd.models.backends import available_formats
from agentd.models.counters import ModelCounters
from agentd.models.measured import Measurement, from_json, to_json
from agentd.models.settings import HostSettings, Tuning
from agentd.models.types import ModelHost, ModelKey, ModelState, ModelStatus
from agentd.parts import Part, end_all, start
from agentd.store.database import Database, get_meta, set_meta
from agentd.store.desired import DesiredStore
from agentd.store.outbox import Outbox
from agentd.telemetry.events import EventLog
from agentd.telemetry.ledger import Ledger
from agentd.telemetry.publisher import Publisher
from agentd.telemetry.recorder import Recorder
from agentd.tuning import Tuner
from agentd.upkeep import Upkeep, own_memory_bytes
from slmfleet import __version__, logs
from slmfleet.modelfiles import upstream
from slmfleet.systemd import Notifier
from slmfleet.v1 import session_pb2, state_pb2

log = logs.get(__name__)

# Convergence passes at least each 10 s; one that takes longer than this hangs.
STALLED_S = 120.0
# Room over a worker's expected memory, whatever the factor: small models have allocators and libraries, too.
LIMIT_SLACK_BYTES = 128 * 2**20
# What models took is written down this often, if it changed.
MEASURED_EVERY_S = 60.0
# Their key in the store.
MEASURED = "measured"


class CountingHost(ModelHost, Protocol):
    """A model host that also says when a model changed and what was counted."""

    def subscribe(self, callback: Callable[[ModelStatus], None]) -> Callable[[], None]:
        """Call ``callback`` when the state of a model changed; the answer ends that."""
        ...

    async def probe(self, timeout_s: float = 1.0) -> str:
        """Exercise the host's tasks; "" when all answered in time, else who did not."""
        ...

    def take_counters(self) -> Mapping[ModelKey, ModelCounters]:
        """What was counted since this was last called."""
        ...

    def tune(self, tuning: Tuning) -> None:
        """Bounds from now on."""
        ...

    @property
    def limits(self) -> str:
        """How workers are held to their limits: "cgroup2", "cgroup1", "watchdog" or "none". Known while it runs."""
        ...

    @property
    def measured(self) -> Mapping[ModelKey, Measurement]:
        """What models took when they were loaded last."""
        ...

    def remember(self, measured: Mapping[ModelKey, Measurement]) -> None:
        """What models took in an earlier life."""
        ...


@dataclass(slots=True)
class Stopping:
    """What signals ask for: the first one to stop in order, the second one to hurry."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)

    def signalled(self) -> None:
        """SIGTERM or SIGINT came."""
        if self.asked.is_set():
            self.hurry.set()
        self.asked.set()

    def listen(self) -> None:
        """Take over the process's signals."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.signalled)


async def run(config: Config, make_host: Callable[[HostSettings], CountingHost]) -> None:
    """Run agentd until a signal ends it. Raises UserError for what a person must mend."""
    stopping = Stopping()
    stopping.listen()
    notifier = Notifier()
    # Few threads: each costs memory, and only downloads and stat calls use them.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=4, thread_name_prefix="files"))
    with statefolder.lock(config.state_dir):
        # Left by a run that was killed: whoever reads it must not take this run for that one.
        statefolder.remove_runtime(config.state_dir)
        identity = await _unless_stopped(
            stopping, ensure_enrolled(config, lambda sentence: notifier.status(sentence, extend_s=180.0))
        )
        if identity is None:
            return
        if config.node_api:
            identity = identity_files.learn_endpoints(identity, Endpoints(config.node_api, "", ""))
        listener = bind(config.api_listen)
        database = await Database.open(config.state_dir / "store.db")
        try:
            daemon = await Daemon.make(config, identity, make_host, database, listener, notifier)
            await daemon.run(stopping)
        finally:
            listener.close()
            await database.close()


async def _unless_stopped(stopping: Stopping, work: Coroutine[Any, Any, Identity]) -> Identity | None:
    """The result of ``work``; None when a signal came first."""
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(work, name="enrolment")
        waiting = tasks.create_task(stopping.asked.wait(), name="signals")
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        working.cancel()
    return None if working.cancelled() else working.result()


class Daemon:
    """The parts and their connections."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        host: CountingHost,
        database: Database,
        desired: DesiredOwner,
        artifacts: ArtifactStore,
        listener: socket.socket,
        notifier: Notifier,
    ) -> None:
        self._config = config
        self._identity = identity
        self._artifacts = artifacts
        self._notifier = notifier
        self._desired = desired
        self._began_s = boottime_s()
        self._catalog = router.Catalog()
        self._serving = asyncio.Event()
        self._formats = available_formats(config.backends)
        self._local_api = address_of(listener)

        self._host = host
        self._ledger = Ledger(host.take_counters)
        self._outbox = Outbox(database, boot_id(), config.outbox_bytes)
        self._publisher = Publisher(self._outbox, identity.node_id, boot_id(), self._ssl_context)
        self._events = EventLog(self._outbox, self._publisher.poke)
        self._board = StatusBoard()
        self._converger = Converger(
            desired, artifacts, Marks(database), host, self._fetch, self._board, self._events,
            NodeLimits(self._formats, config.keep_alive, config.context_tokens, config.model_cache_bytes,
                       config.disk_reserve, inventory.model_hardware(config.max_memory),
                       "balanced" if config.power_profile == "auto" else config.power_profile),
            self._planned,
        )  # fmt: skip
        self._database = database
        self._tuner = Tuner(
            host, self._told_settings, self._events, Sensors().read, config.power_profile,
            host_settings(config).threads_per_worker(),
        )  # fmt: skip
        self._upkeep = Upkeep(lambda: self._api.last_request_s, lambda: self._api.in_flight)
        host.subscribe(self._model_changed)
        serving = Serving(host, lambda: self._catalog, self._ledger.refused)
        self._api = Api(
            serving,
            lambda: self._catalog,
            ready=self._readiness,
            status=self._status,
            metrics=self._metrics,
            max_request_bytes=config.max_request_bytes,
            max_requests=config.max_requests,
            host_allowed=host_filter(listener.getsockname()[0]),
            created_s=int(wall_s()),
        )
        self._server = ApiServer(self._api, listener, self._serving.set)
        self._recorder = Recorder(
            self._outbox, host, self._ledger, artifacts.root, self._telemetry_interval_s, lambda: self._api.in_flight,
            self._publisher.poke,
        )  # fmt: skip

    @classmethod
    async def make(
        cls,
        config: Config,
        identity: Identity,
        make_host: Callable[[HostSettings], CountingHost],
        database: Database,
        listener: socket.socket,
        notifier: Notifier,
    ) -> Daemon:
        """Build the parts on what is stored."""
        artifacts = ArtifactStore(config.state_dir / "artifacts")
        store = DesiredStore(database)
        desired = DesiredOwner(store, await store.load())
        host = make_host(host_settings(config))
        host.remember(from_json(await database.run(get_meta, MEASURED)))
        return cls(config, identity, host, database, desired, artifacts, listener, notifier)

    async def run(self, stopping: Stopping) -> None:
        """Run the parts until a signal; then stop them in order."""
        self._desired.on_change(self._told)
        await self._tuner.look()
        await self._converger.settle()
        async with asyncio.TaskGroup() as tasks:
            host = start(tasks, self._host.run(), "model host")
            server = start(tasks, self._server.run(), "local api")
            await self._serving.wait()
            statefolder.write_runtime(self._config.state_dir, self._runtime_facts())
            try:
                self._notifier.ready()
                log.info("ready", api=self._local_api, node=self._identity.name, version=__version__,
                         seconds=round(boottime_s() - self._began_s, 3))  # fmt: skip
                background = [
                    start(tasks, self._converger.run(), "convergence"),
                    start(tasks, self._recorder.run(), "telemetry recorder"),
                    start(tasks, self._publisher.run(), "telemetry publisher"),
                    start(tasks, self._session(), "session"),
                    start(tasks, keep_renewed(self._config.state_dir, wall_s, self._renewed), "certificate renewal"),
                    start(tasks, self._upkeep.run(), "upkeep"),
                    start(tasks, self._tuner.run(), "tuner"),
                    start(tasks, self._keep_measured(), "measured facts"),
                    start(tasks, self._watchdog(), "watchdog"),
                ]
                await self._events.record("info", "Started", f"agentd {__version__} started")
                await stopping.asked.wait()
                await self._stop(stopping, background, host, server)
            finally:
                statefolder.remove_runtime(self._config.state_dir)

    async def _stop(self, stopping: Stopping, background: list[Part], host: Part, server: Part) -> None:
        log.info("stopping", in_flight=self._api.in_flight)
        self._notifier.stopping()
        self._api.stopping = True
        await self._drain(stopping)
        await end_all(background)
        await host.end()
        await self._store_measured()
        self._server.stop()
        await server.end(grace_s=0.0 if stopping.hurry.is_set() else 2.0)
        log.info("stopped")

    async def _drain(self, stopping: Stopping) -> None:
        """Let running requests end, as long as that is bearable."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.stop_timeout):
                while self._api.in_flight and not stopping.hurry.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await stopping.hurry.wait()

    # --- what the parts ask of each other -----------------------------------------------------------------------------

    async def _session(self) -> None:
        # Imported when the node already serves: gRPC is the heaviest library here, and serving does not need it.
        from agentd.session.relay import Relay
        from agentd.session.session import Callbacks, Session

        callbacks = Callbacks(
            welcomed=self._welcomed,
            acknowledged=self._publisher.acknowledge,
            relay=Relay(self._api).serve,
            in_flight=lambda: self._api.in_flight,
            hello_facts=self._hello_facts,
        )
        hello = {
            "boot_id": boot_id(),
            "agentd_version": __version__,
            "features": sorted(FEATURES),
            "local_api": self._local_api,
        }
        session = Session(lambda: self._identity, self._desired, self._board, callbacks, hello)
        self._link = session.link
        # What was imported so far lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        await session.run()

    _link: Any = None

    async def _hello_facts(self) -> tuple[state_pb2.Inventory, list[str]]:
        facts = await asyncio.to_thread(inventory.take, self._artifacts.root, sorted(self._formats), self._host.limits)
        return facts, sorted(self._converger.verified)

    def _welcomed(self, welcome: session_pb2.Welcome) -> None:
        told = welcome.endpoints
        self._identity = identity_files.learn_endpoints(
            self._identity, Endpoints(told.node_api, told.enrollment, told.artifacts)
        )
        if welcome.mqtt.host:
            self._publisher.use(welcome.mqtt, welcome.session_epoch)
        self._converger.forgive()

    def _model_changed(self, status: ModelStatus) -> None:
        self._converger.poke()
        if status.state in (ModelState.STOPPING, ModelState.UNLOADED):
            self._upkeep.poke()

    def _planned(self, current: Plan) -> None:
        self._catalog = router.build(self._desired.document, current.chosen, current.ready, current.statuses)

    def _told(self) -> None:
        """A new desired state is stored."""
        assert self._desired.document is not None
        problem = identity_files.trust(self._identity, self._desired.document.trusted_ca_pem)
        if problem:
            log.warning("authorities not changed", reason=problem)
        self._tuner.apply()
        self._converger.poke()

    def _fetch(self, sha256: str, size_bytes: int, stop: Stop) -> Fetched:
        # The HTTP client is imported by the first download: most starts of a node bring none.
        from agentd.artifacts.fetch import fetch

        base = self._identity.endpoints.artifacts
        return fetch(base, sha256, size_bytes, self._artifacts.partial_path(sha256), self._ssl_context(), stop)

    def _ssl_context(self) -> Any:
        return self._identity.ssl_context()

    def _renewed(self, identity: Identity) -> None:
        self._identity = identity

    def _told_settings(self) -> state_pb2.NodeSettings | None:
        return self._desired.document.settings if self._desired.document else None

    async def _keep_measured(self) -> None:
        while True:
            await asyncio.sleep(MEASURED_EVERY_S)
            await self._store_measured()

    async def _store_measured(self) -> None:
        """What models took here corrects the estimates of the next life of agentd."""
        text = to_json(self._host.measured)
        if text == self._measured_text:
            return
        try:
            await self._database.run(set_meta, MEASURED, text)
            self._measured_text = text
        except (OSError, sqlite3.Error) as error:
            log.warning("cannot write down what models take", error=str(error))

    _measured_text = ""

    def _telemetry_interval_s(self) -> float:
        document = self._desired.document
        told = document.settings.telemetry_interval_s if document else 0.0
        return max(told, 0.1) if told else self._config.telemetry_interval

    async def _watchdog(self) -> None:
        """Feed systemd's watchdog while convergence and the model host make progress. That this runs at all proves that
        the event loop lives."""
        period_s = (self._notifier.watchdog_s or 90.0) / 3
        while True:
            silent = await self._host.probe()
            if boottime_s() - self._converger.last_pass_s >= STALLED_S:
                silent = silent or f"convergence made no pass for {STALLED_S:g} s"
            if silent:
                log.error("the daemon hangs", reason=silent)
            else:
                self._notifier.alive()
            await asyncio.sleep(period_s)

    # --- what people read ---------------------------------------------------------------------------------------------

    def _runtime_facts(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "api": self._local_api,
            "node_id": self._identity.node_id,
            "name": self._identity.name,
        }

    async def _readiness(self) -> dict[str, Any]:
        """Ready means: the scheduler and every owner of a model went round just now."""
        silent = await self._host.probe()
        facts = {"ready": self._serving.is_set() and not silent, "connected": self._connected()}
        return {**facts, "reason": silent} if silent else facts

    def _connected(self) -> bool:
        return bool(self._link and self._link.connected)

    async def _status(self) -> dict[str, Any]:
        stored = self._desired.stored
        size = await self._outbox.size()
        return {
            "version": __version__,
            "node_id": self._identity.node_id,
            "name": self._identity.name,
            "uptime_s": round(boottime_s() - self._began_s, 3),
            "limits": self._host.limits,
            "power": {"profile": self._tuner.choice.profile.value, "reason": self._tuner.choice.reason},
            "connected": self._connected(),
            "broker_connected": self._publisher.connected,
            "problem": self._link.problem if self._link else "",
            "conflict": self._desired.conflict,
            "timeline": stored.timeline if stored else "",
            "generation": self._desired.generation,
            "certificate_expires": int(self._identity.not_after_s),
            "in_flight": self._api.in_flight,
            "outbox": {"rows": size.rows, "batches": size.batches, "bytes": size.bytes, "dropped": size.dropped},
            "assignments": [_assignment_facts(status) for status in self._board.statuses.values()],
            "models": [
                {"model": str(status.key), "state": status.state.value, "pid": status.pid,
                 "memory_bytes": status.memory_bytes, "in_flight": status.in_flight, "reason": status.reason}
                for status in self._host.status()
            ],
        }  # fmt: skip

    async def _metrics(self) -> bytes:
        size = await self._outbox.size()
        conditions: dict[str, int] = {"Staged": 0, "Ready": 0, "Warm": 0, "Degraded": 0}
        for status in self._board.statuses.values():
            for condition in status.conditions:
                conditions[condition.type] += condition.status == state_pb2.CONDITION_STATUS_TRUE
        return render(
            Snapshot(
                uptime_s=boottime_s() - self._began_s,
                memory_bytes=await asyncio.to_thread(own_memory_bytes),
                connected=self._connected(),
                attempts=self._link.attempts if self._link else 0,
                conflict=bool(self._desired.conflict),
                generation=self._desired.generation,
                conditions=conditions,
                outbox_rows=size.rows,
                outbox_batches=size.batches,
                outbox_bytes=size.bytes,
                outbox_dropped=size.dropped,
                in_flight=self._api.in_flight,
                counts=self._ledger.totals(),
                models=self._host.status(),
            )
        )


def host_settings(config: Config) -> HostSettings:
    """The model host's part of the configuration."""
    return HostSettings(
        max_concurrent=config.max_concurrent_agents,
        memory_limit_factor=config.memory_limit_factor,
        memory_limit_slack_bytes=LIMIT_SLACK_BYTES,
        worker_cpus=config.worker_cpus,
        worker_pids=config.worker_pids,
        slots=max(1, config.slots),
        gpu_layers=config.gpu_layers,
        kv_type=config.kv_type,
        lock_memory=config.lock_memory,
        max_memory_bytes=config.max_memory,
        max_loaded_models=config.max_loaded_models,
        default_context_tokens=config.context_tokens,
        keep_alive_s=config.keep_alive,
        threads=config.threads,
        backends=config.backends,
        worker_environment={
            upstream.HOSTS: config.upstream_hosts,
            upstream.KEYS: str(config.upstream_keys.absolute()),
        },
        run_dir=Path(config.state_dir) / "run",
    )


def _assignment_facts(status: state_pb2.AssignmentStatus) -> dict[str, Any]:
    return {
        "id": status.id,
        "variant": status.variant,
        "bytes_done": status.bytes_done,
        "bytes_total": status.bytes_total,
        "conditions": {
            item.type: {
                "status": item.status == state_pb2.CONDITION_STATUS_TRUE,
                "reason": item.reason,
                "message": item.message,
            }
            for item in status.conditions
        },
    }
