"""What the parts of the surveyed hosts are, written by hand from their trees and code.

One line is ``path = role``. Numbers in paths are ``*``. ``{a,b} = {x,y}`` stands for two lines, ``{a,b} = x`` for two
with the same role; ``x|y`` accepts both, where the field has no single word. Weights that are not listed are "other".
Roles of the second stream of joint attention are written ctx_q, ctx_k, ...
"""

from __future__ import annotations

import re
from itertools import product

Table = dict[str, str]


def expand(line: str) -> list[tuple[str, str]]:
    """`{a,b}.w = {x,y}` -> [("a.w", "x"), ("b.w", "y")]. Braces of both sides run together, further ones of the path
    independently.
    """
    path, role = (side.strip() for side in line.split("="))
    choices = [found.split(",") for found in re.findall(r"\{([^}]*)\}", path)]
    roles = re.findall(r"\{([^}]*)\}", role)
    if not roles:
        return [(fill(path, chosen), role) for chosen in product(*choices)]
    (zipped,) = (found.split(",") for found in roles)
    outer, inner = choices[:-1], choices[-1]
    assert len(inner) == len(zipped), line
    return [
        (fill(path, (*chosen, name)), fill(role, (zipped[place],)))
        for chosen in product(*outer)
        for place, name in enumerate(inner)
    ]


def fill(text: str, chosen: tuple[str, ...]) -> str:
    values = iter(chosen)
    return re.sub(r"\{[^}]*\}", lambda _: next(values), text)


def table(*texts: str) -> Table:
    """The lines of several texts; later ones win."""
    lines = (line.strip() for text in texts for line in text.splitlines())
    return dict(pair for line in lines if line and not line.startswith("#") for pair in expand(line))


TRUTH: dict[str, Table] = {}

LM_HEAD = "lm_head = head"
HEAD_NORM = "norm.final|norm.head|other"  # norms inside heads: the field has no word for them

# Decoders


def llama(model: str = "model", mlp: str = "mlp") -> str:
    return f"""
        {model}.embed_tokens = embed
        {model}.layers.* = block
        {model}.layers.*.self_attn = attn
        {model}.layers.*.self_attn.{{q,k,v,o}}_proj = attn.{{q,k,v,out}}
        {model}.layers.*.{mlp} = mlp
        {model}.layers.*.{mlp}.{{gate,up,down}}_proj = mlp.{{gate,up,down}}
        {model}.layers.*.{{input,post_attention}}_layernorm = norm
        {model}.norm = norm.final
    """


def query_key_norms(model: str = "model") -> str:
    return f"{model}.layers.*.self_attn.{{q,k}}_norm = norm.inner"


def sandwich_norms(model: str = "model") -> str:
    return f"{model}.layers.*.{{pre,post}}_feedforward_layernorm = norm"


def experts(mlp: str = "mlp", router: str = "gate") -> str:
    return f"""
        model.layers.*.{mlp}.{router} = router
        model.layers.*.{mlp}.experts.{{gate_up,down}}_proj = experts.{{gate_up,down}}
    """


LATENT = """
    model.layers.*.self_attn.{q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj} = attn.{q_a,q_b,kv_a,kv_b}
    model.layers.*.self_attn.{q_a,kv_a}_layernorm = norm.inner
    model.layers.*.mlp.shared_experts = mlp
    model.layers.*.mlp.shared_experts.{gate,up,down}_proj = mlp.{gate,up,down}
"""

for name in ("llama", "mistral", "qwen2"):
    TRUTH[name] = table(llama(), LM_HEAD)
TRUTH["qwen3"] = table(llama(), LM_HEAD, query_key_norms())
TRUTH["qwen3_moe"] = table(llama(), LM_HEAD, query_key_norms(), experts())
TRUTH["mixtral"] = table(llama(), LM_HEAD, experts())
TRUTH["gemma2"] = table(llama(), LM_HEAD, sandwich_norms())
TRUTH["gemma3_text"] = TRUTH["olmo2"] = table(llama(), LM_HEAD, sandwich_norms(), query_key_norms())
for name in ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3"):
    TRUTH[name] = table(llama(), LM_HEAD, experts(), LATENT)
TRUTH["phi"] = table(
    llama(),
    LM_HEAD,
    """
    model.layers.*.self_attn.dense = attn.out
    model.layers.*.mlp.{fc1,fc2} = mlp.{up,down}
    model.final_layernorm = norm.final
    """,
)
TRUTH["phi3"] = table(
    llama(),
    LM_HEAD,
    """
    model.layers.*.self_attn.qkv_proj = attn.qkv
    model.layers.*.mlp.gate_up_proj = mlp.gate_up
    """,
)

