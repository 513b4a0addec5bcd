"""Options that several commands share, as dataclasses: each field is one option, and `@takes` gives them to a command.

One way to name things: `--workspace DIR` is the folder of a run in every command, `--library PATH` a block library of
whatever origin.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic import ValidationError

from blocks.errors import PuzzleError
from profiles.load import load_profile, shipped_profiles
from profiles.schema import EngineName, Profile, Search, read_share
from tasks.search.joint import KL_OF, QUANTITIES, flag

if TYPE_CHECKING:
    from blocks.compute import Compute
    from tasks.search.joint import JointLibrary
    from tasks.search.request import Limit, Request


def takes(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose first argument is a dataclass of options, as typer reads commands: an option for each field."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command).parameters.values()
        shared = [
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if one.default is MISSING else one.default,
                annotation=one.type,
            )
            for one in fields(options)
        ]

        @functools.wraps(command)
        def wrapped(**values: Any) -> None:
            command(options(**{one.name: values.pop(one.name) for one in shared}), **values)

        made: Any = wrapped
        del made.__wrapped__
        parameters = [*shared, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own)]
        made.__signature__ = inspect.Signature(parameters)
        made.__annotations__ = {one.name: one.annotation for one in parameters}
        return wrapped

    return decorate


Device = Annotated[str, typer.Option("--device", help="cpu, or cuda")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="[the physical cores]")]


def compute_on(device: str, threads: int | None) -> "Compute":
    """Where a command without a profile computes, in float32."""
    from blocks.compute import HOST
    from blocks.runtime import configure_torch
    from tasks.operating.requirements import device_missing

    known = re.fullmatch(r"cpu|cuda(:\d+)?", device)
    if why := device_missing(device) if known else f"{device} is neither cpu nor cuda":
        raise PuzzleError(f"--device: {why}. Take cpu.")
    configure_torch(threads)
    return HOST.on(device)


ProfilePath = Annotated[
    Path,
    typer.Argument(
        metavar="PROFILE",
        help=f"a profile (YAML), or the name of a shipped one: {', '.join(shipped_profiles())}",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH.TO.KEY=VALUE", help="override a field of the profile, such as budget.speedup=2"
    ),
]


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """A profile, and the workspace of its run."""

    profile: ProfilePath
    workspace: Annotated[
        Path | None, typer.Option("--workspace", metavar="DIR", help="the folder of the run [workspace/<profile name>]")
    ] = None
    set_: Overrides = None

    def load(self) -> tuple[Profile, Path]:
        """The profile with its overrides, and the folder of its workspace."""
        wanted = load_profile(self.profile, self.set_ or [])
        return wanted, (self.workspace or Path("workspace") / wanted.name).resolve()


Budget = list[str] | None


def _budget(name: str, what: str) -> Any:
    help_text = f"budget: {what}, or a share of the parent's"
    return typer.Option(flag(name), metavar="N|N%|SCENARIO=N", help=help_text)


@dataclass(frozen=True, kw_only=True)
class LibraryOptions:
    """A block library, budgets and constraints: what is asked of every search."""

    workspace: Annotated[
        Path | None, typer.Option("--workspace", metavar="DIR", help="the folder of a run: its library")
    ] = None
    library: Annotated[
        Path | None,
        typer.Option(
            "--library", metavar="PATH", help="a workspace, a library in the open format, or NVlabs' block_library.json"
        ),
    ] = None
    memory_gib: Annotated[Budget, _budget("memory_gib", "weights + KV cache, GiB")] = None
    latency_seconds: Annotated[Budget, _budget("latency_seconds", "prompt and generation of one batch, seconds")] = None
    time_to_first_token_seconds: Annotated[
        Budget, _budget("time_to_first_token_seconds", "prompt of one batch, seconds")
    ] = None
    tokens_per_second: Annotated[
        Budget, _budget("tokens_per_second", "prompt and generated tokens per second, at least")
    ] = None
    parameters: Annotated[Budget, _budget("parameters", "parameters")] = None
    layer_parameters: Annotated[Budget, _budget("layer_parameters", "parameters of the layers alone")] = None
    max_kl: Annotated[
        Budget, typer.Option("--max-kl", metavar="CAPABILITY=N", help="budget: the KL on a capability, nats per token")
    ] = None
    score: Annotated[str | None, typer.Option("--score", metavar="N", help="budget: the summed score")] = None
    traffic: Annotated[
        list[str] | None,
        typer.Option("--traffic", metavar="SCENARIO=SHARE", help="times then hold for the mean request of this mix"),
    ] = None
    scenario: Annotated[str | None, typer.Option("--scenario", help="this one alone [all of the library]")] = None
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="this one alone [the best]")] = None
    metric: Annotated[str, typer.Option("--metric", help="what is summed and minimised, e.g. lm_loss")] = "kl"
    robust: Annotated[float, typer.Option("--robust", help="minimise mean + this many standard errors")] = 0.0
    max_block_types: Annotated[
        int | None, typer.Option("--max-block-types", help="distinct variants in one architecture")
    ] = None
    forbid: Annotated[
        list[str] | None,
        typer.Option("--forbid", metavar="LABEL_OR_KIND", help="e.g. no_op, attention=no_op, or a label"),
    ] = None
    keep: Annotated[list[int] | None, typer.Option("--keep", metavar="LAYER", help="a layer that stays as it is")] = (
        None
    )
    width_multiple: Annotated[int, typer.Option("--width-multiple", help="of every FFN width")] = 1
    must_run: Annotated[
        list[str] | None,
        typer.Option(
            "--must-run", metavar="ENGINE", help=f"an engine that has to run it: {', '.join(get_args(EngineName))}"
        ),
    ] = None
    time_limit: Annotated[float, typer.Option("--time-limit", help="seconds the solver may take, at most")] = 60.0

    @property
    def source(self) -> Path:
        """Where the library is."""
        found = self.library or self.workspace
        if found is None:
            raise PuzzleError("name a workspace, or a library: --workspace DIR, or --library PATH.")
        return found

    def asks_nothing(self) -> bool:
        """True when no budget and no constraint was given."""
        return self == type(self)(library=self.library, workspace=self.workspace)

    def open(self) -> "tuple[JointLibrary, Request]":
        """The library, and what is asked of it."""
        from tasks.libraries.interchange import open_library
        from tasks.search.request import Request, limit_of

        opened = open_library(self.source, self.scenario, self.batch_size)
        if opened.warning:
            typer.echo(f"Warning: {opened.warning}", err=True)
        found = [limit_of(name, text) for name in QUANTITIES for text in _listed(getattr(self, name))]
        found += [_limit_on_kl(text) for text in self.max_kl or ()]
        try:
            search = Search(
                robust=self.robust,
                max_block_types=self.max_block_types,
                forbid=tuple(self.forbid or ()),
                keep_layers=tuple(self.keep or ()),
                width_multiple=self.width_multiple,
                time_limit_seconds=self.time_limit,
            )
            request = Request(
                limits=tuple(found),
                metric=self.metric,
                traffic=_traffic(self.traffic or []),
                search=search,
                must_run=tuple(self.must_run or ()),  # type: ignore[arg-type]  # checked by pydantic
            )
        except ValidationError as error:
            raise refused(error) from None
        return opened, request


def _limit_on_kl(text: str) -> "Limit":
    from tasks.search.request import limit_of

    name, equals, most = text.partition("=")
    if not equals:
        raise PuzzleError(f"--max-kl: a capability and its highest KL, such as retrieval=0.3, not {text!r}.")
    return limit_of(f"{KL_OF}{name.strip()}", most)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _traffic(texts: Sequence[str]) -> dict[str, float]:
    shares = {}
    for text in texts:
        name, _, share = text.partition("=")
        shares[name.strip()] = share_of("--traffic SCENARIO=SHARE", share)
    return shares


def share_of(option: str, text: str, most: float = math.inf) -> float:
    """`.7` or `70%`; PuzzleError for what is no such number."""
    try:
        value = float(read_share(text))  # type: ignore[arg-type]  # what is no number is refused here
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise PuzzleError(f"{option}: a share such as 0.7 or 70%, not {text!r}.")
    return value


def refused(error: ValidationError) -> PuzzleError:
    """What pydantic found wrong with an option, in a sentence that names the option."""
    first = error.errors()[0]
    where = f"{flag(first['loc'][0])}: " if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ")
    return PuzzleError(f"{where}{message[0].lower()}{message[1:]}.")
