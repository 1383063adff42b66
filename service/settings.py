"""Settings of the whole service: one frozen object, read once at the entry and handed down.

Sources, weakest first: the defaults below, `ATTUNE_*` variables, command-line flags. Only `cli.py` looks at
the environment; it passes the mapping to `Settings.read`. A child process gets the same settings back through
`Settings.environment`, so a value is decided in one place only.
"""

import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

PREFIX = "ATTUNE_"
# sun_path holds 108 bytes on Linux and 104 elsewhere; the longest name we put in the folder is 12 bytes.
LONGEST_SOCKET_PATH = 100
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SECRET_BYTES = 32
LONGEST_TOKEN_HOURS = 100 * 366 * 24  # a century: what ends is a date


class SettingsError(ValueError):
    """A setting that cannot be used. `key` names it as the person wrote it."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key


def _commas(value: object) -> object:
    """'a, b' -> ('a', 'b'), so that a list fits one variable."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _optional(value: object) -> object:
    """An empty variable or 'none' means: not set."""
    return None if value in ("", "none") else value


def _address(value: str | None) -> str | None:
    """An address whose host and port can be read; with another, processes end and are started for ever."""
    if value is not None:
        _ = urlsplit(value).port  # what Redis' client asks of it, and raises
    return value


class Settings(BaseModel):
    """Everything a person may choose. Frozen; a bad value is an error that names its key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # where
    data: Path = Path("data")
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    # None: a private server in `data`
    redis_url: Annotated[str | None, BeforeValidator(_optional), AfterValidator(_address)] = Field(
        default=None, pattern="^(redis|rediss|unix)://"
    )

    # the base model: "demo", a local Hugging Face folder or a hub id; the name people see, when it is another
    model: str = "demo"
    model_name: Annotated[str | None, BeforeValidator(_optional)] = None

    # engine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # K/V and adapters on the device, and adapters kept in host memory; None: by what the machine has
    arena_mb: Annotated[int | None, BeforeValidator(_optional)] = Field(default=None, ge=16)
    host_cache_mb: Annotated[int | None, BeforeValidator(_optional)] = Field(default=None, ge=0)
    max_running: int = Field(default=256, ge=1)  # sequences in one step
    # tokens computed in one step; None: as many as keep the device busy
    max_step_tokens: Annotated[int | None, BeforeValidator(_optional)] = Field(default=None, ge=16)
    threads: int = Field(default=0, ge=0)  # of the engine's arithmetic; 0: all cores

    # learning
    auto_refresh_after: int = Field(default=50, ge=0)  # new learned turns; 0: never by itself
    nightly_hour: Annotated[int | None, BeforeValidator(_optional)] = Field(default=3, ge=0, le=23)  # local
    trial_share: float = Field(default=0.0, ge=0, lt=1)  # of the replies, for a new version; 0: all at once
    max_drift: float = Field(default=0.02, gt=0)  # nats a token that a version may lose on neutral text
    trial_replies: int = Field(default=30, ge=1)  # after so many without ratings against it, all
    train_threads: int = Field(default=0, ge=0)  # 0: all cores
    # on a GPU: what learning may take beside the weights (None: a tenth of the memory), and of the time while
    # replies are computed
    training_mb: Annotated[int | None, BeforeValidator(_optional)] = Field(default=None, ge=256)
    training_share: float = Field(default=0.13, gt=0, le=1)

    # people
    token_hours: float = Field(default=24.0, gt=0, le=LONGEST_TOKEN_HOURS)
    replies_per_minute: int = Field(default=120, ge=1)  # one person
    demo_users: Literal["auto", "on", "off"] = "auto"  # the page's user switcher; auto: on loopback only
    origins: Annotated[tuple[str, ...], BeforeValidator(_commas)] = ()  # besides the page's own

    # how it runs
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    fsync: Literal["everysec", "always"] = "everysec"  # what a power cut may cost: about a second, or nothing
    web_root: Annotated[Path | None, BeforeValidator(_optional)] = None  # None: the page that came with us

    @classmethod
    def read(cls, environment: Mapping[str, str], **flags: Any) -> Self:
        """Defaults, then `ATTUNE_*` of the environment, then flags that are not None.

        Raises SettingsError that names the first bad key, also for an unknown `ATTUNE_` variable: a typo
        that is silently ignored costs an evening.
        """
        values: dict[str, Any] = {
            name.removeprefix(PREFIX).lower(): value
            for name, value in environment.items()
            if name.startswith(PREFIX)
        }
        named = {key: f"{PREFIX}{key.upper()}" for key in values}
        given = {key: value for key, value in flags.items() if value is not None}
        named.update({key: "--" + key.replace("_", "-") for key in given})
        try:
            settings = cls(**(values | given))
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                raise SettingsError(named.get(key, key), "there is no such setting") from None
            raise SettingsError(named.get(key, key), f"{first['msg']}; got {first['input']!r}") from None
        try:
            data = settings.data.expanduser().absolute()
        except RuntimeError:  # ~ and the name of nobody here
            raise SettingsError(named["data"], f"expected a folder, got {str(settings.data)!r}") from None
        return settings.model_copy(update={"data": data})

    def environment(self) -> dict[str, str]:
        """These settings as variables for a child process: `Settings.read(s.environment()) == s`."""
        plain: dict[str, str] = {}
        for key in type(self).model_fields:
            value = getattr(self, key)
            if isinstance(value, tuple):
                value = ",".join(value)
            plain[f"{PREFIX}{key.upper()}"] = "" if value is None else str(value)
        return plain

    # derived: facts of the settings, never stored twice

    @property
    def adapter_root(self) -> Path:
        return self.data / "adapters"

    @property
    def population_root(self) -> Path:
        return self.data / "population"

    @property
    def secret_path(self) -> Path:
        return self.data / "secret"

    @property
    def lock_path(self) -> Path:
        return self.data / "lock"

    @property
    def redis_folder(self) -> Path:
        return self.data / "redis"

    @property
    def run_folder(self) -> Path:
        """Where the sockets are: `data/run`, or a short temporary folder when that path is too long."""
        folder = self.data / "run"
        if len(os.fsencode(folder / "engine.sock")) <= LONGEST_SOCKET_PATH:
            return folder
        name = hashlib.sha256(os.fsencode(self.data)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"attune-{os.getuid()}-{name}"

    @property
    def engine_socket(self) -> Path:
        return self.run_folder / "engine.sock"

    @property
    def training_bytes(self) -> int | None:
        return None if self.training_mb is None else self.training_mb << 20

    @property
    def lent_path(self) -> Path:
        """By which the engine lends its weights to the trainer on the same GPU."""
        return self.run_folder / "lent"

    @property
    def redis_socket(self) -> Path:
        return self.run_folder / "redis.sock"

    @property
    def redis_address(self) -> str:
        """What `redis.asyncio.Redis.from_url` takes: the given server, or the private one's socket."""
        return self.redis_url or f"unix://{quote(os.fsencode(self.redis_socket))}"

    @property
    def page_address(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def demo_sessions(self) -> bool:
        """Whether the page may hand out tokens by name, to those on this machine: where all are yes, on a
        network only when asked."""
        return self.demo_users == "on" or (self.demo_users == "auto" and self.host in LOOPBACK)

    @property
    def page_folder(self) -> Path:
        """The built page: inside the installed package, or `web/dist` of a checkout."""
        if self.web_root is not None:
            return self.web_root
        packaged = Path(__file__).parent / "page"
        return packaged if packaged.is_dir() else Path(__file__).parent.parent / "web" / "dist"

    @property
    def shown_model(self) -> str:
        return self.model_name or self.model


@contextmanager
def expecting(path: Path, what: str) -> Iterator[None]:
    """What the system says against `path`, as one SettingsError that says what was expected of it."""
    try:
        yield
    except OSError as error:
        raise SettingsError(str(path), f"expected {what}: {error.strerror}") from None


def make_folder(path: Path) -> None:
    """Make `path`, and what lies above it, unless it is there. Raises SettingsError."""
    with expecting(path, "a folder, or room for one"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


def private_folder(path: Path) -> Path:
    """Make `path` a folder only this user can enter, or refuse: whoever owns it owns the sockets in it."""
    make_folder(path)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise SettingsError(str(path), "expected a folder of this user, got something else")
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)
    return path


def read_or_create_secret(path: Path) -> bytes:
    """The installation's secret, 32 bytes; made at the first start, readable by this user only.

    Adapter ids are keyed with it, so losing it orphans every adapter: it is never replaced, and a file that
    is not 64 hex digits is an error, not a reason to make a new one. Raises SettingsError.
    """
    with expecting(path, "a file to read"), suppress(FileNotFoundError, NotADirectoryError):
        return _secret_in(path)
    make_folder(path.parent)
    with expecting(path.parent, "a folder to write in"):
        _create_secret(path)
    return _secret_in(path)


def _create_secret(path: Path) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(aside, path)  # unlike a rename, never replaces a secret another process made meanwhile
    except FileExistsError:
        pass
    finally:
        aside.unlink()


def _secret_in(path: Path) -> bytes:
    text = path.read_bytes()
    try:
        secret = bytes.fromhex(text.decode().strip())
    except ValueError:  # of which what is no text is one
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise SettingsError(str(path), f"expected {2 * SECRET_BYTES} hex digits, got something else")
    return secret


def trial_seed(secret: bytes) -> bytes:
    """What decides which replies a version on trial answers: the same ones on every gateway."""
    return hmac.new(secret, b"attune trials", hashlib.sha256).digest()


def token_key(secret: bytes) -> bytes:
    """The key bearer tokens are signed with.

    Not the secret itself: adapter ids are HMAC(secret, user) and appear as folder names, so a user named like
    the body of a token would read its signature off the disk.
    """
    return hmac.new(secret, b"attune bearer tokens", hashlib.sha256).digest()
