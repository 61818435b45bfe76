"""SeerAttention (card 22): small gates learn which blocks of the attention map matter, and the others are skipped.

    S = gate(pool(q), pool(k))          scores of blocks of 64 x 64 tokens                 `gate.py`, `pooling.py`
    M = softmax(S) > t, or the best     which of them are visited                          `select.py`
    O_i = softmax(q_i K[M_i]^T) V[M_i]  attention of a block of queries, nothing else      `attention.py`

Gates learn from the model's own map, pooled (`truth.py`, `distill.py`), live beside the model (`gates.py`, `saved.py`),
and are put to work by `method.py`: sparse prompts, dense decoding. SeerAttention-R is the other way round: `decode.py` has
its gate and its compressed keys, `reasoning.py` its method.

Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", NeurIPS 2025, arXiv 2410.13276, and
"SeerAttention-R", arXiv 2506.08889.
"""

from heed.language.seer.attention import block_sparse_attention
from heed.language.seer.decode import CompressedKeys, DecodeGate
from heed.language.seer.distill import GateDistillation, decode_truth, distill, gate_loss
from heed.language.seer.gate import AttnGate
from heed.language.seer.gates import GateSettings, SeerGates
from heed.language.seer.method import SeerAttention, SeerState, Visited
from heed.language.seer.pooling import pool_blocks
from heed.language.seer.reasoning import SeerAttentionR, SeerRState, decode_attention
from heed.language.seer.saved import load_gates, save_gates
from heed.language.seer.select import BlockChoice
from heed.language.seer.truth import pooled_truth, row_maxima

__all__ = [
    "AttnGate",
    "BlockChoice",
    "CompressedKeys",
    "DecodeGate",
    "GateDistillation",
    "GateSettings",
    "SeerAttention",
    "SeerAttentionR",
    "SeerGates",
    "SeerRState",
    "SeerState",
    "Visited",
    "block_sparse_attention",
    "decode_attention",
    "decode_truth",
    "distill",
    "gate_loss",
    "load_gates",
    "pool_blocks",
    "pooled_truth",
    "row_maxima",
    "save_gates",
]
