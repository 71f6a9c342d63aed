"""`attn generate` as it is called: what goes to stdout and stderr, what is refused with which code, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from attn_core.cli import main
from attn_core.errors import KernelError
from attn_core.generate.engine import Engine


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Attn = Callable[..., Result]


@pytest.fixture
def attn(tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Attn:
    """`attn generate` in this process, on the tiny model unless --model says otherwise; ATTN_NUM_THREADS is 1."""
    monkeypatch.setenv("ATTN_NUM_THREADS", "1")
    monkeypatch.setenv("ATTN_PLUGINS", "attn-core")

    def run(*args: str) -> Result:
        model = () if "--model" in args else ("--model", str(tiny_folder))
        code = main(["generate", *args, *model])
        return Result(code, *capsys.readouterr())

    return run


SHORT = ("--max-new-tokens", "12")


def test_stdout_is_the_text_and_stderr_what_ran_it(attn: Attn) -> None:
    result = attn("hello", *SHORT)
    assert result.code == 0
    assert result.out == attn("hello", *SHORT, "--json").json["requests"][0]["text"] + "\n"
    assert "ran    prefill: torch_native, decode: torch_native" in result.err
    assert "float32 on cpu" in result.err


def test_several_texts_stand_under_headings_in_their_order(attn: Attn) -> None:
    document = attn("one", "two", "three", *SHORT, "--json").json
    texts = [request["text"] for request in document["requests"]]
    wanted = "\n".join(f"==> {i} <==\n{text}\n" for i, text in enumerate(texts, 1))
    assert attn("one", "two", "three", *SHORT).out == wanted


def test_each_prompt_gets_what_it_gets_alone(attn: Attn) -> None:
    together = attn("one", "two", *SHORT, "--json").json["requests"]
    for request in together:
        alone = attn(request["prompt"], *SHORT, "--json").json["requests"][0]
        assert alone["tokens"] == request["tokens"]


def test_a_prompt_can_come_from_stdin(attn: Attn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert attn("-", *SHORT).out == attn("hello", *SHORT).out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_refused(errors: str, attn: Attn, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", stdin)
    result = attn("-", *SHORT)
    assert (result.code, result.out) == (2, "")
    assert "a prompt is no text" in result.err


def test_json_says_what_was_asked_done_and_used(attn: Attn) -> None:
    document = attn("hello", "hello there, hello", *SHORT, "--json", "--page-size", "4").json
    assert (document["schema"], document["version"]) == ("attn/generate", 1)
    assert document["ran"] == {"prefill": ["torch_native"], "decode": ["torch_native"]}
    assert [r["prompt_tokens"] for r in document["requests"]] == [5, 18]
    assert [r["reused_tokens"] for r in document["requests"]] == [0, 4]
    assert document["steps"]["prefill"]["prompt_tokens"] == 5 + 18 - 4
    assert document["steps"]["decode"]["new_tokens"] == 2 * 11
    assert 0 < document["pages"]["peak"] <= document["pages"]["total"]
    assert document["finished"] is True


def test_a_seed_repeats_what_a_temperature_draws(attn: Attn) -> None:
    def draw(*args: str) -> list[int]:
        tokens: list[int] = attn("hello", *SHORT, "--json", "--temperature", "3", *args).json["requests"][0]["tokens"]
        return tokens

    assert draw("--seed", "1") == draw("--seed", "1")
    assert draw("--seed", "1") != draw("--seed", "2")
    assert draw("--seed", "1", "--top-p", "0.000001") == draw("--temperature", "0")


def test_prompts_of_many_steps_say_how_far_they_are(attn: Attn) -> None:
    result = attn("x" * 100, *SHORT, "--max-batch-tokens", "20", "--max-requests", "1")
    assert "reading the prompts (tokens)" in result.err
    assert "reading the prompts" not in attn("x" * 100, *SHORT).err


def test_guesses_are_counted_at_the_end(attn: Attn) -> None:
    err = attn("ab ab ab", "--max-new-tokens", "40", "--speculative-num-draft-tokens", "4").err
    assert "verify: torch_native" in err
    assert "guessed tokens were right" in err


def test_a_full_cache_is_said(attn: Attn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_core.generate.session.num_pages", lambda *_args: 1 + 10)
    args = ("one", "two", "three", "--max-new-tokens", "30", "--page-size", "4", "--max-requests", "3")
    assert "times a request gave its pages back" in attn(*args).err


def test_a_chat_template_is_used_unless_raw(attn: Attn, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text("[{{ messages[0]['content'] }}]")
    count = {
        flags: attn("hello", *SHORT, "--json", "--model", str(folder), *flags).json["requests"][0]["prompt_tokens"]
        for flags in ((), ("--raw",))
    }
    assert count == {(): 7, ("--raw",): 5}


def test_more_prompts_than_slots_wait_for_one(attn: Attn) -> None:
    document = attn(*"abcdef", *SHORT, "--json", "--max-requests", "2").json
    assert [len(request["tokens"]) for request in document["requests"]] == [12] * 6


@pytest.mark.parametrize(
    "options",
    [("--dtype", "bfloat16"), ("--kv-cache-dtype", "fp8_e4m3"), ("--kv-cache-dtype", "fp8_e5m2"), ("--page-size", "3"),
     ("--attention-backend", "torch_native"), ("--prefill-attention-backend", "torch_native"), ("--device", "cpu"),
     ("--max-batch-tokens", "16")],
)  # fmt: skip
def test_ways_to_serve(options: tuple[str, str], attn: Attn) -> None:
    document = attn("hello there", *SHORT, "--json", *options).json
    assert document["ran"]["decode"] == ["torch_native"]
    name = options[0].removeprefix("--").replace("-", "_")
    if name in document:
        assert str(document[name]) == options[1]


def test_the_models_own_suggestions_are_named_and_not_followed(attn: Attn, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "suggesting"
    shutil.copytree(tiny_folder, folder)
    suggestion = {"eos_token_id": 256, "do_sample": True, "temperature": 0.6, "top_p": 1.0, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(suggestion))
    result = attn("hello", *SHORT, "--model", str(folder))
    assert "suggests temperature 0.6, repetition_penalty 1.1; only what the options say is done" in result.err
    assert result.out == attn("hello", *SHORT).out


def test_guesses_are_verified(attn: Attn) -> None:
    args = ("ab ab ab ab", "--max-new-tokens", "40", "--json")
    document = attn(*args, "--speculative-num-draft-tokens", "4").json
    assert document["ran"]["verify"] == ["torch_native"]
    assert 0 <= document["guesses"]["right"] < document["guesses"]["made"]
    assert document["requests"][0]["tokens"] == attn(*args).json["requests"][0]["tokens"]


REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "page size 0": (("x", "--page-size", "0"), 2, "bad_config"),
    "page size of 3 billion": (("x", "--page-size", "3000000000"), 2, "bad_config"),
    "unknown dtype": (("x", "--dtype", "float12"), 2, "bad_config"),
    "unknown cache dtype": (("x", "--kv-cache-dtype", "fp4"), 2, "bad_config"),
    "unknown device": (("x", "--device", "tpu"), 2, "usage"),
    "a device that is not here": (("x", "--device", "npu"), 2, "usage"),
    "unknown backend": (("x", "--attention-backend", "torch_natve"), 2, "unknown_backend"),
    "unknown backend of a phase": (("x", "--decode-attention-backend", "nope"), 2, "unknown_backend"),
    "no new token": (("x", "--max-new-tokens", "0"), 2, "bad_config"),
    "negative temperature": (("x", "--temperature", "-1"), 2, "bad_config"),
    "top-p of 0": (("x", "--top-p", "0"), 2, "bad_config"),
    "negative seed": (("x", "--seed", "-5"), 2, "bad_config"),
    "no slot": (("x", "--max-requests", "0"), 2, "bad_config"),
    "fewer tokens a step than slots": (("x", "--max-batch-tokens", "4"), 2, "bad_config"),
    "one draft token, which is none": (("x", "--speculative-num-draft-tokens", "1"), 2, "bad_config"),
    "graphs on a CPU": (("x", "--cuda-graph"), 3, "no_backend"),
    "no cache": (("x", "--cache-mib", "0"), 2, "bad_config"),
    "a cache too small for a page": (("x", "--cache-mib", "1", "--page-size", "2048"), 3, "cache_full"),
    "longer than the context": (("x" * 500, "--max-new-tokens", "13"), 3, "request_too_long"),
    "an empty prompt": (("",), 2, "bad_config"),
    "no prompt": ((), 2, "Missing argument"),
    "unknown model": (("x", "--model", "no-such-model"), 2, "unknown_model"),
    "a preset, which has no weights": (("x", "--model", "llama-3.1-8b"), 2, "unknown_model"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_weights_are_loaded(what: str, attn: Attn, monkeypatch: pytest.MonkeyPatch) -> None:
    args, code, named = REFUSED[what]

    def never(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("attn_core.generate.session.load_model", never)
    result = attn(*args)
    assert (result.code, result.out) == (code, "")
    assert named in result.err
    if named != "Missing argument":
        assert "accepted: " in result.err or "next: " in result.err


def test_a_prompt_that_the_cache_cannot_hold_is_refused(attn: Attn, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    edit(folder / "config.json", max_position_embeddings=8192)
    result = attn("x" * 2000, "--cache-mib", "1", "--model", str(folder))  # 512 bytes a token
    assert (result.code, result.out) == (3, "")
    assert "need 129 pages of 16; the cache has 127" in result.err


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGED: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "config.json cut short": (lambda f: truncate(f / "config.json", 40), 2, "bad_model_folder"),
    "config.json is no object": (lambda f: (f / "config.json").write_text("[]"), 2, "bad_model_folder"),
    "no config.json": (lambda f: (f / "config.json").unlink(), 2, "bad_model_folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), 2, "bad_model_folder"),
    "weights cut short": (lambda f: truncate(f / "model.safetensors", 5000), 2, "bad_model_folder"),
    "empty weights": (lambda f: truncate(f / "model.safetensors", 0), 2, "bad_model_folder"),
    "weights of another size": (lambda f: edit(f / "config.json", hidden_size=32, head_dim=16), 2, "bad_model_folder"),
    "weights of fewer layers": (lambda f: edit(f / "config.json", num_hidden_layers=3), 2, "bad_model_folder"),
    "weights of more layers": (lambda f: edit(f / "config.json", num_hidden_layers=1), 2, "bad_model_folder"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], 2, "bad_model_folder"),
    "a tokenizer cut short": (lambda f: truncate(f / "tokenizer.json", 100), 2, "bad_model_folder"),
    "an architecture that is not known": (
        lambda f: edit(f / "config.json", architectures=["NovelForCausalLM"], model_type="novel"), 2, "unknown_model"
    ),
    "an encoder-decoder": (
        lambda f: edit(f / "config.json", architectures=["WhisperForConditionalGeneration"], model_type="whisper"),
        2, "bad_model_folder",
    ),
    "quantized weights": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "fp8"}), 2, "bad_model_folder"
    ),
    "rope that follows the batch": (
        lambda f: edit(f / "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        2, "bad_config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_folder_is_refused(what: str, attn: Attn, tiny_folder: Path, tmp_path: Path) -> None:
    damage, code, named = DAMAGED[what]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    result = attn("x", "--model", str(folder))
    assert (result.code, result.out) == (code, "")
    assert named in result.err
    assert "Traceback" not in result.err


def test_a_truncated_gguf_is_refused(attn: Attn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "half.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 40)
    result = attn("x", "--model", str(tmp_path / "half.gguf"))
    assert (result.code, result.out) == (2, "")
    assert "bad_model_folder" in result.err


def test_another_machine_is_refused(attn: Attn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_FORCE_SYSTEM", "npu:ascend910b")
    result = attn("x")
    assert result.code == 2
    assert "not this machine" in result.err


def test_a_release_of_transformers_that_was_not_checked_is_refused(attn: Attn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_core.generate.loading.TRANSFORMERS", ((4, 0), (5, 0)))
    result = attn("x")
    assert result.code == 2
    assert "pip install 'transformers>=4.0,<5.0'" in result.err


@pytest.mark.parametrize("threads", ["0", "two"])
def test_an_impossible_number_of_threads_is_refused(threads: str, attn: Attn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_NUM_THREADS", threads)
    assert attn("x").code == 2


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "attn_core", "generate", "--model", str(folder), *args]
    env = {**os.environ, "ATTN_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "ATTN_PLUGINS": "attn-core"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupt(process: subprocess.Popen[str], after: str) -> Result:
    """Ctrl-C after a line on stderr or 40 characters on stdout, and what comes of it."""
    stream = getattr(process, after)
    first = stream.readline() if after == "stderr" else stream.read(40)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return Result(process.returncode, first + out if after == "stdout" else out, err)


LONG = ("--max-new-tokens", "490")


def test_ctrl_c_ends_with_what_was_generated_and_the_figures(tiny_folder: Path, attn: Attn) -> None:
    whole = attn("first", "second", *LONG, "--json").json["requests"]
    result = interrupt(start(tiny_folder, "first", "second", *LONG), after="stdout")
    assert result.code == 130
    assert "interrupted: 2 of 2 prompts are unfinished" in result.err
    assert "ran    prefill: torch_native, decode: torch_native" in result.err
    assert "Traceback" not in result.err
    first, second = result.out.removeprefix("==> 1 <==\n").split("\n\n==> 2 <==\n")
    assert [len(request["tokens"]) for request in whole] == [490, 490]
    assert 10 < len(first) < len(whole[0]["text"])
    assert whole[0]["text"].startswith(first.rstrip("\ufffd"))
    assert whole[1]["text"].startswith(second.removesuffix("\n").rstrip("\ufffd"))


def test_json_of_an_interrupted_run_says_so(attn: Attn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal itself is tested above; here it comes before the sixth step."""
    asked = iter([False] * 5 + [True])
    monkeypatch.setattr("attn_core.cli.generate.interruptible", lambda: nullcontext(lambda: next(asked)))
    result = attn("first", "second", *LONG, "--json")
    assert result.code == 130
    assert result.json["finished"] is False
    assert [len(request["tokens"]) for request in result.json["requests"]] == [5, 5]
    assert {request["finish_reason"] for request in result.json["requests"]} == {None}


def test_a_kernel_that_fails_loses_no_text(attn: Attn, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attn("first", "second", *LONG, "--json").json["requests"]
    original, steps = Engine.step, iter(range(100))

    def fail_in_the_end(engine: Engine) -> Any:
        if next(steps) == 30:
            raise KernelError("the card is gone")
        return original(engine)

    monkeypatch.setattr(Engine, "step", fail_in_the_end)
    result = attn("first", "second", *LONG)
    assert (result.code, "kernel_failed" in result.err) == (4, True)
    first, second = result.out.removeprefix("==> 1 <==\n").split("\n\n==> 2 <==\n")
    assert whole[0]["text"].startswith(first.rstrip("\ufffd"))
    assert len(second) > 10
    assert whole[1]["text"].startswith(second.removesuffix("\n").rstrip("\ufffd"))


def test_ctrl_c_while_loading_ends_at_once(tiny_folder: Path) -> None:
    result = interrupt(start(tiny_folder, "first", *LONG), after="stderr")
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err


def test_ctrl_c_that_a_library_swallows_while_loading_ends_it_all_the_same() -> None:
    from attn_core.cli.generate import ended_by_ctrl_c

    @ended_by_ctrl_c()
    def load() -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        load()
