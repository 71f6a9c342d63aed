"""SGLang's speculation on the CPU in plain torch: what its functions of sgl_kernel do, whose build is not here.

Each does what the Triton kernel beside its call in SGLang does on a GPU. None of them is attention.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def copy_all_layer_kv_cache_cpu(data_ptrs: Tensor, strides: Tensor, targets: Tensor, sources: Tensor) -> None:
    """In each buffer, of rows of ``strides`` bytes, the rows ``sources`` go to ``targets``; all are read first."""
    for start, width in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(start + source * width, width) for source in sources.tolist()]
        for target, row in zip(targets.tolist(), rows, strict=True):
            ctypes.memmove(start + target * width, row, width)


def assign_req_to_token_pool_cpu(
    requests: Tensor, table: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, _width: int
) -> None:
    """``slots``, one request's after the other's, into columns start to end of the requests' rows."""
    done = 0
    for row, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = slots[done : done + end - start]
        done += end - start


def assign_extend_cache_locs_cpu(
    requests: Tensor, table: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, _width: int
) -> None:
    """The other way round: those columns into ``slots``."""
    done = 0
    for row, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        slots[done : done + end - start] = table[row, start:end]
        done += end - start


def fill_bonus_tokens_cpu(accepted: Tensor, lens: Tensor, bonus: Tensor, stride: int) -> None:
    """The last accepted token of each request."""
    count = lens.shape[0]
    bonus[:count] = accepted.flatten()[torch.arange(count) * stride + lens - 1]


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, slots: Tensor, out: Tensor) -> None:
    """The slots of the accepted tokens, those that are -1 left out."""
    kept = accept_index[accept_index > -1].long()
    out[: kept.shape[0]] = slots[kept]


def reconstruct_indices_from_tree_mask(
    tree_mask: Tensor, seq_lens: Tensor, positions: Tensor, index: Tensor, next_token: Tensor, next_sibling: Tensor,
    batch_size: int, count: int,
) -> None:  # fmt: skip
    """Positions, first children and next siblings of the trees that ``tree_mask`` [B, count, count] describes."""
    masks = tree_mask.view(batch_size, count, count).bool().tolist()
    for b, mask in enumerate(masks):
        ancestors = [[j for j in range(i) if mask[i][j]] for i in range(count)]
        parents = [max(found, default=-1) for found in ancestors]
        for i in range(count):
            at = b * count + i
            children = [k for k in range(i + 1, count) if i in ancestors[k]]
            siblings = [k for k in range(i + 1, count) if parents[k] == parents[i] >= 0]
            positions.view(-1)[at] = int(seq_lens[b]) + len(ancestors[i])
            index.view(-1)[at] = at
            next_token.view(-1)[at] = min(children, default=-1)
            next_sibling.view(-1)[at] = min(siblings, default=-1)


def verify_tree_greedy_cpu(
    *, predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor, retrive_index: Tensor,
    retrive_next_token: Tensor, retrive_next_sibling: Tensor, target_predict: Tensor,
) -> None:  # fmt: skip
    """From each root on, the child that is the target's own next token, as long as there is one."""
    wanted = target_predict.flatten().tolist()
    for b in range(candidates.shape[0]):
        drafts, index = candidates[b].tolist(), retrive_index[b].tolist()
        children, siblings = retrive_next_token[b].tolist(), retrive_next_sibling[b].tolist()
        last, node, accepted = index[0], 0, 0
        accept_index[b, 0] = last
        while accepted + 1 < accept_index.shape[1]:
            child = children[node]
            while child != -1 and drafts[child] != wanted[last]:
                child = siblings[child]
            if child == -1:
                break
            predicts[last] = wanted[last]
            node, last, accepted = child, index[child], accepted + 1
            accept_index[b, accepted] = last
        accept_token_num[b] = accepted
        predicts[last] = wanted[last]
