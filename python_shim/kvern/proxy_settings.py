"""Settings of `kvern proxy`: flags, and the keys of a TOML file of the same names."""

import argparse
import dataclasses
import pathlib
import re
from urllib.parse import urlsplit

from kvern.config import COMPACT_TTL_SECONDS, MAX_COMPACT_TTL_SECONDS, OptionError, is_codec_spec, parse_address, parse_key_file
from kvern.task_kind import TASKS

ON_FAILURE = ("fallback", "error")


def _url(key: str, value) -> str:
    parts = urlsplit(value) if isinstance(value, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/"):
        raise OptionError(f"{key} is {value!r}; it must be the address of a vLLM server, such as 'http://host:8000'.")
    return f"{parts.scheme}://{parts.netloc}"


def _listen(key: str, value) -> str:
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})", value) if isinstance(value, str) else None
    if match is None or int(match[2]) > 65535:
        raise OptionError(f"{key} is {value!r}; it must be 'address:port', such as '0.0.0.0:8100'.")
    return value


def _chain(key: str, value) -> str:
    if not is_codec_spec(value):
        raise OptionError(f"{key} is {value!r}; it must name a compact chain, such as 'cake(budget=12%) | int8'.")
    return value


def _one_of(*known: str):
    def parse(key: str, value) -> str:
        if value not in known:
            raise OptionError(f"{key} is {value!r}; it must be one of {', '.join(known)}.")
        return value

    return parse


def _number(least: float, most: float, whole: bool = False):
    def parse(key: str, value):
        try:
            number = None if isinstance(value, bool) else int(value) if whole else float(value)
        except (TypeError, ValueError):
            number = None
        if number is None or not least <= number <= most or (whole and number != float(value)):
            kind = "a whole number" if whole else "a number"
            raise OptionError(f"{key} is {value!r}; it must be {kind} from {least:g} to {most:g}.")
        return number

    return parse


def _switch(key: str, value) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{key} is {value!r}; it must be true or false.")
    return value


def _setting(default, parse, help_text: str):
    return dataclasses.field(default=default, metadata={"parse": parse, "help": help_text})


@dataclasses.dataclass(frozen=True)
class Settings:
    prefill: str = _setting("", _url, "vLLM server that computes prompts and makes compact caches")
    decode: str = _setting("", _url, "vLLM server that decodes from them; absent: the prefill server does both")
    listen: str = _setting("127.0.0.1:8100", _listen, "where clients connect")
    daemon: str = _setting("", parse_address, "kvernd, unix:///path or tcp://host:port; absent: this machine's own")
    server_key_file: str = _setting("", parse_key_file, "public CURVE key of the daemon (tcp)")
    client_key_file: str = _setting("", parse_key_file, "own CURVE key pair (tcp)")
    insecure: bool = _setting(False, _switch, "tcp without keys")
    compact: str = _setting("cake(budget=25%) | int8", _chain, "what is kept of a prompt, and in which form")
    task: str = _setting("auto", _one_of("auto", *TASKS), "kind of task for windowkv; auto: judged by the text")
    min_prompt_tokens: int = _setting(1024, _number(2, 1 << 24, whole=True), "shorter prompts are served as they are")
    ttl_seconds: int = _setting(
        COMPACT_TTL_SECONDS,
        _number(1, MAX_COMPACT_TTL_SECONDS, whole=True),
        "life of a compact cache whose deletion is lost; longer than any answer",
    )
    ready_timeout_seconds: float = _setting(30.0, _number(0, 3600), "how long a compact cache may take, storing the prompt included")
    connect_timeout_seconds: float = _setting(10.0, _number(0.01, 600), "one attempt to connect to a server")
    on_failure: str = _setting(
        "fallback", _one_of(*ON_FAILURE), "a request that cannot be compact: fallback serves it in full, error refuses it"
    )

    @classmethod
    def from_values(cls, values: dict) -> "Settings":
        """Throws OptionError."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise OptionError(f"unknown: {', '.join(unknown)}. Known keys: {', '.join(sorted(fields))}.")
        settings = cls(**{name: fields[name].metadata["parse"](name, value) for name, value in values.items()})
        if not settings.prefill:
            raise OptionError("prefill is not set; it must be the address of a vLLM server, such as 'http://host:8000'.")
        if settings.daemon.startswith("tcp://") and not settings.insecure:
            if not settings.server_key_file or not settings.client_key_file:
                raise OptionError("over TCP, server_key_file and client_key_file are needed, or insecure on a trusted network.")
        return dataclasses.replace(settings, decode=settings.decode or settings.prefill)


def read(arguments: list[str], description: str) -> Settings:
    """From the command line, and the file that it names; flags win. Throws OptionError."""
    parser = argparse.ArgumentParser(
        prog="kvern proxy", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=pathlib.Path, metavar="FILE", help="TOML with the flags' names as keys, _ for -")
    for field in dataclasses.fields(Settings):
        default = f" (default: {field.default})" if field.default not in ("", False) else ""
        options = {"action": "store_true", "default": None} if field.default is False else {"metavar": "…"}
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, help=(field.metadata["help"] + default).replace("%", "%%"), **options)
    given = vars(parser.parse_args(arguments))
    path = given.pop("config")
    values = _read_file(path) if path else {}
    values |= {name: value for name, value in given.items() if value is not None}
    return Settings.from_values(values)


def _read_file(path: pathlib.Path) -> dict:
    try:
        import tomllib
    except ImportError:
        raise OptionError("--config needs Python 3.11; give the settings as flags.") from None
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path}: {error}") from None
