"""What deploy/ ships is right for the programs that it is for: units for systemd, configurations for our own parsers,
the demo's manifests for the control plane's."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fleetctl import manifests
from slmfleet.config import load

DEPLOY = Path(__file__).parents[2] / "deploy"
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


def test_mosquitto_reads_its_example(tmp_path: Path) -> None:
    program = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        pytest.skip("mosquitto is not installed")
    text = (DEPLOY / "mosquitto.conf").read_text()
    keys = {line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith("#")}
    assert {"listener", "cafile", "certfile", "keyfile", "require_certificate", "use_identity_as_username"} <= keys


def test_the_demo_has_a_model_an_agent_and_a_deployment_of_two_replicas() -> None:
    from controlplane.domain.parsing import parse_manifest

    documents = manifests.read([str(DEPLOY / "demo/fleet.yaml")])
    assert [document.kind for document in documents] == ["Model", "Agent", "Deployment"]
    for document in documents:
        assert not isinstance(parse_manifest(document.value), tuple), document.name
    assert documents[2].value["spec"]["replicas"] == 2
