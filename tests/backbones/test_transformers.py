"""The transformers: equal to timm's own forward and to slow references, whatever the batch; sizes, weights, compilation."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bench.backbone import BACKBONES, Backbone
from bench.backbones.apvit import PoolingViT, keep_top
from bench.backbones.deit import TimmViT
from bench.training.guidance import layer_attention, misalignment

TRANSFORMERS = ("deit-tiny", "deit-small", "deit-base", "mini-vit", "apvit", "mini-apvit")


def make(name: str, *, size: int, **options: object) -> Backbone:
    torch.manual_seed(0)
    target = BACKBONES.get(name).target
    return target.build(target.Options.model_validate(options), image_size=size).eval()


def noise(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def timm_attentions(net: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Final tokens and softmax attention of every block, by timm's own unfused forward and hooks."""
    seen: list[torch.Tensor] = []
    hooks = []
    for block in net.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output)))
    tokens = net.forward_features(images)
    for hook in hooks:
        hook.remove()
    return tokens, seen


@pytest.mark.parametrize(("name", "size"), [("mini-vit", 32), ("mini-vit", 64), ("deit-tiny", 64)])
def test_layers_of_a_vit_are_those_of_timms_own_forward(name, size):
    backbone = make(name, size=size)
    assert isinstance(backbone, TimmViT)
    images = noise(2, size)
    with torch.inference_mode():
        layers = backbone(images).layers
        tokens, attentions = timm_attentions(backbone.net, images)
    g = backbone.grid[0]
    expected = torch.zeros(2, g * g)
    for attention in attentions:
        for head in range(attention.shape[1]):
            expected += attention[:, head, 0, 1:] / attention.shape[1]
    torch.testing.assert_close(layers[1], tokens[:, 1:].transpose(1, 2).reshape(2, -1, g, g), rtol=0, atol=2e-6)
    torch.testing.assert_close(layers[2], expected.reshape(2, 1, g, g), rtol=0, atol=1e-6)


def test_whole_attention_moves_the_tokens_like_the_fused_one():
    backbone = make("mini-vit", size=32)
    with torch.inference_mode():
        tokens = backbone.embed(noise(2, 32))
        fused, row = backbone.block(0, tokens, whole=False)
        plain, matrix = backbone.block(0, tokens, whole=True)
    torch.testing.assert_close(plain, fused, rtol=0, atol=2e-6)
    torch.testing.assert_close(matrix[:, :, :1], row, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [1, 2])
def test_both_layers_of_a_vit_can_be_guided(layer):
    backbone = make("mini-vit", size=32).train()
    target = torch.rand(2, 1, 4, 4)
    (backbone(noise(2, 32)).layers[layer].mean(dim=1, keepdim=True) * target).sum().backward()
    assert backbone.net.blocks[0].attn.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["mini-vit", "deit-tiny"])
def test_guidance_of_a_random_vit_has_no_exploding_gradient(name):
    backbone = make(name, size=64).train()
    attention = layer_attention(backbone(noise(8, 64)).layers[1])
    misalignment(attention, torch.rand(8, 28, 28), torch.ones(8, dtype=torch.bool)).mean().backward()
    norm = torch.stack([p.grad.norm() for p in backbone.parameters() if p.grad is not None]).norm()
    assert 1e-3 < norm < 1e3  # 1e7 where the final gain is 1 everywhere


def test_an_image_that_patches_do_not_tile_is_refused_with_the_nearest_size():
    with pytest.raises(ValueError, match=r"images.size = 100 is not a multiple of the patch side 16; --set images.size=96"):
        make("deit-small", size=100)
    with pytest.raises(ValueError, match=r"--set images.size=64"):
        make("mini-apvit", size=62)


def test_the_large_apvit_takes_112_pixels_only():
    assert BACKBONES.get("apvit").target.image_sizes == (112,)
    with pytest.raises(ValueError, match=r"takes 112 only; --set images.size=112"):
        make("apvit", size=224)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="not a multiple of heads"):
        make("mini-vit", size=32, dim=64, heads=3)


