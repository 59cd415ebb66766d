"""What deploy/ ships is right for the programs that it is for: units for systemd, configurations for our own parsers,
the demo's manifests for the control plane's."""

from __future__ import annotations

import configparser
import queue
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from paho.mqtt import client as mqtt

from controlplane.node_api.pki import Pki
from fleetctl import manifests
from slmfleet.config import load
from tests.support.processes import Child, free_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
# What Debian's package has as /etc/mosquitto/mosquitto.conf (2.0.11): ours is read after it.
DEBIAN_MOSQUITTO = """\
pid_file {folder}/mosquitto.pid
persistence true
persistence_location {folder}/
log_dest stderr
include_dir {folder}/conf.d
"""
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def settings(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(unit)
    return parser["Service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed (Debian: the systemd package)")
    # The program that the unit names must exist for `verify`: take the one of this environment.
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/slmfleet/bin", str(Path(sys.executable).parent)))
    done = subprocess.run([program, "verify", copy], capture_output=True, text=True, timeout=60, check=False)
    said = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if unit.stem in line)
    assert (done.returncode, said) == (0, "")


def test_the_units_ship() -> None:
    assert [unit.name for unit in UNITS] == ["agentd.service", "controlplane.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_unit_points_to_no_page_that_nobody_installs(unit: Path) -> None:
    assert "file:" not in unit.read_text()


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_page_installs_all_that_the_unit_needs(unit: Path) -> None:
    """The program, its user, its folder, its configuration, and the unit itself."""
    page, service = (ROOT / "docs/install.md").read_text(), settings(unit)
    program, _, configuration = service["ExecStart"].partition(" ")
    venv = program.removesuffix(f"/bin/{unit.stem}")
    assert f"sudo python3 -m venv {venv}\n" in page
    assert re.search(rf'sudo {venv}/bin/pip install -c constraints.txt "\$\(echo dist/slmfleet-\*\.whl\)\[', page)
    folder = f"/var/lib/{service['StateDirectory']}"
    assert re.search(rf"sudo useradd --system --user-group --home-dir {folder} .* {service['User']}\n", page)
    assert (
        f"sudo install -d -m {service['StateDirectoryMode'][1:]} -o {service['User']} -g {service['Group']} {folder}\n"
        in page
    )
    file = configuration.split()[-1]
    assert f" deploy/{unit.stem}.toml {file}\n" in page
    assert f"sudoedit {file}\n" in page
    assert f"sudo install -m 644 deploy/systemd/{unit.name} /etc/systemd/system/\n" in page


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_a_page_names_only_files_that_ship(page: str) -> None:
    named = set(re.findall(r"\b(?:deploy/[\w./-]*\w|constraints\.txt)", (ROOT / page).read_text()))
    assert {"deploy/agentd.toml", "constraints.txt"} <= named
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize(("example", "key"), [("agentd", "state_dir"), ("controlplane", "data_dir")])
def test_the_example_has_the_folder_that_systemd_makes(example: str, key: str) -> None:
    """Else `agentd status` of an operator would look elsewhere than the daemon under systemd."""
    with (DEPLOY / f"{example}.toml").open("rb") as file:
        stated = tomllib.load(file)[key]
    assert stated == f"/var/lib/{settings(DEPLOY / f'systemd/{example}.service')['StateDirectory']}"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_unit_runs_as_its_own_user_watched_and_restarted(unit: Path) -> None:
    service = settings(unit)
    assert service["Type"] == "notify"
    assert service["User"] == f"slmfleet-{unit.stem}"
    assert service["Restart"] == "always"
    assert service["WatchdogSec"]
    assert service["StateDirectory"] == unit.stem
    assert service["NoNewPrivileges"] == "yes"


def test_hardening_leaves_agentd_its_control_groups_and_devices() -> None:
    service = settings(DEPLOY / "systemd/agentd.service")
    assert service["Delegate"] == "yes"
    assert service["ProtectControlGroups"] == "no"
    for forbidden in ("PrivateDevices", "MemoryDenyWriteExecute", "PrivateUsers", "ProcSubset"):
        assert forbidden not in service, f"{forbidden} keeps workers from starting, or from their accelerator"


def test_the_example_of_agentd_is_read_by_agentd() -> None:
    from agentd.config import PREFIX, Config

    config = load(Config, prefix=PREFIX, file=DEPLOY / "agentd.toml", environment={})
    assert config.server == "fleet.example.org:8443"


def test_the_example_of_the_control_plane_is_read_by_the_control_plane() -> None:
    from controlplane.config import PREFIX, Config

    config = load(Config, prefix=PREFIX, file=DEPLOY / "controlplane.toml", environment={})
    assert "postgresql" in config.postgres_url


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[Pki, int]]:
    """Mosquitto with the example's configuration: its port, and the authority that it trusts."""
    program = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        pytest.skip("mosquitto is not installed")
    pki = Pki.open(tmp_path / "pki", ["localhost"])
    port = free_port()
    text = (DEPLOY / "mosquitto.conf").read_text()
    text = text.replace("/etc/mosquitto/slmfleet/mosquitto.acl", str(DEPLOY / "mosquitto.acl"))
    text = text.replace("/etc/mosquitto/slmfleet", str(tmp_path / "pki")).replace("8883", f"{port} 127.0.0.1")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/slmfleet.conf").write_text(text + "\nuser root\n")
    (tmp_path / "mosquitto.conf").write_text(DEBIAN_MOSQUITTO.format(folder=tmp_path))
    with Child([program, "-c", tmp_path / "mosquitto.conf"]) as child:
        child.wait_for_line("mosquitto version .* running")
        yield pki, port