GPT2 = """
    transformer.{wte,wpe} = {embed,embed.pos}
    transformer.h.* = block
    transformer.h.*.attn = attn
    transformer.h.*.attn.{c_attn,c_proj} = attn.{qkv,out}
    transformer.h.*.mlp = mlp
    transformer.h.*.mlp.{c_fc,c_proj} = mlp.{up,down}
    transformer.h.*.{ln_1,ln_2} = norm
    transformer.ln_f = norm.final
    lm_head = head
"""
TRUTH["gpt2"] = table(GPT2)
TRUTH["gpt2_cross"] = table(
    GPT2,
    """
    transformer.h.*.crossattention = cross
    transformer.h.*.crossattention.{q_attn,c_attn,c_proj} = cross.{q,kv,out}
    transformer.h.*.ln_cross_attn = norm
    """,
)
TRUTH["gpt_neo"] = table(
    GPT2,
    """
    transformer.h.*.attn = other
    transformer.h.*.attn.attention = attn
    transformer.h.*.attn.attention.{q_proj,k_proj,v_proj,out_proj} = attn.{q,k,v,out}
    """,
)
TRUTH["gptj"] = table(
    """
    transformer.wte = embed
    transformer.h.* = block
    transformer.h.*.attn = attn
    transformer.h.*.attn.{q_proj,k_proj,v_proj,out_proj} = attn.{q,k,v,out}
    transformer.h.*.mlp = mlp
    transformer.h.*.mlp.{fc_in,fc_out} = mlp.{up,down}
    transformer.h.*.ln_1 = norm
    transformer.ln_f = norm.final
    lm_head = head
    """
)
TRUTH["gpt_neox"] = table(
    """
    gpt_neox.embed_in = embed
    gpt_neox.layers.* = block
    gpt_neox.layers.*.attention = attn
    gpt_neox.layers.*.attention.{query_key_value,dense} = attn.{qkv,out}
    gpt_neox.layers.*.mlp = mlp
    gpt_neox.layers.*.mlp.{dense_h_to_4h,dense_4h_to_h} = mlp.{up,down}
    gpt_neox.layers.*.{input,post_attention}_layernorm = norm
    gpt_neox.final_layer_norm = norm.final
    lm_head = head
    """
)
for name in ("falcon_old", "falcon_mq", "falcon_new", "bloom"):
    TRUTH[name] = table(
        """
        transformer.word_embeddings = embed
        transformer.word_embeddings_layernorm = norm.embed
        transformer.h.* = block
        transformer.h.*.self_attention = attn
        transformer.h.*.self_attention.{query_key_value,dense} = attn.{qkv,out}
        transformer.h.*.mlp = mlp
        transformer.h.*.mlp.{dense_h_to_4h,dense_4h_to_h} = mlp.{up,down}
        transformer.h.*.{input_layernorm,post_attention_layernorm,ln_attn,ln_mlp} = norm
        transformer.ln_f = norm.final
        lm_head = head
        """
    )
TRUTH["opt"] = table(
    """
    model.decoder.{embed_tokens,embed_positions} = {embed,embed.pos}
    model.decoder.layers.* = block
    model.decoder.layers.*.self_attn = attn
    model.decoder.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj} = attn.{q,k,v,out}
    model.decoder.layers.*.{fc1,fc2} = mlp.{up,down}
    model.decoder.layers.*.{self_attn_layer_norm,final_layer_norm} = norm
    model.decoder.final_layer_norm = norm.final
    lm_head = head
    """
)
TRUTH["mpt"] = table(
    """
    transformer.wte = embed
    transformer.blocks.* = block
    transformer.blocks.*.attn = attn
    transformer.blocks.*.attn.{Wqkv,out_proj} = attn.{qkv,out}
    transformer.blocks.*.ffn = mlp
    transformer.blocks.*.ffn.{up_proj,down_proj} = mlp.{up,down}
    transformer.blocks.*.{norm_1,norm_2} = norm
    transformer.norm_f = norm.final
    lm_head = head
    """
)
TRUTH["mamba"] = TRUTH["mamba2"] = table(
    """
    backbone.embeddings = embed
    backbone.layers.* = block
    backbone.layers.*.mixer = ssm
    backbone.layers.*.mixer.{in_proj,conv1d,x_proj,dt_proj,out_proj} = ssm.{in,conv,x,dt,out}
    backbone.layers.*.mixer.norm = norm.inner
    backbone.layers.*.norm = norm
    backbone.norm_f = norm.final
    lm_head = head
    """
)
TRUTH["jamba"] = table(
    llama(mlp="feed_forward"),
    LM_HEAD,
    experts("feed_forward", "router"),
    """
    model.layers.*.mamba = ssm
    model.layers.*.mamba.{in_proj,conv1d,x_proj,dt_proj,out_proj} = ssm.{in,conv,x,dt,out}
    model.layers.*.mamba.{dt,b,c}_layernorm = norm.inner
    model.layers.*.pre_ff_layernorm = norm
    model.final_layernorm = norm.final
    """,
)
TRUTH["zamba"] = table(
    """
    model.embed_tokens = embed
    model.layers.* = block
    model.layers.*.{mamba,mamba_decoder.mamba} = ssm
    model.layers.*.mamba.{in_proj,conv1d,out_proj} = ssm.{in,conv,out}
    model.layers.*.mamba_decoder.mamba.{in_proj,conv1d,out_proj} = ssm.{in,conv,out}
    model.layers.*.{input_layernorm,mamba_decoder.input_layernorm} = norm
    model.layers.*.shared_transf.self_attn = attn
    model.layers.*.shared_transf.self_attn.{q,k,v,o}_proj = attn.{q,k,v,out}
    model.layers.*.shared_transf.feed_forward = mlp
    model.layers.*.shared_transf.feed_forward.{gate,up,down}_proj = mlp.{gate,up,down}
    model.layers.*.shared_transf.{input_layernorm,pre_ff_layernorm} = norm
    model.final_layernorm = norm.final
    lm_head = head
    """
)

# Encoders


