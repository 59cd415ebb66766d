"""Which variant of a model a device runs, and why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmfleet.variants import (
    UPSTREAM,
    Candidate,
    Choice,
    Hardware,
    NoChoice,
    bits_per_weight,
    choose_variant,
    device_class,
    memory_need,
)

# A model of 3.8 billion weights.
SIZES = {"Q2_K": 1.4, "Q4_0": 2.2, "Q4_K_M": 2.4, "Q5_K_M": 2.8, "Q6_K": 3.1, "Q8_0": 4.1, "F16": 7.6}
ALL = tuple(Candidate(name.lower(), "gguf", name, int(size * 10**9)) for name, size in SIZES.items())
PI = Hardware(model_bytes=6 * 10**9, cores=4)
GATEWAY = Hardware(model_bytes=800 * 10**6, cores=4)
DESKTOP = Hardware(model_bytes=13 * 10**9, cores=8)
GPU = Hardware(model_bytes=26 * 10**9, cores=8, accelerators=frozenset({"nvidia", "gpu"}))
SERVER = Hardware(model_bytes=100 * 10**9, cores=32)


@pytest.mark.parametrize(
    ("hardware", "profile", "expected"),
    [
        (PI, "balanced", "q4_k_m"),
        (PI, "performance", "q6_k"),
        (PI, "saver", "q4_k_m"),
        (DESKTOP, "balanced", "q6_k"),
        (DESKTOP, "saver", "q4_k_m"),
        (GPU, "balanced", "q8_0"),
        (GPU, "performance", "f16"),
        (GPU, "saver", "q6_k"),
        (SERVER, "balanced", "q8_0"),
        # Memory decides where the ceiling does not: 2.4 GB of weights need 2.74 GB.
        (Hardware(2_700_000_000, 4), "balanced", "q4_0"),
        (Hardware(2_000_000_000, 4), "balanced", "q2_k"),
        # Nothing is known: as a plain device with room.
        (Hardware(), "balanced", "q4_k_m"),
    ],
)
def test_best_quality_that_the_device_runs_well_and_that_fits(hardware, profile, expected):
    choice = choose_variant(ALL, {"gguf"}, hardware, profile)
    assert isinstance(choice, Choice)
    assert choice.name == expected


@pytest.mark.parametrize(
    ("candidates", "formats", "hardware", "order", "expected", "reason"),
    [
        (ALL, {"gguf"}, GPU, ("Q5_K_M", "Q4_0"), "q5_k_m", "comes first in the order"),
        (ALL, {"gguf"}, Hardware(2_700_000_000, 4), ("q5_k_m", "q4_0"), "q4_0", "no room for 5 others"),
        (ALL[:1], {"gguf"}, PI, (), "q2_k", "the only variant"),
        (ALL[5:], {"gguf"}, PI, (), "q8_0", "fewest bits"),
        ((ALL[0], Candidate("o", "onnx-genai", "int4", 10**9)), {"gguf"}, PI, (), "q2_k", "no backend for 1 other"),
        # Equals: as the model's maker put them.
        (
            (Candidate("o", "onnx-genai", "int4", 9), Candidate("g", "gguf", "Q4_0", 9)),
            {"gguf", "onnx-genai"}, PI, (), "o", "best quality",
        ),
        # What leaves the device comes last, whatever its quality.
        ((Candidate("far", UPSTREAM, "F16", 99), ALL[0]), {"gguf", UPSTREAM}, PI, (), "q2_k", "best quality"),
        ((Candidate("far", UPSTREAM, "", 99), ALL[6]), {"gguf", UPSTREAM}, PI, (), "far", "none that runs on this"),
    ],
)  # fmt: skip
def test_reasons(candidates, formats, hardware, order, expected, reason):
    choice = choose_variant(candidates, formats, hardware, order=order)
    assert isinstance(choice, Choice)
    assert choice.name == expected
    assert reason in choice.reason


def test_what_cannot_be_says_why():
    none = choose_variant(ALL, {"onnx-genai"}, PI)
    assert none == NoChoice(
        "backend", "no backend here loads gguf (installed: onnx-genai): install one, or add another variant"
    )
    none = choose_variant(ALL, {"gguf"}, GATEWAY)
    assert isinstance(none, NoChoice)
    assert none.lacks == "memory"
    assert "needs 1.6 GB, and models may take 800.0 MB here" in none.reason


def test_device_classes():
    assert device_class(GATEWAY)[0] == "small"
    assert device_class(PI)[0] == "plain"
    assert device_class(Hardware(4 * 10**9, 4, frozenset({"npu"})))[0] == "desktop"
    assert device_class(GPU, "performance")[0] == "server"
    assert device_class(GATEWAY, "saver")[0] == "small"


def test_bits_grow_with_the_names():
    ordered = ["IQ2_XS", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_K_S", "Q4_K_M", "Q4_1", "Q5_K_S", "Q5_K_M",
               "Q6_K", "int8", "Q8_0", "fp16", "F32"]  # fmt: skip
    bits = [bits_per_weight(name) for name in ordered]
    assert bits == sorted(bits)
    assert bits_per_weight("UD-Q4_K_XL") == bits_per_weight("q4_k_m") == bits_per_weight("")


VARIANTS = st.lists(
    st.builds(
        Candidate,
        st.uuids().map(str),
        st.sampled_from(["gguf", "onnx-genai", UPSTREAM]),
        st.sampled_from(["", *SIZES, "int4", "int8", "weird"]),
        st.integers(0, 10**11),
    ),
    max_size=8,
)
HARDWARE = st.builds(
    Hardware, st.integers(0, 10**11), st.integers(0, 64), st.frozensets(st.sampled_from(["nvidia", "npu", "gpu"]))
)


FORMATS = st.sets(st.sampled_from(["gguf", "onnx-genai", UPSTREAM]))


@given(VARIANTS, FORMATS, HARDWARE, st.sampled_from(["saver", "", "performance"]))
def test_a_choice_can_be_loaded_and_fits(variants, formats, hardware, profile):
    choice = choose_variant(variants, formats, hardware, profile)
    if isinstance(choice, NoChoice):
        loadable = [variant for variant in variants if variant.format in formats]
        assert not loadable or all(memory_need(variant) > hardware.model_bytes > 0 for variant in loadable)
        return
    [chosen] = [variant for variant in variants if variant.name == choice.name]
    assert chosen.format in formats
    assert not hardware.model_bytes or memory_need(chosen) <= hardware.model_bytes
    assert choice.reason


@given(VARIANTS, HARDWARE, st.randoms(use_true_random=False))
def test_order_matters_between_equals_only(variants, hardware, chance):
    formats = {"gguf", "onnx-genai", UPSTREAM}
    shuffled = list(variants)
    chance.shuffle(shuffled)
    one, other = (choose_variant(given, formats, hardware) for given in (variants, shuffled))
    assert type(one) is type(other)
    if isinstance(one, Choice) and isinstance(other, Choice):
        by_name = {variant.name: variant for variant in variants}
        assert bits_per_weight(by_name[one.name].quantization) == bits_per_weight(by_name[other.name].quantization)