def client(pki: Pki, port: int, folder: Path, name: str, heard: queue.Queue[str]) -> mqtt.Client:
    """A connected client with a certificate for ``name``, made as an operator makes it."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    authority = folder / "pki"
    request = ["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    csr = subprocess.run([*request, "-keyout", key, "-subj", f"/CN={name}"], capture_output=True, check=True).stdout
    sign = ["openssl", "x509", "-req", "-CA", authority / "ca.pem", "-CAkey", authority / "ca.key", "-days", "1"]
    subprocess.run([*sign, "-out", certificate], input=csr, capture_output=True, check=True)
    made = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5)
    made.tls_set(str(authority / "ca.pem"), str(certificate), str(key))
    made.on_connect = lambda *_: heard.put("connected")
    made.on_subscribe = lambda _c, _u, _m, codes, _p: heard.put(f"subscribed {codes[0]}")
    made.on_message = lambda _c, _u, message: heard.put(message.topic)
    made.connect("localhost", port)
    made.loop_start()
    assert heard.get(timeout=10) == "connected"
    return made


def test_mosquitto_lets_a_node_write_below_its_own_id_and_nowhere_else(broker: tuple[Pki, int], tmp_path: Path) -> None:
    pki, port = broker
    heard: queue.Queue[str] = queue.Queue()
    server = client(pki, port, tmp_path, "controlplane", heard)
    node = client(pki, port, tmp_path, "node-1", queue.Queue())
    try:
        server.subscribe("slmfleet/v1/#", qos=1)
        assert "Granted" in heard.get(timeout=10)
        node.publish("slmfleet/v1/node-2/metrics", b"forged", qos=1).wait_for_publish(10)
        node.publish("slmfleet/v1/node-1/metrics", b"true", qos=1).wait_for_publish(10)
        assert heard.get(timeout=10) == "slmfleet/v1/node-1/metrics"
        assert heard.empty()
    finally:
        for made in (server, node):
            made.disconnect()
            made.loop_stop()


def test_mosquitto_refuses_who_has_no_certificate(broker: tuple[Pki, int], tmp_path: Path) -> None:
    _, port = broker
    context = ssl.create_default_context(cafile=tmp_path / "pki/ca.pem")
    # TLS 1.3 lets the client finish first: the refusal comes with the first read.
    with (
        socket.create_connection(("localhost", port), timeout=10) as plain,
        pytest.raises(ssl.SSLError),
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        secured.recv(1)


def test_the_demo_has_a_model_an_agent_and_a_deployment_of_two_replicas() -> None:
    from controlplane.domain.parsing import parse_manifest

    documents = manifests.read([str(DEPLOY / "demo/fleet.yaml")])
    assert [document.kind for document in documents] == ["Model", "Agent", "Deployment"]
    for document in documents:
        assert not isinstance(parse_manifest(document.value), tuple), document.name
    assert documents[2].value["spec"]["replicas"] == 2