def bert(model: str, *attentions: tuple[str, str]) -> str:
    text = f"""
        {model}.embeddings.{{word,position,token_type}}_embeddings = {{embed,embed.pos,embed.type}}
        {model}.embeddings.LayerNorm = norm.embed
        {model}.encoder.layer.* = block
        {model}.encoder.layer.*.{{intermediate,output}}.dense = mlp.{{up,down}}
        {model}.encoder.layer.*.output.LayerNorm = norm
    """
    for attention, role in (("attention", "attn"), *attentions):
        text += f"""
        {model}.encoder.layer.*.{attention} = {role}
        {model}.encoder.layer.*.{attention}.self.{{query,key,value}} = {role}.{{q,k,v}}
        {model}.encoder.layer.*.{attention}.output.dense = {role}.out
        {model}.encoder.layer.*.{attention}.output.LayerNorm = norm
        """
    return text


MASKED_LM = f"""
    cls.predictions.decoder = head
    cls.predictions.transform.LayerNorm = {HEAD_NORM}
"""
TRUTH["bert"] = table(bert("bert"), MASKED_LM)
TRUTH["bert_cls"] = table(bert("bert"), "classifier = head")
TRUTH["bert_decoder"] = table(bert("bert", ("crossattention", "cross")), MASKED_LM)
TRUTH["roberta"] = table(bert("roberta"), f"lm_head.decoder = head\nlm_head.layer_norm = {HEAD_NORM}")
TRUTH["electra"] = table(bert("electra"), f"generator_lm_head = head\ngenerator_predictions.LayerNorm = {HEAD_NORM}")
TRUTH["deberta_v2"] = table(
    bert("deberta"),
    MASKED_LM,
    """
    deberta.encoder.layer.*.attention.self.{query,key,value}_proj = attn.{q,k,v}
    deberta.encoder.layer.*.attention.self.{pos_key_proj,pos_query_proj} = pos.proj
    deberta.encoder.rel_embeddings = embed.pos
    # It normalizes the relative positions.
    deberta.encoder.LayerNorm = norm.embed|norm.final|other
    deberta.encoder.conv.conv = conv|other
    deberta.encoder.conv.LayerNorm = norm|norm.final|norm.embed|other
    """,
)
TRUTH["distilbert"] = table(
    f"""
    distilbert.embeddings.{{word,position}}_embeddings = {{embed,embed.pos}}
    distilbert.embeddings.LayerNorm = norm.embed
    distilbert.transformer.layer.* = block
    distilbert.transformer.layer.*.attention = attn
    distilbert.transformer.layer.*.attention.{{q_lin,k_lin,v_lin,out_lin}} = attn.{{q,k,v,out}}
    distilbert.transformer.layer.*.ffn = mlp
    distilbert.transformer.layer.*.ffn.{{lin1,lin2}} = mlp.{{up,down}}
    distilbert.transformer.layer.*.{{sa_layer_norm,output_layer_norm}} = norm
    vocab_layer_norm = {HEAD_NORM}
    vocab_projector = head
    """
)
ALBERT_LAYER = "albert.encoder.albert_layer_groups.*.albert_layers.*"
TRUTH["albert"] = table(
    f"""
    albert.embeddings.{{word,position,token_type}}_embeddings = {{embed,embed.pos,embed.type}}
    albert.embeddings.LayerNorm = norm.embed
    {ALBERT_LAYER} = block
    {ALBERT_LAYER}.attention = attn
    {ALBERT_LAYER}.attention.{{query,key,value,dense}} = attn.{{q,k,v,out}}
    {ALBERT_LAYER}.{{ffn,ffn_output}} = mlp.{{up,down}}
    {ALBERT_LAYER}.{{attention.LayerNorm,full_layer_layer_norm}} = norm
    predictions.LayerNorm = {HEAD_NORM}
    predictions.decoder = head
    """
)
TRUTH["modernbert"] = table(
    f"""
    model.embeddings.tok_embeddings = embed
    model.embeddings.norm = norm.embed
    model.layers.* = block
    model.layers.*.attn = attn
    model.layers.*.attn.{{Wqkv,Wo}} = attn.{{qkv,out}}
    model.layers.*.mlp = mlp
    model.layers.*.mlp.{{Wi,Wo}} = mlp.{{gate_up,down}}
    model.layers.*.{{attn_norm,mlp_norm}} = norm
    model.final_norm = norm.final
    head.norm = {HEAD_NORM}
    decoder = head
    """
)

# Encoder-decoders and speech

