"""A vision-language model small enough to be trained here: a CLIP tower and a Llama, 0.3 million weights in all.

It is transformers' own `LlavaForConditionalGeneration` with its processor, saved and loaded like any other, and it
learns to answer questions about, and to describe, the scenes of `heed.multimodal.scenes` in a few minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from heed.errors import MissingExtra
from heed.multimodal.scenes import DESCRIBE, OBJECTS, SIDE, draw_name, draw_scene, question

STEPS, SCENES = 1500, 16  # training steps, scenes in each
LEARNING_RATE = 2e-3
_PATCH, _WIDTH, _HEADS = 12, 64, 4
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_WORDS = (
    *("user", "assistant", ":", "?", ".", "a", "and", "is", "there", "in", "the", "image", "describe"),
    *("yes", "no", "where", "top", "bottom", "left", "right"),
)
# As LLaVA-1.5 has it: "USER: <image>\n...? ASSISTANT: ...</s>".
_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}"
    "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_processor() -> Any:
    """A `LlavaProcessor` with a tokenizer of whole words and a chat template.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
        from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingExtra("transformers", "multimodal") from error
    words = {word: i for i, word in enumerate((*_SPECIAL, *_WORDS, *OBJECTS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_tokens(list(OBJECTS))  # "red circle" is one token, so that a model this small can look for it
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=False))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **named, additional_special_tokens=["<image>"], padding_side="left"
    )
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        fast,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def tiny_model(seed: int = 0) -> Any:
    """An untrained `LlavaForConditionalGeneration` that fits `tiny_processor`: 4 x 4 image tokens, 4 decoder layers.

    Args:
        seed: of the weights.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    except ImportError as error:
        raise MissingExtra("transformers", "multimodal") from error
    sizes: dict[str, Any] = {"hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_attention_heads": _HEADS}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=SIDE, patch_size=_PATCH, projection_dim=_WIDTH)
    text = LlamaConfig(
        **sizes,
        num_hidden_layers=4,
        num_key_value_heads=_HEADS,
        vocab_size=len(_SPECIAL) + len(_WORDS) + len(OBJECTS),
        max_position_embeddings=256,
        initializer_range=0.1,  # the usual 0.02 is for widths of thousands; with it, this one does not begin to learn
        tie_word_embeddings=True,  # what is asked for then lies where image tokens described by it lie
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).eval()


def train_tiny(
    model: Any,
    processor: Any,
    *,
    steps: int = STEPS,
    seed: int = 0,
    batches: Callable[[Any, np.random.Generator], dict[str, Tensor]] | None = None,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Teach a tiny model to answer questions about scenes and to describe them; every step brings new scenes.

    Args:
        model, processor: as `tiny_model` and `tiny_processor` make them.
        steps: of AdamW, one cycle of the learning rate over all of them.
        seed: of the scenes.
        batches: gives a batch from the processor and a generator; None for `training_batch`.
        report: told the step, from 1 on, and its loss.
    """
    random, draw = np.random.default_rng([seed, 1]), batches or training_batch
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, steps, pct_start=0.1)
    device = next(model.parameters()).device
    model.train()
    for step in range(1, steps + 1):
        loss = model(**{name: value.to(device) for name, value in draw(processor, random).items()}).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if report is not None:
            report(step, loss.item())
    model.eval()


def training_batch(processor: Any, random: np.random.Generator) -> dict[str, Tensor]:
    """Of each of `SCENES` scenes: whether something is there that is, whether something is that is not, and what is."""
    images, talks = [], []
    for _ in range(SCENES):
        scene = draw_scene(random)
        for there in (True, False):
            talks.append([(question(draw_name(scene, there, random)), "yes" if there else "no")])
        talks.append([(DESCRIBE, scene.description())])
        images += [scene.image] * 3
    return talks_batch(processor, images, talks)


def talks_batch(processor: Any, images: list[Any], talks: list[list[tuple[str, str]]]) -> dict[str, Tensor]:
    """Talks about images as `model(**batch)` takes them to learn the answers.

    Args:
        processor: of the tiny model.
        images: one per talk.
        talks: each a list of questions and answers.
    """
    batch = processor(
        images=images, text=[_write(processor, turns) for turns in talks], return_tensors="pt", padding=True
    )
    ids = batch["input_ids"]
    return {**batch, "labels": ids.masked_fill(~_answers(ids, processor.tokenizer), -100)}


def _write(processor: Any, turns: list[tuple[str, str]]) -> str:
    messages: list[dict[str, Any]] = []
    for asked, said in turns:
        picture = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": asked}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
    return processor.apply_chat_template(messages)


def _answers(ids: Int[Tensor, "B T"], tokenizer: Any) -> Bool[Tensor, "B T"]:
    """What stands behind "ASSISTANT:", up to the end of the answer and with it."""
    assistant, end = (ids == tokenizer.convert_tokens_to_ids(word) for word in ("assistant", "</s>"))
    turn = assistant.cumsum(1) > end.cumsum(1) - end.long()
    behind = turn[:, 2:] & turn[:, 1:-1] & turn[:, :-2]  # "assistant" and ":" are the first two of a turn
    return torch.nn.functional.pad(behind, (2, 0))
