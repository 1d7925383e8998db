"""Functions with the signatures of flash-attn 2, 3 and 4, in plain PyTorch, on any device.

The names, order and defaults of their arguments are those of flash-attn 2.8.3, of the operators of
its folder hopper/, and of flash-attn-4 4.0.0b36. Like the real ones they read tensors in pieces of
16 bytes, take LSEs as dense (batch, heads, rows), and serve groups of query heads.
"""

import math
from functools import lru_cache
from itertools import pairwise

import torch

# Of the test that cleared them: (generation, shape of the keys, deterministic), and passes.
CALLS = []
PACKED_CALLS = []


def attend(generation, q, k, v, scale, causal):
    check(q, k, v)
    CALLS.append((generation, tuple(k.shape), None))
    logits = logits_of(q, k, scale, causal)
    out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), repeated(v, q))
    return out.contiguous(), logits.logsumexp(-1)


def differentiate(generation, out_grad, q, k, v, out, lse, scale, causal, deterministic):
    check(out_grad, q, k, v, out)
    assert lse.is_contiguous(), "its strides are not read"
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    CALLS.append((generation, tuple(k.shape), deterministic))
    weights = (logits_of(q, k, scale, causal) - lse.unsqueeze(-1)).exp()
    weights_grad = torch.einsum("bqhd,bkhd->bhqk", out_grad, repeated(v, q))
    delta = (out_grad * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    logits_grad = weights * (weights_grad - delta) * scale
    q_grad = torch.einsum("bhqk,bkhd->bqhd", logits_grad, repeated(k, q))
    k_grad = torch.einsum("bhqk,bqhd->bkhd", logits_grad, q)
    v_grad = torch.einsum("bhqk,bqhd->bkhd", weights, out_grad)
    return q_grad, summed(k_grad, k), summed(v_grad, v)


def check(*tensors):
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0
        for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True):
            assert size == 1 or step > 0, "what repeats itself is not passed on"
            assert size == 1 or step * x.element_size() % 16 == 0


def logits_of(q, k, scale, causal):
    logits = torch.einsum("bqhd,bkhd->bhqk", q, repeated(k, q)) * scale
    if causal:
        is_future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(is_future, -math.inf)
    return logits


def repeated(kv, q):
    return kv.repeat_interleave(q.shape[2] // kv.shape[2], dim=2)


def summed(grad, kv):
    return grad.unflatten(2, (kv.shape[2], -1)).sum(3)


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes,
    return_softmax: bool,
):
    assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
    assert window_size_left == window_size_right == -1
    return (*attend(2, q, k, v, softmax_scale, causal), None, None)


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes,
    deterministic: bool,
    rng_state=None,
):
    assert (dropout_p, softcap, alibi_slopes, rng_state) == (0.0, 0.0, None, None)
    assert window_size_left == window_size_right == -1
    args = (dout, q, k, v, out, softmax_lse, softmax_scale, causal, deterministic)
    for x, grad in zip((dq, dk, dv), differentiate(2, *args), strict=True):
        x.copy_(grad)
    return torch.empty(0)


def packed(bounds, *tensors):
    """The sequences of packed tensors (rows, ...), each a batch of one."""
    ends = bounds.tolist()
    assert ends[0] == 0
    assert ends[-1] == len(tensors[0])
    for start, stop in pairwise(ends):
        assert start < stop
        yield [x[None, start:stop] for x in tensors]


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes=None,
    return_softmax: bool = False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors: bool = False,
):
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q is cu_seqlens_k
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    PACKED_CALLS.append("forward")
    parts = [attend(2, *x, softmax_scale, causal) for x in packed(cu_seqlens_q, q, k, v)]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([x[0] for _, x in parts], 1), 0, 0


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes,
    deterministic: bool,
    rng_state=None,
    zero_tensors: bool = False,
):
    assert softmax_lse.is_contiguous()
    assert softmax_lse.shape == (q.shape[1], q.shape[0])
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    PACKED_CALLS.append("backward")
    rows = (dout, q, k, v, out, softmax_lse.transpose(0, 1), dq, dk, dv)
    for *inputs, lse, part_dq, part_dk, part_dv in packed(cu_seqlens_k, *rows):
        lse = lse.transpose(1, 2).contiguous()
        grads = differentiate(2, *inputs, lse, softmax_scale, causal, deterministic)
        for x, grad in zip((part_dq, part_dk, part_dv), grads, strict=True):
            x.copy_(grad)