TRUTH["t5"] = TRUTH["t5_gated"] = TRUTH["mt5"] = table(
    """
    shared = embed
    {encoder,decoder}.embed_tokens = embed
    {encoder,decoder}.block.* = block
    {encoder,decoder}.block.*.layer.*.SelfAttention = attn
    {encoder,decoder}.block.*.layer.*.SelfAttention.{q,k,v,o} = attn.{q,k,v,out}
    {encoder,decoder}.block.*.layer.*.SelfAttention.relative_attention_bias = embed.pos
    decoder.block.*.layer.*.EncDecAttention = cross
    decoder.block.*.layer.*.EncDecAttention.{q,k,v,o} = cross.{q,k,v,out}
    {encoder,decoder}.block.*.layer.*.DenseReluDense = mlp
    {encoder,decoder}.block.*.layer.*.DenseReluDense.{wi_0,wi_1,wi,wo} = mlp.{gate,up,up,down}
    {encoder,decoder}.block.*.layer.*.layer_norm = norm
    {encoder,decoder}.final_layer_norm = norm.final
    lm_head = head
    """
)
BART = """
    model.shared = embed
    model.{encoder,decoder}.{embed_tokens,embed_positions,layernorm_embedding} = {embed,embed.pos,norm.embed}
    model.{encoder,decoder}.layers.* = block
    model.{encoder,decoder}.layers.*.self_attn = attn
    model.{encoder,decoder}.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj} = attn.{q,k,v,out}
    model.decoder.layers.*.encoder_attn = cross
    model.decoder.layers.*.encoder_attn.{q_proj,k_proj,v_proj,out_proj} = cross.{q,k,v,out}
    model.{encoder,decoder}.layers.*.{fc1,fc2} = mlp.{up,down}
    model.{encoder,decoder}.layers.*.{self_attn,final,encoder_attn}_layer_norm = norm
    model.{encoder,decoder}.layer_norm = norm.final
"""
TRUTH["bart"] = TRUTH["mbart"] = table(BART, LM_HEAD)
TRUTH["whisper"] = table(BART, "proj_out = head", "model.encoder.{conv1,conv2} = patch")
WAV2VEC2 = """
    wav2vec2.feature_extractor.conv_layers.* = block|other
    wav2vec2.feature_extractor.conv_layers.*.conv = conv|patch
    wav2vec2.feature_extractor.conv_layers.*.layer_norm = norm|norm.embed
    wav2vec2.feature_projection.layer_norm = norm.embed
    wav2vec2.encoder.pos_conv_embed.conv = embed.pos
    wav2vec2.encoder.layers.* = block
    wav2vec2.encoder.layers.*.attention = attn
    wav2vec2.encoder.layers.*.attention.{q_proj,k_proj,v_proj,out_proj} = attn.{q,k,v,out}
    wav2vec2.encoder.layers.*.feed_forward = mlp
    wav2vec2.encoder.layers.*.feed_forward.{intermediate_dense,output_dense} = mlp.{up,down}
    wav2vec2.encoder.layers.*.{layer_norm,final_layer_norm} = norm
    lm_head = head
"""
# The same module of the same name stands before the layers in one variant and behind them in the other.
TRUTH["wav2vec2"] = table(WAV2VEC2, "wav2vec2.encoder.layer_norm = norm.embed")
TRUTH["wav2vec2_stable"] = table(WAV2VEC2, "wav2vec2.encoder.layer_norm = norm.final")

# Vision and multimodal


def clip_encoder(model: str) -> str:
    return f"""
        {model}.encoder.layers.* = block
        {model}.encoder.layers.*.self_attn = attn
        {model}.encoder.layers.*.self_attn.{{q_proj,k_proj,v_proj,out_proj}} = attn.{{q,k,v,out}}
        {model}.encoder.layers.*.mlp = mlp
        {model}.encoder.layers.*.mlp.{{fc1,fc2}} = mlp.{{up,down}}
        {model}.encoder.layers.*.{{layer_norm1,layer_norm2}} = norm
    """


def clip_vision(model: str) -> str:
    return (
        clip_encoder(model)
        + f"""
        {model}.embeddings.{{patch_embedding,position_embedding}} = {{patch,embed.pos}}
        {model}.{{pre_layrnorm,post_layernorm}} = {{norm.embed,norm.final}}
    """
    )


def clip_text(model: str) -> str:
    return (
        clip_encoder(model)
        + f"""
        {model}.embeddings.{{token_embedding,position_embedding}} = {{embed,embed.pos}}
        {model}.final_layer_norm = norm.final
    """
    )


def pooling_head(model: str) -> str:
    return f"""
        {model}.head.attention = attn|cross|pool
        {model}.head.attention.{{in_proj_weight,out_proj}} = pool.{{qkv,out}}
        {model}.head.mlp = mlp|other
        {model}.head.mlp.{{fc1,fc2}} = {{mlp.up|other,mlp.down|other}}
        {model}.head.layernorm = {HEAD_NORM}
    """


def vit(model: str, layers: str, *norms: str) -> str:
    return f"""
        {model}.embeddings.{{position_embeddings,patch_embeddings.projection}} = {{embed.pos,patch}}
        {model}.{layers}.* = block
        {model}.{layers}.*.attention = attn
        {model}.{layers}.*.attention.{{q,k,v,o}}_proj = attn.{{q,k,v,out}}
        {model}.{layers}.*.mlp = mlp
        {model}.{layers}.*.mlp.{{fc1,fc2}} = mlp.{{up,down}}
        {model}.{layers}.*.{{{",".join(norms)}}} = norm
        {model}.layernorm = norm.final
        classifier = head
    """


