"""Random vision-language models of four families, too small to know anything, and prompts for them.

Each entry of `HOSTS` makes a model and a function that gives a batch of two prompts with unequal lengths, padded on the
left; LLaVA's second prompt holds two images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as t
from torch import Tensor, nn

IMAGE = 60  # the id of image tokens
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLIP = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "projection_dim": 24,
}  # fmt: skip
Inputs = dict[str, Tensor]
Host = tuple[nn.Module, Inputs, Callable[[int], Inputs]]


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def padded(*rows: list[int]) -> Inputs:
    """Ids and attention mask, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def words(number: int, count: int) -> list[int]:
    return torch.randint(3, 59, (count,), generator=torch.Generator().manual_seed(number)).tolist()


def llava() -> Host:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**CLIP), text_config=t.LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=IMAGE, vision_feature_layer=-2,
    )  # fmt: skip
    image = pixels(3, 3, 16, 16)
    rows = [1, *words(1, 2), *[IMAGE] * 16, *words(2, 5)], [1, *[IMAGE] * 16, *words(3, 3), *[IMAGE] * 16, *words(4, 4)]
    batch = {**padded(*rows), "pixel_values": image}
    alone = {**padded(rows[0]), "pixel_values": image[:1]}, {**padded(rows[1]), "pixel_values": image[1:]}
    return t.LlavaForConditionalGeneration(config), batch, lambda row: alone[row]


def llava_next() -> Host:
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**CLIP), text_config=t.LlamaConfig(**TEXT, num_key_value_heads=4),
        image_token_index=IMAGE, image_grid_pinpoints=[[16, 32], [32, 16]], vision_feature_layer=-2,
    )  # fmt: skip
    tokens = 16 + 4 * (8 + 1)  # the whole image, and two views with a newline after each row
    rows = [1, *[IMAGE] * tokens, *words(2, 5)], [1, *words(1, 3), *[IMAGE] * tokens, *words(4, 4)]
    image, sizes = pixels(2, 3, 3, 16, 16), torch.tensor([[16, 32], [16, 32]])

    def alone(row: int) -> Inputs:
        return {**padded(rows[row]), "pixel_values": image[row : row + 1], "image_sizes": sizes[:1]}

    return (
        t.LlavaNextForConditionalGeneration(config),
        {**padded(*rows), "pixel_values": image, "image_sizes": sizes},
        alone,
    )


def qwen2_vl() -> Host:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = t.Qwen2VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "in_channels": 3},
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    patches = pixels(16 + 32, 3 * 2 * 4 * 4)
    rows = [1, 62, *[IMAGE] * 4, 63, *words(2, 5)], [1, *words(1, 2), 62, *[IMAGE] * 8, 63, *words(4, 4)]

    def given(texts: Inputs, patches: Tensor, grid: Tensor) -> Inputs:
        kinds = (texts["input_ids"] == IMAGE).int()
        return {**texts, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}

    parts = (patches[:16], patches[16:])
    return (
        t.Qwen2VLForConditionalGeneration(config),
        given(padded(*rows), patches, grid),
        lambda row: given(padded(rows[row]), parts[row], grid[row : row + 1]),
    )


def instructblip() -> Host:
    small = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = t.InstructBlipConfig(
        vision_config=t.InstructBlipVisionConfig(**small, image_size=16, patch_size=4),
        qformer_config=t.InstructBlipQFormerConfig(**small, vocab_size=64, encoder_hidden_size=24),
        text_config=t.LlamaConfig(**TEXT, num_key_value_heads=4),
        num_query_tokens=6,
        image_token_index=IMAGE,
    )
    rows = [*[IMAGE] * 6, 1, *words(2, 5)], [*[IMAGE] * 6, 1, *words(4, 8)]
    image, asked = pixels(2, 3, 16, 16), torch.tensor([[5, 7, 9]])

    def given(texts: Inputs, image: Tensor) -> Inputs:
        asked_all = asked.expand(len(image), -1)
        return {
            **texts,
            "pixel_values": image,
            "qformer_input_ids": asked_all,
            "qformer_attention_mask": torch.ones_like(asked_all),
        }

    return (
        t.InstructBlipForConditionalGeneration(config),
        given(padded(*rows), image),
        lambda row: given(padded(rows[row]), image[row : row + 1]),
    )


HOSTS: dict[str, Callable[[], Host]] = {
    "llava": llava, "llava-next": llava_next, "qwen2-vl": qwen2_vl, "instructblip": instructblip,
}  # fmt: skip


def make_host(name: str) -> Host:
    """A host with large random weights: its tokens differ, and the choice of words is no matter of rounding."""
    torch.manual_seed(0)
    model, batch, alone = HOSTS[name]()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.15 if "vision" not in key else 0.1)
    return model.eval(), batch, alone
