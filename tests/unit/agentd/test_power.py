"""Profiles from what a device says of itself, and how that is read from sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.device.power import Profile, Readings, Sensors, choose, tuning
from agentd.models.settings import Tuning
from agentd.tuning import combine
from slmfleet.v1 import state_pb2 as pb

P, B, S = Profile.PERFORMANCE, Profile.BALANCED, Profile.SAVER


@pytest.mark.parametrize(
    ("readings", "before", "profile", "reason"),
    [
        pytest.param(Readings(), None, P, "as far as the device tells", id="a server says nothing"),
        pytest.param(Readings(on_battery=False, battery_fraction=0.1), None, P, "mains", id="plugged in, nearly empty"),
        pytest.param(Readings(True, 0.9), None, B, "on battery", id="on battery"),
        pytest.param(Readings(True, 0.29), None, S, "the battery is at 29%", id="low battery"),
        pytest.param(Readings(True, 0.33), P, B, "on battery", id="not yet low"),
        pytest.param(Readings(True, 0.33), S, S, "the battery is at 33%", id="not yet well over low"),
        pytest.param(Readings(True, 0.36), S, B, "on battery", id="well over low"),
        pytest.param(Readings(temperature_c=74.0), P, P, "cool", id="cool"),
        pytest.param(Readings(temperature_c=76.0), P, B, "76", id="warm"),
        pytest.param(Readings(temperature_c=72.0), B, B, "72", id="still warm"),
        pytest.param(Readings(temperature_c=69.0), B, P, "cool", id="cool again"),
        pytest.param(Readings(temperature_c=86.0), P, S, "86", id="hot"),
        pytest.param(Readings(temperature_c=86.0, hot_c=105.0), P, P, "cool", id="made for heat"),
        pytest.param(Readings(throttled=True), P, S, "slowed down", id="throttled"),
    ],
)
def test_auto(readings: Readings, before: Profile | None, profile: Profile, reason: str) -> None:
    choice = choose("auto", readings, before)
    assert choice.profile is profile
    assert reason in choice.reason


def test_a_set_profile_stands_whatever_the_device_says() -> None:
    assert choose("performance", Readings(True, 0.01, 100.0, throttled=True)).profile is P


@given(st.integers(1, 128))
def test_profiles_tighten_step_by_step(threads: int) -> None:
    balanced, saver = tuning(B, threads), tuning(S, threads)
    assert tuning(P, threads) == Tuning()
    assert 1 <= saver.threads <= balanced.threads <= threads
    assert (saver.keep_alive_cap_s or 0) < (balanced.keep_alive_cap_s or 0)


def test_the_tighter_bound_of_operator_and_profile_holds() -> None:
    told = pb.NodeSettings(max_memory_bytes=100, max_loaded_models=2, max_concurrent_agents=4)
    both = combine(told, Tuning(max_concurrent=1, threads=2, keep_alive_cap_s=30.0))
    assert both == Tuning(100, 2, 1, 30.0, 2, 0)
    assert combine(None, Tuning()) == Tuning()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def supply(root: Path, name: str, **files: str) -> None:
    for file, text in files.items():
        write(root / "sys/class/power_supply" / name / file, text)


def test_a_device_that_says_nothing(tmp_path: Path) -> None:
    assert Sensors(tmp_path).read() == Readings()


def test_a_laptop_unplugged_with_a_mouse(tmp_path: Path) -> None:
    supply(tmp_path, "AC", type="Mains", online="0")
    supply(tmp_path, "BAT0", type="Battery", capacity="42", status="Discharging", scope="System")
    supply(tmp_path, "hidpp_battery_0", type="Battery", capacity="5", status="Discharging", scope="Device")
    assert Sensors(tmp_path).read() == Readings(on_battery=True, battery_fraction=0.42)
    supply(tmp_path, "AC", online="1")
    assert Sensors(tmp_path).read().on_battery is False


def test_a_mouse_alone_is_no_battery_of_the_device(tmp_path: Path) -> None:
    supply(tmp_path, "hidpp_battery_0", type="Battery", capacity="5", status="Discharging", scope="Device")
    assert Sensors(tmp_path).read() == Readings()


def test_the_zone_nearest_to_its_own_limit_counts(tmp_path: Path) -> None:
    zones = tmp_path / "sys/class/thermal"
    write(zones / "thermal_zone0/temp", "70000")
    write(zones / "thermal_zone0/trip_point_0_type", "critical")
    write(zones / "thermal_zone0/trip_point_0_temp", "110000")
    write(zones / "thermal_zone1/temp", "60000")
    write(zones / "thermal_zone1/trip_point_0_type", "passive")
    write(zones / "thermal_zone1/trip_point_0_temp", "65000")
    # A sensor that is not there, and one that can't be read.
    write(zones / "thermal_zone2/temp", "-274000")
    write(zones / "thermal_zone3/temp", "")
    found = Sensors(tmp_path).read()
    assert (found.temperature_c, found.hot_c) == (60.0, 65.0)


def test_throttling_counts_from_the_last_look(tmp_path: Path) -> None:
    counter = tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    write(counter, "7")
    sensors = Sensors(tmp_path)
    assert not sensors.read().throttled
    write(counter, "8")
    assert sensors.read().throttled
    assert not sensors.read().throttled


@pytest.mark.parametrize(("register", "throttled"), [("0x0", False), ("50000", False), ("50005", True), ("?", False)])
def test_a_raspberry_pi_tells_what_is_now_and_what_was(tmp_path: Path, register: str, throttled: bool) -> None:
    write(tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled", register)
    assert Sensors(tmp_path).read().throttled is throttled