FLASH3_SCHEMAS = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new, Tensor(v_new!)? v_new, Tensor? q_v, "
    "Tensor(out!)? out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, "
    "Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, "
    "Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, "
    "Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left = -1, "
    "int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, "
    "bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, "
    "bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq, Tensor(dk!)? dk, Tensor(dv!)? dv, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
    "int? max_seqlen_k, float softmax_scale, bool is_causal, int window_size_left = -1, "
    "int window_size_right = -1, float softcap = 0.0, bool deterministic = False, "
    "int sm_margin = 0) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, "
    "Tensor, Tensor)",
)


@lru_cache  # a process can define operators once, and they last as long as the library
def register_flash3():
    library = torch.library.Library("flash_attn_3", "DEF")
    for schema, run in zip(FLASH3_SCHEMAS, (flash3_fwd, flash3_bwd), strict=True):
        library.define(schema)
        library.impl(schema[:3], run, "CompositeExplicitAutograd")
    return library


def by_name(operator, args, kwargs):
    """The arguments of an operator that are not None, defaults included."""
    arguments = operator.default._schema.arguments
    given = {x.name: x.default_value for x in arguments}  # PyTorch leaves trailing defaults out
    given |= dict(zip(given, args, strict=False))
    return {name: value for name, value in {**given, **kwargs}.items() if value is not None}


def flash3_fwd(*args, **kwargs):
    given = by_name(torch.ops.flash_attn_3.fwd, args, kwargs)
    q, k, v = (given.pop(name) for name in "qkv")
    scale, causal = given.pop("softmax_scale"), given.pop("is_causal")
    # More splits would be merged by a second kernel, in another order each time.
    assert given.pop("num_splits") == 1
    assert all(given[name] == -1 for name in ("window_size_left", "window_size_right"))
    assert not any(torch.is_tensor(value) for value in given.values())
    return (*attend(3, q, k, v, scale, causal), q.new_empty(0), q.new_empty(0))


def flash3_bwd(*args, **kwargs):
    given = by_name(torch.ops.flash_attn_3.bwd, args, kwargs)
    names = ("dout", "q", "k", "v", "out", "softmax_lse", "softmax_scale", "is_causal")
    needed = [given.pop(name) for name in (*names, "deterministic")]
    grads = [given.pop(name) for name in ("dq", "dk", "dv")]
    assert all(given[name] == -1 for name in ("window_size_left", "window_size_right"))
    assert not any(torch.is_tensor(value) for value in given.values())
    for x, grad in zip(grads, differentiate(3, *needed), strict=True):
        x.copy_(grad)
    return (*grads, *(grads[0].new_empty(0) for _ in range(5)))


def _flash_attn_fwd(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    softcap=None,
    window_size_left=None,
    window_size_right=None,
    learnable_sink=None,
    tile_mn=None,
    mma_pv_is_rs=None,
    intra_wg_overlap=None,
    num_threads=384,
    num_splits=1,
    pack_gqa=None,
    _arch=None,
    score_mod=None,
    mask_mod=None,
    block_sparse_tensors=None,
    return_lse=False,
    out=None,
    lse=None,
    aux_tensors=None,
    aux_scalars=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    gather_kv_indices=None,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
):
    out, lse = attend(4, q, k, v, softmax_scale, causal)
    return out, lse if return_lse else None, None, None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    window_size_left=None,
    window_size_right=None,
    m_block_size=64,
    n_block_size=128,
    num_threads=256,
    pack_gqa=False,
    num_stages_Q=2,
    num_stages_dO=2,
    SdP_swapAB=False,
    dKV_swapAB=False,
    dQ_swapAB=False,
    AtomLayoutMSdP=2,
    AtomLayoutNdKV=2,
    AtomLayoutMdQ=2,
    V_in_regs=False,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    deterministic=False,
    dq=None,
    dk=None,
    dv=None,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    dlse=None,
    learnable_sink=None,
):
    return differentiate(4, dout, q, k, v, out, lse, softmax_scale, causal, deterministic)


FILES = {
    "flash_attn/__init__.py": "",
    "flash_attn/flash_attn_interface.py": (
        f"from {__name__} import _flash_attn_backward, _flash_attn_forward\n"
        f"from {__name__} import _flash_attn_varlen_backward, _flash_attn_varlen_forward"
    ),
    "flash_attn/cute/__init__.py": "",
    "flash_attn/cute/interface.py": f"from {__name__} import _flash_attn_bwd, _flash_attn_fwd",
    "flash_attn_interface.py": f"from {__name__} import register_flash3; register_flash3()",
    "cutlass/__init__.py": "",
    "quack/__init__.py": "",
}


def install(folder):
    """Writes packages that hand out the functions above."""
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