TRUTH["clip"] = table(clip_text("text_model"), clip_vision("vision_model"), "{visual,text}_projection = head")
TRUTH["siglip"] = table(
    clip_text("text_model"), clip_vision("vision_model"), pooling_head("vision_model"), "text_model.head = head"
)
TRUTH["vit"] = table(vit("vit", "layers", "layernorm_before", "layernorm_after"))
TRUTH["dinov2"] = table(vit("dinov2", "encoder.layer", "norm1", "norm2"))
TRUTH["dinov2_swiglu"] = table(
    vit("dinov2", "encoder.layer", "norm1", "norm2"),
    "dinov2.encoder.layer.*.mlp.{gate,up,down}_proj = mlp.{gate,up,down}",
)
TRUTH["swin"] = table(
    vit("swin", "encoder.layers.*.blocks", "layernorm_before", "layernorm_after"),
    """
    swin.embeddings.norm = norm.embed
    swin.encoder.layers.*.blocks.*.attention.relative_position_bias.relative_position_bias_table = embed.pos
    swin.encoder.layers.*.downsample.{reduction,norm} = {down,norm}
    """,
)
TRUTH["convnext"] = table(
    """
    convnext.embeddings.{patch_embeddings,layernorm} = {patch,norm.embed}
    convnext.encoder.stages.*.layers.* = block
    convnext.encoder.stages.*.layers.*.{dwconv,layernorm,pwconv1,pwconv2} = {conv,norm,mlp.up,mlp.down}
    convnext.encoder.stages.*.downsampling_layer.* = down|norm
    convnext.layernorm = norm.final
    classifier = head
    """
)
TRUTH["detr"] = table(
    """
    model.{encoder,decoder}.layers.* = block
    model.{encoder,decoder}.layers.*.self_attn = attn
    model.{encoder,decoder}.layers.*.self_attn.{q,k,v,o}_proj = attn.{q,k,v,out}
    model.decoder.layers.*.encoder_attn = cross
    model.decoder.layers.*.encoder_attn.{q,k,v,o}_proj = cross.{q,k,v,out}
    model.{encoder,decoder}.layers.*.mlp = mlp
    model.{encoder,decoder}.layers.*.mlp.{fc1,fc2} = mlp.{up,down}
    model.{encoder,decoder}.layers.*.{self_attn,final,encoder_attn}_layer_norm = norm
    model.decoder.layernorm = norm.final
    model.backbone.model.embedder.embedder.convolution = patch
    model.backbone.model.encoder.stages.*.layers.* = block
    model.backbone.model.encoder.stages.*.layers.*.layer.*.convolution = conv
    model.backbone.model.encoder.stages.*.layers.*.shortcut.convolution = conv|down
    model.query_position_embeddings = embed.pos|other
    class_labels_classifier = head
    bbox_predictor.layers.* = head|other
    """
)


def sam_cross(*attentions: str) -> str:
    return "\n".join(
        f"""
        mask_decoder.transformer.{attention} = cross
        mask_decoder.transformer.{attention}.{{q_proj,k_proj,v_proj,out_proj}} = cross.{{q,k,v,out}}
        """
        for attention in attentions
    )


TRUTH["sam"] = table(
    sam_cross("layers.*.cross_attn_token_to_image", "layers.*.cross_attn_image_to_token", "final_attn_token_to_image"),
    """
    vision_encoder.{pos_embed,patch_embed.projection} = {embed.pos,patch}
    vision_encoder.layers.* = block
    vision_encoder.layers.*.attn = attn
    vision_encoder.layers.*.attn.{qkv,proj} = attn.{qkv,out}
    vision_encoder.layers.*.attn.{rel_pos_h,rel_pos_w} = embed.pos
    vision_encoder.layers.*.mlp = mlp
    vision_encoder.layers.*.mlp.{lin1,lin2} = mlp.{up,down}
    vision_encoder.layers.*.{layer_norm1,layer_norm2} = norm
    vision_encoder.neck.{layer_norm1,layer_norm2} = norm.final|other
    vision_encoder.neck.{conv1,conv2} = conv|other
    {prompt_encoder.shared_embedding,shared_image_embedding}.positional_embedding = embed.pos
    prompt_encoder.mask_embed.{layer_norm1,layer_norm2} = norm.embed|norm.final|other
    prompt_encoder.mask_embed.{conv1,conv2,conv3} = conv|other|patch
    prompt_encoder.{no_mask_embed,not_a_point_embed,point_embed.*} = embed|other
    mask_decoder.transformer.layers.* = block
    mask_decoder.transformer.layers.*.self_attn = attn
    mask_decoder.transformer.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj} = attn.{q,k,v,out}
    mask_decoder.transformer.layers.*.mlp = mlp
    mask_decoder.transformer.layers.*.mlp.{lin1,lin2} = mlp.{up,down}
    mask_decoder.transformer.layers.*.{layer_norm1,layer_norm2,layer_norm3,layer_norm4} = norm
    mask_decoder.transformer.layer_norm_final_attn = norm.final
    mask_decoder.upscale_layer_norm = norm.final|other
    mask_decoder.{upscale_conv1,upscale_conv2} = conv|other|down
    mask_decoder.{iou_token,mask_tokens} = embed|other
    mask_decoder.{output_hypernetworks_mlps.*,iou_prediction_head}.{proj_in,proj_out,layers.*} = other|head
    """,
)
TRUTH["llava"] = table(clip_vision("model.vision_tower"), llama("model.language_model"), LM_HEAD)
TRUTH["gemma3"] = table(
    clip_vision("model.vision_tower"),
    pooling_head("model.vision_tower"),
    llama("model.language_model"),
    sandwich_norms("model.language_model"),
    query_key_norms("model.language_model"),
    "model.multi_modal_projector.mm_soft_emb_norm = norm.embed|norm.final|other",
    LM_HEAD,
)
TRUTH["qwen2_vl"] = table(
    llama("model.language_model"),
    LM_HEAD,
    """
    model.visual.patch_embed.proj = patch
    model.visual.blocks.* = block
    model.visual.blocks.*.attn = attn
    model.visual.blocks.*.attn.{qkv,proj} = attn.{qkv,out}
    model.visual.blocks.*.mlp = mlp
    model.visual.blocks.*.mlp.{fc1,fc2} = mlp.{up,down}
    model.visual.blocks.*.{norm1,norm2} = norm
    model.visual.merger.ln_q = norm.final
    """,
)

