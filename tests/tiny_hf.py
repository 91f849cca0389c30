"""Write small random image-text-to-text models to folders: LLaVA, Qwen2-VL, Idefics3, SmolVLM,
BLIP-2, InstructBLIP, Florence-2.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from clear_nb.core import torch_rng

# chat template; IMAGE stands for the token of the model
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}"
    '{% endfor %}{% endfor %} Answer:'
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)


def bytewise(*special, **named):
    "Make a tokenizer of single bytes and some special tokens; `named` ones become attributes."
    special = ['<pad>', '<s>', '</s>', *special]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({token: k for k, token in enumerate(vocabulary)}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        pad_token='<pad>',
        bos_token='<s>',
        eos_token='</s>',
        extra_special_tokens=named,
    )


def _save(folder, processor, model):
    "Draw the weights from named generators and write processor and model to a folder."
    with torch.no_grad():
        for name, w in sorted(model.state_dict().items()):
            if w.is_floating_point() and 'inv_freq' not in name:
                scale, mean = 0.2 if w.ndim > 1 else 0.1, float(w.ndim == 1 and 'norm' in name)
                w.copy_(torch.randn(w.shape, generator=torch_rng('tiny hf', name)) * scale + mean)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def llava(folder, chat=True):
    "Make a LLaVA of 32 x 32 pixels and 16 tokens per picture, with or without a chat template."
    t = bytewise('<image>')
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(vocab_size=len(t), **TEXT),
        image_token_index=t.convert_tokens_to_ids('<image>'),
        image_seq_length=16,
    )
    pictures = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    processor = LlavaProcessor(
        pictures,
        t,
        patch_size=8,
        vision_feature_select_strategy='default',
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace('IMAGE', '<image>') if chat else None,
    )
    return _save(folder, processor, LlavaForConditionalGeneration(config))


def plain_llava(folder):
    "Make a LLaVA without a chat template."
    return llava(folder, chat=False)


def qwen(folder):
    "Make a Qwen2-VL, which takes pictures of any size."
    t = bytewise('<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|video_pad|>')
    start, end, image, video = map(
        t.convert_tokens_to_ids,
        ('<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|video_pad|>'),
    )
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(t), rope_scaling=dict(type='mrope', mrope_section=[1, 1, 2]), **TEXT
        ),
        vision_config=dict(
            depth=2,
            embed_dim=32,
            hidden_size=32,
            num_heads=4,
            mlp_ratio=2,
            patch_size=8,
            spatial_merge_size=2,
            temporal_patch_size=2,
            in_channels=3,
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(
            patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=256, max_pixels=4096
        ),
        t,
        Qwen2VLVideoProcessor(patch_size=8, merge_size=2),
        chat_template=TEMPLATE.replace('IMAGE', '<|vision_start|><|image_pad|><|vision_end|>'),
    )
    return _save(folder, processor, Qwen2VLForConditionalGeneration(config))


TILES = [f'<row_{r}_col_{c}>' for r in range(1, 5) for c in range(1, 5)]
TILE_TOKENS = ('<image>', '<fake_token_around_image>', '<global-img>', '<end_of_utterance>')


def idefics(folder):
    "Make an Idefics3, which cuts a picture into tiles; SmolVLM has this form."
    t = bytewise(*TILE_TOKENS, *TILES)
    config = Idefics3Config(
        image_token_id=t.convert_tokens_to_ids('<image>'),
        scale_factor=2,
        pad_token_id=0,
        vision_config=dict(VISION),
        text_config=dict(model_type='llama', vocab_size=len(t), **TEXT),
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size=dict(longest_edge=64), max_image_size=dict(longest_edge=32)),
        t,
        image_seq_len=4,
        chat_template=TEMPLATE.replace('IMAGE', '<image>'),
    )
    return _save(folder, processor, Idefics3ForConditionalGeneration(config))


def smolvlm(folder):
    "Make a SmolVLM, whose processor has a template method of its own; it needs num2words."
    t = bytewise(*TILE_TOKENS, *TILES, '<video>')
    config = SmolVLMConfig(
        image_token_id=t.convert_tokens_to_ids('<image>'),
        scale_factor=2,
        pad_token_id=0,
        vision_config=dict(VISION),
        text_config=dict(model_type='llama', vocab_size=len(t), **TEXT),
    )
    sides = dict(size=dict(longest_edge=64), max_image_size=dict(longest_edge=32))
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**sides),
        t,
        SmolVLMVideoProcessor(**sides),
        image_seq_len=4,
        chat_template=TEMPLATE.replace('IMAGE', '<image>'),
    )
    return _save(folder, processor, SmolVLMForConditionalGeneration(config))


BLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
OPT = dict(
    model_type='opt',
    hidden_size=32,
    word_embed_proj_dim=32,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def _blip_parts(t, **qformer):
    "Make the numbers of a BLIP model with four query tokens."
    return dict(
        vision_config=dict(**BLIP, image_size=32, patch_size=8),
        qformer_config=dict(**BLIP, vocab_size=len(t), encoder_hidden_size=32, **qformer),
        text_config=dict(**OPT, vocab_size=len(t)),
        num_query_tokens=4,
        image_token_index=t.convert_tokens_to_ids('<image>'),
    )


def blip2(folder):
    "Make a BLIP-2, whose processor puts the picture's tokens in front by itself."
    t = bytewise('<image>')
    pictures = BlipImageProcessor(size=dict(height=32, width=32))
    processor = Blip2Processor(pictures, t, num_query_tokens=4)
    return _save(folder, processor, Blip2ForConditionalGeneration(Blip2Config(**_blip_parts(t))))


def instructblip(folder):
    "Make an InstructBLIP, which reads the question twice and places the picture by itself."
    t = bytewise('<image>')
    pictures = BlipImageProcessor(size=dict(height=32, width=32))
    processor = InstructBlipProcessor(pictures, t, bytewise('<image>'), num_query_tokens=4)
    config = InstructBlipConfig(**_blip_parts(t))
    return _save(folder, processor, InstructBlipForConditionalGeneration(config))


def florence2(folder):
    "Make a Florence-2, an encoder-decoder whose processor places the picture by itself."
    t = bytewise(image_token='<image>')
    text = BartConfig(
        vocab_size=len(t),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    vision = dict(
        depths=(1, 1),
        patch_size=(7, 3),
        patch_stride=(4, 2),
        patch_padding=(3, 1),
        patch_prenorm=(False, True),
        embed_dim=(16, 32),
        num_heads=(2, 4),
        num_groups=(2, 4),
        window_size=4,
        projection_dim=32,
    )
    image = t.convert_tokens_to_ids('<image>')
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=image)
    sides = dict(size=dict(height=32, width=32), crop_size=dict(height=32, width=32))
    pictures = CLIPImageProcessor(**sides, image_seq_length=17)
    return _save(folder, Florence2Processor(pictures, t), Florence2ForConditionalGeneration(config))
