"""One run of SGLang's engine in a process of its own: prompts in, tokens and their log-probabilities out, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(spec: str, answer: str) -> None:
    import sglang

    asked = json.loads(spec)
    engine = sglang.Engine(
        device="cpu",
        dtype="float32",
        disable_cuda_graph=True,
        skip_tokenizer_init=True,
        max_total_tokens=4096,
        chunked_prefill_size=32,
        log_level="info",
        **asked["options"],
    )
    sampling = {"temperature": 0, "max_new_tokens": asked["new"], "ignore_eos": True}
    rounds = [
        [
            {
                "tokens": [token for _, token, _ in one["meta_info"]["output_token_logprobs"]],
                "logprobs": [logprob for logprob, _, _ in one["meta_info"]["output_token_logprobs"]],
                "cached": one["meta_info"]["cached_tokens"],
                "guessed": one["meta_info"].get("spec_num_correct_drafts", 0),
            }
            for one in engine.generate(input_ids=asked["prompts"], sampling_params=sampling, return_logprob=True)
        ]
        for _ in range(asked["rounds"])
    ]
    Path(answer).write_text(json.dumps(rounds))
    engine.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