# timm

STEM_NORM = "norm.embed|norm"
TIMM_VIT = """
    pos_embed = embed.pos
    patch_embed.proj = patch
    blocks.* = block
    blocks.*.attn = attn
    blocks.*.attn.{qkv,proj} = attn.{qkv,out}
    blocks.*.mlp = mlp
    blocks.*.mlp.{fc1,fc2} = mlp.{up,down}
    blocks.*.{norm1,norm2} = norm
    head = head
"""
TRUTH["timm_vit"] = table(TIMM_VIT, "norm = norm.final")
TRUTH["timm_vit_qknorm_ls"] = table(TIMM_VIT, "norm = norm.final\nblocks.*.attn.{q,k}_norm = norm.inner")
TRUTH["timm_deit_dist"] = table(TIMM_VIT, "norm = norm.final\nhead_dist = head")
TRUTH["timm_beit"] = table(TIMM_VIT, "fc_norm = norm.final\nblocks.*.attn.relative_position_bias_table = embed.pos")
TRUTH["timm_eva02"] = table(TIMM_VIT, "fc_norm = norm.final\nblocks.*.mlp.fc1 = mlp.gate_up")
TRUTH["timm_eva02_base"] = table(
    TIMM_VIT,
    """
    fc_norm = norm.final
    blocks.*.attn.{q,k,v}_proj = attn.{q,k,v}
    blocks.*.mlp.{fc1_g,fc1_x,norm} = {mlp.gate,mlp.up,norm.inner}
    """,
)
TIMM_SWIN = """
    patch_embed.{proj,norm} = {patch,norm.embed}
    layers.*.blocks.* = block
    layers.*.blocks.*.attn = attn
    layers.*.blocks.*.attn.{qkv,proj} = attn.{qkv,out}
    layers.*.blocks.*.mlp = mlp
    layers.*.blocks.*.mlp.{fc1,fc2} = mlp.{up,down}
    layers.*.blocks.*.{norm1,norm2} = norm
    layers.*.downsample.{reduction,norm} = {down,norm}
    norm = norm.final
    head.fc = head
"""
TRUTH["timm_swin"] = table(TIMM_SWIN, "layers.*.blocks.*.attn.relative_position_bias_table = embed.pos")
TRUTH["timm_swinv2"] = table(TIMM_SWIN, "layers.*.blocks.*.attn.cpb_mlp.* = pos.proj")
TRUTH["timm_convnext"] = table(
    """
    stem.* = patch|norm.embed
    stages.*.blocks.* = block
    stages.*.blocks.*.{conv_dw,norm} = {conv,norm}
    stages.*.blocks.*.mlp = mlp
    stages.*.blocks.*.mlp.{fc1,fc2} = mlp.{up,down}
    stages.*.downsample.* = down|norm
    head.{norm,fc} = {norm.final,head}
    """
)
TRUTH["timm_resnet18"] = TRUTH["timm_resnet50"] = table(
    f"""
    {{conv1,bn1}} = {{patch,{STEM_NORM}}}
    layer{{1,2,3,4}}.* = block
    layer{{1,2,3,4}}.*.{{conv1,conv2,conv3}} = conv
    layer{{1,2,3,4}}.*.{{bn1,bn2,bn3}} = norm
    layer{{1,2,3,4}}.*.downsample.* = down|conv|norm
    fc = head
    """
)
INVERTED_RESIDUAL = f"""
    {{conv_stem,bn1}} = {{patch,{STEM_NORM}}}
    blocks.*.* = block
    blocks.*.*.{{conv_pw,conv_dw,conv_pwl,conv}} = conv
    blocks.*.*.{{bn1,bn2,bn3}} = norm
    blocks.*.*.se.{{conv_reduce,conv_expand}} = se
    conv_head = other|conv|head|down
    classifier = head
"""
TRUTH["timm_mobilenetv3"] = table(INVERTED_RESIDUAL)
TRUTH["timm_efficientnet"] = table(INVERTED_RESIDUAL, "bn2 = norm.final")
TRUTH["timm_mixer"] = table(
    """
    stem.proj = patch
    blocks.* = block
    blocks.*.{mlp_tokens,mlp_channels} = mlp
    blocks.*.{mlp_tokens,mlp_channels}.{fc1,fc2} = mlp.{up,down}
    blocks.*.{norm1,norm2} = norm
    {norm,head} = {norm.final,head}
    """
)
ATTENTIONS = "{attn_block,attn_grid}"
MAXVIT = f"""
    stem.{{conv1,conv2,norm1}} = {{patch,patch,{STEM_NORM}}}
    stages.*.blocks.* = block
    stages.*.blocks.*.conv.{{conv1_1x1,conv2_kxk,conv3_1x1}} = conv
    stages.*.blocks.*.conv.{{pre_norm,norm1,norm2}} = norm
    stages.*.blocks.*.conv.se.{{fc1,fc2}} = se
    stages.*.blocks.*.conv.shortcut.expand = conv|down
    stages.*.blocks.*.{ATTENTIONS}.{{attn,mlp}} = {{attn,mlp}}
    stages.*.blocks.*.{ATTENTIONS}.attn.{{qkv,proj}} = attn.{{qkv,out}}
    stages.*.blocks.*.{ATTENTIONS}.attn.rel_pos.mlp.{{fc1,fc2}} = pos.proj
    stages.*.blocks.*.{ATTENTIONS}.attn.rel_pos.relative_position_bias_table = embed.pos
    stages.*.blocks.*.{ATTENTIONS}.mlp.{{fc1,fc2}} = mlp.{{up,down}}
    stages.*.blocks.*.{ATTENTIONS}.{{norm1,norm2}} = norm
    head.fc = head
"""
TRUTH["timm_maxvit"] = table(MAXVIT, "norm = norm.final")
TRUTH["timm_maxvit_tf"] = table(MAXVIT, "head.norm = norm.final\nhead.pre_logits.fc = other|head")
PAIRED_NORM = "norm.inner|norm"  # LeViT pairs each matrix with a batch norm
TRUTH["timm_levit"] = table(
    f"""
    stem.{{conv1,conv2,conv3,conv4}}.{{linear,bn}} = {{patch,{STEM_NORM}}}
    stages.*.blocks.* = block
    stages.*.blocks.*.{{attn,mlp}} = {{attn,mlp}}
    stages.*.blocks.*.attn.qkv.{{linear,bn}} = {{attn.qkv,{PAIRED_NORM}}}
    stages.*.blocks.*.attn.proj.ln.{{linear,bn}} = {{attn.out,{PAIRED_NORM}}}
    stages.*.blocks.*.attn.attention_biases = embed.pos
    stages.*.{{blocks.*,downsample}}.mlp.{{ln1,ln2}}.linear = mlp.{{up,down}}
    stages.*.{{blocks.*,downsample}}.mlp.{{ln1,ln2}}.bn = {PAIRED_NORM}
    stages.*.downsample = block|other
    stages.*.downsample.{{attn_downsample,mlp}} = {{attn,mlp}}
    stages.*.downsample.attn_downsample.attention_biases = embed.pos
    stages.*.downsample.attn_downsample.kv.{{linear,bn}} = {{attn.kv,{PAIRED_NORM}}}
    stages.*.downsample.attn_downsample.q.ln.{{linear,bn}} = {{attn.q,{PAIRED_NORM}}}
    stages.*.downsample.attn_downsample.proj.ln.{{linear,bn}} = {{attn.out,{PAIRED_NORM}}}
    {{head,head_dist}}.{{linear,bn}} = {{head,norm.final}}
    """
)
REGNET_BLOCK = "s{1,2,3,4}.b{1,2,3,4,5,6,7}"
TRUTH["timm_regnet"] = table(
    f"""
    stem.{{conv,bn}} = {{patch,{STEM_NORM}}}
    {REGNET_BLOCK} = block
    {REGNET_BLOCK}.{{conv1,conv2,conv3}}.{{conv,bn}} = {{conv,norm}}
    {REGNET_BLOCK}.se.{{fc1,fc2}} = se
    {REGNET_BLOCK}.downsample.{{conv,bn}} = {{conv|down,norm}}
    head.fc = head
    """
)

