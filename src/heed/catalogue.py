"""The 72 systems as data: number, slug, title, paper, room and, once built, public names.

The code of a system adds itself: `@provides("23-hilo")` beside a class or function lists it as a public name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

from heed.errors import unknown

T = TypeVar("T", bound=Callable[..., object])

ROOMS = ("engine", "layers", "vision", "language", "pretrain", "diffusion", "multimodal", "predict", "explain")


@dataclass
class System:
    """One of the 72.

    Args:
        number: 1 to 72.
        name: short name; with the number it makes the slug.
        title: the published name.
        room: where its code lives.
        paper: authors, venue and year, arXiv number.
    """

    number: int
    name: str
    title: str
    room: str
    paper: str = ""
    names: list[str] = field(default_factory=list)

    @property
    def slug(self) -> str:
        return f"{self.number:02d}-{self.name}"

    @property
    def built(self) -> bool:
        return bool(self.names)


_SYSTEMS: dict[str, System] = {}


def provides(slug: str) -> Callable[[T], T]:
    """List the decorated class or function as a public name of a system."""

    def add(thing: T) -> T:
        names = system(slug, load=False).names
        name = f"{thing.__module__}.{thing.__qualname__}"  # type: ignore[attr-defined]
        if name not in names:
            names.append(name)
        return thing

    return add


def system(slug: str, *, load: bool = True) -> System:
    """The system with this slug ("23-hilo"), short name ("hilo") or number ("23")."""
    if load:
        load_rooms()
    for entry in _SYSTEMS.values():
        if slug in (entry.slug, entry.name, str(entry.number), f"{entry.number:02d}"):
            return entry
    raise ValueError(unknown("system", slug, (s for e in _SYSTEMS.values() for s in (e.slug, e.name))))


def systems(*, room: str | None = None, built: bool | None = None) -> list[System]:
    """All systems in order, or those of a room, or those built (or not yet built)."""
    load_rooms()
    if room is not None and room not in ROOMS:
        raise ValueError(unknown("room", room, ROOMS))
    return [
        entry
        for entry in _SYSTEMS.values()
        if (room is None or entry.room == room) and (built is None or entry.built == built)
    ]


@cache
def load_rooms() -> None:
    """Import every module of every room, so that the registries are full."""
    for room in ROOMS:
        try:
            package = importlib.import_module(f"heed.{room}")
        except ModuleNotFoundError as error:
            if error.name != f"heed.{room}":
                raise
            continue
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"heed.{room}.{module.name}")


def _add(number: int, name: str, title: str, room: str, paper: str = "") -> None:
    entry = System(number, name, title, room, paper)
    _SYSTEMS[entry.slug] = entry


# fmt: off
_add(1, "designedit", "DesignEdit", "diffusion", "DesignEdit: Multi-Layered Latent Decomposition and Fusion for Unified & Accurate Image Editing; AAAI 2025; arXiv 2403.14487")
_add(2, "bamm", "BAMM (Bidirectional Autoregressive Motion Model)", "predict", "BAMM: Bidirectional Autoregressive Motion Model; ECCV 2024; arXiv 2403.19435")
_add(3, "scan-and-snap", "Scan and Snap", "explain", "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer; NeurIPS 2023; arXiv 2305.16380")
_add(4, "halonet", "HaloNet (Scaling Local Self-Attention for Parameter Efficient Visual Backbones)", "vision", "CVPR 2021; arXiv 2103.12731")
_add(5, "tgm-vmae", "Text-Guided Video MAE (TGM)", "pretrain", "Text-Guided Video Masked Autoencoder; ECCV 2024; arXiv 2408.00759")
_add(6, "colormae", "ColorMAE", "pretrain", "ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders; ECCV 2024; arXiv 2407.13036")
_add(7, "illama", "iLLaMA (Adapting LLaMA Decoder to Vision Transformer)", "vision", "arXiv 2404.06773")
_add(8, "routing", "Routing Transformer", "language", "Efficient Content-Based Sparse Attention with Routing Transformers; TACL 2021; arXiv 2003.05997")
_add(9, "acmil", "ACMIL: Attention-Challenging Multiple Instance Learning", "predict", "Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification; ECCV 2024; arXiv 2311.07125")
_add(10, "mto", "MTO (Masked Token Optimization)", "pretrain", "Emerging Property of Masked Token for Effective Pre-training; ECCV 2024; arXiv 2404.08330")
_add(11, "attencraft", "AttenCraft", "diffusion", "AttenCraft: Attention-guided Disentanglement of Multiple Concepts for Text-to-Image Customization; arXiv 2405.17965")
_add(12, "var", "VAR", "multimodal", "See What You Are Told: Visual Attention Sink in Large Multimodal Models; ICLR 2025; arXiv 2503.03321")
_add(13, "fna", "Faster Neighborhood Attention (NATTEN operators)", "engine", "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level; NeurIPS 2024; arXiv 2403.04690")
_add(14, "imbalanced", "Fixing Imbalanced Attention (dual-stream token selection + head-specific modulation)", "multimodal", "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model; arXiv 2501.12206")
_add(15, "block-transformer", "Block Transformer", "language", "Block Transformer: Global-to-Local Language Modeling for Fast Inference; NeurIPS 2024; arXiv 2406.02657")
_add(16, "convit", "ConViT (gated positional self-attention)", "vision", "ICML 2021; arXiv 2103.10697")
_add(17, "sparsifiner", "Sparsifiner (learned sparse instance-dependent attention)", "vision", "CVPR 2023; arXiv 2303.13755")
_add(18, "selective-ssa", "Selective Self-Attention (principled context control)", "language", "Selective Attention: Enhancing Transformer through Principled Context Control; NeurIPS 2024; arXiv 2411.12892")
_add(19, "masked-pdpp", "Masked-PDPP", "predict", "Masked Diffusion with Task-awareness for Procedure Planning in Instructional Videos; arXiv 2309.07409")
_add(20, "maskalign", "MaskAlign", "pretrain", "Stare at What You See: Masked Image Modeling without Reconstruction; CVPR 2023; arXiv 2211.08887")
_add(21, "vhr", "VHR (Vision-aware Head Divergence and Reinforcement)", "multimodal", "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence; ACL 2025; arXiv 2412.13949")
_add(22, "seerattention", "SeerAttention", "language", "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs; NeurIPS 2025; arXiv 2410.13276")
_add(23, "hilo", "HiLo attention and LITv2", "layers", "Fast Vision Transformers with HiLo Attention; NeurIPS 2022; arXiv 2205.13213")
_add(24, "davit", "DaViT (Dual Attention Vision Transformers)", "vision", "ECCV 2022; arXiv 2204.03645")
_add(25, "van", "Visual Attention Network (VAN, LKA)", "vision", "Visual Attention Network; Computational Visual Media 2023; arXiv 2202.09741")
_add(26, "damro", "DAMRO", "multimodal", "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination; EMNLP 2024; arXiv 2410.04514")
_add(27, "moh", "MoH: Mixture-of-Head attention (ViT, DiT, LLM)", "layers", "MoH: Multi-Head Attention as Mixture-of-Head Attention; ICML 2025; arXiv 2410.11842")
_add(28, "dreamvideo2", "DreamVideo-2", "diffusion", "DreamVideo-2: Zero-Shot Subject-Driven Video Customization with Precise Motion Control; arXiv 2410.13830")
_add(29, "multimae", "MultiMAE", "pretrain", "MultiMAE: Multi-modal Multi-task Masked Autoencoders; ECCV 2022; arXiv 2204.01678")
_add(30, "primecomposer", "PrimeComposer", "diffusion", "PrimeComposer: Faster Progressively Combined Diffusion for Image Composition with Attention Steering; ACM MM 2024; arXiv 2403.05053")
_add(31, "layer-masking", "Layer masking: improved input masking for CNNs", "layers", "Towards Improved Input Masking for Convolutional Neural Networks; ICCV 2023; arXiv 2211.14646")
_add(32, "ulsam", "ULSAM: Ultra-Lightweight Subspace Attention Module", "layers", "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks; WACV 2020; arXiv 2006.15102")
_add(33, "fsfm", "FSFM (FSFM-3C)", "pretrain", "FSFM: A Generalizable Face Security Foundation Model via Self-Supervised Facial Representation Learning; CVPR 2025; arXiv 2412.12032")
_add(34, "zipcache", "ZipCache", "language", "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification; NeurIPS 2024; arXiv 2405.14256")
_add(35, "psa", "Polarized Self-Attention (PSA)", "layers", "Polarized Self-Attention: Towards High-quality Pixel-wise Regression; Neurocomputing 2022; arXiv 2107.00782")
_add(36, "hyperzzw", "HyperZ.Z.W operator / Terminator", "vision", "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction; arXiv 2401.17948")
_add(37, "codebook", "Task-conditioned codebook bottleneck for embodied agents", "predict", "Selective Visual Representations Improve Convergence and Generalization for Embodied AI; ICLR 2024; arXiv 2311.04193")
_add(38, "crossvideomae", "CrossVideoMAE", "pretrain", "CrossVideoMAE: Self-Supervised Image-Video Representation Learning with Masked Autoencoders; arXiv 2502.07811")
_add(39, "promac", "ProMaC (Prompt-Mask Cycle generation)", "multimodal", "Leveraging Hallucinations to Reduce Manual Prompt Dependency in Promptable Segmentation; NeurIPS 2024; arXiv 2408.15205")
_add(40, "mqsa-ted", "MQSA-TED: multi-query self-attention with transition-aware embedding distillation", "predict", "Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for Sequential Recommendation; WSDM 2024; arXiv 2311.01056")
_add(41, "subsampled-ssa", "Stochastically subsampled self-attention (information pathways)", "language", "The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles; KDD 2023; arXiv 2306.01705")
_add(42, "medusa", "MEDUSA", "vision", "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image Analysis; Frontiers in Medicine 2022; arXiv 2110.06063")
_add(43, "lqcd", "LQCD (Leading Query Contrastive Decoding)", "multimodal", "Towards Analyzing and Mitigating Sycophancy in Large Vision-Language Models; arXiv 2408.11261")
_add(44, "self-familiarity", "SELF-FAMILIARITY", "language", "Zero-Resource Hallucination Prevention for Large Language Models; EMNLP 2024; arXiv 2309.02654")
_add(45, "ramt", "R-AMT (Regularized Mask Tuning)", "multimodal", "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models; ICCV 2023; arXiv 2307.15049")
_add(46, "kdgqa", "Key-Driven Grouped Query Attention (KDGQA, DGQA, PGQA)", "layers", "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention; arXiv 2408.08454")
_add(47, "croco", "CroCo (cross-view completion)", "pretrain", "CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion; NeurIPS 2022; arXiv 2210.10716")
_add(48, "oat", "OAT", "predict", "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction; ECCV 2024; arXiv 2407.13335")
_add(49, "dcal", "DCAL (Dual Cross-Attention Learning)", "vision", "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification; CVPR 2022; arXiv 2205.02151")
_add(50, "tempscale", "TempScale", "language", "Length-Induced Embedding Collapse in Transformer-based Models; ACL 2025; arXiv 2410.24200")
_add(51, "vit-analytics", "How Does Attention Work in Vision Transformers? (visual analytics)", "explain", "PacificVis 2023; arXiv 2303.13731")
_add(52, "tic", "TiC (Vision Transformer in Convolution, MSA-Conv)", "vision", "arXiv 2310.04134")
_add(53, "metamixer", "MetaMixer / FFNet (FFNified attention)", "vision", "MetaMixer Is All You Need; arXiv 2406.02021")
_add(54, "mixedae", "MixedAE (Mixed Autoencoder)", "pretrain", "Mixed Autoencoder for Self-supervised Visual Representation Learning; CVPR 2023; arXiv 2303.17152")
_add(55, "hat", "HAT", "predict", "Activating More Pixels in Image Super-Resolution Transformer; CVPR 2023; arXiv 2205.04437")
_add(56, "mossformer", "MossFormer", "predict", "MossFormer: Pushing the Performance Limit of Monaural Speech Separation using Gated Single-Head Transformer with Convolution-Augmented Joint Self-Attentions; ICASSP 2023; arXiv 2302.11824")
_add(57, "hip", "HiP Attention", "language", "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning; ICLR 2025; arXiv 2406.09827")
_add(58, "dinat", "Dilated Neighborhood Attention Transformer (NAT, DiNAT, DiNAT_s)", "vision", "Neighborhood Attention Transformer; CVPR 2023; arXiv 2204.07143")
_add(59, "ait", "All in Tokens (AiT)", "predict", "All in Tokens: Unifying Output Space of Visual Tasks via Soft Token; ICCV 2023; arXiv 2301.02229")
_add(60, "attention-vat", "Attention VAT and Attention iVAT", "language", "Making Attention Mechanisms More Robust and Interpretable with Virtual Adversarial Training; Applied Intelligence 2022; arXiv 2104.08763")
_add(61, "cae", "Context Autoencoder (CAE)", "pretrain", "Context Autoencoder for Self-Supervised Representation Learning; IJCV 2023; arXiv 2202.03026")
_add(62, "mamba-yolo", "Mamba YOLO", "vision", "Mamba YOLO: SSMs-Based YOLO For Object Detection; AAAI 2025; arXiv 2406.05835")
_add(63, "s5-video", "Selective S4 (S5) for long-form video", "predict", "Selective Structured State-Spaces for Long-Form Video Understanding; CVPR 2023; arXiv 2303.14526")
_add(64, "soft", "Softmax-free Linear Transformers (SOFT, SOFT with symmetric normalisation)", "vision", "SOFT: Softmax-free Transformer with Linear Complexity; NeurIPS 2021; arXiv 2110.11945")
_add(65, "razor", "RazorAttention", "language", "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads; ICLR 2025; arXiv 2407.15891")
_add(66, "vitgaze", "ViTGaze", "predict", "ViTGaze: Gaze Following with Interaction Features in Vision Transformers; Visual Intelligence 2024; arXiv 2403.12778")
_add(67, "maskgwm", "MaskGWM", "diffusion", "MaskGWM: A Generalizable Driving World Model with Video Mask Reconstruction; CVPR 2025; arXiv 2502.11663")
_add(68, "focalnet", "Focal Modulation Networks (FocalNet)", "vision", "Focal Modulation Networks; NeurIPS 2022; arXiv 2203.11926")
_add(69, "gradsam", "Grad-SAM latent manipulation", "diffusion", "arXiv 2408.16232")
_add(70, "sinklora", "SinkLoRA", "language", "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models; arXiv 2406.05678")
_add(71, "lamamba-diff", "LaMamba-Diff", "diffusion", "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba; arXiv 2408.02615")
_add(72, "grouppose", "Group Pose", "predict", "Group Pose: A Simple Baseline for End-to-End Multi-person Pose Estimation; ICCV 2023; arXiv 2308.07313")
# fmt: on
