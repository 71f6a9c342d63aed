"""What is scheduled: Request, a prompt on its way, and Step, what runs at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from attn_core.generate.page_pool import FilledPage
from attn_core.generate.sampling import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way: its tokens, the pages they are in, and how far it is."""

    request_id: int
    #: the prompt, then what was generated
    tokens: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_prompt_tokens: int = field(init=False)
    pages: list[int] = field(default_factory=list)
    filled: list[FilledPage] = field(default_factory=list)
    #: tokens whose keys and values are in the cache
    num_computed: int = 0
    #: prompt tokens that were found in the cache when the request was first admitted
    num_reused: int = 0
    num_preemptions: int = 0
    #: "stop" (a stop token), "length" (max_new_tokens); None while it runs
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed


@dataclass(slots=True)
class Step:
    """What runs at once: ``query_lens[i]`` new tokens of ``requests[i]``; the first ``num_decodes`` have one each.

    With ``drafts`` it is a verify step: every request has its last token and as many guesses as every other.
    """

    requests: list[Request] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    num_decodes: int = 0
    drafts: list[list[int]] = field(default_factory=list)
    #: how many of each request's drafts are guesses: the rest only fill up
    num_guesses: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def completes(self) -> list[bool]:
        """For each request, whether the step computes its last token, so that the next one can be sampled."""
        return [r.num_uncomputed <= n for r, n in zip(self.requests, self.query_lens, strict=True)]

    def tokens_of(self, index: int) -> list[int]:
        """The new tokens of request ``index``, guesses last."""
        request, drafts = self.requests[index], self.drafts[index] if self.drafts else []
        end = request.num_computed + self.query_lens[index] - len(drafts)
        return request.tokens[request.num_computed : end] + drafts