# diffusers

UNET_PARTS = "{down_blocks.*,up_blocks.*,mid_block}"
ENDS = "{conv_in,conv_norm_out,conv_out} = {patch,norm.final,head}"


def embedders(owner: str, *kinds: str) -> str:
    return f"{owner}{{{','.join(kinds)}}}.{{linear_1,linear_2}} = other|mod"


def residual_parts(parts: str) -> str:
    return f"""
        {parts}.resnets.* = block
        {parts}.resnets.*.{{norm1,norm2}} = norm
        {parts}.resnets.*.{{conv1,conv2}} = conv
        {parts}.resnets.*.conv_shortcut = conv|down
        {parts}.resnets.*.time_emb_proj = mod
        {parts}.{{downsamplers,upsamplers}}.*.conv = down
    """


def plain_attentions(parts: str) -> str:
    return f"""
        {parts}.attentions.* = block|attn
        {parts}.attentions.*.{{to_q,to_k,to_v,to_out.*,group_norm}} = {{attn.q,attn.k,attn.v,attn.out,norm}}
    """


def diffusion_block(block: str, *, cross: bool, norms: str, up: str, mlp: str = "ff") -> str:
    text = f"""
        {block} = block
        {block}.{{attn1,{mlp}}} = {{attn,mlp}}
        {block}.attn1.{{to_q,to_k,to_v,to_out.*}} = attn.{{q,k,v,out}}
        {block}.{mlp}.net.*.proj = {up}
        {block}.{mlp}.net.* = mlp.down
    """
    if norms:
        text += f"\n{block}.{{{norms}}} = norm"
    if cross:
        text += f"""
        {block}.attn2 = cross
        {block}.attn2.{{to_q,to_k,to_v,to_out.*}} = cross.{{q,k,v,out}}
        """
    return text


def cross_attentions(parts: str) -> str:
    return f"""
        {parts}.attentions.*.norm = norm
        {parts}.attentions.*.{{proj_in,proj_out}} = other
    """ + diffusion_block(
        f"{parts}.attentions.*.transformer_blocks.*", cross=True, norms="norm1,norm2,norm3", up="mlp.gate_up"
    )


