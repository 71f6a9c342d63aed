"""`attn generate`: text from a real model over the paged cache, and what ran it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from attn_core.cli import INTERRUPTED
from attn_core.cli.output import note, print_json
from attn_core.cli.params import FALLBACK_HELP, backend_options, chosen_backends, serving_options
from attn_core.cli.progress import Progress
from attn_core.errors import UsageError

if TYPE_CHECKING:
    from attn_core.generate.engine import NewTokens
    from attn_core.generate.request import Request
    from attn_core.generate.session import Queue, Session
    from attn_core.planning.system import System


@click.command()
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option(
    "--model",
    type=click.Path(),
    metavar="MODEL",
    help="A model folder, a llama's .gguf file, or smollm2-135m. [default: that]",
)
@click.option("--max-new-tokens", type=int, default=64, show_default=True, metavar="N")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the likeliest tokens only.")
@click.option("--seed", type=int, metavar="N", help="Draw the same tokens every time.")
@click.option("--raw", is_flag=True, help="Without the model's chat template.")
@backend_options
@click.option("--fallback", type=click.Choice(["warn", "error", "allow"]), default="warn", help=FALLBACK_HELP)
@serving_options
@click.option("--device", metavar="DEVICE", help="cpu, cuda, npu, xpu or emulated:CHIP. [default: the best here]")
@click.option("--cache-mib", type=int, metavar="N", help="Size of the cache. [default: 64 on a CPU, else 1024]")
@click.option("--max-requests", type=int, default=16, show_default=True, help="Prompts that run at once.")
@click.option("--max-batch-tokens", type=int, default=512, show_default=True, help="Tokens of one step.")
@click.option("--cuda-graph", is_flag=True, help="Replay decode steps as graphs.")
@click.option(
    "--speculative-num-draft-tokens",
    type=int,
    default=0,
    metavar="N",
    help="Guess from the prompt, and verify N tokens of a request at once: its last one and N - 1 guesses.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, schema attn/generate.")
def command(
    prompts: tuple[str, ...],
    attention_backend: str | None,
    prefill_attention_backend: str | None,
    decode_attention_backend: str | None,
    raw: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Generate text after each PROMPT; "-" reads one from stdin. Without --temperature, the likeliest token each time.

    Several prompts run as one continuous batch, and those that begin alike share that part of the cache. The text is
    on stdout; what ran it, and how fast, on stderr. On a CPU the dtype is float32 unless --dtype says otherwise.
    """
    backends = chosen_backends(attention_backend, prefill_attention_backend, decode_attention_backend)
    sampling = {name: given.pop(name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    texts = [_text(prompt) for prompt in prompts]
    began = time.perf_counter()
    with ExitStack() as stack, Progress() as progress:
        given["stand_in"] = _entered(given["device"], stack)
        with ended_by_ctrl_c():
            queue = _queue(given, backends, progress)
            requests = [queue.add(text, sampling, raw=raw) for text in texts]
            session = _session(queue, progress)
        loaded = time.perf_counter() - began
        finished = _run(session, requests, progress, as_text=not as_json)
    from attn_core.generate.report import document, lines

    if as_json:
        print_json("generate", document(session, requests, texts, loaded, finished=finished))
    else:
        note("\n".join(["", *lines(session, requests, loaded, finished=finished)]))
    return 0 if finished else INTERRUPTED


def _text(prompt: str) -> str:
    """The text of a prompt; "-" is what comes on stdin. Raises UsageError for bytes that are no text.

    Python reports those on stdin, or hands them over as surrogates, as the locale has it.
    """
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise UsageError(f"a prompt is no text: {error}", accepted="UTF-8") from None
    return text


def _entered(device: str | None, stack: ExitStack) -> tuple[str, System] | None:
    """torch's device and the machine that an emulator stands in for, entered; None for a real device."""
    if device is None or not device.startswith("emulated:"):
        return None
    from attn_core.testing.devices import enter_emulator

    emulator = enter_emulator(device.removeprefix("emulated:"), stack)
    return str(emulator.device()), emulator.system()


def _queue(given: dict[str, Any], backends: Any, progress: Progress) -> Queue:
    progress("loading libraries", 0, 1)
    from attn_core.generate.loading import suggested_sampling
    from attn_core.generate.session import Queue, ServingOptions
    from attn_core.runtime.threads import set_threads

    set_threads()
    serving = {name: value for name, value in given.items() if value is not None}
    queue = Queue(ServingOptions(backends=backends, **serving), progress)
    if suggested := suggested_sampling(queue.files):
        values = ", ".join(f"{name} {value}" for name, value in suggested.items())
        note(f"attn: the model's generation_config.json suggests {values}; only what the options say is done")
    return queue


def _session(queue: Queue, progress: Progress) -> Session:
    from attn_core.generate.session import Session

    session = Session(queue, progress)
    progress.close()
    return session


def _run(session: Session, requests: list[Request], progress: Progress, *, as_text: bool) -> bool:
    """Run to the end, or to Ctrl-C: False. Text is written as it comes."""
    from attn_core.generate.text_stream import OrderedOutput, TextStream

    streams = [TextStream(session.queue.decode) for _ in requests]
    output = OrderedOutput(streams, _write if as_text else _drop, _heading(len(requests)))
    prompt_tokens = sum(request.num_prompt_tokens for request in requests)

    def on_step(new: NewTokens) -> None:
        if new:
            progress.close()
        elif prompt_tokens > session.queue.scheduler.max_batch_tokens:
            progress("reading the prompts (tokens)", session.engine.figures.prompt_tokens, prompt_tokens)
        for request, tokens in new:
            for token in tokens:
                if token not in request.sampling.stop_ids:
                    output.add(request.request_id, token)
            if request.finish_reason is not None:
                output.finish(request.request_id)

    try:
        with interruptible() as interrupted:
            return session.engine.run(on_step, interrupted)
    finally:
        output.close()  # whatever ended it: no text that was generated is lost


def _heading(count: int) -> Callable[[int], str]:
    """What stands above the text of request i: as head and tail have it, and only if there are several."""
    return lambda i: "" if count == 1 else ("\n" if i else "") + f"==> {i + 1} <==\n"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _drop(_text: str) -> None:
    return None


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed while the block runs: the first only asks to stop, the second stops at once."""
    pressed = threading.Event()

    def stop(_signal: int, _frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C in the block ends it with KeyboardInterrupt, at its end at the latest.

    Libraries that load may run Python where an exception is printed and lost (a finaliser, a callback of C code).
    """
    pressed = threading.Event()

    def stop(number: int, frame: Any) -> None:
        pressed.set()
        signal.default_int_handler(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed.is_set():
        raise KeyboardInterrupt
