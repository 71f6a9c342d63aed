"""An engine over two processes with half of the heads each: ``two_ranks.py FOLDER``; the last line is its tokens."""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    prompts = json.loads(sys.argv[2])
    llm = LLM(
        model=sys.argv[1], tensor_parallel_size=2, attention_backend="CUSTOM", skip_tokenizer_init=True,
        dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64,
        kv_cache_memory_bytes=64 << 20, seed=0,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True, detokenize=False)
    outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    print(json.dumps([list(out.outputs[0].token_ids) for out in outs]), flush=True)


if __name__ == "__main__":  # the ranks are spawned, and import this file again
    main()