def test_position_embedding_of_a_weights_file_is_resampled_to_the_image(tmp_path):
    net = timm.create_model("deit_tiny_patch16_224", num_classes=0)
    save_file(net.state_dict(), tmp_path / "deit.safetensors")
    backbone = make("deit-tiny", size=64, weights=str(tmp_path / "deit.safetensors"))
    assert backbone.pretrained
    assert backbone.grid == (4, 4)
    embedding = net.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(embedding, size=(4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(backbone.net.pos_embed[:, 1:], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(backbone.net.blocks[3].attn.qkv.weight, net.blocks[3].attn.qkv.weight)


def test_weights_of_a_file_fill_the_whole_apvit(tmp_path):
    donor = make("mini-apvit", size=32)
    torch.nn.init.normal_(donor.vit.pos_embed)
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    backbone = make("mini-apvit", size=32, weights=str(tmp_path / "w.safetensors"))
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in donor.state_dict().items())
    assert backbone.pretrained


def test_apvit_has_no_imagenet_weights():
    with pytest.raises(ValueError, match="no published weights"):
        make("mini-apvit", size=32, weights="imagenet")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_plan_can_build_a_network_without_memory(name):
    with torch.device("meta"):
        backbone = make(name, size=112, drop_path=0.1) if "deit" in name else make(name, size=112)
    assert {p.device.type for p in backbone.parameters()} == {"meta"}
    assert backbone.last == 1
    assert BACKBONES.get(name).info.guided_layers == (1,)


@pytest.mark.parametrize("name", ["mini-vit", "mini-apvit"])
def test_a_transformer_compiles_to_one_graph(name):
    backbone = make(name, size=32)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    images = noise(2, 32)
    with torch.no_grad():
        for layer, value in backbone(images).layers.items():
            torch.testing.assert_close(compiled(images).layers[layer], value, rtol=0, atol=1e-6)


@given(seed=st.integers(0, 2**31), count=st.integers(1, 12), keep=st.integers(1, 12))
def test_keep_top_keeps_the_best_in_their_order(seed, count, keep):
    keep = min(keep, count)
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((3, count, 4)).astype(np.float32)
    scores = np.stack([rng.permutation(count) for _ in range(3)]).astype(np.float32)
    kept = keep_top(torch.from_numpy(tokens), torch.from_numpy(scores), count=keep).numpy()
    for i in range(3):
        expected = [tokens[i, j] for j in range(count) if scores[i, j] >= count - keep]
        np.testing.assert_array_equal(kept[i], np.stack(expected))


SLOW_ATTENTION = {
    "SUM": lambda x: sum(x),
    "SUM_ABS_1": lambda x: sum(abs(v) for v in x),
    "SUM_ABS_2": lambda x: sum(v * v for v in x),
    "MAX": max,
    "MAX_ABS_1": lambda x: max(abs(v) for v in x),
}


def slow_pooling(net: PoolingViT, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class token and patch attention of one image, token by token (Xue et al., section III)."""
    projected = net.vit.patch_embed.proj(net.extractor(image[None]))[0].flatten(1).T  # (N, D)
    weigh = SLOW_ATTENTION[net.attention]
    attention = torch.tensor([weigh(patch.tolist()) for patch in projected])
    best = sorted(range(len(projected)), key=lambda n: -attention[n].item())[: net.keep_patches]
    position = net.vit.pos_embed[0]
    tokens = [net.vit.cls_token[0, 0] + position[0]] + [projected[n] + position[n + 1] for n in sorted(best)]
    for block, rate in zip(net.vit.blocks, net.keep_rates, strict=True):
        stacked = torch.stack(tokens)
        width = stacked.shape[1] // block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(stacked)).split(stacked.shape[1], dim=1)
        score, mixed = torch.zeros(len(tokens)), []
        for head in range(block.attn.num_heads):
            part = slice(head * width, (head + 1) * width)
            logits = q[:, part] @ k[:, part].T / width**0.5
            score += logits[0]
            mixed.append(logits.softmax(dim=1) @ v[:, part])
        stacked = stacked + block.attn.proj(torch.cat(mixed, dim=1))
        keep = int((len(tokens) - 1) * rate)
        best = sorted(range(1, len(tokens)), key=lambda n: -score[n].item())[:keep]
        stacked = stacked[[0, *sorted(best)]]
        tokens = list(stacked + block.mlp(block.norm2(stacked)))
    return net.vit.norm(tokens[0]), attention


@pytest.mark.parametrize("attention", list(SLOW_ATTENTION))
def test_apvit_equals_a_slow_reference_whatever_weighs_the_patches(attention):
    net = make("mini-apvit", size=32, attention=attention, keep_rate=0.7)
    assert isinstance(net, PoolingViT)
    images = noise(3, 32)
    with torch.inference_mode():
        features = net(images)
        for i in range(3):
            token, weights = slow_pooling(net, images[i])
            torch.testing.assert_close(features.extras["cls"][i], token, rtol=0, atol=1e-5)
            torch.testing.assert_close(features.layers[2][i].flatten(), weights, rtol=1e-5, atol=1e-5)


def test_learned_patch_attention_is_trained_through_the_features_it_multiplies():
    net = make("mini-apvit", size=32, attention="LA").train()
    features = net(noise(4, 32))
    assert features.layers[2].min() > 0
    assert features.layers[2].max() < 1
    features.extras["cls"].square().sum().backward()
    assert net.attn_f[0].weight.grad.abs().max() > 0


def test_a_batch_as_large_as_the_number_of_tokens_is_pruned_like_any_other():
    net = make("mini-apvit", size=32, keep_rate=0.6, depth=4)
    counts: list[int] = []
    for block in net.vit.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: counts.append(output.shape[1]))
    with torch.inference_mode():
        net(noise(1, 32))
        assert counts == [14, 14, 8, 5]  # class token and 13 of 16 patches, then 60 % twice
        for size in (14, 8, 5, 13, 7, 4):  # every number of tokens, and of patches, that a guard could mistake it for
            images = noise(size, 32)
            together = net(images).extras["cls"]
            apart = torch.cat([net(part).extras["cls"] for part in images.split(3)])
            torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_the_convolutional_part_gives_an_eighth_of_the_side_and_negative_values():
    features = make("mini-apvit", size=64)(noise(2, 64)).layers[1]
    assert features.shape == (2, 64, 8, 8)
    assert features.min() < 0
