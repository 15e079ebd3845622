"""``serve``: the OpenAI-compatible server with its web page."""

from __future__ import annotations

import argparse
import ipaddress
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research.qwen.cli.common import adapters_from, add_model_options, load_engine
from research.qwen.decode.pace import STRETCH
from research.qwen.errors import ConfigError

if TYPE_CHECKING:
    from research.qwen.engine import Engine
    from research.qwen.scheduler import Scheduler
    from research.qwen.serve.state import ServerSettings

MEGABYTE = 2**20


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m research.qwen.cli serve",
        description="Serve a model to OpenAI clients, with a chat page at /. Without MODEL: the embedded demo model.",
    )
    add_model_options(parser)
    _add_network(parser.add_argument_group("network and access"))
    _add_limits(parser.add_argument_group("limits"))
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: info)"
    )
    return parser


def _add_network(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="port (default: 8000; 0: any free one)")
    group.add_argument(
        "--root-path", default="", metavar="PREFIX", help="prefix under which a proxy shows it"
    )
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="key to ask for; may be repeated"
    )
    group.add_argument(
        "--api-key-file", metavar="FILE", help="file with one key a line; QWEN_API_KEY is read, too"
    )
    group.add_argument("--open-metrics", action="store_true", help="/metrics needs no key")
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name under which a proxy shows it; may be repeated (only needed on 127.0.0.1 without keys)",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of a web page that may call; may be repeated (default: none)",
    )
    group.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="name of the model; may be repeated, responses carry the first (default: the folder's)",
    )
    group.add_argument("--any-model", action="store_true", help="take every model name in requests")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    for name, default, text in (
        ("--max-batch", 16, "sequences computed at once"),
        ("--max-queue", 256, "requests that may wait; more get 429"),
        ("--prefill-chunk", 512, "prompt tokens read in one step"),
    ):
        group.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    group.add_argument(
        "--stretch",
        type=float,
        default=STRETCH,
        metavar="X",
        help="how long a step that also reads a prompt may take, in steps that only decode (default: %(default)s); "
        "with more, prompts are read sooner, and answers beside them come in larger jerks",
    )
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="tokens of the context (default: the model's)"
    )
    group.add_argument("--num-blocks", type=int, metavar="N", help="blocks of 16 tokens in the KV cache")
    group.add_argument(
        "--default-max-tokens",
        type=int,
        metavar="N",
        help="length of a chat answer where the request gives none (default: what the context holds)",
    )
    group.add_argument(
        "--max-body", type=float, default=10.0, metavar="MB", help="largest request body (default: 10)"
    )
    group.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="time to finish after SIGTERM (default: 30)"
    )
    group.add_argument(
        "--ping",
        type=float,
        default=15.0,
        metavar="S",
        help="silence before a ping in a stream (default: 15)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 after a signal, 2 (by QwenError) for what the user can mend."""
    args = build_parser().parse_args(argv)
    check(args)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"serving needs {error.name}, which is not installed: pip install 'qwen-mindspore[serve]'"
        ) from None
    import signal

    # Before NumPy is imported, which starts threads: see serve/lifecycle.py.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    return _serve(args)


def _serve(args: argparse.Namespace) -> int:
    from research.qwen.serve import logs
    from research.qwen.serve.lifecycle import Service, leave, listen
    from research.qwen.serve.state import ServerState

    logs.configure("debug" if args.verbose else args.log_level)
    settings = settings_from(args)
    state = ServerState(settings)
    with listen(args.host, args.port) as listener:
        address, port = listener.getsockname()[:2]
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}{settings.root_path}"
        say(f"loading {args.model or 'the demo model'}; {url}/health answers 503 until it is ready")
        if not settings.api_keys and not is_loopback(address):
            say("warning: everybody who reaches this port can use the model; set --api-key")
        started = time.monotonic()

        def ready() -> None:
            say(
                f"ready after {time.monotonic() - started:.1f} s: {state.model_name} at {url}/v1, page at {url}/"
            )

        service = Service(state, lambda: load(args), ready)
        service.run(listener)
    if (
        service.loading
    ):  # stopped meanwhile: a thread in the middle of compiling cannot be ended in an orderly way
        leave(0)
    return 0


def check(args: argparse.Namespace) -> None:
    """ConfigError for a number that makes no sense."""
    least: dict[str, float] = {
        "max_batch": 1,
        "max_queue": 1,
        "prefill_chunk": 1,
        "max_model_len": 2,
        "num_blocks": 1,
        "default_max_tokens": 1,
        "max_body": 0.001,
        "grace": 0.0,
        "ping": 0.0,
        "stretch": 1.1,
    }
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if not 0 <= args.port < 65536:
        raise ConfigError(f"--port must be from 0 to 65535, got {args.port}")
    if args.root_path and not args.root_path.startswith("/"):
        raise ConfigError(f"--root-path must begin with /, got {args.root_path!r}")


def settings_from(args: argparse.Namespace) -> ServerSettings:
    """The server's settings out of the options."""
    from research.qwen.serve.auth import read_keys
    from research.qwen.serve.state import ServerSettings

    keys = read_keys(args.api_key, args.api_key_file)
    default_name = Path(args.model).resolve().name if args.model else "qwen-demo"
    names, adapters = tuple(dict.fromkeys(args.served_model_name)) or (default_name,), adapters_from(args)
    both = [name for name in names if name in adapters]
    if both:
        raise ConfigError(f"{both[0]!r} is the model's name and an adapter's; write --lora NAME=PATH")
    return ServerSettings(
        model_names=names,
        adapters=tuple(adapters),
        any_model=args.any_model,
        api_keys=keys,
        open_metrics=args.open_metrics,
        check_host=not keys and is_loopback(args.host),
        allowed_hosts=tuple(args.allowed_host),
        cors_origins=tuple(args.cors_origin),
        root_path=args.root_path.rstrip("/"),
        max_body=int(args.max_body * MEGABYTE),
        default_max_tokens=args.default_max_tokens,
        grace=args.grace,
        ping_seconds=args.ping,
    )


def load(args: argparse.Namespace) -> tuple[Engine, Scheduler]:
    """Engine and scheduler of the options; runs beside the server."""
    from research.qwen.scheduler import Scheduler

    sizes = {} if args.num_blocks is None else {"num_blocks": args.num_blocks}
    engine = load_engine(args, max_batch=args.max_batch, prefill_chunk=args.prefill_chunk, **sizes)
    if args.max_model_len is not None:
        if args.max_model_len > engine.lm.max_length:
            raise ConfigError(
                f"--max-model-len is {args.max_model_len}, the model has {engine.lm.max_length}"
            )
        engine.lm.max_length = args.max_model_len
    return engine, Scheduler(engine, max_queue=args.max_queue, stretch=args.stretch)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on this address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def say(text: str) -> None:
    """A line for the user."""
    print(text, file=sys.stderr, flush=True)