TIME = embedders("", "time_embedding", "add_embedding")
TRUTH["unet2d"] = table(ENDS, TIME, residual_parts(UNET_PARTS), plain_attentions(UNET_PARTS))
TRUTH["sd15_unet"] = TRUTH["sdxl_unet"] = table(ENDS, TIME, residual_parts(UNET_PARTS), cross_attentions(UNET_PARTS))
TRUTH["controlnet"] = table(
    "conv_in = patch",
    TIME,
    residual_parts(UNET_PARTS),
    cross_attentions(UNET_PARTS),
    """
    controlnet_cond_embedding.{conv_in,conv_out,blocks.*} = patch|conv|other
    {controlnet_down_blocks.*,controlnet_mid_block} = head|other|conv
    """,
)
AUTOENCODER_PARTS = f"{{encoder,decoder}}.{UNET_PARTS}"
AUTOENCODER = (
    f"{{encoder,decoder}}.{ENDS}",
    "{quant_conv,post_quant_conv} = other|conv",
    residual_parts(AUTOENCODER_PARTS),
    plain_attentions(AUTOENCODER_PARTS),
)
TRUTH["vae_kl"] = table(*AUTOENCODER)
TRUTH["vq"] = table(*AUTOENCODER, "quantize.embedding = embed|other")

JOINT = """
    transformer_blocks.* = block
    transformer_blocks.*.attn = attn
    transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.*} = attn.{q,k,v,out}
    transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj,to_add_out} = attn.{ctx_q,ctx_k,ctx_v,ctx_out}
    transformer_blocks.*.attn.{norm_q,norm_k,norm_added_q,norm_added_k} = norm.inner
    transformer_blocks.*.{norm1,norm1_context}.linear = mod
    transformer_blocks.*.{ff,ff_context} = mlp
    transformer_blocks.*.{ff,ff_context}.{net.*.proj,net.*} = mlp.{up,down}
    norm_out.linear = mod
    proj_out = head
"""
SINGLE_STREAM = """
    single_transformer_blocks.* = block
    single_transformer_blocks.*.attn = attn
    single_transformer_blocks.*.attn.{to_q,to_k,to_v} = attn.{q,k,v}
    single_transformer_blocks.*.attn.{norm_q,norm_k} = norm.inner
    single_transformer_blocks.*.norm.linear = mod
    single_transformer_blocks.*.{proj_mlp,proj_out} = {mlp.up,attn_mlp.out}
"""
CONDITIONS = ("timestep_embedder", "text_embedder", "guidance_embedder")
TRUTH["sd3"] = table(
    JOINT,
    embedders("time_text_embed.", *CONDITIONS),
    """
    pos_embed.proj = patch
    context_embedder = other|embed
    # Dual attention: attn2 is a second self attention.
    transformer_blocks.*.attn2 = attn
    transformer_blocks.*.attn2.{to_q,to_k,to_v,to_out.*} = attn.{q,k,v,out}
    transformer_blocks.*.attn2.{norm_q,norm_k} = norm.inner
    """,
)
TRUTH["flux"] = table(
    JOINT,
    SINGLE_STREAM,
    embedders("time_text_embed.", *CONDITIONS),
    "{context_embedder,x_embedder} = {other|embed,patch}",
)
TRUTH["pixart"] = table(
    diffusion_block("transformer_blocks.*", cross=True, norms="", up="mlp.up"),
    embedders("adaln_single.emb.", "timestep_embedder"),
    """
    pos_embed.proj = patch
    adaln_single.linear = mod
    caption_projection.{linear_1,linear_2} = other
    proj_out = head
    """,
)
TRUTH["dit"] = table(
    diffusion_block("transformer_blocks.*", cross=False, norms="", up="mlp.up"),
    embedders("transformer_blocks.*.norm1.emb.", "timestep_embedder"),
    """
    pos_embed.proj = patch
    transformer_blocks.*.norm1.linear = mod
    transformer_blocks.*.norm1.emb.class_embedder.embedding_table = embed|other|mod|embed.type
    {proj_out_1,proj_out_2} = {mod|head,head}
    """,
)
TRUTH["wan"] = TRUTH["wan_i2v"] = table(
    diffusion_block("blocks.*", cross=True, norms="norm2", up="mlp.up", mlp="ffn"),
    """
    patch_embedding = patch
    blocks.*.attn1.{norm_q,norm_k} = norm.inner
    blocks.*.attn2.{norm_q,norm_k,norm_added_k} = norm.inner
    blocks.*.attn2.add_{k,v}_proj = cross.{ctx_k,ctx_v}
    condition_embedder.time_embedder.{linear_1,linear_2} = other|mod
    condition_embedder.text_embedder.{linear_1,linear_2} = other
    condition_embedder.time_proj = mod|other
    condition_embedder.image_embedder.ff = mlp|other
    condition_embedder.image_embedder.ff.{net.*.proj,net.*} = {mlp.up|other,mlp.down|other}
    condition_embedder.image_embedder.{norm1,norm2} = norm.embed|norm|other
    proj_out = head
    """,
)
REFINER = "context_embedder.token_refiner.refiner_blocks.*"
TRUTH["hunyuan_video"] = table(
    JOINT,
    SINGLE_STREAM,
    embedders("time_text_embed.", *CONDITIONS),
    embedders("context_embedder.time_text_embed.", *CONDITIONS),
    f"""
    x_embedder.proj = patch
    context_embedder.proj_in = other
    {REFINER} = block
    {REFINER}.{{attn,ff}} = {{attn,mlp}}
    {REFINER}.attn.{{to_q,to_k,to_v,to_out.*}} = attn.{{q,k,v,out}}
    {REFINER}.ff.{{net.*.proj,net.*}} = mlp.{{up,down}}
    {REFINER}.{{norm1,norm2}} = norm
    {REFINER}.norm_out.linear = mod
    """,
)
