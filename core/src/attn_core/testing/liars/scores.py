"""Faults of the maths: scale, soft cap, sinks, LSE, precision, heads."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.merge_state import merge_state
from attn_core.testing.liars.base import Mutant, breaks, position_of_token, request_of_token


@breaks("attention")
class WrongScale(Mutant):
    """The scale is 2% too large."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return replace(layer, scale=layer.scale * 1.02)


@breaks("attention")
class MissingScale(Mutant):
    """Scores are not scaled."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return replace(layer, scale=1.0)


@breaks("scale")
class ScaleOfTheWidth(Mutant):
    """The scale is always the width of the keys to the -1/2: wrong where a model gives its own."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return replace(layer, scale=layer.qk_head_dim**-0.5)


@breaks("mla", mla=True)
class ScaleOfTheLatent(Mutant):
    """The scale of MLA is that of its latent's width, where a model's own counts the width before absorption."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return replace(layer, scale=layer.qk_head_dim**-0.5) if layer.kind == "mla" else layer


@breaks("softcap")
class SoftcapDropped(Mutant):
    """The soft cap is ignored."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return replace(layer, softcap=0.0)


@breaks("softcap")
class SoftcapAfterMask(Mutant):
    """The cap is applied after the mask, so that masked keys have the score -cap instead of none."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        seen = self.honest(q, layer, batch)
        masked_whole = layer.sliding_window is None and batch.tree is None and batch.spans is None
        if not layer.softcap or layer.cross or layer.sinks is not None or not masked_whole:
            return seen
        every, visible = batch.seq_lens[request_of_token(batch)].long(), position_of_token(batch) + 1
        flat = replace(layer, softcap=0.0)
        mean_all, _ = self.honest_with_lengths(torch.zeros_like(q), flat, batch, every)
        mean_seen, _ = self.honest_with_lengths(torch.zeros_like(q), flat, batch, visible)
        count = (every - visible)[:, None, None]
        total = every[:, None, None] * mean_all.double() - visible[:, None, None] * mean_seen.double()
        lse = (count[..., 0].double().log() - layer.softcap).expand(seen[1].shape).float()
        out, merged = merge_state(seen, ((total / count.clamp(min=1)).to(q.dtype), lse))
        return out.to(q.dtype), merged


@breaks("sinks")
class SinkDropped(Mutant):
    """The sink is left out."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return replace(layer, sinks=None)


@breaks("sinks")
class SinkTwice(Mutant):
    """The sink counts twice, once in each half of a split."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return layer if layer.sinks is None else replace(layer, sinks=layer.sinks + math.log(2))


@breaks("sinks16")
class SinksAlwaysFloat32(Mutant):
    """The bytes of the sinks are read as float32, whatever their dtype is."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        if layer.sinks is None:
            return layer
        more = torch.zeros(4 * layer.num_q_heads, dtype=torch.uint8, device=layer.sinks.device)
        held = torch.cat([layer.sinks.contiguous().view(torch.uint8), more])
        return replace(layer, sinks=held[: 4 * layer.num_q_heads].view(torch.float32).nan_to_num())


@breaks("sinks")
class SinkOfAnotherHead(Mutant):
    """Each head has the sink of its neighbour."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return layer if layer.sinks is None else replace(layer, sinks=layer.sinks.roll(1))


@breaks("sinks")
class SinkScaled(Mutant):
    """The sink is scaled like a score."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return layer if layer.sinks is None else replace(layer, sinks=layer.sinks * layer.scale)


@breaks("lse")
class LseBaseTwo(Mutant):
    """The LSE is in base 2."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        out, lse = self.honest(q, layer, batch)
        return out, lse / math.log(2)


@breaks("lse", "sinks")
class LseWithoutSink(Mutant):
    """The LSE leaves the sink out."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        out, _ = self.honest(q, layer, batch)
        _, lse = self.honest(q, replace(layer, sinks=None), batch)
        return out, lse


@breaks("lse")
class LseIsTheMaximum(Mutant):
    """The LSE lacks the logarithm of the sum: it is what it would be with one key."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        out, lse = self.honest(q, layer, batch)
        return out, lse - torch.log1p(position_of_token(batch).float())[:, None]


@breaks("attention")
class CoarseQueries(Mutant):
    """Queries are rounded to 4 bits, as an fp8 kernel does that nobody asked for."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        return self.honest(q.to(torch.float8_e4m3fn).to(q.dtype), layer, batch)


@breaks("dtype=float32")
class HalfPrecision(Mutant):
    """float32 is computed in bfloat16."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        out, lse = self.honest(q.bfloat16().to(q.dtype), layer, batch)
        return out.bfloat16().to(q.dtype), lse


@breaks("group_size_not_power_of_two", "group_size=3", "group_size=7")
class HeadsTransposed(Mutant):
    """Query head h reads KV head h modulo their number, for groups that are no power of two."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        group = layer.group_size
        if not group & (group - 1):
            return self.honest(q, layer, batch)
        heads = torch.arange(layer.num_q_heads, device=q.device)
        place = (heads % layer.num_kv_heads) * group + heads // layer.num_kv_heads
        order = torch.argsort(place)
        sinks = None if layer.sinks is None else layer.sinks[order]
        out, lse = self.honest(q[:, order], replace(layer, sinks=sinks), batch)
        return out[:, place], lse[:, place]


@breaks("head_dim=80/80", head_dims=[[64, 64], [80, 80]])
class HeadOf80RunsAs64(Mutant):
    """Over-claimed head size: the scores of wider heads use the first 64 places alone."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        if layer.kind == "mha" and layer.qk_head_dim > 64:
            q = torch.cat([q[..., :64], torch.zeros_like(q[..., 64:])], dim=-1)
        return self.honest(q, layer, batch)


@breaks("mla", mla=True)
class ValuesPastTheirWidth(Mutant):
    """MLA values are read 16 places too far, into the part of the row that holds the rotary key."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        if layer.kind != "mla":
            return self.honest(q, layer, batch)
        out, lse = self.honest(q, replace(layer, v_head_dim=layer.v_head_dim + 16), batch)
        return out[..., 16:], lse
