"""Options of the connector: the keys of kv_connector_extra_config, and what one request may ask for."""

import dataclasses
import difflib
import os
import re

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)?$")
_UNIT = {
    None: 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
# Characters of a codec chain such as "unrotate | int4(group=64)"; what it means is for the daemon to say.
_CODEC = re.compile(r"^[a-z0-9_]+[-.,=|()%a-zA-Z0-9_ ]*$")
_CODEC_CHARACTERS = 512
DATA_PLANES = ("auto", "shm", "ucx")
MINIMUM_STAGING = 16 << 20


class OptionError(ValueError):
    """A setting that cannot be used; the text says which and what to write instead."""


def parse_size(key: str, value) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.match(value.strip()) if isinstance(value, str) else None
    size = int(float(match[1]) * _UNIT[match[2]]) if match else 0
    if size <= 0:
        raise OptionError(f"{key} is {value!r}; it must be a size such as 268435456 or '256MiB'.")
    return size


def _parse_bool(key: str, value) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise OptionError(f"{key} is {value!r}; it must be true or false.")


def _parse_count(least: int, most: int):
    def parse(key: str, value) -> int:
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise OptionError(f"{key} is {value!r}; it must be a whole number from {least} to {most}.")
        return value

    return parse


def _parse_text(key: str, value) -> str:
    if not isinstance(value, str):
        raise OptionError(f"{key} is {value!r}; it must be a string.")
    return value


def parse_address(key: str, value) -> str:
    text = _parse_text(key, value)
    if re.match(r"^unix:///.+$", text) or re.match(r"^tcp://[^/\s]+:\d{1,5}$", text):
        return text
    raise OptionError(
        f"{key} is {value!r}; it must be 'unix:///path/to/kvernd.sock' or 'tcp://host:port'. Leave it out to start or "
        "join an embedded daemon on this machine."
    )


def _parse_data_plane(key: str, value) -> str:
    if value not in DATA_PLANES:
        raise OptionError(f"{key} is {value!r}; it must be one of {', '.join(DATA_PLANES)}.")
    return value


def is_codec_spec(value) -> bool:
    return isinstance(value, str) and len(value) <= _CODEC_CHARACTERS and _CODEC.match(value) is not None


def _parse_codec(key: str, value) -> str:
    if not is_codec_spec(value):
        raise OptionError(f"{key} is {value!r}; it must name a codec chain, for instance 'raw', 'int8' or 'unrotate | int4'.")
    return value


def parse_key_file(key: str, value) -> str:
    text = _parse_text(key, value)
    if not os.path.isfile(text):
        raise OptionError(f"{key} names {text!r}, which is not a file. Make keys with `kvernctl keygen`.")
    return text


def _parse_folder(key: str, value) -> str:
    text = _parse_text(key, value)
    if not os.path.isdir(text):
        raise OptionError(f"{key} names {text!r}, which is not a folder.")
    return text


def _option(default, parse, help_text: str):
    return dataclasses.field(default=default, metadata={"parse": parse, "help": help_text})


@dataclasses.dataclass(frozen=True)
class Options:
    """One field per key; the key is the field's name with "kvern." before it."""

    address: str = _option("", parse_address, "daemon, unix:///path or tcp://host:port; absent: embedded")
    data_plane: str = _option("auto", _parse_data_plane, "auto, shm or ucx")
    server_key_file: str = _option("", parse_key_file, "public CURVE key of the daemon (tcp)")
    client_key_file: str = _option("", parse_key_file, "own CURVE key pair (tcp)")
    insecure: bool = _option(False, _parse_bool, "tcp without keys")
    codec: str = _option("", _parse_codec, "codec chain of what this engine stores; absent: the daemon's choice")
    compact: str = _option("", _parse_codec, "chain of the compact caches of requests that say \"compact\": true")
    rewrite: bool = _option(
        False, _parse_bool, "requests may bring the whole prompt of a compact cache; its tokens give way to slots"
    )
    trust_rotation: bool = _option(
        False,
        _parse_bool,
        "make compact caches even where it could not be tested that the model turns its keys as its configuration says",
    )
    profiles: str = _option("", _parse_folder, "folder of model profiles (`kvern calibrate`); absent: $KVERN_PROFILES")
    store_generated: bool = _option(True, _parse_bool, "store complete chunks of generated tokens too")
    threads: int = _option(0, _parse_count(0, 64), "transfer threads of each worker; 0: 1, or 2 on more than 4 cores")
    staging: int = _option(256 << 20, parse_size, "staging memory of each worker")
    connect_timeout_ms: int = _option(2000, _parse_count(10, 600_000), "one attempt to connect")
    setup_timeout_ms: int = _option(
        2000,
        _parse_count(0, 600_000),
        "how long the first requests wait for the first session with the daemon and for their namespace",
    )
    call_timeout_ms: int = _option(10_000, _parse_count(10, 600_000), "one call of the daemon")
    load_timeout_ms: int = _option(30_000, _parse_count(100, 3_600_000), "a load that takes longer has failed")
    store_timeout_ms: int = _option(30_000, _parse_count(100, 3_600_000), "a store that takes longer is dropped")
    match_timeout_ms: int = _option(50, _parse_count(1, 10_000), "a look-up that takes longer counts as a miss")
    prefetch_timeout_ms: int = _option(
        2000, _parse_count(0, 600_000), "how long a request waits for what lower tiers bring up; 0: they are not asked"
    )
    embedded_dram: int = _option(4 << 30, parse_size, "memory of the embedded daemon")
    weights: str = _option("", _parse_text, "name of the weights, in place of the fingerprint of their files")

    @classmethod
    def from_extra_config(cls, extra: dict) -> "Options":
        """Throws OptionError. Keys of others (no "kvern." before them) are left alone, unless they look like ours."""
        fields = {f"kvern.{field.name}": field for field in dataclasses.fields(cls)}
        values = {}
        for key, value in extra.items():
            if key in fields:
                field = fields[key]
                values[field.name] = field.metadata["parse"](key, value)
            elif key.startswith("kvern.") or f"kvern.{key}" in fields:
                near = difflib.get_close_matches(key if key.startswith("kvern.") else f"kvern.{key}", fields, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise OptionError(
                    f"kv_connector_extra_config has the unknown key {key!r}.{hint} Known keys: {', '.join(sorted(fields))}."
                )
        options = cls(**values)
        if options.staging < MINIMUM_STAGING:
            raise OptionError(f"kvern.staging is {options.staging} bytes; it must be at least {MINIMUM_STAGING}.")
        if options.address.startswith("tcp://") and not options.insecure:
            if not options.server_key_file or not options.client_key_file:
                raise OptionError(
                    f"kvern.address is {options.address}: over TCP, kvern.server_key_file and kvern.client_key_file are "
                    "needed (see `kvernctl keygen`), or kvern.insecure = true on a trusted network."
                )
        return options

    def worker_threads(self) -> int:
        return self.threads or (2 if (os.cpu_count() or 1) > 4 else 1)


COMPACT_TTL_SECONDS = 3600
MAX_COMPACT_TTL_SECONDS = 7 * 24 * 3600  # the daemon keeps them no longer
MAX_RETAIN_SECONDS = 7 * 24 * 3600  # nor this
# WindowKV's kinds of task.
COMPACT_TASKS = ("localisation", "aggregation")


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """kv_transfer_params["kvern"] of one request. Wrong values are ignored and named in problem; nothing raises, since
    clients send what they like. A wish for a compact cache that cannot be read is refused, a handle that cannot be read
    is kept as it came: its request must fail."""

    load: bool = True
    store: bool = True
    max_load_tokens: int | None = None
    max_store_tokens: int | None = None
    codec: str = ""
    retain_seconds: int = 0  # what it hits and stores is to be kept for so long
    compact: str = ""  # the chain to make a compact cache by
    ttl_seconds: int = COMPACT_TTL_SECONDS
    task: str = ""
    handle: object = None  # the compact cache to decode from
    rewrite: bool = False  # the prompt is the whole one, in place of placeholders
    asked: bool = False  # the request has a "kvern" entry: it gets an answer
    compact_refusal: str = ""  # why the compact cache that it asks for is not made; part of its answer
    problem: str = ""

    @classmethod
    def from_request(cls, kv_transfer_params, compact: str = "") -> "RequestOptions":
        """compact: the chain that "compact": true stands for; empty: none."""
        if not isinstance(kv_transfer_params, dict) or "kvern" not in kv_transfer_params:
            return cls()
        given = kv_transfer_params["kvern"]
        if not isinstance(given, dict):
            return cls(problem="kv_transfer_params['kvern'] is not an object")
        values, problems, refusals = {}, [], []
        if "handle" in given:
            values["handle"] = "" if given["handle"] is None else given["handle"]
        for key, value in list(given.items())[:32]:
            if key == "handle":
                continue
            if key in ("load", "store", "rewrite") and isinstance(value, bool):
                values[key] = value
            elif key in ("max_load_tokens", "max_store_tokens") and type(value) is int and value >= 0:
                values[key] = value
            elif key == "retain_seconds" and type(value) is int and 0 < value <= MAX_RETAIN_SECONDS:
                values[key] = value
            elif key in ("codec", "compact") and is_codec_spec(value):
                values[key] = value
            elif key == "compact" and value is True and compact:
                values[key] = compact
            elif key == "compact" and value is False:
                pass
            elif key == "ttl_seconds" and type(value) is int and 0 < value <= MAX_COMPACT_TTL_SECONDS:
                values[key] = value
            elif key == "task" and value in COMPACT_TASKS:
                values[key] = value
            elif key == "compact" and value is True:
                refusals.append("compact is true, and this engine has no kvern.compact that says how")
            elif key == "compact":
                refusals.append("compact must be a chain such as 'cake(budget=12%) | int8'")
            elif key == "ttl_seconds":
                refusals.append(f"ttl_seconds must be a whole number from 1 to {MAX_COMPACT_TTL_SECONDS}")
            elif key == "task":
                refusals.append(f"task must be one of {', '.join(COMPACT_TASKS)}")
            else:
                problems.append(repr(key)[:40])
        if refusals and given.get("compact", False) is not False:
            values.pop("compact", None)
            values["compact_refusal"] = "; ".join(refusals)
        problem = f"ignored in kv_transfer_params['kvern']: {', '.join(problems)}" if problems else ""
        return cls(**values, asked=True, problem=problem)
