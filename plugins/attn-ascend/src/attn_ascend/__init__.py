"""attn-ascend: the backend `ascend`, Huawei NPUs through torch-npu's fused attention operators."""
